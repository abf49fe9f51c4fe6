/* One int8 outer product of SME, compared with the same sums in C.

   Prints the bytes of a streaming vector; exit status 1 if a sum differs. */

#include <stdint.h>
#include <stdio.h>

#define MAX_BYTES 256 /* of a vector, by the architecture */
#define MAX_ROWS (MAX_BYTES / 4)

/* out[row][column] = twice the sum over k < 4 of a[4 * row + k] * b[4 * column + k], for the rows
   of the first `rows` words only: the others stay zero. The stack pointer and x29 are not touched,
   and d8 to d15, which smstart and smstop clear, are kept. Returns the bytes of a vector. */
uint64_t outer_product(const int8_t *a, const int8_t *b, int32_t *out, uint64_t rows);

__asm__(".arch armv9.2-a+sme\n"
        ".text\n"
        ".globl outer_product\n"
        ".type outer_product, %function\n"
        "outer_product:\n"
        "  stp d8, d9, [sp, -64]!\n"
        "  stp d10, d11, [sp, 16]\n"
        "  stp d12, d13, [sp, 32]\n"
        "  stp d14, d15, [sp, 48]\n"
        "  smstart\n"
        "  ptrue p0.b\n"
        "  lsl x9, x3, 2\n"
        "  whilelo p1.b, xzr, x9\n"
        "  ld1b { z0.b }, p0/z, [x0]\n"
        "  ld1b { z1.b }, p0/z, [x1]\n"
        "  zero { za }\n"
        "  smopa za0.s, p1/m, p0/m, z0.b, z1.b\n"
        "  smopa za0.s, p1/m, p0/m, z0.b, z1.b\n"
        "  rdsvl x0, 1\n"
        "  lsr x9, x0, 2\n"
        "  mov w12, 0\n"
        "1:\n"
        "  st1w { za0h.s[w12, 0] }, p0, [x2]\n"
        "  add x2, x2, x0\n"
        "  add w12, w12, 1\n"
        "  cmp w12, w9\n"
        "  b.lo 1b\n"
        "  smstop\n"
        "  ldp d10, d11, [sp, 16]\n"
        "  ldp d12, d13, [sp, 32]\n"
        "  ldp d14, d15, [sp, 48]\n"
        "  ldp d8, d9, [sp], 64\n"
        "  ret\n");

int main(void) {
    static int8_t a[MAX_BYTES], b[MAX_BYTES];
    static int32_t out[MAX_ROWS * MAX_ROWS];
    for (int i = 0; i < MAX_BYTES; i++) {
        a[i] = (int8_t)(37 * i - 128);
        b[i] = (int8_t)(91 * i + 5);
    }
    const uint64_t filled = 3;
    const uint64_t bytes = outer_product(a, b, out, filled);
    const uint64_t words = bytes / 4;
    int wrong = 0;
    for (uint64_t row = 0; row < words; row++) {
        for (uint64_t column = 0; column < words; column++) {
            int32_t sum = 0;
            for (int k = 0; row < filled && k < 4; k++) {
                sum += 2 * a[4 * row + k] * b[4 * column + k];
            }
            wrong += out[row * words + column] != sum;
        }
    }
    printf("%d wrong of %d, vectors of %d bytes\n", wrong, (int)(words * words), (int)bytes);
    return wrong != 0;
}
