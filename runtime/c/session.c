/* SPDX-License-Identifier: Apache-2.0
 *
 * session.c: one conversation: memory, position, and tokens cut into chunks.
 */
#include "internal.h"

#include <stdlib.h>
#include <string.h>

struct llamac_session {
  llamac_model *model;
  uint8_t *bases[3]; /* by enum llamac_space */
  llamac_pool *pool;
  llamac_executor *executor;
  int32_t position;
  const llamac_function *evaluated; /* whose logits are valid, or NULL */
  uint64_t *step_ns;                /* [program->num_steps], once profiling was enabled */
  bool is_profiling;
  atomic_flag busy; /* set while a call that computes is running */
};

/* ---- Create and destroy -------------------------------------------------------------------- */

/* Checks once what kernels rely on at every call: HVX ignores the low bits of an address, so that a
 * tensor at a wrong place would be read and written somewhere else, without any sign of it. */
static llamac_status check_alignment(const llamac_program *program, uint8_t *const bases[3],
                                     llamac_error *error) {
  for (uint32_t i = 0; i < program->num_tensors && program->alignment > 0; i++) {
    const llamac_tensor_desc *tensor = &program->tensors[i];
    uintptr_t place = (uintptr_t)bases[tensor->space] + (uintptr_t)tensor->offset;
    if (place % program->alignment != 0)
      return llamac_fail(error, LLAMAC_ERROR_WEIGHTS,
                         "tensor %u lies %u bytes behind a multiple of %u, where kernels expect it",
                         i, (unsigned)(place % program->alignment), program->alignment);
  }
  return LLAMAC_OK;
}

/* Maps the memory, starts the threads and prepares the calls. */
static llamac_status set_up(llamac_session *session, const llamac_session_options *options,
                            llamac_error *error) {
  const llamac_program *program = session->model->program;
  session->bases[LLAMAC_SPACE_WEIGHTS] = session->model->weights;
  session->bases[LLAMAC_SPACE_ARENA] = llamac_map_pages(program->arena_bytes);
  session->bases[LLAMAC_SPACE_KV] = llamac_map_pages(program->kv_bytes);
  if (!session->bases[LLAMAC_SPACE_ARENA] || !session->bases[LLAMAC_SPACE_KV])
    return llamac_fail(error, LLAMAC_ERROR_MEMORY,
                       "no memory for %llu bytes of KV cache and %llu bytes of arena",
                       (unsigned long long)program->kv_bytes,
                       (unsigned long long)program->arena_bytes);
  llamac_status status = check_alignment(program, session->bases, error);
  if (status != LLAMAC_OK) return status;
  status = llamac_pool_create(options, &session->pool, error);
  if (status != LLAMAC_OK) return status;
  session->executor =
      llamac_executor_create(session->model, session->bases, options->num_threads);
  if (session->executor == NULL)
    return llamac_fail(error, LLAMAC_ERROR_MEMORY, "no memory for the calls of kernels");
  return LLAMAC_OK;
}

/* Copies the caller's options as far as its structure reaches and fills in defaults. */
static llamac_status read_options(const llamac_session_options *given,
                                  llamac_session_options *options, llamac_error *error) {
  memset(options, 0, sizeof *options);
  if (given != NULL) {
    if (given->struct_bytes < sizeof given->struct_bytes)
      return llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "options->struct_bytes is not set");
    memcpy(options, given,
           given->struct_bytes < sizeof *options ? given->struct_bytes : sizeof *options);
  }
  if (options->num_threads == 0) options->num_threads = 1;
  return LLAMAC_OK;
}

llamac_status llamac_session_create(llamac_model *model, const llamac_session_options *options,
                                    llamac_session **out, llamac_error *error) {
  llamac_session_options complete;
  if (model == NULL || out == NULL)
    return llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "model and out must not be NULL");
  *out = NULL;
  llamac_status status = read_options(options, &complete, error);
  if (status != LLAMAC_OK) return status;
  llamac_session *session = calloc(1, sizeof *session);
  if (session == NULL) return llamac_fail(error, LLAMAC_ERROR_MEMORY, "no memory for a session");
  llamac_model_retain(model);
  session->model = model;
  atomic_flag_clear(&session->busy);
  status = set_up(session, &complete, error);
  if (status != LLAMAC_OK) {
    llamac_session_destroy(session);
    return status;
  }
  *out = session;
  return LLAMAC_OK;
}

