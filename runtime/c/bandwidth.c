/* SPDX-License-Identifier: Apache-2.0
 *
 * bandwidth.c: how fast this machine reads memory, with plain vector loads.
 */
#include "internal.h"

#include <string.h>
#include <sys/mman.h>

/* 64 bytes; the compiler splits them into the widest loads of the function's target. */
typedef uint64_t block __attribute__((vector_size(64)));

enum { NUM_ACCUMULATORS = 4, MIN_BYTES_PER_THREAD = 1 << 20 };

/* Reads `count` blocks and returns something that depends on all of them. Several sums, so that no
 * load waits for the addition before. count: a multiple of NUM_ACCUMULATORS. */
static inline __attribute__((always_inline)) uint64_t read_blocks(const block *blocks,
                                                                  size_t count) {
  block sums[NUM_ACCUMULATORS];
  uint64_t total = 0;
  memset(sums, 0, sizeof sums);
  for (size_t i = 0; i < count; i += NUM_ACCUMULATORS)
    for (size_t k = 0; k < NUM_ACCUMULATORS; k++) sums[k] += blocks[i + k];
  for (size_t k = 0; k < NUM_ACCUMULATORS; k++)
    for (size_t lane = 0; lane < 8; lane++) total += sums[k][lane];
  return total;
}

typedef uint64_t (*reader)(const block *blocks, size_t count);

/* The same loop, compiled for each width of loads. */
static uint64_t read_baseline(const block *blocks, size_t count) {
  return read_blocks(blocks, count);
}

#if defined(__x86_64__)
static __attribute__((target("avx2"))) uint64_t read_avx2(const block *blocks, size_t count) {
  return read_blocks(blocks, count);
}

static __attribute__((target("avx512f"))) uint64_t read_avx512(const block *blocks, size_t count) {
  return read_blocks(blocks, count);
}
#endif

/* The widest that this CPU has. */
static reader choose_reader(void) {
#if defined(__x86_64__)
  uint64_t features = llamac_cpu_features();
  if (features & LLAMAC_X86_AVX512F) return read_avx512;
  if (features & LLAMAC_X86_AVX2) return read_avx2;
#endif
  return read_baseline;
}

/* One measurement: every thread has its own part of the buffer. */
typedef struct {
  block *blocks;
  size_t blocks_per_thread;
  reader read;
  _Atomic uint64_t total; /* keeps the reads from being optimized away */
} probe;

/* Body: touches the pages of the thread's part. */
static void touch(void *context, int32_t thread) {
  probe *p = context;
  memset(p->blocks + p->blocks_per_thread * (size_t)thread, 1,
         p->blocks_per_thread * sizeof(block));
}

/* Body: reads the thread's part once. */
static void read_part(void *context, int32_t thread) {
  probe *p = context;
  uint64_t total = p->read(p->blocks + p->blocks_per_thread * (size_t)thread,
                           p->blocks_per_thread);
  atomic_fetch_add_explicit(&p->total, total, memory_order_relaxed);
}

/* Repeats rounds until the time is over; GB/s of the fastest, 0 if a thread cannot be pinned. */
static double best_round(llamac_pool *pool, probe *p, uint64_t bytes, uint64_t duration_ns) {
  uint64_t begin = llamac_now_ns(), now = begin, best_ns = UINT64_MAX;
  do {
    uint64_t started = now;
    if (llamac_pool_run(pool, read_part, p, 0, NULL) != LLAMAC_OK) return 0;
    now = llamac_now_ns();
    if (now - started < best_ns) best_ns = now - started;
  } while (now - begin < duration_ns);
  return best_ns > 0 ? (double)bytes / (double)best_ns : 0;
}

double llamac_read_bandwidth(int32_t num_threads, uint64_t bytes, int32_t seconds_x10,
                             const int32_t *cpus, int32_t num_cpus) {
  llamac_session_options options = {
      .num_threads = num_threads, .cpus = cpus, .num_cpus = num_cpus};
  llamac_pool *pool;
  double result = 0;
  if (num_threads < 1 || seconds_x10 < 1 ||
      bytes / (uint32_t)num_threads < MIN_BYTES_PER_THREAD)
    return 0;
  if (llamac_pool_create(&options, &pool, NULL) != LLAMAC_OK) return 0;
  size_t blocks = (size_t)(bytes / sizeof(block) / (uint32_t)num_threads);
  probe p = {.blocks_per_thread = blocks - blocks % NUM_ACCUMULATORS, .read = choose_reader()};
  uint64_t read_bytes = p.blocks_per_thread * sizeof(block) * (uint32_t)num_threads;
  p.blocks = llamac_map_pages(read_bytes);
  if (p.blocks != NULL) {
#if defined(MADV_HUGEPAGE)
    madvise(p.blocks, (size_t)read_bytes, MADV_HUGEPAGE); /* a hint; failure is harmless */
#endif
    if (llamac_pool_run(pool, touch, &p, 0, NULL) == LLAMAC_OK)
      result = best_round(pool, &p, read_bytes, UINT64_C(100000000) * (uint32_t)seconds_x10);
  }
  llamac_unmap_pages(p.blocks, read_bytes);
  llamac_pool_destroy(pool);
  return result;
}
