/* Opens the graphs of a text file, calls each of them, and writes what they computed.
 *
 *     qnn_harness TABLE FOLDER INPUTS OUTPUTS CALLS THREADS
 *
 * TABLE: for each graph "NAME FILE BYTES SOC BUILD_ID NUM_INPUTS NUM_OUTPUTS", then for each tensor
 * "NAME BYTES DTYPE_CODE DTYPE_BITS". INPUTS: raw inputs of all graphs, one after the other;
 * OUTPUTS: the same of the outputs. Every thread calls every graph CALLS times; all must compute
 * the same.
 * Prints lines that begin with "result:", because Qualcomm's libraries print as well.
 */
#include "internal.h"
#include "qnn/qnn.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_GRAPHS = 4, MAX_TENSORS = 16, MAX_THREADS = 4 };

static llamac_graph graphs[MAX_GRAPHS];
static llamac_graph_tensor tensors[MAX_GRAPHS][MAX_TENSORS];
static char strings[MAX_GRAPHS * (MAX_TENSORS + 3)][128];
static int dtypes[MAX_GRAPHS][MAX_TENSORS][2];
static uint32_t count;

static llamac_graphs *opened;
static int calls;
static uint64_t fastest_ns = UINT64_MAX;
static uint8_t *operands[MAX_THREADS][MAX_GRAPHS][MAX_TENSORS];

static void must(bool condition, const char *what) {
  if (condition) return;
  printf("result: harness: %s\n", what);
  exit(2);
}

static void read_table(const char *path) {
  FILE *file = fopen(path, "r");
  must(file != NULL, "no table");
  char(*next)[128] = strings;
  for (; count < MAX_GRAPHS; count++) {
    llamac_graph *graph = &graphs[count];
    char *name = *next++, *binary = *next++, *build = *next++;
    if (fscanf(file, "%127s %127s %" SCNu64 " %u %127s %u %u", name, binary, &graph->file_bytes,
               &graph->soc_model, build, &graph->num_inputs, &graph->num_outputs) != 7)
      break;
    graph->name = name, graph->file = binary, graph->build_id = build;
    graph->tensors = tensors[count];
    must(graph->num_inputs + graph->num_outputs <= MAX_TENSORS, "too many tensors");
    for (uint32_t i = 0; i < graph->num_inputs + graph->num_outputs; i++) {
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
    for (uint32_t i = 0; i < graphs[g].num_inputs + graphs[g].num_outputs; i++) {
      size_t bytes = tensors[g][i].bytes;
      operands[thread][g][i] = calloc(1, bytes);
      if (i < graphs[g].num_inputs)
        must(fread(operands[thread][g][i], 1, bytes, file) == bytes, "inputs are short");
    }
  fclose(file);
}

static uint64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static void call(int thread, uint32_t g) {
  uint32_t n = graphs[g].num_inputs + graphs[g].num_outputs;
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
  args[n + 1].v_int64 = 1;
  for (int i = 0; i < calls; i++) {
    uint64_t start = now_ns();
    if (llamac_graph_call(opened, g, args, (int32_t)n + 2) != 0) {
      char text[256];
      llamac_take_kernel_error(text, sizeof text);
      printf("result: call failed: %s\n", text);
      llamac_graphs_close(opened);
      exit(1);
    }
    uint64_t ns = now_ns() - start;
    if (thread == 0 && ns < fastest_ns) fastest_ns = ns;
  }
}

static void *run(void *thread) {
  for (uint32_t g = 0; g < count; g++) call((int)(intptr_t)thread, g);
  return NULL;
}

static void write_outputs(const char *path, int num_threads) {
  FILE *file = fopen(path, "wb");
  must(file != NULL, "cannot write");
  for (uint32_t g = 0; g < count; g++)
    for (uint32_t i = graphs[g].num_inputs; i < graphs[g].num_inputs + graphs[g].num_outputs; i++) {
      size_t bytes = tensors[g][i].bytes;
      for (int t = 1; t < num_threads; t++)
        must(memcmp(operands[t][g][i], operands[0][g][i], bytes) == 0, "threads differ");
      must(fwrite(operands[0][g][i], 1, bytes, file) == bytes, "disk full");
    }
  fclose(file);
}

int main(int argc, char **argv) {
  must(argc == 7, "arguments");
  read_table(argv[1]);
  calls = atoi(argv[5]);
  int num_threads = atoi(argv[6]);
  must(num_threads >= 1 && num_threads <= MAX_THREADS, "threads");
  for (int t = 0; t < num_threads; t++) read_inputs(t, argv[3]);
  llamac_error error;
  llamac_status status = llamac_graphs_open(graphs, count, argv[2], &opened, &error);
  const char *dsp = getenv("ADSP_LIBRARY_PATH");
  printf("result: dsp %s\n", dsp ? dsp : "-");
  if (status != LLAMAC_OK) {
    must(opened == NULL, "failed and left graphs");
    printf("result: open failed %d: %s\n", (int)error.status, error.message);
    return 1;
  }
  pthread_t threads[MAX_THREADS];
  for (int t = 1; t < num_threads; t++) pthread_create(&threads[t], NULL, run, (void *)(intptr_t)t);
  run(0);
  for (int t = 1; t < num_threads; t++) pthread_join(threads[t], NULL);
  llamac_graphs_close(opened);
  write_outputs(argv[4], num_threads);
  printf("result: ok, fastest call %" PRIu64 " ns\n", fastest_ns);
  return 0;
}
