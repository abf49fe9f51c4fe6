/* SPDX-License-Identifier: Apache-2.0
 *
 * neuron_dla.c: a graph that MediaTek's compiler has compiled on a computer (a DLA).
 *
 * An adapter takes it in one of two ways, and nothing is published about which version takes which.
 * The first is the function that restores what the adapter itself had stored. The second is a model
 * of one operation, of MediaTek's extension "com.mediatek.compiled_network": its last input is the
 * DLA, all other inputs and the outputs stand for those of the graph. Source of the second, of its
 * codes and of the operands that only stand for others: LiteRT's dispatch library for MediaTek.
 */
#include "neuron_internal.h"

#include <stdlib.h>

static const char EXTENSION[] = "com.mediatek.compiled_network";

/* The operand's code of version 8 and newer; no network is for an older one. */
enum { RESTORE = 0, NETWORK_OPERAND = 0x0200 };

/* Adds operands that stand for the graph's inputs or outputs; their numbers follow each other. */
static int add_stand_ins(const neuron_adapter *api, neuron_model *model, uint32_t count) {
  const neuron_operand any = {.type = NEURON_TENSOR_FLOAT32};
  int code = NEURON_OK;
  for (uint32_t i = 0; i < count && code == NEURON_OK; i++) code = api->model_add_operand(model, &any);
  return code;
}

/* Adds the operand that is the DLA. */
static int add_network(const neuron_adapter *api, neuron_model *model, uint32_t index,
                       const void *dla, uint64_t bytes) {
  neuron_operand operand = {0};
  int code = api->model_extension_operand(model, EXTENSION, NETWORK_OPERAND, &operand.type);
  if (code == NEURON_OK) code = api->model_add_operand(model, &operand);
  if (code != NEURON_OK) return code;
  return api->model_set_operand_value(model, (int32_t)index, dla, (size_t)bytes);
}

/* Describes the model of one operation; `operands` has room for all numbers. */
static int describe(const neuron_adapter *api, const llamac_neuron_graph *graph,
                    neuron_model *model, const void *dla, uint32_t *operands) {
  uint32_t inputs = graph->num_inputs, outputs = graph->num_outputs;
  for (uint32_t i = 0; i < inputs + 1 + outputs; i++) operands[i] = i;
  int32_t operation = 0;
  int code = add_stand_ins(api, model, inputs);
  if (code == NEURON_OK) code = add_network(api, model, inputs, dla, graph->dla->bytes);
  if (code == NEURON_OK) code = add_stand_ins(api, model, outputs);
  if (code == NEURON_OK) code = api->model_extension_operation(model, EXTENSION, RESTORE, &operation);
  const uint32_t *results = operands + inputs + 1;
  if (code == NEURON_OK)
    code = api->model_add_operation(model, operation, inputs + 1, operands, outputs, results);
  /* The DLA has a value: it is an input of the operation, and none of the model. */
  if (code == NEURON_OK) code = api->model_identify(model, inputs, operands, outputs, results);
  return code == NEURON_OK ? api->model_finish(model) : code;
}

/* The second way. */
static int build(const llamac_neuron_library *library, const llamac_neuron_graph *graph,
                 llamac_neuron_built *built, const void *dla) {
  const neuron_adapter *api = &library->api;
  if (api->model_extension_operand == NULL || api->model_extension_operation == NULL)
    return NEURON_BAD_VERSION;
  uint32_t *operands = calloc(graph->num_inputs + 1 + graph->num_outputs, sizeof *operands);
  if (operands == NULL) return NEURON_OUT_OF_MEMORY;
  int code = api->model_create(&built->model);
  if (code != NEURON_OK) built->model = NULL;
  if (code == NEURON_OK) code = describe(api, graph, built->model, dla, operands);
  free(operands);
  const char *function;
  return code == NEURON_OK ? llamac_neuron_compile(library, built, "", &function) : code;
}

llamac_status llamac_neuron_dla_open(const llamac_neuron_library *library,
                                     const llamac_neuron_graph *graph, const char *folder,
                                     llamac_neuron_built *built, int *refusal,
                                     llamac_error *error) {
  void *dla = NULL;
  llamac_status status =
      llamac_neuron_map(folder, graph->dla->file, graph->dla->bytes, &dla, error);
  if (status != LLAMAC_OK) return status;
  *refusal = library->api.model_restore(&built->model, &built->compilation, dla,
                                        (size_t)graph->dla->bytes);
  if (*refusal != NEURON_OK) {
    built->model = NULL, built->compilation = NULL;
    *refusal = build(library, graph, built, dla);
  }
  /* Nothing is published about how long the adapter reads it. */
  built->mapped = dla, built->mapped_bytes = graph->dla->bytes;
  if (*refusal != NEURON_OK) llamac_neuron_free(library, built);
  return LLAMAC_OK;
}