void llamac_session_destroy(llamac_session *session) {
  if (session == NULL) return;
  const llamac_program *program = session->model->program;
  llamac_pool_destroy(session->pool);
  llamac_executor_destroy(session->executor);
  llamac_unmap_pages(session->bases[LLAMAC_SPACE_ARENA], program->arena_bytes);
  llamac_unmap_pages(session->bases[LLAMAC_SPACE_KV], program->kv_bytes);
  free(session->step_ns);
  llamac_model_release(session->model);
  free(session);
}

/* ---- Evaluate ------------------------------------------------------------------------------ */

/* The function for the next chunk of `remaining` tokens: the largest that they fill; for a rest
 * that fills none but decode, the smallest that holds it, padded. */
static const llamac_function *choose_function(const llamac_program *program, int32_t remaining) {
  const llamac_function *decode = &program->functions[program->num_functions - 1];
  if (remaining == 1 || program->num_functions == 1) return decode;
  for (const llamac_function *f = program->functions; f < decode; f++)
    if (f->num_tokens <= remaining) return f;
  return decode - 1;
}

/* Computes one chunk at `position` and returns how many tokens it took in *num_taken. */
static llamac_status eval_chunk(llamac_session *session, const int32_t *tokens, int32_t remaining,
                                int32_t position, int32_t *num_taken, llamac_error *error) {
  const llamac_function *function = choose_function(session->model->program, remaining);
  int32_t capacity = function->num_tokens;
  int32_t valid = remaining < capacity ? remaining : capacity;
  int32_t *inputs = llamac_executor_data(session->executor, function->tokens_tensor);
  int32_t *meta = llamac_executor_data(session->executor, function->meta_tensor);
  memcpy(inputs, tokens, (size_t)valid * sizeof *tokens);
  /* Padding computes rows behind the valid ones; no valid row ever looks at them. */
  memset(inputs + valid, 0, (size_t)(capacity - valid) * sizeof *tokens);
  meta[0] = position;
  meta[1] = valid - 1;
  uint32_t count = function->num_steps;
  if (valid < remaining) count -= function->num_logits_steps;
  session->evaluated = function;
  *num_taken = valid;
  return llamac_execute(session->executor, session->pool, function, 0, count,
                        session->is_profiling ? session->step_ns : NULL, error);
}

/* Computes all tokens; the session keeps its position unless all went well. */
static llamac_status eval_all(llamac_session *session, const int32_t *tokens, int32_t num_tokens,
                              llamac_error *error) {
  llamac_status status = LLAMAC_OK;
  int32_t done = 0, taken = 0;
  while (done < num_tokens && status == LLAMAC_OK) {
    status = eval_chunk(session, tokens + done, num_tokens - done, session->position + done,
                        &taken, error);
    done += taken;
  }
  if (status == LLAMAC_OK)
    session->position += num_tokens;
  else
    session->evaluated = NULL;
  return status;
}

/* Says what is wrong with the tokens, before anything is computed. */
static llamac_status check_tokens(const llamac_session *session, const int32_t *tokens,
                                  int32_t num_tokens, llamac_error *error) {
  const llamac_program *program = session->model->program;
  if (tokens == NULL || num_tokens < 1)
    return llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "no tokens to evaluate");
  if (num_tokens > program->context_length - session->position)
    return llamac_fail(error, LLAMAC_ERROR_CONTEXT,
                       "%d tokens at position %d do not fit into a context of %d", num_tokens,
                       session->position, program->context_length);
  for (int32_t i = 0; i < num_tokens; i++)
    if (tokens[i] < 0 || tokens[i] >= program->vocab_size)
      return llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "token %d is %d, not 0 to %d", i, tokens[i],
                         program->vocab_size - 1);
  return LLAMAC_OK;
}

