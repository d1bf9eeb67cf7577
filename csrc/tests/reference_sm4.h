/* SM4 and its modes as the standards write them, one block and one bit at a time: what the tests compare every kernel with. Shares
 * nothing with the product; slow, with tables, not constant time. */
#ifndef CSVF_TESTS_REFERENCE_SM4_H
#define CSVF_TESTS_REFERENCE_SM4_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define REFERENCE static __attribute__((unused))

/* GB/T 32907-2016, 6.2 */
static const uint8_t reference_sbox[256] = {
    0xd6, 0x90, 0xe9, 0xfe, 0xcc, 0xe1, 0x3d, 0xb7, 0x16, 0xb6, 0x14, 0xc2, 0x28, 0xfb, 0x2c, 0x05,
    0x2b, 0x67, 0x9a, 0x76, 0x2a, 0xbe, 0x04, 0xc3, 0xaa, 0x44, 0x13, 0x26, 0x49, 0x86, 0x06, 0x99,
    0x9c, 0x42, 0x50, 0xf4, 0x91, 0xef, 0x98, 0x7a, 0x33, 0x54, 0x0b, 0x43, 0xed, 0xcf, 0xac, 0x62,
    0xe4, 0xb3, 0x1c, 0xa9, 0xc9, 0x08, 0xe8, 0x95, 0x80, 0xdf, 0x94, 0xfa, 0x75, 0x8f, 0x3f, 0xa6,
    0x47, 0x07, 0xa7, 0xfc, 0xf3, 0x73, 0x17, 0xba, 0x83, 0x59, 0x3c, 0x19, 0xe6, 0x85, 0x4f, 0xa8,
    0x68, 0x6b, 0x81, 0xb2, 0x71, 0x64, 0xda, 0x8b, 0xf8, 0xeb, 0x0f, 0x4b, 0x70, 0x56, 0x9d, 0x35,
    0x1e, 0x24, 0x0e, 0x5e, 0x63, 0x58, 0xd1, 0xa2, 0x25, 0x22, 0x7c, 0x3b, 0x01, 0x21, 0x78, 0x87,
    0xd4, 0x00, 0x46, 0x57, 0x9f, 0xd3, 0x27, 0x52, 0x4c, 0x36, 0x02, 0xe7, 0xa0, 0xc4, 0xc8, 0x9e,
    0xea, 0xbf, 0x8a, 0xd2, 0x40, 0xc7, 0x38, 0xb5, 0xa3, 0xf7, 0xf2, 0xce, 0xf9, 0x61, 0x15, 0xa1,
    0xe0, 0xae, 0x5d, 0xa4, 0x9b, 0x34, 0x1a, 0x55, 0xad, 0x93, 0x32, 0x30, 0xf5, 0x8c, 0xb1, 0xe3,
    0x1d, 0xf6, 0xe2, 0x2e, 0x82, 0x66, 0xca, 0x60, 0xc0, 0x29, 0x23, 0xab, 0x0d, 0x53, 0x4e, 0x6f,
    0xd5, 0xdb, 0x37, 0x45, 0xde, 0xfd, 0x8e, 0x2f, 0x03, 0xff, 0x6a, 0x72, 0x6d, 0x6c, 0x5b, 0x51,
    0x8d, 0x1b, 0xaf, 0x92, 0xbb, 0xdd, 0xbc, 0x7f, 0x11, 0xd9, 0x5c, 0x41, 0x1f, 0x10, 0x5a, 0xd8,
    0x0a, 0xc1, 0x31, 0x88, 0xa5, 0xcd, 0x7b, 0xbd, 0x2d, 0x74, 0xd0, 0x12, 0xb8, 0xe5, 0xb4, 0xb0,
    0x89, 0x69, 0x97, 0x4a, 0x0c, 0x96, 0x77, 0x7e, 0x65, 0xb9, 0xf1, 0x09, 0xc5, 0x6e, 0xc6, 0x84,
    0x18, 0xf0, 0x7d, 0xec, 0x3a, 0xdc, 0x4d, 0x20, 0x79, 0xee, 0x5f, 0x3e, 0xd7, 0xcb, 0x39, 0x48,
};

REFERENCE uint32_t reference_rotate(uint32_t x, int n) { return x << n | x >> (32 - n); }

