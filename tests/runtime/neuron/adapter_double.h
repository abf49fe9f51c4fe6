/* What the files of the recording test double of MediaTek's Neuron Adapter share. */
#ifndef ADAPTER_DOUBLE_H
#define ADAPTER_DOUBLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "neuron_api.h"

#define EXPORT __attribute__((visibility("default")))

enum { MAX_OPERANDS = 4096, MAX_OPERATIONS = 2048, MAX_RANK = 8, MAX_IO = 64, MAX_FUNCTIONS = 64 };

typedef struct {
  neuron_operand type;
  uint32_t dims[MAX_RANK];
  const uint8_t *value; /* not copied: must stay as it is */
  size_t bytes;
  uint32_t crc;
  bool has_value, has_scales;
} operand;

struct neuron_model {
  int id;
  bool identified, finished, is_dla;
  uint32_t num_operands, num_operations, num_inputs, num_outputs;
  uint32_t inputs[MAX_IO], outputs[MAX_IO];
  int32_t codes[MAX_OPERATIONS];
  operand operands[MAX_OPERANDS];
};

struct neuron_compilation {
  int id;
  bool finished;
  neuron_model *model;
};

struct neuron_execution {
  int id;
  neuron_compilation *compilation;
  const uint8_t *inputs[MAX_IO];
  uint8_t *outputs[MAX_IO];
  size_t bytes[2][MAX_IO]; /* of inputs, of outputs */
};

/* Numbers models, compilations and executions: 1, 2, 3 of each. */
enum { A_MODEL, A_COMPILATION, AN_EXECUTION };
int next_number(int kind);

/* Adds to the line of the log that is being written. */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
void say_list(const char *name, const uint32_t *list, uint32_t count);
void say_bytes(const void *data, size_t bytes);

uint32_t crc32(const uint8_t *data, size_t bytes);

/* Ends the line. Returns the code that NEURON_DOUBLE_FAIL wants of the function, else `code`. */
int end(const char *function, int code);

/* Bytes that a value of the operand has, 0 if the double does not know the type. */
size_t value_bytes(const operand *operand);

/* Reads "HEAD inputs outputs size size ...", the form of what stands for something compiled. False:
 * it is not that. `sizes` has room for 2 * MAX_IO. */
bool read_sizes(const char *head, const char *text, size_t bytes, uint32_t counts[2],
                uint32_t *sizes);

/* Makes an operand one of that many bytes. */
void set_size(operand *operand, uint32_t bytes);

/* What the extension for a DLA is numbered in this double, and whether the model of one such
 * operation is as it should be: fills in the sizes that the DLA tells. */
enum { DLA_OPERAND = 0x7a000001, DLA_OPERATION = 0x7b000001 };
bool read_dla(neuron_model *model);

/* Whether all values that were not copied are still what they were. */
bool values_stay(const neuron_model *model);

/* Fills in what NEURON_DOUBLE_UNSUPPORTED says of the model's operations. */
int supported_of(const neuron_model *model, bool *supported, uint32_t count);

#endif /* ADAPTER_DOUBLE_H */
