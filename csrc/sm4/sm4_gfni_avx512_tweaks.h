/* Tweak arithmetic with GFNI and AVX-512: included by sm4_gfni_avx512.c only. Powers and counts are public. */
#ifndef CSVF_SM4_GFNI_AVX512_TWEAKS_H
#define CSVF_SM4_GFNI_AVX512_TWEAKS_H

/* The matrices of one standard (sm4_tables.h); the tables have eight entries, one for each shift 0..7. */
typedef struct tweak_matrices {
    V fold_low, fold_high;
    const uint64_t *shift_left, *shift_over, *wrap_low, *wrap_high;
} tweak_matrices;

INLINE tweak_matrices matrices_of(int standard)
{
    if (standard == CSVF_STANDARD_IEEE)
        return (tweak_matrices){MATRIX(CSVF_SM4_IEEE_FOLD_LOW), MATRIX(CSVF_SM4_IEEE_FOLD_HIGH), csvf__sm4_ieee_shift_left,
                                csvf__sm4_ieee_shift_over,      csvf__sm4_ieee_wrap_low,         csvf__sm4_ieee_wrap_high};
    return (tweak_matrices){MATRIX(CSVF_SM4_GB_FOLD_LOW), MATRIX(CSVF_SM4_GB_FOLD_HIGH), csvf__sm4_gb_shift_left,
                            csvf__sm4_gb_shift_over,      csvf__sm4_gb_wrap_low,         csvf__sm4_gb_wrap_high};
}

/* A multiplication by alpha^s, s < 8, where s may differ per 64-bit element. */
typedef struct tweak_shift {
    V left, over, wrap_low, wrap_high;
} tweak_shift;

INLINE tweak_shift shift_by(const tweak_matrices *m, V bits)
{
    return (tweak_shift){_mm512_permutexvar_epi64(bits, _mm512_load_si512(m->shift_left)),
                         _mm512_permutexvar_epi64(bits, _mm512_load_si512(m->shift_over)),
                         _mm512_permutexvar_epi64(bits, _mm512_load_si512(m->wrap_low)),
                         _mm512_permutexvar_epi64(bits, _mm512_load_si512(m->wrap_high))};
}

INLINE V shifted(V t, const tweak_shift *s)
{
    const V out = _mm512_bsrli_epi128(t, 15);
    const V kept = XOR(AFFINE(t, s->left), AFFINE(_mm512_bslli_epi128(t, 1), s->over));
    return XOR3(kept, AFFINE(out, s->wrap_low), AFFINE(_mm512_bslli_epi128(out, 1), s->wrap_high));
}

/* Byte places for a move inside one of four tweaks: entry [lane][16 + j] stands for byte j of the tweak in that lane, and entry [lane][16 + j]
 * with j < 0 for byte 16 + j of the same lane of a second vector (bit 6). A window of 16 entries is an index of vpermi2b. */
#define PLACES_FROM(n)                                                                                                          \
    n + 64, n + 65, n + 66, n + 67, n + 68, n + 69, n + 70, n + 71, n + 72, n + 73, n + 74, n + 75, n + 76, n + 77, n + 78,         \
        n + 79, n, n + 1, n + 2, n + 3, n + 4, n + 5, n + 6, n + 7, n + 8, n + 9, n + 10, n + 11, n + 12, n + 13, n + 14, n + 15
static const uint8_t byte_places[4][32] __attribute__((aligned(64))) = {
    {PLACES_FROM(0)}, {PLACES_FROM(16)}, {PLACES_FROM(32)}, {PLACES_FROM(48)}};

/* Tweak number `lane` of t, times alpha^(8 m), m < 16, in all four lanes. Byte k is t[k - m], or for k < m what left at the top and comes back
 * folded, low[16 + k - m]; and for 0 < k <= m also high[15 + k - m], which the fold of the byte below hands up. */
