/* SPDX-License-Identifier: Apache-2.0
 *
 * neuron_cache.c: what the adapter compiled, kept in a file until the phone's adapter changes.
 *
 *     <cache>/mt6991-8.2.0-0123456789abcdef.neuron-cache
 *
 * The name and the header say which adapter made it, for which network and SoC. The file is written
 * under another name and renamed, so that it is complete or not there.
 */
#include "neuron_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define CACHE_MAGIC "LLAMACNC"

enum { CACHE_VERSION = 1 };

typedef struct {
  char magic[8];
  uint32_t version;
  uint8_t adapter[4]; /* major, minor, patch, 0 */
  uint8_t identity[LLAMAC_SHA256_BYTES];
  uint8_t sha256[LLAMAC_SHA256_BYTES]; /* of what follows */
  uint64_t bytes;                      /* of what follows */
  uint64_t unused;
} cache_header;

_Static_assert(sizeof(cache_header) == 96, "header");

static cache_header header_of(const llamac_neuron_cache *cache) {
  cache_header header = {.version = CACHE_VERSION,
                         .adapter = {cache->version.major, cache->version.minor,
                                     cache->version.patch, 0}};
  memcpy(header.magic, CACHE_MAGIC, sizeof header.magic);
  memcpy(header.identity, cache->identity, sizeof header.identity);
  return header;
}

void llamac_neuron_cache_find(llamac_neuron_cache *cache, const char *folder, const char *soc,
                              const llamac_network *network, neuron_version version) {
  /* The header has the hash of the rest. */
  uint8_t names[sizeof(llamac_network_header) + 32] = {0};
  memcpy(names, network->header, sizeof *network->header);
  snprintf((char *)names + sizeof *network->header, 32, "%s", soc);
  llamac_sha256(names, sizeof names, cache->identity);
  cache->version = version;
  char text[65];
  llamac_sha256_text(cache->identity, text);
  int length = snprintf(cache->path, sizeof cache->path, "%s/%.31s-%u.%u.%u-%.16s.neuron-cache",
                        folder ? folder : "", soc, version.major, version.minor, version.patch,
                        text);
  /* Room for what is added while it is written. */
  if (folder == NULL || (size_t)length + 16 >= sizeof cache->path) cache->path[0] = '\0';
}

/* ---- Restoring -------------------------------------------------------------------------------- */

/* Maps the file; NULL if there is none that is as long as it says. */
static cache_header *map_cache(const llamac_neuron_cache *cache, uint64_t *bytes) {
  int file = open(cache->path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return NULL;
  struct stat found;
  void *data = MAP_FAILED;
  if (fstat(file, &found) == 0 && S_ISREG(found.st_mode) &&
      (uint64_t)found.st_size > sizeof(cache_header)) {
    *bytes = (uint64_t)found.st_size;
    data = mmap(NULL, (size_t)*bytes, PROT_READ, MAP_PRIVATE, file, 0);
  }
  close(file);
  return data == MAP_FAILED ? NULL : data;
}

/* Whether the file is whole, and of this network, SoC and adapter. */
static bool is_good(const llamac_neuron_cache *cache, const cache_header *header, uint64_t bytes) {
  cache_header expected = header_of(cache);
  expected.bytes = bytes - sizeof *header;
  llamac_sha256(header + 1, expected.bytes, expected.sha256);
  return memcmp(header, &expected, sizeof expected) == 0;
}

bool llamac_neuron_cache_restore(const llamac_neuron_cache *cache,
                                 const llamac_neuron_library *library,
                                 llamac_neuron_built *built) {
  uint64_t bytes = 0;
  cache_header *header = cache->path[0] != '\0' ? map_cache(cache, &bytes) : NULL;
  if (header == NULL) return false;
  bool restored = is_good(cache, header, bytes) &&
                  library->api.model_restore(&built->model, &built->compilation, header + 1,
                                             (size_t)header->bytes) == NEURON_OK;
  if (!restored) {
    built->model = NULL, built->compilation = NULL;
    munmap(header, (size_t)bytes);
    return false;
  }
  /* Nothing is published about how long the adapter reads it. */
  built->mapped = header, built->mapped_bytes = bytes;
  return true;
}

/* ---- Storing ---------------------------------------------------------------------------------- */

static bool write_all(int file, const void *data, uint64_t bytes) {
  const uint8_t *next = data;
  while (bytes > 0) {
    ssize_t written = write(file, next, (size_t)bytes);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return false;
    next += written;
    bytes -= (uint64_t)written;
  }
  return true;
}

/* Writes the file under another name, and renames it; false: errno says why. */
static bool write_cache(const llamac_neuron_cache *cache, const void *compiled, uint64_t bytes) {
  char partial[sizeof cache->path + 16];
  snprintf(partial, sizeof partial, "%s.XXXXXX", cache->path);
  int file = mkstemp(partial);
  if (file < 0) return false;
  cache_header header = header_of(cache);
  header.bytes = bytes;
  llamac_sha256(compiled, bytes, header.sha256);
  bool written = write_all(file, &header, sizeof header) && write_all(file, compiled, bytes) &&
                 fsync(file) == 0;
  int reason = errno;
  if (close(file) != 0 && written) written = false, reason = errno;
  if (written && rename(partial, cache->path) != 0) written = false, reason = errno;
  if (!written) unlink(partial);
  errno = reason;
  return written;
}

void llamac_neuron_cache_store(const llamac_neuron_cache *cache,
                               const llamac_neuron_library *library,
                               const llamac_neuron_built *built, char *origin, size_t capacity) {
  if (cache->path[0] == '\0') {
    snprintf(origin, capacity, "compiled, not kept: no cache folder");
    return;
  }
  size_t bytes = 0;
  int code = library->api.compilation_get_size(built->compilation, &bytes);
  void *compiled = code == NEURON_OK && bytes > 0 ? malloc(bytes) : NULL;
  if (compiled != NULL) code = library->api.compilation_store(built->compilation, compiled, bytes);
  if (code != NEURON_OK)
    snprintf(origin, capacity, "compiled, not kept: the adapter gives code %d", code);
  else if (compiled == NULL)
    snprintf(origin, capacity, "compiled, not kept: no memory for %zu bytes", bytes);
  else if (write_cache(cache, compiled, bytes))
    snprintf(origin, capacity, "compiled");
  else
    snprintf(origin, capacity, "compiled, not kept: %s", strerror(errno));
  free(compiled);
}
