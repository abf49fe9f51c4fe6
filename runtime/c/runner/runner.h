/* SPDX-License-Identifier: Apache-2.0
 *
 * runner.h: what the files of llamac-runner share.
 *
 * llamac-runner is a whole model as one static program: the bundle's kernels, the support library
 * and these files. It runs wherever the processor's Linux kernel or an emulator of it does, without
 * Python and without any library: on a phone over adb, on a board over ssh, under qemu-user.
 */
#ifndef LLAMAC_RUNNER_H
#define LLAMAC_RUNNER_H

#include "internal.h"

/* Serves requests from standard input on standard output until the input ends (serve.c).
 * Returns the exit code. */
int runner_serve(void);

/* Names of this CPU's features in `text`, "none" if it has none that llamac knows. */
void runner_feature_text(uint64_t features, char *text, size_t capacity);

#endif /* LLAMAC_RUNNER_H */
