/* SPDX-License-Identifier: Apache-2.0
 *
 * kernel_main.c: a program that calls one kernel on tensors from standard input.
 *
 * It is linked with the object file of the kernel `__tvm_ffi_kernel` and is what tests, counting and
 * tuning run in an emulator or on a device. Input: see kernel_call.h. Output: the bytes of all
 * tensors after the call, then a kernel_costs. Compiled with LLAMAC_MARK_KERNELS, the beginning and
 * the end of the call are marked for plug-ins that count, and an emulated Hexagon counts by itself.
 */
#include "hexagon_counters.h"
#include "kernel_call.h"
#include "kernel_marks.h"

/* What all calls executed; zeros where the processor does not say. */
typedef struct {
  uint64_t packets, instructions, vector_instructions;
} kernel_costs;

static kernel_costs costs;

int32_t __tvm_ffi_kernel(void *self, const TVMFFIAny *args, int32_t num_args, TVMFFIAny *result);

#if defined(__hexagon__) && defined(LLAMAC_MARK_KERNELS)
static int32_t call_kernel(const TVMFFIAny *args, int32_t num_args, TVMFFIAny *result) {
  uint32_t vectors = LLAMAC_EXECUTED(LLAMAC_VECTOR_INSTRUCTIONS);
  uint32_t instructions = LLAMAC_EXECUTED(LLAMAC_INSTRUCTIONS);
  uint32_t packets = LLAMAC_EXECUTED(LLAMAC_PACKETS);
  int32_t status = __tvm_ffi_kernel(NULL, args, num_args, result);
  costs.packets += (uint32_t)(LLAMAC_EXECUTED(LLAMAC_PACKETS) - packets);
  costs.instructions += (uint32_t)(LLAMAC_EXECUTED(LLAMAC_INSTRUCTIONS) - instructions);
  costs.vector_instructions += (uint32_t)(LLAMAC_EXECUTED(LLAMAC_VECTOR_INSTRUCTIONS) - vectors);
  return status;
}
#else
static int32_t call_kernel(const TVMFFIAny *args, int32_t num_args, TVMFFIAny *result) {
  llamac_mark_begin();
  int32_t status = __tvm_ffi_kernel(NULL, args, num_args, result);
  llamac_mark_end();
  return status;
}
#endif

int main(void) {
  static loaded_call call;
  read_exactly(&call.header, sizeof call.header);
  if (memcmp(call.header.magic, "LLAMACK1", 8) != 0) die("not a kernel call");
  load_tensors(&call);
  for (uint32_t r = 0; r < call.header.repeats; r++) {
    TVMFFIAny result = {.type_index = LLAMAC_FFI_NONE};
    if (call_kernel(call.arguments, (int32_t)call.header.num_tensors + 2, &result) != 0) return 3;
  }
  write_exactly(call.data, call.header.data_bytes);
  write_exactly(&costs, sizeof costs);
  free(call.data);
  return fflush(stdout) == 0 ? 0 : 2;
}
