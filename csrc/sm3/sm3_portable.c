/* SM3 compression in plain C, for any 64-bit little-endian CPU. Standard: GB/T 32905-2016, 5.3. PURE. */
#include "sm3_common.h"
#include "sm3_kernel.h"

static inline uint32_t rotate_left(uint32_t x, int n)
{
    return x << n | x >> (32 - n);
}

#define XOR3(x, y, z) ((x) ^ (y) ^ (z))
#define MAJORITY(x, y, z) (((x) & (y)) | (((x) | (y)) & (z)))
#define CHOOSE(x, y, z) ((((y) ^ (z)) & (x)) ^ (z))

/* One round in place: the caller rotates the roles of the eight words by one step instead of moving them. Round j replaces the
 * oldest of the sixteen schedule words by word j + 4 just before it needs it; indices are constants, so w lives in registers
 * and fixed stack slots (in a loop, gcc 12 vectorises the loads and stalls: 20 cycles per byte instead of 10). */
#define ROUND(a, b, c, d, e, f, g, h, j, FF, GG)                                                   \
    do {                                                                                           \
        if ((j) >= 12) {                                                                           \
            uint32_t x = XOR3(w[((j) + 4) & 15], w[((j) - 5) & 15], rotate_left(w[((j) + 1) & 15], 15)); \
            x = XOR3(x, rotate_left(x, 15), rotate_left(x, 23));                                   \
            w[((j) + 4) & 15] = XOR3(x, rotate_left(w[((j) - 9) & 15], 7), w[((j) - 2) & 15]);     \
        }                                                                                          \
        uint32_t a12 = rotate_left(a, 12);                                                         \
        uint32_t ss1 = rotate_left(a12 + csvf__sm3_t[j] + (e), 7);                                 \
        d += FF(a, b, c) + (w[(j) & 15] ^ w[((j) + 4) & 15]) + (ss1 ^ a12);                        \
        h += GG(e, f, g) + w[(j) & 15] + ss1;                                                      \
        b = rotate_left(b, 9);                                                                     \
        f = rotate_left(f, 19);                                                                    \
        h = XOR3(h, rotate_left(h, 9), rotate_left(h, 17));                                        \
    } while (0)

#define FOUR_ROUNDS(j, FF, GG)                                                                     \
    ROUND(a, b, c, d, e, f, g, h, (j), FF, GG);                                                    \
    ROUND(d, a, b, c, h, e, f, g, (j) + 1, FF, GG);                                                \
    ROUND(c, d, a, b, g, h, e, f, (j) + 2, FF, GG);                                                \
    ROUND(b, c, d, a, f, g, h, e, (j) + 3, FF, GG)

#define SIXTEEN_ROUNDS(j, FF, GG)                                                                  \
    FOUR_ROUNDS((j), FF, GG);                                                                      \
    FOUR_ROUNDS((j) + 4, FF, GG);                                                                  \
    FOUR_ROUNDS((j) + 8, FF, GG);                                                                  \
    FOUR_ROUNDS((j) + 12, FF, GG)

#define LOAD_FOUR(i)                                                                               \
    w[i] = csvf__load_be32(data + 4 * (i));                                                        \
    w[(i) + 1] = csvf__load_be32(data + 4 * (i) + 4);                                              \
    w[(i) + 2] = csvf__load_be32(data + 4 * (i) + 8);                                              \
    w[(i) + 3] = csvf__load_be32(data + 4 * (i) + 12)

static void compress(uint32_t state[8], const uint8_t *data, size_t blocks)
{
    uint32_t w[16];
    for (; blocks; blocks--, data += CSVF__SM3_BLOCK) {
        LOAD_FOUR(0);
        LOAD_FOUR(4);
        LOAD_FOUR(8);
        LOAD_FOUR(12);
        uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
        uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
        SIXTEEN_ROUNDS(0, XOR3, XOR3);
        SIXTEEN_ROUNDS(16, MAJORITY, CHOOSE);
        SIXTEEN_ROUNDS(32, MAJORITY, CHOOSE);
        SIXTEEN_ROUNDS(48, MAJORITY, CHOOSE);
        state[0] ^= a, state[1] ^= b, state[2] ^= c, state[3] ^= d;
        state[4] ^= e, state[5] ^= f, state[6] ^= g, state[7] ^= h;
    }
    csvf__wipe(w, sizeof w);
}

const csvf_sm3_kernel csvf__sm3_portable = {.name = "portable", .features = 0, .compress = compress};

/* No vector lanes: drivers see lanes == 1 and use the single-stream kernel in use. */
const csvf_sm3_many_kernel csvf__sm3_many_portable = {
    .name = "portable",
    .features = 0,
    .lanes = 1,
    .worthwhile = SIZE_MAX,
    .compress = NULL,
    .narrow_lanes = 0,
    .narrow_worthwhile = SIZE_MAX,
    .compress_narrow = NULL,
};
