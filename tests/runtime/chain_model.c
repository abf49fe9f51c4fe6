/* A program as the compiler generates it, whose "model" is a chain of hashes, for tests of the
 * Python runtime. The KV cache holds one hash for each position, made from the hash before and the
 * token, so that the logits depend on every token and its place. test fixtures compute the same.
 *
 * The weights are a script: script[p] - 1 is the token that is certain after a context of p tokens,
 * 0 leaves it to the hash. Token 255 makes a kernel fail; the model never says it by itself. */
#include "program.h"

enum { VOCAB = 288, CONTEXT = 96, MAX_CHUNK = 16, SCRIPT = 1024, UNLUCKY = 255 };

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t num_parts);

static DLTensor *tensor(const TVMFFIAny *args, int i) { return args[i].v_ptr; }

/* (tokens, meta, kv, begin, end) */
static int32_t chain(void *self, const TVMFFIAny *args, int32_t num_args, TVMFFIAny *result) {
  (void)self, (void)num_args, (void)result;
  const int32_t *tokens = tensor(args, 0)->data, *meta = tensor(args, 1)->data;
  uint64_t *kv = tensor(args, 2)->data;
  int32_t start = meta[0], last = meta[1];
  for (int32_t t = 0; t < tensor(args, 0)->shape[0]; t++) {
    uint64_t before = start + t > 0 ? kv[start + t - 1] : UINT64_C(0x243F6A8885A308D3);
    uint64_t hash = (before ^ (uint64_t)(tokens[t] + 1)) * UINT64_C(0x9E3779B97F4A7C15);
    kv[start + t] = hash ^ hash >> 29;
    if (t <= last && tokens[t] == UNLUCKY) {
      const char *parts[] = {"token 255 ", "is unlucky"};
      TVMFFIErrorSetRaisedFromCStrParts("ValueError", parts, 2);
      return -1;
    }
  }
  return 0;
}

/* (script, meta, kv, logits, begin, end) */
static int32_t logits(void *self, const TVMFFIAny *args, int32_t num_args, TVMFFIAny *result) {
  (void)self, (void)num_args, (void)result;
  const int32_t *script = tensor(args, 0)->data, *meta = tensor(args, 1)->data;
  const uint64_t *kv = tensor(args, 2)->data;
  float *out = tensor(args, 3)->data;
  int32_t position = meta[0] + meta[1];
  for (int64_t v = args[4].v_int64; v < args[5].v_int64; v++) {
    uint64_t x = kv[position] + (uint64_t)v * UINT64_C(0xBF58476D1CE4E5B9);
    x = (x ^ x >> 31) * UINT64_C(0x94D049BB133111EB);
    out[v] = (float)(x >> 40) / (1 << 20) - 8;
    if (v == UNLUCKY) out[v] = -100;
    if (script[position + 1] == v + 1) out[v] = 100;
  }
  return 0;
}

/* (logits, argmax, begin, end) */
static int32_t argmax(void *self, const TVMFFIAny *args, int32_t num_args, TVMFFIAny *result) {
  (void)self, (void)num_args, (void)result;
  const float *values = tensor(args, 0)->data;
  int32_t *best = tensor(args, 1)->data;
  *best = 0;
  for (int32_t v = 1; v < VOCAB; v++)
    if (values[v] > values[*best]) *best = v;
  return 0;
}

enum { T_SCRIPT, T_KV, T_META, T_LOGITS, T_ARGMAX, T_TOKENS };

static const llamac_tensor_desc tensors[] = {
    {LLAMAC_SPACE_WEIGHTS, 0, 32, 1, 4096, {SCRIPT}},
    {LLAMAC_SPACE_KV, 0, 64, 1, 0, {CONTEXT + MAX_CHUNK}},
    {LLAMAC_SPACE_ARENA, 0, 32, 1, 192, {2}},
    {LLAMAC_SPACE_ARENA, 2, 32, 2, 256, {1, VOCAB}},
    {LLAMAC_SPACE_ARENA, 0, 32, 1, 2048, {1}},
    {LLAMAC_SPACE_ARENA, 0, 32, 1, 0, {16}},
    {LLAMAC_SPACE_ARENA, 0, 32, 1, 64, {4}},
    {LLAMAC_SPACE_ARENA, 0, 32, 1, 128, {1}},
};

#define OPERANDS(f) \
  T_TOKENS + f, T_META, T_KV, T_SCRIPT, T_META, T_KV, T_LOGITS, T_LOGITS, T_ARGMAX
static const uint32_t operands[] = {OPERANDS(0), OPERANDS(1), OPERANDS(2)};

#define STEPS(f) {0, 3, 9 * f, 1}, {1, 4, 9 * f + 3, VOCAB}, {2, 2, 9 * f + 7, 1}
static const llamac_step steps[] = {STEPS(0), STEPS(1), STEPS(2)};

#define FUNCTION(f, name, T) {name, T, 3 * f, 3, 2, T_TOKENS + f, T_META, T_LOGITS, T_ARGMAX}
static const llamac_function functions[] = {
    FUNCTION(0, "prefill_16", 16), FUNCTION(1, "prefill_4", 4), FUNCTION(2, "decode", 1)};

static const char *const names[] = {"chain", "logits", "argmax"};
static const llamac_kernel kernels[] = {chain, logits, argmax};

#if defined(__x86_64__)
#define FOREIGN LLAMAC_ARM_SME
#else
#define FOREIGN LLAMAC_X86_AVX512VNNI
#endif
static const llamac_level levels[] = {{"foreign", FOREIGN, kernels}, {"portable", 0, kernels}};

const llamac_program llamac_program_table = {
    .abi_version = LLAMAC_ABI_VERSION,
    .model_name = "chain",
    .build_id = "chain-of-hashes: thirty-two byte",
    .weights_bytes = 4096 + SCRIPT * 4,
    .arena_bytes = 4096,
    .kv_bytes = (CONTEXT + MAX_CHUNK) * 8,
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
    .num_kernels = 3,
    .levels = levels,
    .num_levels = 2,
};
