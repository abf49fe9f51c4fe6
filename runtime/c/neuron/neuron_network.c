/* SPDX-License-Identifier: Apache-2.0
 *
 * neuron_network.c: network files, mapped and checked.
 */
#include "neuron_internal.h"

#include <string.h>
#include <sys/mman.h>

/* More of anything is no network of ours; keeps sums of sizes below 2^64. */
enum { MAX_COUNT = 1 << 24 };

/* ---- Checking --------------------------------------------------------------------------------- */

/* A network while it is read. */
typedef struct {
  llamac_network *network;
  const char *file;
  llamac_error *error;
} reader;

static llamac_status invalid(const reader *reader, const char *what, uint32_t index) {
  return llamac_fail(reader->error, LLAMAC_ERROR_ACCELERATOR,
                     "neuron network-invalid: %.80s: %s %u: copy the bundle again", reader->file,
                     what, index);
}

/* Whether a range lies within [0, size). */
static bool within(uint64_t first, uint64_t count, uint64_t size) {
  return first <= size && count <= size - first;
}

/* Takes the next part of the file, at a multiple of 8; NULL if the file ends before. */
static const void *take(const llamac_network *network, uint64_t *next, uint64_t count,
                        uint64_t item_bytes) {
  uint64_t first = *next, bytes = count * item_bytes;
  if (count > MAX_COUNT || !within(first, bytes, network->header->data_offset)) return NULL;
  *next = (first + bytes + 7) / 8 * 8;
  return (const uint8_t *)network->data + first;
}

/* Finds the parts that the header counts. */
static llamac_status find_parts(const reader *reader) {
  llamac_network *network = reader->network;
  const llamac_network_header *header = network->data;
  if (network->bytes < sizeof *header || memcmp(header->magic, LLAMAC_NETWORK_MAGIC, 8) != 0)
    return invalid(reader, "no network file; bytes:", (uint32_t)network->bytes);
  if (header->version != LLAMAC_NETWORK_VERSION || header->header_bytes != sizeof *header)
    return invalid(reader, "unknown version", header->version);
  if (header->file_bytes != network->bytes || header->data_offset > network->bytes ||
      header->data_offset % 8 != 0)
    return llamac_fail(reader->error, LLAMAC_ERROR_ACCELERATOR,
                       "neuron network-truncated: %.80s has %llu bytes, its header says %llu: copy "
                       "the bundle again",
                       reader->file, (unsigned long long)network->bytes,
                       (unsigned long long)header->file_bytes);
  network->header = header;
  uint64_t next = sizeof *header;
  network->operands = take(network, &next, header->num_operands, sizeof *network->operands);
  if (network->operands == NULL) return invalid(reader, "operands:", header->num_operands);
  network->operations = take(network, &next, header->num_operations, sizeof *network->operations);
  if (network->operations == NULL) return invalid(reader, "operations:", header->num_operations);
  network->words = take(network, &next, header->num_words, sizeof *network->words);
  if (network->words == NULL) return invalid(reader, "words:", header->num_words);
  network->scales = take(network, &next, header->num_scales, sizeof *network->scales);
  if (network->scales == NULL) return invalid(reader, "scales:", header->num_scales);
  network->names = take(network, &next, header->name_bytes, 1);
  if (network->names == NULL || header->name_bytes == 0 ||
      network->names[header->name_bytes - 1] != '\0')
    return invalid(reader, "bytes of names:", header->name_bytes);
  return LLAMAC_OK;
}

uint32_t llamac_network_bits(int32_t type) {
  switch (type) {
    case NEURON_FLOAT32: case NEURON_INT32: case NEURON_UINT32: case NEURON_TENSOR_FLOAT32:
    case NEURON_TENSOR_INT32: case NEURON_TENSOR_INT32_SYMM_PER_CHANNEL:
      return 32;
    case NEURON_TENSOR_QUANT16_SYMM: case NEURON_TENSOR_FLOAT16:
      return 16;
    case NEURON_BOOL: case NEURON_TENSOR_QUANT8_ASYMM: case NEURON_TENSOR_QUANT8_SYMM:
    case NEURON_TENSOR_QUANT8_ASYMM_SIGNED: case NEURON_TENSOR_QUANT8_SYMM_PER_CHANNEL:
      return 8;
    case NEURON_TENSOR_QUANT4_SYMM_PER_CHANNEL:
      return 4;
    default:
      return 0;
  }
}

uint64_t llamac_network_elements(const llamac_network *network,
                                 const llamac_network_operand *operand) {
  uint64_t elements = 1;
  for (uint32_t d = 0; d < operand->rank; d++)
    elements *= network->words[operand->first_dim + d];
  return elements;
}

static bool is_per_channel(int32_t type) {
  return type == NEURON_TENSOR_QUANT8_SYMM_PER_CHANNEL ||
         type == NEURON_TENSOR_QUANT4_SYMM_PER_CHANNEL ||
         type == NEURON_TENSOR_INT32_SYMM_PER_CHANNEL;
}

