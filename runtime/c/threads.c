/* SPDX-License-Identifier: Apache-2.0
 *
 * threads.c: a fixed team of threads that run the same body, and wait for each other's progress.
 *
 * Every thread owns one counter on a cache line of its own. It only ever grows, only its owner
 * writes it, and everything is built from "wait until that counter has come to x": the start of a
 * run (workers wait for thread 0), the steps in between, and the end (thread 0 waits for workers).
 * A barrier of two threads thus costs one cache line transfer each way at the same time. Counters
 * wrap around; differences are compared as signed numbers.
 *
 * A waiting thread spins for a while and then sleeps on the counter's address (futex).
 */
#include "internal.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* Two lines of 64 bytes: x86 fetches them in pairs, and some Arm cores have lines of 128. */
enum { LINE_BYTES = 128 };

/* TVM's kernels may keep small buffers on the stack; musl's default is 128 KiB. */
enum { STACK_BYTES = 1 << 20 };

enum { DEFAULT_SPIN_US = 200, SPINS_PER_CLOCK_READ = 128 };

/* How far one thread has come. */
typedef struct {
  _Alignas(LINE_BYTES) _Atomic uint32_t progress;
  _Atomic uint32_t sleepers; /* threads that sleep, or are about to, until progress changes */
} counter;

/* One thread and its place. */
typedef struct {
  llamac_pool *pool;
  pthread_t thread;
  int32_t number;
  int32_t cpu; /* -1: not pinned */
  bool pinned; /* result of `pin_self`, reported by the first run */
} worker;

struct llamac_pool {
  counter *counters; /* [num_threads] */
  worker *workers;   /* [num_threads]; entry 0 stands for the caller of llamac_pool_run */
  int32_t num_threads, num_started;
  uint64_t spin_ns;
  /* The current run; written by thread 0 before it publishes the start. */
  llamac_pool_body body;
  void *context;
  uint32_t start, end; /* progress of a thread that has seen the start, that has left the body */
  bool stop;
};

uint64_t llamac_now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* ---- Waiting ------------------------------------------------------------------------------- */

/* Tells the core that this is a spin loop. */
static inline void relax(void) {
#if defined(__x86_64__)
  __asm__ volatile("pause");
#elif defined(__aarch64__)
  __asm__ volatile("isb"); /* `yield` returns at once on most cores */
#endif
}

