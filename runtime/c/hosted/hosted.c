/* SPDX-License-Identifier: Apache-2.0
 *
 * hosted.c: handing graphs to the process that has loaded the library.
 */
#include "hosted.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "../internal.h"

enum { MESSAGE_BYTES = 192 };

/* What a process has set. */
typedef struct {
  llamac_hosted_open_fn open;
  llamac_hosted_call_fn call;
  llamac_hosted_close_fn close;
  void *self;
} functions;

/* An opened graph. */
typedef struct {
  const llamac_hosted_graph *table;
  void *handle;
  llamac_hosted_operand *operands; /* [num_inputs + num_outputs], of the running call */
  pthread_mutex_t mutex;           /* of the operands */
} hosted_graph;

struct llamac_hosted_graphs {
  functions host;
  hosted_graph *graphs;
  uint32_t count; /* of those that are open */
};

static functions current;

LLAMAC_API void llamac_hosted_graphs_set(llamac_hosted_open_fn open, llamac_hosted_call_fn call,
                                         llamac_hosted_close_fn close, void *self) {
  current = (functions){open, call, close, self};
}

/* ---- Opening ---------------------------------------------------------------------------------- */

static llamac_status open_graph(const functions *host, const llamac_hosted_graph *table,
                                const char *folder, hosted_graph *graph, llamac_error *error) {
  char message[MESSAGE_BYTES] = "";
  uint32_t count = table->num_inputs + table->num_outputs;
  graph->operands = calloc(count ? count : 1, sizeof *graph->operands);
  if (graph->operands == NULL)
    return llamac_fail(error, LLAMAC_ERROR_MEMORY, "no memory for graph %.60s", table->name);
  graph->table = table;
  if (host->open(host->self, folder, table->file, &graph->handle, message, sizeof message) != 0) {
    free(graph->operands);
    message[MESSAGE_BYTES - 1] = '\0';
    return llamac_fail(error, LLAMAC_ERROR_ACCELERATOR, "graph %.60s: %s", table->name, message);
  }
  pthread_mutex_init(&graph->mutex, NULL);
  return LLAMAC_OK;
}

llamac_status llamac_hosted_open(const llamac_hosted_graph *tables, uint32_t count,
                                 const char *folder, llamac_hosted_graphs **out,
                                 llamac_error *error) {
  *out = NULL;
  if (current.open == NULL || current.call == NULL || current.close == NULL)
    return llamac_fail(error, LLAMAC_ERROR_ACCELERATOR,
                       "nobody executes graphs: this library is for `llamac run --emulate`");
  llamac_hosted_graphs *graphs = calloc(1, sizeof *graphs);
  if (graphs != NULL) graphs->graphs = calloc(count ? count : 1, sizeof *graphs->graphs);
  if (graphs == NULL || graphs->graphs == NULL) {
    free(graphs);
    return llamac_fail(error, LLAMAC_ERROR_MEMORY, "no memory for the graphs");
  }
  graphs->host = current;
  for (; graphs->count < count; graphs->count++) {
    uint32_t i = graphs->count;
    llamac_status status =
        open_graph(&graphs->host, &tables[i], folder, &graphs->graphs[i], error);
    if (status == LLAMAC_OK) continue;
    llamac_hosted_close(graphs);
    return status;
  }
  *out = graphs;
  return LLAMAC_OK;
}

void llamac_hosted_close(llamac_hosted_graphs *graphs) {
  if (graphs == NULL) return;
  for (uint32_t i = graphs->count; i > 0; i--) {
    hosted_graph *graph = &graphs->graphs[i - 1];
    graphs->host.close(graphs->host.self, graph->handle);
    pthread_mutex_destroy(&graph->mutex);
    free(graph->operands);
  }
  free(graphs->graphs);
  free(graphs);
}

/* ---- Calls ------------------------------------------------------------------------------------ */

/* Keeps a message as a kernel's error and returns what a failed kernel returns. */
static int32_t report(const char *graph, const char *message) {
  const char *parts[] = {graph, ": ", message};
  TVMFFIErrorSetRaisedFromCStrParts("graph", parts, 3);
  return -1;
}

/* Fills the operands; NULL, or the name of one that does not fit. */
static const char *bind(hosted_graph *graph, const TVMFFIAny *args) {
  for (uint32_t i = 0; i < graph->table->num_inputs + graph->table->num_outputs; i++) {
    const llamac_hosted_tensor *tensor = &graph->table->tensors[i];
    const DLTensor *operand = args[i].v_ptr;
    if (args[i].type_index != LLAMAC_FFI_DLTENSOR) return tensor->name;
    uint64_t bytes = operand->dtype.bits / 8;
    for (int32_t d = 0; d < operand->ndim; d++) bytes *= (uint64_t)operand->shape[d];
    if (bytes != tensor->bytes) return tensor->name;
    graph->operands[i] = (llamac_hosted_operand){
        tensor->name, (uint8_t *)operand->data + operand->byte_offset, bytes};
  }
  return NULL;
}

int32_t llamac_hosted_call(llamac_hosted_graphs *graphs, uint32_t index, const TVMFFIAny *args,
                           int32_t num_args) {
  if (index >= graphs->count) return report("hosted", "no graph of that number");
  hosted_graph *graph = &graphs->graphs[index];
  const llamac_hosted_graph *table = graph->table;
  if (num_args < 0 || (uint32_t)num_args != table->num_inputs + table->num_outputs + 2)
    return report(table->name, "wrong number of operands");
  char message[MESSAGE_BYTES] = "";
  pthread_mutex_lock(&graph->mutex);
  const char *wrong = bind(graph, args);
  int32_t code = 0;
  if (wrong == NULL)
    code = graphs->host.call(graphs->host.self, graph->handle, graph->operands, table->num_inputs,
                             table->num_outputs, message, sizeof message);
  pthread_mutex_unlock(&graph->mutex);
  if (wrong != NULL) {
    snprintf(message, sizeof message, "wrong size of %.48s", wrong);
    return report(table->name, message);
  }
  if (code == 0) return 0;
  message[MESSAGE_BYTES - 1] = '\0';
  return report(table->name, message);
}
