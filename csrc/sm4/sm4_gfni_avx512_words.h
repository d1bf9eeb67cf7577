/* Word-sliced SM4 with GFNI and AVX-512 for 1 to 16 blocks, and the key schedule: included by sm4_gfni_avx512.c only.
 *
 * Register i holds word i of the blocks, bytes in memory order. One round is a chain of four instructions (inversion, rotation,
 * three-way xor, xor): three gf2p8affineinvqb with the linear layer folded in run side by side, and the argument of the next inversion is
 * computed beside the new word, not from it. */
#ifndef CSVF_SM4_GFNI_AVX512_WORDS_H
#define CSVF_SM4_GFNI_AVX512_WORDS_H

#define WORDS_BLOCKS 16u

/* x0 becomes the new word; z, the sum of the other three, becomes the next round's. */
#define WORDS_ROUND(xor, xor3, invert, rotate, broadcast, x0, x2, x3, key)                                                      \
    do {                                                                                                                        \
        const __auto_type v_ = invert(z, v, 0);                                                                                 \
        const __auto_type w_ = invert(z, w, 0);                                                                                 \
        const __auto_type u_ = invert(z, u, 0);                                                                                 \
        const __auto_type a_ = xor(x0, broadcast((int)(key)));                                                                  \
        const __auto_type b_ = xor3(rotate(v_, 16), rotate(v_, 24), rotate(w_, 8), 0x96);                                       \
        z = xor(xor3(a_, u_, xor(x2, x3), 0x96), b_);                                                                           \
        x0 = xor3(a_, u_, b_, 0x96);                                                                                            \
    } while (0)

/* E of the blocks of one vector type in word-sliced form: x in, x out (words in output order). */
#define DEFINE_WORDS_CRYPT(name, type, xor, xor3, invert, affine, rotate, broadcast, broadcast_matrix)                          \
    INLINE void name(const csvf_sm4_schedule *schedule, type x[4])                                                              \
    {                                                                                                                           \
        const type u = broadcast_matrix((long long)CSVF_SM4_U), w = broadcast_matrix((long long)CSVF_SM4_W);                    \
        const type v = broadcast_matrix((long long)CSVF_SM4_V), p = broadcast_matrix((long long)CSVF_SM4_P);                    \
        const type p_inverse = broadcast_matrix((long long)CSVF_SM4_P_INVERSE);                                                 \
        const uint32_t *key = schedule->words + KEY_WORDS, *out = schedule->words + KEY_WORDS_OUT;                              \
        type x0 = affine(x[0], p, 0), x1 = affine(x[1], p, 0), x2 = affine(x[2], p, 0);                                         \
        type x3 = xor(affine(x[3], p, 0), broadcast((int)schedule->words[KEY_WORDS_IN]));                                       \
        type z = xor3(x1, x2, x3, 0x96);                                                                                        \
        for (const uint32_t *end = key + 32; key < end; key += 4) {                                                             \
            WORDS_ROUND(xor, xor3, invert, rotate, broadcast, x0, x2, x3, key[0]);                                              \
            WORDS_ROUND(xor, xor3, invert, rotate, broadcast, x1, x3, x0, key[1]);                                              \
            WORDS_ROUND(xor, xor3, invert, rotate, broadcast, x2, x0, x1, key[2]);                                              \
            WORDS_ROUND(xor, xor3, invert, rotate, broadcast, x3, x1, x2, key[3]);                                              \
        }                                                                                                                       \
        x[0] = xor(affine(x3, p_inverse, 0), broadcast((int)out[0]));                                                           \
        x[1] = xor(affine(x2, p_inverse, 0), broadcast((int)out[1]));                                                           \
        x[2] = xor(affine(x1, p_inverse, 0), broadcast((int)out[2]));                                                           \
        x[3] = xor(affine(x0, p_inverse, 0), broadcast((int)out[3]));                                                           \
    }
DEFINE_WORDS_CRYPT(words_crypt, V, _mm512_xor_si512, _mm512_ternarylogic_epi32, _mm512_gf2p8affineinv_epi64_epi8,
                   _mm512_gf2p8affine_epi64_epi8, _mm512_rol_epi32, _mm512_set1_epi32, _mm512_set1_epi64)
DEFINE_WORDS_CRYPT(words_crypt_few, __m128i, _mm_xor_si128, _mm_ternarylogic_epi32, _mm_gf2p8affineinv_epi64_epi8,
                   _mm_gf2p8affine_epi64_epi8, _mm_rol_epi32, _mm_set1_epi32, _mm_set1_epi64x)

