/* SPDX-License-Identifier: Apache-2.0
 *
 * network_format.h: the network file, which holds a graph for the Neuron Adapter as data.
 *
 * Little endian. Behind the header, each at the next multiple of 8 bytes:
 *
 *     llamac_network_operand   [num_operands]     in the order in which they are added
 *     llamac_network_operation [num_operations]   in the order in which they are added
 *     uint32_t                 [num_words]        dimensions and lists of operands
 *     float                    [num_scales]       scales of channels
 *     char                     [name_bytes]       names, each with a zero byte behind it
 *
 * and at data_offset the constants. `targets/neuropilot/network_file.py` writes it.
 */
#ifndef LLAMAC_NETWORK_FORMAT_H
#define LLAMAC_NETWORK_FORMAT_H

#include <stdint.h>

#define LLAMAC_NETWORK_MAGIC "LLAMACNN"

enum { LLAMAC_NETWORK_VERSION = 1, LLAMAC_NETWORK_MAX_RANK = 8 };

typedef struct {
  char magic[8];
  uint32_t version;
  uint32_t header_bytes;
  uint64_t file_bytes;
  uint8_t sha256[32]; /* of everything behind the header */
  uint32_t num_operands, num_operations;
  uint32_t num_inputs, num_outputs;
  uint32_t first_input; /* into words: operands of the inputs, then of the outputs */
  uint32_t num_words, num_scales, name_bytes;
  uint64_t data_offset;
  uint32_t min_major;   /* of the adapter's version */
  uint32_t options;     /* into names: for the adapter's compiler; "" are its defaults */
} llamac_network_header;

_Static_assert(sizeof(llamac_network_header) == 104, "header");

/* Where the values of an operand come from. */
enum {
  LLAMAC_OPERAND_TEMPORARY = 0,
  LLAMAC_OPERAND_INPUT = 1,
  LLAMAC_OPERAND_OUTPUT = 2,
  LLAMAC_OPERAND_CONSTANT = 3
};

typedef struct {
  int32_t type; /* NEURON_*. QUANT4_SYMM_PER_CHANNEL lies packed here: two codes a byte, the lower
                   half first */
  uint32_t kind; /* LLAMAC_OPERAND_* */
  uint32_t rank;
  uint32_t first_dim; /* into words */
  float scale;
  int32_t zero_point;
  uint32_t channel_dim, num_scales, first_scale; /* num_scales 0: not per channel */
  uint32_t name;                                 /* into names */
  uint64_t offset, bytes;                        /* of a constant, from data_offset */
} llamac_network_operand;

_Static_assert(sizeof(llamac_network_operand) == 56, "operand");

typedef struct {
  int32_t code; /* NEURON_* */
  uint32_t num_inputs, num_outputs;
  uint32_t first_operand; /* into words: inputs, then outputs */
  uint32_t name;          /* into names: for messages */
  uint32_t unused;
} llamac_network_operation;

_Static_assert(sizeof(llamac_network_operation) == 24, "operation");

#endif /* LLAMAC_NETWORK_FORMAT_H */
