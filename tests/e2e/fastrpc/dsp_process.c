/* SPDX-License-Identifier: Apache-2.0
 *
 * dsp_process.c: stands for a user process of the DSP, under qemu-hexagon. It loads the library as
 * a phone's loader would (its own relocations, symbols of the "image"), and answers calls that come
 * through a pipe. Written for tests: a static Linux program, one library.
 *
 *     dsp_process <library> <pid of the application>
 */
#define _GNU_SOURCE
#include <elf.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "remote.h"

enum { MACHINE = 164, HEXAGON_VER = 0x70000001, MAX_BUFFERS = 8 };

static const char *application;

static void die(const char *what, const char *name) {
  fprintf(stderr, "dsp_process: %s %s\n", what, name);
  exit(3);
}

/* ---- The image ------------------------------------------------------------------------------- */

static void *HAP_mmap(void *address, int bytes, int protection, int flags, int fd, long offset) {
  char path[64];
  (void)address, (void)flags;
  snprintf(path, sizeof path, "/proc/%s/fd/%d", application, fd);
  int file = open(path, O_RDWR);
  if (file < 0) return (void *)-1;
  void *mapped = mmap(NULL, (size_t)bytes, protection, MAP_SHARED, file, offset);
  close(file);
  return mapped;
}

static int HAP_munmap(void *address, int bytes) { return munmap(address, (size_t)bytes); }

static const struct {
  const char *name;
  void *address;
} image[] = {
    {"HAP_mmap", HAP_mmap}, {"HAP_munmap", HAP_munmap}, {"malloc", malloc}, {"free", free},
    {"memcpy", memcpy},     {"memmove", memmove},       {"memset", memset}, {"memcmp", memcmp},
};

static uint32_t find_in_image(const char *name) {
  for (size_t i = 0; i < sizeof image / sizeof image[0]; i++)
    if (strcmp(image[i].name, name) == 0) return (uint32_t)image[i].address;
  die("the image has no symbol", name);
  return 0;
}

/* ---- The loader ------------------------------------------------------------------------------ */

typedef struct {
  uint8_t *base;
  const Elf32_Sym *symbols;
  const char *strings;
  uint32_t num_symbols;
} library;

static uint8_t *read_file(const char *path) {
  struct stat status;
  int file = open(path, O_RDONLY);
  if (file < 0 || fstat(file, &status) != 0) die("cannot open", path);
  uint8_t *data = malloc((size_t)status.st_size);
  if (read(file, data, (size_t)status.st_size) != status.st_size) die("cannot read", path);
  close(file);
  return data;
}

static void relocate(const library *lib, const Elf32_Rela *list, uint32_t bytes) {
  for (uint32_t i = 0; i < bytes / sizeof *list; i++) {
    const Elf32_Sym *symbol = &lib->symbols[ELF32_R_SYM(list[i].r_info)];
    const char *name = lib->strings + symbol->st_name;
    uint32_t value = (uint32_t)lib->base, kind = ELF32_R_TYPE(list[i].r_info);
    if (kind == R_HEX_32 || kind == R_HEX_GLOB_DAT || kind == R_HEX_JMP_SLOT)
      value = symbol->st_shndx ? value + symbol->st_value : find_in_image(name);
    else if (kind != R_HEX_RELATIVE)
      die("unknown relocation of", name);
    *(uint32_t *)(lib->base + list[i].r_offset) = value + (uint32_t)list[i].r_addend;
  }
}

