/* SPDX-License-Identifier: Apache-2.0
 *
 * stub.c: llamac.h for a model that runs on the DSP. The caller sees no difference; weights, arena
 * and KV cache lie in memory that both processors map.
 */
#include "internal.h" /* first: see there */

#include "driver.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Weights pass through FastRPC in pieces, for which it cleans the caches. */
enum { PIECE_BYTES = 16 << 20 };

/* Not internal.h's: these are the DSP's. */
typedef struct {
  llamac_model model; /* only the counter of references is used */
  driver *driver;
  uint64_t handle;
  bool is_open;
  dsp_info info;
  shared_buffer weights;
  bool taken[DSP_MAX_SESSIONS];
  pthread_mutex_t mutex; /* one call at a time: the DSP library has one thread */
} dsp_model;

struct llamac_session {
  dsp_model *owner;
  dsp_request request; /* names the session */
  shared_buffer arena, kv;
  float *logits; /* [vocab]; not shared, so that FastRPC copies them and no cache is in the way */
  int32_t position, argmax;
  atomic_flag busy;
};

uint32_t llamac_abi_version(void) { return LLAMAC_ABI_VERSION; }

/* ---- Models ---------------------------------------------------------------------------------- */

static llamac_status call(dsp_model *model, uint32_t method, const dsp_request *request,
                          const void *data, uint64_t data_bytes, void *result,
                          uint64_t result_bytes, dsp_reply *reply, llamac_error *error) {
  pthread_mutex_lock(&model->mutex);
  llamac_status status = driver_call(model->driver, model->handle, method, request, data,
                                     data_bytes, result, result_bytes, reply, error);
  pthread_mutex_unlock(&model->mutex);
  return status;
}

static llamac_status lend(dsp_model *model, dsp_request request, uint32_t space,
                          const shared_buffer *buffer, llamac_error *error) {
  dsp_reply reply;
  request.space = space;
  request.fd = buffer->fd;
  request.bytes = buffer->bytes;
  return call(model, DSP_LEND, &request, NULL, 0, NULL, 0, &reply, error);
}

/* Reads the whole file into the shared buffer. */
static llamac_status read_file(int file, const shared_buffer *into, llamac_error *error) {
  for (uint64_t done = 0; done < into->bytes;) {
    ssize_t got = pread(file, (char *)into->data + done, into->bytes - done, (off_t)done);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0)
      return llamac_fail(error, LLAMAC_ERROR_IO, "cannot read the weights: %s",
                         got < 0 ? strerror(errno) : "the file is cut off");
    done += (uint64_t)got;
  }
  return LLAMAC_OK;
}

/* Sends every piece past the caches and compares what the DSP sees in its mapping. */
static llamac_status check_weights(dsp_model *model, llamac_error *error) {
  const uint8_t *data = model->weights.data;
  for (uint64_t at = 0; at < model->weights.bytes; at += PIECE_BYTES) {
    uint64_t rest = model->weights.bytes - at;
    dsp_request request = {.space = LLAMAC_SPACE_WEIGHTS, .offset = at};
    dsp_reply reply;
    request.bytes = rest < PIECE_BYTES ? rest : PIECE_BYTES;
    llamac_status status = call(model, DSP_CHECK, &request, data + at, request.bytes, NULL, 0,
                                &reply, error);
    if (status != LLAMAC_OK) return status;
    if (reply.checksum != dsp_checksum(data + at, request.bytes))
      return llamac_fail(error, LLAMAC_ERROR_WEIGHTS,
                         "the DSP sees other weights than the CPU at offset %llu: the phone's "
                         "FastRPC does not share memory as expected",
                         (unsigned long long)at);
  }
  return LLAMAC_OK;
}

