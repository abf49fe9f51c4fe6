/* SPDX-License-Identifier: Apache-2.0
 *
 * neuron_internal.h: what the files of this folder share.
 */
#ifndef LLAMAC_NEURON_INTERNAL_H
#define LLAMAC_NEURON_INTERNAL_H

#include "../internal.h" /* before all others */

#include <pthread.h>

#include "network_format.h"
#include "neuron.h"
#include "neuron_api.h"
#include "sha256.h"

/* ---- neuron_library.c ---- */

/* The adapter, opened. */
typedef struct {
  neuron_adapter api;
  neuron_version version;
} llamac_neuron_library;

/* Opens the adapter and checks that it has what we need; a failure leaves nothing to close. */
llamac_status llamac_neuron_library_open(llamac_neuron_library *library, llamac_error *error);

/* What one of the adapter's codes means, for the end of a message. */
const char *llamac_neuron_meaning(int code);

/* LLAMAC_ERROR_MEMORY for a code that says out of memory, else LLAMAC_ERROR_ACCELERATOR. The
 * message is "neuron NAME: WHAT: code 6, meaning", where out of memory replaces the name. */
llamac_status llamac_neuron_fail(llamac_error *error, const char *name, int code,
                                 const char *format, ...) __attribute__((format(printf, 4, 5)));

/* ---- neuron_file.c ---- */

/* Maps a file of a bundle for reading after comparing its size; `name` is its path in the folder. */
llamac_status llamac_neuron_map(const char *folder, const char *name, uint64_t bytes, void **data,
                                llamac_error *error);

/* ---- neuron_network.c ---- */

/* A network file in memory, with pointers into it. */
typedef struct {
  void *data; /* mapped; NULL if there is none */
  uint64_t bytes;
  const llamac_network_header *header;
  const llamac_network_operand *operands;
  const llamac_network_operation *operations;
  const uint32_t *words;
  const float *scales;
  const char *names;
} llamac_network;

/* Maps the network file of a graph and compares it with the table, but for its hash. */
llamac_status llamac_network_open(const llamac_neuron_graph *graph, const char *folder,
                                  llamac_network *network, llamac_error *error);

/* Unmaps it. */
void llamac_network_close(llamac_network *network);

/* Finds the parts of a network in memory (at a multiple of 8) and checks every number in them:
 * whatever it accepts can be walked without leaving the memory. `file` is for messages. Called by
 * llamac_network_open. */
llamac_status llamac_network_read(llamac_network *network, const char *file, llamac_error *error);

/* Compares the hash of everything behind the header with the header's. */
llamac_status llamac_network_verify(const llamac_network *network, const char *file,
                                    llamac_error *error);

/* Elements of an operand. */
uint64_t llamac_network_elements(const llamac_network *network,
                                 const llamac_network_operand *operand);

/* Bits of an element as the file has it; 0: no known type. */
uint32_t llamac_network_bits(int32_t type);

/* ---- neuron_build.c ---- */

/* A model and its compilation. */
typedef struct {
  neuron_model *model;
  neuron_compilation *compilation;
  uint8_t **widened; /* [num_widened] values that the model points to and the file does not have */
  uint32_t num_widened;
  void *mapped; /* the cache file or the DLA that the compilation is from, or NULL */
  uint64_t mapped_bytes;
} llamac_neuron_built;

/* Builds the network's model and compiles it. The network must stay mapped until it is freed; what
 * there is after a failure has to be freed, too. */
llamac_status llamac_neuron_build(const llamac_neuron_library *library,
                                  const llamac_network *network, const char *graph,
                                  llamac_neuron_built *built, llamac_error *error);

/* Compiles a model that is described. Returns the adapter's code; `function` is what returned it. */
int llamac_neuron_compile(const llamac_neuron_library *library, llamac_neuron_built *built,
                          const char *options, const char **function);

/* Frees what there is. */
void llamac_neuron_free(const llamac_neuron_library *library, llamac_neuron_built *built);

/* ---- neuron_dla.c ---- */

/* Gives the DLA of a graph to the adapter. `refusal` is the adapter's code; if it is not NEURON_OK,
 * nothing is left in `built`. Fails only if the file is not what the table says. */
llamac_status llamac_neuron_dla_open(const llamac_neuron_library *library,
                                     const llamac_neuron_graph *graph, const char *folder,
                                     llamac_neuron_built *built, int *refusal,
                                     llamac_error *error);

/* ---- neuron_cache.c ---- */

/* Where the compiled form of a network is kept. */
typedef struct {
  char path[4096]; /* "": nowhere */
  uint8_t identity[LLAMAC_SHA256_BYTES]; /* of the network and the SoC */
  neuron_version version;
} llamac_neuron_cache;

/* Finds the place of a network; `folder` may be NULL. */
void llamac_neuron_cache_find(llamac_neuron_cache *cache, const char *folder, const char *soc,
                              const llamac_network *network, neuron_version version);

/* Restores a compilation; false if there is none that can be used. */
bool llamac_neuron_cache_restore(const llamac_neuron_cache *cache,
                                 const llamac_neuron_library *library,
                                 llamac_neuron_built *built);

/* Keeps a compilation; writes into `origin` how it went. */
void llamac_neuron_cache_store(const llamac_neuron_cache *cache,
                               const llamac_neuron_library *library,
                               const llamac_neuron_built *built, char *origin, size_t capacity);

/* ---- neuron.c ---- */

/* An operand of a step, and the network's input or output that it is. */
typedef struct {
  uint32_t index;                 /* among the network's inputs or its outputs */
  uint8_t dtype_code, dtype_bits; /* DLPack's */
} llamac_neuron_place;

typedef struct {
  const llamac_neuron_graph *table;
  llamac_network network;
  llamac_neuron_built built;
  neuron_execution *execution;
  llamac_neuron_place *places; /* [num_inputs + num_outputs], in the order of a step's operands */
  char origin[224];
} llamac_neuron_opened;

struct llamac_neuron_graphs {
  llamac_neuron_library library;
  pthread_mutex_t mutex; /* held during calls */
  llamac_neuron_opened *graphs; /* [count] */
  uint32_t count;
};

#endif /* LLAMAC_NEURON_INTERNAL_H */
