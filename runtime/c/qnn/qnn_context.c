/* SPDX-License-Identifier: Apache-2.0
 *
 * qnn_context.c: context binaries. A binary is mapped, described by libQnnSystem, compared with the
 * tables, given to libQnnHtp, and unmapped.
 */
#include "qnn_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_GRAPHS = 256 }; /* more is another layout than ours */

/* A binary while it is opened. */
typedef struct {
  const llamac_qnn_library *library;
  const char *file;
  void *data;
  uint64_t bytes;
  const qnn_binary_info *info; /* lives in libQnnSystem's context */
  llamac_error *error;
} binary;

/* ---- Comparing with the tables --------------------------------------------------------------- */

uint32_t llamac_qnn_element_bytes(uint32_t dtype) {
  switch (dtype) {
    case QNN_INT8: case QNN_UINT8: case QNN_SFIXED8: case QNN_UFIXED8: case QNN_BOOL8:
      return 1;
    case QNN_INT16: case QNN_UINT16: case QNN_SFIXED16: case QNN_UFIXED16: case QNN_FLOAT16:
      return 2;
    case QNN_INT32: case QNN_UINT32: case QNN_FLOAT32:
      return 4;
    default:
      return 0;
  }
}

/* Bytes of a described tensor, 0 if it has another form than ours. */
static uint64_t tensor_bytes(const qnn_tensor *tensor) {
  if (tensor->version < 1 || tensor->version > 2 || tensor->v1.rank > QNN_MAX_RANK) return 0;
  uint64_t bytes = llamac_qnn_element_bytes(tensor->v1.dtype);
  for (uint32_t d = 0; d < tensor->v1.rank; d++) bytes *= tensor->v1.dims[d];
  return bytes;
}

/* Position of a named operand between first and end, `end` if there is none. */
static uint32_t find_operand(const llamac_graph *table, const char *name, uint32_t first,
                             uint32_t end) {
  while (first < end && strcmp(table->tensors[first].name, name) != 0) first++;
  return first;
}

/* Copies the description of a tensor: what the library's structures point to goes away. */
static void copy_tensor(const qnn_tensor *from, const char *name, uint32_t dims[QNN_MAX_RANK],
                        qnn_tensor *to) {
  *to = *from;
  to->version = 1;
  to->v1.name = name;
  memcpy(dims, from->v1.dims, from->v1.rank * sizeof *dims);
  to->v1.dims = dims;
  /* Scales that lie elsewhere are not needed: the bytes go in and out as they are. */
  if (from->v1.quant.encoding != QNN_QUANT_SCALE_OFFSET) {
    memset(&to->v1.quant, 0, sizeof to->v1.quant);
    to->v1.quant.is_defined = to->v1.quant.encoding = 0x7fffffff;
  }
  to->v1.memory = QNN_MEMORY_RAW;
  memset(&to->v1.buffer, 0, sizeof to->v1.buffer);
  memset(to->v1.unused, 0, sizeof to->v1.unused);
}

/* Compares and copies the inputs or the outputs, operands first .. first + expected - 1. */
static llamac_status take_side(const binary *binary, llamac_qnn_graph *graph,
                               const qnn_tensor *tensors, uint32_t count, uint32_t first,
                               uint32_t expected) {
  const llamac_graph *table = graph->table;
  const char *side = first == 0 && expected == table->num_inputs ? "inputs" : "outputs";
  if (count != expected)
    return llamac_fail(binary->error, LLAMAC_ERROR_ACCELERATOR,
                       "%.48s: graph %.48s has %u %s, not %u: it is of another build", binary->file,
                       table->name, count, side, expected);
  for (uint32_t i = 0; i < count; i++) {
    const char *name = tensors[i].v1.name ? tensors[i].v1.name : "";
    uint32_t operand = find_operand(table, name, first, first + expected);
    if (operand == first + expected)
      return llamac_fail(binary->error, LLAMAC_ERROR_ACCELERATOR,
                         "%.48s: graph %.48s has %.48s among its %s, which the library does not "
                         "know: it is of another build",
                         binary->file, table->name, name, side);
    uint64_t bytes = tensor_bytes(&tensors[i]);
    if (bytes != table->tensors[operand].bytes || bytes == 0)
      return llamac_fail(binary->error, LLAMAC_ERROR_ACCELERATOR,
                         "%.48s: %.48s of graph %.48s has %llu bytes (dtype 0x%04x), not %llu: it "
                         "is of another build",
                         binary->file, name, table->name, (unsigned long long)bytes,
                         tensors[i].v1.dtype,
                         (unsigned long long)table->tensors[operand].bytes);
    copy_tensor(&tensors[i], table->tensors[operand].name, graph->dims[first + i],
                &graph->tensors[first + i]);
    graph->operands[first + i] = operand;
  }
  return LLAMAC_OK;
}

