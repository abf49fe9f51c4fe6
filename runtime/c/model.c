/* SPDX-License-Identifier: Apache-2.0
 *
 * model.c: the weights file and the choice of kernels.
 */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

uint32_t llamac_abi_version(void) { return LLAMAC_ABI_VERSION; }

/* Finds the named level, or the first one that the CPU can run. */
static llamac_status choose_level(const llamac_program *program, const char *name,
                                  const llamac_level **out, llamac_error *error) {
  uint64_t present = llamac_cpu_features(), lacking = 0;
  const llamac_level *seen = NULL;
  for (uint32_t i = 0; i < program->num_levels; i++) {
    const llamac_level *level = &program->levels[i];
    if (name != NULL && strcmp(name, level->name) != 0) continue;
    seen = level;
    lacking = level->features & ~present;
    if (lacking == 0) {
      *out = level;
      return LLAMAC_OK;
    }
  }
  if (seen == NULL)
    return llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "no level named '%s'", name ? name : "");
  char names[160];
  llamac_feature_names(lacking, names, sizeof names);
  return llamac_fail(error, LLAMAC_ERROR_CPU, "this CPU lacks %s, which level '%s' needs", names,
                     seen->name);
}

/* Compares the header with the program that was compiled together with it. */
static llamac_status check_header(const llamac_program *program,
                                  const llamac_weights_header *header, llamac_error *error) {
  if (memcmp(header->magic, LLAMAC_WEIGHTS_MAGIC, sizeof header->magic) != 0)
    return llamac_fail(error, LLAMAC_ERROR_WEIGHTS, "not a llamac weights file");
  if (header->version != LLAMAC_WEIGHTS_VERSION ||
      header->header_bytes != LLAMAC_WEIGHTS_HEADER_BYTES)
    return llamac_fail(error, LLAMAC_ERROR_WEIGHTS,
                       "weights file of version %u with %u header bytes; expected %u with %u",
                       header->version, header->header_bytes, LLAMAC_WEIGHTS_VERSION,
                       LLAMAC_WEIGHTS_HEADER_BYTES);
  if (memcmp(header->build_id, program->build_id, sizeof header->build_id) != 0)
    return llamac_fail(error, LLAMAC_ERROR_WEIGHTS,
                       "the weights file belongs to another build than the library");
  if (header->file_bytes != program->weights_bytes)
    return llamac_fail(error, LLAMAC_ERROR_WEIGHTS,
                       "the header says %llu bytes, the library expects %llu",
                       (unsigned long long)header->file_bytes,
                       (unsigned long long)program->weights_bytes);
  return LLAMAC_OK;
}

llamac_status llamac_check_weights(const llamac_program *program, int file, llamac_error *error) {
  llamac_weights_header header;
  struct stat status;
  if (fstat(file, &status) != 0 || !S_ISREG(status.st_mode))
    return llamac_fail(error, LLAMAC_ERROR_IO, "the weights path is not a regular file");
  if (pread(file, &header, sizeof header, 0) != (ssize_t)sizeof header)
    return llamac_fail(error, LLAMAC_ERROR_WEIGHTS, "the weights file is cut off: %lld bytes",
                       (long long)status.st_size);
  llamac_status checked = check_header(program, &header, error);
  if (checked != LLAMAC_OK) return checked;
  if ((uint64_t)status.st_size != program->weights_bytes)
    return llamac_fail(error, LLAMAC_ERROR_WEIGHTS, "the weights file has %lld bytes, not %llu",
                       (long long)status.st_size, (unsigned long long)program->weights_bytes);
  return LLAMAC_OK;
}

/* Maps the open file after checking it. */
static llamac_status map_file(llamac_model *model, int file, llamac_error *error) {
  const llamac_program *program = model->program;
  llamac_status checked = llamac_check_weights(program, file, error);
  if (checked != LLAMAC_OK) return checked;
  void *mapped = mmap(NULL, (size_t)program->weights_bytes, PROT_READ, MAP_SHARED, file, 0);
  if (mapped == MAP_FAILED)
    return llamac_fail(error, LLAMAC_ERROR_IO, "cannot map the weights: %s", strerror(errno));
  madvise(mapped, (size_t)program->weights_bytes, MADV_WILLNEED); /* a hint; failure is harmless */
  model->weights = mapped;
  return LLAMAC_OK;
}