/* Compares the file with the DSP library. */
static llamac_status check_header(const dsp_info *info, int file, llamac_error *error) {
  llamac_weights_header header;
  struct stat status;
  if (fstat(file, &status) != 0 || !S_ISREG(status.st_mode) ||
      pread(file, &header, sizeof header, 0) != (ssize_t)sizeof header ||
      memcmp(header.magic, LLAMAC_WEIGHTS_MAGIC, sizeof header.magic) != 0)
    return llamac_fail(error, LLAMAC_ERROR_WEIGHTS, "not a llamac weights file, or it is cut off");
  if (memcmp(header.build_id, info->build_id, sizeof header.build_id) != 0)
    return llamac_fail(error, LLAMAC_ERROR_WEIGHTS,
                       "the weights file belongs to another build than the DSP library. Copy the "
                       "whole bundle again, dsp/ included");
  if ((uint64_t)status.st_size != info->weights_bytes)
    return llamac_fail(error, LLAMAC_ERROR_WEIGHTS, "the weights file has %lld bytes, not %llu",
                       (long long)status.st_size, (unsigned long long)info->weights_bytes);
  return LLAMAC_OK;
}

static llamac_status load_weights(dsp_model *model, int file, llamac_error *error) {
  llamac_status status = check_header(&model->info, file, error);
  if (status == LLAMAC_OK)
    status = driver_allocate(model->driver, model->info.weights_bytes, "weights", &model->weights,
                             error);
  if (status == LLAMAC_OK) status = read_file(file, &model->weights, error);
  if (status == LLAMAC_OK)
    status = lend(model, (dsp_request){0}, LLAMAC_SPACE_WEIGHTS, &model->weights, error);
  if (status == LLAMAC_OK) status = check_weights(model, error);
  return status;
}

/* Asks the DSP library which model it is, and for a level. */
static llamac_status ask_info(dsp_model *model, const char *level, llamac_error *error) {
  dsp_request request = {0};
  dsp_reply reply;
  dsp_info *info = &model->info;
  llamac_status status = call(model, DSP_INFO, &request, level, level ? strlen(level) + 1 : 0,
                              info, sizeof *info, &reply, error);
  if (status != LLAMAC_OK) return status;
  if (info->protocol_version != DSP_PROTOCOL_VERSION || info->abi_version != LLAMAC_ABI_VERSION)
    return llamac_fail(error, LLAMAC_ERROR_WEIGHTS,
                       "the DSP library speaks version %u.%u, this one %u.%u. Copy the whole "
                       "bundle again, dsp/ included",
                       info->protocol_version, info->abi_version, DSP_PROTOCOL_VERSION,
                       LLAMAC_ABI_VERSION);
  info->model_name[sizeof info->model_name - 1] = info->level[sizeof info->level - 1] = '\0';
  return LLAMAC_OK;
}

/* Starts the DSP process with the library that lies beside the weights. */
static llamac_status open_library(dsp_model *model, const char *weights, llamac_error *error) {
  uint32_t version;
  char path[512];
  const char *slash = strrchr(weights, '/');
  int length = slash != NULL ? (int)(slash - weights) : 1;
  llamac_status status = driver_load(&model->driver, &version, error);
  if (status != LLAMAC_OK) return status;
  const char *folder = slash != NULL ? weights : ".";
  int used = snprintf(path, sizeof path, "%.*s/dsp/v%x/libllamac-v%x.so", length, folder, version,
                      version);
  if (used < 0 || (size_t)used >= sizeof path)
    return llamac_fail(error, LLAMAC_ERROR_IO, "the path of the bundle is longer than %d bytes",
                       (int)sizeof path);
  if (access(path, R_OK) != 0)
    return llamac_fail(error, errno == ENOENT ? LLAMAC_ERROR_CPU : LLAMAC_ERROR_IO,
                       "the DSP is a v%x, and dsp/v%x/libllamac-v%x.so beside the weights cannot "
                       "be read: %s. Compile for this phone, and copy the whole bundle",
                       version, version, version, strerror(errno));
  *strrchr(path, '/') = '\0';
  status = driver_open(model->driver, path, version, &model->handle, error);
  model->is_open = status == LLAMAC_OK;
  return status;
}

