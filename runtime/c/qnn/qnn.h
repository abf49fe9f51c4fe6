/* SPDX-License-Identifier: Apache-2.0
 *
 * qnn.h: executing Qualcomm's context binaries in the library of a bundle.
 *
 * A bundle for an HTP carries graphs that Qualcomm's compiler made, in files beside weights.bin.
 * Qualcomm's libraries execute them; they are the device's or the user's, never the bundle's, and
 * are opened when the graphs are. Read qnn.c (opening and closing), qnn_library.c (the libraries),
 * qnn_context.c (the binaries) and qnn_execute.c (calls) in this order.
 */
#ifndef LLAMAC_QNN_H
#define LLAMAC_QNN_H

#include <stdint.h>

#include "../llamac.h"
#include "../program.h"

/* A tensor of a graph. */
typedef struct {
  const char *name; /* in the binary */
  uint64_t bytes;
} llamac_graph_tensor;

/* A graph of a context binary, as the compiler wrote it into the tables. */
typedef struct {
  const char *name;     /* in the binary */
  const char *file;     /* the binary, relative to the folder of the weights */
  uint64_t file_bytes;  /* its size */
  uint32_t soc_model;   /* Qualcomm's number of the SoC: 57 is SM8650 */
  const char *build_id; /* of the QNN libraries that made it: "v2.51.0.260929181845" */
  const llamac_graph_tensor *tensors; /* [num_inputs + num_outputs], inputs first, in the order of
                                         a step's operands */
  uint32_t num_inputs, num_outputs;
} llamac_graph;

/* Opened graphs, with QNN's contexts that they live in. */
typedef struct llamac_graphs llamac_graphs;

/* Opens all binaries, each once, whatever the number of its graphs.
 *
 * graphs: must live as long as what is opened.
 * folder: of weights.bin.
 *
 * libQnnHtp.so and libQnnSystem.so come from the folder in the variable LLAMAC_QNN_LIBRARIES, else
 * from where the loader looks; with the variable, ADSP_LIBRARY_PATH is set to that folder if it is
 * not set. They stay loaded until the process ends. With LLAMAC_QNN_LOG=1 QNN's log goes to stderr,
 * else nowhere; the libraries for x86-64 print a line about LIBNATIVE to stdout all the same.
 *
 * Fails with LLAMAC_ERROR_ACCELERATOR: a library is missing or older than what made a binary, or a
 * binary is missing, not the one of the tables, or refused by QNN. QNN accepts binaries with
 * changed bytes in their bodies: only a hash finds those. LLAMAC_ERROR_MEMORY: no memory for our
 * own structures. */
llamac_status llamac_graphs_open(const llamac_graph *graphs, uint32_t count, const char *folder,
                                 llamac_graphs **out, llamac_error *error);

/* Closes what was opened; NULL is allowed. No call may be running. */
void llamac_graphs_close(llamac_graphs *graphs);

/* Executes a graph: what a step calls. Calls from several threads wait for each other.
 *
 * args: num_inputs + num_outputs pointers to DLTensor, compact, of the sizes of the table and the
 *     dtypes of the binary; then two integers (the work items), which are ignored.
 *
 * Returns 0, or another number after the reason was kept as a kernel's error is. */
int32_t llamac_graph_call(llamac_graphs *graphs, uint32_t index, const TVMFFIAny *args,
                          int32_t num_args);

#endif /* LLAMAC_QNN_H */
