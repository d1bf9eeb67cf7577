/* What every SM3 file shares: constants, big-endian words, padding. Internal; everything is static inline.
 * Standard: GB/T 32905-2016 (4.1 IV, 4.2 constants, 5.2 padding). PURE. */
#ifndef CSVF_SM3_COMMON_H
#define CSVF_SM3_COMMON_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define CSVF__SM3_BLOCK ((size_t)64)

static const uint32_t csvf__sm3_iv[8] = {
    0x7380166f, 0x4914b2b9, 0x172442d7, 0xda8a0600, 0xa96f30bc, 0x163138aa, 0xe38dee4d, 0xb0fb0e4e,
};

/* T_j rotated left by j mod 32, ready for round j. */
static const uint32_t csvf__sm3_t[64] = {
    0x79cc4519, 0xf3988a32, 0xe7311465, 0xce6228cb, 0x9cc45197, 0x3988a32f, 0x7311465e, 0xe6228cbc,
    0xcc451979, 0x988a32f3, 0x311465e7, 0x6228cbce, 0xc451979c, 0x88a32f39, 0x11465e73, 0x228cbce6,
    0x9d8a7a87, 0x3b14f50f, 0x7629ea1e, 0xec53d43c, 0xd8a7a879, 0xb14f50f3, 0x629ea1e7, 0xc53d43ce,
    0x8a7a879d, 0x14f50f3b, 0x29ea1e76, 0x53d43cec, 0xa7a879d8, 0x4f50f3b1, 0x9ea1e762, 0x3d43cec5,
    0x7a879d8a, 0xf50f3b14, 0xea1e7629, 0xd43cec53, 0xa879d8a7, 0x50f3b14f, 0xa1e7629e, 0x43cec53d,
    0x879d8a7a, 0x0f3b14f5, 0x1e7629ea, 0x3cec53d4, 0x79d8a7a8, 0xf3b14f50, 0xe7629ea1, 0xcec53d43,
    0x9d8a7a87, 0x3b14f50f, 0x7629ea1e, 0xec53d43c, 0xd8a7a879, 0xb14f50f3, 0x629ea1e7, 0xc53d43ce,
    0x8a7a879d, 0x14f50f3b, 0x29ea1e76, 0x53d43cec, 0xa7a879d8, 0x4f50f3b1, 0x9ea1e762, 0x3d43cec5,
};

static inline uint32_t csvf__load_be32(const uint8_t *in)
{
    uint32_t word;
    memcpy(&word, in, 4);
    return __builtin_bswap32(word);
}

static inline void csvf__store_be32(uint8_t *out, uint32_t word)
{
    word = __builtin_bswap32(word);
    memcpy(out, &word, 4);
}

static inline void csvf__store_be64(uint8_t *out, uint64_t word)
{
    word = __builtin_bswap64(word);
    memcpy(out, &word, 8);
}

/* A memset the compiler must keep: kernels call it on message schedules. */
static inline void csvf__wipe(void *data, size_t length)
{
    memset(data, 0, length);
    __asm__ volatile("" : : "r"(data) : "memory");
}

/* Completes the last one or two blocks of a message.
 *   InOut: tail    128 bytes of which the first `used` (0..63) hold the end of the message
 *   In:    total   length of the whole message in bytes; the standard allows less than 2^61
 * Returns how many 64-byte blocks of tail are to be compressed: 1 or 2. */
static inline size_t csvf__sm3_pad(uint8_t tail[128], size_t used, uint64_t total)
{
    size_t blocks = used < 56 ? 1 : 2;
    tail[used] = 0x80;
    memset(tail + used + 1, 0, 64 * blocks - 8 - used - 1);
    csvf__store_be64(tail + 64 * blocks - 8, total << 3);
    return blocks;
}

static inline void csvf__sm3_store_digest(uint8_t digest[32], const uint32_t h[8])
{
    for (int i = 0; i < 8; i++)
        csvf__store_be32(digest + 4 * i, h[i]);
}

#endif
