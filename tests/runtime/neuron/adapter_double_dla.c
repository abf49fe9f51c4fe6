/* A RECORDING TEST DOUBLE of MediaTek's Neuron Adapter: the extension that takes a DLA.
 *
 * A "DLA" of this double is a text that says that it is none, and the sizes of inputs and outputs.
 */
#include "adapter_double.h"

#include <stdlib.h>
#include <string.h>

#define NOT_A_DLA "NOT A REAL DLA: a test double made this."

static const char EXTENSION[] = "com.mediatek.compiled_network";

bool read_sizes(const char *head, const char *text, size_t bytes, uint32_t counts[2],
                uint32_t *sizes) {
  size_t length = strlen(head);
  if (bytes <= length || memcmp(text, head, length) != 0 || text[bytes - 1] != '\0') return false;
  char *next = (char *)(uintptr_t)text + length;
  for (int side = 0; side < 2; side++) counts[side] = (uint32_t)strtoul(next, &next, 10);
  if (counts[0] > MAX_IO || counts[1] > MAX_IO) return false;
  for (uint32_t i = 0; i < counts[0] + counts[1]; i++) sizes[i] = (uint32_t)strtoul(next, &next, 10);
  return true;
}

void set_size(operand *operand, uint32_t bytes) {
  operand->type.type = NEURON_BOOL; /* bytes */
  operand->type.rank = 1;
  operand->dims[0] = bytes;
}

EXPORT int NeuronModel_getExtensionOperandType(neuron_model *model, const char *extension,
                                               uint16_t code, int32_t *type) {
  say("NeuronModel_getExtensionOperandType model=%d extension=%s code=%u", model->id, extension,
      code);
  *type = DLA_OPERAND;
  bool is_known = strcmp(extension, EXTENSION) == 0 && code == 0x0200;
  return end(__func__, is_known ? NEURON_OK : NEURON_BAD_DATA);
}

EXPORT int NeuronModel_getExtensionOperationType(neuron_model *model, const char *extension,
                                                 uint16_t code, int32_t *operation) {
  say("NeuronModel_getExtensionOperationType model=%d extension=%s code=%u", model->id, extension,
      code);
  *operation = DLA_OPERATION;
  bool is_known = strcmp(extension, EXTENSION) == 0 && code == 0;
  return end(__func__, is_known ? NEURON_OK : NEURON_BAD_DATA);
}

bool read_dla(neuron_model *model) {
  uint32_t sizes[2 * MAX_IO], counts[2];
  const operand *dla = &model->operands[model->num_inputs];
  if (model->num_operations != 1 || model->num_operands != model->num_inputs + 1 + model->num_outputs ||
      dla->type.type != DLA_OPERAND || dla->value == NULL ||
      !read_sizes(NOT_A_DLA, (const char *)dla->value, dla->bytes, counts, sizes) ||
      counts[0] != model->num_inputs || counts[1] != model->num_outputs)
    return false;
  for (uint32_t i = 0; i < counts[0]; i++) set_size(&model->operands[model->inputs[i]], sizes[i]);
  for (uint32_t i = 0; i < counts[1]; i++)
    set_size(&model->operands[model->outputs[i]], sizes[counts[0] + i]);
  return true;
}
