/* SPDX-License-Identifier: Apache-2.0
 *
 * sha256.h: SHA-256 of bytes in memory (FIPS 180-4).
 */
#ifndef LLAMAC_SHA256_H
#define LLAMAC_SHA256_H

#include <stdint.h>

enum { LLAMAC_SHA256_BYTES = 32 };

/* Writes the hash of `bytes` bytes. */
void llamac_sha256(const void *data, uint64_t bytes, uint8_t hash[LLAMAC_SHA256_BYTES]);

/* Writes it as 64 hexadecimal digits and a zero byte. */
void llamac_sha256_text(const uint8_t hash[LLAMAC_SHA256_BYTES], char text[65]);

#endif /* LLAMAC_SHA256_H */
