/* SPDX-License-Identifier: Apache-2.0
 *
 * bionic.h: included before every file of the support library when it is compiled for Android's C
 * library with the headers of musl, because there is no NDK. It makes the one difference in names
 * good, and does not compile if a type of musl's is not what bionic expects.
 *
 * On 64-bit Arm both libraries hand the kernel's own types and numbers through: struct stat,
 * timespec, error numbers, the flags of open, mmap, madvise and futex, AT_HWCAP. They differ where
 * user space decides. Facts about bionic are from its public sources (android.googlesource.com,
 * platform/bionic, libc/): include/bits/pthread_types.h, include/pthread.h, include/sched.h,
 * include/sys/stat.h, include/signal.h, include/errno.h and libc.map.txt.
 */
#ifndef LLAMAC_BIONIC_H
#define LLAMAC_BIONIC_H

#ifndef __aarch64__
#error "the sizes below are those of 64-bit Arm"
#endif

#ifndef _GNU_SOURCE /* internal.h defines it too, but only after this file */
#define _GNU_SOURCE
#endif

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <sys/stat.h>
#include <time.h>

/* The address of errno has the same type and another name. */
#undef errno
int *__errno(void) __attribute__((const));
#define errno (*__errno())

/* bionic: long; here a pointer. Both are passed in one register, and compared as they are. */
_Static_assert(sizeof(pthread_t) == 8, "pthread_t");

/* bionic: int32_t[10], and all zeros is what its PTHREAD_MUTEX_INITIALIZER says too. */
_Static_assert(sizeof(pthread_mutex_t) == 40, "pthread_mutex_t");

/* bionic: flags, stack, its size, guard size, policy, priority, 16 bytes in reserve. Only its
 * functions look inside. */
_Static_assert(sizeof(pthread_attr_t) == 56 && _Alignof(pthread_attr_t) == 8, "pthread_attr_t");

/* bionic: 64 signals in 8 bytes. Ours is larger: its functions fill and read the first 8, and we
 * only pass it on. */
_Static_assert(sizeof(sigset_t) >= 8, "sigset_t");
_Static_assert(SIG_SETMASK == 2, "SIG_SETMASK");

/* bionic: 1024 CPUs, bit n % 64 of word n / 64. */
_Static_assert(sizeof(cpu_set_t) == 128 && CPU_SETSIZE == 1024, "cpu_set_t");

/* Both are the kernel's. */
_Static_assert(sizeof(struct stat) == 128, "struct stat");
_Static_assert(offsetof(struct stat, st_mode) == 16, "st_mode");
_Static_assert(offsetof(struct stat, st_size) == 48, "st_size");
_Static_assert(sizeof(mode_t) == 4, "mode_t");
_Static_assert(sizeof(struct timespec) == 16 && CLOCK_MONOTONIC == 1, "struct timespec");

#endif /* LLAMAC_BIONIC_H */
