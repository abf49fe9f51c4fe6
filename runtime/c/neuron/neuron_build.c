/* SPDX-License-Identifier: Apache-2.0
 *
 * neuron_build.c: a network becomes a model of the adapter, and the adapter compiles it.
 */
#include "neuron_internal.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* A model while it is built. */
typedef struct {
  const llamac_neuron_library *library;
  const llamac_network *network;
  const char *graph; /* for messages */
  llamac_neuron_built *built;
  llamac_error *error;
} builder;

static llamac_status refused(const builder *builder, int code, const char *what, uint32_t index,
                             const char *name) {
  return llamac_neuron_fail(builder->error, "model-refused", code, "%s %u '%.60s' of %.40s", what,
                            index, name, builder->graph);
}

/* ---- Operands --------------------------------------------------------------------------------- */

/* The type that this version of the adapter has for an operand. */
static int32_t known_type(const llamac_neuron_library *library, int32_t type) {
  if (library->version.major >= NEURON_FIRST_MAJOR_WITH_QUANT4) return type;
  if (type == NEURON_TENSOR_QUANT4_SYMM_PER_CHANNEL) return NEURON_TENSOR_QUANT8_SYMM_PER_CHANNEL;
  /* Older ones derive the scales of a bias from those of the input and of the weights. */
  if (type == NEURON_TENSOR_INT32_SYMM_PER_CHANNEL) return NEURON_TENSOR_INT32;
  return type;
}

/* One byte for each code of four bits; NULL: no memory. */
static const uint8_t *widen(llamac_neuron_built *built, const uint8_t *packed, uint64_t elements) {
  uint8_t *codes = malloc((size_t)elements);
  if (codes == NULL) return NULL;
  built->widened[built->num_widened++] = codes;
  for (uint64_t i = 0; i < elements; i++) {
    uint8_t code = packed[i / 2] >> (i % 2 ? 4 : 0) & 15;
    codes[i] = (uint8_t)((code ^ 8) - 8); /* the sign */
  }
  return codes;
}

static llamac_status set_value(const builder *builder, uint32_t index,
                               const llamac_network_operand *operand) {
  const llamac_network *network = builder->network;
  const char *name = network->names + operand->name;
  const uint8_t *value =
      (const uint8_t *)network->data + network->header->data_offset + operand->offset;
  uint64_t bytes = operand->bytes;
  if (operand->type == NEURON_TENSOR_QUANT4_SYMM_PER_CHANNEL) {
    bytes = llamac_network_elements(network, operand);
    value = widen(builder->built, value, bytes);
    if (value == NULL)
      return llamac_fail(builder->error, LLAMAC_ERROR_MEMORY,
                         "neuron out-of-memory: %llu bytes for '%.80s'", (unsigned long long)bytes,
                         name);
  }
  int code = builder->library->api.model_set_operand_value(builder->built->model, (int32_t)index,
                                                           value, (size_t)bytes);
  return code == NEURON_OK ? LLAMAC_OK : refused(builder, code, "values of operand", index, name);
}

static llamac_status add_operand(const builder *builder, uint32_t index) {
  const llamac_network *network = builder->network;
  const neuron_adapter *api = &builder->library->api;
  const llamac_network_operand *from = &network->operands[index];
  const char *name = network->names + from->name;
  neuron_operand operand = {.type = known_type(builder->library, from->type),
                            .rank = from->rank,
                            .dims = from->rank ? network->words + from->first_dim : NULL,
                            .scale = from->scale,
                            .zero_point = from->zero_point};
  int code = api->model_add_operand(builder->built->model, &operand);
  if (code != NEURON_OK) return refused(builder, code, "operand", index, name);
  if (from->num_scales != 0 && operand.type != NEURON_TENSOR_INT32) {
    neuron_channel_scales scales = {from->channel_dim, from->num_scales,
                                    network->scales + from->first_scale};
    code = api->model_set_channel_scales(builder->built->model, (int32_t)index, &scales);
    if (code != NEURON_OK) return refused(builder, code, "scales of operand", index, name);
  }
  return from->kind == LLAMAC_OPERAND_CONSTANT ? set_value(builder, index, from) : LLAMAC_OK;
}

/* ---- The model -------------------------------------------------------------------------------- */

static llamac_status add_operation(const builder *builder, uint32_t index) {
  const llamac_network *network = builder->network;
  const llamac_network_operation *operation = &network->operations[index];
  const uint32_t *operands = network->words + operation->first_operand;
  int code = builder->library->api.model_add_operation(
      builder->built->model, operation->code, operation->num_inputs, operands,
      operation->num_outputs, operands + operation->num_inputs);
  if (code == NEURON_OK) return LLAMAC_OK;
  return llamac_neuron_fail(builder->error, "operation-refused", code, "%.80s (%d) of %.40s",
                            network->names + operation->name, operation->code, builder->graph);
}

