/* A RECORDING TEST DOUBLE of MediaTek's Neuron Adapter. It computes nothing and compiles nothing.
 *
 * It exports the adapter's functions under their names, writes every call to a file, checks what
 * any adapter would refuse (order of calls, indices, sizes), and fails where it is told to:
 *
 *     NEURON_DOUBLE_LOG          the file, appended to; without it nothing is written
 *     NEURON_DOUBLE_VERSION      "8.2.0", the default
 *     NEURON_DOUBLE_FAIL         "NeuronModel_finish=4": that function returns that code;
 *                                "NeuronModel_create=1@2": only its second call does
 *     NEURON_DOUBLE_REFUSE       "25": addOperation refuses the operation with this code
 *     NEURON_DOUBLE_UNSUPPORTED  "25": getSupportedOperations says no to these
 *
 * This file has the log and models; adapter_double_dla.c has the extension that takes a DLA, and
 * adapter_double_compilation.c the rest.
 */
#include "adapter_double.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>


/* ---- The log ---------------------------------------------------------------------------------- */

static char line[1 << 20]; /* scales of thousands of channels fit */
static size_t used;

void say(const char *format, ...) {
  va_list values;
  va_start(values, format);
  int length = vsnprintf(line + used, sizeof line - used, format, values);
  va_end(values);
  used += (size_t)length < sizeof line - used ? (size_t)length : sizeof line - used - 1;
}

void say_list(const char *name, const uint32_t *list, uint32_t count) {
  say(" %s=", name);
  for (uint32_t i = 0; i < count; i++) say("%s%u", i ? "," : "", list[i]);
}

static void write_line(void) {
  const char *path = getenv("NEURON_DOUBLE_LOG");
  FILE *file = path != NULL ? fopen(path, "a") : NULL;
  if (file != NULL) {
    fprintf(file, "%s\n", line);
    fclose(file);
  }
  used = 0;
}

int end(const char *function, int code) {
  static struct {
    const char *name;
    int calls;
  } counts[MAX_FUNCTIONS];
  const char *wanted = getenv("NEURON_DOUBLE_FAIL");
  size_t length = strlen(function), i = 0;
  while (i < MAX_FUNCTIONS - 1 && counts[i].name != NULL && counts[i].name != function) i++;
  counts[i].name = function;
  counts[i].calls++;
  if (wanted != NULL && strncmp(wanted, function, length) == 0 && wanted[length] == '=') {
    const char *only = strchr(wanted, '@');
    if (only == NULL || atoi(only + 1) == counts[i].calls) code = atoi(wanted + length + 1);
  }
  say(" -> %d", code);
  write_line();
  return code;
}

int next_number(int kind) {
  static int numbers[3];
  return ++numbers[kind];
}

uint32_t crc32(const uint8_t *data, size_t bytes) {
  static uint32_t table[256];
  for (uint32_t i = 0; table[255] == 0 && i < 256; i++) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (0xedb88320 & -(crc & 1));
    table[i] = crc;
  }
  uint32_t crc = 0xffffffff;
  for (size_t i = 0; i < bytes; i++) crc = crc >> 8 ^ table[(crc ^ data[i]) & 0xff];
  return ~crc;
}

void say_bytes(const void *data, size_t bytes) {
  say(" bytes=%zu crc=%08x", bytes, crc32(data, bytes));
  if (bytes > 64) return;
  say(" hex=");
  for (size_t i = 0; i < bytes; i++) say("%02x", ((const uint8_t *)data)[i]);
}

/* ---- Models ----------------------------------------------------------------------------------- */

size_t value_bytes(const operand *operand) {
  size_t bytes;
  switch (operand->type.type) {
    case NEURON_FLOAT32: case NEURON_INT32: case NEURON_UINT32: case NEURON_TENSOR_FLOAT32:
    case NEURON_TENSOR_INT32:
      bytes = 4;
      break;
    case NEURON_TENSOR_QUANT16_SYMM: case NEURON_TENSOR_FLOAT16:
      bytes = 2;
      break;
    case NEURON_BOOL: case NEURON_TENSOR_QUANT8_ASYMM: case NEURON_TENSOR_QUANT8_SYMM_PER_CHANNEL:
    case NEURON_TENSOR_QUANT8_SYMM: case NEURON_TENSOR_QUANT8_ASYMM_SIGNED:
    case NEURON_TENSOR_QUANT4_SYMM_PER_CHANNEL:
      bytes = 1;
      break;
    default:
      return 0;
  }
  for (uint32_t d = 0; d < operand->type.rank; d++) bytes *= operand->dims[d];
  return bytes;
}

