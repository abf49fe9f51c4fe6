/* SPDX-License-Identifier: Apache-2.0
 *
 * hosted.h: graphs that the process executes which has loaded the library.
 *
 * It is for libraries with which a computer stands in for a phone (`--emulate`): there is no APU and
 * no adapter, but an interpreter that the process has. Before it opens a model, the process says how
 * graphs are opened, called and closed. No library of a phone has this in it.
 */
#ifndef LLAMAC_HOSTED_H
#define LLAMAC_HOSTED_H

#include <stdint.h>

#include "../llamac.h"
#include "../program.h"

/* A tensor of a graph. */
typedef struct {
  const char *name;
  uint64_t bytes;
} llamac_hosted_tensor;

/* A graph, as the compiler wrote it into the tables. */
typedef struct {
  const char *name; /* for messages */
  const char *file; /* what the process executes, relative to the folder of the weights */
  const llamac_hosted_tensor *tensors; /* [num_inputs + num_outputs], inputs first, in the order of
                                          a step's operands */
  uint32_t num_inputs, num_outputs;
} llamac_hosted_graph;

/* A tensor in a call. */
typedef struct {
  const char *name;
  void *data; /* compact; an input must not be written */
  uint64_t bytes;
} llamac_hosted_operand;

/* Functions of the process. Those that can fail return 0, or another number after they wrote a
 * sentence of at most `capacity` bytes, with its zero, to `message`. `self` is the process's own.
 * Calls of one graph wait for each other; calls of different models may overlap. */

/* Opens a graph; *handle is handed to the others. */
typedef int32_t (*llamac_hosted_open_fn)(void *self, const char *folder, const char *file,
                                         void **handle, char *message, uint64_t capacity);

/* Executes it: reads the first num_inputs operands, and writes the num_outputs behind them. */
typedef int32_t (*llamac_hosted_call_fn)(void *self, void *handle,
                                         const llamac_hosted_operand *operands,
                                         uint32_t num_inputs, uint32_t num_outputs, char *message,
                                         uint64_t capacity);

/* Closes it. */
typedef void (*llamac_hosted_close_fn)(void *self, void *handle);

/* Says who executes the graphs of models that are opened from now on. A model keeps to what was set
 * when it was opened. Must not be called while one is being opened. */
LLAMAC_API void llamac_hosted_graphs_set(llamac_hosted_open_fn open, llamac_hosted_call_fn call,
                                         llamac_hosted_close_fn close, void *self);

/* Opened graphs. */
typedef struct llamac_hosted_graphs llamac_hosted_graphs;

/* Opens all graphs. `graphs` must live as long as what is opened; folder: of weights.bin.
 *
 * Fails with LLAMAC_ERROR_ACCELERATOR: nobody was set, or a graph was refused; LLAMAC_ERROR_MEMORY:
 * no memory for our own structures. */
llamac_status llamac_hosted_open(const llamac_hosted_graph *graphs, uint32_t count,
                                 const char *folder, llamac_hosted_graphs **out,
                                 llamac_error *error);

/* Closes what was opened; NULL is allowed. No call may be running. */
void llamac_hosted_close(llamac_hosted_graphs *graphs);

/* Executes a graph: what a step calls.
 *
 * args: num_inputs + num_outputs pointers to DLTensor, compact, of the sizes of the table; then two
 *     integers (the work items), which are ignored.
 *
 * Returns 0, or another number after the reason was kept as a kernel's error is. */
int32_t llamac_hosted_call(llamac_hosted_graphs *graphs, uint32_t index, const TVMFFIAny *args,
                           int32_t num_args);

#endif /* LLAMAC_HOSTED_H */
