/* Opens the graphs of a text file, calls each of them, and writes what came out.
 *
 *     neuron_harness TABLE FOLDER CACHE INPUTS OUTPUTS CALLS THREADS
 *     neuron_harness hash FILE...
 *     neuron_harness fuzz NETWORK SEED COUNT
 *
 * TABLE: for each graph "NAME FILE BYTES SHA256 SOC DLA DLA_BYTES NUM_INPUTS NUM_OUTPUTS" (DLA "-" is
 * none), then for each tensor "NAME BYTES DTYPE_CODE DTYPE_BITS". CACHE: "-" is none. INPUTS: raw inputs of all graphs, one
 * after the other; OUTPUTS: the same of the outputs, as the first thread has them.
 *
 * "hash" prints the SHA-256 of files. "fuzz" changes bytes of a network and builds what the
 * reader still accepts.
 */
#include "internal.h"
#include "neuron/neuron_internal.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_GRAPHS = 4, MAX_TENSORS = 16, MAX_THREADS = 4 };

static llamac_neuron_graph graphs[MAX_GRAPHS];
static llamac_neuron_dla dlas[MAX_GRAPHS];
static llamac_neuron_tensor tensors[MAX_GRAPHS][MAX_TENSORS];
static char strings[MAX_GRAPHS * (MAX_TENSORS + 5)][128];
static int dtypes[MAX_GRAPHS][MAX_TENSORS][2];
static uint32_t count;

static llamac_neuron_graphs *opened;
static int calls;
static uint8_t *operands[MAX_THREADS][MAX_GRAPHS][MAX_TENSORS];

static void must(bool condition, const char *what) {
  if (condition) return;
  printf("harness: %s\n", what);
  exit(2);
}

static uint32_t operands_of(uint32_t g) { return graphs[g].num_inputs + graphs[g].num_outputs; }

static void read_table(const char *path) {
  FILE *file = fopen(path, "r");
  must(file != NULL, "no table");
  char(*next)[128] = strings;
  for (; count < MAX_GRAPHS; count++) {
    llamac_neuron_graph *graph = &graphs[count];
    graph->name = *next++, graph->file = *next++, graph->sha256 = *next++, graph->soc = *next++;
    llamac_neuron_dla *dla = &dlas[count];
    dla->file = *next++;
    if (fscanf(file, "%127s %127s %" SCNu64 " %127s %127s %127s %" SCNu64 " %u %u",
               (char *)graph->name, (char *)graph->file, &graph->file_bytes, (char *)graph->sha256,
               (char *)graph->soc, (char *)dla->file, &dla->bytes, &graph->num_inputs,
               &graph->num_outputs) != 9)
      break;
    if (strcmp(dla->file, "-") != 0) graph->dla = dla;
    graph->tensors = tensors[count];
    must(operands_of(count) <= MAX_TENSORS, "too many tensors");
    for (uint32_t i = 0; i < operands_of(count); i++) {
      int *dtype = dtypes[count][i];
      tensors[count][i].name = *next;
      must(fscanf(file, "%127s %" SCNu64 " %d %d", *next++, &tensors[count][i].bytes, &dtype[0],
                  &dtype[1]) == 4,
           "table");
    }
  }
  fclose(file);
}

/* Allocates the operands of a thread and reads the inputs. */
static void read_inputs(int thread, const char *path) {
  FILE *file = fopen(path, "rb");
  must(file != NULL, "no inputs");
  for (uint32_t g = 0; g < count; g++)
    for (uint32_t i = 0; i < operands_of(g); i++) {
      size_t bytes = tensors[g][i].bytes;
      operands[thread][g][i] = calloc(1, bytes);
      if (i < graphs[g].num_inputs)
        must(fread(operands[thread][g][i], 1, bytes, file) == bytes, "inputs are short");
    }
  fclose(file);
}

static void call(int thread, uint32_t g) {
  uint32_t n = operands_of(g);
  DLTensor views[MAX_TENSORS];
  int64_t shapes[MAX_TENSORS];
  TVMFFIAny args[MAX_TENSORS + 2];
  memset(args, 0, sizeof args);
  memset(views, 0, sizeof views);
  for (uint32_t i = 0; i < n; i++) {
    const int *dtype = dtypes[g][i];
    shapes[i] = (int64_t)tensors[g][i].bytes * 8 / dtype[1];
    views[i].data = operands[thread][g][i];
    views[i].ndim = 1;
    views[i].shape = &shapes[i];
    views[i].dtype.code = (uint8_t)dtype[0];
    views[i].dtype.bits = (uint8_t)dtype[1];
    views[i].dtype.lanes = 1;
    args[i].type_index = LLAMAC_FFI_DLTENSOR;
    args[i].v_ptr = &views[i];
  }
  args[n].type_index = args[n + 1].type_index = LLAMAC_FFI_INT;
  for (int i = 0; i < calls; i++)
    if (llamac_neuron_call(opened, g, args, (int32_t)n + 2) != 0) {
      char text[256];
      llamac_take_kernel_error(text, sizeof text);
      printf("call failed: %s\n", text);
      llamac_neuron_close(opened);
      exit(1);
    }
}

static void *run(void *thread) {
  for (uint32_t g = 0; g < count; g++) call((int)(intptr_t)thread, g);
  return NULL;
}

/* Nothing that was mapped is left. */
static void check_maps(void) {
  char line[4096];
  FILE *file = fopen("/proc/self/maps", "r");
  must(file != NULL, "no maps");
  while (fgets(line, sizeof line, file) != NULL)
    must(strstr(line, ".neuron") == NULL && strstr(line, ".dla") == NULL, "a file is still mapped");
  fclose(file);
}

