/* SPDX-License-Identifier: Apache-2.0
 *
 * neuron_api.h: the part of MediaTek's Neuron Adapter that we use, as our own declarations.
 *
 * The adapter is a library of the phone with a C interface in the manner of Android's NNAPI: a
 * model is made of operands and operations, compiled, and executed. Facts come from the signatures
 * that MediaTek published under the MIT licence (MediaTek-NeuroPilot/tflite-neuron-delegate), from
 * LiteRT's open sources for MediaTek (Apache-2.0), and from recording what LiteRT's plug-in calls.
 */
#ifndef LLAMAC_NEURON_API_H
#define LLAMAC_NEURON_API_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What functions return. */
enum {
  NEURON_OK = 0,
  NEURON_OUT_OF_MEMORY = 1,
  NEURON_INCOMPLETE = 2,
  NEURON_UNEXPECTED_NULL = 3,
  NEURON_BAD_DATA = 4,
  NEURON_OP_FAILED = 5,
  NEURON_UNMAPPABLE = 6,
  NEURON_BAD_STATE = 7,
  NEURON_BAD_VERSION = 8,
  NEURON_OUTPUT_INSUFFICIENT_SIZE = 9,
  NEURON_UNAVAILABLE_DEVICE = 10
};

/* Types of operands; the scalars come first. */
enum {
  NEURON_FLOAT32 = 0,
  NEURON_INT32 = 1,
  NEURON_UINT32 = 2,
  NEURON_TENSOR_FLOAT32 = 3,
  NEURON_TENSOR_INT32 = 4,
  NEURON_TENSOR_QUANT8_ASYMM = 5,
  NEURON_BOOL = 6,
  NEURON_TENSOR_QUANT16_SYMM = 7,
  NEURON_TENSOR_FLOAT16 = 8,
  NEURON_TENSOR_QUANT8_SYMM_PER_CHANNEL = 11,
  NEURON_TENSOR_QUANT8_SYMM = 13,
  NEURON_TENSOR_QUANT8_ASYMM_SIGNED = 14,
  /* From version 9 of the adapter on: */
  NEURON_TENSOR_QUANT4_SYMM_PER_CHANNEL = 9011, /* one code a byte */
  NEURON_TENSOR_INT32_SYMM_PER_CHANNEL = 9014   /* biases */
};

enum { NEURON_FIRST_MAJOR_WITH_QUANT4 = 9 };

/* Values up to this size are copied when they are set; larger ones must stay where they are. */
enum { NEURON_COPIED_BYTES = 128 };

enum {
  NEURON_ADD = 0,
  NEURON_CONCATENATION = 2,
  NEURON_DEQUANTIZE = 6,
  NEURON_FULLY_CONNECTED = 9,
  NEURON_LOGISTIC = 14,
  NEURON_MUL = 18,
  NEURON_RESHAPE = 22,
  NEURON_SOFTMAX = 25,
  NEURON_MEAN = 31,
  NEURON_SUB = 36,
  NEURON_TRANSPOSE = 37,
  NEURON_QUANTIZE = 72,
  NEURON_RSQRT = 83,
  NEURON_SLICE = 86,
  NEURON_BATCH_MATMUL = 102
};

enum { NEURON_PREFER_SUSTAINED_SPEED = 2, NEURON_PRIORITY_HIGH = 110 };

typedef struct neuron_model neuron_model;
typedef struct neuron_compilation neuron_compilation;
typedef struct neuron_execution neuron_execution;

typedef struct {
  uint8_t major, minor, patch;
} neuron_version;

/* A scalar has rank 0. Scale and zero point are 0 if they mean nothing. */
typedef struct {
  int32_t type;
  uint32_t rank;
  const uint32_t *dims;
  float scale;
  int32_t zero_point;
} neuron_operand;

_Static_assert(offsetof(neuron_operand, dims) == 8, "operand");
_Static_assert(offsetof(neuron_operand, scale) == 8 + sizeof(void *), "operand");

/* Scales of a tensor's slices along one dimension. */
typedef struct {
  uint32_t channel_dim;
  uint32_t count;
  const float *scales;
} neuron_channel_scales;

/* The functions, as they are found by name; those at the end may be missing (NULL). */
typedef struct {
  int (*get_version)(neuron_version *version);
  int (*model_create)(neuron_model **model);
  void (*model_free)(neuron_model *model);
  int (*model_add_operand)(neuron_model *model, const neuron_operand *operand);
  int (*model_set_operand_value)(neuron_model *model, int32_t index, const void *value,
                                 size_t bytes);
  int (*model_set_channel_scales)(neuron_model *model, int32_t index,
                                  const neuron_channel_scales *scales);
  int (*model_add_operation)(neuron_model *model, int32_t code, uint32_t num_inputs,
                             const uint32_t *inputs, uint32_t num_outputs,
                             const uint32_t *outputs);
  int (*model_identify)(neuron_model *model, uint32_t num_inputs, const uint32_t *inputs,
                        uint32_t num_outputs, const uint32_t *outputs);
  int (*model_relax)(neuron_model *model, bool allow); /* float32 may be computed as float16 */
  int (*model_finish)(neuron_model *model);
  int (*model_restore)(neuron_model **model, neuron_compilation **compilation, const void *network,
                       size_t bytes);
  int (*compilation_create)(neuron_model *model, neuron_compilation **compilation);
  void (*compilation_free)(neuron_compilation *compilation);
  int (*compilation_set_preference)(neuron_compilation *compilation, int32_t preference);
  int (*compilation_set_priority)(neuron_compilation *compilation, int32_t priority);
  int (*compilation_set_options)(neuron_compilation *compilation, const char *options);
  int (*compilation_finish)(neuron_compilation *compilation);
  int (*compilation_get_size)(neuron_compilation *compilation, size_t *bytes);
  int (*compilation_store)(neuron_compilation *compilation, void *network, size_t bytes);
  int (*execution_create)(neuron_compilation *compilation, neuron_execution **execution);
  void (*execution_free)(neuron_execution *execution);
  /* operand: NULL keeps what the model says. */
  int (*execution_set_input)(neuron_execution *execution, int32_t index,
                             const neuron_operand *operand, const void *data, size_t bytes);
  int (*execution_set_output)(neuron_execution *execution, int32_t index,
                              const neuron_operand *operand, void *data, size_t bytes);
  int (*execution_compute)(neuron_execution *execution);
  /* Numbers for what an extension has, whose name is given. */
  int (*model_extension_operand)(neuron_model *model, const char *extension, uint16_t code,
                                 int32_t *type);
  int (*model_extension_operation)(neuron_model *model, const char *extension, uint16_t code,
                                   int32_t *operation);
  /* Which operations the APU takes; of a finished model, of a compilation that is not finished. */
  int (*model_supported)(neuron_model *model, bool *supported, uint32_t count);
  int (*compilation_supported)(neuron_compilation *compilation, uint32_t count, bool *supported);
} neuron_adapter;

#endif /* LLAMAC_NEURON_API_H */