/* Sleeps while *address == value; may return early. */
static void sleep_on(_Atomic uint32_t *address, uint32_t value) {
#if defined(__linux__)
  syscall(SYS_futex, address, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
#else
  (void)address, (void)value;
  sched_yield();
#endif
}

/* Wakes all threads that sleep on the address. */
static void wake_all(_Atomic uint32_t *address) {
#if defined(__linux__)
  syscall(SYS_futex, address, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
#else
  (void)address;
#endif
}

/* True if the counter has come to `value`. */
static inline bool reached(counter *c, uint32_t value) {
  return (int32_t)(atomic_load_explicit(&c->progress, memory_order_acquire) - value) >= 0;
}

/* The slow end of `wait_for`. A sleeper announces itself before it looks at the progress again,
 * and the owner writes the progress before it looks for sleepers: one of the two sees the other
 * (sequentially consistent operations on both sides). */
static void sleep_until(counter *c, uint32_t value) {
  atomic_fetch_add(&c->sleepers, 1);
  for (;;) {
    uint32_t seen = atomic_load(&c->progress);
    if ((int32_t)(seen - value) >= 0) break;
    sleep_on(&c->progress, seen);
  }
  atomic_fetch_sub(&c->sleepers, 1);
}

/* Spins, then sleeps, until the counter has come to `value`. */
static void wait_for(const llamac_pool *pool, counter *c, uint32_t value) {
  uint64_t deadline = 0;
  for (uint32_t spins = 1; pool->spin_ns > 0; spins++) {
    if (reached(c, value)) return;
    relax();
    if (spins % SPINS_PER_CLOCK_READ != 0) continue;
    uint64_t now = llamac_now_ns();
    if (deadline == 0) deadline = now + pool->spin_ns;
    if (now >= deadline) break;
  }
  if (!reached(c, value)) sleep_until(c, value);
}

/* Sets the counter and wakes those who sleep on it. */
static void advance(counter *c, uint32_t value) {
  atomic_store(&c->progress, value);
  if (atomic_load(&c->sleepers) != 0) wake_all(&c->progress);
}

void llamac_pool_publish(llamac_pool *pool, int32_t thread, uint32_t progress) {
  advance(&pool->counters[thread], pool->start + progress);
}

void llamac_pool_wait(llamac_pool *pool, int32_t other, uint32_t progress) {
  wait_for(pool, &pool->counters[other], pool->start + progress);
}

void llamac_pool_wait_others(llamac_pool *pool, int32_t thread, uint32_t progress) {
  for (int32_t other = 0; other < pool->num_threads; other++)
    if (other != thread) llamac_pool_wait(pool, other, progress);
}

/* ---- Affinity ------------------------------------------------------------------------------ */

#if defined(__linux__)
typedef cpu_set_t affinity;
enum { MAX_CPUS = CPU_SETSIZE };

/* Moves the calling thread to one CPU; false unless the system says afterwards that it is so. */
static bool pin_self(int32_t cpu) {
  cpu_set_t wanted, actual;
  CPU_ZERO(&wanted);
  CPU_SET((size_t)cpu, &wanted);
  if (sched_setaffinity(0, sizeof wanted, &wanted) != 0) return false;
  if (sched_getaffinity(0, sizeof actual, &actual) != 0) return false;
  return CPU_EQUAL(&wanted, &actual);
}

static bool save_affinity(affinity *saved) {
  return sched_getaffinity(0, sizeof *saved, saved) == 0;
}

static void restore_affinity(const affinity *saved) { sched_setaffinity(0, sizeof *saved, saved); }

/* CPUs on which the calling thread may run. */
static int32_t num_usable_cpus(void) {
  affinity usable;
  return save_affinity(&usable) ? CPU_COUNT(&usable) : LLAMAC_MAX_THREADS;
}
#else
typedef int affinity;
enum { MAX_CPUS = 0 };
static bool pin_self(int32_t cpu) { return (void)cpu, false; }
static bool save_affinity(affinity *saved) { return (void)saved, false; }
static void restore_affinity(const affinity *saved) { (void)saved; }
static int32_t num_usable_cpus(void) { return LLAMAC_MAX_THREADS; }
#endif

/* ---- Threads ------------------------------------------------------------------------------- */

/* A worker's life: wait for the start of a run, run the body, say so. */
static void *work(void *argument) {
  worker *self = argument;
  llamac_pool *pool = self->pool;
  self->pinned = self->cpu < 0 || pin_self(self->cpu);
  for (uint32_t done = 0;;) {
    wait_for(pool, &pool->counters[0], done + 1);
    if (pool->stop) return NULL;
    pool->body(pool->context, self->number);
    done = pool->end;
    advance(&pool->counters[self->number], done);
  }
}

/* Runs the body with the caller as thread 0. */
static void run(llamac_pool *pool, llamac_pool_body body, void *context, uint32_t max_progress) {
  pool->body = body;
  pool->context = context;
  pool->start = pool->end + 1;
  pool->end = pool->start + max_progress + 1; /* not to be mistaken for the last progress */
  advance(&pool->counters[0], pool->start);
  body(context, 0);
  advance(&pool->counters[0], pool->end);
  for (int32_t t = 1; t < pool->num_threads; t++) wait_for(pool, &pool->counters[t], pool->end);
}

llamac_status llamac_pool_run(llamac_pool *pool, llamac_pool_body body, void *context,
                              uint32_t max_progress, llamac_error *error) {
  int32_t cpu = pool->workers[0].cpu;
  affinity saved;
  if (cpu < 0) {
    run(pool, body, context, max_progress);
    return LLAMAC_OK;
  }
  bool is_saved = save_affinity(&saved);
  bool is_pinned = is_saved && pin_self(cpu);
  if (is_pinned) run(pool, body, context, max_progress);
  if (is_saved) restore_affinity(&saved);
  if (is_pinned) return LLAMAC_OK;
  return llamac_fail(error, LLAMAC_ERROR_THREAD, "cannot run thread 0 on CPU %d", cpu);
}

/* Body of the first run: nothing to do but to have been pinned. */
static void report_in(void *context, int32_t thread) { (void)context, (void)thread; }

/* Starts the workers with all signals blocked: handlers belong to the caller's threads. */
static llamac_status start_workers(llamac_pool *pool, llamac_error *error) {
  sigset_t all, saved;
  pthread_attr_t attributes;
  int failed = pthread_attr_init(&attributes);
  if (failed == 0) {
    failed = pthread_attr_setstacksize(&attributes, STACK_BYTES);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &saved);
    for (int32_t t = 1; t < pool->num_threads && failed == 0; t++) {
      failed = pthread_create(&pool->workers[t].thread, &attributes, work, &pool->workers[t]);
      if (failed == 0) pool->num_started = t + 1;
    }
    pthread_sigmask(SIG_SETMASK, &saved, NULL);
    pthread_attr_destroy(&attributes);
  }
  if (failed == 0) return LLAMAC_OK;
  return llamac_fail(error, LLAMAC_ERROR_THREAD, "cannot start thread %d of %d: %s",
                     pool->num_started, pool->num_threads, strerror(failed));
}

/* One run in which every thread shows that it is where it should be. */
static llamac_status check_pinned(llamac_pool *pool, llamac_error *error) {
  llamac_status status = llamac_pool_run(pool, report_in, NULL, 0, error);
  for (int32_t t = 1; t < pool->num_threads && status == LLAMAC_OK; t++)
    if (!pool->workers[t].pinned)
      status = llamac_fail(error, LLAMAC_ERROR_THREAD, "cannot run thread %d on CPU %d", t,
                           pool->workers[t].cpu);
  return status;
}

/* Says what is wrong with the options. */
static llamac_status check_options(const llamac_session_options *options, llamac_error *error) {
  if (options->num_threads < 1 || options->num_threads > LLAMAC_MAX_THREADS)
    return llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "num_threads is %d, not 1 to %d",
                       options->num_threads, LLAMAC_MAX_THREADS);
  if (options->num_cpus == 0) return LLAMAC_OK;
  if (options->num_cpus != options->num_threads || options->cpus == NULL)
    return llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "%d CPUs given for %d threads",
                       options->cpus ? options->num_cpus : 0, options->num_threads);
  for (int32_t i = 0; i < options->num_cpus; i++)
    if (options->cpus[i] < 0 || options->cpus[i] >= MAX_CPUS)
      return llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "no CPU can have the number %d",
                         options->cpus[i]);
  return LLAMAC_OK;
}

