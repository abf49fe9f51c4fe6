/* SPDX-License-Identifier: Apache-2.0
 *
 * kernel_marks.h: marks right before and after the call of a kernel, for plug-ins that count.
 *
 * A mark is an instruction that changes nothing; targets/c/instruction_counter.c looks for the two.
 * They are there only in programs that are compiled with LLAMAC_MARK_KERNELS, which libraries are
 * not. What lies between them is one call of one thread.
 */
#ifndef LLAMAC_KERNEL_MARKS_H
#define LLAMAC_KERNEL_MARKS_H

#if defined(LLAMAC_MARK_KERNELS) && defined(__aarch64__)
static inline void llamac_mark_begin(void) { __asm__ volatile("orr x10, x10, x10" ::: "memory"); }
static inline void llamac_mark_end(void) { __asm__ volatile("orr x11, x11, x11" ::: "memory"); }
#elif defined(LLAMAC_MARK_KERNELS) && defined(__hexagon__)
/* An emulated Hexagon counts by itself; the runner writes it down (runner/packets.c). */
void llamac_count_begin(void);
void llamac_count_end(void);
static inline void llamac_mark_begin(void) { llamac_count_begin(); }
static inline void llamac_mark_end(void) { llamac_count_end(); }
#else
static inline void llamac_mark_begin(void) {}
static inline void llamac_mark_end(void) {}
#endif

#endif /* LLAMAC_KERNEL_MARKS_H */
