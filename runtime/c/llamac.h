/* SPDX-License-Identifier: Apache-2.0
 *
 * llamac.h: the C interface of a compiled model.
 *
 * Every bundle carries one shared library (lib/libmodel.so) that exports the functions below and
 * nothing else of interest, and one weights.bin that belongs to it. The library needs only libc.
 *
 *     llamac_error error;
 *     llamac_model *model;
 *     llamac_session *session;
 *     llamac_session_options options = {sizeof options, .num_threads = 2};
 *     if (llamac_model_open("bundle/weights.bin", NULL, &model, &error)) die(error.message);
 *     if (llamac_session_create(model, &options, &session, &error)) die(error.message);
 *     if (llamac_session_eval(session, prompt, prompt_tokens, &error)) die(error.message);
 *     int32_t next = llamac_session_argmax(session);
 *     ...
 *     llamac_session_destroy(session);
 *     llamac_model_close(model);
 *
 * Rules that hold for all functions
 *   - Functions return LLAMAC_OK (0) or a status, and then fill *error. `error` may be NULL.
 *   - A call that fails changes nothing that a later call can see, unless its comment says so.
 *   - A model may be shared by threads. A session belongs to one caller at a time: calls from
 *     several threads must not overlap (eval, run_steps and rewind detect it and refuse).
 *   - Strings that are returned live as long as the model. Strings that are passed are copied or
 *     not kept.
 *   - Structures start with `struct_bytes`, which the caller sets to sizeof, so that fields can be
 *     added at the end without breaking callers.
 */
#ifndef LLAMAC_H
#define LLAMAC_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define LLAMAC_API __attribute__((visibility("default")))
#else
#define LLAMAC_API
#endif

/* Grows when a function or structure changes in a way that old callers would notice. */
#define LLAMAC_ABI_VERSION 1

/* More threads than any session can have. */
#define LLAMAC_MAX_THREADS 64

/* What went wrong, by kind; `llamac_error.message` says the rest. */
typedef enum {
  LLAMAC_OK = 0,
  LLAMAC_ERROR_ARGUMENT = 1, /* an argument is out of range; the caller's mistake */
  LLAMAC_ERROR_IO = 2,       /* the weights file cannot be opened, read or mapped */
  LLAMAC_ERROR_WEIGHTS = 3,  /* the file is not the weights file of this library, or is cut off */
  LLAMAC_ERROR_CPU = 4,      /* this CPU lacks features that the kernels need */
  LLAMAC_ERROR_MEMORY = 5,   /* the system refused memory */
  LLAMAC_ERROR_CONTEXT = 6,  /* the tokens do not fit into the rest of the context */
  LLAMAC_ERROR_KERNEL = 7,   /* a compiled kernel reported an error */
  LLAMAC_ERROR_THREAD = 8,   /* a thread cannot be started or pinned */
  LLAMAC_ERROR_ACCELERATOR = 9 /* the libraries of another processor, or what they execute, are
                                  missing, do not fit, or failed */
} llamac_status;

/* Filled by a function that fails: its status again, and one English sentence. */
typedef struct {
  llamac_status status;
  char message[256];
} llamac_error;

/* A mapped weights file together with the kernels chosen for this CPU. */
typedef struct llamac_model llamac_model;

/* One conversation: KV cache, position, working memory and threads. */
typedef struct llamac_session llamac_session;

/* What `llamac_model_info` tells. */
typedef struct {
  uint32_t struct_bytes; /* set by the caller: sizeof(llamac_model_info_t) */
  int32_t vocab_size;
  int32_t context_length; /* tokens that fit into one session */
  int32_t max_chunk;      /* most tokens that are computed at once */
  uint64_t weights_bytes; /* size of weights.bin, mapped once per model */
  uint64_t kv_bytes;      /* KV cache of one session; becomes resident as it fills */
  uint64_t arena_bytes;   /* working memory of one session */
  const char *model_name;
  const char *level; /* kernels in use, for example "avx512vnni" */
} llamac_model_info_t;

/* How a session computes. Zero in a field means its default. */
typedef struct {
  uint32_t struct_bytes; /* set by the caller: sizeof(llamac_session_options) */
  int32_t num_threads;   /* 1 to LLAMAC_MAX_THREADS, the calling thread included; 0: 1 */
  const int32_t *cpus;   /* cpus[t]: the CPU on which thread t runs; copied */
  int32_t num_cpus;      /* equal to num_threads, or 0: threads are not pinned */
  int32_t spin_us;       /* how long a waiting thread spins before it sleeps; 0: 200, -1: never */
} llamac_session_options;

/* Parts of a session's memory, for `llamac_session_memory`. */
enum llamac_space {
  LLAMAC_SPACE_WEIGHTS = 0, /* the mapped file, read-only */
  LLAMAC_SPACE_ARENA = 1,   /* working memory */
  LLAMAC_SPACE_KV = 2       /* KV cache */
};

/* The LLAMAC_ABI_VERSION with which the library was built. */
LLAMAC_API uint32_t llamac_abi_version(void);