REFERENCE uint32_t reference_tau(uint32_t x)
{
    return (uint32_t)reference_sbox[x >> 24] << 24 | (uint32_t)reference_sbox[x >> 16 & 255] << 16 |
           (uint32_t)reference_sbox[x >> 8 & 255] << 8 | reference_sbox[x & 255];
}

REFERENCE void reference_sm4(uint8_t out[16], const uint8_t in[16], const uint8_t key[16], int decrypt)
{
    static const uint32_t fk[4] = { 0xa3b1bac6, 0x56aa3350, 0x677d9197, 0xb27022dc };
    uint32_t k[36], x[36];
    for (int i = 0; i < 4; i++) {
        k[i] = (uint32_t)key[4 * i] << 24 | (uint32_t)key[4 * i + 1] << 16 | (uint32_t)key[4 * i + 2] << 8 | key[4 * i + 3];
        k[i] ^= fk[i];
        x[i] = (uint32_t)in[4 * i] << 24 | (uint32_t)in[4 * i + 1] << 16 | (uint32_t)in[4 * i + 2] << 8 | in[4 * i + 3];
    }
    for (int i = 0; i < 32; i++) {
        uint32_t ck = 0;
        for (int j = 0; j < 4; j++)
            ck = ck << 8 | (uint32_t)((4 * i + j) * 7 % 256);
        const uint32_t t = reference_tau(k[i + 1] ^ k[i + 2] ^ k[i + 3] ^ ck);
        k[i + 4] = k[i] ^ t ^ reference_rotate(t, 13) ^ reference_rotate(t, 23);
    }
    for (int i = 0; i < 32; i++) {
        const uint32_t t = reference_tau(x[i + 1] ^ x[i + 2] ^ x[i + 3] ^ k[decrypt ? 35 - i : i + 4]);
        x[i + 4] = x[i] ^ t ^ reference_rotate(t, 2) ^ reference_rotate(t, 10) ^ reference_rotate(t, 18) ^ reference_rotate(t, 24);
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++)
            out[4 * i + j] = (uint8_t)(x[35 - i] >> (24 - 8 * j));
}

/* One multiplication by alpha; ieee = 0 for the order of GB/T 17964. The byte view of both standards. */
REFERENCE void reference_times_alpha(uint8_t t[16], int ieee)
{
    uint8_t r[16];
    if (ieee) {
        for (int i = 0; i < 16; i++)
            r[i] = (uint8_t)(t[i] << 1 | (i ? t[i - 1] >> 7 : 0));
        if (t[15] & 0x80)
            r[0] ^= 0x87;
    } else {
        for (int i = 0; i < 16; i++)
            r[i] = (uint8_t)(t[i] >> 1 | (i ? t[i - 1] << 7 : 0));
        if (t[15] & 1)
            r[0] ^= 0xe1;
    }
    memcpy(t, r, 16);
}

REFERENCE void reference_xex(uint8_t out[16], const uint8_t in[16], const uint8_t tweak[16], const uint8_t key[16], int decrypt)
{
    uint8_t block[16];
    for (int i = 0; i < 16; i++)
        block[i] = in[i] ^ tweak[i];
    reference_sm4(block, block, key, decrypt);
    for (int i = 0; i < 16; i++)
        out[i] = block[i] ^ tweak[i];
}

/* One data unit with its 16-byte tweak input; any length from 16 bytes. out may be in. */
REFERENCE void reference_xts(uint8_t *out, const uint8_t *in, size_t length, const uint8_t iv[16], const uint8_t key[32], int ieee,
                             int decrypt)
{
    uint8_t tweak[16], next[16], block[16];
    const size_t blocks = length / 16, rest = length % 16;
    reference_sm4(tweak, iv, key + 16, 0);
    for (size_t j = 0; j < blocks; j++) {
        if (rest && j == blocks - 1)
            break;
        reference_xex(out + 16 * j, in + 16 * j, tweak, key, decrypt);
        reference_times_alpha(tweak, ieee);
    }
    if (!rest)
        return;
    const size_t last = 16 * (blocks - 1);
    memcpy(next, tweak, 16);
    reference_times_alpha(next, ieee);
    uint8_t tail[16];
    memcpy(tail, in + last + 16, rest);
    reference_xex(block, in + last, decrypt ? next : tweak, key, decrypt);
    memcpy(out + last + 16, block, rest);
    memcpy(block, tail, rest);
    reference_xex(out + last, block, decrypt ? tweak : next, key, decrypt);
}

