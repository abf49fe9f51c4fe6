/* SPDX-License-Identifier: Apache-2.0
 *
 * packets.c: what each call of a kernel executes on an emulated Hexagon, a line each.
 *
 * A line is "packets instructions vector-instructions". Counters are those of a thread, so that a
 * model that is counted must run in one.
 */
#include "runner.h"

#include <stdio.h>

#include "hexagon_counters.h"
#include "kernel_marks.h"

#if defined(__hexagon__)
static FILE *lines;
static uint32_t packets, instructions, vectors;

bool runner_count_packets(const char *path) {
  lines = fopen(path, "w");
  return lines != NULL && setvbuf(lines, NULL, _IOLBF, BUFSIZ) == 0;
}

void llamac_count_begin(void) {
  vectors = LLAMAC_EXECUTED(LLAMAC_VECTOR_INSTRUCTIONS);
  instructions = LLAMAC_EXECUTED(LLAMAC_INSTRUCTIONS);
  packets = LLAMAC_EXECUTED(LLAMAC_PACKETS);
}

void llamac_count_end(void) {
  uint32_t packets_now = LLAMAC_EXECUTED(LLAMAC_PACKETS);
  uint32_t instructions_now = LLAMAC_EXECUTED(LLAMAC_INSTRUCTIONS);
  uint32_t vectors_now = LLAMAC_EXECUTED(LLAMAC_VECTOR_INSTRUCTIONS);
  if (lines == NULL) return;
  fprintf(lines, "%u %u %u\n", (unsigned)(packets_now - packets),
          (unsigned)(instructions_now - instructions), (unsigned)(vectors_now - vectors));
}
#else
bool runner_count_packets(const char *path) {
  (void)path;
  return false;
}
#endif