/* 4 x 4 dwords in every 128-bit lane; its own inverse. */
INLINE void words_transpose(V a[4])
{
    V t0 = _mm512_unpacklo_epi32(a[0], a[2]), t1 = _mm512_unpackhi_epi32(a[0], a[2]);
    V t2 = _mm512_unpacklo_epi32(a[1], a[3]), t3 = _mm512_unpackhi_epi32(a[1], a[3]);
    a[0] = _mm512_unpacklo_epi32(t0, t2);
    a[1] = _mm512_unpackhi_epi32(t0, t2);
    a[2] = _mm512_unpacklo_epi32(t1, t3);
    a[3] = _mm512_unpackhi_epi32(t1, t3);
}

/* 4 x 4 dwords in a 128-bit register; its own inverse. */
INLINE void words_transpose_few(__m128i a[4])
{
    __m128i t0 = _mm_unpacklo_epi32(a[0], a[2]), t1 = _mm_unpackhi_epi32(a[0], a[2]);
    __m128i t2 = _mm_unpacklo_epi32(a[1], a[3]), t3 = _mm_unpackhi_epi32(a[1], a[3]);
    a[0] = _mm_unpacklo_epi32(t0, t2);
    a[1] = _mm_unpackhi_epi32(t0, t2);
    a[2] = _mm_unpacklo_epi32(t1, t3);
    a[3] = _mm_unpackhi_epi32(t1, t3);
}

/* out = E(in xor before) xor after for 1 to 4 blocks in 128-bit registers: where 512-bit instructions run in two halves, the narrow
 * chain is a third shorter. */
INLINE void words_blocks_few(const csvf_sm4_schedule *schedule, uint8_t *out, const uint8_t *in, size_t blocks,
                             const uint8_t *before, const uint8_t *after)
{
    __m128i x[4];
    UNROLL for (size_t i = 0; i < 4; i++) {
        const __mmask8 mask = i < blocks ? 0xf : 0;
        x[i] = _mm_maskz_loadu_epi32(mask, in + 16 * i);
        if (before)
            x[i] = _mm_xor_si128(x[i], _mm_maskz_loadu_epi32(mask, before + 16 * i));
    }
    words_transpose_few(x);
    words_crypt_few(schedule, x);
    words_transpose_few(x);
    UNROLL for (size_t i = 0; i < 4; i++) {
        if (i >= blocks)
            break;
        if (after)
            x[i] = _mm_xor_si128(x[i], _mm_loadu_si128((const __m128i *)(after + 16 * i)));
        _mm_storeu_si128((__m128i *)(out + 16 * i), x[i]);
    }
}

/* out = E(in xor before) xor after for 1 to 16 blocks; before and after may be NULL. */
INLINE void words_blocks(const csvf_sm4_schedule *schedule, uint8_t *out, const uint8_t *in, size_t blocks,
                         const uint8_t *before, const uint8_t *after)
{
    V x[4];
    if (blocks <= 4) {
        words_blocks_few(schedule, out, in, blocks, before, after);
        return;
    }
    UNROLL for (size_t i = 0; i < 4; i++) {
        x[i] = _mm512_maskz_loadu_epi32(row_mask(blocks, i), in + 64 * i);
        if (before)
            x[i] = XOR(x[i], _mm512_maskz_loadu_epi32(row_mask(blocks, i), before + 64 * i));
    }
    words_transpose(x);
    words_crypt(schedule, x);
    words_transpose(x);
    UNROLL for (size_t i = 0; i < 4; i++) {
        if (after)
            x[i] = XOR(x[i], _mm512_maskz_loadu_epi32(row_mask(blocks, i), after + 64 * i));
        _mm512_mask_storeu_epi32(out + 64 * i, row_mask(blocks, i), x[i]);
    }
}

/* From the arguments q[i] = P rk[i] + INPUT_CONSTANT of one direction: the constants of all rounds. kappa[i + 3] is what state word i + 3
 * carries besides P x, chosen so that the three words of round i carry q[i] together; round i then has to add
 * e[i] = kappa[i] + kappa[i + 4] + LINEAR_CONSTANT to its new word. */
