/* SPDX-License-Identifier: Apache-2.0
 *
 * remote.h: FastRPC's calling convention, as far as we use it.
 *
 * These are our own declarations of an interface that github.com/qualcomm/fastrpc describes in
 * inc/remote.h. A call has a method number and up to 255 buffers each way; the word `scalars` packs
 * the counts. Arguments come in this order: buffers in, buffers out, handles in, handles out.
 */
#ifndef LLAMAC_REMOTE_H
#define LLAMAC_REMOTE_H

#include <stddef.h>
#include <stdint.h>

typedef union {
  struct {
    void *data;
    size_t bytes;
  } buffer;
  uint64_t handle;
} remote_argument;

static inline uint32_t remote_scalars(uint32_t method, uint32_t num_in, uint32_t num_out,
                                      uint32_t handles_in, uint32_t handles_out) {
  return method << 24 | num_in << 16 | num_out << 8 | handles_in << 4 | handles_out;
}

static inline uint32_t remote_method(uint32_t scalars) { return scalars >> 24 & 0x1f; }
static inline uint32_t remote_num_in(uint32_t scalars) { return scalars >> 16 & 0xff; }
static inline uint32_t remote_num_out(uint32_t scalars) { return scalars >> 8 & 0xff; }

#endif /* LLAMAC_REMOTE_H */
