/* SPDX-License-Identifier: Apache-2.0
 *
 * execute.c: walks the list of steps.
 *
 * All threads walk the whole list. Thread t of n calls each kernel for the work items
 * [t * work / n, (t + 1) * work / n); a step with one item belongs to thread 0. Before a step, a
 * thread waits only for those whose results it may need:
 *
 *     step before     this step       who waits for whom
 *     all threads     all threads     everyone for everyone
 *     all threads     thread 0        thread 0 for everyone; the others go on
 *     thread 0        thread 0        nobody
 *     thread 0        all threads     everyone for thread 0 (which has waited for everyone before)
 *
 * Nothing is allocated or built while walking: tensors and arguments are prepared once.
 */
#include "internal.h"
#include "kernel_marks.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_DIMS = 4 };

struct llamac_executor {
  const llamac_program *program;
  const llamac_level *level;
  void *accelerator;       /* what kernels take first; those of this processor ignore it */
  DLTensor *tensors;       /* [num_tensors] */
  int64_t *strides;        /* [num_tensors][MAX_DIMS] */
  uint32_t *first_argument; /* [num_steps + 1], into a thread's arguments */
  TVMFFIAny *arguments;    /* [num_threads][first_argument[num_steps]] */
  int32_t num_threads;
  /* The current run. */
  llamac_pool *pool;
  const llamac_step *steps; /* the first step of the run */
  uint32_t count;
  uint64_t *step_ns; /* of the first step of the run, or NULL */
  uint64_t step_started_ns;
  /* The first failure of the run. */
  atomic_bool failed;
  uint32_t failed_step; /* counted from `steps` */
  char failed_text[160];
};

/* ---- Preparing ----------------------------------------------------------------------------- */

/* Fills the view of one tensor. */
static void make_tensor(const llamac_tensor_desc *desc, uint8_t *base, int64_t *strides,
                        DLTensor *tensor) {
  int64_t stride = 1;
  for (int d = desc->ndim - 1; d >= 0; d--) {
    strides[d] = stride;
    stride *= desc->shape[d];
  }
  tensor->data = base + desc->offset;
  tensor->device.device_type = 1;
  tensor->ndim = desc->ndim;
  tensor->dtype.code = desc->dtype_code;
  tensor->dtype.bits = desc->dtype_bits;
  tensor->dtype.lanes = 1;
  tensor->shape = (int64_t *)(uintptr_t)desc->shape; /* kernels only read shapes */
  tensor->strides = strides;
}

/* Fills the arguments of one step for one thread: tensors, begin, end. */
static void make_arguments(const llamac_executor *executor, const llamac_step *step,
                           int32_t thread, TVMFFIAny *arguments) {
  const uint32_t *operands = executor->program->operands + step->first_operand;
  int64_t n = step->work == 1 ? 1 : executor->num_threads;
  for (uint16_t i = 0; i < step->num_operands; i++) {
    arguments[i].type_index = LLAMAC_FFI_DLTENSOR;
    arguments[i].v_ptr = &executor->tensors[operands[i]];
  }
  arguments += step->num_operands;
  arguments[0].type_index = arguments[1].type_index = LLAMAC_FFI_INT;
  arguments[0].v_int64 = thread * step->work / n;
  arguments[1].v_int64 = (thread + 1) * step->work / n;
}

/* Allocates everything, zeroed; false without memory. */
static bool allocate(llamac_executor *executor) {
  const llamac_program *program = executor->program;
  executor->tensors = calloc(program->num_tensors, sizeof *executor->tensors);
  executor->strides = calloc(program->num_tensors, MAX_DIMS * sizeof *executor->strides);
  executor->first_argument = calloc(program->num_steps + 1, sizeof *executor->first_argument);
  if (!executor->tensors || !executor->strides || !executor->first_argument) return false;
  for (uint32_t s = 0; s < program->num_steps; s++)
    executor->first_argument[s + 1] =
        executor->first_argument[s] + program->steps[s].num_operands + 2;
  executor->arguments = calloc(executor->first_argument[program->num_steps],
                               (size_t)executor->num_threads * sizeof *executor->arguments);
  return executor->arguments != NULL;
}

/* The prepared arguments of a step (an index into program->steps) for a thread. */
static TVMFFIAny *arguments_of(const llamac_executor *executor, uint32_t step, int32_t thread) {
  size_t per_thread = executor->first_argument[executor->program->num_steps];
  return executor->arguments + (size_t)thread * per_thread + executor->first_argument[step];
}

