/* SPDX-License-Identifier: Apache-2.0
 *
 * qnn_api.h: the part of QNN's binary interface that we use, as our own declarations.
 *
 * They hold for core interface 2.x and system interface 1.15 and later of 1.x on 64-bit systems;
 * later minor versions append. Found by reading back binaries whose content was known and by
 * calling the libraries of QNN 2.51 (core 2.40, system 1.15). Fields named `unused` are there for
 * the positions of the others only.
 */
#ifndef LLAMAC_QNN_API_H
#define LLAMAC_QNN_API_H

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

enum { QNN_CORE_MAJOR = 2, QNN_SYSTEM_MAJOR = 1, QNN_SYSTEM_MINOR = 15, QNN_BACKEND_HTP = 6 };

typedef uint64_t qnn_code; /* 0: success */
typedef void *qnn_handle;
typedef void (*qnn_unused)(void);

typedef struct {
  uint32_t major, minor, patch;
} qnn_version;

/* ---- Tensors ------------------------------------------------------------------------------- */

enum { QNN_MAX_RANK = 8, QNN_MEMORY_RAW = 0, QNN_QUANT_SCALE_OFFSET = 0 };

/* Two hexadecimal digits of kind, two of bits. */
enum {
  QNN_INT8 = 0x0008,
  QNN_INT16 = 0x0016,
  QNN_INT32 = 0x0032,
  QNN_UINT8 = 0x0108,
  QNN_UINT16 = 0x0116,
  QNN_UINT32 = 0x0132,
  QNN_FLOAT16 = 0x0216,
  QNN_FLOAT32 = 0x0232,
  QNN_SFIXED8 = 0x0308,
  QNN_SFIXED16 = 0x0316,
  QNN_UFIXED8 = 0x0408,
  QNN_UFIXED16 = 0x0416,
  QNN_BOOL8 = 0x0508
};

/* Version 1; version 2 has more in `unused`. */
typedef struct {
  uint32_t version;
  struct {
    uint32_t id;
    const char *name;
    uint32_t type; /* input or output of the graph */
    uint32_t format;
    uint32_t dtype;
    struct {
      uint32_t is_defined;
      uint32_t encoding; /* QNN_QUANT_* */
      uint64_t values[4]; /* scale and offset, or pointers */
    } quant;
    uint32_t rank;
    uint32_t *dims;
    uint32_t memory; /* QNN_MEMORY_* */
    struct {
      void *data;
      uint32_t bytes;
    } buffer;
    uint64_t unused[3];
  } v1;
} qnn_tensor;

_Static_assert(offsetof(qnn_tensor, v1.name) == 16, "tensor");
_Static_assert(offsetof(qnn_tensor, v1.dtype) == 32, "tensor");
_Static_assert(offsetof(qnn_tensor, v1.rank) == 80, "tensor");
_Static_assert(offsetof(qnn_tensor, v1.buffer) == 104, "tensor");
_Static_assert(sizeof(qnn_tensor) == 144, "tensor");

/* ---- libQnnSystem: what a binary holds ------------------------------------------------------ */

enum { QNN_INFO_VERSION = 3 };

/* Version 3 of the structure. */
typedef struct {
  uint32_t version;
  const char *name;
  uint32_t num_inputs;
  qnn_tensor *inputs;
  uint32_t num_outputs;
  qnn_tensor *outputs;
  uint64_t unused[5];
} qnn_graph_info;

_Static_assert(offsetof(qnn_graph_info, outputs) == 40, "graph");
_Static_assert(sizeof(qnn_graph_info) == 88, "graph");

/* Version 3 of the structure. */
typedef struct {
  uint32_t version;
  uint32_t unused4;
  uint32_t backend; /* QNN_BACKEND_* */
  const char *build_id;
  uint64_t unused24[9];
  uint32_t num_graphs;
  qnn_graph_info *graphs;
  uint64_t unused112[3];
  uint32_t soc_model;
} qnn_binary_info;

_Static_assert(offsetof(qnn_binary_info, num_graphs) == 96, "binary");
_Static_assert(offsetof(qnn_binary_info, soc_model) == 136, "binary");

typedef struct {
  uint32_t backend;
  const char *name;
  qnn_version api;
  qnn_code (*create)(qnn_handle *context);
  qnn_code (*get_binary_info)(qnn_handle context, void *binary, uint64_t bytes,
                              const qnn_binary_info **info, uint64_t *info_bytes);
  qnn_unused unused2;
  qnn_code (*free)(qnn_handle context);
} qnn_system;

_Static_assert(offsetof(qnn_system, create) == 32, "system");

/* What QnnSystemInterface_getProviders is. */
typedef qnn_code (*qnn_system_providers)(const qnn_system ***providers, uint32_t *count);

/* ---- libQnnHtp ------------------------------------------------------------------------------ */

enum { QNN_LOG_ERROR = 1, QNN_LOG_DEBUG = 5 };

typedef void (*qnn_log_callback)(const char *format, uint32_t level, uint64_t time, va_list values);

/* Comments: positions in the table of functions. */
typedef struct {
  uint32_t backend;
  const char *name;
  qnn_version core_api, backend_api;
  qnn_unused unused0;
  qnn_code (*backend_create)(qnn_handle log, const void *const *config,
                             qnn_handle *backend); /* 1 */
  qnn_unused unused2[2];
  qnn_code (*backend_build_id)(const char **id); /* 4 */
  qnn_unused unused5[3];
  qnn_code (*backend_free)(qnn_handle backend); /* 8 */
  qnn_unused unused9[4];
  qnn_code (*context_create_from_binary)(qnn_handle backend, qnn_handle device,
                                         const void *const *config, const void *binary,
                                         uint64_t bytes, qnn_handle *context,
                                         qnn_handle profile); /* 13 */
  qnn_code (*context_free)(qnn_handle context, qnn_handle profile); /* 14 */
  qnn_unused unused15[5];
  qnn_code (*graph_retrieve)(qnn_handle context, const char *name, qnn_handle *graph); /* 20 */
  qnn_code (*graph_execute)(qnn_handle graph, const qnn_tensor *inputs, uint32_t num_inputs,
                            qnn_tensor *outputs, uint32_t num_outputs, qnn_handle profile,
                            qnn_handle signal); /* 21 */
  qnn_unused unused22[3];
  qnn_code (*log_create)(qnn_log_callback callback, uint32_t level, qnn_handle *log); /* 25 */
  qnn_unused unused26;
  qnn_code (*log_free)(qnn_handle log); /* 27 */
} qnn_htp;

_Static_assert(offsetof(qnn_htp, unused0) == 40, "htp");
_Static_assert(offsetof(qnn_htp, context_create_from_binary) == 40 + 13 * 8, "htp");
_Static_assert(offsetof(qnn_htp, graph_execute) == 40 + 21 * 8, "htp");
_Static_assert(offsetof(qnn_htp, log_free) == 40 + 27 * 8, "htp");

/* What QnnInterface_getProviders is. */
typedef qnn_code (*qnn_htp_providers)(const qnn_htp ***providers, uint32_t *count);

#endif /* LLAMAC_QNN_API_H */
