/* SPDX-License-Identifier: Apache-2.0
 *
 * kernel_call.h: the call of one kernel, read from standard input.
 *
 * Input, little endian: a kernel_call, then a kernel_tensor for each tensor, then the bytes of all
 * tensors, each aligned within this part as the kernel needs it. Both programs that call kernels
 * (kernel_main.c, timed_main.c) are one translation unit, so these functions are static.
 */
#ifndef LLAMAC_KERNEL_CALL_H
#define LLAMAC_KERNEL_CALL_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "alignment.h"
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

typedef struct {
  kernel_call header;
  kernel_tensor tensors[MAX_TENSORS];
  int64_t strides[MAX_TENSORS][MAX_DIMS];
  DLTensor views[MAX_TENSORS];
  TVMFFIAny arguments[MAX_TENSORS + 2];
  uint8_t *data;
} loaded_call;

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

static void write_exactly(const void *place, size_t bytes) {
  if (fwrite(place, 1, bytes, stdout) != bytes) die("cannot write");
}

/* Memory as kernels need it; the program ends without it. */
static uint8_t *allocate(uint64_t bytes) {
  uint8_t *memory = aligned_alloc(ALIGNMENT, (bytes + ALIGNMENT) / ALIGNMENT * ALIGNMENT);
  if (memory == NULL) die("no memory");
  return memory;
}

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

static void set_range(loaded_call *call, int64_t begin, int64_t end) {
  TVMFFIAny *range = call->arguments + call->header.num_tensors;
  range[0].type_index = range[1].type_index = LLAMAC_FFI_INT;
  range[0].v_int64 = begin;
  range[1].v_int64 = end;
}

/* Read all tensors behind the header, and make the kernel's arguments. */
static void load_tensors(loaded_call *call) {
  kernel_call *header = &call->header;
  if (header->num_tensors > MAX_TENSORS) die("too many tensors");
  read_exactly(call->tensors, header->num_tensors * sizeof *call->tensors);
  call->data = allocate(header->data_bytes);
  read_exactly(call->data, header->data_bytes);
  for (uint32_t i = 0; i < header->num_tensors; i++) {
    make_view(&call->tensors[i], call->data, header->data_bytes, call->strides[i], &call->views[i]);
    call->arguments[i].type_index = LLAMAC_FFI_DLTENSOR;
    call->arguments[i].v_ptr = &call->views[i];
    if (!llamac_is_aligned(&call->views[i])) die("a tensor is not aligned as kernels need it");
  }
  set_range(call, header->begin, header->end);
}

#endif /* LLAMAC_KERNEL_CALL_H */
