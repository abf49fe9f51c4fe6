/* SPDX-License-Identifier: Apache-2.0
 *
 * hexagon_counters.h: what the calling thread has executed on an emulated Hexagon.
 *
 * qemu-hexagon counts packets, instructions and those of HVX in the control registers 20 to 22,
 * which no processor has. The assembler knows no name for them: the word is `r0 = C<n>`.
 */
#ifndef LLAMAC_HEXAGON_COUNTERS_H
#define LLAMAC_HEXAGON_COUNTERS_H

#include <stdint.h>

enum { LLAMAC_PACKETS = 20, LLAMAC_INSTRUCTIONS = 21, LLAMAC_VECTOR_INSTRUCTIONS = 22 };

#if defined(__hexagon__)
#define LLAMAC_EXECUTED(n)                                                         \
  ({                                                                               \
    register uint32_t count_ __asm__("r0");                                        \
    __asm__ volatile(".word %c1" : "=r"(count_) : "i"(0x6a00c000 | (n) << 16) : "memory"); \
    count_;                                                                        \
  })
#endif

#endif /* LLAMAC_HEXAGON_COUNTERS_H */