/* Maps the weights and chooses kernels.
 *
 * weights_path: the weights.bin of the same bundle; a file of another build is refused.
 * level: name of a kernel set, or NULL for the best one that this CPU can run. A named level whose
 *     features the CPU lacks gives LLAMAC_ERROR_CPU, an unknown name LLAMAC_ERROR_ARGUMENT.
 * out: receives the model, to be released by llamac_model_close. NULL after an error. */
LLAMAC_API llamac_status llamac_model_open(const char *weights_path, const char *level,
                                           llamac_model **out, llamac_error *error);

/* Releases the model; sessions that are still open keep it mapped until they are destroyed.
 * NULL is allowed. */
LLAMAC_API void llamac_model_close(llamac_model *model);

/* Gives other values to some of the weights, those of an adapter; what an earlier call gave is gone.
 *
 * path: an adapter file that `llamac adapt` wrote for the same bundle, NULL for the bundle's own
 *     weights. The file is copied: it may be gone afterwards.
 *
 * No session of the model may be evaluating. What sessions have read stays as it was read: rewind
 * them to 0. After an error with status LLAMAC_ERROR_MEMORY the model can only be closed; after any
 * other it is what it was. */
LLAMAC_API llamac_status llamac_model_adapt(llamac_model *model, const char *path,
                                            llamac_error *error);

/* Fills *info as far as info->struct_bytes reaches. */
LLAMAC_API llamac_status llamac_model_info(const llamac_model *model, llamac_model_info_t *info);

/* Allocates the memory of a session and starts its threads (num_threads - 1 of them: the caller of
 * eval is thread 0). With one thread, none is started.
 *
 * options: NULL means one thread. When CPUs are given, thread t runs only on cpus[t]; the calling
 *     thread is moved for the time of each call and gets its own affinity back afterwards.
 * out: receives the session, to be released by llamac_session_destroy. NULL after an error. */
LLAMAC_API llamac_status llamac_session_create(llamac_model *model,
                                               const llamac_session_options *options,
                                               llamac_session **out, llamac_error *error);

/* Stops the threads and frees the memory. NULL is allowed. */
LLAMAC_API void llamac_session_destroy(llamac_session *session);

/* Appends tokens to the context and computes the logits of the last one.
 *
 * num_tokens: at least 1; any number up to the rest of the context. Long inputs are computed in
 *     chunks, so that one call is as fast as a caller's own chunks would be.
 * LLAMAC_ERROR_CONTEXT and LLAMAC_ERROR_ARGUMENT (a token outside the vocabulary) are reported
 * before anything is computed. After LLAMAC_ERROR_KERNEL the position is the one before the call,
 * and there are no logits until the next successful eval. */
LLAMAC_API llamac_status llamac_session_eval(llamac_session *session, const int32_t *tokens,
                                             int32_t num_tokens, llamac_error *error);

/* Logits [vocab_size] of the last evaluated token; valid until the next eval or run_steps.
 * NULL if there are none. */
LLAMAC_API const float *llamac_session_logits(const llamac_session *session);

/* Token with the highest logit, the lowest of equals. -1 if there are no logits. */
LLAMAC_API int32_t llamac_session_argmax(const llamac_session *session);

/* Number of tokens in the context. */
LLAMAC_API int32_t llamac_session_position(const llamac_session *session);

/* Forgets all tokens from `position` on: 0 empties the context. The next eval continues there.
 * position: 0 to llamac_session_position. Logits stay those of the last eval. */
LLAMAC_API llamac_status llamac_session_rewind(llamac_session *session, int32_t position,
                                               llamac_error *error);

/* ---- For verification and measurement ---------------------------------------------------- */

/* Runs steps first .. first + count - 1 of a function as they are, on the memory as it is.
 * The position does not change. Names and steps: program.json of the bundle. */
LLAMAC_API llamac_status llamac_session_run_steps(llamac_session *session, const char *function,
                                                  uint32_t first, uint32_t count,
                                                  llamac_error *error);

/* First byte of an `enum llamac_space` of the session, NULL for another value. */
LLAMAC_API void *llamac_session_memory(llamac_session *session, int32_t space);

/* Starts (enable != 0; all times become zero) or stops measuring how long steps take.
 * LLAMAC_ERROR_MEMORY: no memory for the counters. */
LLAMAC_API llamac_status llamac_session_profile(llamac_session *session, int enable);

/* Nanoseconds spent in each step of a function since profiling started, seen from thread 0: from
 * the start of the step to the start of the next one, waiting for other threads included.
 * count: receives the number of steps. NULL (and 0) for an unknown function or without profiling. */
LLAMAC_API const uint64_t *llamac_session_step_ns(const llamac_session *session,
                                                  const char *function, uint32_t *count);

/* Read bandwidth of this machine in GB/s (1e9 bytes), the ceiling for decoding.
 *
 * num_threads: as many as the session will use. cpus, num_cpus: as in llamac_session_options.
 * bytes: size of the buffer that is read, all threads together. Take several times the last level
 *     cache. It is allocated and touched first.
 * seconds_x10: how long to measure, in tenths of a second; the best round counts.
 * Returns 0 if an argument is out of range or memory or threads are refused. */
LLAMAC_API double llamac_read_bandwidth(int32_t num_threads, uint64_t bytes, int32_t seconds_x10,
                                        const int32_t *cpus, int32_t num_cpus);

#ifdef __cplusplus
}
#endif

#endif /* LLAMAC_H */