static void write_outputs(const char *path) {
  FILE *file = fopen(path, "wb");
  must(file != NULL, "cannot write");
  for (uint32_t g = 0; g < count; g++)
    for (uint32_t i = graphs[g].num_inputs; i < operands_of(g); i++)
      fwrite(operands[0][g][i], 1, tensors[g][i].bytes, file);
  must(fclose(file) == 0, "disk full");
}

static int open_and_call(char **argv) {
  read_table(argv[0]);
  calls = atoi(argv[5]);
  int num_threads = atoi(argv[6]);
  must(num_threads >= 1 && num_threads <= MAX_THREADS, "threads");
  for (int t = 0; t < num_threads; t++) read_inputs(t, argv[3]);
  const char *cache = strcmp(argv[2], "-") == 0 ? NULL : argv[2];
  llamac_error error;
  if (llamac_neuron_open(graphs, count, argv[1], cache, &opened, &error) != LLAMAC_OK) {
    must(opened == NULL, "failed and left graphs");
    check_maps();
    printf("open failed %d: %s\n", (int)error.status, error.message);
    return 1;
  }
  for (uint32_t g = 0; g < count; g++) printf("%s\n", llamac_neuron_origin(opened, g));
  pthread_t threads[MAX_THREADS];
  for (int t = 1; t < num_threads; t++) pthread_create(&threads[t], NULL, run, (void *)(intptr_t)t);
  run(0);
  for (int t = 1; t < num_threads; t++) pthread_join(threads[t], NULL);
  llamac_neuron_close(opened);
  check_maps();
  write_outputs(argv[4]);
  for (int t = 0; t < num_threads; t++)
    for (uint32_t g = 0; g < count; g++)
      for (uint32_t i = 0; i < operands_of(g); i++) free(operands[t][g][i]);
  printf("ok\n");
  return 0;
}

/* ---- Network files alone ----------------------------------------------------------------------- */

static uint8_t *read_file(const char *path, uint64_t *bytes) {
  FILE *file = fopen(path, "rb");
  must(file != NULL && fseek(file, 0, SEEK_END) == 0, "no network");
  *bytes = (uint64_t)ftell(file);
  uint8_t *data = malloc(*bytes + 1);
  rewind(file);
  must(data != NULL && fread(data, 1, *bytes, file) == *bytes, "cannot read");
  fclose(file);
  return data;
}

/* Reads all that messages may read. */
static size_t walk_names(const llamac_network *network) {
  size_t bytes = strlen(network->names + network->header->options);
  for (uint32_t i = 0; i < network->header->num_operands; i++)
    bytes += strlen(network->names + network->operands[i].name);
  for (uint32_t i = 0; i < network->header->num_operations; i++)
    bytes += strlen(network->names + network->operations[i].name);
  return bytes;
}

/* In memory of exactly its size, so that a sanitizer sees every byte that is read behind it. */
static bool accepts(const uint8_t *data, uint64_t bytes, const llamac_neuron_library *library,
                    llamac_error *error) {
  llamac_network network = {.data = malloc(bytes ? bytes : 1), .bytes = bytes};
  must(network.data != NULL, "no memory");
  memcpy(network.data, data, bytes);
  bool good = llamac_network_read(&network, "file", error) == LLAMAC_OK;
  if (good) {
    must(walk_names(&network) < UINT64_C(1) << 40, "names");
    llamac_neuron_built built = {0};
    llamac_neuron_build(library, &network, "graph", &built, error);
    llamac_neuron_free(library, &built);
  }
  free(network.data);
  return good;
}

static int hash_all(int num, char **paths) {
  for (int i = 0; i < num; i++) {
    uint64_t bytes;
    uint8_t *data = read_file(paths[i], &bytes), hash[LLAMAC_SHA256_BYTES];
    char text[65];
    llamac_sha256(data, bytes, hash);
    llamac_sha256_text(hash, text);
    printf("%s\n", text);
    free(data);
  }
  return 0;
}

static uint32_t next_random(uint32_t *state) {
  *state ^= *state << 13;
  *state ^= *state >> 17;
  *state ^= *state << 5;
  return *state;
}

static int fuzz(char **argv) {
  static const uint8_t VALUES[] = {0, 1, 0x7f, 0x80, 0xff};
  llamac_neuron_library library;
  llamac_error error;
  must(llamac_neuron_library_open(&library, &error) == LLAMAC_OK, error.message);
  uint64_t bytes;
  uint8_t *data = read_file(argv[0], &bytes), *changed = malloc(bytes);
  uint32_t state = (uint32_t)atoi(argv[1]) * 2 + 1, accepted = 0, num = (uint32_t)atoi(argv[2]);
  uint64_t tables = ((llamac_network_header *)(void *)data)->data_offset;
  for (uint32_t n = 0; n < num; n++) {
    memcpy(changed, data, bytes);
    uint64_t length = next_random(&state) % 8 == 0 ? next_random(&state) % bytes : bytes;
    for (uint32_t i = next_random(&state) % 4 + 1; i > 0; i--) {
      uint32_t random = next_random(&state);
      changed[next_random(&state) % tables] =
          random % 2 ? VALUES[random / 2 % sizeof VALUES] : (uint8_t)(random >> 8);
    }
    accepted += accepts(changed, length, &library, &error);
  }
  printf("accepted %u of %u\n", accepted, num);
  free(changed);
  free(data);
  return 0;
}

int main(int argc, char **argv) {
  if (argc >= 3 && strcmp(argv[1], "hash") == 0) return hash_all(argc - 2, argv + 2);
  if (argc == 5 && strcmp(argv[1], "fuzz") == 0) return fuzz(argv + 2);
  must(argc == 8, "arguments");
  return open_and_call(argv + 1);
}
