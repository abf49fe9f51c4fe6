/* SPDX-License-Identifier: Apache-2.0
 *
 * timed_main.c: a program that measures how long one kernel takes, beside another.
 *
 * It is linked with the objects of two kernels that take the same tensors: `__tvm_ffi_kernel`, whose
 * results are judged, and `__tvm_ffi_reference`, which is measured in turns with it, so that a
 * device that becomes slower or hotter slows both. An argument is the CPU that it shall run on.
 *
 * Input: a kernel_call with the magic "LLAMACT1", a kernel_timing, then as in kernel_call.h. Weights
 * of kernels for one token come from memory in a model: `copies` of them are made, and each call
 * reads the next. Output: the bytes of the kernel's outputs after one call, then for each round
 * nanoseconds of a call as doubles, of the reference and of the kernel.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <time.h>

#include "kernel_call.h"

enum { MAX_ROUNDS = 1000, MAX_COPIES = 1024 };

typedef struct {
  int64_t reference_end;   /* work items of the reference */
  uint64_t outputs_offset; /* into the data: tensors from there on are outputs */
  uint32_t rounds;
  uint32_t sample_us; /* that a sample takes at least */
  uint32_t streamed;  /* bit i: tensor i is a weight */
  uint32_t copies;    /* of the weights, at least 1 */
} kernel_timing;

typedef int32_t kernel_function(void *self, const TVMFFIAny *args, int32_t num_args,
                                TVMFFIAny *result);
extern kernel_function __tvm_ffi_kernel, __tvm_ffi_reference;

typedef struct {
  kernel_function *function;
  int64_t end;
  uint64_t calls; /* in a sample */
} timed_kernel;

static loaded_call call;
static kernel_timing timing;
static uint8_t *weights[MAX_COPIES][MAX_TENSORS];
static uint32_t next_copy;

static void call_kernel(const timed_kernel *kernel) {
  for (uint32_t i = 0; i < call.header.num_tensors; i++)
    if (timing.streamed >> i & 1) call.views[i].data = weights[next_copy][i];
  next_copy = (next_copy + 1) % timing.copies;
  TVMFFIAny result = {.type_index = LLAMAC_FFI_NONE};
  if (kernel->function(NULL, call.arguments, (int32_t)call.header.num_tensors + 2, &result) != 0)
    exit(3);
}

static double now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return 1e9 * (double)now.tv_sec + (double)now.tv_nsec;
}

/* Nanoseconds of a call. */
static double sample(const timed_kernel *kernel) {
  set_range(&call, call.header.begin, kernel->end);
  double start = now_ns();
  for (uint64_t i = 0; i < kernel->calls; i++) call_kernel(kernel);
  return (now_ns() - start) / (double)kernel->calls;
}

static void calibrate(timed_kernel *kernel) {
  kernel->calls = 1;
  sample(kernel);
  double ns = sample(kernel);
  double wanted = 1e3 * timing.sample_us / (ns < 100 ? 100 : ns);
  kernel->calls = wanted < 1 ? 1 : (uint64_t)(wanted + 0.5);
}

static void copy_weights(void) {
  for (uint32_t i = 0; i < call.header.num_tensors; i++) {
    if (!(timing.streamed >> i & 1)) continue;
    const kernel_tensor *tensor = &call.tensors[i];
    uint64_t bytes = tensor->dtype_bits / 8;
    for (int d = 0; d < tensor->ndim; d++) {
      if (tensor->shape[d] < 0 || (uint64_t)tensor->shape[d] > call.header.data_bytes)
        die("a tensor has a wrong shape");
      bytes *= (uint64_t)tensor->shape[d];
    }
    if (bytes > call.header.data_bytes - tensor->offset) die("a tensor is larger than the data");
    weights[0][i] = call.views[i].data;
    for (uint32_t c = 1; c < timing.copies; c++)
      memcpy(weights[c][i] = allocate(bytes), call.views[i].data, bytes);
  }
}

static void stay_on_cpu(const char *number) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET((unsigned)atoi(number) % CPU_SETSIZE, &set);
  if (sched_setaffinity(0, sizeof set, &set) != 0) die("there is no such CPU");
}

int main(int argc, char **argv) {
  if (argc > 1) stay_on_cpu(argv[1]);
  read_exactly(&call.header, sizeof call.header);
  if (memcmp(call.header.magic, "LLAMACT1", 8) != 0) die("not a call to be timed");
  read_exactly(&timing, sizeof timing);
  if (timing.rounds > MAX_ROUNDS || timing.copies < 1 || timing.copies > MAX_COPIES ||
      timing.outputs_offset > call.header.data_bytes)
    die("wrong numbers of rounds, copies or outputs");
  load_tensors(&call);
  copy_weights();
  timed_kernel kernel = {__tvm_ffi_kernel, call.header.end, 1};
  timed_kernel reference = {__tvm_ffi_reference, timing.reference_end, 1};
  sample(&kernel);
  write_exactly(call.data + timing.outputs_offset, call.header.data_bytes - timing.outputs_offset);
  calibrate(&reference);
  calibrate(&kernel);
  for (uint32_t r = 0; r < timing.rounds; r++) {
    double ns[2] = {sample(&reference), sample(&kernel)};
    write_exactly(ns, sizeof ns);
  }
  return fflush(stdout) == 0 ? 0 : 2;
}
