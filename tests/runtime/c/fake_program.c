/* A program as the compiler generates it, with hand-written kernels, for tests of the support
 * library. All values are small integers, so that float32 is exact in any order:
 *
 *     y[p]   = table[token[p]] + bias                      one row of the KV cache
 *     z[t]   = sum over p <= t of y[p] * (p % 3 + 1)
 *     logits = table . (2 * z[last])                       (times 3 in level "slow")
 *
 * Token 13 makes the kernel `embed` fail with a text, token 14 without one. */
#include <stddef.h>

#include "program.h"

#ifndef FAKE_ALIGNMENT
#define FAKE_ALIGNMENT 64
#endif

enum { VOCAB = 32, DIM = 16, CONTEXT = 20, MAX_CHUNK = 8, LOG = 64 };

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t num_parts);

/* ---- Kernels ---- */

static const DLTensor *tensor(const TVMFFIAny *args, int i) { return args[i].v_ptr; }
static float *floats(const TVMFFIAny *args, int i) { return tensor(args, i)->data; }
static int32_t *ints(const TVMFFIAny *args, int i) { return tensor(args, i)->data; }

/* What TVM's generated checks would refuse. */
static int32_t check(const TVMFFIAny *args, int32_t num_args, int32_t num_tensors) {
  int good = num_args == num_tensors + 2;
  for (int i = 0; good && i < num_tensors; i++) {
    const DLTensor *t = args[i].v_ptr;
    int64_t stride = 1;
    good = args[i].type_index == 7 && args[i].zero_padding == 0 && t->device.device_type == 1 &&
           t->dtype.lanes == 1 && t->byte_offset == 0 && (uintptr_t)t->data % 64 == 0;
    for (int d = t->ndim - 1; d >= 0; stride *= t->shape[d], d--)
      good = good && t->strides[d] == stride;
  }
  for (int i = num_tensors; good && i < num_args; i++) good = args[i].type_index == 1;
  if (good) return 0;
  const char *parts[] = {"arguments ", "are wrong"};
  TVMFFIErrorSetRaisedFromCStrParts("TypeError", parts, 2);
  return -1;
}

#define KERNEL(name, num_tensors)                                                                \
  static int32_t name##_body(const TVMFFIAny *args, int64_t begin, int64_t end);                 \
  static int32_t name(void *self, const TVMFFIAny *args, int32_t num_args, TVMFFIAny *result) {  \
    (void)self, (void)result;                                                                    \
    if (check(args, num_args, num_tensors) != 0) return -1;                                      \
    return name##_body(args, args[num_tensors].v_int64, args[num_tensors + 1].v_int64);          \
  }                                                                                              \
  static int32_t name##_body(const TVMFFIAny *args, int64_t begin, int64_t end)

/* Appends (chunk length, position, last valid index) to the log, whose first entry counts. */
KERNEL(trace, 3) {
  int32_t *log = ints(args, 2) + 1 + ints(args, 2)[0] % 20 * 3;
  log[0] = (int32_t)tensor(args, 0)->shape[0];
  log[1] = ints(args, 1)[0];
  log[2] = ints(args, 1)[1];
  ints(args, 2)[0]++;
  return (int32_t)(end - begin - 1);
}

KERNEL(embed, 3) {
  const char *parts[] = {"token ", NULL, "13 is unlucky"};
  for (int64_t t = begin; t < end; t++) {
    int32_t token = ints(args, 0)[t];
    if (token == 13) TVMFFIErrorSetRaisedFromCStrParts("ValueError", parts, 3);
    if (token == 13 || token == 14) return -1;
    for (int d = 0; d < DIM; d++)
      floats(args, 2)[t * DIM + d] = floats(args, 1)[token * DIM + d];
  }
  return 0;
}

KERNEL(add_bias, 3) {
  for (int64_t t = 0; t < tensor(args, 0)->shape[0]; t++)
    for (int64_t d = begin; d < end; d++)
      floats(args, 2)[t * DIM + d] = floats(args, 0)[t * DIM + d] + floats(args, 1)[d];
  return 0;
}