/* Opens, maps and closes the file, and keeps its path. */
static llamac_status map_weights(llamac_model *model, const char *path, llamac_error *error) {
  size_t length = strlen(path) + 1;
  model->path = malloc(length);
  if (model->path == NULL) return llamac_fail(error, LLAMAC_ERROR_MEMORY, "no memory for a path");
  memcpy(model->path, path, length);
  int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0)
    return llamac_fail(error, LLAMAC_ERROR_IO, "cannot open '%.150s': %s", path, strerror(errno));
  llamac_status status = map_file(model, file, error);
  close(file);
  return status;
}

/* Opens what another processor computes, from files beside the weights. */
static llamac_status open_accelerator(llamac_model *model, const char *weights_path,
                                      llamac_error *error) {
  const llamac_accelerator *accelerator = model->program->accelerator;
  if (accelerator == NULL) return LLAMAC_OK;
  const char *slash = strrchr(weights_path, '/');
  size_t length = slash == NULL ? 1 : slash == weights_path ? 1 : (size_t)(slash - weights_path);
  char *folder = malloc(length + 1);
  if (folder == NULL) return llamac_fail(error, LLAMAC_ERROR_MEMORY, "no memory for a path");
  memcpy(folder, slash == NULL ? "." : weights_path, length);
  folder[length] = '\0';
  llamac_status status = accelerator->open(folder, &model->accelerator, error);
  free(folder);
  return status;
}

llamac_status llamac_model_open(const char *weights_path, const char *level, llamac_model **out,
                                llamac_error *error) {
  const llamac_program *program = &llamac_program_table;
  if (out == NULL || weights_path == NULL)
    return llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "weights_path and out must not be NULL");
  *out = NULL;
  if (program->abi_version != LLAMAC_ABI_VERSION)
    return llamac_fail(error, LLAMAC_ERROR_WEIGHTS, "the tables have ABI version %u, not %u",
                       program->abi_version, LLAMAC_ABI_VERSION);
  llamac_model *model = calloc(1, sizeof *model);
  if (model == NULL) return llamac_fail(error, LLAMAC_ERROR_MEMORY, "no memory for the model");
  model->program = program;
  atomic_init(&model->references, 1);
  llamac_status status = choose_level(program, level, &model->level, error);
  if (status == LLAMAC_OK) status = map_weights(model, weights_path, error);
  if (status == LLAMAC_OK) status = open_accelerator(model, weights_path, error);
  if (status != LLAMAC_OK) {
    llamac_model_release(model);
    return status;
  }
  *out = model;
  return LLAMAC_OK;
}

void llamac_model_retain(llamac_model *model) { atomic_fetch_add(&model->references, 1); }

void llamac_model_release(llamac_model *model) {
  if (atomic_fetch_sub(&model->references, 1) != 1) return;
  if (model->program->accelerator != NULL) model->program->accelerator->close(model->accelerator);
  if (model->weights != NULL) munmap(model->weights, (size_t)model->program->weights_bytes);
  free(model->adapted);
  free(model->path);
  free(model);
}

void llamac_model_close(llamac_model *model) {
  if (model != NULL) llamac_model_release(model);
}

llamac_status llamac_model_info(const llamac_model *model, llamac_model_info_t *info) {
  if (model == NULL || info == NULL || info->struct_bytes < sizeof info->struct_bytes)
    return LLAMAC_ERROR_ARGUMENT;
  const llamac_program *program = model->program;
  llamac_model_info_t full = {
      .struct_bytes = info->struct_bytes,
      .vocab_size = program->vocab_size,
      .context_length = program->context_length,
      .max_chunk = program->max_chunk,
      .weights_bytes = program->weights_bytes,
      .kv_bytes = program->kv_bytes,
      .arena_bytes = program->arena_bytes,
      .model_name = program->model_name,
      .level = model->level->name,
  };
  memcpy(info, &full, info->struct_bytes < sizeof full ? info->struct_bytes : sizeof full);
  return LLAMAC_OK;
}
