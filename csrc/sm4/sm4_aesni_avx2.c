/* SM4 kernel "aesni-avx2": the AVX2 template with AES-NI as S-box, for CPUs without GFNI (today's Hygon parts). The last round of AES with a
 * zero key inverts in the AES field; pshufb over nibble tables applies the output matrices. No VAES: AES works on 128-bit halves. Internal.
 *
 * Needs: AES-NI, AVX2, BMI2 (compilers use it). Constant time: the tables are whole registers of pshufb, never memory indexed by data. */
#if defined(__x86_64__)
#define CSVF_TARGET_AESNI_AVX2
#include "../target_begin.h"

#include <immintrin.h>

#include "../cpu.h"
#include "../include/csvfast.h"
#include "sm4_kernel.h"
#include "sm4_tables.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* What the S-box constants add to every byte of the linear layer's result (see sm4_avx2_schedule.h): v = u + w occurs twice. */
#define ROUND_CONSTANT (CSVF_SM4_LINEAR_CONSTANT ^ CSVF_SM4_U_AES_CONSTANT ^ CSVF_SM4_W_AES_CONSTANT)
#define KEY_ROUND_CONSTANT                                                                                                    \
    (CSVF_SM4_KEY_CONSTANT ^ CSVF_SM4_KEY_0_AES_CONSTANT ^ CSVF_SM4_KEY_1_AES_CONSTANT ^ CSVF_SM4_KEY_2_AES_CONSTANT ^         \
     CSVF_SM4_KEY_3_AES_CONSTANT)

ALWAYS_INLINE __m128i table(const uint8_t t[16]) { return _mm_load_si128((const __m128i *)t); }

ALWAYS_INLINE __m256i table_twice(const uint8_t t[16]) { return _mm256_broadcastsi128_si256(table(t)); }

