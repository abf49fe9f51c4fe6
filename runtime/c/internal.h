/* SPDX-License-Identifier: Apache-2.0
 *
 * internal.h: what the files of the support library share. Read model.c, session.c, execute.c and
 * threads.c in this order to follow a call from llamac_session_eval down to the kernels.
 */
#ifndef LLAMAC_INTERNAL_H
#define LLAMAC_INTERNAL_H

/* For affinity, futex, madvise. This header is therefore included before all others. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "llamac.h"
#include "program.h"

/* ---- error.c ---- */

/* Writes status and message into *error, which may be NULL, and returns the status. */
llamac_status llamac_fail(llamac_error *error, llamac_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* What kernels report errors with: keeps kind and parts as one text for the calling thread. */
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t num_parts);

/* Moves the text that the last failing kernel of the calling thread reported into `text`, "" if it
 * reported none. */
void llamac_take_kernel_error(char *text, size_t capacity);

/* ---- cpu_features.c ---- */

/* Bits LLAMAC_X86_* or LLAMAC_ARM_* that CPU and operating system both support. */
uint64_t llamac_cpu_features(void);

/* Writes the names of the bits, divided by spaces, into `text`. */
void llamac_feature_names(uint64_t features, char *text, size_t capacity);

/* ---- memory.c ---- */

/* Zeroed pages from the system, page aligned; NULL if refused. `bytes` may be 0. */
void *llamac_map_pages(uint64_t bytes);

/* Gives back what llamac_map_pages returned; NULL is allowed. */
void llamac_unmap_pages(void *pages, uint64_t bytes);

/* ---- threads.c ---- */

typedef struct llamac_pool llamac_pool;

/* What every thread of a pool runs at once: the same code with its own number. */
typedef void (*llamac_pool_body)(void *context, int32_t thread);

/* Starts num_threads - 1 threads. `options` as documented in llamac.h. */
llamac_status llamac_pool_create(const llamac_session_options *options, llamac_pool **out,
                                 llamac_error *error);

/* Stops and joins the threads; NULL is allowed. */
void llamac_pool_destroy(llamac_pool *pool);

/* Runs the body on all threads and returns when all are done. The body may publish progress
 * 1 .. max_progress. Fails only if the caller cannot be pinned. */
llamac_status llamac_pool_run(llamac_pool *pool, llamac_pool_body body, void *context,
                              uint32_t max_progress, llamac_error *error);

/* In a body: says that `thread`, the calling one, has come to `progress` (which only grows). What
 * it wrote before is visible to threads that have waited for it. */
void llamac_pool_publish(llamac_pool *pool, int32_t thread, uint32_t progress);

/* In a body: waits until `other` has come to `progress` or has left the body. */
void llamac_pool_wait(llamac_pool *pool, int32_t other, uint32_t progress);

/* In a body: waits until all threads but `thread`, the calling one, have come to `progress`. */
void llamac_pool_wait_others(llamac_pool *pool, int32_t thread, uint32_t progress);

/* Nanoseconds of a clock that only goes forward. */
uint64_t llamac_now_ns(void);

/* ---- model.c ---- */

/* Some of the weights' pages: bytes from the start of the file, multiples of a page. */
typedef struct {
  uint64_t start, bytes;
} llamac_pages;

struct llamac_model {
  atomic_int references; /* the caller's and one per session */
  uint8_t *weights;      /* mapped read-only, program->weights_bytes long */
  char *path;            /* of the weights */
  llamac_pages *adapted; /* [num_adapted], private copies with an adapter's values */
  uint32_t num_adapted;
  const llamac_program *program;
  const llamac_level *level;
  void *accelerator; /* opened, or NULL */
};

/* Compares size and header of an open weights file with the program. */
llamac_status llamac_check_weights(const llamac_program *program, int file, llamac_error *error);

/* Takes and gives back one reference. */
void llamac_model_retain(llamac_model *model);
void llamac_model_release(llamac_model *model);

/* ---- execute.c ---- */

typedef struct llamac_executor llamac_executor;

/* Prepares all calls of the program: tensors at the given bases of the spaces (indexed by
 * enum llamac_space), and per thread the arguments of every step. */
llamac_executor *llamac_executor_create(const llamac_model *model, uint8_t *const bases[3],
                                        int32_t num_threads);

/* Frees it; NULL is allowed. */
void llamac_executor_destroy(llamac_executor *executor);

/* Runs steps first .. first + count - 1 of the function on the pool. step_ns: NULL, or nanoseconds
 * of the program's steps, to which the time of each step is added. */
llamac_status llamac_execute(llamac_executor *executor, llamac_pool *pool,
                             const llamac_function *function, uint32_t first, uint32_t count,
                             uint64_t *step_ns, llamac_error *error);

/* Address of a tensor's first element. */
void *llamac_executor_data(const llamac_executor *executor, uint32_t tensor);

#endif /* LLAMAC_INTERNAL_H */
