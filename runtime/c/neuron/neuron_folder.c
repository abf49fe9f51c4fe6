/* SPDX-License-Identifier: Apache-2.0
 *
 * neuron_folder.c: where a bundle keeps what the adapter compiled.
 */
#include "neuron_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define CACHE_VARIABLE "LLAMAC_CACHE"
#define LOG_VARIABLE "LLAMAC_NEURON_LOG"

/* Says where graphs came from, to who asks for it: a library must not print unasked. */
static void show(const llamac_neuron_graphs *graphs, const llamac_neuron_graph *tables,
                 uint32_t count) {
  const char *wanted = getenv(LOG_VARIABLE);
  if (wanted == NULL || strcmp(wanted, "1") != 0) return;
  for (uint32_t i = 0; i < count; i++) {
    char line[320];
    int length = snprintf(line, sizeof line, "neuron: %.80s: %.200s\n", tables[i].name,
                          llamac_neuron_origin(graphs, i));
    if (write(STDERR_FILENO, line, (size_t)length) < 0) return; /* a log is no reason to fail */
  }
}

llamac_status llamac_neuron_open_beside(const llamac_neuron_graph *graphs, uint32_t count,
                                        const char *folder, llamac_neuron_graphs **out,
                                        llamac_error *error) {
  char cache[4096];
  const char *named = getenv(CACHE_VARIABLE);
  bool is_named = named != NULL && *named != '\0';
  int length = snprintf(cache, sizeof cache, "%s%s", is_named ? named : folder,
                        is_named ? "" : "/cache");
  bool fits = (size_t)length < sizeof cache;
  /* If that fails, storing fails too, and says why; the graphs are compiled all the same. */
  if (fits) mkdir(cache, 0700);
  llamac_status status =
      llamac_neuron_open(graphs, count, folder, fits ? cache : NULL, out, error);
  if (status == LLAMAC_OK) show(*out, graphs, count);
  return status;
}
