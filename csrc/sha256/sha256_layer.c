/* SHA-256 in two and three states at once, by the CPU's SHA instructions. Standard: FIPS 180-4, 6.2. See sha256_layer.h. */
#if defined(__x86_64__)
#define CSVF_TARGET_SHA
#include "../target_begin.h"

#include <immintrin.h>
#include <string.h>

#include "../cpu.h"
#include "../include/csvfast.h"
#include "sha256_layer.h"

static const uint32_t constants[64] __attribute__((aligned(16))) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be,
    0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa,
    0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85,
    0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3,
    0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f,
    0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};
/* A state as the instructions want it, in memory, too: f e b a and h g d c. */
static const uint32_t initial[8] = {
    0x9b05688c, 0x510e527f, 0xbb67ae85, 0x6a09e667, 0x5be0cd19, 0x1f83d9ab, 0xa54ff53a, 0x3c6ef372,
};
static const uint8_t place[8] = {3, 2, 7, 6, 1, 0, 5, 4};   /* of a, b, ..., h */

typedef struct state {
    __m128i abef, cdgh;
} state;

static inline state load(const uint32_t h[8])
{
    return (state){_mm_loadu_si128((const __m128i *)h), _mm_loadu_si128((const __m128i *)(h + 4))};
}

/* What the state was before the block waits in memory that is wiped, and not in registers, which the compiler would put on the stack. */
static inline state add_to(uint32_t h[8], state s)
{
    const state before = load(h);
    s = (state){_mm_add_epi32(s.abef, before.abef), _mm_add_epi32(s.cdgh, before.cdgh)};
    _mm_storeu_si128((__m128i *)h, s.abef);
    _mm_storeu_si128((__m128i *)(h + 4), s.cdgh);
    return s;
}

/* 16 words of message, big-endian in memory. */
static inline void load_message(__m128i w[4], const uint8_t *data)
{
    const __m128i order = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    for (int i = 0; i < 4; i++)
        w[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(data + 16 * i)), order);
}

/* The four words that follow, in the place of the oldest. */
static inline void expand(__m128i w[4], int i)
{
    const __m128i sum = _mm_add_epi32(_mm_sha256msg1_epu32(w[i % 4], w[(i + 1) % 4]), _mm_alignr_epi8(w[(i + 3) % 4], w[(i + 2) % 4], 4));
    w[i % 4] = _mm_sha256msg2_epu32(sum, w[(i + 3) % 4]);
}

/* Half of four rounds each: the second half of the word sums moved down. */
#define FIRST(s, sum) (s).cdgh = _mm_sha256rnds2_epu32((s).cdgh, (s).abef, sum)
#define SECOND(s, sum) (s).abef = _mm_sha256rnds2_epu32((s).abef, (s).cdgh, _mm_shuffle_epi32(sum, 0x0E))

/* Two states over the same message. */
static void compress2(uint32_t h0[8], uint32_t h1[8], const uint8_t *data, size_t blocks)
{
    state s0 = load(h0), s1 = load(h1);
    for (; blocks; blocks--, data += 64) {
        __m128i w[4];
        load_message(w, data);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            const __m128i sum = _mm_add_epi32(w[i % 4], _mm_load_si128((const __m128i *)(constants + 4 * i)));
            FIRST(s0, sum);
            FIRST(s1, sum);
            SECOND(s0, sum);
            SECOND(s1, sum);
            if (i < 12)
                expand(w, i);
        }
        s0 = add_to(h0, s0);
        s1 = add_to(h1, s1);
    }
}

/* Two states over one message and a third one over another. */
static void compress3(uint32_t h0[8], uint32_t h1[8], uint32_t h2[8], const uint8_t *data, const uint8_t *other, size_t blocks)
{
    state s0 = load(h0), s1 = load(h1), s2 = load(h2);
    for (; blocks; blocks--, data += 64, other += 64) {
        __m128i w[4], v[4];
        load_message(w, data);
        load_message(v, other);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            const __m128i constant = _mm_load_si128((const __m128i *)(constants + 4 * i));
            const __m128i sum = _mm_add_epi32(w[i % 4], constant), sum2 = _mm_add_epi32(v[i % 4], constant);
            FIRST(s0, sum);
            FIRST(s1, sum);
            FIRST(s2, sum2);
            SECOND(s0, sum);
            SECOND(s1, sum);
            SECOND(s2, sum2);
            if (i < 12) {
                expand(w, i);
                expand(v, i);
            }
        }
        s0 = add_to(h0, s0);
        s1 = add_to(h1, s1);
        s2 = add_to(h2, s2);
    }
}