static llamac_status build_model(const builder *builder) {
  const llamac_network *network = builder->network;
  const llamac_network_header *header = network->header;
  const neuron_adapter *api = &builder->library->api;
  int code = api->model_create(&builder->built->model);
  if (code != NEURON_OK) {
    builder->built->model = NULL;
    return llamac_neuron_fail(builder->error, "model-refused", code, "NeuronModel_create");
  }
  llamac_status status = LLAMAC_OK;
  for (uint32_t i = 0; i < header->num_operands && status == LLAMAC_OK; i++)
    status = add_operand(builder, i);
  for (uint32_t i = 0; i < header->num_operations && status == LLAMAC_OK; i++)
    status = add_operation(builder, i);
  if (status != LLAMAC_OK) return status;
  const uint32_t *inputs = network->words + header->first_input;
  code = api->model_identify(builder->built->model, header->num_inputs, inputs,
                             header->num_outputs, inputs + header->num_inputs);
  if (code != NEURON_OK) return refused(builder, code, "inputs and outputs:", header->num_inputs, "");
  code = api->model_relax(builder->built->model, true);
  if (code == NEURON_OK) code = api->model_finish(builder->built->model);
  if (code == NEURON_OK) return LLAMAC_OK;
  return refused(builder, code, "the whole, operations:", header->num_operations, "");
}

/* ---- Compiling -------------------------------------------------------------------------------- */

/* Asks which operations the APU takes. False: the adapter does not say. */
static bool ask(const builder *builder, bool *supported) {
  const neuron_adapter *api = &builder->library->api;
  uint32_t count = builder->network->header->num_operations;
  neuron_model *model = builder->built->model;
  if (api->model_supported != NULL && api->model_supported(model, supported, count) == NEURON_OK)
    return true;
  neuron_compilation *compilation = NULL;
  if (api->compilation_supported == NULL ||
      api->compilation_create(model, &compilation) != NEURON_OK)
    return false;
  int code = api->compilation_supported(compilation, count, supported);
  api->compilation_free(compilation);
  return code == NEURON_OK;
}

/* Fails for the first operation that the APU does not take: the adapter would run it elsewhere, or
 * fail without a name. An adapter that does not say is left to its compiler. */
static llamac_status check_operations(const builder *builder) {
  const llamac_network *network = builder->network;
  uint32_t count = network->header->num_operations;
  bool *supported = malloc((count ? count : 1) * sizeof *supported);
  if (supported == NULL)
    return llamac_fail(builder->error, LLAMAC_ERROR_MEMORY, "neuron out-of-memory: %u flags", count);
  for (uint32_t i = 0; i < count; i++) supported[i] = true;
  llamac_status status = LLAMAC_OK;
  if (ask(builder, supported))
    for (uint32_t i = 0; i < count && status == LLAMAC_OK; i++)
      if (!supported[i])
        status = llamac_fail(builder->error, LLAMAC_ERROR_ACCELERATOR,
                             "neuron operation-refused: %.80s (%d) of %.40s: the APU does not "
                             "support it",
                             network->names + network->operations[i].name,
                             network->operations[i].code, builder->graph);
  free(supported);
  return status;
}

int llamac_neuron_compile(const llamac_neuron_library *library, llamac_neuron_built *built,
                          const char *options, const char **function) {
  const neuron_adapter *api = &library->api;
  *function = "NeuronCompilation_create";
  int code = api->compilation_create(built->model, &built->compilation);
  if (code != NEURON_OK) {
    built->compilation = NULL;
    return code;
  }
  *function = "setPriority";
  code = api->compilation_set_priority(built->compilation, NEURON_PRIORITY_HIGH);
  if (code == NEURON_OK) {
    *function = "setPreference";
    code = api->compilation_set_preference(built->compilation, NEURON_PREFER_SUSTAINED_SPEED);
  }
  if (code == NEURON_OK && *options != '\0') {
    *function = "setOptimizationString";
    code = api->compilation_set_options(built->compilation, options);
  }
  if (code == NEURON_OK) {
    *function = "NeuronCompilation_finish";
    code = api->compilation_finish(built->compilation);
  }
  return code;
}

static llamac_status compile(const builder *builder) {
  const char *options = builder->network->names + builder->network->header->options, *function;
  int code = llamac_neuron_compile(builder->library, builder->built, options, &function);
  if (code == NEURON_OK) return LLAMAC_OK;
  return llamac_neuron_fail(builder->error, "compilation-failed", code, "%s of %.60s", function,
                            builder->graph);
}

llamac_status llamac_neuron_build(const llamac_neuron_library *library,
                                  const llamac_network *network, const char *graph,
                                  llamac_neuron_built *built, llamac_error *error) {
  builder builder = {library, network, graph, built, error};
  uint32_t count = network->header->num_operands;
  built->widened = calloc(count ? count : 1, sizeof *built->widened);
  if (built->widened == NULL)
    return llamac_fail(error, LLAMAC_ERROR_MEMORY, "neuron out-of-memory: graph %.60s", graph);
  llamac_status status = build_model(&builder);
  if (status == LLAMAC_OK) status = check_operations(&builder);
  return status == LLAMAC_OK ? compile(&builder) : status;
}

void llamac_neuron_free(const llamac_neuron_library *library, llamac_neuron_built *built) {
  if (built->compilation != NULL) library->api.compilation_free(built->compilation);
  if (built->model != NULL) library->api.model_free(built->model);
  /* Last: the model points to them. */
  for (uint32_t i = 0; i < built->num_widened; i++) free(built->widened[i]);
  free(built->widened);
  if (built->mapped != NULL) munmap(built->mapped, (size_t)built->mapped_bytes);
  memset(built, 0, sizeof *built);
}
