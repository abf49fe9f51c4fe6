/* SPDX-License-Identifier: Apache-2.0
 *
 * neuron_execute.c: a step's call of a graph.
 */
#include "neuron_internal.h"

#include <stdio.h>

/* Keeps a message as a kernel's error and returns what a failed kernel returns. */
static int32_t report(const char *graph, const char *message) {
  const char *parts[] = {"execution-failed: ", graph, ": ", message};
  TVMFFIErrorSetRaisedFromCStrParts("neuron", parts, 4);
  return -1;
}

/* Whether the operand has the size and dtype of the graph's tensor. */
static bool fits(const DLTensor *operand, const llamac_neuron_place *place, uint64_t bytes) {
  if (operand->dtype.code != place->dtype_code || operand->dtype.bits != place->dtype_bits ||
      operand->dtype.lanes != 1)
    return false;
  uint64_t actual = operand->dtype.bits / 8;
  for (int32_t d = 0; d < operand->ndim; d++) actual *= (uint64_t)operand->shape[d];
  return actual == bytes;
}

/* Gives the operands to the execution; writes the reason into `message` if one is not taken. */
static bool bind(const neuron_adapter *api, llamac_neuron_opened *graph, const TVMFFIAny *args,
                 char *message, size_t capacity) {
  const llamac_neuron_graph *table = graph->table;
  for (uint32_t i = 0; i < table->num_inputs + table->num_outputs; i++) {
    const llamac_neuron_place *place = &graph->places[i];
    const llamac_neuron_tensor *tensor = &table->tensors[i];
    const DLTensor *operand = args[i].v_ptr;
    if (args[i].type_index != LLAMAC_FFI_DLTENSOR || !fits(operand, place, tensor->bytes)) {
      snprintf(message, capacity, "wrong size or dtype of %.48s", tensor->name);
      return false;
    }
    uint8_t *data = (uint8_t *)operand->data + operand->byte_offset;
    size_t bytes = (size_t)tensor->bytes;
    int32_t index = (int32_t)place->index;
    int code = i < table->num_inputs
                   ? api->execution_set_input(graph->execution, index, NULL, data, bytes)
                   : api->execution_set_output(graph->execution, index, NULL, data, bytes);
    if (code != NEURON_OK) {
      snprintf(message, capacity, "%.48s: code %d, %s", tensor->name, code,
               llamac_neuron_meaning(code));
      return false;
    }
  }
  return true;
}

int32_t llamac_neuron_call(llamac_neuron_graphs *graphs, uint32_t index, const TVMFFIAny *args,
                           int32_t num_args) {
  if (index >= graphs->count) return report("neuron", "no graph of that number");
  llamac_neuron_opened *graph = &graphs->graphs[index];
  const llamac_neuron_graph *table = graph->table;
  if (num_args < 0 || (uint32_t)num_args != table->num_inputs + table->num_outputs + 2)
    return report(table->name, "wrong number of operands");
  const neuron_adapter *api = &graphs->library.api;
  char message[128];
  pthread_mutex_lock(&graphs->mutex);
  bool bound = bind(api, graph, args, message, sizeof message);
  int code = bound ? api->execution_compute(graph->execution) : NEURON_OK;
  pthread_mutex_unlock(&graphs->mutex);
  if (bound && code == NEURON_OK) return 0;
  if (bound)
    snprintf(message, sizeof message, "compute: code %d, %s", code, llamac_neuron_meaning(code));
  return report(table->name, message);
}
