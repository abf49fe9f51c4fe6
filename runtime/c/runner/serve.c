/* SPDX-License-Identifier: Apache-2.0
 *
 * serve.c: the model as a server on standard input and output; runtime/remote.py is the client.
 *
 *     request   uint32 operation, uint32 session, uint64 bytes, then so many bytes of payload
 *     reply     uint32 status, uint32 zero, uint64 bytes, then so many bytes
 *
 * All numbers are little endian. A status other than 0 is a llamac_status, and the reply is its
 * message. One request is answered before the next one is read. A request that cannot be read ends
 * the program; all others leave it able to go on, whatever they hold.
 *
 *     operation    payload                                  reply
 *     HELLO        -                                        uint32 protocol, uint32 ABI version,
 *                                                           uint64 features, their names
 *     OPEN         level or "", NUL, path of the weights    runner_info, model name, NUL, level
 *     CREATE       int32 threads, int32 cpus[]              uint32 session
 *     DESTROY      -                                        -
 *     EVAL         int32 tokens[]                           -
 *     LOGITS       -                                        float logits[vocab_size]
 *     ARGMAX       -                                        int32
 *     POSITION     -                                        int32
 *     REWIND       int32 position                           -
 *     RUN_STEPS    uint32 first, uint32 count, function     -
 *     READ         runner_range                             bytes
 *     WRITE        runner_range (bytes: 0), then bytes      -
 *     PROFILE      uint32 enable                            -
 *     STEP_NS      function                                 uint64 nanoseconds[steps]
 */
#include "runner.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the protocol is little endian");

enum {
  PROTOCOL_VERSION = 1,
  MAX_SESSIONS = 64,
  MAX_PAYLOAD = 64 << 20,
  EXIT_HOST_GONE = 3,
  EXIT_BAD_REQUEST = 4,
};

enum operation {
  HELLO = 1, OPEN, CREATE, DESTROY, EVAL, LOGITS, ARGMAX, POSITION, REWIND, RUN_STEPS, READ, WRITE,
  PROFILE, STEP_NS,
};

typedef struct {
  uint32_t first, session;
  uint64_t bytes;
} frame; /* of a request (first: operation) and of a reply (first: status) */

typedef struct {
  int32_t vocab_size, context_length, max_chunk, zero;
  uint64_t weights_bytes, kv_bytes, arena_bytes;
} runner_info;

typedef struct {
  uint32_t space, zero;
  uint64_t offset, bytes;
} runner_range;

typedef struct {
  int in, out;
  llamac_model *model;
  llamac_model_info_t info;
  llamac_session *sessions[MAX_SESSIONS];
  /* The request. The payload has a NUL behind its end, so that text in it always ends. */
  uint32_t session;
  uint8_t *payload;
  uint64_t bytes;
} server;

/* ---- Bytes --------------------------------------------------------------------------------- */

/* Reads exactly so many bytes; false at the end of the input. */
static bool read_all(int file, void *place, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    ssize_t got = read(file, (char *)place + done, bytes - done);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    done += (size_t)got;
  }
  return true;
}

/* Writes all bytes; ends the program if nobody reads them any more. */
static void write_all(int file, const void *data, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    ssize_t put = write(file, (const char *)data + done, bytes - done);
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0) _exit(EXIT_HOST_GONE);
    done += (size_t)put;
  }
}

static void reply(server *s, uint32_t status, const void *data, uint64_t bytes) {
  frame head = {status, 0, bytes};
  write_all(s->out, &head, sizeof head);
  if (bytes > 0) write_all(s->out, data, (size_t)bytes);
}

/* Answers a call that only has a status. */
static void reply_status(server *s, llamac_status status, const llamac_error *error) {
  if (status == LLAMAC_OK)
    reply(s, LLAMAC_OK, NULL, 0);
  else
    reply(s, status, error->message, strlen(error->message));
}

static void refuse(server *s, const char *message) {
  reply(s, LLAMAC_ERROR_ARGUMENT, message, strlen(message));
}

/* ---- Operations ---------------------------------------------------------------------------- */

static void hello(server *s) {
  struct {
    uint32_t protocol, abi;
    uint64_t features;
    char names[256];
  } answer = {PROTOCOL_VERSION, llamac_abi_version(), llamac_cpu_features(), ""};
  llamac_feature_names(answer.features, answer.names, sizeof answer.names);
  reply(s, LLAMAC_OK, &answer, offsetof(__typeof__(answer), names) + strlen(answer.names));
}

