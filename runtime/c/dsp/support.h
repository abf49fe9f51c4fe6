/* SPDX-License-Identifier: Apache-2.0
 *
 * support.h: memory that the CPU lent, for sessions that ask for pages.
 */
#ifndef LLAMAC_DSP_SUPPORT_H
#define LLAMAC_DSP_SUPPORT_H

#include <stdint.h>

#include "llamac.h"

/* A buffer of the application, mapped here; base is NULL if there is none. */
typedef struct {
  uint8_t *base;
  uint64_t bytes;
} dsp_buffer;

/* From now on llamac_map_pages takes these: first the arena, then the KV cache. */
void dsp_lend(const dsp_buffer *arena, const dsp_buffer *kv);

#endif /* LLAMAC_DSP_SUPPORT_H */
