/* SPDX-License-Identifier: Apache-2.0
 *
 * text.c: from token ids to text. tokenizer.model has a line for each token: its bytes in base64, a
 * space, its id. Special tokens have no line and no text.
 */
#include "runner.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_FILE_BYTES = 256 << 20 };

/* The whole file with a NUL behind it, or NULL. */
static char *read_file(const char *path, size_t *bytes) {
  FILE *file = fopen(path, "rb");
  if (file == NULL) return NULL;
  char *text = NULL;
  long size = fseek(file, 0, SEEK_END) == 0 ? ftell(file) : -1;
  if (size >= 0 && size <= MAX_FILE_BYTES && fseek(file, 0, SEEK_SET) == 0)
    text = malloc((size_t)size + 1);
  if (text != NULL) {
    *bytes = fread(text, 1, (size_t)size, file);
    text[*bytes] = '\0';
  }
  fclose(file);
  return text;
}

/* Value of a base64 digit, or -1. */
static int digit(char c) {
  static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  const char *found = c != '\0' ? strchr(digits, c) : NULL;
  return found != NULL ? (int)(found - digits) : -1;
}

/* Decodes base64 up to the space behind it, in place: the bytes are fewer than the digits. Returns
 * the place of the space, or NULL if there is something else before it. */
static char *decode_base64(char *text, uint32_t *num_bytes) {
  uint32_t bits = 0, count = 0, held = 0;
  char *c = text;
  for (; digit(*c) >= 0; c++) {
    bits = bits << 6 | (uint32_t)digit(*c);
    held += 6;
    if (held >= 8) {
      held -= 8;
      text[count++] = (char)(bits >> held);
    }
  }
  while (*c == '=') c++;
  *num_bytes = count;
  return *c == ' ' && count > 0 ? c : NULL;
}

/* Reads one line at `text`; returns the place behind it, or NULL if it is none. */
static char *read_line(runner_vocabulary *vocabulary, char *text) {
  uint32_t num_bytes;
  char *end, *space = decode_base64(text, &num_bytes);
  if (space == NULL) return NULL;
  unsigned long id = strtoul(space + 1, &end, 10);
  if (end == space + 1 || (*end != '\n' && *end != '\r' && *end != '\0')) return NULL;
  if (id < vocabulary->num_tokens) vocabulary->tokens[id] = (runner_token){text, num_bytes};
  while (*end == '\r' || *end == '\n') end++;
  return end;
}

bool runner_read_vocabulary(const char *path, uint32_t num_tokens, runner_vocabulary *vocabulary) {
  size_t bytes = 0;
  vocabulary->num_tokens = num_tokens;
  vocabulary->text = read_file(path, &bytes);
  vocabulary->tokens = calloc(num_tokens, sizeof *vocabulary->tokens);
  if (vocabulary->text == NULL || vocabulary->tokens == NULL || bytes == 0) return false;
  const char *end = vocabulary->text + bytes;
  for (char *line = vocabulary->text; line < end;) {
    line = read_line(vocabulary, line);
    if (line == NULL) return false;
  }
  return true;
}

void runner_print_token(const runner_vocabulary *vocabulary, int32_t token) {
  if (token < 0 || (uint32_t)token >= vocabulary->num_tokens) return;
  fwrite(vocabulary->tokens[token].bytes, 1, vocabulary->tokens[token].num_bytes, stdout);
}

void runner_free_vocabulary(runner_vocabulary *vocabulary) {
  free(vocabulary->text);
  free(vocabulary->tokens);
}