REFERENCE void reference_unit_iv(uint8_t iv[16], uint64_t unit)
{
    memset(iv, 0, 16);
    for (int i = 0; i < 8; i++)
        iv[i] = (uint8_t)(unit >> 8 * i);
}

/* Consecutive units, the last one possibly shorter. */
REFERENCE void reference_xts_units(uint8_t *out, const uint8_t *in, size_t length, size_t unit_size, uint64_t unit,
                                   const uint8_t key[32], int ieee, int decrypt)
{
    while (length) {
        const size_t now = length < unit_size ? length : unit_size;
        uint8_t iv[16];
        reference_unit_iv(iv, unit++);
        reference_xts(out, in, now, iv, key, ieee, decrypt);
        out += now;
        in += now;
        length -= now;
    }
}

/* counter_bytes: how many of the counter's last bytes count (16 for CTR, 4 for GCM). */
REFERENCE void reference_ctr(uint8_t *out, const uint8_t *in, size_t length, const uint8_t key[16], const uint8_t counter[16],
                             int counter_bytes)
{
    uint8_t c[16], pad[16];
    memcpy(c, counter, 16);
    for (size_t i = 0; i < length; i++) {
        if (i % 16 == 0) {
            reference_sm4(pad, c, key, 0);
            for (int b = 15; b >= 16 - counter_bytes && ++c[b] == 0; b--)
                ;
        }
        out[i] = in[i] ^ pad[i % 16];
    }
}

/* y = (y ^ block) h, bit by bit (SP 800-38D 6.3). */
REFERENCE void reference_ghash_block(uint8_t y[16], const uint8_t block[16], const uint8_t h[16])
{
    uint8_t x[16], z[16] = { 0 }, v[16];
    for (int i = 0; i < 16; i++)
        x[i] = y[i] ^ block[i];
    memcpy(v, h, 16);
    for (int i = 0; i < 128; i++) {
        if (x[i / 8] >> (7 - i % 8) & 1)
            for (int j = 0; j < 16; j++)
                z[j] ^= v[j];
        reference_times_alpha(v, 0);
    }
    memcpy(y, z, 16);
}

REFERENCE void reference_ghash(uint8_t y[16], const uint8_t *data, size_t length, const uint8_t h[16])
{
    for (size_t i = 0; i < length; i += 16) {
        uint8_t block[16] = { 0 };
        memcpy(block, data + i, length - i < 16 ? length - i : 16);
        reference_ghash_block(y, block, h);
    }
}

REFERENCE void reference_ghash_lengths(uint8_t y[16], uint64_t a, uint64_t b, const uint8_t h[16])
{
    uint8_t block[16];
    for (int i = 0; i < 8; i++) {
        block[i] = (uint8_t)(a * 8 >> (56 - 8 * i));
        block[8 + i] = (uint8_t)(b * 8 >> (56 - 8 * i));
    }
    reference_ghash_block(y, block, h);
}

REFERENCE void reference_gcm(uint8_t *out, uint8_t tag[16], const uint8_t *nonce, size_t nonce_length, const uint8_t *aad,
                             size_t aad_length, const uint8_t *in, size_t length, const uint8_t key[16])
{
    uint8_t h[16] = { 0 }, j0[16] = { 0 }, next[16], y[16] = { 0 };
    reference_sm4(h, h, key, 0);
    if (nonce_length == 12) {
        memcpy(j0, nonce, 12);
        j0[15] = 1;
    } else {
        reference_ghash(j0, nonce, nonce_length, h);
        reference_ghash_lengths(j0, 0, nonce_length, h);
    }
    memcpy(next, j0, 16);
    for (int b = 15; b >= 12 && ++next[b] == 0; b--)
        ;
    reference_ctr(out, in, length, key, next, 4);
    reference_ghash(y, aad, aad_length, h);
    reference_ghash(y, out, length, h);
    reference_ghash_lengths(y, aad_length, length, h);
    reference_sm4(tag, j0, key, 0);
    for (int i = 0; i < 16; i++)
        tag[i] ^= y[i];
}

#endif