/* Finds the graph in the binary's description and copies that of its tensors. */
static llamac_status take_graph(const binary *binary, llamac_qnn_graph *graph) {
  const llamac_graph *table = graph->table;
  const qnn_graph_info *info = NULL;
  for (uint32_t g = 0; g < binary->info->num_graphs; g++) {
    const qnn_graph_info *other = &binary->info->graphs[g];
    if (other->version != QNN_INFO_VERSION || other->name == NULL)
      return llamac_fail(binary->error, LLAMAC_ERROR_ACCELERATOR,
                         "libQnnSystem.so describes graphs of %.48s in version %u, known is %d",
                         binary->file, other->version, QNN_INFO_VERSION);
    if (info == NULL && strcmp(other->name, table->name) == 0) info = other;
  }
  if (info == NULL)
    return llamac_fail(binary->error, LLAMAC_ERROR_ACCELERATOR,
                       "%.48s has no graph %.80s: it is of another build", binary->file,
                       table->name);
  uint32_t n = llamac_qnn_operands(table);
  graph->tensors = calloc(n + 1, sizeof *graph->tensors);
  graph->operands = calloc(n + 1, sizeof *graph->operands);
  graph->dims = calloc(n + 1, sizeof *graph->dims);
  if (!graph->tensors || !graph->operands || !graph->dims)
    return llamac_fail(binary->error, LLAMAC_ERROR_MEMORY, "no memory for graph %.80s",
                       table->name);
  llamac_status status =
      take_side(binary, graph, info->inputs, info->num_inputs, 0, table->num_inputs);
  if (status != LLAMAC_OK) return status;
  return take_side(binary, graph, info->outputs, info->num_outputs, table->num_inputs,
                   table->num_outputs);
}

/* Compares what the binary says of itself. */
static llamac_status check_info(const binary *binary, const llamac_graph *table) {
  const qnn_binary_info *info = binary->info;
  if (info->version != QNN_INFO_VERSION || info->num_graphs > MAX_GRAPHS)
    return llamac_fail(binary->error, LLAMAC_ERROR_ACCELERATOR,
                       "libQnnSystem.so describes %.48s in version %u, known is %d", binary->file,
                       info->version, QNN_INFO_VERSION);
  if (info->backend != QNN_BACKEND_HTP)
    return llamac_fail(binary->error, LLAMAC_ERROR_ACCELERATOR,
                       "%.48s is for QNN's back end %u, not for HTP", binary->file, info->backend);
  if (info->soc_model != table->soc_model)
    return llamac_fail(binary->error, LLAMAC_ERROR_ACCELERATOR,
                       "%.48s was made for SoC %u, the library for SoC %u (Qualcomm's numbers)",
                       binary->file, info->soc_model, table->soc_model);
  if (info->build_id == NULL || strcmp(info->build_id, table->build_id) != 0)
    return llamac_fail(binary->error, LLAMAC_ERROR_ACCELERATOR,
                       "%.48s was made with QNN %.32s, not %.32s: it is of another build",
                       binary->file, info->build_id ? info->build_id : "?", table->build_id);
  return LLAMAC_OK;
}

/* ---- Opening --------------------------------------------------------------------------------- */

/* Whether a graph lives in the same file as the first one. */
static bool shares_file(const llamac_qnn_graph *graphs, uint32_t first, uint32_t other) {
  return strcmp(graphs[first].table->file, graphs[other].table->file) == 0;
}

/* Lets libQnnSystem describe the binary and compares all of its graphs. */
static llamac_status describe(binary *binary, llamac_qnn_graph *graphs, uint32_t first,
                              uint32_t count) {
  const qnn_system *system = binary->library->system;
  qnn_handle context = NULL;
  uint64_t info_bytes = 0;
  qnn_code code = system->create(&context);
  if (code == 0)
    code = system->get_binary_info(context, binary->data, binary->bytes, &binary->info,
                                   &info_bytes);
  llamac_status status = LLAMAC_OK;
  if (code != 0 || binary->info == NULL)
    status = llamac_fail(binary->error, LLAMAC_ERROR_ACCELERATOR,
                         "libQnnSystem.so does not know %.48s as a context binary (0x%llx): it is "
                         "damaged; copy the bundle again",
                         binary->file, (unsigned long long)code);
  for (uint32_t i = first; i < count && status == LLAMAC_OK; i++) {
    if (!shares_file(graphs, first, i)) continue;
    status = check_info(binary, graphs[i].table);
    if (status == LLAMAC_OK) status = take_graph(binary, &graphs[i]);
  }
  if (context != NULL) system->free(context);
  return status;
}