llamac_executor *llamac_executor_create(const llamac_model *model, uint8_t *const bases[3],
                                        int32_t num_threads) {
  const llamac_program *program = model->program;
  llamac_executor *executor = calloc(1, sizeof *executor);
  if (executor == NULL) return NULL;
  executor->program = program;
  executor->level = model->level;
  executor->accelerator = model->accelerator;
  executor->num_threads = num_threads;
  atomic_init(&executor->failed, false);
  if (!allocate(executor)) {
    llamac_executor_destroy(executor);
    return NULL;
  }
  for (uint32_t i = 0; i < program->num_tensors; i++)
    make_tensor(&program->tensors[i], bases[program->tensors[i].space],
                executor->strides + MAX_DIMS * (size_t)i, &executor->tensors[i]);
  for (int32_t t = 0; t < num_threads; t++)
    for (uint32_t s = 0; s < program->num_steps; s++)
      make_arguments(executor, &program->steps[s], t, arguments_of(executor, s, t));
  return executor;
}

void llamac_executor_destroy(llamac_executor *executor) {
  if (executor == NULL) return;
  free(executor->tensors);
  free(executor->strides);
  free(executor->first_argument);
  free(executor->arguments);
  free(executor);
}

void *llamac_executor_data(const llamac_executor *executor, uint32_t tensor) {
  return executor->tensors[tensor].data;
}

/* ---- Running ------------------------------------------------------------------------------- */

/* True if only thread 0 has something to do. */
static inline bool is_alone(const llamac_step *step) { return step->work == 1; }

/* Waits for the results that step i of the run needs (the table at the top of this file). */
static void wait_before(const llamac_executor *executor, int32_t thread, uint32_t i) {
  if (i == 0) return;
  if (!is_alone(&executor->steps[i - 1]))
    llamac_pool_wait_others(executor->pool, thread, i);
  else if (thread != 0)
    llamac_pool_wait(executor->pool, 0, i);
}

/* Keeps the first failure; the other threads see it before their next step. */
static void record_failure(llamac_executor *executor, uint32_t i) {
  char text[sizeof executor->failed_text];
  llamac_take_kernel_error(text, sizeof text);
  if (atomic_exchange(&executor->failed, true)) return;
  executor->failed_step = i;
  memcpy(executor->failed_text, text, sizeof text);
}

/* Calls the kernel of step i for this thread's share; false if it failed. */
static bool call_kernel(llamac_executor *executor, int32_t thread, uint32_t i) {
  const llamac_step *step = &executor->steps[i];
  uint32_t index = (uint32_t)(step - executor->program->steps);
  TVMFFIAny *arguments = arguments_of(executor, index, thread);
  TVMFFIAny result = {.type_index = LLAMAC_FFI_NONE};
  const TVMFFIAny *range = arguments + step->num_operands;
  if (range[0].v_int64 == range[1].v_int64) return true; /* fewer items than threads */
  llamac_kernel kernel = executor->level->kernels[step->kernel];
  llamac_mark_begin();
  int32_t status = kernel(executor->accelerator, arguments, step->num_operands + 2, &result);
  llamac_mark_end();
  if (status == 0) return true;
  record_failure(executor, i);
  return false;
}

/* Ends the time of the step before i and starts that of step i. */
static void measure(llamac_executor *executor, uint32_t i) {
  uint64_t now = llamac_now_ns();
  if (i > 0) executor->step_ns[i - 1] += now - executor->step_started_ns;
  executor->step_started_ns = now;
}

/* What every thread does in a run. */
static void walk(void *context, int32_t thread) {
  llamac_executor *executor = context;
  for (uint32_t i = 0; i < executor->count; i++) {
    if (thread != 0 && is_alone(&executor->steps[i])) continue;
    wait_before(executor, thread, i);
    if (atomic_load_explicit(&executor->failed, memory_order_relaxed)) return;
    if (thread == 0 && executor->step_ns != NULL) measure(executor, i);
    if (!call_kernel(executor, thread, i)) return;
    llamac_pool_publish(executor->pool, thread, i + 1);
  }
}

/* Turns the recorded failure into an error. */
static llamac_status report_failure(const llamac_executor *executor,
                                    const llamac_function *function, llamac_error *error) {
  const llamac_step *step = &executor->steps[executor->failed_step];
  const char *text = executor->failed_text[0] ? executor->failed_text : "no message";
  return llamac_fail(error, LLAMAC_ERROR_KERNEL, "kernel %.40s (step %u of %.20s) failed: %s",
                     executor->program->kernel_names[step->kernel],
                     (uint32_t)(step - executor->program->steps) - function->first_step,
                     function->name, text);
}

llamac_status llamac_execute(llamac_executor *executor, llamac_pool *pool,
                             const llamac_function *function, uint32_t first, uint32_t count,
                             uint64_t *step_ns, llamac_error *error) {
  if (count == 0) return LLAMAC_OK;
  uint32_t begin = function->first_step + first;
  executor->pool = pool;
  executor->steps = executor->program->steps + begin;
  executor->count = count;
  executor->step_ns = step_ns != NULL ? step_ns + begin : NULL;
  atomic_store(&executor->failed, false);
  llamac_status status = llamac_pool_run(pool, walk, executor, count, error);
  if (status != LLAMAC_OK) return status;
  if (atomic_load(&executor->failed)) return report_failure(executor, function, error);
  if (executor->step_ns != NULL) measure(executor, count);
  return LLAMAC_OK;
}
