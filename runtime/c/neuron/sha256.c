/* SPDX-License-Identifier: Apache-2.0
 *
 * sha256.c: the hash function of FIPS 180-4, with Arm's instructions for it where the CPU has them:
 * compiled networks have hundreds of megabytes, and all of them are hashed at each start.
 */
#include "sha256.h"

#include <string.h>

#if defined(__aarch64__) && defined(__clang__)
#define HAS_INSTRUCTIONS 1
#include <arm_neon.h>
#include <sys/auxv.h>
enum { HWCAP_WITH_SHA2 = 1 << 6 };
#else
#define HAS_INSTRUCTIONS 0
#endif

enum { BLOCK = 64 };

/* The first 32 bits behind the point of the cube roots of the first 64 primes. */
static const uint32_t ROUND[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1,
    0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3,
    0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786,
    0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
    0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13,
    0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
    0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a,
    0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
    0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static uint32_t rotate(uint32_t x, int bits) { return x >> bits | x << (32 - bits); }

static uint32_t big_endian(const uint8_t *from) {
  return (uint32_t)from[0] << 24 | (uint32_t)from[1] << 16 | (uint32_t)from[2] << 8 | from[3];
}

/* One round; the caller renames the words instead of moving them. */
#define STEP(a, b, c, d, e, f, g, h, i)                                                    \
  do {                                                                                     \
    h += (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + ((e & f) ^ (~e & g)) + ROUND[i] + \
         w[i];                                                                             \
    d += h;                                                                                \
    h += (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) | (c & (a | b)));       \
  } while (0)

static void add_block(uint32_t state[8], const uint8_t *block) {
  uint32_t w[64];
  for (int i = 0; i < 16; i++) w[i] = big_endian(block + 4 * i);
  for (int i = 16; i < 64; i++) {
    uint32_t x = w[i - 15], y = w[i - 2];
    w[i] = w[i - 16] + (rotate(x, 7) ^ rotate(x, 18) ^ x >> 3) + w[i - 7] +
           (rotate(y, 17) ^ rotate(y, 19) ^ y >> 10);
  }
  uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
  uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
  for (int i = 0; i < 64; i += 8) {
    STEP(a, b, c, d, e, f, g, h, i);
    STEP(h, a, b, c, d, e, f, g, i + 1);
    STEP(g, h, a, b, c, d, e, f, i + 2);
    STEP(f, g, h, a, b, c, d, e, i + 3);
    STEP(e, f, g, h, a, b, c, d, i + 4);
    STEP(d, e, f, g, h, a, b, c, i + 5);
    STEP(c, d, e, f, g, h, a, b, i + 6);
    STEP(b, c, d, e, f, g, h, a, i + 7);
  }
  state[0] += a, state[1] += b, state[2] += c, state[3] += d;
  state[4] += e, state[5] += f, state[6] += g, state[7] += h;
}

#if HAS_INSTRUCTIONS
__attribute__((target("sha2"))) static void add_blocks_by_instructions(uint32_t state[8],
                                                                       const uint8_t *block,
                                                                       uint64_t count) {
  uint32x4_t abcd = vld1q_u32(state), efgh = vld1q_u32(state + 4);
  for (; count > 0; count--, block += BLOCK) {
    uint32x4_t w[4], before_abcd = abcd, before_efgh = efgh;
    for (int i = 0; i < 4; i++)
      w[i] = vreinterpretq_u32_u8(vrev32q_u8(vld1q_u8(block + 16 * i)));
    for (int i = 0; i < 16; i++) { /* four rounds each */
      uint32x4_t words = vaddq_u32(w[i % 4], vld1q_u32(ROUND + 4 * i)), old = abcd;
      if (i < 12)
        w[i % 4] = vsha256su1q_u32(vsha256su0q_u32(w[i % 4], w[(i + 1) % 4]), w[(i + 2) % 4],
                                   w[(i + 3) % 4]);
      abcd = vsha256hq_u32(abcd, efgh, words);
      efgh = vsha256h2q_u32(efgh, old, words);
    }
    abcd = vaddq_u32(abcd, before_abcd);
    efgh = vaddq_u32(efgh, before_efgh);
  }
  vst1q_u32(state, abcd);
  vst1q_u32(state + 4, efgh);
}
#endif

static void add_blocks(uint32_t state[8], const uint8_t *block, uint64_t count) {
#if HAS_INSTRUCTIONS
  if (getauxval(AT_HWCAP) & HWCAP_WITH_SHA2) {
    add_blocks_by_instructions(state, block, count);
    return;
  }
#endif
  for (; count > 0; count--, block += BLOCK) add_block(state, block);
}

void llamac_sha256(const void *data, uint64_t bytes, uint8_t hash[LLAMAC_SHA256_BYTES]) {
  uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                       0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  uint64_t whole = bytes / BLOCK, left = bytes % BLOCK;
  add_blocks(state, data, whole);
  uint8_t last[2 * BLOCK] = {0};
  if (left > 0) memcpy(last, (const uint8_t *)data + whole * BLOCK, (size_t)left);
  last[left] = 0x80;
  uint64_t end = left + 9 <= BLOCK ? BLOCK : 2 * BLOCK;
  for (int i = 0; i < 8; i++) last[end - 1 - (uint64_t)i] = (uint8_t)(bytes * 8 >> 8 * i);
  add_blocks(state, last, end / BLOCK);
  for (int i = 0; i < LLAMAC_SHA256_BYTES; i++)
    hash[i] = (uint8_t)(state[i / 4] >> (24 - 8 * (i % 4)));
}

void llamac_sha256_text(const uint8_t hash[LLAMAC_SHA256_BYTES], char text[65]) {
  static const char DIGITS[] = "0123456789abcdef";
  for (int i = 0; i < LLAMAC_SHA256_BYTES; i++) {
    text[2 * i] = DIGITS[hash[i] >> 4];
    text[2 * i + 1] = DIGITS[hash[i] & 15];
  }
  text[64] = '\0';
}