INLINE V moved(V t, V low, V high, unsigned lane, unsigned m)
{
    const uint8_t *window = byte_places[lane] + 16 - m;
    const V here = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)window));
    const V below = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(window - 1)));
    return XOR(_mm512_permutex2var_epi8(t, here, low),
               _mm512_maskz_permutex2var_epi8(UINT64_C(0xfffefffefffefffe), _mm512_setzero_si512(), below, high));
}

#define FEW_TWEAKS 8u /* of one run: quicker in 64-bit arithmetic than the set-up of the vectors */

static void tweaks_of_runs(int standard, uint8_t *out, const uint8_t *bases, const uint32_t *powers, size_t count, size_t runs)
{
    if (runs == 1 && count <= FEW_TWEAKS) {
        csvf__sm4_tweaks_portable(standard, out, bases, powers, count, runs);
        return;
    }
    const tweak_matrices m = matrices_of(standard);
    const V lanes = _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3);
    const tweak_shift first[2] = {shift_by(&m, lanes), shift_by(&m, _mm512_add_epi64(lanes, _mm512_set1_epi64(4)))};
    const tweak_shift four = shift_by(&m, _mm512_set1_epi64(4));
    static const uint32_t no_powers[4] = {0};
    if (count == 0)
        return;
    for (size_t r = 0; r < runs; r += 4, bases += 64) {
        const size_t present = runs - r < 4 ? runs - r : 4;
        const uint32_t *const power = powers ? powers + r : no_powers;
        uint8_t far_bases[64];
        const uint8_t *source = bases;
        uint32_t odd = 0, above = 0;
        for (size_t i = 0; i < present; i++) {
            odd |= power[i] & 3;
            above |= power[i];
        }
        if (above >> 8) {
            /* Deep inside a large unit: rare, so the whole multiples of alpha^256 go the slow way. */
            for (size_t i = 0; i < present; i++) {
                const uint32_t far = power[i] & ~UINT32_C(255);
                csvf__sm4_tweaks_portable(standard, far_bases + 16 * i, bases + 16 * i, &far, 1, 1);
            }
            source = far_bases;
        }
        V t = _mm512_maskz_loadu_epi32(row_mask(present, 0), source);
        const __m256i p = _mm256_cvtepu32_epi64(_mm_maskz_loadu_epi32((__mmask8)((1u << present) - 1), power));
        const V p_of_lane = _mm512_permutexvar_epi64(lanes, _mm512_castsi256_si512(p));
        if (odd) {
            const tweak_shift s = shift_by(&m, _mm512_and_si512(p_of_lane, _mm512_set1_epi64(3)));
            t = shifted(t, &s);
        }
        V low = AFFINE(t, m.fold_low), high = AFFINE(t, m.fold_high);
        if (above >> 7 & 1) {
            const V out16 = _mm512_bsrli_epi128(high, 15);
            const V moved16 = XOR3(low, _mm512_bslli_epi128(high, 1),
                                   XOR(AFFINE(out16, m.fold_low), AFFINE(_mm512_bslli_epi128(out16, 1), m.fold_high)));
            t = _mm512_mask_mov_epi64(t, _mm512_test_epi64_mask(p_of_lane, _mm512_set1_epi64(128)), moved16);
            low = AFFINE(t, m.fold_low), high = AFFINE(t, m.fold_high);
        }
        UNROLL for (unsigned i = 0; i < 4; i++) {
            if (i == present)
                break;
            V x = shifted(moved(t, low, high, i, power[i] >> 3 & 15), &first[power[i] >> 2 & 1]);
            size_t left = count;
            for (; left > 4; left -= 4, out += 64) {
                _mm512_storeu_si512(out, x);
                x = shifted(x, &four);
            }
            _mm512_mask_storeu_epi32(out, row_mask(left, 0), x);
            out += 16 * left;
        }
        if (above >> 8)
            csvf_wipe(far_bases, sizeof far_bases);
    }
}

#endif
