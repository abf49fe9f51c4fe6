/* SPDX-License-Identifier: Apache-2.0
 *
 * driver.h: the phone's FastRPC library, found at run time, and calls of our DSP library by it.
 */
#ifndef LLAMAC_DRIVER_H
#define LLAMAC_DRIVER_H

#include <stdint.h>

#include "llamac.h"
#include "protocol.h"

/* A buffer that both processors map; data is NULL if there is none. */
typedef struct {
  void *data;
  uint64_t bytes;
  int fd;
} shared_buffer;

typedef struct driver driver;

/* Loads the library and finds out which version the DSP has, 0x75; the library stays loaded. */
llamac_status driver_load(driver **out, uint32_t *version, llamac_error *error);

/* Starts a process on the DSP that loads `folder`/libllamac-v<version>.so. */
llamac_status driver_open(driver *driver, const char *folder, uint32_t version, uint64_t *handle,
                          llamac_error *error);
void driver_close(driver *driver, uint64_t handle);

/* Memory for both processors, mapped to the DSP's process. `what` is for messages. */
llamac_status driver_allocate(driver *driver, uint64_t bytes, const char *what,
                              shared_buffer *out, llamac_error *error);
void driver_free(driver *driver, shared_buffer *buffer);

/* Calls a method of protocol.h. The reply's status and message become the result. */
llamac_status driver_call(driver *driver, uint64_t handle, uint32_t method,
                          const dsp_request *request, const void *data, uint64_t data_bytes,
                          void *result, uint64_t result_bytes, dsp_reply *reply,
                          llamac_error *error);

/* aee.c: what a code of FastRPC means and what to do about it. */
const char *aee_explain(int code);

#endif /* LLAMAC_DRIVER_H */
