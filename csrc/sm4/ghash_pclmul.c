/* GHASH by carry-less multiplication (PCLMULQDQ), eight blocks per reduction. Internal.
 *
 * Blocks are byte-reversed on loading; H is kept multiplied by x, which makes up for the bit order of GHASH, and the reduction
 * folds the lower half twice by 0xc2 << 56 (Gueron, Kounavis: "Intel carry-less multiplication instruction and its usage for
 * computing the GCM mode", 2014, and OpenSSL's ghash-x86_64). Products are by Karatsuba, with the sums of the halves of the
 * powers of H kept in the key. */
#if defined(__x86_64__)
#define CSVF_TARGET_PCLMUL
#include "../target_begin.h"

#include <immintrin.h>
#include <string.h>

#include "../cpu.h"
#include "../include/csvfast.h"
#include "ghash_kernel.h"

enum { WIDTH = 8 };

/* What csvf_ghash_key holds: H^1 .. H^8 times x, and for each the sum of its halves in both halves. */
typedef struct powers {
    __m128i power[WIDTH], sum[WIDTH];
} powers;

_Static_assert(sizeof(powers) <= sizeof(csvf_ghash_key), "csvf_ghash_key is too small");

static inline __m128i load(const void *p) { return _mm_loadu_si128((const __m128i *)p); }

static inline __m128i reverse_bytes(__m128i x)
{
    return _mm_shuffle_epi8(x, _mm_set_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}

static inline __m128i add_halves(__m128i x) { return _mm_xor_si128(x, _mm_shuffle_epi32(x, 0x4e)); }

/* low + middle x^64 + high x^128, the middle still holding Karatsuba's low + high. */
static inline __m128i reduce(__m128i low, __m128i middle, __m128i high)
{
    const __m128i polynomial = _mm_set_epi64x(0, (long long)0xc200000000000000ull);
    middle = _mm_xor_si128(middle, _mm_xor_si128(low, high));
    low = _mm_xor_si128(low, _mm_slli_si128(middle, 8));
    high = _mm_xor_si128(high, _mm_srli_si128(middle, 8));
    low = _mm_xor_si128(_mm_shuffle_epi32(low, 0x4e), _mm_clmulepi64_si128(low, polynomial, 0x00));
    low = _mm_xor_si128(_mm_shuffle_epi32(low, 0x4e), _mm_clmulepi64_si128(low, polynomial, 0x00));
    return _mm_xor_si128(high, low);
}

static inline __m128i multiply(__m128i a, __m128i h, __m128i h_sum)
{
    return reduce(_mm_clmulepi64_si128(a, h, 0x00), _mm_clmulepi64_si128(add_halves(a), h_sum, 0x00),
                  _mm_clmulepi64_si128(a, h, 0x11));
}

static void init(csvf_ghash_key *key, const uint8_t h[16])
{
    __m128i power[WIDTH], sum[WIDTH];
    __m128i x = reverse_bytes(load(h));
    /* times x: shift left by one; the bit that falls out comes back as the polynomial */
    const __m128i carry = _mm_srai_epi32(_mm_shuffle_epi32(x, 0xff), 31);
    x = _mm_or_si128(_mm_slli_epi64(x, 1), _mm_slli_si128(_mm_srli_epi64(x, 63), 8));
    x = _mm_xor_si128(x, _mm_and_si128(carry, _mm_set_epi64x((long long)0xc200000000000000ull, 1)));
    memset(key, 0, sizeof *key);
    power[0] = x;
    sum[0] = add_halves(x);
    for (int i = 1; i < WIDTH; i++) {
        power[i] = multiply(power[i - 1], x, sum[0]);
        sum[i] = add_halves(power[i]);
    }
    memcpy((char *)key + offsetof(powers, power), power, sizeof power);
    memcpy((char *)key + offsetof(powers, sum), sum, sizeof sum);
    csvf_wipe(power, sizeof power);
    csvf_wipe(sum, sizeof sum);
}

static void update(const csvf_ghash_key *key, uint8_t y[16], const uint8_t *data, size_t blocks)
{
    const char *power = (const char *)key + offsetof(powers, power), *sum = (const char *)key + offsetof(powers, sum);
    __m128i hash = reverse_bytes(load(y));
    for (; blocks >= WIDTH; blocks -= WIDTH, data += 16 * WIDTH) {
        __m128i low = _mm_setzero_si128(), middle = low, high = low;
#if defined(__clang__)
#  pragma clang loop unroll(full)
#else
#  pragma GCC unroll 8
#endif
        for (int i = 0; i < WIDTH; i++) {
            __m128i block = reverse_bytes(load(data + 16 * i));
            if (i == 0)
                block = _mm_xor_si128(block, hash);
            const __m128i h = load(power + 16 * (WIDTH - 1 - i)), h_sum = load(sum + 16 * (WIDTH - 1 - i));
            low = _mm_xor_si128(low, _mm_clmulepi64_si128(block, h, 0x00));
            high = _mm_xor_si128(high, _mm_clmulepi64_si128(block, h, 0x11));
            middle = _mm_xor_si128(middle, _mm_clmulepi64_si128(add_halves(block), h_sum, 0x00));
        }
        hash = reduce(low, middle, high);
    }
    if (blocks) {
        __m128i low = _mm_setzero_si128(), middle = low, high = low;
        for (size_t i = 0; i < blocks; i++) {
            const __m128i block = _mm_xor_si128(reverse_bytes(load(data + 16 * i)), hash);
            const __m128i h = load(power + 16 * (blocks - 1 - i)), h_sum = load(sum + 16 * (blocks - 1 - i));
            low = _mm_xor_si128(low, _mm_clmulepi64_si128(block, h, 0x00));
            high = _mm_xor_si128(high, _mm_clmulepi64_si128(block, h, 0x11));
            middle = _mm_xor_si128(middle, _mm_clmulepi64_si128(add_halves(block), h_sum, 0x00));
            hash = _mm_setzero_si128();
        }
        hash = reduce(low, middle, high);
    }
    _mm_storeu_si128((__m128i *)y, reverse_bytes(hash));
}

const csvf_ghash_kernel csvf__ghash_pclmul = { "pclmul-avx2", CSVF_CPU_PCLMUL | CSVF_CPU_AVX2, init, update };

#include "../target_end.h"
#else
typedef int csvf__ghash_pclmul_is_empty;   /* ISO C forbids an empty translation unit */
#endif
