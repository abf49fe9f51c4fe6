/* Generates token ids greedily: generate WEIGHTS_BIN NUM_TOKENS ID [ID ...]
 * Linked against the lib/libmodel.so of a bundle; see README.md. */
#include <stdio.h>
#include <stdlib.h>

#include "llamac.h"

/* Ends the program with the library's message if a call failed. */
static void check(llamac_status status, const llamac_error *error) {
  if (status == LLAMAC_OK) return;
  fprintf(stderr, "llamac error %d: %s\n", status, error->message);
  exit(1);
}

int main(int argc, char **argv) {
  if (argc < 4) {
    fprintf(stderr, "usage: %s WEIGHTS_BIN NUM_TOKENS ID [ID ...]\n", argv[0]);
    return 2;
  }
  llamac_error error;
  llamac_model *model;
  llamac_session *session;
  llamac_session_options options = {.struct_bytes = sizeof options, .num_threads = 2};
  check(llamac_model_open(argv[1], NULL, &model, &error), &error);
  check(llamac_session_create(model, &options, &session, &error), &error);

  int32_t num_prompt = argc - 3;
  int32_t *prompt = calloc((size_t)num_prompt, sizeof *prompt);
  for (int32_t i = 0; prompt && i < num_prompt; i++) prompt[i] = atoi(argv[3 + i]);
  check(llamac_session_eval(session, prompt, num_prompt, &error), &error);
  free(prompt);

  for (int i = atoi(argv[2]); i > 0; i--) {
    int32_t token = llamac_session_argmax(session);
    printf("%d\n", token);
    if (i > 1) check(llamac_session_eval(session, &token, 1, &error), &error);
  }
  llamac_session_destroy(session);
  llamac_model_close(model);
}