int csvf__sha256_layer_usable(void) { return (csvf__cpu() & CSVF_CPU_SHA) != 0; }

void csvf__sha256_layer_init(csvf_sha256_layer *layer, const uint8_t *key, size_t length)
{
    uint8_t block[64] = {0};
    memset(layer, 0, sizeof *layer);
    memcpy(layer->sealed, initial, sizeof initial);
    memcpy(layer->clear, initial, sizeof initial);
    memcpy(layer->mac, initial, sizeof initial);
    memcpy(layer->outer, initial, sizeof initial);
    memcpy(block, key, length);
    uint32_t unused[8] = {0};
    for (size_t i = 0; i < 64; i++)
        block[i] ^= 0x36;
    compress2(layer->mac, unused, block, 1);
    for (size_t i = 0; i < 64; i++)
        block[i] ^= 0x36 ^ 0x5c;
    compress2(layer->outer, unused, block, 1);
    csvf_wipe(block, sizeof block);
    csvf_wipe(unused, sizeof unused);
}

static void compress(csvf_sha256_layer *layer, const uint8_t *sealed, const uint8_t *clear, size_t blocks)
{
    if (clear)
        compress3(layer->sealed, layer->mac, layer->clear, sealed, clear, blocks);
    else
        compress2(layer->sealed, layer->mac, sealed, blocks);
}

void csvf__sha256_layer_update(csvf_sha256_layer *layer, const uint8_t *sealed, const uint8_t *clear, size_t length)
{
    const size_t used = layer->total % 64;
    if (length == 0)
        return;
    layer->total += length;
    if (used) {
        const size_t take = 64 - used < length ? 64 - used : length;
        memcpy(layer->sealed_rest + used, sealed, take);
        if (clear)
            memcpy(layer->clear_rest + used, clear, take);
        if (used + take < 64)
            return;
        compress(layer, layer->sealed_rest, clear ? layer->clear_rest : NULL, 1);
        sealed += take;
        if (clear)
            clear += take;
        length -= take;
    }
    if (length >= 64)
        compress(layer, sealed, clear, length / 64);
    memcpy(layer->sealed_rest, sealed + length / 64 * 64, length % 64);
    if (clear)
        memcpy(layer->clear_rest, clear + length / 64 * 64, length % 64);
}

/* The end of a message of `total` bytes, of which total % 64 wait in `rest`. */
static void finish(uint8_t digest[32], const uint32_t h[8], const uint8_t *rest, uint64_t total)
{
    uint8_t tail[128] = {0};
    const size_t used = total % 64, blocks = used < 56 ? 1 : 2;
    uint32_t ended[8], unused[8] = {0};
    memcpy(tail, rest, used);
    tail[used] = 0x80;
    for (size_t i = 0; i < 8; i++)
        tail[64 * blocks - 1 - i] = (uint8_t)(total * 8 >> 8 * i);
    memcpy(ended, h, sizeof ended);
    compress2(ended, unused, tail, blocks);
    for (size_t i = 0; i < 32; i++)
        digest[i] = (uint8_t)(ended[place[i / 4]] >> (24 - 8 * (i % 4)));
    csvf_wipe(tail, sizeof tail);
    csvf_wipe(ended, sizeof ended);
    csvf_wipe(unused, sizeof unused);
}

void csvf__sha256_layer_digests(const csvf_sha256_layer *layer, uint8_t sealed[32], uint8_t mac[32], uint8_t clear[32])
{
    uint8_t inner[32];
    finish(sealed, layer->sealed, layer->sealed_rest, layer->total);
    finish(clear, layer->clear, layer->clear_rest, layer->total);
    finish(inner, layer->mac, layer->sealed_rest, layer->total + 64);
    finish(mac, layer->outer, inner, 64 + 32);
    csvf_wipe(inner, sizeof inner);
}

#include "../target_end.h"
#else
#include "sha256_layer.h"

int csvf__sha256_layer_usable(void) { return 0; }
void csvf__sha256_layer_init(csvf_sha256_layer *layer, const uint8_t *key, size_t length) { (void)layer, (void)key, (void)length; }
void csvf__sha256_layer_update(csvf_sha256_layer *layer, const uint8_t *sealed, const uint8_t *clear, size_t length)
{
    (void)layer, (void)sealed, (void)clear, (void)length;
}
void csvf__sha256_layer_digests(const csvf_sha256_layer *layer, uint8_t sealed[32], uint8_t mac[32], uint8_t clear[32])
{
    (void)layer, (void)sealed, (void)mac, (void)clear;
}
#endif
