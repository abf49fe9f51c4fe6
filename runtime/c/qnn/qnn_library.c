/* SPDX-License-Identifier: Apache-2.0
 *
 * qnn_library.c: Qualcomm's libraries, found, opened and asked for their versions.
 */
#include "qnn_internal.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char FOLDER_VARIABLE[] = "LLAMAC_QNN_LIBRARIES";

/* ---- Codes ---------------------------------------------------------------------------------- */

static const struct {
  uint32_t code;
  const char *meaning;
} MEANINGS[] = {
    {1000, "not supported by this library"},
    {1002, "out of memory"},
    {1003, "a service of the system failed"},
    {1006, "this platform is not supported"},
    {1007, "no connection to the DSP"},
    {4000, "this machine has no HTP that the library knows"},
    {5000, "not a context binary that this library can read"},
    {5004, "the binary's format is newer or older than the library"},
    {5005, "damaged, made for another SoC, or not enough memory"}, /* seen here: 1st and 3rd */
    {5008, "the binary was made for another configuration of the SoC"},
    {6002, "no such graph in the binary"},
    {14001, "the DSP cannot be opened: check its libraries (*Skel.so) and ADSP_LIBRARY_PATH"},
};

const char *llamac_qnn_meaning(qnn_code code) {
  for (size_t i = 0; i < sizeof MEANINGS / sizeof *MEANINGS; i++)
    /* The upper half of a code is a detail of the back end. */
    if (MEANINGS[i].code == (uint32_t)code) return MEANINGS[i].meaning;
  return "a code that llamac does not know";
}

/* ---- Opening -------------------------------------------------------------------------------- */

/* Opens one library and finds a function in it; NULL after a failure. Libraries are never closed:
 * QNN leaves threads and destructors of threads behind that would run into nothing. */
static void *find_function(const char *folder, const char *name, const char *function,
                           llamac_error *error) {
  char path[4096];
  int length = snprintf(path, sizeof path, "%s%s%s", folder ? folder : "", folder ? "/" : "", name);
  void *library = (size_t)length < sizeof path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
  if (library == NULL) {
    const char *reason = (size_t)length < sizeof path ? dlerror() : NULL;
    llamac_fail(error, LLAMAC_ERROR_ACCELERATOR, "cannot open %s in %.80s (%s): %.100s", name,
                folder ? folder : "the loader's folders",
                folder ? FOLDER_VARIABLE : "set LLAMAC_QNN_LIBRARIES to its folder",
                reason ? reason : "the path is too long");
    return NULL;
  }
  void *found = dlsym(library, function);
  if (found == NULL)
    llamac_fail(error, LLAMAC_ERROR_ACCELERATOR, "%s has no %s: it is not QNN's library", name,
                function);
  return found;
}

/* Opens libQnnHtp.so. */
static llamac_status open_htp(llamac_qnn_library *library, const char *folder,
                              llamac_error *error) {
  qnn_htp_providers providers;
  void *found = find_function(folder, "libQnnHtp.so", "QnnInterface_getProviders", error);
  if (found == NULL) return LLAMAC_ERROR_ACCELERATOR;
  memcpy(&providers, &found, sizeof found); /* C has no cast from objects to functions */
  const qnn_htp **list = NULL;
  uint32_t count = 0;
  qnn_code code = providers(&list, &count);
  if (code != 0 || count == 0 || list == NULL)
    return llamac_fail(error, LLAMAC_ERROR_ACCELERATOR, "libQnnHtp.so has no interface (0x%llx)",
                       (unsigned long long)code);
  const qnn_htp *htp = list[0];
  if (htp->backend != QNN_BACKEND_HTP || htp->core_api.major != QNN_CORE_MAJOR)
    return llamac_fail(error, LLAMAC_ERROR_ACCELERATOR,
                       "libQnnHtp.so is back end %u with interface %u.%u; known is %d with %d.x",
                       htp->backend, htp->core_api.major, htp->core_api.minor, QNN_BACKEND_HTP,
                       QNN_CORE_MAJOR);
  const char *id = NULL;
  if (htp->backend_build_id(&id) != 0 || id == NULL)
    return llamac_fail(error, LLAMAC_ERROR_ACCELERATOR, "libQnnHtp.so does not tell its version");
  snprintf(library->build_id, sizeof library->build_id, "%s", id);
  library->htp = htp;
  return LLAMAC_OK;
}