/* A matrix by its nibble tables, for bytes already split. */
#define LOOK_UP(tables, low, high)                                                                                            \
    _mm256_xor_si256(_mm256_shuffle_epi8(table_twice(csvf__sm4_##tables##_low), low),                                         \
                     _mm256_shuffle_epi8(table_twice(csvf__sm4_##tables##_high), high))
#define LOOK_UP_128(tables, low, high)                                                                                        \
    _mm_xor_si128(_mm_shuffle_epi8(table(csvf__sm4_##tables##_low), low),                                                     \
                  _mm_shuffle_epi8(table(csvf__sm4_##tables##_high), high))

ALWAYS_INLINE void split(__m256i x, __m256i *low, __m256i *high)
{
    const __m256i mask = _mm256_set1_epi8(15);
    *low = _mm256_and_si256(x, mask);
    *high = _mm256_and_si256(_mm256_srli_epi16(x, 4), mask);
}

ALWAYS_INLINE void split_128(__m128i x, __m128i *low, __m128i *high)
{
    const __m128i mask = _mm_set1_epi8(15);
    *low = _mm_and_si128(x, mask);
    *high = _mm_and_si128(_mm_srli_epi16(x, 4), mask);
}

/* The round key enters as the key of aesenclast, for free. */
#define INVERT_APART 1
typedef __m128i round_key;

ALWAYS_INLINE round_key round_key_of(uint32_t word) { return _mm_set1_epi32((int)word); }

ALWAYS_INLINE __m256i invert(__m256i z, round_key key)
{
    z = _mm256_shuffle_epi8(z, table_twice(csvf__sm4_unshift_rows));
    const __m128i low = _mm_aesenclast_si128(_mm256_castsi256_si128(z), key);
    const __m128i high = _mm_aesenclast_si128(_mm256_extracti128_si256(z, 1), key);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

/* u and w of the linear layer from the S-box's bytes. */
ALWAYS_INLINE void substitute(__m256i y, round_key key, __m256i *u, __m256i *w)
{
    __m256i low, high;
    (void)key;
    split(y, &low, &high);
    *u = LOOK_UP(u_aes, low, high);
    *w = LOOK_UP(w_aes, low, high);
}

ALWAYS_INLINE __m256i into_basis(__m256i x)
{
    __m256i low, high;
    split(x, &low, &high);
    return LOOK_UP(p, low, high);
}

ALWAYS_INLINE __m256i out_of_basis(__m256i x)
{
    __m256i low, high;
    split(x, &low, &high);
    return LOOK_UP(p_inverse, low, high);
}

ALWAYS_INLINE __m128i rotate_left(__m128i x, int n) { return _mm_or_si128(_mm_slli_epi32(x, n), _mm_srli_epi32(x, 32 - n)); }

/* Constants of four rounds, as wanted in the new words, to keys of aesenclast: back through P, the linear layer L and the matrices of the two
 * S-boxes. With t = <<<1, L = 1 + t^2 + t^10 + t^18 + t^24 and L^32 = 1 (modulo t^32 = 1), so 1/L = L^31 = L L^2 L^4 L^8 L^16 =
 * L (1 + t^16 + t^20) t^8 t^16. */
ALWAYS_INLINE __m128i round_constants(__m128i e)
{
    const __m128i swap = _mm_setr_epi8(3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12);
    __m128i low, high;
    split_128(e, &low, &high);
    const __m128i x = _mm_shuffle_epi8(LOOK_UP_128(p_inverse, low, high), swap);
    __m128i y = _mm_xor_si128(_mm_xor_si128(x, rotate_left(x, 2)), _mm_xor_si128(rotate_left(x, 10), rotate_left(x, 18)));
    y = _mm_xor_si128(y, rotate_left(x, 24));
    y = _mm_xor_si128(y, _mm_xor_si128(rotate_left(y, 16), rotate_left(y, 20)));
    split_128(_mm_shuffle_epi8(rotate_left(y, 24), swap), &low, &high);
    return LOOK_UP_128(aes_of_out, low, high);
}

/* x^128 times every byte: what stays in the byte and what goes to the next one. Nibble tables: x + x alpha + x alpha^2 + x alpha^7, with the
 * bits of a byte in the order of the standard. */
#define TIMES(x) ((x) ^ (x) << 1 ^ (x) << 2 ^ (x) << 7)
#define TIMES_MIRRORED(x) ((x) << 8 ^ (x) << 7 ^ (x) << 6 ^ (x) << 1)
#define SIXTEEN(f, s)                                                                                                         \
    { f(0 << s), f(1 << s), f(2 << s), f(3 << s), f(4 << s), f(5 << s), f(6 << s), f(7 << s), f(8 << s), f(9 << s),            \
      f(10 << s), f(11 << s), f(12 << s), f(13 << s), f(14 << s), f(15 << s) }
#define STAYS(x) (uint8_t)TIMES(x)
#define GOES(x) (uint8_t)(TIMES(x) >> 8)
#define STAYS_MIRRORED(x) (uint8_t)(TIMES_MIRRORED(x) >> 8)
#define GOES_MIRRORED(x) (uint8_t)TIMES_MIRRORED(x)

static const uint8_t fold_tables[2][4][16] __attribute__((aligned(16))) = {
    [CSVF_STANDARD_GB] = { SIXTEEN(STAYS_MIRRORED, 0), SIXTEEN(STAYS_MIRRORED, 4), SIXTEEN(GOES_MIRRORED, 0),
                           SIXTEEN(GOES_MIRRORED, 4) },
    [CSVF_STANDARD_IEEE] = { SIXTEEN(STAYS, 0), SIXTEEN(STAYS, 4), SIXTEEN(GOES, 0), SIXTEEN(GOES, 4) },
};

typedef struct fold {
    __m256i stays[2], goes[2];
} fold;

ALWAYS_INLINE fold fold_of(int standard)
{
    const uint8_t(*t)[16] = fold_tables[standard == CSVF_STANDARD_IEEE ? CSVF_STANDARD_IEEE : CSVF_STANDARD_GB];
    return (fold){ { table_twice(t[0]), table_twice(t[1]) }, { table_twice(t[2]), table_twice(t[3]) } };
}

ALWAYS_INLINE void fold_bytes(const fold *f, __m256i x, __m256i *stays, __m256i *goes)
{
    __m256i low, high;
    split(x, &low, &high);
    *stays = _mm256_xor_si256(_mm256_shuffle_epi8(f->stays[0], low), _mm256_shuffle_epi8(f->stays[1], high));
    *goes = _mm256_xor_si256(_mm256_shuffle_epi8(f->goes[0], low), _mm256_shuffle_epi8(f->goes[1], high));
}

/* u, w and v = u + w of the linear layer of S(z), for the word-sliced path: on xmm, as taking a ymm apart for aesenclast costs more latency
 * than the width saves. */
ALWAYS_INLINE void substitute_words(__m128i z, __m128i *u, __m128i *w, __m128i *v)
{
    __m128i low, high;
    z = _mm_shuffle_epi8(z, table(csvf__sm4_unshift_rows));
    split_128(_mm_aesenclast_si128(z, _mm_setzero_si128()), &low, &high);
    *u = LOOK_UP_128(u_aes, low, high);
    *w = LOOK_UP_128(w_aes, low, high);
    *v = _mm_xor_si128(*u, *w);
}

ALWAYS_INLINE __m128i words_into_basis(__m128i x)
{
    __m128i low, high;
    split_128(x, &low, &high);
    return LOOK_UP_128(p, low, high);
}

ALWAYS_INLINE __m128i words_out_of_basis(__m128i x)
{
    __m128i low, high;
    split_128(x, &low, &high);
    return LOOK_UP_128(p_inverse, low, high);
}

/* The key schedule: the four byte matrices of L' after the S-box, of a word held in every lane; with equal columns ShiftRows does nothing. */
ALWAYS_INLINE void substitute_key(__m128i z, __m128i y[4])
{
    __m128i low, high;
    split_128(_mm_aesenclast_si128(z, _mm_setzero_si128()), &low, &high);
    y[0] = LOOK_UP_128(key0_aes, low, high);
    y[1] = LOOK_UP_128(key1_aes, low, high);
    y[2] = LOOK_UP_128(key2_aes, low, high);
    y[3] = LOOK_UP_128(key3_aes, low, high);
}

#include "sm4_avx2_template.h"

const csvf_sm4_kernel csvf__sm4_aesni_avx2 = {
    "aesni-avx2", CSVF_CPU_AES | CSVF_CPU_AVX2 | CSVF_CPU_BMI2, expand, ecb, ctr, xts, xex, tweaks, NULL,
};

#include "../target_end.h"
#else
typedef int csvf__sm4_aesni_avx2_is_for_x86_64;
#endif
