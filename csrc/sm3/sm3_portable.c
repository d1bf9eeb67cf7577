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

/* One round in place: the caller rotates the roles of the eight words by one step instead of moving them. */
#define ROUND(a, b, c, d, e, f, g, h, j, FF, GG)                                                   \
    do {                                                                                           \
        uint32_t a12 = rotate_left(a, 12);                                                         \
        uint32_t ss1 = rotate_left(a12 + ((e) + csvf__sm3_t[j]), 7);                               \
        d += FF(a, b, c) + (w[j] ^ w[(j) + 4]) + (ss1 ^ a12);                                      \
        h += GG(e, f, g) + w[j] + ss1;                                                             \
        b = rotate_left(b, 9);                                                                     \
        f = rotate_left(f, 19);                                                                    \
        h = XOR3(h, rotate_left(h, 9), rotate_left(h, 17));                                        \
    } while (0)

#define FOUR_ROUNDS(j, FF, GG)                                                                     \
    ROUND(a, b, c, d, e, f, g, h, (j), FF, GG);                                                    \
    ROUND(d, a, b, c, h, e, f, g, (j) + 1, FF, GG);                                                \
    ROUND(c, d, a, b, g, h, e, f, (j) + 2, FF, GG);                                                \
    ROUND(b, c, d, a, f, g, h, e, (j) + 3, FF, GG)

static void compress(uint32_t state[8], const uint8_t *data, size_t blocks)
{
    uint32_t w[68];
    for (size_t block = 0; block < blocks; block++, data += CSVF__SM3_BLOCK) {
        for (int j = 0; j < 16; j++)
            w[j] = csvf__load_be32(data + 4 * j);
        for (int j = 16; j < 68; j++) {
            uint32_t x = XOR3(w[j - 16], w[j - 9], rotate_left(w[j - 3], 15));
            x = XOR3(x, rotate_left(x, 15), rotate_left(x, 23));
            w[j] = XOR3(x, rotate_left(w[j - 13], 7), w[j - 6]);
        }
        uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
        uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
        for (int j = 0; j < 16; j += 4) {
            FOUR_ROUNDS(j, XOR3, XOR3);
        }
        for (int j = 16; j < 64; j += 4) {
            FOUR_ROUNDS(j, MAJORITY, CHOOSE);
        }
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