/* Takes the session for a call that computes. */
static llamac_status enter(llamac_session *session, llamac_error *error) {
  if (session == NULL) return llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "session is NULL");
  if (atomic_flag_test_and_set(&session->busy))
    return llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "another thread is using this session");
  return LLAMAC_OK;
}

/* Gives the session back and passes the status on. */
static llamac_status leave(llamac_session *session, llamac_status status) {
  atomic_flag_clear(&session->busy);
  return status;
}

llamac_status llamac_session_eval(llamac_session *session, const int32_t *tokens,
                                  int32_t num_tokens, llamac_error *error) {
  llamac_status status = enter(session, error);
  if (status != LLAMAC_OK) return status;
  status = check_tokens(session, tokens, num_tokens, error);
  if (status == LLAMAC_OK) status = eval_all(session, tokens, num_tokens, error);
  return leave(session, status);
}

llamac_status llamac_session_rewind(llamac_session *session, int32_t position,
                                    llamac_error *error) {
  llamac_status status = enter(session, error);
  if (status != LLAMAC_OK) return status;
  if (position < 0 || position > session->position)
    status = llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "cannot rewind from position %d to %d",
                         session->position, position);
  else
    session->position = position;
  return leave(session, status);
}

/* ---- Results ------------------------------------------------------------------------------- */

const float *llamac_session_logits(const llamac_session *session) {
  if (session == NULL || session->evaluated == NULL) return NULL;
  return llamac_executor_data(session->executor, session->evaluated->logits_tensor);
}

int32_t llamac_session_argmax(const llamac_session *session) {
  if (session == NULL || session->evaluated == NULL) return -1;
  const int32_t *argmax =
      llamac_executor_data(session->executor, session->evaluated->argmax_tensor);
  return *argmax;
}

int32_t llamac_session_position(const llamac_session *session) {
  return session != NULL ? session->position : 0;
}

/* ---- Verification and measurement ---------------------------------------------------------- */

/* The function of that name, or NULL. */
static const llamac_function *find_function(const llamac_session *session, const char *name) {
  if (session == NULL || name == NULL) return NULL;
  const llamac_program *program = session->model->program;
  for (uint32_t i = 0; i < program->num_functions; i++)
    if (strcmp(program->functions[i].name, name) == 0) return &program->functions[i];
  return NULL;
}

llamac_status llamac_session_run_steps(llamac_session *session, const char *function,
                                       uint32_t first, uint32_t count, llamac_error *error) {
  llamac_status status = enter(session, error);
  if (status != LLAMAC_OK) return status;
  const llamac_function *found = find_function(session, function);
  if (found == NULL)
    status = llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "no function named '%.40s'",
                         function ? function : "");
  else if (first > found->num_steps || count > found->num_steps - first)
    status = llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "%s has %u steps, not %llu", found->name,
                         found->num_steps, (unsigned long long)first + count);
  else
    status = llamac_execute(session->executor, session->pool, found, first, count,
                            session->is_profiling ? session->step_ns : NULL, error);
  return leave(session, status);
}

void *llamac_session_memory(llamac_session *session, int32_t space) {
  if (session == NULL || space < LLAMAC_SPACE_WEIGHTS || space > LLAMAC_SPACE_KV) return NULL;
  return session->bases[space];
}

llamac_status llamac_session_profile(llamac_session *session, int enable) {
  if (session == NULL) return LLAMAC_ERROR_ARGUMENT;
  const size_t num_steps = session->model->program->num_steps;
  if (enable && session->step_ns == NULL) {
    session->step_ns = calloc(num_steps, sizeof *session->step_ns);
    if (session->step_ns == NULL) return LLAMAC_ERROR_MEMORY;
  } else if (enable) {
    memset(session->step_ns, 0, num_steps * sizeof *session->step_ns);
  }
  session->is_profiling = enable != 0;
  return LLAMAC_OK;
}

const uint64_t *llamac_session_step_ns(const llamac_session *session, const char *function,
                                       uint32_t *count) {
  const llamac_function *found = find_function(session, function);
  bool is_known = found != NULL && session->step_ns != NULL;
  if (count != NULL) *count = is_known ? found->num_steps : 0;
  return is_known ? session->step_ns + found->first_step : NULL;
}
