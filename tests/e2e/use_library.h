/* SPDX-License-Identifier: Apache-2.0
 *
 * use_library.h: what the loaders of the tests do with a library once they have loaded it.
 */
#ifndef LLAMAC_USE_LIBRARY_H
#define LLAMAC_USE_LIBRARY_H

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "llamac.h"

enum { MAX_PROMPT = 64 };

/* The library's symbol of that name; the loader defines it. */
static void *own(const char *name);

static void die(const char *what, const char *which) {
  fprintf(stderr, "%s: %s\n", what, which);
  exit(3);
}

/* Calls a function of the library, declared in llamac.h. */
#define CALL(name) ((__typeof__(&name))own(#name))

static void check(llamac_status status, const llamac_error *error) {
  if (status != LLAMAC_OK) die("llamac", error->message);
}

/* An error that the system numbered has its text: errno is where the library looks for it. */
static void check_errno(void) {
  llamac_error error;
  llamac_model *model;
  if (CALL(llamac_model_open)("/nonexistent", NULL, &model, &error) == LLAMAC_OK ||
      strstr(error.message, strerror(ENOENT)) == NULL)
    die("errno is not the system's", error.message);
}

/* A session whose thread is pinned: sets of CPUs are where the library looks for them. */
static void check_affinity(llamac_model *model) {
  llamac_error error;
  llamac_session *session;
  int32_t cpu = sched_getcpu();
  llamac_session_options options = {
      .struct_bytes = sizeof options, .num_threads = 1, .cpus = &cpu, .num_cpus = 1};
  check(CALL(llamac_session_create)(model, &options, &session, &error), &error);
  CALL(llamac_session_destroy)(session);
}

static void generate(llamac_model *model, int32_t *prompt, int num_prompt, int count) {
  llamac_error error;
  llamac_session *session;
  llamac_session_options options = {.struct_bytes = sizeof options, .num_threads = 2};
  check(CALL(llamac_session_create)(model, &options, &session, &error), &error);
  check(CALL(llamac_session_eval)(session, prompt, num_prompt, &error), &error);
  for (; count > 0; count--) {
    int32_t token = CALL(llamac_session_argmax)(session);
    printf("%d\n", token);
    check(CALL(llamac_session_eval)(session, &token, 1, &error), &error);
  }
  CALL(llamac_session_destroy)(session);
}

/* Everything, and the tokens on standard output. arguments: WEIGHTS COUNT ID... */
static void use_library(int num_arguments, char **arguments) {
  llamac_error error;
  llamac_model *model;
  int32_t prompt[MAX_PROMPT];
  int num_prompt = num_arguments - 2;
  if (num_prompt < 1 || num_prompt > MAX_PROMPT) die("usage", "LIBRARY WEIGHTS COUNT ID...");
  for (int i = 0; i < num_prompt; i++) prompt[i] = atoi(arguments[2 + i]);
  check_errno();
  check(CALL(llamac_model_open)(arguments[0], NULL, &model, &error), &error);
  check_affinity(model);
  generate(model, prompt, num_prompt, atoi(arguments[1]));
  CALL(llamac_model_close)(model);
}

#endif /* LLAMAC_USE_LIBRARY_H */
