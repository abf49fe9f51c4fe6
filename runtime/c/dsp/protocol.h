/* SPDX-License-Identifier: Apache-2.0
 *
 * protocol.h: what the CPU side (fastrpc/) and the DSP side (dsp/skel.c) say to each other.
 *
 * The first two methods are FastRPC's own. All others have two buffers each way, of which the
 * second ones may be empty:
 *
 *     in   dsp_request, data
 *     out  dsp_reply, result
 *
 * Structures have no padding and the same layout on both processors.
 */
#ifndef LLAMAC_PROTOCOL_H
#define LLAMAC_PROTOCOL_H

#include <stdint.h>

#define DSP_PROTOCOL_VERSION 1u

/* Sessions that a DSP process holds at once. */
#define DSP_MAX_SESSIONS 4u

enum {
  DSP_OPEN = 0,    /* (length of the name, name) -> handle */
  DSP_CLOSE = 1,   /* handle -> */
  DSP_INFO = 2,    /* data: name of a level, or nothing: the best -> dsp_info */
  DSP_LEND = 3,    /* space, session, fd, bytes: memory for it, until the session or handle ends */
  DSP_CHECK = 4,   /* space, offset, data: the same bytes as they lie there -> reply.checksum */
  DSP_START = 5,   /* session: makes it, with the arena and the KV cache that it was lent */
  DSP_EVAL = 6,    /* session, data: tokens -> logits if there is room for them */
  DSP_REWIND = 7,  /* session, count: position */
  DSP_FINISH = 8,  /* session: gives back what it was lent */
  DSP_UNLOAD = 9   /* gives back the weights; no session is left */
};

typedef struct {
  uint32_t session; /* 0 to DSP_MAX_SESSIONS - 1 */
  uint32_t space;   /* enum llamac_space */
  int32_t fd;       /* of a buffer that both processors map */
  int32_t count;
  uint64_t offset;
  uint64_t bytes;
} dsp_request;

typedef struct {
  int32_t status; /* llamac_status */
  int32_t position;
  int32_t argmax; /* -1: no logits */
  uint32_t checksum;
  char message[256];
} dsp_reply;

typedef struct {
  uint32_t protocol_version;
  uint32_t abi_version;
  int32_t vocab_size;
  int32_t context_length;
  int32_t max_chunk;
  uint32_t alignment;
  uint64_t weights_bytes;
  uint64_t arena_bytes;
  uint64_t kv_bytes;
  uint8_t build_id[32];
  char model_name[64];
  char level[32];
} dsp_info;

/* Sum of the 32-bit words of a buffer, turned at each step, so that their order counts; bytes behind
 * the last word count as a word of their own. It finds bytes that the other processor does not see
 * yet. data: at a multiple of 4; whole words are loaded, because a DSP takes seconds for a billion
 * bytes one by one. */
static inline uint32_t dsp_checksum(const void *data, uint64_t bytes) {
  typedef uint32_t __attribute__((may_alias)) word;
  const word *words = data;
  const uint8_t *rest = (const uint8_t *)data + bytes / 4 * 4;
  uint32_t sum = 0, last = 0;
  for (uint64_t i = 0; i < bytes / 4; i++) sum = (sum << 1 | sum >> 31) + words[i];
  for (uint64_t i = 0; i < bytes % 4; i++) last |= (uint32_t)rest[i] << 8 * i;
  return (sum << 1 | sum >> 31) + last;
}

#endif /* LLAMAC_PROTOCOL_H */