KERNEL(store, 3) {
  for (int64_t t = begin; t < end; t++)
    for (int d = 0; d < DIM; d++)
      floats(args, 2)[(ints(args, 1)[0] + t) * DIM + d] = floats(args, 0)[t * DIM + d];
  return 0;
}

KERNEL(attend, 3) {
  for (int64_t t = 0; t < tensor(args, 2)->shape[0]; t++)
    for (int64_t d = begin; d < end; d++) {
      float sum = 0;
      for (int64_t p = 0; p <= ints(args, 1)[0] + t; p++)
        sum += floats(args, 0)[p * DIM + d] * (float)(p % 3 + 1);
      floats(args, 2)[t * DIM + d] = sum;
    }
  return 0;
}

KERNEL(pick_last, 3) {
  for (int d = 0; d < DIM; d++)
    floats(args, 2)[d] = floats(args, 0)[ints(args, 1)[1] * DIM + d];
  return (int32_t)(end - begin - 1);
}

KERNEL(twice, 1) {
  for (int d = 0; d < DIM; d++) floats(args, 0)[d] *= 2;
  return (int32_t)(end - begin - 1);
}

static void multiply(const TVMFFIAny *args, int64_t begin, int64_t end, float factor) {
  for (int64_t v = begin; v < end; v++) {
    float sum = 0;
    for (int d = 0; d < DIM; d++) sum += floats(args, 0)[d] * floats(args, 1)[v * DIM + d];
    floats(args, 2)[v] = sum * factor;
  }
}

KERNEL(logits, 3) { return multiply(args, begin, end, 1), 0; }

KERNEL(logits_slow, 3) { return multiply(args, begin, end, 3), 0; }

KERNEL(argmax, 3) {
  ints(args, 1)[0] = 0;
  for (int v = 1; v < VOCAB; v++)
    if (floats(args, 0)[v] > floats(args, 0)[ints(args, 1)[0]]) ints(args, 1)[0] = v;
  ints(args, 2)[LOG - 1]++; /* how often logits were computed */
  return (int32_t)(end - begin - 1);
}

/* ---- Tables ---- */

#define ROWS_BYTES (MAX_CHUNK * DIM * 4)
#define WEIGHTS_BYTES (4096 + VOCAB * DIM * 4 + DIM * 4)
#define F32(space, offset, ...) {space, 2, 32, sizeof((int64_t[]){__VA_ARGS__}) / 8, offset, {__VA_ARGS__}}
#define I32(space, offset, ...) {space, 0, 32, sizeof((int64_t[]){__VA_ARGS__}) / 8, offset, {__VA_ARGS__}}

enum { T_TABLE, T_BIAS, T_META, T_LAST, T_LOGITS, T_ARGMAX, T_LOG, T_KV, NUM_COMMON };
enum { T_TOKENS, T_X, T_Y, T_Z, NUM_OWN };
#define OWN(f, k) (NUM_COMMON + NUM_OWN * (f) + (k))

#define OWN_TENSORS(T)                                                                      \
  I32(1, 0, T), F32(1, 4096, T, DIM), F32(1, 4096 + ROWS_BYTES, T, DIM),                    \
      F32(1, 4096 + 2 * ROWS_BYTES, T, DIM)

static const llamac_tensor_desc tensors[] = {
    F32(0, 4096, VOCAB, DIM), F32(0, 4096 + VOCAB * DIM * 4, DIM), I32(1, 64, 2),
    F32(1, 128, 1, DIM),      F32(1, 256, 1, VOCAB),               I32(1, 512, 1),
    I32(1, 576, LOG),         F32(2, 0, CONTEXT + MAX_CHUNK, DIM), OWN_TENSORS(8),
    OWN_TENSORS(4),           OWN_TENSORS(1),
};

