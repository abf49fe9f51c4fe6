/* SPDX-License-Identifier: Apache-2.0
 *
 * neuron.h: executing graphs on MediaTek's APU in the library of a bundle.
 *
 * A bundle for an APU carries graphs as network files (network_format.h). The phone's own Neuron
 * Adapter compiles each when it is opened for the first time; what it made is kept in a cache folder
 * and restored from then on. If the bundle was made where MediaTek's SDK is, it also carries each
 * graph as that SDK compiled it (a DLA), which is opened first; an adapter that refuses it gets the
 * network. The adapter is the phone's, never the bundle's. Read neuron.c (opening
 * and closing), neuron_library.c (the adapter), neuron_file.c, neuron_network.c (network files),
 * neuron_build.c (compiling), neuron_dla.c, neuron_cache.c, neuron_folder.c and neuron_execute.c
 * (calls) in this order.
 *
 * Messages of errors begin with "neuron" and a name that stays:
 *
 *     library-missing      no adapter was found, or it cannot be loaded
 *     adapter-too-old      it lacks a function, or its version is below what the network needs
 *     network-missing      a network file or a DLA cannot be opened
 *     network-truncated    its size is not the expected one
 *     network-invalid      it is damaged, of another build, or not what the tables say
 *     operation-refused    the adapter does not take an operation, which is named
 *     model-refused        the adapter does not take something else of the model
 *     compilation-failed   the adapter's compiler failed
 *     out-of-memory        the adapter or we got no memory
 *     execution-failed     a call failed
 */
#ifndef LLAMAC_NEURON_H
#define LLAMAC_NEURON_H

#include <stdint.h>

#include "../llamac.h"
#include "../program.h"

/* A tensor of a graph. */
typedef struct {
  const char *name; /* in the network file */
  uint64_t bytes;
} llamac_neuron_tensor;

/* A graph that MediaTek's SDK compiled. */
typedef struct {
  const char *file; /* relative to the folder of the weights */
  uint64_t bytes;   /* its size */
} llamac_neuron_dla;

/* A graph, as the compiler wrote it into the tables. */
typedef struct {
  const char *name;    /* for messages */
  const char *file;    /* the network file, relative to the folder of the weights */
  uint64_t file_bytes; /* its size */
  const char *sha256;  /* of what is behind its header: 64 hexadecimal digits, as the header has */
  const char *soc;     /* "mt6991": for the name in the cache */
  const llamac_neuron_dla *dla; /* NULL: there is none */
  const llamac_neuron_tensor *tensors; /* [num_inputs + num_outputs], inputs first, in the order of
                                          a step's operands */
  uint32_t num_inputs, num_outputs;
} llamac_neuron_graph;

/* Opened graphs, with the adapter's compilations. */
typedef struct llamac_neuron_graphs llamac_neuron_graphs;

/* Opens all graphs.
 *
 * graphs: must live as long as what is opened.
 * folder: of weights.bin.
 * cache: a folder that may be written, where compiled networks are kept under names with SoC,
 *     version of the adapter and a hash of the network; NULL: nothing is kept, and each opening
 *     compiles. A file there that is damaged, or made by another version, is not used but replaced.
 *     A cache that cannot be written is no error: see llamac_neuron_origin.
 *
 * The adapter comes from the folder in the variable LLAMAC_NEURON_LIBRARIES, else from where the
 * loader looks. It stays loaded until the process ends.
 *
 * Fails with LLAMAC_ERROR_ACCELERATOR, or LLAMAC_ERROR_MEMORY for out-of-memory. */
llamac_status llamac_neuron_open(const llamac_neuron_graph *graphs, uint32_t count,
                                 const char *folder, const char *cache,
                                 llamac_neuron_graphs **out, llamac_error *error);

/* Opens all graphs with the cache folder of a bundle: what LLAMAC_CACHE names, else "cache" beside
 * the weights. It is made if it is missing; the folder around it is not. With LLAMAC_NEURON_LOG=1
 * the origin of each graph goes to stderr. */
llamac_status llamac_neuron_open_beside(const llamac_neuron_graph *graphs, uint32_t count,
                                        const char *folder, llamac_neuron_graphs **out,
                                        llamac_error *error);

/* Closes what was opened; NULL is allowed. No call may be running. */
void llamac_neuron_close(llamac_neuron_graphs *graphs);

/* Where a graph came from: "the bundle's DLA", "restored", "compiled", or "compiled, not kept: " and
 * the reason; the last three with "; the DLA was refused: " and the reason, if there is one that
 * was. Lives as long as the graphs. */
const char *llamac_neuron_origin(const llamac_neuron_graphs *graphs, uint32_t index);

/* Executes a graph: what a step calls. Calls from several threads wait for each other.
 *
 * args: num_inputs + num_outputs pointers to DLTensor, compact, of the sizes of the table and the
 *     dtypes of the network; then two integers (the work items), which are ignored.
 *
 * Returns 0, or another number after the reason was kept as a kernel's error is. */
int32_t llamac_neuron_call(llamac_neuron_graphs *graphs, uint32_t index, const TVMFFIAny *args,
                           int32_t num_args);

#endif /* LLAMAC_NEURON_H */
