/* A RECORDING TEST DOUBLE of MediaTek's Neuron Adapter: compilations and executions.
 *
 * A "compiled network" of this double is a text that says that it is none, and the sizes of inputs
 * and outputs. compute() computes nothing: it fills output i with the byte 0xa0 + i, so that tests
 * see which buffer it was given.
 */
#include "adapter_double.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NOT_COMPILED "NOT A COMPILED NETWORK: a recording test double made this."

/* ---- Compilations ------------------------------------------------------------------------------ */

static int compile(const char *function, neuron_model *model, neuron_compilation **compilation) {
  neuron_compilation *made = calloc(1, sizeof *made);
  int code = made == NULL ? NEURON_OUT_OF_MEMORY : model->finished ? NEURON_OK : NEURON_BAD_STATE;
  if (made != NULL) made->id = next_number(A_COMPILATION), made->model = model;
  say(" compilation=%d", made ? made->id : 0);
  code = end(function, code);
  if (code != NEURON_OK) free(made), made = NULL;
  *compilation = made;
  return code;
}

EXPORT int NeuronCompilation_create(neuron_model *model, neuron_compilation **compilation) {
  say("NeuronCompilation_create model=%d", model->id);
  return compile(__func__, model, compilation);
}

EXPORT int NeuronCompilation_createWithOptions(neuron_model *model,
                                               neuron_compilation **compilation,
                                               const char *options) {
  say("NeuronCompilation_createWithOptions model=%d options=[%s]", model->id, options);
  return compile(__func__, model, compilation);
}

EXPORT void NeuronCompilation_free(neuron_compilation *compilation) {
  say("NeuronCompilation_free compilation=%d model=%d", compilation->id, compilation->model->id);
  end(__func__, 0);
  free(compilation);
}

/* A setting of a compilation that is not finished. */
static int set(const char *function, const neuron_compilation *compilation, const char *value) {
  say("%s compilation=%d value=[%s]", function, compilation->id, value);
  return end(function, compilation->finished ? NEURON_BAD_STATE : NEURON_OK);
}

static int set_number(const char *function, const neuron_compilation *compilation, int64_t value) {
  char text[24];
  snprintf(text, sizeof text, "%lld", (long long)value);
  return set(function, compilation, text);
}

EXPORT int NeuronCompilation_setPreference(neuron_compilation *compilation, int32_t value) {
  return set_number(__func__, compilation, value);
}
EXPORT int NeuronCompilation_setPriority(neuron_compilation *compilation, int32_t value) {
  return set_number(__func__, compilation, value);
}
EXPORT int NeuronCompilation_setOptimizationHint(neuron_compilation *compilation, uint32_t value) {
  return set_number(__func__, compilation, value);
}
EXPORT int NeuronCompilation_setL1MemorySizeKb(neuron_compilation *compilation, uint32_t value) {
  return set_number(__func__, compilation, value);
}
EXPORT int NeuronCompilation_setOptimizationString(neuron_compilation *compilation,
                                                   const char *value) {
  return set(__func__, compilation, value);
}

EXPORT int NeuronCompilation_getSupportedOperations(neuron_compilation *compilation,
                                                    uint32_t count, bool *supported) {
  say("NeuronCompilation_getSupportedOperations compilation=%d count=%u", compilation->id, count);
  return end(__func__, supported_of(compilation->model, supported, count));
}

EXPORT int NeuronCompilation_finish(neuron_compilation *compilation) {
  say("NeuronCompilation_finish compilation=%d", compilation->id);
  bool stay = values_stay(compilation->model);
  int code = end(__func__, compilation->finished || !stay ? NEURON_BAD_STATE : NEURON_OK);
  compilation->finished = code == NEURON_OK;
  return code;
}

/* The text that stands for a compiled network. */
static int describe(const neuron_model *model, char *text, size_t capacity) {
  int length = snprintf(text, capacity, NOT_COMPILED " %u %u", model->num_inputs,
                        model->num_outputs);
  const uint32_t sides[] = {model->num_inputs, model->num_outputs};
  for (int side = 0; side < 2; side++)
    for (uint32_t i = 0; i < sides[side]; i++) {
      uint32_t index = side == 0 ? model->inputs[i] : model->outputs[i];
      length += snprintf(text + length, capacity - (size_t)length, " %zu",
                         value_bytes(&model->operands[index]));
    }
  return length + 1;
}

EXPORT int NeuronCompilation_getCompiledNetworkSize(neuron_compilation *compilation,
                                                    size_t *bytes) {
  char text[4096];
  *bytes = (size_t)describe(compilation->model, text, sizeof text);
  say("NeuronCompilation_getCompiledNetworkSize compilation=%d bytes=%zu", compilation->id, *bytes);
  return end(__func__, compilation->finished ? NEURON_OK : NEURON_BAD_STATE);
}

EXPORT int NeuronCompilation_storeCompiledNetwork(neuron_compilation *compilation, void *network,
                                                  size_t bytes) {
  char text[4096];
  size_t expected = (size_t)describe(compilation->model, text, sizeof text);
  say("NeuronCompilation_storeCompiledNetwork compilation=%d bytes=%zu", compilation->id, bytes);
  if (!compilation->finished || bytes != expected) return end(__func__, NEURON_BAD_DATA);
  memcpy(network, text, bytes);
  return end(__func__, NEURON_OK);
}

