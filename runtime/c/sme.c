/* SPDX-License-Identifier: Apache-2.0
 *
 * sme.c: the one function of Arm's SME support routines that kernels call.
 *
 * A function that enters streaming mode writes the vector length that its caller has (VG, in 64-bit
 * granules) into its frame, for programs that unwind the stack. Without SVE, LLVM asks for it by a
 * call. No unwinder reads the frames of kernels, so any answer will do, and a CPU without SVE has no
 * better one than 0 (Arm ABI for the 64-bit architecture, AAPCS64, "SME support routines").
 */
#if defined(__aarch64__)
#include <stdint.h>

__attribute__((visibility("hidden"))) uint64_t __arm_get_current_vg(void);

/* Written out, because the caller expects all registers but x0 as they were. */
__attribute__((naked)) uint64_t __arm_get_current_vg(void) {
  __asm__("mov x0, #0\n\tret");
}

#else

/* ISO C has no empty files. */
typedef int llamac_no_sme;

#endif
