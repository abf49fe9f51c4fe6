/* SPDX-License-Identifier: Apache-2.0
 *
 * driver.c: libcdsprpc.so, which every phone with a Snapdragon has, behind a few functions.
 *
 * Declarations are our own; the interface is that of inc/remote.h and inc/rpcmem.h in
 * github.com/qualcomm/fastrpc.
 */
#include "internal.h" /* first: see there */

#include "driver.h"
#include "remote.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CDSP_DOMAIN = 3 };
enum { GET_DSP_INFO = 2, ATTRIBUTE_UNSIGNED = 1, ATTRIBUTE_VERSION = 6 };
enum { THREAD_PARAMETERS = 1, CONTROL_UNSIGNED = 2 };
enum { HEAP_SYSTEM = 25, HEAP_CACHED = 1, MAP_BY_FD = 2 };
/* Of the DSP's thread that runs our calls; 16 KiB by default, and kernels keep buffers there. */
enum { STACK_BYTES = 256 << 10 };
enum { LARGEST_BUFFER = 0x7fffffff }; /* sizes are int on both sides */

struct driver {
  void *(*alloc)(int heap, uint32_t flags, int bytes);
  void (*release)(void *data);
  int (*to_fd)(void *data);
  int (*map)(int domain, int fd, void *data, int offset, size_t bytes, int flags);
  int (*unmap)(int domain, int fd, void *data, size_t bytes);
  int (*open)(const char *uri, uint64_t *handle);
  int (*invoke)(uint64_t handle, uint32_t scalars, remote_argument *arguments);
  int (*close)(uint64_t handle);
  int (*control)(uint32_t request, void *data, uint32_t bytes);
  int (*session_control)(uint32_t request, void *data, uint32_t bytes);
};

typedef struct {
  uint32_t domain, attribute, value;
} dsp_capability;

typedef struct {
  int domain, enable;
} unsigned_module;

typedef struct {
  int domain, priority, stack_bytes;
} thread_parameters;

/* ---- Loading --------------------------------------------------------------------------------- */

static driver loaded;
static bool is_loaded;
static pthread_mutex_t loading = PTHREAD_MUTEX_INITIALIZER;

static llamac_status find_symbols(void *library, driver *into, llamac_error *error) {
  const struct {
    const char *name;
    void *place;
  } symbols[] = {
      {"rpcmem_alloc", &into->alloc},
      {"rpcmem_free", &into->release},
      {"rpcmem_to_fd", &into->to_fd},
      {"fastrpc_mmap", &into->map},
      {"fastrpc_munmap", &into->unmap},
      {"remote_handle64_open", &into->open},
      {"remote_handle64_invoke", &into->invoke},
      {"remote_handle64_close", &into->close},
      {"remote_handle_control", &into->control},
      {"remote_session_control", &into->session_control},
  };
  for (size_t i = 0; i < sizeof symbols / sizeof symbols[0]; i++) {
    void *symbol = dlsym(library, symbols[i].name);
    if (symbol == NULL)
      return llamac_fail(error, LLAMAC_ERROR_CPU,
                         "libcdsprpc.so has no %s: this phone's FastRPC is too old. Use a "
                         "bundle for the CPU",
                         symbols[i].name);
    memcpy(symbols[i].place, &symbol, sizeof symbol);
  }
  return LLAMAC_OK;
}

static llamac_status load(llamac_error *error) {
  void *library = dlopen("libcdsprpc.so", RTLD_NOW);
  if (library == NULL) library = dlopen("libcdsprpc.so.1", RTLD_NOW);
  if (library == NULL)
    return llamac_fail(error, LLAMAC_ERROR_CPU,
                       "libcdsprpc.so cannot be loaded: no Snapdragon, or hidden from this "
                       "process. An app declares it with uses-native-library; on Linux install "
                       "fastrpc");
  llamac_status status = find_symbols(library, &loaded, error);
  is_loaded = status == LLAMAC_OK;
  if (!is_loaded) dlclose(library);
  return status;
}

/* What the driver says about the DSP; 0 if it does not know the question. */
static uint32_t ask(const driver *driver, uint32_t attribute, int *code) {
  dsp_capability question = {CDSP_DOMAIN, attribute, 0};
  *code = driver->control(GET_DSP_INFO, &question, sizeof question);
  return *code == 0 ? question.value : 0;
}

llamac_status driver_load(driver **out, uint32_t *version, llamac_error *error) {
  int code;
  pthread_mutex_lock(&loading);
  llamac_status status = is_loaded ? LLAMAC_OK : load(error);
  pthread_mutex_unlock(&loading);
  if (status != LLAMAC_OK) return status;
  *version = ask(&loaded, ATTRIBUTE_VERSION, &code) & 0xff;
  if (*version == 0)
    return llamac_fail(error, LLAMAC_ERROR_CPU, "the DSP does not tell its version (0x%x): %s",
                       (unsigned)code, aee_explain(code));
  *out = &loaded;
  return LLAMAC_OK;
}

/* ---- Opening --------------------------------------------------------------------------------- */

/* The path is read when the process's first session starts; what was in it stays behind ours. */
static llamac_status set_library_path(const char *folder, llamac_error *error) {
  const char *before = getenv("ADSP_LIBRARY_PATH");
  size_t length = strlen(folder);
  if (before != NULL && strncmp(before, folder, length) == 0 &&
      (before[length] == ';' || before[length] == '\0'))
    return LLAMAC_OK;
  size_t capacity = length + (before != NULL ? strlen(before) : 0) + 2;
  char *path = malloc(capacity);
  if (path == NULL) return llamac_fail(error, LLAMAC_ERROR_MEMORY, "no memory for a path");
  snprintf(path, capacity, "%s%s%s", folder, before ? ";" : "", before ? before : "");
  int code = setenv("ADSP_LIBRARY_PATH", path, 1);
  free(path);
  if (code == 0) return LLAMAC_OK;
  return llamac_fail(error, LLAMAC_ERROR_MEMORY, "ADSP_LIBRARY_PATH cannot be set");
}