bool values_stay(const neuron_model *model) {
  bool same = true;
  for (uint32_t i = 0; i < model->num_operands; i++) {
    const operand *operand = &model->operands[i];
    if (operand->value != NULL && crc32(operand->value, operand->bytes) != operand->crc) {
      say(" VALUE-CHANGED=%u", i);
      same = false;
    }
  }
  return same;
}

EXPORT int Neuron_getVersion(neuron_version *version) {
  const char *text = getenv("NEURON_DOUBLE_VERSION");
  unsigned major = 8, minor = 2, patch = 0;
  if (text != NULL) sscanf(text, "%u.%u.%u", &major, &minor, &patch);
  version->major = (uint8_t)major, version->minor = (uint8_t)minor, version->patch = (uint8_t)patch;
  say("Neuron_getVersion version=%u.%u.%u", major, minor, patch);
  return end(__func__, NEURON_OK);
}

EXPORT int Neuron_getL1MemorySizeKb(uint32_t *kib) {
  *kib = 512;
  say("Neuron_getL1MemorySizeKb");
  return end(__func__, NEURON_OK);
}

EXPORT int NeuronModel_create(neuron_model **model) {
  neuron_model *made = calloc(1, sizeof *made);
  if (made != NULL) made->id = next_number(A_MODEL);
  say("NeuronModel_create model=%d", made ? made->id : 0);
  int code = end(__func__, made ? NEURON_OK : NEURON_OUT_OF_MEMORY);
  if (code != NEURON_OK) free(made), made = NULL;
  *model = made;
  return code;
}

EXPORT void NeuronModel_free(neuron_model *model) {
  say("NeuronModel_free model=%d", model->id);
  end(__func__, 0);
  free(model);
}

EXPORT int NeuronModel_setName(neuron_model *model, const char *name) {
  say("NeuronModel_setName model=%d name=%s", model->id, name);
  return end(__func__, NEURON_OK);
}

EXPORT int NeuronModel_addOperand(neuron_model *model, const neuron_operand *type) {
  say("NeuronModel_addOperand model=%d index=%u type=%d", model->id, model->num_operands,
      type->type);
  say_list("dims", type->dims, type->rank);
  say(" scale=%.9g zero=%d", (double)type->scale, type->zero_point);
  int code = model->finished ? NEURON_BAD_STATE : NEURON_OK;
  if (model->num_operands == MAX_OPERANDS || type->rank > MAX_RANK) code = NEURON_BAD_DATA;
  code = end(__func__, code);
  if (code != NEURON_OK) return code;
  operand *operand = &model->operands[model->num_operands++];
  operand->type = *type;
  for (uint32_t d = 0; d < type->rank; d++) operand->dims[d] = type->dims[d];
  return code;
}

EXPORT int NeuronModel_setOperandValue(neuron_model *model, int32_t index, const void *value,
                                       size_t bytes) {
  say("NeuronModel_setOperandValue model=%d index=%d", model->id, index);
  if (index < 0 || (uint32_t)index >= model->num_operands || model->finished)
    return end(__func__, NEURON_BAD_DATA);
  operand *operand = &model->operands[index];
  say_bytes(value, bytes);
  size_t expected = value_bytes(operand);
  if (expected != 0 && expected != bytes) return end(__func__, NEURON_BAD_DATA);
  operand->has_value = true;
  if (bytes > NEURON_COPIED_BYTES) {
    operand->value = value;
    operand->bytes = bytes;
    operand->crc = crc32(value, bytes);
  }
  return end(__func__, NEURON_OK);
}

EXPORT int NeuronModel_setOperandSymmPerChannelQuantParams(neuron_model *model, int32_t index,
                                                           const neuron_channel_scales *scales) {
  say("NeuronModel_setOperandSymmPerChannelQuantParams model=%d index=%d dim=%u count=%u",
      model->id, index, scales->channel_dim, scales->count);
  if (index < 0 || (uint32_t)index >= model->num_operands || model->finished)
    return end(__func__, NEURON_BAD_DATA);
  operand *operand = &model->operands[index];
  say(" scales=");
  for (uint32_t i = 0; i < scales->count; i++)
    say("%s%.9g", i ? "," : "", (double)scales->scales[i]);
  bool fits = scales->channel_dim < operand->type.rank &&
              operand->dims[scales->channel_dim] == scales->count;
  operand->has_scales = true;
  return end(__func__, fits ? NEURON_OK : NEURON_BAD_DATA);
}

