/* SPDX-License-Identifier: Apache-2.0
 *
 * neuron.c: opening and closing the graphs of a bundle.
 */
#include "neuron_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- Comparing with the tables ---------------------------------------------------------------- */

/* DLPack's dtype of an operand's elements. */
static void describe(const llamac_network_operand *operand, llamac_neuron_place *place) {
  place->dtype_bits = (uint8_t)llamac_network_bits(operand->type);
  switch (operand->type) {
    case NEURON_TENSOR_FLOAT32: case NEURON_TENSOR_FLOAT16:
      place->dtype_code = 2;
      break;
    case NEURON_TENSOR_QUANT8_ASYMM:
      place->dtype_code = 1;
      break;
    default:
      place->dtype_code = 0;
  }
}

/* Finds the inputs or outputs of the table among those of the network. */
static llamac_status find_side(llamac_neuron_opened *graph, bool inputs, llamac_error *error) {
  const llamac_neuron_graph *table = graph->table;
  const llamac_network *network = &graph->network;
  const char *side = inputs ? "inputs" : "outputs";
  uint32_t count = inputs ? network->header->num_inputs : network->header->num_outputs;
  uint32_t expected = inputs ? table->num_inputs : table->num_outputs;
  const uint32_t *operands =
      network->words + network->header->first_input + (inputs ? 0 : network->header->num_inputs);
  if (count != expected)
    return llamac_fail(error, LLAMAC_ERROR_ACCELERATOR,
                       "neuron network-invalid: %.80s has %u %s, not %u: it is of another build",
                       table->file, count, side, expected);
  for (uint32_t i = 0; i < count; i++) {
    uint32_t place = inputs ? i : table->num_inputs + i;
    const llamac_neuron_tensor *tensor = &table->tensors[place];
    uint32_t index = 0;
    while (index < count &&
           strcmp(network->names + network->operands[operands[index]].name, tensor->name) != 0)
      index++;
    if (index == count)
      return llamac_fail(error, LLAMAC_ERROR_ACCELERATOR,
                         "neuron network-invalid: %.80s has no %.60s among its %s: it is of another "
                         "build",
                         table->file, tensor->name, side);
    const llamac_network_operand *operand = &network->operands[operands[index]];
    graph->places[place].index = index;
    describe(operand, &graph->places[place]);
    uint64_t bytes = llamac_network_elements(network, operand) * graph->places[place].dtype_bits / 8;
    if (bytes != tensor->bytes)
      return llamac_fail(error, LLAMAC_ERROR_ACCELERATOR,
                         "neuron network-invalid: %.60s of %.80s has %llu bytes, not %llu: it is of "
                         "another build",
                         tensor->name, table->file, (unsigned long long)bytes,
                         (unsigned long long)tensor->bytes);
  }
  return LLAMAC_OK;
}

/* ---- Opening ---------------------------------------------------------------------------------- */

/* Restores the compilation, or builds it and keeps it. */
static llamac_status compile(const llamac_neuron_library *library, llamac_neuron_opened *graph,
                             const char *cache_folder, llamac_error *error) {
  llamac_neuron_cache cache;
  llamac_neuron_cache_find(&cache, cache_folder, graph->table->soc, &graph->network,
                           library->version);
  if (llamac_neuron_cache_restore(&cache, library, &graph->built)) {
    snprintf(graph->origin, sizeof graph->origin, "restored");
    llamac_network_close(&graph->network);
    return LLAMAC_OK;
  }
  llamac_status status = llamac_network_verify(&graph->network, graph->table->file, error);
  if (status == LLAMAC_OK)
    status = llamac_neuron_build(library, &graph->network, graph->table->name, &graph->built,
                                 error);
  if (status == LLAMAC_OK)
    llamac_neuron_cache_store(&cache, library, &graph->built, graph->origin,
                              sizeof graph->origin);
  return status;
}

