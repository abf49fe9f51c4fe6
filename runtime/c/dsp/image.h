/* SPDX-License-Identifier: Apache-2.0
 *
 * image.h: what the image of a DSP offers and we use; our own declarations.
 *
 * Besides these, the C library's malloc, free, memcpy, memmove and memset. The list that the linker
 * checks is IMPORTS in targets/fastrpc/link.py.
 */
#ifndef LLAMAC_IMAGE_H
#define LLAMAC_IMAGE_H

enum { HAP_READ = 1, HAP_WRITE = 2 };

/* Maps a buffer of the application by its file descriptor there; (void *)-1 if refused. */
extern void *HAP_mmap(void *address, int bytes, int protection, int flags, int fd, long offset);
extern int HAP_munmap(void *address, int bytes);

#endif /* LLAMAC_IMAGE_H */
