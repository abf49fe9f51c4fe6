/* SPDX-License-Identifier: Apache-2.0
 *
 * system_loader.c: loads a library with the system's own loader, and generates:
 * system_loader LIBRARY WEIGHTS COUNT ID...
 */
#define _GNU_SOURCE
#include <dlfcn.h>

#include "use_library.h"

/* With it, the Android flavour finds all that it wants in musl, whose libc.so has the name of
 * bionic's; linked with -rdynamic, so that libraries see it. */
__attribute__((visibility("default"))) int *__errno(void);
int *__errno(void) { return &errno; }

static void *library;

static void *own(const char *name) { return dlsym(library, name); }

int main(int argc, char **argv) {
  if (argc < 2) die("usage", "system_loader LIBRARY ...");
  library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) die("dlopen", dlerror());
  use_library(argc - 2, argv + 2);
  return 0;
}
