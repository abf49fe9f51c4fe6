/* SPDX-License-Identifier: Apache-2.0
 *
 * aee.c: codes of FastRPC in words: cause, then fix. Numbers: inc/AEEStdErr.h of
 * github.com/qualcomm/fastrpc. The DSP adds 0x80000400 to its own.
 */
#include "driver.h"

#include <stddef.h>

enum { DSP_OFFSET_BITS = (int)0x80000400, LOW_BITS = 0x3ff };

static const char NO_MEMORY[] =
    "the DSP or the phone has no memory for it. Close what else uses the NPU, or compile with a "
    "shorter context";
static const char NOT_LOADED[] =
    "the DSP cannot find or load the library. Keep dsp/ beside weights.bin, readable for this "
    "process; open no other DSP session first";
static const char NOT_SIGNED[] =
    "the DSP loads signed libraries alone here. Use a phone with unsigned processes on the cDSP, "
    "or have the library signed";
static const char NO_DEVICE[] =
    "this process may not use the DSP's device. An app declares uses-native-library "
    "libcdsprpc.so; on Linux give the user the fastrpc device";
static const char ENDED[] =
    "the process on the DSP has ended, likely by a crash. Close the model and open it again; the "
    "DSP's log (logcat, tag adsprpc) says more";
static const char WRONG_FORM[] =
    "the DSP does not know the form of the library. Compile the bundle again for this phone";
static const char BUSY[] = "no DSP session is free. Close other apps that use the NPU";

static const struct {
  int code;
  const char *text;
} meanings[] = {
    {0x02, NO_MEMORY},  {0x1e, NO_MEMORY},  {0x65, NO_MEMORY},  {0x66, NO_MEMORY},
    {0x67, NO_MEMORY},  {0x68, NO_MEMORY},  {0x06, NOT_LOADED}, {0x35, NOT_LOADED},
    {0x3e, NOT_LOADED}, {0x45, NOT_LOADED}, {0x201, NOT_LOADED}, {0x38, NOT_SIGNED},
    {0x69, NOT_SIGNED}, {0x81, NOT_SIGNED}, {0x82, NOT_SIGNED}, {0x15, NOT_SIGNED},
    {0x3b, NO_DEVICE},  {0x57, NO_DEVICE},  {0x4e, NO_DEVICE},  {39, ENDED},
    {0x0d, ENDED},      {0x30, ENDED},      {0x72, ENDED},
    {0x52, WRONG_FORM}, {0x42, WRONG_FORM}, {0x37, WRONG_FORM}, {0x04, WRONG_FORM},
    {0x8a, BUSY},
};

const char *aee_explain(int code) {
  /* One number, two meanings: the peer has gone (104), or no memory for calls (0x68). The first
   * is the kernel's, which adds nothing. */
  if (code == 104) return ENDED;
  if ((code & DSP_OFFSET_BITS) == DSP_OFFSET_BITS) code &= LOW_BITS;
  for (size_t i = 0; i < sizeof meanings / sizeof meanings[0]; i++)
    if (meanings[i].code == code) return meanings[i].text;
  return "see AEEStdErr.h of FastRPC for the code, and the DSP's log (logcat, tag adsprpc)";
}
