/* SM4 kernel "gfni-avx2": the AVX2 template with GFNI as S-box. gf2p8affineinvqb inverts in the AES field and applies the S-box's
 * output matrix and the linear layer's share in one instruction, so a byte costs two of them per round. Internal.
 *
 * Needs: AVX2, BMI2 (compilers use it), GFNI (VEX form). Constant time: no instruction here depends on data for its address or for a branch. */
#if defined(__x86_64__)
#define CSVF_TARGET_GFNI_AVX2
#include "../target_begin.h"

#include <immintrin.h>

#include "../cpu.h"
#include "../include/csvfast.h"
#include "sm4_kernel.h"
#include "sm4_tables.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* What the S-box constants add to every byte of the linear layer's result (see expand in sm4_avx2_schedule.h). */
#define ROUND_CONSTANT CSVF_SM4_LINEAR_CONSTANT
#define KEY_ROUND_CONSTANT CSVF_SM4_KEY_CONSTANT

#define MATRIX(qword) _mm256_set1_epi64x((long long)(qword))
#define MATRIX128(qword) _mm_set1_epi64x((long long)(qword))

/* gf2p8affineinvqb inverts by itself; the round key is added to w. */
#define INVERT_APART 0
typedef __m256i round_key;

ALWAYS_INLINE round_key round_key_of(uint32_t word) { return _mm256_set1_epi32((int)word); }

ALWAYS_INLINE __m256i invert(__m256i z, round_key key)
{
    (void)key;
    return z;
}

/* u = U S(z) and w = W S(z) + key for 32 bytes. */
ALWAYS_INLINE void substitute(__m256i z, round_key key, __m256i *u, __m256i *w)
{
    *u = _mm256_gf2p8affineinv_epi64_epi8(z, MATRIX(CSVF_SM4_U), 0);
    *w = _mm256_xor_si256(_mm256_gf2p8affineinv_epi64_epi8(z, MATRIX(CSVF_SM4_W), 0), key);
}

/* Constants of four rounds, as wanted in the new words, to round keys: every new byte gets three of the four w, so each w gets the sum of
 * the other three constants. */
ALWAYS_INLINE __m128i round_constants(__m128i e)
{
    const __m128i by_one = _mm_setr_epi8(1, 2, 3, 0, 5, 6, 7, 4, 9, 10, 11, 8, 13, 14, 15, 12);
    const __m128i a = _mm_shuffle_epi8(e, by_one), b = _mm_shuffle_epi8(a, by_one);
    return _mm_xor_si128(_mm_xor_si128(a, b), _mm_shuffle_epi8(b, by_one));
}

ALWAYS_INLINE __m256i into_basis(__m256i x)
{
    return _mm256_gf2p8affine_epi64_epi8(x, MATRIX(CSVF_SM4_P), 0);
}

ALWAYS_INLINE __m256i out_of_basis(__m256i x)
{
    return _mm256_gf2p8affine_epi64_epi8(x, MATRIX(CSVF_SM4_P_INVERSE), 0);
}

/* x^128 times every byte: what stays in the byte and what goes to the next one. */
typedef struct fold {
    __m256i low, high;
} fold;

ALWAYS_INLINE fold fold_of(int standard)
{
    fold f;
    f.low = standard == CSVF_STANDARD_IEEE ? MATRIX(CSVF_SM4_IEEE_FOLD_LOW) : MATRIX(CSVF_SM4_GB_FOLD_LOW);
    f.high = standard == CSVF_STANDARD_IEEE ? MATRIX(CSVF_SM4_IEEE_FOLD_HIGH) : MATRIX(CSVF_SM4_GB_FOLD_HIGH);
    return f;
}

ALWAYS_INLINE void fold_bytes(const fold *f, __m256i x, __m256i *low, __m256i *high)
{
    *low = _mm256_gf2p8affine_epi64_epi8(x, f->low, 0);
    *high = _mm256_gf2p8affine_epi64_epi8(x, f->high, 0);
}

/* The word-sliced path: one ymm holds one word of 8 blocks. */
#define WORD_VECTOR_256 1
#define words_into_basis into_basis
#define words_out_of_basis out_of_basis

/* u, w and v = u + w of the linear layer of S(z). */
ALWAYS_INLINE void substitute_words(__m256i z, __m256i *u, __m256i *w, __m256i *v)
{
    *v = _mm256_gf2p8affineinv_epi64_epi8(z, MATRIX(CSVF_SM4_V), 0);
    *w = _mm256_gf2p8affineinv_epi64_epi8(z, MATRIX(CSVF_SM4_W), 0);
    *u = _mm256_gf2p8affineinv_epi64_epi8(z, MATRIX(CSVF_SM4_U), 0);
}

/* The key schedule: the four byte matrices of L' after the S-box, of a word held in every lane. */
ALWAYS_INLINE void substitute_key(__m128i z, __m128i y[4])
{
    y[0] = _mm_gf2p8affineinv_epi64_epi8(z, MATRIX128(CSVF_SM4_KEY_0), 0);
    y[1] = _mm_gf2p8affineinv_epi64_epi8(z, MATRIX128(CSVF_SM4_KEY_1), 0);
    y[2] = _mm_gf2p8affineinv_epi64_epi8(z, MATRIX128(CSVF_SM4_KEY_2), 0);
    y[3] = _mm_gf2p8affineinv_epi64_epi8(z, MATRIX128(CSVF_SM4_KEY_3), 0);
}

#include "sm4_avx2_template.h"

const csvf_sm4_kernel csvf__sm4_gfni_avx2 = {
    "gfni-avx2", CSVF_CPU_AVX2 | CSVF_CPU_BMI2 | CSVF_CPU_GFNI, expand, ecb, ctr, xts, xex, tweaks, NULL,
};

#include "../target_end.h"
#else
typedef int csvf__sm4_gfni_avx2_is_for_x86_64;
#endif
