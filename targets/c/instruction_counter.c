/* SPDX-License-Identifier: Apache-2.0
 *
 * instruction_counter.c: a plug-in of QEMU's user mode that counts AArch64 instructions by class.
 *
 * Counted are regions of the program, from `orr x10, x10, x10` to `orr x11, x11, x11` (instructions
 * that change nothing; the kernels' callers execute them right before and after a call). Each
 * region becomes a line of numbers in the file given as out=FILE, in the order of enum class; the
 * first marker is counted, the second is not. Counters are not atomic: programs must run one thread.
 *
 * QEMU's header is not packaged, so the few declarations of its plug-in interface, version 1, that
 * are needed stand here.
 */
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
typedef struct {
  const char *target_name;
} qemu_info_t; /* the first field; more follow */

enum { QEMU_PLUGIN_CB_NO_REGS = 0, QEMU_PLUGIN_INLINE_ADD_U64 = 0 };

void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t,
                                           void (*)(qemu_plugin_id_t, struct qemu_plugin_tb *));
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, void *), void *);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *,
                                            void (*)(unsigned int, void *), int, void *);
void qemu_plugin_register_vcpu_insn_exec_inline(struct qemu_plugin_insn *, int, void *, uint64_t);

#define EXPORT __attribute__((visibility("default")))
EXPORT extern const int qemu_plugin_version;
const int qemu_plugin_version = 1;

enum class { LOAD, STORE, DOT, MMLA, SME, VECTOR, BRANCH, SCALAR, NUM_CLASSES };

static const uint32_t BEGIN = 0xaa0a014a, END = 0xaa0b016b;

static uint64_t counts[NUM_CLASSES], at_begin[NUM_CLASSES];
static bool is_inside;
static FILE *out;

/* sdot, udot, usdot, sudot, of vectors and by element. */
static bool is_dot(uint32_t insn) {
  uint32_t vector = insn & 0x9fe0fc00, element = insn & 0x9fc0f400, sve = insn & 0xffe0f800;
  return vector == 0x0e809400 || vector == 0x0e809c00 || element == 0x0f80e000 ||
         element == 0x0f80f000 || element == 0x0f00f000 || sve == 0x44800000 ||
         sve == 0x44a00000 || sve == 0x44807800 || sve == 0x44a01800;
}

static bool is_mmla(uint32_t insn) {
  uint32_t neon = insn & 0xdfe0f400, sve = insn & 0xff20fc00;
  return neon == 0x4e80a400 || sve == 0x45009800;
}

/* Of the group of loads and stores: which of the two. */
static bool is_load(uint32_t insn) {
  bool is_literal = (insn & 0x3b000000) == 0x18000000;
  bool is_vector = insn >> 26 & 1, is_single = (insn >> 27 & 7) == 7;
  uint32_t opc = insn >> 22 & 3;
  if (is_literal) return true;
  if (is_single && !is_vector) return opc != 0; /* 2 and 3 are loads with sign, and prefetches */
  return opc & 1;
}

/* Of SME's group: whether it moves memory, to and from ZA or (SME2) several vectors. */
static bool is_sme_memory(uint32_t insn) {
  uint32_t top = insn >> 25;
  return top == 0x70 || (top == 0x50 && !(insn >> 23 & 1));
}

/* After the encoding index of the Arm architecture manual, bits 28 to 25. */
static enum class classify(uint32_t insn) {
  uint32_t group = insn >> 25 & 15, top = insn >> 25;
  if (group == 0 && insn >> 31)
    return !is_sme_memory(insn) ? SME : insn >> 21 & 1 ? STORE : LOAD;
  if (group == 2) { /* SVE: the highest bits tell loads and stores */
    if (top == 0x42 || top == 0x52 || top == 0x62) return LOAD;
    if (top == 0x72) return STORE;
    return is_dot(insn) ? DOT : is_mmla(insn) ? MMLA : VECTOR;
  }
  if ((group & 5) == 4) return is_load(insn) ? LOAD : STORE;
  if ((group & 7) == 7) return is_dot(insn) ? DOT : is_mmla(insn) ? MMLA : VECTOR;
  if ((group & 14) == 10) return BRANCH;
  return SCALAR;
}

static void begin(unsigned int cpu, void *data) {
  (void)cpu, (void)data;
  memcpy(at_begin, counts, sizeof counts);
  is_inside = true;
}

static void end(unsigned int cpu, void *data) {
  (void)cpu, (void)data;
  if (!is_inside) return;
  is_inside = false;
  for (int i = 0; i < NUM_CLASSES; i++)
    fprintf(out, "%" PRIu64 "%c", counts[i] - at_begin[i], i + 1 < NUM_CLASSES ? ' ' : '\n');
}

static void translate(qemu_plugin_id_t id, struct qemu_plugin_tb *tb) {
  (void)id;
  size_t n = qemu_plugin_tb_n_insns(tb);
  for (size_t i = 0; i < n; i++) {
    struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
    uint32_t code;
    memcpy(&code, qemu_plugin_insn_data(insn), sizeof code);
    if (code == BEGIN)
      qemu_plugin_register_vcpu_insn_exec_cb(insn, begin, QEMU_PLUGIN_CB_NO_REGS, NULL);
    if (code == END)
      qemu_plugin_register_vcpu_insn_exec_cb(insn, end, QEMU_PLUGIN_CB_NO_REGS, NULL);
    qemu_plugin_register_vcpu_insn_exec_inline(insn, QEMU_PLUGIN_INLINE_ADD_U64,
                                               &counts[classify(code)], 1);
  }
}

static void finish(qemu_plugin_id_t id, void *data) {
  (void)id, (void)data;
  fclose(out);
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc,
                               char **argv) {
  if (strcmp(info->target_name, "aarch64") != 0 || argc != 1 || strncmp(argv[0], "out=", 4) != 0) {
    fprintf(stderr, "instruction_counter: needs qemu-aarch64 and out=FILE\n");
    return -1;
  }
  out = fopen(argv[0] + 4, "w");
  if (out == NULL) {
    perror(argv[0] + 4);
    return -1;
  }
  qemu_plugin_register_vcpu_tb_trans_cb(id, translate);
  qemu_plugin_register_atexit_cb(id, finish, NULL);
  return 0;
}
