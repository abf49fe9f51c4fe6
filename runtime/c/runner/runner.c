/* SPDX-License-Identifier: Apache-2.0
 *
 * runner.c: the command line of llamac-runner, for people without Python on the device.
 */
#include "runner.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char HELP[] =
    "llamac-runner: a compiled model as one program, for devices without Python\n"
    "\n"
    "  llamac-runner WEIGHTS --tokens 1,2,3 [options]\n"
    "  llamac-runner --info       what the model is, and which kernels this CPU can run\n"
    "  llamac-runner --serve      requests on standard input, for llamac on a computer\n"
    "                             (--count F behind it: packets of each kernel, where emulated)\n"
    "\n"
    "  WEIGHTS         weights.bin of the same bundle\n"
    "  --tokens LIST   token ids of the prompt, between commas\n"
    "  --decode N      how many tokens to add, always the most likely one (default: 16)\n"
    "  --stop LIST     token ids at which to end\n"
    "  --tokenizer F   tokenizer.model of the bundle: print text instead of ids\n"
    "  --level NAME    kernels to use (default: the best that this CPU can run)\n"
    "  --threads N     (default: 1)\n"
    "  --profile       time of each kernel while decoding\n"
    "\n"
    "Standard output gets the new token ids or their text, standard error all else. Exit codes:\n"
    "0 worked, 1 failed, 2 wrong arguments. `llamac run BUNDLE PROMPT --emulate --device-command`\n"
    "prints the command for a prompt. On an Android phone:\n"
    "\n"
    "  adb push bin/llamac-runner weights.bin tokenizer.model /data/local/tmp/\n"
    "  adb shell chmod +x /data/local/tmp/llamac-runner\n"
    "  adb shell 'cd /data/local/tmp && ./llamac-runner weights.bin --tokens 1,2,3 --threads 4'\n";

enum { FAILED = 1, WRONG_ARGUMENTS = 2, DEFAULT_DECODE = 16 };

typedef struct {
  int32_t *ids;
  int32_t count;
} token_list;

typedef struct {
  const char *weights, *level, *tokenizer;
  token_list tokens, stops;
  int32_t num_decode, num_threads;
  bool is_profiling;
} arguments;

/* ---- Arguments ----------------------------------------------------------------------------- */

_Noreturn static void wrong(const char *what, const char *value) {
  fprintf(stderr, "llamac-runner: %s%s%s\n(llamac-runner --help shows what it takes)\n", what,
          value ? ": " : "", value ? value : "");
  exit(WRONG_ARGUMENTS);
}

/* A whole number from `low` on that ends at *end. */
static int32_t parse_number(const char *text, long low, char **end) {
  errno = 0;
  long value = strtol(text, end, 10);
  if (*end == text || errno != 0 || value < low || value > INT32_MAX)
    wrong("not a number in its range", text);
  return (int32_t)value;
}

static int32_t whole_number(const char *text, long low) {
  char *end;
  int32_t value = parse_number(text, low, &end);
  if (*end != '\0') wrong("not a number", text);
  return value;
}

static void parse_tokens(const char *text, token_list *list) {
  size_t commas = 0;
  for (const char *c = text; *c; c++) commas += *c == ',';
  free(list->ids); /* the last of several counts */
  list->ids = calloc(commas + 1, sizeof *list->ids);
  list->count = 0;
  if (list->ids == NULL || commas >= INT32_MAX) wrong("too many tokens", NULL);
  for (char *end;; text = end + 1) {
    list->ids[list->count++] = parse_number(text, 0, &end);
    if (*end == '\0') return;
    if (*end != ',') wrong("not token ids between commas", text);
  }
}

static void parse_option(arguments *args, const char *name, const char *value) {
  if (strcmp(name, "--tokens") == 0)
    parse_tokens(value, &args->tokens);
  else if (strcmp(name, "--stop") == 0)
    parse_tokens(value, &args->stops);
  else if (strcmp(name, "--decode") == 0)
    args->num_decode = whole_number(value, 0);
  else if (strcmp(name, "--level") == 0)
    args->level = value;
  else if (strcmp(name, "--tokenizer") == 0)
    args->tokenizer = value;
  else if (strcmp(name, "--threads") == 0)
    args->num_threads = whole_number(value, 1);
  else
    wrong("unknown option", name);
}

static arguments parse(int argc, char **argv) {
  arguments args = {.num_decode = DEFAULT_DECODE, .num_threads = 1};
  for (int i = 1; i < argc; i++) {
    const char *name = argv[i];
    if (strcmp(name, "--profile") == 0) {
      args.is_profiling = true;
    } else if (name[0] != '-') {
      if (args.weights != NULL) wrong("more than one weights file", name);
      args.weights = name;
    } else {
      if (i + 1 == argc) wrong("unknown option, or it lacks its value", name);
      parse_option(&args, name, argv[++i]);
    }
  }
  if (args.weights == NULL) wrong("the weights file is missing", NULL);
  if (args.tokens.ids == NULL) wrong("--tokens is missing", NULL);
  return args;
}

/* ---- Running ------------------------------------------------------------------------------- */

_Noreturn static void fail(const llamac_error *error) {
  fprintf(stderr, "llamac-runner: %s\n", error->message);
  exit(FAILED);
}

static void tell_speed(const char *what, int32_t tokens, uint64_t started) {
  double seconds = (double)(llamac_now_ns() - started) / 1e9;
  fprintf(stderr, "%s: %d tokens in %.3f s, %.2f tokens/s\n", what, tokens, seconds,
          seconds > 0 ? tokens / seconds : 0.0);
}

