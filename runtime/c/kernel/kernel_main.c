/* SPDX-License-Identifier: Apache-2.0
 *
 * kernel_main.c: a program that calls one kernel on tensors from standard input.
 *
 * It is linked with the object file of the kernel `__tvm_ffi_kernel` and is what tests, counting and
 * tuning run in an emulator or on a device. Input, little endian: a kernel_call, then a
 * kernel_tensor for each tensor, then the bytes of all tensors, each aligned within this part as the
 * kernel needs it. Output: the bytes of the same part after the call, then a kernel_costs. Compiled
 * with LLAMAC_MARK_KERNELS, the beginning and the end of the call are marked for plug-ins that count,
 * and an emulated Hexagon counts by itself.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "alignment.h"
#include "hexagon_counters.h"
#include "kernel_marks.h"
#include "program.h"

enum { MAX_TENSORS = 24, MAX_DIMS = 4, ALIGNMENT = LLAMAC_KERNEL_ALIGNMENT };

typedef struct {
  char magic[8]; /* "LLAMACK1" */
  int64_t begin, end;
  uint32_t num_tensors;
  uint32_t repeats; /* calls, at least 1 */
  uint64_t data_bytes;
} kernel_call;

typedef struct {
  uint64_t offset; /* into the data */
  uint8_t dtype_code, dtype_bits, ndim, zero[5];
  int64_t shape[MAX_DIMS];
} kernel_tensor;

/* What all calls executed; zeros where the processor does not say. */
typedef struct {
  uint64_t packets, instructions, vector_instructions;
} kernel_costs;

static kernel_costs costs;

int32_t __tvm_ffi_kernel(void *self, const TVMFFIAny *args, int32_t num_args, TVMFFIAny *result);

/* Called by the kernel when an argument is not what it was compiled for. */
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t num_parts) {
  fprintf(stderr, "%s: ", kind);
  for (int32_t p = 0; p < num_parts; p++)
    if (parts[p] != NULL) fputs(parts[p], stderr);
  fputc('\n', stderr);
}

static void die(const char *message) {
  fprintf(stderr, "kernel runner: %s\n", message);
  exit(2);
}

static void read_exactly(void *place, size_t bytes) {
  if (fread(place, 1, bytes, stdin) != bytes) die("the input ends too early");
}

#if defined(__hexagon__) && defined(LLAMAC_MARK_KERNELS)
static int32_t call(const TVMFFIAny *args, int32_t num_args, TVMFFIAny *result) {
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
static int32_t call(const TVMFFIAny *args, int32_t num_args, TVMFFIAny *result) {
  llamac_mark_begin();
  int32_t status = __tvm_ffi_kernel(NULL, args, num_args, result);
  llamac_mark_end();
  return status;
}
#endif

static void make_view(const kernel_tensor *tensor, uint8_t *data, uint64_t data_bytes,
                      int64_t *strides, DLTensor *view) {
  if (tensor->ndim < 1 || tensor->ndim > MAX_DIMS || tensor->offset > data_bytes)
    die("a tensor has a wrong shape or offset");
  int64_t stride = 1;
  for (int d = tensor->ndim - 1; d >= 0; d--) {
    strides[d] = stride;
    stride *= tensor->shape[d];
  }
  memset(view, 0, sizeof *view);
  view->data = data + tensor->offset;
  view->device.device_type = 1;
  view->ndim = tensor->ndim;
  view->dtype.code = tensor->dtype_code;
  view->dtype.bits = tensor->dtype_bits;
  view->dtype.lanes = 1;
  view->shape = (int64_t *)(uintptr_t)tensor->shape;
  view->strides = strides;
}

int main(void) {
  kernel_call header;
  kernel_tensor tensors[MAX_TENSORS];
  int64_t strides[MAX_TENSORS][MAX_DIMS];
  DLTensor views[MAX_TENSORS];
  TVMFFIAny arguments[MAX_TENSORS + 2];
  read_exactly(&header, sizeof header);
  if (memcmp(header.magic, "LLAMACK1", 8) != 0) die("not a kernel call");
  if (header.num_tensors > MAX_TENSORS) die("too many tensors");
  read_exactly(tensors, header.num_tensors * sizeof *tensors);
  uint8_t *data = aligned_alloc(ALIGNMENT, (header.data_bytes + ALIGNMENT) / ALIGNMENT * ALIGNMENT);
  if (data == NULL) die("no memory");
  read_exactly(data, header.data_bytes);
  memset(arguments, 0, sizeof arguments);
  int32_t count = (int32_t)header.num_tensors;
  for (int32_t i = 0; i < count; i++) {
    make_view(&tensors[i], data, header.data_bytes, strides[i], &views[i]);
    arguments[i].type_index = LLAMAC_FFI_DLTENSOR;
    arguments[i].v_ptr = &views[i];
    if (!llamac_is_aligned(&views[i])) die("a tensor is not aligned as kernels need it");
  }
  arguments[count].type_index = arguments[count + 1].type_index = LLAMAC_FFI_INT;
  arguments[count].v_int64 = header.begin;
  arguments[count + 1].v_int64 = header.end;
  for (uint32_t r = 0; r < header.repeats; r++) {
    TVMFFIAny result = {.type_index = LLAMAC_FFI_NONE};
    if (call(arguments, count + 2, &result) != 0) return 3;
  }
  if (fwrite(data, 1, header.data_bytes, stdout) != header.data_bytes ||
      fwrite(&costs, sizeof costs, 1, stdout) != 1)
    die("cannot write");
  free(data);
  return fflush(stdout) == 0 ? 0 : 2;
}
