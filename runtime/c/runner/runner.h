/* SPDX-License-Identifier: Apache-2.0
 *
 * runner.h: what the files of llamac-runner share.
 *
 * llamac-runner is a whole model as one static program: the bundle's kernels, the support library
 * and these files. It runs wherever the processor's Linux kernel or an emulator of it does, without
 * Python and without any library: on a phone over adb, on a board over ssh, under qemu-user.
 */
#ifndef LLAMAC_RUNNER_H
#define LLAMAC_RUNNER_H

#include "internal.h"

/* Serves requests from standard input on standard output until the input ends (serve.c).
 * Returns the exit code. */
int runner_serve(void);

/* ---- packets.c ---- */

/* Writes what each call of a kernel executes into a file, until the program ends; false if it
 * cannot be written or the processor does not count. */
bool runner_count_packets(const char *path);

/* ---- text.c ---- */

/* The bytes of a token; they lie in the vocabulary's text. */
typedef struct {
  const char *bytes;
  uint32_t num_bytes;
} runner_token;

typedef struct {
  char *text;
  runner_token *tokens; /* [num_tokens] */
  uint32_t num_tokens;
} runner_vocabulary;

/* Reads tokenizer.model; false if it is missing or damaged. To be freed in both cases. */
bool runner_read_vocabulary(const char *path, uint32_t num_tokens, runner_vocabulary *vocabulary);
void runner_free_vocabulary(runner_vocabulary *vocabulary);

/* Writes the bytes of a token to standard output; special tokens have none. */
void runner_print_token(const runner_vocabulary *vocabulary, int32_t token);

#endif /* LLAMAC_RUNNER_H */