/* Milliseconds of each kernel per decoded token, in the order of their first steps. */
static void tell_profile(const llamac_session *session, int32_t tokens) {
  const llamac_program *program = &llamac_program_table;
  const llamac_function *decode = &program->functions[program->num_functions - 1];
  uint32_t count;
  const uint64_t *times = llamac_session_step_ns(session, decode->name, &count);
  const llamac_step *steps = program->steps + decode->first_step;
  for (uint32_t i = 0; i < count; i++) {
    uint64_t sum = 0;
    bool is_first = true;
    for (uint32_t j = 0; j < count; j++) {
      if (steps[j].kernel != steps[i].kernel) continue;
      if (j < i) is_first = false;
      sum += times[j];
    }
    if (is_first)
      fprintf(stderr, "%10.3f ms  %s\n", (double)sum / 1e6 / tokens,
              program->kernel_names[steps[i].kernel]);
  }
}

static bool is_stop(const arguments *args, int32_t token) {
  for (int32_t i = 0; i < args->stops.count; i++)
    if (args->stops.ids[i] == token) return true;
  return false;
}

/* Prints a token, as text if there is a vocabulary. */
static void print_token(const runner_vocabulary *vocabulary, int32_t index, int32_t token) {
  if (vocabulary->tokens != NULL)
    runner_print_token(vocabulary, token);
  else
    printf("%s%d", index > 0 ? "," : "", token);
  fflush(stdout);
}

static void decode(llamac_session *session, const arguments *args,
                   const runner_vocabulary *vocabulary) {
  llamac_error error;
  uint64_t started = llamac_now_ns();
  int32_t done = 0;
  if (args->is_profiling && llamac_session_profile(session, 1) != LLAMAC_OK)
    wrong("no memory for --profile", NULL);
  for (; done < args->num_decode; done++) {
    int32_t token = llamac_session_argmax(session);
    if (is_stop(args, token)) break;
    print_token(vocabulary, done, token);
    if (llamac_session_eval(session, &token, 1, &error) != LLAMAC_OK) {
      printf("\n");
      fail(&error);
    }
  }
  printf("\n");
  if (done == 0) return;
  tell_speed("decode", done, started);
  if (args->is_profiling) tell_profile(session, done);
}

static int generate(const arguments *args) {
  llamac_error error;
  llamac_model *model;
  llamac_session *session;
  llamac_session_options options = {.struct_bytes = sizeof options,
                                    .num_threads = args->num_threads};
  llamac_model_info_t info = {.struct_bytes = sizeof info};
  runner_vocabulary vocabulary = {NULL, NULL, 0};
  if (llamac_model_open(args->weights, args->level, &model, &error) != LLAMAC_OK) fail(&error);
  if (llamac_session_create(model, &options, &session, &error) != LLAMAC_OK) fail(&error);
  llamac_model_info(model, &info);
  if (args->tokenizer != NULL &&
      !runner_read_vocabulary(args->tokenizer, (uint32_t)info.vocab_size, &vocabulary)) {
    fprintf(stderr, "llamac-runner: %s is missing or no tokenizer.model\n", args->tokenizer);
    exit(FAILED);
  }
  fprintf(stderr, "%s, kernels %s, threads: %d\n", info.model_name, info.level, args->num_threads);
  uint64_t started = llamac_now_ns();
  if (llamac_session_eval(session, args->tokens.ids, args->tokens.count, &error) != LLAMAC_OK)
    fail(&error);
  tell_speed("prefill", args->tokens.count, started);
  decode(session, args, &vocabulary);
  runner_free_vocabulary(&vocabulary);
  llamac_session_destroy(session);
  llamac_model_close(model);
  return 0;
}

/* Names of features in `text`, "none" if there is none. */
static void feature_text(uint64_t features, char *text, size_t capacity) {
  llamac_feature_names(features, text, capacity);
  if (text[0] == '\0') snprintf(text, capacity, "none");
}

static int tell_info(void) {
  const llamac_program *program = &llamac_program_table;
  uint64_t present = llamac_cpu_features();
  char names[256];
  feature_text(present, names, sizeof names);
  printf("model: %s, vocabulary %d, context %d\n", program->model_name, program->vocab_size,
         program->context_length);
  printf("memory: weights %llu bytes; a session: KV cache %llu, arena %llu\n",
         (unsigned long long)program->weights_bytes, (unsigned long long)program->kv_bytes,
         (unsigned long long)program->arena_bytes);
  printf("this CPU: %s\n", names);
  for (uint32_t i = 0; i < program->num_levels; i++) {
    const llamac_level *level = &program->levels[i];
    feature_text(level->features, names, sizeof names);
    printf("level %s: needs %s: %s\n", level->name, names,
           (level->features & ~present) == 0 ? "can run here" : "cannot run here");
  }
  return 0;
}

int main(int argc, char **argv) {
  if (argc == 2 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0))
    return fputs(HELP, stdout) < 0 ? FAILED : 0;
  if (argc == 2 && strcmp(argv[1], "--info") == 0) return tell_info();
  if (argc == 2 && strcmp(argv[1], "--serve") == 0) return runner_serve();
  if (argc == 4 && strcmp(argv[1], "--serve") == 0 && strcmp(argv[2], "--count") == 0) {
    if (!runner_count_packets(argv[3])) wrong("packets cannot be counted into", argv[3]);
    return runner_serve();
  }
  if (argc < 2) {
    fputs(HELP, stderr);
    return WRONG_ARGUMENTS;
  }
  arguments args = parse(argc, argv);
  int code = generate(&args);
  free(args.tokens.ids);
  free(args.stops.ids);
  return code;
}
