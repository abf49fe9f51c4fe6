/* SPDX-License-Identifier: Apache-2.0
 *
 * absent.c: functions of llamac.h that look into a computation, which the CPU does not see here.
 * llamac-runner under an emulator has them for the same kernels.
 */
#include "internal.h"

llamac_status llamac_model_adapt(llamac_model *model, const char *path, llamac_error *error) {
  (void)model, (void)path;
  return llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "adapters cannot be exchanged on the DSP");
}

llamac_status llamac_session_run_steps(llamac_session *session, const char *function,
                                       uint32_t first, uint32_t count, llamac_error *error) {
  (void)session, (void)function, (void)first, (void)count;
  return llamac_fail(error, LLAMAC_ERROR_ARGUMENT, "single steps do not run on the phone's DSP");
}

void *llamac_session_memory(llamac_session *session, int32_t space) {
  (void)session, (void)space;
  return NULL;
}

llamac_status llamac_session_profile(llamac_session *session, int enable) {
  (void)session;
  return enable ? LLAMAC_ERROR_ARGUMENT : LLAMAC_OK;
}

const uint64_t *llamac_session_step_ns(const llamac_session *session, const char *function,
                                       uint32_t *count) {
  (void)session, (void)function;
  if (count != NULL) *count = 0;
  return NULL;
}

double llamac_read_bandwidth(int32_t num_threads, uint64_t bytes, int32_t seconds_x10,
                             const int32_t *cpus, int32_t num_cpus) {
  (void)num_threads, (void)bytes, (void)seconds_x10, (void)cpus, (void)num_cpus;
  return 0;
}