/* Gives the binary to libQnnHtp and takes the graphs from it. */
static llamac_status create(const binary *binary, llamac_qnn_graph *graphs, uint32_t first,
                            uint32_t count) {
  const qnn_htp *htp = binary->library->htp;
  qnn_handle context = NULL;
  qnn_code code = htp->context_create_from_binary(binary->library->backend, NULL, NULL,
                                                  binary->data, binary->bytes, &context, NULL);
  if (code != 0)
    return llamac_fail(binary->error, LLAMAC_ERROR_ACCELERATOR,
                       "contextCreateFromBinary refused %.48s: 0x%llx, %s", binary->file,
                       (unsigned long long)code, llamac_qnn_meaning(code));
  graphs[first].context = context;
  for (uint32_t i = first; i < count; i++) {
    if (!shares_file(graphs, first, i)) continue;
    graphs[i].context = context;
    code = htp->graph_retrieve(context, graphs[i].table->name, &graphs[i].graph);
    if (code != 0)
      return llamac_fail(binary->error, LLAMAC_ERROR_ACCELERATOR,
                         "graphRetrieve of %.48s in %.48s: 0x%llx, %s", graphs[i].table->name,
                         binary->file, (unsigned long long)code, llamac_qnn_meaning(code));
  }
  return LLAMAC_OK;
}

/* Maps the file after checking its size. */
static llamac_status map_file(binary *binary, const char *path, uint64_t expected) {
  int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0)
    return llamac_fail(binary->error, LLAMAC_ERROR_ACCELERATOR, "cannot open '%.150s': %s", path,
                       strerror(errno));
  struct stat found;
  llamac_status status = LLAMAC_OK;
  if (fstat(file, &found) != 0 || !S_ISREG(found.st_mode)) {
    status = llamac_fail(binary->error, LLAMAC_ERROR_ACCELERATOR, "'%.150s' is not a regular file",
                         path);
  } else if ((uint64_t)found.st_size != expected) {
    status = llamac_fail(binary->error, LLAMAC_ERROR_ACCELERATOR,
                         "%.80s has %llu bytes, not %llu: copy the bundle again", binary->file,
                         (unsigned long long)found.st_size, (unsigned long long)expected);
  } else {
    binary->bytes = expected;
    binary->data = mmap(NULL, (size_t)expected, PROT_READ, MAP_PRIVATE, file, 0);
    if (binary->data == MAP_FAILED)
      status = llamac_fail(binary->error, LLAMAC_ERROR_ACCELERATOR, "cannot map '%.150s': %s", path,
                           strerror(errno));
  }
  close(file);
  return status;
}

llamac_status llamac_qnn_context_open(const llamac_qnn_library *library, const char *folder,
                                      llamac_qnn_graph *graphs, uint32_t first, uint32_t count,
                                      llamac_error *error) {
  const llamac_graph *table = graphs[first].table;
  binary binary = {.library = library, .file = table->file, .error = error};
  char path[4096];
  int length = snprintf(path, sizeof path, "%s/%s", folder, table->file);
  if (length < 0 || (size_t)length >= sizeof path)
    return llamac_fail(error, LLAMAC_ERROR_ACCELERATOR, "the path of %.80s is too long",
                       table->file);
  llamac_status status = map_file(&binary, path, table->file_bytes);
  if (status != LLAMAC_OK) return status;
  status = describe(&binary, graphs, first, count);
  if (status == LLAMAC_OK) status = create(&binary, graphs, first, count);
  munmap(binary.data, (size_t)binary.bytes);
  return status;
}

void llamac_qnn_graph_close(const llamac_qnn_library *library, llamac_qnn_graph *graphs,
                            uint32_t index) {
  llamac_qnn_graph *graph = &graphs[index];
  bool owner = graph->context != NULL;
  for (uint32_t i = 0; i < index && owner; i++) owner = !shares_file(graphs, i, index);
  if (owner) library->htp->context_free(graph->context, NULL);
  free(graph->tensors);
  free(graph->operands);
  free(graph->dims);
}
