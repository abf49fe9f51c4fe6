/* SPDX-License-Identifier: Apache-2.0
 *
 * bionic_loader.c: loads the Android flavour of a library the way bionic's linker does, with the
 * names that bionic has and no others, and generates: bionic_loader LIBRARY WEIGHTS COUNT ID...
 *
 * The functions behind the names are those of musl, in this static program. So this shows that the
 * file can be loaded and needs nothing else, and that its code runs against a C library with the
 * sizes in targets/c/bionic.h; it does not show that bionic itself is as its sources say.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "use_library.h"

static int *__errno(void) { return &errno; }

/* symbols.inc: SYMBOL(name) for each name in targets/bionic.py, written by the test. */
static const struct {
  const char *name;
  void *address;
} symbols[] = {
#define SYMBOL(name) {#name, (void *)name},
#include "symbols.inc"
};

static unsigned char *base; /* where the library's address 0 is */
static const Elf64_Sym *table;
static const char *strings;
static size_t num_symbols;

static void *own(const char *name) {
  for (size_t i = 1; i < num_symbols; i++)
    if (table[i].st_shndx != SHN_UNDEF && strcmp(strings + table[i].st_name, name) == 0)
      return base + table[i].st_value;
  return NULL;
}

static void *resolve(const Elf64_Sym *symbol) {
  const char *name = strings + symbol->st_name;
  if (symbol->st_shndx != SHN_UNDEF) return base + symbol->st_value;
  for (size_t i = 0; i < sizeof symbols / sizeof symbols[0]; i++)
    if (strcmp(symbols[i].name, name) == 0) return symbols[i].address;
  if (ELF64_ST_BIND(symbol->st_info) != STB_WEAK) die("cannot locate symbol", name);
  return NULL;
}

static void relocate(const Elf64_Rela *rela, size_t bytes) {
  for (const Elf64_Rela *end = rela + bytes / sizeof *rela; rela < end; rela++) {
    unsigned char **place = (unsigned char **)(base + rela->r_offset);
    const Elf64_Sym *symbol = &table[ELF64_R_SYM(rela->r_info)];
    switch (ELF64_R_TYPE(rela->r_info)) {
      case R_AARCH64_RELATIVE: *place = base + rela->r_addend; break;
      case R_AARCH64_ABS64:
      case R_AARCH64_GLOB_DAT:
      case R_AARCH64_JUMP_SLOT: *place = (unsigned char *)resolve(symbol) + rela->r_addend; break;
      default: die("relocation", "unknown type");
    }
  }
}

/* Copies the segments to where they belong, relative to each other. */
static const Elf64_Dyn *map_segments(const unsigned char *file) {
  const Elf64_Ehdr *header = (const Elf64_Ehdr *)file;
  const Elf64_Phdr *segments = (const Elf64_Phdr *)(file + header->e_phoff);
  const Elf64_Dyn *dynamic = NULL;
  size_t bytes = 0;
  for (int i = 0; i < header->e_phnum; i++)
    if (segments[i].p_type == PT_LOAD) bytes = segments[i].p_vaddr + segments[i].p_memsz;
  base = mmap(NULL, bytes, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) die("mmap", strerror(errno));
  for (int i = 0; i < header->e_phnum; i++) {
    const Elf64_Phdr *segment = &segments[i];
    if (segment->p_type == PT_LOAD)
      memcpy(base + segment->p_vaddr, file + segment->p_offset, segment->p_filesz);
    if (segment->p_type == PT_DYNAMIC) dynamic = (const Elf64_Dyn *)(base + segment->p_vaddr);
  }
  return dynamic;
}

static void load(const unsigned char *file) {
  const Elf64_Dyn *dynamic = map_segments(file);
  uint64_t values[DT_NUM] = {0};
  for (const Elf64_Dyn *entry = dynamic; entry->d_tag != DT_NULL; entry++) {
    if (entry->d_tag < DT_NUM) values[entry->d_tag] = entry->d_un.d_val;
    if (entry->d_tag == DT_INIT_ARRAY) die("DT_INIT_ARRAY", "is not expected");
  }
  table = (const Elf64_Sym *)(base + values[DT_SYMTAB]);
  strings = (const char *)(base + values[DT_STRTAB]);
  num_symbols = ((const uint32_t *)(base + values[DT_HASH]))[1];
  for (const Elf64_Dyn *entry = dynamic; entry->d_tag != DT_NULL; entry++)
    if (entry->d_tag == DT_NEEDED && strcmp(strings + entry->d_un.d_val, "libc.so") != 0)
      die("library not found", strings + entry->d_un.d_val);
  relocate((const Elf64_Rela *)(base + values[DT_RELA]), values[DT_RELASZ]);
  relocate((const Elf64_Rela *)(base + values[DT_JMPREL]), values[DT_PLTRELSZ]);
}

int main(int argc, char **argv) {
  struct stat status;
  if (argc < 2) die("usage", "bionic_loader LIBRARY ...");
  int library = open(argv[1], O_RDONLY);
  if (library < 0 || fstat(library, &status) != 0) die(argv[1], strerror(errno));
  load(mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_PRIVATE, library, 0));
  use_library(argc - 2, argv + 2);
  return 0;
}