INLINE void schedule_from_arguments(csvf_sm4_schedule *schedule, const uint32_t q[32])
{
    uint32_t kappa[36] = {0}, *e = schedule->words + KEY_WORDS;
    for (int i = 0; i < 32; i++)
        kappa[i + 3] = q[i] ^ kappa[i + 1] ^ kappa[i + 2]; /* kappa[35] is free: 0 */
    for (int i = 0; i < 2; i++) {
        V x = XOR3(LOADU(kappa + 16 * i), LOADU(kappa + 16 * i + 4), _mm512_set1_epi8(CSVF_SM4_LINEAR_CONSTANT));
        _mm512_storeu_si512(e + 16 * i, x);
        /* In sliced form the constant is added to s, of which each byte collects the other three. */
        V d = XOR3(_mm512_rol_epi32(x, 8), _mm512_rol_epi32(x, 16), _mm512_rol_epi32(x, 24));
        V spread = _mm512_setr_epi32(0x00000000, 0x01010101, 0x02020202, 0x03030303, 0x04040404, 0x05050505, 0x06060606,
                                     0x07070707, 0x08080808, 0x09090909, 0x0a0a0a0a, 0x0b0b0b0b, 0x0c0c0c0c, 0x0d0d0d0d,
                                     0x0e0e0e0e, 0x0f0f0f0f);
        for (int j = 0; j < 4; j++) {
            V index = _mm512_add_epi8(spread, _mm512_set1_epi8((char)(16 * j)));
            _mm512_storeu_si512(schedule->words + KEY_SLICED + 64 * i + 16 * j, _mm512_permutexvar_epi8(index, d));
        }
    }
    schedule->words[KEY_WORDS_IN] = kappa[3];
    const __m128i spread = _mm_setr_epi32(0x00000000, 0x01010101, 0x02020202, 0x03030303);
    _mm_storeu_si128((__m128i *)(schedule->words + KEY_IN), _mm_shuffle_epi8(_mm_cvtsi32_si128((int)kappa[3]), spread));
    __m128i last = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)(kappa + 32)), 0x1b);
    last = _mm_gf2p8affine_epi64_epi8(last, _mm_set1_epi64x((long long)CSVF_SM4_P_INVERSE), 0);
    _mm_storeu_si128((__m128i *)(schedule->words + KEY_WORDS_OUT), last);
    for (int j = 0; j < 4; j++)
        _mm_storeu_si128((__m128i *)(schedule->words + KEY_OUT + 4 * j),
                         _mm_shuffle_epi8(_mm_shuffle_epi32(last, 0), spread)), last = _mm_bsrli_si128(last, 4);
    csvf_wipe(kappa, sizeof kappa);
}

static void expand(csvf_sm4_schedule *enc, csvf_sm4_schedule *dec, const uint8_t key[16])
{
    const __m128i m0 = _mm_set1_epi64x((long long)CSVF_SM4_KEY_0), m1 = _mm_set1_epi64x((long long)CSVF_SM4_KEY_1);
    const __m128i m2 = _mm_set1_epi64x((long long)CSVF_SM4_KEY_2), m3 = _mm_set1_epi64x((long long)CSVF_SM4_KEY_3);
    const __m128i p = _mm_set1_epi64x((long long)CSVF_SM4_P);
    __m128i k = _mm_gf2p8affine_epi64_epi8(_mm_loadu_si128((const __m128i *)key), p, 0);
    k = _mm_xor_si128(k, _mm_load_si128((const __m128i *)csvf__sm4_fk));
    __m128i x0 = k, x1 = _mm_shuffle_epi32(k, 0x55), x2 = _mm_shuffle_epi32(k, 0xaa), x3 = _mm_shuffle_epi32(k, 0xff);
    uint32_t q[32], reversed[32];
    const __m128i in = _mm_set1_epi8(CSVF_SM4_INPUT_CONSTANT);
    const __m128i out = _mm_set1_epi8((char)CSVF_SM4_KEY_CONSTANT);
#define XOR3_128(a, b, c) _mm_ternarylogic_epi32(a, b, c, 0x96)
#define KEY_ROUND(x0, x1, x2, x3, i)                                                                                            \
    do {                                                                                                                        \
        __m128i ck_ = _mm_xor_si128(_mm_cvtsi32_si128(((const int *)csvf__sm4_ck)[i]), in);                                     \
        __m128i z_ = XOR3_128(_mm_xor_si128(x1, ck_), x2, x3);                                                                  \
        __m128i t_ = XOR3_128(_mm_ror_epi32(_mm_gf2p8affineinv_epi64_epi8(z_, m1, 0), 8),                                       \
                              _mm_ror_epi32(_mm_gf2p8affineinv_epi64_epi8(z_, m2, 0), 16),                                      \
                              _mm_ror_epi32(_mm_gf2p8affineinv_epi64_epi8(z_, m3, 0), 24));                                     \
        x0 = XOR3_128(_mm_xor_si128(x0, out), _mm_gf2p8affineinv_epi64_epi8(z_, m0, 0), t_);                                    \
        q[i] = (uint32_t)_mm_cvtsi128_si32(_mm_xor_si128(x0, in));                                                              \
    } while (0)
    for (int i = 0; i < 32; i += 4) {
        KEY_ROUND(x0, x1, x2, x3, i);
        KEY_ROUND(x1, x2, x3, x0, i + 1);
        KEY_ROUND(x2, x3, x0, x1, i + 2);
        KEY_ROUND(x3, x0, x1, x2, i + 3);
    }
    schedule_from_arguments(enc, q);
    if (dec) {
        for (int i = 0; i < 32; i++)
            reversed[i] = q[31 - i];
        schedule_from_arguments(dec, reversed);
        csvf_wipe(reversed, sizeof reversed);
    }
    csvf_wipe(q, sizeof q);
}

#endif