/* How long to spin. With more threads than CPUs a spinning thread would keep the one it waits for
 * from running. */
static uint64_t spin_ns(const llamac_session_options *options) {
  if (options->spin_us < 0) return 0;
  if (options->num_cpus == 0 && options->num_threads > num_usable_cpus()) return 0;
  return UINT64_C(1000) * (uint64_t)(options->spin_us > 0 ? options->spin_us : DEFAULT_SPIN_US);
}

/* Allocates a pool whose threads are not started yet; NULL without memory. */
static llamac_pool *allocate_pool(const llamac_session_options *options) {
  size_t num_threads = (size_t)options->num_threads;
  llamac_pool *pool = calloc(1, sizeof *pool);
  if (pool == NULL) return NULL;
  pool->num_threads = options->num_threads;
  pool->num_started = 1;
  pool->spin_ns = spin_ns(options);
  pool->workers = calloc(num_threads, sizeof *pool->workers);
  void *counters = NULL;
  if (pool->workers == NULL ||
      posix_memalign(&counters, LINE_BYTES, num_threads * sizeof *pool->counters) != 0) {
    free(pool->workers);
    free(pool);
    return NULL;
  }
  pool->counters = counters;
  for (int32_t t = 0; t < options->num_threads; t++) {
    atomic_init(&pool->counters[t].progress, 0);
    atomic_init(&pool->counters[t].sleepers, 0);
    pool->workers[t].pool = pool;
    pool->workers[t].number = t;
    pool->workers[t].cpu = options->num_cpus > 0 ? options->cpus[t] : -1;
  }
  return pool;
}

llamac_status llamac_pool_create(const llamac_session_options *options, llamac_pool **out,
                                 llamac_error *error) {
  llamac_status status = check_options(options, error);
  if (status != LLAMAC_OK) return status;
  llamac_pool *pool = allocate_pool(options);
  if (pool == NULL) return llamac_fail(error, LLAMAC_ERROR_MEMORY, "no memory for threads");
  status = start_workers(pool, error);
  if (status == LLAMAC_OK) status = check_pinned(pool, error);
  if (status != LLAMAC_OK) {
    llamac_pool_destroy(pool);
    return status;
  }
  *out = pool;
  return LLAMAC_OK;
}

void llamac_pool_destroy(llamac_pool *pool) {
  if (pool == NULL) return;
  pool->stop = true;
  advance(&pool->counters[0], pool->end + 1);
  for (int32_t t = 1; t < pool->num_started; t++) pthread_join(pool->workers[t].thread, NULL);
  free(pool->counters);
  free(pool->workers);
  free(pool);
}
