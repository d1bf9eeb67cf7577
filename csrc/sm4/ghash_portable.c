/* GHASH in portable C: constant time, carry-less products made of integer products. Internal.
 *
 * Bits of a factor are spread into four numbers with holes of three zeros, so that carries of the integer product die in the
 * holes (the method of BearSSL's ghash_ctmul64.c by Thomas Pornin). Constant time where the CPU's 64-bit multiplication is, as
 * on x86-64 and ARMv8. The upper half of a product is the lower half of the product of reversed factors, reversed. */
#include <string.h>

#include "../include/csvfast.h"
#include "ghash_kernel.h"

static uint64_t load_be64(const uint8_t *p)
{
    uint64_t x = 0;
    for (int i = 0; i < 8; i++)
        x = x << 8 | p[i];
    return x;
}

static void put_be64(uint8_t *p, uint64_t x)
{
    for (int i = 0; i < 8; i++)
        p[i] = (uint8_t)(x >> (56 - 8 * i));
}

/* Lower 64 bits of the carry-less product. */
static uint64_t multiply_low(uint64_t x, uint64_t y)
{
    const uint64_t m = 0x1111111111111111u;
    const uint64_t x0 = x & m, x1 = x & m << 1, x2 = x & m << 2, x3 = x & m << 3;
    const uint64_t y0 = y & m, y1 = y & m << 1, y2 = y & m << 2, y3 = y & m << 3;
    const uint64_t z0 = (x0 * y0) ^ (x1 * y3) ^ (x2 * y2) ^ (x3 * y1);
    const uint64_t z1 = (x0 * y1) ^ (x1 * y0) ^ (x2 * y3) ^ (x3 * y2);
    const uint64_t z2 = (x0 * y2) ^ (x1 * y1) ^ (x2 * y0) ^ (x3 * y3);
    const uint64_t z3 = (x0 * y3) ^ (x1 * y2) ^ (x2 * y1) ^ (x3 * y0);
    return (z0 & m) | (z1 & m << 1) | (z2 & m << 2) | (z3 & m << 3);
}

static uint64_t reverse_bits(uint64_t x)
{
    x = (x & 0x5555555555555555u) << 1 | (x >> 1 & 0x5555555555555555u);
    x = (x & 0x3333333333333333u) << 2 | (x >> 2 & 0x3333333333333333u);
    x = (x & 0x0f0f0f0f0f0f0f0fu) << 4 | (x >> 4 & 0x0f0f0f0f0f0f0f0fu);
    return __builtin_bswap64(x);
}

/* words: H's low and high half, their sum, and the three reversed. */
static void init(csvf_ghash_key *key, const uint8_t h[16])
{
    memset(key, 0, sizeof *key);
    key->words[0] = load_be64(h + 8);
    key->words[1] = load_be64(h);
    key->words[2] = key->words[0] ^ key->words[1];
    for (int i = 0; i < 3; i++)
        key->words[3 + i] = reverse_bits(key->words[i]);
}

static void update(const csvf_ghash_key *key, uint8_t y[16], const uint8_t *data, size_t blocks)
{
    const uint64_t *h = key->words;
    uint64_t high = load_be64(y), low = load_be64(y + 8);
    for (; blocks; blocks--, data += 16) {
        high ^= load_be64(data);
        low ^= load_be64(data + 8);
        const uint64_t low_r = reverse_bits(low), high_r = reverse_bits(high);
        /* Karatsuba, both halves of three 64 x 64 products */
        const uint64_t a = multiply_low(low, h[0]), b = multiply_low(high, h[1]);
        const uint64_t a_top = multiply_low(low_r, h[3]), b_top = multiply_low(high_r, h[4]);
        const uint64_t middle = multiply_low(low ^ high, h[2]) ^ a ^ b;
        const uint64_t middle_top = multiply_low(low_r ^ high_r, h[5]) ^ a_top ^ b_top;
        /* 256-bit product, shifted by one place because GHASH numbers its bits from the other end */
        uint64_t v0 = a, v1 = reverse_bits(a_top) >> 1 ^ middle;
        uint64_t v2 = b ^ reverse_bits(middle_top) >> 1, v3 = reverse_bits(b_top) >> 1;
        v3 = v3 << 1 | v2 >> 63;
        v2 = v2 << 1 | v1 >> 63;
        v1 = v1 << 1 | v0 >> 63;
        v0 = v0 << 1;
        v2 ^= v0 ^ v0 >> 1 ^ v0 >> 2 ^ v0 >> 7;
        v1 ^= v0 << 63 ^ v0 << 62 ^ v0 << 57;
        v3 ^= v1 ^ v1 >> 1 ^ v1 >> 2 ^ v1 >> 7;
        v2 ^= v1 << 63 ^ v1 << 62 ^ v1 << 57;
        low = v2;
        high = v3;
    }
    put_be64(y, high);
    put_be64(y + 8, low);
}

const csvf_ghash_kernel csvf__ghash_portable = { "portable", 0, init, update };
