/* SPDX-License-Identifier: Apache-2.0
 *
 * neuron_library.c: the phone's Neuron Adapter, found, opened and asked for its version.
 */
#include "neuron_internal.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char FOLDER_VARIABLE[] = "LLAMAC_NEURON_LIBRARIES";

/* As phones have them, the newest kind first. */
static const char *const NAMES[] = {
    "libneuronusdk_adapter.mtk.so",    "libneuronusdk_adapter.10.mtk.so",
    "libneuronusdk_adapter.9.mtk.so",  "libneuronusdk_adapter.so",
    "libneuron_adapter_mgvi.so",       "libneuron_adapter.so",
};

/* ---- Codes ---------------------------------------------------------------------------------- */

static const char *const MEANINGS[] = {
    [NEURON_OK] = "no error",
    [NEURON_OUT_OF_MEMORY] = "out of memory",
    [NEURON_INCOMPLETE] = "something was not set",
    [NEURON_UNEXPECTED_NULL] = "a pointer is missing",
    [NEURON_BAD_DATA] = "the adapter does not accept this",
    [NEURON_OP_FAILED] = "the APU or its driver failed",
    [NEURON_UNMAPPABLE] = "it cannot be mapped to the APU, or is too large for it",
    [NEURON_BAD_STATE] = "calls in a wrong order",
    [NEURON_BAD_VERSION] = "of another version",
    [NEURON_OUTPUT_INSUFFICIENT_SIZE] = "an output is too small",
    [NEURON_UNAVAILABLE_DEVICE] = "the APU is not available",
};

const char *llamac_neuron_meaning(int code) {
  if (code >= 0 && (size_t)code < sizeof MEANINGS / sizeof *MEANINGS) return MEANINGS[code];
  return "a code that llamac does not know";
}

llamac_status llamac_neuron_fail(llamac_error *error, const char *name, int code,
                                 const char *format, ...) {
  char what[152];
  va_list values;
  va_start(values, format);
  vsnprintf(what, sizeof what, format, values);
  va_end(values);
  bool memory = code == NEURON_OUT_OF_MEMORY;
  return llamac_fail(error, memory ? LLAMAC_ERROR_MEMORY : LLAMAC_ERROR_ACCELERATOR,
                     "neuron %s: %.150s: code %d, %s", memory ? "out-of-memory" : name, what, code,
                     llamac_neuron_meaning(code));
}

/* ---- Opening -------------------------------------------------------------------------------- */

/* Opens the first library that there is; NULL after a failure. It is never closed: drivers leave
 * threads behind that would run into nothing. */
static void *open_first(const char *folder, const char **name, llamac_error *error) {
  char reason[100] = "none of its names is there";
  for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++) {
    char path[4096];
    int length = snprintf(path, sizeof path, "%s%s%s", folder ? folder : "", folder ? "/" : "",
                          NAMES[i]);
    if ((size_t)length >= sizeof path) break;
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    *name = NAMES[i];
    if (library != NULL) return library;
    const char *said = dlerror();
    /* One that is there and cannot be loaded is the reason, not one that is not there. */
    if (folder != NULL && access(path, F_OK) == 0 && said != NULL) {
      bool repeats = strncmp(said, path, (size_t)length) == 0;
      snprintf(reason, sizeof reason, "%s", said + (repeats ? strlen(folder) + 1 : 0));
    }
  }
  llamac_fail(error, LLAMAC_ERROR_ACCELERATOR,
              "neuron library-missing: no MediaTek adapter (%s, ...) in %.60s (%s): %s", NAMES[0],
              folder ? folder : "the loader's folders",
              folder ? FOLDER_VARIABLE : "or set LLAMAC_NEURON_LIBRARIES", reason);
  return NULL;
}

/* Finds all functions. */
static llamac_status find_functions(void *library, const char *name, neuron_adapter *into,
                                    llamac_error *error) {
  const struct {
    const char *name;
    void *place;
    bool may_lack;
  } functions[] = {
      {"Neuron_getVersion", &into->get_version, false},
      {"NeuronModel_create", &into->model_create, false},
      {"NeuronModel_free", &into->model_free, false},
      {"NeuronModel_addOperand", &into->model_add_operand, false},
      {"NeuronModel_setOperandValue", &into->model_set_operand_value, false},
      {"NeuronModel_setOperandSymmPerChannelQuantParams", &into->model_set_channel_scales, false},
      {"NeuronModel_addOperation", &into->model_add_operation, false},
      {"NeuronModel_identifyInputsAndOutputs", &into->model_identify, false},
      {"NeuronModel_relaxComputationFloat32toFloat16", &into->model_relax, false},
      {"NeuronModel_finish", &into->model_finish, false},
      {"NeuronModel_restoreFromCompiledNetwork", &into->model_restore, false},
      {"NeuronCompilation_create", &into->compilation_create, false},
      {"NeuronCompilation_free", &into->compilation_free, false},
      {"NeuronCompilation_setPreference", &into->compilation_set_preference, false},
      {"NeuronCompilation_setPriority", &into->compilation_set_priority, false},
      {"NeuronCompilation_setOptimizationString", &into->compilation_set_options, false},
      {"NeuronCompilation_finish", &into->compilation_finish, false},
      {"NeuronCompilation_getCompiledNetworkSize", &into->compilation_get_size, false},
      {"NeuronCompilation_storeCompiledNetwork", &into->compilation_store, false},
      {"NeuronExecution_create", &into->execution_create, false},
      {"NeuronExecution_free", &into->execution_free, false},
      {"NeuronExecution_setInput", &into->execution_set_input, false},
      {"NeuronExecution_setOutput", &into->execution_set_output, false},
      {"NeuronExecution_compute", &into->execution_compute, false},
      {"NeuronModel_getExtensionOperandType", &into->model_extension_operand, true},
      {"NeuronModel_getExtensionOperationType", &into->model_extension_operation, true},
      {"NeuronModel_getSupportedOperations", &into->model_supported, true},
      {"NeuronCompilation_getSupportedOperations", &into->compilation_supported, true},
  };
  for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
    void *found = dlsym(library, functions[i].name);
    if (found == NULL && !functions[i].may_lack)
      return llamac_fail(error, LLAMAC_ERROR_ACCELERATOR,
                         "neuron adapter-too-old: %s has no %s: use a bundle for the CPU", name,
                         functions[i].name);
    memcpy(functions[i].place, &found, sizeof found); /* C has no cast to functions */
  }
  return LLAMAC_OK;
}

llamac_status llamac_neuron_library_open(llamac_neuron_library *library, llamac_error *error) {
  const char *folder = getenv(FOLDER_VARIABLE), *name = NULL;
  if (folder != NULL && *folder == '\0') folder = NULL;
  void *opened = open_first(folder, &name, error);
  if (opened == NULL) return LLAMAC_ERROR_ACCELERATOR;
  llamac_status status = find_functions(opened, name, &library->api, error);
  if (status != LLAMAC_OK) return status;
  int code = library->api.get_version(&library->version);
  if (code == NEURON_OK) return LLAMAC_OK;
  return llamac_neuron_fail(error, "adapter-too-old", code, "%s does not tell its version", name);
}
