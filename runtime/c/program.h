/* SPDX-License-Identifier: Apache-2.0
 *
 * program.h: what the generated entry.c of a bundle tells the support library.
 *
 * entry.c contains tables, the last of them `llamac_program_table`, and where the model has graphs
 * (qnn/qnn.h) the functions that call them:
 *
 *     #include "program.h"
 *     extern int32_t __tvm_ffi_rms_norm__avx2(void *, const TVMFFIAny *, int32_t, TVMFFIAny *);
 *     static const llamac_kernel kernels_avx2[] = {__tvm_ffi_rms_norm__avx2, ...};
 *     ...
 *     const llamac_program llamac_program_table = {.abi_version = LLAMAC_ABI_VERSION, ...};
 */
#ifndef LLAMAC_PROGRAM_H
#define LLAMAC_PROGRAM_H

#include <stddef.h>
#include <stdint.h>

#include "llamac.h"

/* ---- The calling convention of kernels: TVM-FFI's, as far as it is used ------------------- */

/* Type of a value in TVMFFIAny. */
enum { LLAMAC_FFI_NONE = 0, LLAMAC_FFI_INT = 1, LLAMAC_FFI_DLTENSOR = 7 };

/* One argument or result: 16 bytes, the type first, the value in the second half. */
typedef struct {
  int32_t type_index;
  uint32_t zero_padding;
  union {
    int64_t v_int64;
    double v_float64;
    void *v_ptr;
  };
} TVMFFIAny;

