/* SPDX-License-Identifier: Apache-2.0
 *
 * support.c: what the support library has from an operating system elsewhere: pages, threads and
 * messages. Here memory comes from the CPU, and one hardware thread does all the work.
 */
#include "internal.h"
#include "support.h"

#include <stdlib.h>
#include <string.h>

/* ---- Pages ----------------------------------------------------------------------------------- */

static dsp_buffer lent[2];

void dsp_lend(const dsp_buffer *arena, const dsp_buffer *kv) {
  lent[0] = *arena;
  lent[1] = *kv;
}

/* The session asks for the arena, then for the KV cache. Pages of the application are not zeroed,
 * and a position of the cache that is masked must not hold a NaN. */
void *llamac_map_pages(uint64_t bytes) {
  dsp_buffer given = lent[0];
  lent[0] = lent[1];
  lent[1].base = NULL;
  if (given.base == NULL || given.bytes < bytes) return NULL;
  return memset(given.base, 0, (size_t)bytes);
}

/* They belong to the CPU; skel.c unmaps them. */
void llamac_unmap_pages(void *pages, uint64_t bytes) {
  (void)pages;
  (void)bytes;
}

/* ---- A pool of one thread -------------------------------------------------------------------- */

struct llamac_pool {
  int32_t unused;
};

static llamac_pool only_pool;

llamac_status llamac_pool_create(const llamac_session_options *options, llamac_pool **out,
                                 llamac_error *error) {
  if (options->num_threads != 1)
    return llamac_fail(error, LLAMAC_ERROR_THREAD, "%d threads; the DSP library has one",
                       options->num_threads);
  *out = &only_pool;
  return LLAMAC_OK;
}

void llamac_pool_destroy(llamac_pool *pool) { (void)pool; }

llamac_status llamac_pool_run(llamac_pool *pool, llamac_pool_body body, void *context,
                              uint32_t max_progress, llamac_error *error) {
  (void)pool, (void)max_progress, (void)error;
  body(context, 0);
  return LLAMAC_OK;
}

void llamac_pool_publish(llamac_pool *pool, int32_t thread, uint32_t progress) {
  (void)pool, (void)thread, (void)progress;
}

void llamac_pool_wait(llamac_pool *pool, int32_t other, uint32_t progress) {
  (void)pool, (void)other, (void)progress;
}

void llamac_pool_wait_others(llamac_pool *pool, int32_t thread, uint32_t progress) {
  (void)pool, (void)thread, (void)progress;
}

/* Nobody profiles on the DSP. */
uint64_t llamac_now_ns(void) { return 0; }

/* ---- Models ---------------------------------------------------------------------------------- */

/* skel.c keeps the only one as long as its sessions. */
void llamac_model_retain(llamac_model *model) { (void)model; }
void llamac_model_release(llamac_model *model) { (void)model; }

/* ---- The rest of the C library --------------------------------------------------------------- */

void *calloc(size_t count, size_t bytes) {
  if (bytes != 0 && count > SIZE_MAX / bytes) return NULL;
  void *memory = malloc(count * bytes > 0 ? count * bytes : 1);
  return memory != NULL ? memset(memory, 0, count * bytes) : NULL;
}

int strcmp(const char *left, const char *right) {
  while (*left != '\0' && *left == *right) left++, right++;
  return (unsigned char)*left - (unsigned char)*right;
}
