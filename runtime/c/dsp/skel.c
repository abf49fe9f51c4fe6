/* SPDX-License-Identifier: Apache-2.0
 *
 * skel.c: the DSP side of the calls in protocol.h.
 *
 * FastRPC loads the library, looks for llamac_skel_handle_invoke and calls it for everything. What
 * a caller can get wrong comes back in the reply with status and message. A call of a wrong shape
 * has no reply to write to and returns BAD_CALL.
 */
#include "image.h"
#include "internal.h"
#include "protocol.h"
#include "remote.h"
#include "support.h"

#include <stdlib.h>
#include <string.h>

enum { BAD_CALL = 0x8000040e }; /* FastRPC's AEE_EBADPARM, seen from the DSP */

/* What HAP_mmap takes: its length is an int. */
#define MAX_BUFFER_BYTES (UINT64_C(0x7fffffff))

typedef struct {
  dsp_buffer arena, kv;
  llamac_session *session;
} slot;

typedef struct {
  llamac_model model;
  dsp_buffer weights;
  slot slots[DSP_MAX_SESSIONS];
} connection;

/* ---- Memory of the application --------------------------------------------------------------- */

static void give_back(dsp_buffer *buffer) {
  if (buffer->base != NULL) HAP_munmap(buffer->base, (int)buffer->bytes);
  buffer->base = NULL;
}

/* The place where a buffer of that space is kept; NULL for a space that there is none of. */
static dsp_buffer *find_buffer(connection *all, const dsp_request *request) {
  if (request->space == LLAMAC_SPACE_WEIGHTS) return &all->weights;
  if (request->space == LLAMAC_SPACE_ARENA) return &all->slots[request->session].arena;
  if (request->space == LLAMAC_SPACE_KV) return &all->slots[request->session].kv;
  return NULL;
}

static llamac_status lend(connection *all, const dsp_request *request, llamac_error *error) {
  dsp_buffer *buffer = find_buffer(all, request);
  if (buffer == NULL || buffer->base != NULL || request->bytes == 0 ||
      request->bytes > MAX_BUFFER_BYTES)
    return llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "no buffer of %llu bytes for space %u",
                       (unsigned long long)request->bytes, request->space);
  void *base = HAP_mmap(NULL, (int)request->bytes, HAP_READ | HAP_WRITE, 0, request->fd, 0);
  if (base == NULL || base == (void *)-1)
    return llamac_fail(error, LLAMAC_ERROR_MEMORY,
                       "the DSP cannot map a buffer of %llu bytes for space %u",
                       (unsigned long long)request->bytes, request->space);
  buffer->base = base;
  buffer->bytes = request->bytes;
  if (request->space == LLAMAC_SPACE_WEIGHTS) all->model.weights = base;
  return LLAMAC_OK;
}

/* FastRPC has cleaned the caches for `data`; whether the mapping shows the same bytes is what the
 * caller finds out by the sum. */
static llamac_status check(connection *all, const dsp_request *request, dsp_reply *reply,
                           llamac_error *error) {
  const dsp_buffer *buffer = find_buffer(all, request);
  if (buffer == NULL || buffer->base == NULL || request->offset > buffer->bytes ||
      request->bytes > buffer->bytes - request->offset || request->offset % 4 != 0)
    return llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "no such bytes are mapped for space %u",
                       request->space);
  reply->checksum = dsp_checksum(buffer->base + request->offset, request->bytes);
  return LLAMAC_OK;
}

/* ---- Sessions -------------------------------------------------------------------------------- */

static llamac_status start(connection *all, slot *place, llamac_error *error) {
  if (place->session != NULL || all->weights.base == NULL)
    return llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "no weights, or the session is there already");
  if (all->weights.bytes < llamac_program_table.weights_bytes)
    return llamac_fail(error, LLAMAC_ERROR_WEIGHTS, "%llu bytes of weights, not %llu",
                       (unsigned long long)all->weights.bytes,
                       (unsigned long long)llamac_program_table.weights_bytes);
  dsp_lend(&place->arena, &place->kv);
  return llamac_session_create(&all->model, NULL, &place->session, error);
}

static void finish(slot *place) {
  llamac_session_destroy(place->session);
  place->session = NULL;
  give_back(&place->arena);
  give_back(&place->kv);
}

static llamac_status eval(slot *place, const remote_argument *data, const remote_argument *result,
                          llamac_error *error) {
  int32_t count = (int32_t)(data->buffer.bytes / sizeof(int32_t));
  llamac_status status = llamac_session_eval(place->session, data->buffer.data, count, error);
  size_t logits = (size_t)llamac_program_table.vocab_size * sizeof(float);
  if (status == LLAMAC_OK && result->buffer.bytes >= logits)
    memcpy(result->buffer.data, llamac_session_logits(place->session), logits);
  return status;
}

/* ---- Calls ----------------------------------------------------------------------------------- */

static void copy_name(char *to, size_t capacity, const char *from) {
  size_t length = 0;
  while (length + 1 < capacity && from[length] != '\0') length++;
  memcpy(to, from, length);
}

