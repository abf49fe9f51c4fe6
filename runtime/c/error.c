/* SPDX-License-Identifier: Apache-2.0
 *
 * error.c: messages of the library and of the kernels.
 */
#include "internal.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

llamac_status llamac_fail(llamac_error *error, llamac_status status, const char *format, ...) {
  if (error != NULL) {
    va_list arguments;
    error->status = status;
    va_start(arguments, format);
    vsnprintf(error->message, sizeof error->message, format, arguments);
    va_end(arguments);
  }
  return status;
}

/* A kernel reports its text before it returns, so the text has to wait for us somewhere, one place
 * per thread. Thread-local storage would make libmodel.so need the dynamic loader by name; this
 * table is touched only after a failure. A text that finds no place is lost, never the error. */
enum { NUM_REPORTS = 16, REPORT_BYTES = 160 };

static struct {
  bool used;
  pthread_t thread;
  char text[REPORT_BYTES];
} reports[NUM_REPORTS];

static pthread_mutex_t reports_mutex = PTHREAD_MUTEX_INITIALIZER;

/* Index of the calling thread's report, else of a free one if wanted, else -1. */
static int find_report(bool or_free) {
  int found = -1;
  for (int i = 0; i < NUM_REPORTS; i++) {
    if (reports[i].used && pthread_equal(reports[i].thread, pthread_self())) return i;
    if (!reports[i].used && or_free && found < 0) found = i;
  }
  return found;
}

/* Called by TVM's generated code when an argument is not what the kernel was compiled for. */
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t num_parts) {
  pthread_mutex_lock(&reports_mutex);
  int i = find_report(true);
  if (i >= 0) {
    size_t length = (size_t)snprintf(reports[i].text, REPORT_BYTES, "%s: ", kind);
    for (int32_t p = 0; p < num_parts && length < REPORT_BYTES; p++) {
      if (parts[p] == NULL) continue;
      length += (size_t)snprintf(reports[i].text + length, REPORT_BYTES - length, "%s", parts[p]);
    }
    reports[i].used = true;
    reports[i].thread = pthread_self();
  }
  pthread_mutex_unlock(&reports_mutex);
}

void llamac_take_kernel_error(char *text, size_t capacity) {
  text[0] = '\0';
  pthread_mutex_lock(&reports_mutex);
  int i = find_report(false);
  if (i >= 0) {
    snprintf(text, capacity, "%s", reports[i].text);
    reports[i].used = false;
  }
  pthread_mutex_unlock(&reports_mutex);
}