/* Checks an operand; `elements` stays small enough that bytes cannot overflow. */
static llamac_status check_operand(const reader *reader, uint32_t index) {
  const llamac_network *network = reader->network;
  const llamac_network_header *header = network->header;
  const llamac_network_operand *operand = &network->operands[index];
  uint32_t bits = llamac_network_bits(operand->type);
  if (bits == 0) return invalid(reader, "unknown type of operand", index);
  if (operand->kind > LLAMAC_OPERAND_CONSTANT || operand->name >= header->name_bytes)
    return invalid(reader, "kind or name of operand", index);
  if (operand->rank > LLAMAC_NETWORK_MAX_RANK ||
      !within(operand->first_dim, operand->rank, header->num_words))
    return invalid(reader, "dimensions of operand", index);
  uint64_t elements = 1;
  for (uint32_t d = 0; d < operand->rank; d++) {
    uint32_t dim = network->words[operand->first_dim + d];
    if (dim == 0 || elements > UINT64_C(0x7fffffffff) / dim)
      return invalid(reader, "dimensions of operand", index);
    elements *= dim;
  }
  uint32_t scales = operand->num_scales;
  if (is_per_channel(operand->type) != (scales != 0) ||
      !within(operand->first_scale, scales, header->num_scales) ||
      (scales != 0 && (operand->channel_dim >= operand->rank ||
                       network->words[operand->first_dim + operand->channel_dim] != scales)))
    return invalid(reader, "scales of operand", index);
  if (operand->kind != LLAMAC_OPERAND_CONSTANT) return LLAMAC_OK;
  if (operand->bytes != (elements * bits + 7) / 8 || operand->offset % 8 != 0 ||
      !within(operand->offset, operand->bytes, network->bytes - header->data_offset))
    return invalid(reader, "values of operand", index);
  return LLAMAC_OK;
}

/* Checks that `count` words from `first` on are operands; of this kind if it is not negative. */
static bool are_operands(const llamac_network *network, uint64_t first, uint64_t count, int kind) {
  if (!within(first, count, network->header->num_words)) return false;
  for (uint64_t i = first; i < first + count; i++) {
    uint32_t operand = network->words[i];
    if (operand >= network->header->num_operands) return false;
    if (kind >= 0 && network->operands[operand].kind != (uint32_t)kind) return false;
  }
  return true;
}

llamac_status llamac_network_read(llamac_network *network, const char *file, llamac_error *error) {
  reader reader = {network, file, error};
  llamac_status status = find_parts(&reader);
  if (status != LLAMAC_OK) return status;
  const llamac_network_header *header = network->header;
  for (uint32_t i = 0; i < header->num_operands && status == LLAMAC_OK; i++)
    status = check_operand(&reader, i);
  for (uint32_t i = 0; i < header->num_operations && status == LLAMAC_OK; i++) {
    const llamac_network_operation *operation = &network->operations[i];
    uint64_t count = (uint64_t)operation->num_inputs + operation->num_outputs;
    if (operation->num_outputs == 0 || operation->name >= header->name_bytes ||
        !are_operands(network, operation->first_operand, count, -1))
      status = invalid(&reader, "operands of operation", i);
  }
  if (status != LLAMAC_OK) return status;
  uint64_t outputs = (uint64_t)header->first_input + header->num_inputs;
  if (!are_operands(network, header->first_input, header->num_inputs, LLAMAC_OPERAND_INPUT) ||
      !are_operands(network, outputs, header->num_outputs, LLAMAC_OPERAND_OUTPUT))
    return invalid(&reader, "inputs or outputs from word", header->first_input);
  if (header->options >= header->name_bytes)
    return invalid(&reader, "options at", header->options);
  return LLAMAC_OK;
}

llamac_status llamac_network_verify(const llamac_network *network, const char *file,
                                    llamac_error *error) {
  uint8_t hash[LLAMAC_SHA256_BYTES];
  uint64_t header = network->header->header_bytes;
  llamac_sha256((const uint8_t *)network->data + header, network->bytes - header, hash);
  if (memcmp(hash, network->header->sha256, sizeof hash) == 0) return LLAMAC_OK;
  return llamac_fail(error, LLAMAC_ERROR_ACCELERATOR,
                     "neuron network-invalid: %.80s: its hash differs from that in its header: copy "
                     "the bundle again",
                     file);
}

/* ---- Opening ---------------------------------------------------------------------------------- */

llamac_status llamac_network_open(const llamac_neuron_graph *graph, const char *folder,
                                  llamac_network *network, llamac_error *error) {
  char hash[65];
  llamac_status status =
      llamac_neuron_map(folder, graph->file, graph->file_bytes, &network->data, error);
  if (status != LLAMAC_OK) return status;
  network->bytes = graph->file_bytes;
  status = llamac_network_read(network, graph->file, error);
  if (status == LLAMAC_OK) {
    llamac_sha256_text(network->header->sha256, hash);
    if (strcmp(hash, graph->sha256) != 0)
      status = llamac_fail(error, LLAMAC_ERROR_ACCELERATOR,
                           "neuron network-invalid: %.80s has hash %.16s..., the library wants "
                           "%.16s...: it is of another build",
                           graph->file, hash, graph->sha256);
  }
  if (status != LLAMAC_OK) llamac_network_close(network);
  return status;
}

void llamac_network_close(llamac_network *network) {
  if (network->data != NULL) munmap(network->data, (size_t)network->bytes);
  memset(network, 0, sizeof *network);
}
