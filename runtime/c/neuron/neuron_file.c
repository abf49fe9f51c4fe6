/* SPDX-License-Identifier: Apache-2.0
 *
 * neuron_file.c: the files of a bundle's graphs, mapped.
 */
#include "neuron_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* Maps an open file after checking its size. */
static llamac_status map_open(int file, const char *path, const char *name, uint64_t bytes,
                              void **data, llamac_error *error) {
  struct stat found;
  if (fstat(file, &found) != 0 || !S_ISREG(found.st_mode))
    return llamac_fail(error, LLAMAC_ERROR_ACCELERATOR,
                       "neuron network-missing: '%.120s' is not a regular file", path);
  if ((uint64_t)found.st_size != bytes || found.st_size == 0)
    return llamac_fail(error, LLAMAC_ERROR_ACCELERATOR,
                       "neuron network-truncated: %.80s has %llu bytes, not %llu: copy the bundle "
                       "again",
                       name, (unsigned long long)found.st_size, (unsigned long long)bytes);
  *data = mmap(NULL, (size_t)found.st_size, PROT_READ, MAP_PRIVATE, file, 0);
  if (*data != MAP_FAILED) return LLAMAC_OK;
  *data = NULL;
  return llamac_fail(error, LLAMAC_ERROR_MEMORY, "neuron out-of-memory: cannot map '%.120s': %s",
                     path, strerror(errno));
}

llamac_status llamac_neuron_map(const char *folder, const char *name, uint64_t bytes, void **data,
                                llamac_error *error) {
  char path[4096];
  int length = snprintf(path, sizeof path, "%s/%s", folder, name);
  if (length < 0 || (size_t)length >= sizeof path)
    return llamac_fail(error, LLAMAC_ERROR_ACCELERATOR,
                       "neuron network-missing: the path of %.80s is too long", name);
  int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0)
    return llamac_fail(error, LLAMAC_ERROR_ACCELERATOR,
                       "neuron network-missing: cannot open '%.120s': %s", path, strerror(errno));
  llamac_status status = map_open(file, path, name, bytes, data, error);
  close(file);
  return status;
}