/* Fills in the inputs and outputs of what describe() wrote. */
static bool parse(neuron_model *model, const char *text, size_t bytes) {
  uint32_t sizes[2 * MAX_IO], counts[2];
  if (!read_sizes(NOT_COMPILED, text, bytes, counts, sizes)) return false;
  model->num_inputs = counts[0], model->num_outputs = counts[1];
  model->num_operands = counts[0] + counts[1];
  for (uint32_t i = 0; i < model->num_operands; i++) {
    set_size(&model->operands[i], sizes[i]);
    *(i < counts[0] ? &model->inputs[i] : &model->outputs[i - counts[0]]) = i;
  }
  return true;
}

EXPORT int NeuronModel_restoreFromCompiledNetwork(neuron_model **model,
                                                  neuron_compilation **compilation,
                                                  const void *network, size_t bytes) {
  *model = calloc(1, sizeof **model);
  *compilation = calloc(1, sizeof **compilation);
  if (*model == NULL || *compilation == NULL) abort();
  (*model)->id = next_number(A_MODEL), (*model)->identified = (*model)->finished = true;
  (*compilation)->id = next_number(A_COMPILATION), (*compilation)->finished = true;
  (*compilation)->model = *model;
  say("NeuronModel_restoreFromCompiledNetwork model=%d compilation=%d", (*model)->id,
      (*compilation)->id);
  say_bytes(network, bytes);
  int code = end(__func__, parse(*model, network, bytes) ? NEURON_OK : NEURON_BAD_DATA);
  if (code == NEURON_OK) { /* looked at again in each call: must stay where it is */
    (*model)->operands[0].value = network;
    (*model)->operands[0].bytes = bytes;
    (*model)->operands[0].crc = crc32(network, bytes);
    return code;
  }
  free(*compilation), free(*model);
  *compilation = NULL, *model = NULL;
  return code;
}

/* ---- Executions -------------------------------------------------------------------------------- */

EXPORT int NeuronExecution_create(neuron_compilation *compilation, neuron_execution **execution) {
  neuron_execution *made = calloc(1, sizeof *made);
  if (made == NULL) abort();
  made->id = next_number(AN_EXECUTION), made->compilation = compilation;
  say("NeuronExecution_create compilation=%d execution=%d", compilation->id, made->id);
  int code = end(__func__, compilation->finished ? NEURON_OK : NEURON_BAD_STATE);
  if (code != NEURON_OK) free(made), made = NULL;
  *execution = made;
  return code;
}

EXPORT void NeuronExecution_free(neuron_execution *execution) {
  say("NeuronExecution_free execution=%d compilation=%d", execution->id,
      execution->compilation->id);
  end(__func__, 0);
  free(execution);
}

/* Whether a buffer of that size is what the model has at this place. */
static bool fits(const neuron_execution *execution, int side, int32_t index, size_t bytes) {
  const neuron_model *model = execution->compilation->model;
  if (index < 0 || (uint32_t)index >= (side == 0 ? model->num_inputs : model->num_outputs))
    return false;
  uint32_t place = side == 0 ? model->inputs[index] : model->outputs[index];
  return value_bytes(&model->operands[place]) == bytes;
}

EXPORT int NeuronExecution_setInput(neuron_execution *execution, int32_t index,
                                    const neuron_operand *type, const void *data, size_t bytes) {
  say("NeuronExecution_setInput execution=%d index=%d type=%s", execution->id, index,
      type == NULL ? "NULL" : "given");
  say_bytes(data, bytes);
  int code = end(__func__, fits(execution, 0, index, bytes) ? NEURON_OK : NEURON_BAD_DATA);
  if (code != NEURON_OK) return code;
  execution->inputs[index] = data, execution->bytes[0][index] = bytes;
  return code;
}

EXPORT int NeuronExecution_setOutput(neuron_execution *execution, int32_t index,
                                     const neuron_operand *type, void *data, size_t bytes) {
  say("NeuronExecution_setOutput execution=%d index=%d type=%s bytes=%zu", execution->id, index,
      type == NULL ? "NULL" : "given", bytes);
  int code = end(__func__, fits(execution, 1, index, bytes) ? NEURON_OK : NEURON_BAD_DATA);
  if (code != NEURON_OK) return code;
  execution->outputs[index] = data, execution->bytes[1][index] = bytes;
  return code;
}

EXPORT int NeuronExecution_compute(neuron_execution *execution) {
  const neuron_model *model = execution->compilation->model;
  say("NeuronExecution_compute execution=%d", execution->id);
  bool ready = values_stay(model);
  for (uint32_t i = 0; i < model->num_inputs; i++) ready = ready && execution->inputs[i] != NULL;
  for (uint32_t i = 0; i < model->num_outputs; i++) ready = ready && execution->outputs[i] != NULL;
  int code = end(__func__, ready ? NEURON_OK : NEURON_BAD_STATE);
  for (uint32_t i = 0; code == NEURON_OK && i < model->num_outputs; i++)
    memset(execution->outputs[i], (int)(0xa0 + i), execution->bytes[1][i]);
  return code;
}