/* Whether a list of codes, "9,25", has this one. */
static bool lists(const char *variable, int32_t code) {
  const char *list = getenv(variable);
  for (; list != NULL && *list != '\0'; list = strchr(list, ',') ? strchr(list, ',') + 1 : NULL)
    if (atoi(list) == code) return true;
  return false;
}

EXPORT int NeuronModel_addOperation(neuron_model *model, int32_t operation, uint32_t num_inputs,
                                    const uint32_t *inputs, uint32_t num_outputs,
                                    const uint32_t *outputs) {
  say("NeuronModel_addOperation model=%d code=%d", model->id, operation);
  say_list("inputs", inputs, num_inputs);
  say_list("outputs", outputs, num_outputs);
  int code = model->finished || model->num_operations == MAX_OPERATIONS ? NEURON_BAD_STATE : 0;
  for (uint32_t i = 0; i < num_inputs; i++)
    if (inputs[i] >= model->num_operands) code = NEURON_BAD_DATA;
  for (uint32_t i = 0; i < num_outputs; i++)
    if (outputs[i] >= model->num_operands) code = NEURON_BAD_DATA;
  if (lists("NEURON_DOUBLE_REFUSE", operation)) code = NEURON_BAD_DATA;
  code = end(__func__, code);
  if (code == NEURON_OK) model->codes[model->num_operations++] = operation;
  if (code == NEURON_OK && operation == DLA_OPERATION) model->is_dla = true;
  return code;
}

EXPORT int NeuronModel_identifyInputsAndOutputs(neuron_model *model, uint32_t num_inputs,
                                                const uint32_t *inputs, uint32_t num_outputs,
                                                const uint32_t *outputs) {
  say("NeuronModel_identifyInputsAndOutputs model=%d", model->id);
  say_list("inputs", inputs, num_inputs);
  say_list("outputs", outputs, num_outputs);
  bool fits = num_inputs <= MAX_IO && num_outputs <= MAX_IO && !model->finished;
  for (uint32_t i = 0; fits && i < num_inputs; i++) {
    fits = inputs[i] < model->num_operands && !model->operands[inputs[i]].has_value;
    model->inputs[i] = inputs[i];
  }
  for (uint32_t i = 0; fits && i < num_outputs; i++) {
    fits = outputs[i] < model->num_operands;
    model->outputs[i] = outputs[i];
  }
  model->num_inputs = num_inputs, model->num_outputs = num_outputs;
  model->identified = fits;
  return end(__func__, fits ? NEURON_OK : NEURON_BAD_DATA);
}

EXPORT int NeuronModel_relaxComputationFloat32toFloat16(neuron_model *model, bool allow) {
  say("NeuronModel_relaxComputationFloat32toFloat16 model=%d allow=%d", model->id, allow);
  return end(__func__, NEURON_OK);
}

EXPORT int NeuronModel_finish(neuron_model *model) {
  say("NeuronModel_finish model=%d operands=%u operations=%u", model->id, model->num_operands,
      model->num_operations);
  int code = model->finished || !model->identified ? NEURON_BAD_STATE : NEURON_OK;
  for (uint32_t i = 0; i < model->num_operands; i++) {
    const operand *operand = &model->operands[i];
    int32_t type = operand->type.type;
    if (type == NEURON_TENSOR_QUANT8_SYMM_PER_CHANNEL && !operand->has_scales)
      code = NEURON_BAD_DATA;
  }
  if (!values_stay(model) || (model->is_dla && !read_dla(model))) code = NEURON_BAD_DATA;
  code = end(__func__, code);
  model->finished = code == NEURON_OK;
  return code;
}

int supported_of(const neuron_model *model, bool *supported, uint32_t count) {
  for (uint32_t i = 0; i < count && i < model->num_operations; i++)
    supported[i] = !lists("NEURON_DOUBLE_UNSUPPORTED", model->codes[i]);
  return model->finished && count == model->num_operations ? NEURON_OK : NEURON_BAD_STATE;
}

EXPORT int NeuronModel_getSupportedOperations(neuron_model *model, bool *supported,
                                              uint32_t count) {
  say("NeuronModel_getSupportedOperations model=%d count=%u", model->id, count);
  return end(__func__, supported_of(model, supported, count));
}
