/* SPDX-License-Identifier: Apache-2.0
 *
 * memory.c: pages straight from the system, so that unused KV cache costs nothing.
 */
#include "internal.h"

#include <sys/mman.h>

/* mmap refuses length 0, and a model without KV cache is legal. */
static size_t length_of(uint64_t bytes) { return bytes > 0 ? (size_t)bytes : 1; }

void *llamac_map_pages(uint64_t bytes) {
  void *pages = mmap(NULL, length_of(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                     -1, 0);
  return pages == MAP_FAILED ? NULL : pages;
}

void llamac_unmap_pages(void *pages, uint64_t bytes) {
  if (pages != NULL) munmap(pages, length_of(bytes));
}