/* DLPack's tensor view. */
typedef struct {
  void *data;
  struct {
    int32_t device_type; /* 1: CPU */
    int32_t device_id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code; /* 0 int, 1 uint, 2 float, 4 bfloat */
    uint8_t bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape;
  int64_t *strides; /* in elements */
  uint64_t byte_offset;
} DLTensor;

/* A kernel takes (tensors..., int64 begin, int64 end) and returns 0, or reports its error with
 * TVMFFIErrorSetRaisedFromCStrParts and returns something else. It computes the work items
 * [begin, end); different items may run at the same time on different threads. */
typedef int32_t (*llamac_kernel)(void *self, const TVMFFIAny *args, int32_t num_args,
                                 TVMFFIAny *result);

/* ---- CPU features (llamac_level.features) -------------------------------------------------- */

/* A level without bits runs on every CPU of the architecture (x86-64: SSE2; AArch64: NEON;
 * Hexagon: no vectors). */
#define LLAMAC_X86_AVX2 (UINT64_C(1) << 0)
#define LLAMAC_X86_FMA (UINT64_C(1) << 1)
#define LLAMAC_X86_F16C (UINT64_C(1) << 2)
#define LLAMAC_X86_AVXVNNI (UINT64_C(1) << 3)
#define LLAMAC_X86_AVX512F (UINT64_C(1) << 4)
#define LLAMAC_X86_AVX512BW (UINT64_C(1) << 5)
#define LLAMAC_X86_AVX512VL (UINT64_C(1) << 6)
#define LLAMAC_X86_AVX512DQ (UINT64_C(1) << 7)
#define LLAMAC_X86_AVX512VNNI (UINT64_C(1) << 8)
#define LLAMAC_ARM_DOTPROD (UINT64_C(1) << 32)
#define LLAMAC_ARM_I8MM (UINT64_C(1) << 33)
#define LLAMAC_ARM_FP16 (UINT64_C(1) << 34) /* scalar and vector arithmetic */
#define LLAMAC_ARM_BF16 (UINT64_C(1) << 35)
#define LLAMAC_ARM_SVE (UINT64_C(1) << 36)
#define LLAMAC_ARM_SVE2 (UINT64_C(1) << 37)
#define LLAMAC_ARM_SME (UINT64_C(1) << 38)
#define LLAMAC_ARM_SVE256 (UINT64_C(1) << 39) /* vectors of 256 or 512 bits that multiply int8 \
                                                 matrices */
#define LLAMAC_ARM_SME512 (UINT64_C(1) << 40) /* streaming vectors of 512 bits */

/* ---- weights.bin --------------------------------------------------------------------------- */

#define LLAMAC_WEIGHTS_MAGIC "LLAMACWT"
#define LLAMAC_WEIGHTS_VERSION 1
#define LLAMAC_WEIGHTS_HEADER_BYTES 4096

/* The start of weights.bin, little endian; zeros up to LLAMAC_WEIGHTS_HEADER_BYTES. */
typedef struct {
  char magic[8];
  uint32_t version;
  uint32_t header_bytes;
  uint8_t build_id[32];
  uint64_t file_bytes;
} llamac_weights_header;

/* ---- Adapter files ------------------------------------------------------------------------- */

#define LLAMAC_ADAPTER_MAGIC "LLAMACLA"
#define LLAMAC_ADAPTER_VERSION 1

/* The start of an adapter file, little endian; then its entries, then values. */
typedef struct {
  char magic[8];
  uint32_t version;
  uint32_t num_entries;
  uint8_t build_id[32]; /* of the bundle that it is for */
  uint64_t file_bytes;
} llamac_adapter_header;

/* Values of some of the weights; entries ascend by offset. */
typedef struct {
  uint64_t offset; /* in weights.bin */
  uint64_t bytes;
  uint64_t place; /* in the adapter file */
} llamac_adapter_entry;

/* ---- The tables ---------------------------------------------------------------------------- */

/* A tensor at a fixed place of a space, compact row-major. */
typedef struct {
  uint8_t space; /* enum llamac_space */
  uint8_t dtype_code, dtype_bits;
  uint8_t ndim;     /* 1 to 4 */
  uint64_t offset;  /* bytes from the start of the space (of the file for weights); a multiple of
                     program.alignment */
  int64_t shape[4]; /* elements; unused entries are not read */
} llamac_tensor_desc;

/* One kernel call. Its operands are program.operands[first_operand ..], indices of tensors. */
typedef struct {
  uint16_t kernel; /* index into llamac_level.kernels */
  uint16_t num_operands;
  uint32_t first_operand;
  int64_t work; /* items to divide among threads; 1: thread 0 alone does it */
} llamac_step;

/* A straight list of steps for a fixed number of tokens. */
typedef struct {
  const char *name;    /* "prefill_128", ..., "decode" */
  int32_t num_tokens;  /* T */
  uint32_t first_step; /* into program.steps */
  uint32_t num_steps;
  uint32_t num_logits_steps; /* of these, the last ones that only serve logits and argmax: skipped
                                for a chunk that more tokens follow. 0: none are skipped */
  uint32_t tokens_tensor;    /* int32 [T], arena, written by the session */
  uint32_t meta_tensor;      /* int32 [2], arena: position of the first token, index of the last
                                valid token of the chunk; written by the session */
  uint32_t logits_tensor;    /* float32 [1, vocab], arena */
  uint32_t argmax_tensor;    /* int32 [1], arena */
} llamac_function;

/* The same kernels, compiled for more or less of a CPU. */
typedef struct {
  const char *name;
  uint64_t features; /* bits that must all be present */
  const llamac_kernel *kernels; /* [num_kernels] */
} llamac_level;

/* Parts of the model that another processor's compiler has made; what they are is known to whoever
 * opens them. Their kernels take what `open` returns as their first argument. */
typedef struct {
  /* folder: of the weights file. `out` receives NULL after an error. */
  llamac_status (*open)(const char *folder, void **out, llamac_error *error);
  void (*close)(void *opened); /* NULL is allowed */
} llamac_accelerator;

/* The whole model. */
typedef struct {
  uint32_t abi_version; /* LLAMAC_ABI_VERSION */
  const char *model_name;
  uint8_t build_id[32]; /* must equal that of weights.bin */
  uint64_t weights_bytes, arena_bytes, kv_bytes;
  uint32_t alignment; /* of every tensor, bytes: what kernels rely on; 0 is not checked */
  int32_t vocab_size, context_length;
  int32_t max_chunk; /* the largest num_tokens; KV tensors hold context_length + max_chunk */
  const llamac_tensor_desc *tensors;
  uint32_t num_tensors;
  const uint32_t *operands;
  const llamac_step *steps;
  uint32_t num_steps;
  const llamac_function *functions; /* largest chunk first, decode (1 token) last */
  uint32_t num_functions;
  const char *const *kernel_names; /* [num_kernels], for messages */
  uint32_t num_kernels;
  const llamac_level *levels; /* best first */
  uint32_t num_levels;
  const llamac_accelerator *accelerator; /* NULL: all is kernels of this processor */
} llamac_program;

/* Defined by entry.c. */
extern __attribute__((visibility("hidden"))) const llamac_program llamac_program_table;

#endif /* LLAMAC_PROGRAM_H */