/* An unsigned process whose threads have room for kernels; before the first call to the DSP. */
static llamac_status prepare_process(const driver *driver, llamac_error *error) {
  int code;
  if (ask(driver, ATTRIBUTE_UNSIGNED, &code) == 0 && code == 0)
    return llamac_fail(error, LLAMAC_ERROR_CPU,
                       "this DSP has no unsigned processes, and the library is not signed. Use a "
                       "bundle for the CPU");
  unsigned_module request = {CDSP_DOMAIN, 1};
  code = driver->session_control(CONTROL_UNSIGNED, &request, sizeof request);
  if (code != 0)
    return llamac_fail(error, LLAMAC_ERROR_CPU, "an unsigned DSP process was refused (0x%x): %s",
                       (unsigned)code, aee_explain(code));
  thread_parameters threads = {CDSP_DOMAIN, -1, STACK_BYTES};
  code = driver->session_control(THREAD_PARAMETERS, &threads, sizeof threads);
  if (code == 0) return LLAMAC_OK;
  return llamac_fail(error, LLAMAC_ERROR_THREAD,
                     "%d bytes of stack for the DSP's thread were refused (0x%x): %s",
                     (int)STACK_BYTES, (unsigned)code, aee_explain(code));
}

llamac_status driver_open(driver *driver, const char *folder, uint32_t version, uint64_t *handle,
                          llamac_error *error) {
  llamac_status status = set_library_path(folder, error);
  if (status == LLAMAC_OK) status = prepare_process(driver, error);
  if (status != LLAMAC_OK) return status;
  char uri[128];
  snprintf(uri, sizeof uri,
           "file:///libllamac-v%x.so?llamac_skel_handle_invoke&_modver=1.0&_dom=cdsp", version);
  int code = driver->open(uri, handle);
  if (code == 0) return LLAMAC_OK;
  return llamac_fail(error, LLAMAC_ERROR_IO, "libllamac-v%x.so was not opened (0x%x): %s", version,
                     (unsigned)code, aee_explain(code));
}

void driver_close(driver *driver, uint64_t handle) { driver->close(handle); }

/* ---- Memory ---------------------------------------------------------------------------------- */

llamac_status driver_allocate(driver *driver, uint64_t bytes, const char *what,
                              shared_buffer *out, llamac_error *error) {
  shared_buffer buffer = {NULL, bytes > 0 ? bytes : 1, -1};
  if (buffer.bytes > LARGEST_BUFFER)
    return llamac_fail(error, LLAMAC_ERROR_MEMORY,
                       "%llu bytes for the %s are more than FastRPC shares in one buffer (2 GiB)",
                       (unsigned long long)bytes, what);
  buffer.data = driver->alloc(HEAP_SYSTEM, HEAP_CACHED, (int)buffer.bytes);
  if (buffer.data != NULL) buffer.fd = driver->to_fd(buffer.data);
  if (buffer.data == NULL || buffer.fd < 0) {
    if (buffer.data != NULL) driver->release(buffer.data);
    return llamac_fail(error, LLAMAC_ERROR_MEMORY,
                       "no shared memory for %llu bytes of %s. Close other apps, or compile with "
                       "a shorter context",
                       (unsigned long long)bytes, what);
  }
  int code = driver->map(CDSP_DOMAIN, buffer.fd, buffer.data, 0, buffer.bytes, MAP_BY_FD);
  if (code != 0) {
    driver->release(buffer.data);
    return llamac_fail(error, LLAMAC_ERROR_MEMORY, "the %s cannot be mapped to the DSP (0x%x): %s",
                       what, (unsigned)code, aee_explain(code));
  }
  *out = buffer;
  return LLAMAC_OK;
}

void driver_free(driver *driver, shared_buffer *buffer) {
  if (buffer->data == NULL) return;
  driver->unmap(CDSP_DOMAIN, buffer->fd, buffer->data, buffer->bytes);
  driver->release(buffer->data);
  buffer->data = NULL;
}

/* ---- Calls ----------------------------------------------------------------------------------- */

llamac_status driver_call(driver *driver, uint64_t handle, uint32_t method,
                          const dsp_request *request, const void *data, uint64_t data_bytes,
                          void *result, uint64_t result_bytes, dsp_reply *reply,
                          llamac_error *error) {
  remote_argument arguments[4];
  memset(arguments, 0, sizeof arguments);
  memset(reply, 0, sizeof *reply);
  reply->argmax = -1;
  arguments[0].buffer.data = (void *)(uintptr_t)request;
  arguments[0].buffer.bytes = sizeof *request;
  arguments[1].buffer.data = (void *)(uintptr_t)data;
  arguments[1].buffer.bytes = data_bytes;
  arguments[2].buffer.data = reply;
  arguments[2].buffer.bytes = sizeof *reply;
  arguments[3].buffer.data = result;
  arguments[3].buffer.bytes = result_bytes;
  int code = driver->invoke(handle, remote_scalars(method, 2, 2, 0, 0), arguments);
  if (code != 0)
    return llamac_fail(error, LLAMAC_ERROR_KERNEL, "a call to the DSP failed (0x%x): %s",
                       (unsigned)code, aee_explain(code));
  reply->message[sizeof reply->message - 1] = '\0';
  if (reply->status == LLAMAC_OK) return LLAMAC_OK;
  return llamac_fail(error, (llamac_status)reply->status, "%s", reply->message);
}
