/* SPDX-License-Identifier: Apache-2.0
 *
 * adapter.c: other values for some of the weights of an open model.
 *
 * The pages in which they lie become private copies; all others stay the mapped file. So an adapter
 * costs its own size in memory, and addresses stay, which sessions have in their tables.
 */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* An adapter file in memory. */
typedef struct {
  uint8_t *data;
  uint64_t bytes;
  const llamac_adapter_header *header;
  const llamac_adapter_entry *entries;
} adapter;

static llamac_status invalid(llamac_error *error, const char *what) {
  return llamac_fail(error, LLAMAC_ERROR_WEIGHTS, "the adapter file is damaged: %s", what);
}

/* ---- Reading ---------------------------------------------------------------------------------- */

/* Checks every number of the file against its size and the weights: entries ascend, so that no two
 * of them lie on each other. */
static llamac_status check(const llamac_program *program, adapter *adapter, llamac_error *error) {
  const llamac_adapter_header *header = adapter->header = (const void *)adapter->data;
  if (adapter->bytes < sizeof *header ||
      memcmp(header->magic, LLAMAC_ADAPTER_MAGIC, sizeof header->magic) != 0)
    return llamac_fail(error, LLAMAC_ERROR_WEIGHTS, "not an adapter file of llamac");
  if (header->version != LLAMAC_ADAPTER_VERSION)
    return llamac_fail(error, LLAMAC_ERROR_WEIGHTS, "adapter file of version %u, expected %u",
                       header->version, LLAMAC_ADAPTER_VERSION);
  if (memcmp(header->build_id, program->build_id, sizeof header->build_id) != 0)
    return llamac_fail(error, LLAMAC_ERROR_WEIGHTS, "the adapter file is for another bundle");
  if (header->file_bytes != adapter->bytes) return invalid(error, "its size");
  uint64_t left = adapter->bytes - sizeof *header, end = LLAMAC_WEIGHTS_HEADER_BYTES;
  if (header->num_entries > left / sizeof *adapter->entries) return invalid(error, "its entries");
  adapter->entries = (const void *)(adapter->data + sizeof *header);
  for (uint32_t i = 0; i < header->num_entries; i++) {
    const llamac_adapter_entry *entry = &adapter->entries[i];
    if (entry->offset < end || entry->offset > program->weights_bytes ||
        entry->bytes > program->weights_bytes - entry->offset)
      return invalid(error, "a place in the weights");
    if (entry->place > adapter->bytes || entry->bytes > adapter->bytes - entry->place)
      return invalid(error, "a place in the file");
    end = entry->offset + entry->bytes;
  }
  return LLAMAC_OK;
}

/* Maps the file; there is something to unmap only after LLAMAC_OK. */
static llamac_status open_adapter(const llamac_program *program, const char *path,
                                  adapter *adapter, llamac_error *error) {
  int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0)
    return llamac_fail(error, LLAMAC_ERROR_IO, "cannot open '%.150s': %s", path, strerror(errno));
  struct stat found;
  void *data = MAP_FAILED;
  if (fstat(file, &found) == 0 && S_ISREG(found.st_mode) && found.st_size > 0)
    data = mmap(NULL, (size_t)found.st_size, PROT_READ, MAP_PRIVATE, file, 0);
  close(file);
  if (data == MAP_FAILED)
    return llamac_fail(error, LLAMAC_ERROR_IO, "cannot map '%.150s'", path);
  adapter->data = data, adapter->bytes = (uint64_t)found.st_size;
  llamac_status status = check(program, adapter, error);
  if (status != LLAMAC_OK) munmap(data, (size_t)adapter->bytes);
  return status;
}

/* ---- Pages ------------------------------------------------------------------------------------ */

/* The pages in which the entries lie, each once; returns how many runs of pages there are. */
static uint32_t find_pages(const adapter *adapter, uint64_t page, llamac_pages *pages) {
  uint32_t count = 0;
  for (uint32_t i = 0; i < adapter->header->num_entries; i++) {
    const llamac_adapter_entry *entry = &adapter->entries[i];
    uint64_t start = entry->offset / page * page;
    uint64_t end = (entry->offset + entry->bytes + page - 1) / page * page;
    if (count > 0 && start <= pages[count - 1].start + pages[count - 1].bytes)
      pages[count - 1].bytes = end - pages[count - 1].start;
    else
      pages[count++] = (llamac_pages){start, end - start};
  }
  return count;
}

/* Maps pages of the file again: as they are, or as copies that may be written. */
static bool map_again(const llamac_model *model, int file, const llamac_pages *pages,
                      uint32_t count, bool writable) {
  int protection = PROT_READ | (writable ? PROT_WRITE : 0);
  int kind = MAP_FIXED | (writable ? MAP_PRIVATE : MAP_SHARED);
  for (uint32_t i = 0; i < count; i++)
    if (mmap(model->weights + pages[i].start, (size_t)pages[i].bytes, protection, kind, file,
             (off_t)pages[i].start) == MAP_FAILED)
      return false;
  return true;
}

/* Puts the values where they belong, and makes the pages what all others are: read-only. */
static bool write_values(llamac_model *model, const adapter *adapter, const llamac_pages *pages,
                         uint32_t count) {
  for (uint32_t i = 0; i < adapter->header->num_entries; i++) {
    const llamac_adapter_entry *entry = &adapter->entries[i];
    memcpy(model->weights + entry->offset, adapter->data + entry->place, (size_t)entry->bytes);
  }
  for (uint32_t i = 0; i < count; i++)
    if (mprotect(model->weights + pages[i].start, (size_t)pages[i].bytes, PROT_READ) != 0)
      return false;
  return true;
}

/* Exchanges pages; `adapter` NULL: back to the file. */
static llamac_status exchange(llamac_model *model, int file, const adapter *adapter,
                              llamac_error *error) {
  uint32_t most = adapter != NULL ? adapter->header->num_entries : 0, count = 0;
  llamac_pages *pages = most > 0 ? calloc(most, sizeof *pages) : NULL;
  if (most > 0 && pages == NULL)
    return llamac_fail(error, LLAMAC_ERROR_MEMORY, "no memory for %u places", most);
  if (adapter != NULL) count = find_pages(adapter, getauxval(AT_PAGESZ), pages);
  bool done = map_again(model, file, model->adapted, model->num_adapted, false);
  free(model->adapted);
  model->adapted = pages, model->num_adapted = count;
  done = done && map_again(model, file, pages, count, true);
  if (done && adapter != NULL) done = write_values(model, adapter, pages, count);
  if (done) return LLAMAC_OK;
  return llamac_fail(error, LLAMAC_ERROR_MEMORY, "pages of the weights cannot be exchanged: %s",
                     strerror(errno));
}

llamac_status llamac_model_adapt(llamac_model *model, const char *path, llamac_error *error) {
  if (model == NULL) return llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "model must not be NULL");
  adapter adapter = {0};
  if (path != NULL) {
    llamac_status status = open_adapter(model->program, path, &adapter, error);
    if (status != LLAMAC_OK) return status;
  }
  int file = open(model->path, O_RDONLY | O_CLOEXEC);
  llamac_status status =
      file < 0 ? llamac_fail(error, LLAMAC_ERROR_IO, "cannot open the weights again: %s",
                             strerror(errno))
               : llamac_check_weights(model->program, file, error);
  if (status == LLAMAC_OK)
    status = exchange(model, file, path != NULL ? &adapter : NULL, error);
  if (file >= 0) close(file);
  if (adapter.data != NULL) munmap(adapter.data, (size_t)adapter.bytes);
  return status;
}