static void reply_info(server *s) {
  const llamac_model_info_t *m = &s->info;
  runner_info head = {m->vocab_size,    m->context_length, m->max_chunk,  0,
                      m->weights_bytes, m->kv_bytes,       m->arena_bytes};
  size_t name = strlen(m->model_name) + 1, level = strlen(m->level);
  uint8_t *answer = malloc(sizeof head + name + level);
  if (answer == NULL) {
    reply(s, LLAMAC_ERROR_MEMORY, NULL, 0);
    return;
  }
  memcpy(answer, &head, sizeof head);
  memcpy(answer + sizeof head, m->model_name, name);
  memcpy(answer + sizeof head + name, m->level, level);
  reply(s, LLAMAC_OK, answer, sizeof head + name + level);
  free(answer);
}

static void open_model(server *s) {
  const char *level = (const char *)s->payload;
  size_t level_bytes = strlen(level) + 1;
  if (s->model != NULL || level_bytes > s->bytes) {
    refuse(s, s->model != NULL ? "a model is open" : "the request names no weights");
    return;
  }
  llamac_error error = {.message = ""};
  llamac_status status =
      llamac_model_open(level + level_bytes, level[0] ? level : NULL, &s->model, &error);
  if (status != LLAMAC_OK) {
    reply_status(s, status, &error);
    return;
  }
  s->info.struct_bytes = sizeof s->info;
  llamac_model_info(s->model, &s->info);
  reply_info(s);
}

static void create_session(server *s) {
  uint32_t slot = 0;
  while (slot < MAX_SESSIONS && s->sessions[slot] != NULL) slot++;
  size_t count = s->bytes / sizeof(int32_t);
  if (s->model == NULL || slot == MAX_SESSIONS || count < 1 || count > 1 + LLAMAC_MAX_THREADS) {
    refuse(s, s->model == NULL          ? "no model is open"
              : slot == MAX_SESSIONS ? "too many sessions are open"
                                     : "wrong numbers of threads and CPUs");
    return;
  }
  const int32_t *numbers = (const int32_t *)(const void *)s->payload;
  llamac_session_options options = {.struct_bytes = sizeof options, .num_threads = numbers[0]};
  options.num_cpus = (int32_t)count - 1;
  options.cpus = count > 1 ? numbers + 1 : NULL;
  llamac_error error = {.message = ""};
  llamac_status status = llamac_session_create(s->model, &options, &s->sessions[slot], &error);
  if (status == LLAMAC_OK)
    reply(s, LLAMAC_OK, &slot, sizeof slot);
  else
    reply_status(s, status, &error);
}

static void run_steps(server *s, llamac_session *session) {
  uint32_t range[2];
  if (s->bytes < sizeof range) {
    refuse(s, "the request has no range of steps");
    return;
  }
  memcpy(range, s->payload, sizeof range);
  llamac_error error = {.message = ""};
  const char *function = (const char *)s->payload + sizeof range;
  llamac_status status =
      llamac_session_run_steps(session, function, range[0], range[1], &error);
  reply_status(s, status, &error);
}

/* Where a range begins, or NULL (and an answer) if it is not inside its space. */
static uint8_t *find_range(server *s, llamac_session *session, runner_range *range) {
  bool is_write = s->bytes > sizeof *range;
  if (s->bytes < sizeof *range) {
    refuse(s, "the request has no range of memory");
    return NULL;
  }
  memcpy(range, s->payload, sizeof *range);
  if (is_write) range->bytes = s->bytes - sizeof *range;
  const uint64_t sizes[] = {s->info.weights_bytes, s->info.arena_bytes, s->info.kv_bytes};
  if (range->space > LLAMAC_SPACE_KV || range->offset > sizes[range->space] ||
      range->bytes > sizes[range->space] - range->offset) {
    refuse(s, "the range is not inside the memory");
    return NULL;
  }
  uint8_t *base = llamac_session_memory(session, (int32_t)range->space);
  return base + range->offset;
}

static void read_memory(server *s, llamac_session *session) {
  runner_range range;
  if (s->bytes > sizeof range) {
    refuse(s, "only a range is needed to read");
    return;
  }
  const uint8_t *place = find_range(s, session, &range);
  if (place != NULL) reply(s, LLAMAC_OK, place, range.bytes);
}

