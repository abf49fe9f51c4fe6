/* SPDX-License-Identifier: Apache-2.0
 *
 * qnn_internal.h: what the files of this folder share.
 */
#ifndef LLAMAC_QNN_INTERNAL_H
#define LLAMAC_QNN_INTERNAL_H

#include "../internal.h" /* before all others */

#include <pthread.h>

#include "qnn.h"
#include "qnn_api.h"

/* ---- qnn_library.c ---- */

/* Qualcomm's libraries, opened. */
typedef struct {
  const qnn_htp *htp;
  const qnn_system *system;
  qnn_handle log, backend;
  char build_id[48]; /* of libQnnHtp.so */
} llamac_qnn_library;

/* Opens both libraries and checks that they understand us; a failure leaves nothing to close. */
llamac_status llamac_qnn_library_open(llamac_qnn_library *library, llamac_error *error);

/* Fails if the library is older than the one that made the graph's binary. */
llamac_status llamac_qnn_library_check(const llamac_qnn_library *library,
                                       const llamac_graph *graph, llamac_error *error);

/* Makes the back end that contexts belong to. */
llamac_status llamac_qnn_library_start(llamac_qnn_library *library, llamac_error *error);

/* Ends the back end, if there is one. */
void llamac_qnn_library_stop(llamac_qnn_library *library);

/* What one of QNN's codes means, for the end of a message. */
const char *llamac_qnn_meaning(qnn_code code);

/* ---- qnn_context.c ---- */

/* A graph of an opened binary. */
typedef struct {
  const llamac_graph *table;
  qnn_handle context;   /* shared by the graphs of a file; owned by the first of them */
  qnn_handle graph;
  qnn_tensor *tensors;  /* [inputs + outputs], in the order of the binary */
  uint32_t *operands;   /* of these tensors: their positions among the operands of a step */
  uint32_t (*dims)[QNN_MAX_RANK]; /* of these tensors */
} llamac_qnn_graph;

/* The number of operands of a graph. */
static inline uint32_t llamac_qnn_operands(const llamac_graph *table) {
  return table->num_inputs + table->num_outputs;
}

/* Bytes of an element, 0 if the dtype is none that a step can have. */
uint32_t llamac_qnn_element_bytes(uint32_t dtype);

/* Opens the binary of graphs[first] and finds in it all graphs of the same file. */
llamac_status llamac_qnn_context_open(const llamac_qnn_library *library, const char *folder,
                                      llamac_qnn_graph *graphs, uint32_t first, uint32_t count,
                                      llamac_error *error);

/* Ends the context that a graph owns and frees its descriptions. */
void llamac_qnn_graph_close(const llamac_qnn_library *library, llamac_qnn_graph *graphs,
                            uint32_t index);

/* ---- qnn.c ---- */

struct llamac_graphs {
  llamac_qnn_library library;
  pthread_mutex_t mutex; /* held during calls */
  llamac_qnn_graph *graphs; /* [count] */
  uint32_t count;
};

#endif /* LLAMAC_QNN_INTERNAL_H */