/* Takes the named level for all sessions to come. */
static llamac_status choose_level(connection *all, const remote_argument *name,
                                  llamac_error *error) {
  const llamac_program *program = all->model.program;
  const char *wanted = name->buffer.data;
  if (name->buffer.bytes == 0) return LLAMAC_OK;
  if (wanted[name->buffer.bytes - 1] != '\0')
    return llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "the name of the level has no end");
  for (uint32_t i = 0; i < program->num_levels; i++) {
    if (strcmp(program->levels[i].name, wanted) != 0) continue;
    all->model.level = &program->levels[i];
    return LLAMAC_OK;
  }
  return llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "no level named '%.40s'; the best one is %.40s",
                     wanted, program->levels[0].name);
}

static llamac_status tell(connection *all, const remote_argument *level,
                          const remote_argument *result, llamac_error *error) {
  const llamac_program *program = all->model.program;
  llamac_status status = choose_level(all, level, error);
  if (status != LLAMAC_OK) return status;
  dsp_info info = {
      .protocol_version = DSP_PROTOCOL_VERSION,
      .abi_version = program->abi_version,
      .vocab_size = program->vocab_size,
      .context_length = program->context_length,
      .max_chunk = program->max_chunk,
      .alignment = program->alignment,
      .weights_bytes = program->weights_bytes,
      .arena_bytes = program->arena_bytes,
      .kv_bytes = program->kv_bytes,
  };
  if (result->buffer.bytes < sizeof info)
    return llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "no room for the model's figures");
  memcpy(info.build_id, program->build_id, sizeof info.build_id);
  copy_name(info.model_name, sizeof info.model_name, program->model_name);
  copy_name(info.level, sizeof info.level, all->model.level->name);
  memcpy(result->buffer.data, &info, sizeof info);
  return LLAMAC_OK;
}

/* One call that has a reply; the reply is zero but for its status and message. */
static llamac_status answer(connection *all, uint32_t method, const dsp_request *request,
                            const remote_argument *arguments, dsp_reply *reply,
                            llamac_error *error) {
  if (request->session >= DSP_MAX_SESSIONS)
    return llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "no session %u", request->session);
  slot *place = &all->slots[request->session];
  switch (method) {
    case DSP_INFO:
      return tell(all, &arguments[1], &arguments[3], error);
    case DSP_LEND:
      return lend(all, request, error);
    case DSP_CHECK:
      return check(all, request, reply, error);
    case DSP_START:
      return start(all, place, error);
    case DSP_EVAL:
      return eval(place, &arguments[1], &arguments[3], error);
    case DSP_REWIND:
      return llamac_session_rewind(place->session, request->count, error);
    case DSP_FINISH:
      finish(place);
      return LLAMAC_OK;
    case DSP_UNLOAD:
      give_back(&all->weights);
      return LLAMAC_OK;
    default:
      return llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "no method %u", method);
  }
}

static int call(connection *all, uint32_t scalars, const remote_argument *arguments) {
  if (all == NULL || remote_num_in(scalars) != 2 || remote_num_out(scalars) != 2 ||
      (scalars & 0xff) != 0 || arguments[0].buffer.bytes != sizeof(dsp_request) ||
      arguments[2].buffer.bytes != sizeof(dsp_reply))
    return (int)BAD_CALL;
  dsp_request request;
  dsp_reply reply;
  llamac_error error = {LLAMAC_OK, ""};
  memcpy(&request, arguments[0].buffer.data, sizeof request);
  memset(&reply, 0, sizeof reply);
  reply.argmax = -1;
  reply.status = answer(all, remote_method(scalars), &request, arguments, &reply, &error);
  memcpy(reply.message, error.message, sizeof reply.message);
  if (request.session < DSP_MAX_SESSIONS && all->slots[request.session].session != NULL) {
    reply.position = llamac_session_position(all->slots[request.session].session);
    reply.argmax = llamac_session_argmax(all->slots[request.session].session);
  }
  memcpy(arguments[2].buffer.data, &reply, sizeof reply);
  return 0;
}

static int open_connection(remote_argument *handle) {
  connection *all = calloc(1, sizeof *all);
  if (all == NULL) return (int)0x80000402; /* AEE_ENOMEMORY */
  all->model.program = &llamac_program_table;
  all->model.level = &llamac_program_table.levels[0];
  handle->handle = (uintptr_t)all;
  return 0;
}

static int close_connection(uint64_t handle) {
  connection *all = (connection *)(uintptr_t)handle;
  if (all == NULL) return (int)BAD_CALL;
  for (uint32_t i = 0; i < DSP_MAX_SESSIONS; i++) finish(&all->slots[i]);
  give_back(&all->weights);
  free(all);
  return 0;
}

/* FastRPC calls open with two buffers in and a handle out, and close with a handle in. */
LLAMAC_API int llamac_skel_handle_invoke(uint64_t handle, uint32_t scalars,
                                         remote_argument *arguments) {
  if (scalars == remote_scalars(DSP_OPEN, 2, 0, 0, 1)) return open_connection(&arguments[2]);
  if (scalars == remote_scalars(DSP_CLOSE, 0, 0, 1, 0))
    return close_connection(arguments[0].handle);
  if (remote_method(scalars) <= DSP_CLOSE) return (int)BAD_CALL;
  return call((connection *)(uintptr_t)handle, scalars, arguments);
}
