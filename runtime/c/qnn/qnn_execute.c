/* SPDX-License-Identifier: Apache-2.0
 *
 * qnn_execute.c: a step's call of a graph.
 */
#include "qnn_internal.h"

#include <stdio.h>

/* Keeps a message as a kernel's error and returns what a failed kernel returns. */
static int32_t report(const char *graph, const char *message) {
  const char *parts[] = {graph, ": ", message};
  TVMFFIErrorSetRaisedFromCStrParts("QnnError", parts, 3);
  return -1;
}

/* DLPack's kind of a dtype: 0 int, 1 uint, 2 float. */
static uint8_t kind_of(uint32_t dtype) {
  switch (dtype >> 8) {
    case QNN_INT32 >> 8: case QNN_SFIXED8 >> 8:
      return 0;
    case QNN_FLOAT32 >> 8:
      return 2;
    default:
      return 1;
  }
}

/* Whether the operand has the size and dtype of the graph's tensor. */
static bool fits(const DLTensor *operand, const qnn_tensor *tensor, uint64_t bytes) {
  uint32_t element = llamac_qnn_element_bytes(tensor->v1.dtype);
  if (operand->dtype.code != kind_of(tensor->v1.dtype) || operand->dtype.bits != 8 * element ||
      operand->dtype.lanes != 1)
    return false;
  uint64_t actual = element;
  for (int32_t d = 0; d < operand->ndim; d++) actual *= (uint64_t)operand->shape[d];
  return actual == bytes;
}

/* Points the graph's tensors to the operands; NULL, or the name of one that does not fit. */
static const char *bind(llamac_qnn_graph *graph, const TVMFFIAny *args) {
  for (uint32_t i = 0; i < llamac_qnn_operands(graph->table); i++) {
    qnn_tensor *tensor = &graph->tensors[i];
    const TVMFFIAny *arg = &args[graph->operands[i]];
    const llamac_graph_tensor *expected = &graph->table->tensors[graph->operands[i]];
    const DLTensor *operand = arg->v_ptr;
    if (arg->type_index != LLAMAC_FFI_DLTENSOR || !fits(operand, tensor, expected->bytes))
      return expected->name;
    tensor->v1.buffer.data = (uint8_t *)operand->data + operand->byte_offset;
    tensor->v1.buffer.bytes = (uint32_t)expected->bytes;
  }
  return NULL;
}

int32_t llamac_graph_call(llamac_graphs *graphs, uint32_t index, const TVMFFIAny *args,
                          int32_t num_args) {
  if (index >= graphs->count) return report("QNN", "no graph of that number");
  llamac_qnn_graph *graph = &graphs->graphs[index];
  const llamac_graph *table = graph->table;
  if (num_args < 0 || (uint32_t)num_args != llamac_qnn_operands(table) + 2)
    return report(table->name, "wrong number of operands");
  pthread_mutex_lock(&graphs->mutex);
  const char *wrong = bind(graph, args);
  qnn_code code = 0;
  if (wrong == NULL)
    code = graphs->library.htp->graph_execute(graph->graph, graph->tensors, table->num_inputs,
                                              graph->tensors + table->num_inputs,
                                              table->num_outputs, NULL, NULL);
  pthread_mutex_unlock(&graphs->mutex);
  char message[96];
  if (wrong != NULL) {
    snprintf(message, sizeof message, "wrong size or dtype of %.48s", wrong);
    return report(table->name, message);
  }
  if (code == 0) return 0;
  snprintf(message, sizeof message, "graphExecute: 0x%llx, %s", (unsigned long long)code,
           llamac_qnn_meaning(code));
  return report(table->name, message);
}