static library load(const char *path) {
  const uint8_t *file = read_file(path);
  const Elf32_Ehdr *header = (const void *)file;
  const Elf32_Phdr *segments = (const void *)(file + header->e_phoff);
  const Elf32_Dyn *dynamic = NULL;
  uint32_t dyn[36] = {0}, version = 0, is_symbolic = 0, end = 0;
  if (memcmp(header->e_ident, ELFMAG, 4) != 0 || header->e_machine != MACHINE) die("not a", path);
  for (int i = 0; i < header->e_phnum; i++) {
    if (segments[i].p_type != PT_LOAD && segments[i].p_type != PT_DYNAMIC) die("segment of", path);
    if (segments[i].p_type == PT_LOAD) end = segments[i].p_vaddr + segments[i].p_memsz;
  }
  library lib = {0};
  /* Pages of 64 KiB here; one mapping for all, so that page sizes do not matter. */
  int protection = PROT_READ | PROT_WRITE | PROT_EXEC;
  lib.base = mmap(NULL, end, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (lib.base == MAP_FAILED) die("no memory for", path);
  for (int i = 0; i < header->e_phnum; i++)
    if (segments[i].p_type == PT_LOAD)
      memcpy(lib.base + segments[i].p_vaddr, file + segments[i].p_offset, segments[i].p_filesz);
    else
      dynamic = (const void *)(lib.base + segments[i].p_vaddr);
  for (; dynamic->d_tag != DT_NULL; dynamic++) {
    if (dynamic->d_tag < 36) dyn[dynamic->d_tag] = dynamic->d_un.d_val;
    if (dynamic->d_tag == HEXAGON_VER) version = dynamic->d_un.d_val;
    if (dynamic->d_tag == DT_SYMBOLIC) is_symbolic = 1;
    if (dynamic->d_tag == DT_NEEDED) die("a library is needed by", path);
  }
  if (version != 3 || !is_symbolic || dyn[DT_HASH] == 0) die("not in the form of a DSP:", path);
  lib.symbols = (const void *)(lib.base + dyn[DT_SYMTAB]);
  lib.strings = (const char *)(lib.base + dyn[DT_STRTAB]);
  lib.num_symbols = ((const uint32_t *)(lib.base + dyn[DT_HASH]))[1];
  relocate(&lib, (const void *)(lib.base + dyn[DT_RELA]), dyn[DT_RELA] ? dyn[DT_RELASZ] : 0);
  relocate(&lib, (const void *)(lib.base + dyn[DT_JMPREL]), dyn[DT_JMPREL] ? dyn[DT_PLTRELSZ] : 0);
  return lib;
}

static void *find(const library *lib, const char *name) {
  for (uint32_t i = 1; i < lib->num_symbols; i++)
    if (lib->symbols[i].st_shndx && strcmp(lib->strings + lib->symbols[i].st_name, name) == 0)
      return lib->base + lib->symbols[i].st_value;
  die("no symbol", name);
  return NULL;
}

/* ---- Calls through pipes --------------------------------------------------------------------- */

static void receive(void *data, size_t bytes) {
  for (char *to = data; bytes > 0;) {
    ssize_t got = read(0, to, bytes);
    if (got <= 0) exit(0); /* the application has ended */
    to += got, bytes -= (size_t)got;
  }
}

static void send_back(const void *data, size_t bytes) {
  for (const char *from = data; bytes > 0;) {
    ssize_t sent = write(1, from, bytes);
    if (sent <= 0) exit(0);
    from += sent, bytes -= (size_t)sent;
  }
}

/* handle, scalars; buffers in: size and bytes; buffers out: size; handles in. Back: code; buffers
 * out; handles out. */
int main(int argc, char **argv) {
  if (argc != 3) die("usage: dsp_process <library> <pid>", "");
  application = argv[2];
  library lib = load(argv[1]);
  int (*invoke)(uint64_t, uint32_t, remote_argument *) = find(&lib, "llamac_skel_handle_invoke");
  for (;;) {
    remote_argument arguments[MAX_BUFFERS];
    uint64_t handle;
    uint32_t scalars, bytes;
    receive(&handle, sizeof handle);
    receive(&scalars, sizeof scalars);
    uint32_t in = remote_num_in(scalars), buffers = in + remote_num_out(scalars);
    uint32_t handles_in = scalars >> 4 & 15, handles_out = scalars & 15;
    for (uint32_t i = 0; i < buffers; i++) {
      receive(&bytes, sizeof bytes);
      arguments[i].buffer.bytes = bytes;
      arguments[i].buffer.data = bytes ? malloc(bytes) : NULL;
      if (i < in) receive(arguments[i].buffer.data, bytes);
    }
    for (uint32_t i = 0; i < handles_in; i++)
      receive(&arguments[buffers + i].handle, sizeof handle);
    int32_t code = invoke(handle, scalars, arguments);
    send_back(&code, sizeof code);
    for (uint32_t i = 0; i < buffers; i++) {
      if (i >= in) send_back(arguments[i].buffer.data, arguments[i].buffer.bytes);
      free(arguments[i].buffer.data);
    }
    for (uint32_t i = 0; i < handles_out; i++)
      send_back(&arguments[buffers + handles_in + i].handle, sizeof handle);
  }
}