/* Opens libQnnSystem.so. */
static llamac_status open_system(llamac_qnn_library *library, const char *folder,
                                 llamac_error *error) {
  qnn_system_providers providers;
  void *found =
      find_function(folder, "libQnnSystem.so", "QnnSystemInterface_getProviders", error);
  if (found == NULL) return LLAMAC_ERROR_ACCELERATOR;
  memcpy(&providers, &found, sizeof found);
  const qnn_system **list = NULL;
  uint32_t count = 0;
  qnn_code code = providers(&list, &count);
  if (code != 0 || count == 0 || list == NULL)
    return llamac_fail(error, LLAMAC_ERROR_ACCELERATOR, "libQnnSystem.so has no interface (0x%llx)",
                       (unsigned long long)code);
  const qnn_system *system = list[0];
  if (system->api.major != QNN_SYSTEM_MAJOR || system->api.minor < QNN_SYSTEM_MINOR)
    return llamac_fail(error, LLAMAC_ERROR_ACCELERATOR,
                       "libQnnSystem.so has interface %u.%u, needed is %d.%d or later of %d.x: use "
                       "newer QNN libraries",
                       system->api.major, system->api.minor, QNN_SYSTEM_MAJOR, QNN_SYSTEM_MINOR,
                       QNN_SYSTEM_MAJOR);
  library->system = system;
  return LLAMAC_OK;
}

llamac_status llamac_qnn_library_open(llamac_qnn_library *library, llamac_error *error) {
  const char *folder = getenv(FOLDER_VARIABLE);
  if (folder != NULL && *folder == '\0') folder = NULL;
  /* The DSP loads its own libraries from there, when the first context is made. */
  if (folder != NULL) setenv("ADSP_LIBRARY_PATH", folder, 0);
  llamac_status status = open_htp(library, folder, error);
  return status == LLAMAC_OK ? open_system(library, folder, error) : status;
}

/* ---- Versions ------------------------------------------------------------------------------- */

/* Reads "v2.51.0.260929181845"; the last part is a date, which says nothing about formats. */
static bool read_version(const char *id, uint32_t version[3]) {
  return sscanf(id, "v%u.%u.%u", &version[0], &version[1], &version[2]) == 3;
}

llamac_status llamac_qnn_library_check(const llamac_qnn_library *library,
                                       const llamac_graph *graph, llamac_error *error) {
  uint32_t have[3], need[3];
  if (!read_version(library->build_id, have) || !read_version(graph->build_id, need))
    return llamac_fail(error, LLAMAC_ERROR_ACCELERATOR,
                       "cannot compare the versions of libQnnHtp.so, '%.48s', and %.48s, '%.48s'",
                       library->build_id, graph->file, graph->build_id);
  for (int i = 0; i < 3; i++) {
    if (have[i] > need[i]) return LLAMAC_OK;
    if (have[i] < need[i])
      return llamac_fail(error, LLAMAC_ERROR_ACCELERATOR,
                         "libQnnHtp.so is QNN %.32s, %.48s was made with %.32s: use libraries of "
                         "that version or newer (LLAMAC_QNN_LIBRARIES)",
                         library->build_id, graph->file, graph->build_id);
  }
  return LLAMAC_OK;
}

/* ---- The back end ---------------------------------------------------------------------------- */

static void print_log(const char *format, uint32_t level, uint64_t time, va_list values) {
  (void)time;
  char text[480], line[512];
  vsnprintf(text, sizeof text, format, values);
  int length = snprintf(line, sizeof line, "qnn %u: %s\n", level, text);
  if (write(STDERR_FILENO, line, (size_t)length) < 0) return; /* a log is no reason to fail */
}

/* Without a callback QNN prints errors to standard output. */
static void drop_log(const char *format, uint32_t level, uint64_t time, va_list values) {
  (void)format, (void)level, (void)time, (void)values;
}

llamac_status llamac_qnn_library_start(llamac_qnn_library *library, llamac_error *error) {
  const char *wanted = getenv("LLAMAC_QNN_LOG");
  bool print = wanted != NULL && strcmp(wanted, "1") == 0;
  if (library->htp->log_create(print ? print_log : drop_log, print ? QNN_LOG_DEBUG : QNN_LOG_ERROR,
                               &library->log) != 0)
    library->log = NULL; /* no reason to fail */
  qnn_code code = library->htp->backend_create(library->log, NULL, &library->backend);
  if (code == 0) return LLAMAC_OK;
  library->backend = NULL;
  llamac_qnn_library_stop(library);
  return llamac_fail(error, LLAMAC_ERROR_ACCELERATOR, "backendCreate of libQnnHtp.so: 0x%llx, %s",
                     (unsigned long long)code, llamac_qnn_meaning(code));
}

void llamac_qnn_library_stop(llamac_qnn_library *library) {
  if (library->backend != NULL) library->htp->backend_free(library->backend);
  if (library->log != NULL) library->htp->log_free(library->log);
  library->backend = library->log = NULL;
}
