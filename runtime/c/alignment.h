/* SPDX-License-Identifier: Apache-2.0
 *
 * alignment.h: where tensors may lie.
 *
 * Kernels rely on it and do not look. On Hexagon a violation would not trap: HVX ignores the low seven
 * bits of an address and reads other data. So whoever calls a kernel with tensors of others looks
 * first.
 */
#ifndef LLAMAC_ALIGNMENT_H
#define LLAMAC_ALIGNMENT_H

#include <stdint.h>

#include "program.h"

/* `Isa.alignment` of the processor's instruction sets. */
#ifdef __hexagon__
#define LLAMAC_KERNEL_ALIGNMENT 128
#else
#define LLAMAC_KERNEL_ALIGNMENT 64
#endif

static inline int llamac_is_aligned(const DLTensor *tensor) {
  uintptr_t start = (uintptr_t)tensor->data + (uintptr_t)tensor->byte_offset;
  return start % LLAMAC_KERNEL_ALIGNMENT == 0;
}

#endif /* LLAMAC_ALIGNMENT_H */