/* Takes the DLA if there is one and the adapter takes it, else the network. */
static llamac_status load(const llamac_neuron_library *library, llamac_neuron_opened *graph,
                          const char *folder, const char *cache, llamac_error *error) {
  if (graph->table->dla == NULL) return compile(library, graph, cache, error);
  int refusal = NEURON_OK;
  llamac_status status =
      llamac_neuron_dla_open(library, graph->table, folder, &graph->built, &refusal, error);
  if (status != LLAMAC_OK) return status;
  if (refusal == NEURON_OK) {
    snprintf(graph->origin, sizeof graph->origin, "the bundle's DLA");
    llamac_network_close(&graph->network);
    return LLAMAC_OK;
  }
  status = compile(library, graph, cache, error);
  size_t used = strlen(graph->origin);
  snprintf(graph->origin + used, sizeof graph->origin - used, "; the DLA was refused: code %d, %s",
           refusal, llamac_neuron_meaning(refusal));
  return status;
}

static llamac_status open_graph(llamac_neuron_graphs *graphs, llamac_neuron_opened *graph,
                                const char *folder, const char *cache, llamac_error *error) {
  const llamac_neuron_graph *table = graph->table;
  const neuron_version *version = &graphs->library.version;
  graph->places = calloc(table->num_inputs + table->num_outputs + 1, sizeof *graph->places);
  if (graph->places == NULL)
    return llamac_fail(error, LLAMAC_ERROR_MEMORY, "neuron out-of-memory: graph %.60s",
                       table->name);
  llamac_status status = llamac_network_open(table, folder, &graph->network, error);
  if (status == LLAMAC_OK) status = find_side(graph, true, error);
  if (status == LLAMAC_OK) status = find_side(graph, false, error);
  if (status != LLAMAC_OK) return status;
  if (version->major < graph->network.header->min_major)
    return llamac_fail(error, LLAMAC_ERROR_ACCELERATOR,
                       "neuron adapter-too-old: it has version %u.%u.%u, %.80s needs %u: use a "
                       "bundle for an older SoC",
                       version->major, version->minor, version->patch, table->file,
                       graph->network.header->min_major);
  status = load(&graphs->library, graph, folder, cache, error);
  if (status != LLAMAC_OK) return status;
  int code = graphs->library.api.execution_create(graph->built.compilation, &graph->execution);
  if (code == NEURON_OK) return LLAMAC_OK;
  graph->execution = NULL;
  return llamac_neuron_fail(error, "execution-failed", code, "NeuronExecution_create of %.60s",
                            table->name);
}

llamac_status llamac_neuron_open(const llamac_neuron_graph *tables, uint32_t count,
                                 const char *folder, const char *cache,
                                 llamac_neuron_graphs **out, llamac_error *error) {
  *out = NULL;
  llamac_neuron_graphs *graphs = calloc(1, sizeof *graphs);
  if (graphs == NULL)
    return llamac_fail(error, LLAMAC_ERROR_MEMORY, "neuron out-of-memory: the graphs");
  pthread_mutex_init(&graphs->mutex, NULL);
  graphs->graphs = calloc(count ? count : 1, sizeof *graphs->graphs);
  graphs->count = graphs->graphs != NULL ? count : 0;
  for (uint32_t i = 0; i < graphs->count; i++) graphs->graphs[i].table = &tables[i];
  llamac_status status =
      graphs->graphs != NULL
          ? llamac_neuron_library_open(&graphs->library, error)
          : llamac_fail(error, LLAMAC_ERROR_MEMORY, "neuron out-of-memory: the graphs");
  for (uint32_t i = 0; i < graphs->count && status == LLAMAC_OK; i++)
    status = open_graph(graphs, &graphs->graphs[i], folder, cache, error);
  if (status != LLAMAC_OK) {
    llamac_neuron_close(graphs);
    return status;
  }
  *out = graphs;
  return LLAMAC_OK;
}

const char *llamac_neuron_origin(const llamac_neuron_graphs *graphs, uint32_t index) {
  return index < graphs->count ? graphs->graphs[index].origin : "";
}

void llamac_neuron_close(llamac_neuron_graphs *graphs) {
  if (graphs == NULL) return;
  for (uint32_t i = graphs->count; i > 0; i--) {
    llamac_neuron_opened *graph = &graphs->graphs[i - 1];
    if (graph->execution != NULL) graphs->library.api.execution_free(graph->execution);
    llamac_neuron_free(&graphs->library, &graph->built);
    llamac_network_close(&graph->network);
    free(graph->places);
  }
  pthread_mutex_destroy(&graphs->mutex);
  free(graphs->graphs);
  free(graphs);
}
