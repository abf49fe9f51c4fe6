/* SPDX-License-Identifier: Apache-2.0
 *
 * cpu_features.c: what this CPU can execute, and what the operating system lets it.
 */
#include "internal.h"

#include <stdio.h>
#include <string.h>

/* Names as GCC, LLVM and the manifest spell them. */
static const struct {
  uint64_t bit;
  const char *name;
} feature_names[] = {
    {LLAMAC_X86_AVX2, "avx2"},         {LLAMAC_X86_FMA, "fma"},
    {LLAMAC_X86_F16C, "f16c"},         {LLAMAC_X86_AVXVNNI, "avxvnni"},
    {LLAMAC_X86_AVX512F, "avx512f"},   {LLAMAC_X86_AVX512BW, "avx512bw"},
    {LLAMAC_X86_AVX512VL, "avx512vl"}, {LLAMAC_X86_AVX512DQ, "avx512dq"},
    {LLAMAC_X86_AVX512VNNI, "avx512vnni"},
    {LLAMAC_ARM_DOTPROD, "dotprod"},   {LLAMAC_ARM_I8MM, "i8mm"},
    {LLAMAC_ARM_FP16, "fullfp16"},     {LLAMAC_ARM_BF16, "bf16"},
    {LLAMAC_ARM_SVE, "sve"},           {LLAMAC_ARM_SVE2, "sve2"},
    {LLAMAC_ARM_SME, "sme"},
    {LLAMAC_ARM_SVE256, "sve256"},     {LLAMAC_ARM_SME512, "sme512"},
};

void llamac_feature_names(uint64_t features, char *text, size_t capacity) {
  size_t length = 0;
  text[0] = '\0';
  for (size_t i = 0; i < sizeof feature_names / sizeof feature_names[0]; i++) {
    if ((features & feature_names[i].bit) == 0 || length >= capacity) continue;
    features &= ~feature_names[i].bit;
    length += (size_t)snprintf(text + length, capacity - length, "%s%s", length ? " " : "",
                               feature_names[i].name);
  }
  if (features != 0 && length < capacity) /* bits that only a newer support library knows */
    snprintf(text + length, capacity - length, "%s0x%llx", length ? " " : "",
             (unsigned long long)features);
}

#if defined(__x86_64__)
#include <cpuid.h>

/* Register states that the operating system saves when it switches threads (XCR0). */
static uint64_t saved_states(void) {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t)high << 32 | low;
}

/* `feature` if the bit of the register is set. */
static uint64_t when(uint32_t value, int bit, uint64_t feature) {
  return value >> bit & 1 ? feature : 0;
}

/* Bit positions: Intel SDM volume 2, CPUID; XCR0: volume 1, section 13.3. */
uint64_t llamac_cpu_features(void) {
  enum { YMM_STATES = 0x06, ZMM_STATES = 0xe6 };
  uint32_t a, b, c, d;
  uint64_t features = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  if ((c >> 27 & 1) == 0) return 0; /* no xgetbv: the system saves no vectors beyond SSE */
  uint64_t states = saved_states();
  if ((states & YMM_STATES) != YMM_STATES) return 0;
  features |= when(c, 12, LLAMAC_X86_FMA) | when(c, 29, LLAMAC_X86_F16C);
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return features;
  features |= when(b, 5, LLAMAC_X86_AVX2);
  if ((states & ZMM_STATES) == ZMM_STATES)
    features |= when(b, 16, LLAMAC_X86_AVX512F) | when(b, 17, LLAMAC_X86_AVX512DQ) |
                when(b, 30, LLAMAC_X86_AVX512BW) | when(b, 31, LLAMAC_X86_AVX512VL) |
                when(c, 11, LLAMAC_X86_AVX512VNNI);
  if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d))
    features |= when(a, 4, LLAMAC_X86_AVXVNNI);
  return features;
}

#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#include <sys/prctl.h>

/* `feature` if all bits of the mask are set. */
static uint64_t when(unsigned long value, unsigned long mask, uint64_t feature) {
  return (value & mask) == mask ? feature : 0;
}

/* Bytes of a vector in this process, which may be fewer than the CPU has; 0 without vectors.
 * Numbers and mask: the kernel's prctl.h, PR_SVE_GET_VL, PR_SME_GET_VL, PR_SVE_VL_LEN_MASK. */
static int vector_bytes(int question) {
  int answer = prctl(question, 0UL, 0UL, 0UL, 0UL);
  return answer < 0 ? 0 : answer & 0xffff;
}

/* What some lengths of vectors add to SVE and SME. */
static uint64_t vector_features(uint64_t features, bool has_sve_i8mm) {
  enum { SVE_GET_VL = 51, SME_GET_VL = 64 };
  uint64_t added = 0;
  if (features & LLAMAC_ARM_SVE && has_sve_i8mm) {
    int bytes = vector_bytes(SVE_GET_VL);
    if (bytes == 32 || bytes == 64) added |= LLAMAC_ARM_SVE256;
  }
  if (features & LLAMAC_ARM_SME && vector_bytes(SME_GET_VL) == 64) added |= LLAMAC_ARM_SME512;
  return added;
}

/* Bit positions: the kernel's documentation of ELF hwcaps for arm64. */
uint64_t llamac_cpu_features(void) {
  enum { FPHP = 1 << 9, ASIMDHP = 1 << 10, ASIMDDP = 1 << 20, SVE = 1 << 22 };
  enum { SVE2 = 1 << 1, SVEI8MM = 1 << 9, I8MM = 1 << 13, BF16 = 1 << 14, SME = 1 << 23 };
  unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  uint64_t features =
      when(first, ASIMDDP, LLAMAC_ARM_DOTPROD) | when(first, FPHP | ASIMDHP, LLAMAC_ARM_FP16) |
      when(first, SVE, LLAMAC_ARM_SVE) | when(second, SVE2, LLAMAC_ARM_SVE2) |
      when(second, I8MM, LLAMAC_ARM_I8MM) | when(second, BF16, LLAMAC_ARM_BF16) |
      when(second, SME, LLAMAC_ARM_SME);
  return features | vector_features(features, (second & SVEI8MM) != 0);
}

#else

/* Unknown system: only the level that needs nothing. */
uint64_t llamac_cpu_features(void) { return 0; }

#endif