static llamac_status set_up(dsp_model *model, const char *weights, const char *level,
                            llamac_error *error) {
  int file = open(weights, O_RDONLY | O_CLOEXEC);
  if (file < 0)
    return llamac_fail(error, LLAMAC_ERROR_IO, "cannot open '%.150s': %s", weights,
                       strerror(errno));
  llamac_status status = open_library(model, weights, error);
  if (status == LLAMAC_OK) status = ask_info(model, level, error);
  if (status == LLAMAC_OK) status = load_weights(model, file, error);
  close(file);
  return status;
}

llamac_status llamac_model_open(const char *weights_path, const char *level, llamac_model **out,
                                llamac_error *error) {
  if (out == NULL || weights_path == NULL)
    return llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "weights_path and out must not be NULL");
  *out = NULL;
  dsp_model *model = calloc(1, sizeof *model);
  if (model == NULL) return llamac_fail(error, LLAMAC_ERROR_MEMORY, "no memory for the model");
  atomic_init(&model->model.references, 1);
  pthread_mutex_init(&model->mutex, NULL);
  llamac_status status = set_up(model, weights_path, level, error);
  if (status == LLAMAC_OK)
    *out = &model->model;
  else
    llamac_model_release(&model->model);
  return status;
}

void llamac_model_retain(llamac_model *model) { atomic_fetch_add(&model->references, 1); }

void llamac_model_release(llamac_model *given) {
  dsp_model *model = (dsp_model *)given;
  dsp_request request = {0};
  dsp_reply reply;
  if (atomic_fetch_sub(&given->references, 1) != 1) return;
  if (model->weights.data != NULL) {
    /* While there is a process that they can be unmapped from; a failure leaves nothing to do. */
    call(model, DSP_UNLOAD, &request, NULL, 0, NULL, 0, &reply, NULL);
    driver_free(model->driver, &model->weights);
  }
  if (model->is_open) driver_close(model->driver, model->handle);
  pthread_mutex_destroy(&model->mutex);
  free(model);
}

void llamac_model_close(llamac_model *model) {
  if (model != NULL) llamac_model_release(model);
}

llamac_status llamac_model_info(const llamac_model *given, llamac_model_info_t *info) {
  if (given == NULL || info == NULL || info->struct_bytes < sizeof info->struct_bytes)
    return LLAMAC_ERROR_ARGUMENT;
  const dsp_info *from = &((const dsp_model *)given)->info;
  llamac_model_info_t full = {
      .struct_bytes = info->struct_bytes,
      .vocab_size = from->vocab_size,
      .context_length = from->context_length,
      .max_chunk = from->max_chunk,
      .weights_bytes = from->weights_bytes,
      .kv_bytes = from->kv_bytes,
      .arena_bytes = from->arena_bytes,
      .model_name = from->model_name,
      .level = from->level,
  };
  memcpy(info, &full, info->struct_bytes < sizeof full ? info->struct_bytes : sizeof full);
  return LLAMAC_OK;
}

/* ---- Sessions -------------------------------------------------------------------------------- */

/* Takes one of the DSP's places for sessions. */
static llamac_status take_place(llamac_session *session, llamac_error *error) {
  dsp_model *model = session->owner;
  uint32_t place = 0;
  pthread_mutex_lock(&model->mutex);
  while (place < DSP_MAX_SESSIONS && model->taken[place]) place++;
  if (place < DSP_MAX_SESSIONS) model->taken[place] = true;
  pthread_mutex_unlock(&model->mutex);
  session->request.session = place;
  if (place < DSP_MAX_SESSIONS) return LLAMAC_OK;
  return llamac_fail(error, LLAMAC_ERROR_MEMORY, "the DSP holds %u sessions of a model; close one",
                     DSP_MAX_SESSIONS);
}