enum { NUM_STEPS = 9, NUM_OPERANDS = 25 };
#define OPERANDS(f)                                                                         \
  OWN(f, T_TOKENS), T_META, T_LOG,         /* trace */                                      \
      OWN(f, T_TOKENS), T_TABLE, OWN(f, T_X), /* embed */                                   \
      OWN(f, T_X), T_BIAS, OWN(f, T_Y),    /* add_bias */                                   \
      OWN(f, T_Y), T_META, T_KV,           /* store */                                      \
      T_KV, T_META, OWN(f, T_Z),           /* attend */                                     \
      OWN(f, T_Z), T_META, T_LAST,         /* pick_last */                                  \
      T_LAST,                              /* twice */                                      \
      T_LAST, T_TABLE, T_LOGITS,           /* logits */                                     \
      T_LOGITS, T_ARGMAX, T_LOG            /* argmax */
static const uint32_t operands[] = {OPERANDS(0), OPERANDS(1), OPERANDS(2)};

#define STEPS(f, T)                                                                          \
  {0, 3, NUM_OPERANDS * f, 1}, {1, 3, NUM_OPERANDS * f + 3, T},                              \
      {2, 3, NUM_OPERANDS * f + 6, DIM}, {3, 3, NUM_OPERANDS * f + 9, T},                    \
      {4, 3, NUM_OPERANDS * f + 12, DIM}, {5, 3, NUM_OPERANDS * f + 15, 1},                  \
      {6, 1, NUM_OPERANDS * f + 18, 1}, {7, 3, NUM_OPERANDS * f + 19, VOCAB},                \
      {8, 3, NUM_OPERANDS * f + 22, 1}
static const llamac_step steps[] = {STEPS(0, 8), STEPS(1, 4), STEPS(2, 1)};

#define FUNCTION(f, name, T) \
  {name, T, NUM_STEPS * f, NUM_STEPS, 4, OWN(f, T_TOKENS), T_META, T_LOGITS, T_ARGMAX}
static const llamac_function functions[] = {
    FUNCTION(0, "prefill_8", 8), FUNCTION(1, "prefill_4", 4), FUNCTION(2, "decode", 1)};

static const char *const names[] = {"trace",     "embed", "add_bias", "store", "attend",
                                    "pick_last", "twice", "logits",   "argmax"};
static const llamac_kernel kernels[] = {trace,     embed, add_bias, store, attend,
                                        pick_last, twice, logits,   argmax};
static const llamac_kernel kernels_slow[] = {trace,     embed, add_bias,    store, attend,
                                             pick_last, twice, logits_slow, argmax};

#if defined(__x86_64__)
#define FOREIGN (LLAMAC_ARM_I8MM | LLAMAC_ARM_SME)
#else
#define FOREIGN (LLAMAC_X86_AVX2 | LLAMAC_X86_AVX512VNNI)
#endif
static const llamac_level levels[] = {
    {"foreign", FOREIGN, NULL}, {"fast", 0, kernels}, {"slow", 0, kernels_slow}};

const llamac_program llamac_program_table = {
    .abi_version = LLAMAC_ABI_VERSION,
    .model_name = "fake",
    .build_id = "0123456789abcdef0123456789abcde",
    .weights_bytes = WEIGHTS_BYTES,
    .arena_bytes = 4096 + 3 * ROWS_BYTES,
    .kv_bytes = (CONTEXT + MAX_CHUNK) * DIM * 4,
    .alignment = FAKE_ALIGNMENT,
    .vocab_size = VOCAB,
    .context_length = CONTEXT,
    .max_chunk = MAX_CHUNK,
    .tensors = tensors,
    .num_tensors = sizeof tensors / sizeof tensors[0],
    .operands = operands,
    .steps = steps,
    .num_steps = sizeof steps / sizeof steps[0],
    .functions = functions,
    .num_functions = 3,
    .kernel_names = names,
    .num_kernels = 9,
    .levels = levels,
    .num_levels = 3,
};
