/* SPDX-License-Identifier: Apache-2.0
 *
 * qnn.c: opening and closing the graphs of a bundle.
 */
#include "qnn_internal.h"

#include <stdlib.h>

/* Opens every binary that no earlier graph has opened. */
static llamac_status open_binaries(llamac_graphs *graphs, const char *folder,
                                   llamac_error *error) {
  for (uint32_t i = 0; i < graphs->count; i++) {
    if (graphs->graphs[i].context != NULL) continue;
    llamac_status status = llamac_qnn_context_open(&graphs->library, folder, graphs->graphs, i,
                                                   graphs->count, error);
    if (status != LLAMAC_OK) return status;
  }
  return LLAMAC_OK;
}

/* Everything that can fail; what was done is undone by llamac_graphs_close. */
static llamac_status open_all(llamac_graphs *graphs, const char *folder, llamac_error *error) {
  llamac_status status = llamac_qnn_library_open(&graphs->library, error);
  for (uint32_t i = 0; i < graphs->count && status == LLAMAC_OK; i++)
    status = llamac_qnn_library_check(&graphs->library, graphs->graphs[i].table, error);
  if (status == LLAMAC_OK) status = llamac_qnn_library_start(&graphs->library, error);
  if (status == LLAMAC_OK) status = open_binaries(graphs, folder, error);
  return status;
}

llamac_status llamac_graphs_open(const llamac_graph *tables, uint32_t count, const char *folder,
                                 llamac_graphs **out, llamac_error *error) {
  *out = NULL;
  llamac_graphs *graphs = calloc(1, sizeof *graphs);
  if (graphs == NULL) return llamac_fail(error, LLAMAC_ERROR_MEMORY, "no memory for the graphs");
  pthread_mutex_init(&graphs->mutex, NULL);
  graphs->graphs = calloc(count ? count : 1, sizeof *graphs->graphs);
  graphs->count = graphs->graphs != NULL ? count : 0;
  for (uint32_t i = 0; i < graphs->count; i++) graphs->graphs[i].table = &tables[i];
  llamac_status status =
      graphs->graphs != NULL
          ? open_all(graphs, folder, error)
          : llamac_fail(error, LLAMAC_ERROR_MEMORY, "no memory for the graphs");
  if (status != LLAMAC_OK) {
    llamac_graphs_close(graphs);
    return status;
  }
  *out = graphs;
  return LLAMAC_OK;
}

void llamac_graphs_close(llamac_graphs *graphs) {
  if (graphs == NULL) return;
  /* Backwards: the first graph of a file owns the context. */
  for (uint32_t i = graphs->count; i > 0; i--)
    llamac_qnn_graph_close(&graphs->library, graphs->graphs, i - 1);
  llamac_qnn_library_stop(&graphs->library);
  pthread_mutex_destroy(&graphs->mutex);
  free(graphs->graphs);
  free(graphs);
}