static llamac_status start(llamac_session *session, llamac_error *error) {
  dsp_model *model = session->owner;
  const dsp_info *info = &model->info;
  dsp_reply reply;
  llamac_status status = take_place(session, error);
  if (status == LLAMAC_OK)
    status = driver_allocate(model->driver, info->arena_bytes, "arena", &session->arena, error);
  if (status == LLAMAC_OK)
    status = driver_allocate(model->driver, info->kv_bytes, "KV cache", &session->kv, error);
  session->logits = calloc((size_t)info->vocab_size, sizeof(float));
  if (status == LLAMAC_OK && session->logits == NULL)
    status = llamac_fail(error, LLAMAC_ERROR_MEMORY, "no memory for the logits");
  if (status == LLAMAC_OK)
    status = lend(model, session->request, LLAMAC_SPACE_ARENA, &session->arena, error);
  if (status == LLAMAC_OK)
    status = lend(model, session->request, LLAMAC_SPACE_KV, &session->kv, error);
  if (status == LLAMAC_OK)
    status = call(model, DSP_START, &session->request, NULL, 0, NULL, 0, &reply, error);
  return status;
}

llamac_status llamac_session_create(llamac_model *model, const llamac_session_options *options,
                                    llamac_session **out, llamac_error *error) {
  if (model == NULL || out == NULL)
    return llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "model and out must not be NULL");
  *out = NULL;
  /* Threads and CPUs are the CPU's; the DSP library has one thread of its own. */
  if (options != NULL && options->struct_bytes < sizeof options->struct_bytes)
    return llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "options->struct_bytes is not set");
  llamac_session *session = calloc(1, sizeof *session);
  if (session == NULL) return llamac_fail(error, LLAMAC_ERROR_MEMORY, "no memory for a session");
  llamac_model_retain(model);
  session->owner = (dsp_model *)model;
  session->argmax = -1;
  atomic_flag_clear(&session->busy);
  llamac_status status = start(session, error);
  if (status == LLAMAC_OK)
    *out = session;
  else
    llamac_session_destroy(session);
  return status;
}

void llamac_session_destroy(llamac_session *session) {
  if (session == NULL) return;
  dsp_model *model = session->owner;
  uint32_t place = session->request.session;
  dsp_reply reply;
  if (place < DSP_MAX_SESSIONS) {
    call(model, DSP_FINISH, &session->request, NULL, 0, NULL, 0, &reply, NULL);
    pthread_mutex_lock(&model->mutex);
    model->taken[place] = false;
    pthread_mutex_unlock(&model->mutex);
  }
  driver_free(model->driver, &session->arena);
  driver_free(model->driver, &session->kv);
  free(session->logits);
  llamac_model_release(&model->model);
  free(session);
}

/* A call that computes or moves; the session's figures follow the DSP's. */
static llamac_status run(llamac_session *session, uint32_t method, const dsp_request *request,
                         const void *data, uint64_t bytes, llamac_error *error) {
  dsp_reply reply;
  uint64_t logits = (uint64_t)session->owner->info.vocab_size * sizeof(float);
  uint64_t room = method == DSP_EVAL ? logits : 0;
  if (atomic_flag_test_and_set(&session->busy))
    return llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "another thread is using this session");
  llamac_status status =
      call(session->owner, method, request, data, bytes, session->logits, room, &reply, error);
  session->argmax = reply.argmax;
  if (status == LLAMAC_OK) session->position = reply.position;
  atomic_flag_clear(&session->busy);
  return status;
}

llamac_status llamac_session_eval(llamac_session *session, const int32_t *tokens,
                                  int32_t num_tokens, llamac_error *error) {
  if (session == NULL) return llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "session is NULL");
  if (tokens == NULL || num_tokens < 1)
    return llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "no tokens to evaluate");
  return run(session, DSP_EVAL, &session->request, tokens, (uint64_t)num_tokens * sizeof *tokens,
             error);
}

llamac_status llamac_session_rewind(llamac_session *session, int32_t position,
                                    llamac_error *error) {
  if (session == NULL) return llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "session is NULL");
  dsp_request request = session->request;
  request.count = position;
  return run(session, DSP_REWIND, &request, NULL, 0, error);
}

const float *llamac_session_logits(const llamac_session *session) {
  return session != NULL && session->argmax >= 0 ? session->logits : NULL;
}

int32_t llamac_session_argmax(const llamac_session *session) {
  return session != NULL ? session->argmax : -1;
}

int32_t llamac_session_position(const llamac_session *session) {
  return session != NULL ? session->position : 0;
}