static void write_memory(server *s, llamac_session *session) {
  runner_range range;
  uint8_t *place = find_range(s, session, &range);
  if (place == NULL) return;
  if (range.space == LLAMAC_SPACE_WEIGHTS) {
    refuse(s, "the weights cannot be written");
    return;
  }
  memcpy(place, s->payload + sizeof range, s->bytes - sizeof range);
  reply(s, LLAMAC_OK, NULL, 0);
}

/* The payload's first number, 0 if there is none. */
static int32_t number(const server *s) {
  int32_t value = 0;
  if (s->bytes >= sizeof value) memcpy(&value, s->payload, sizeof value);
  return value;
}

static void logits(server *s, llamac_session *session) {
  static const char none[] = "nothing was evaluated";
  const float *values = llamac_session_logits(session);
  if (values != NULL)
    reply(s, LLAMAC_OK, values, (uint64_t)s->info.vocab_size * sizeof *values);
  else
    reply(s, LLAMAC_ERROR_KERNEL, none, sizeof none - 1);
}

static void in_session(server *s, enum operation operation, llamac_session *session) {
  llamac_error error = {.message = ""};
  uint32_t count = 0;
  int32_t value;
  const uint64_t *times;
  switch (operation) {
    case DESTROY:
      llamac_session_destroy(session);
      s->sessions[s->session] = NULL;
      reply(s, LLAMAC_OK, NULL, 0);
      return;
    case EVAL:
      value = (int32_t)(s->bytes / sizeof(int32_t)); /* fits: MAX_PAYLOAD */
      reply_status(s,
                   llamac_session_eval(session, (const int32_t *)(const void *)s->payload, value,
                                       &error),
                   &error);
      return;
    case LOGITS: logits(s, session); return;
    case ARGMAX:
    case POSITION:
      value = operation == ARGMAX ? llamac_session_argmax(session)
                                  : llamac_session_position(session);
      reply(s, LLAMAC_OK, &value, sizeof value);
      return;
    case REWIND: reply_status(s, llamac_session_rewind(session, number(s), &error), &error); return;
    case RUN_STEPS: run_steps(s, session); return;
    case READ: read_memory(s, session); return;
    case WRITE: write_memory(s, session); return;
    case PROFILE:
      reply_status(s, llamac_session_profile(session, number(s)), &error);
      return;
    case STEP_NS:
      times = llamac_session_step_ns(session, (const char *)s->payload, &count);
      reply(s, LLAMAC_OK, times, count * sizeof *times);
      return;
    default: refuse(s, "unknown operation");
  }
}

/* ---- Serving ------------------------------------------------------------------------------- */

/* Reads a request; false at the end of the input. */
static bool receive(server *s, frame *head) {
  if (!read_all(s->in, head, sizeof *head)) return false;
  if (head->bytes > MAX_PAYLOAD) {
    refuse(s, "the request is too long");
    _exit(EXIT_BAD_REQUEST);
  }
  uint8_t *payload = realloc(s->payload, (size_t)head->bytes + 1);
  if (payload == NULL) {
    reply(s, LLAMAC_ERROR_MEMORY, NULL, 0);
    _exit(EXIT_BAD_REQUEST);
  }
  s->payload = payload;
  s->payload[head->bytes] = 0;
  s->bytes = head->bytes;
  s->session = head->session;
  return read_all(s->in, s->payload, (size_t)head->bytes);
}

static void answer(server *s, enum operation operation) {
  switch (operation) {
    case HELLO: hello(s); return;
    case OPEN: open_model(s); return;
    case CREATE: create_session(s); return;
    default: break;
  }
  if (s->session >= MAX_SESSIONS || s->sessions[s->session] == NULL)
    refuse(s, "no such session");
  else
    in_session(s, operation, s->sessions[s->session]);
}

int runner_serve(void) {
  static server s;
  frame head;
  /* Whatever else may print must not get between the replies. */
  s.in = STDIN_FILENO;
  s.out = dup(STDOUT_FILENO);
  if (s.out < 0 || dup2(STDERR_FILENO, STDOUT_FILENO) < 0) return EXIT_HOST_GONE;
  setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0}); /* a crash leaves no file behind */
  while (receive(&s, &head)) answer(&s, (enum operation)head.first);
  for (int i = 0; i < MAX_SESSIONS; i++) llamac_session_destroy(s.sessions[i]);
  llamac_model_close(s.model);
  free(s.payload);
  return 0;
}
