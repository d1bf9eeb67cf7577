/* Part of sm4_avx2_template.h: XTS tweaks, byte-sliced for the bulk path and as plain blocks for short runs. Internal.
 *
 * IEEE 1619: a tweak is a little-endian number v, alpha^n v = (v << n) + (what fell out) (x^7 + x^2 + x + 1). GB/T 17964-2021 mirrors the
 * bits: with the bytes reversed the same holds for shifts to the right. For n < 58 what fell out, times the polynomial, fits in 64 bits. */

ALWAYS_INLINE __m256i reverse_bytes(__m256i x)
{
    const __m128i reversed = _mm_setr_epi8(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm256_shuffle_epi8(x, _mm256_broadcastsi128_si256(reversed));
}

/* The tweak in each 128-bit lane of x times alpha^n, n < 58 given in both 64-bit halves of the lane. GB: x and the result are byte-reversed. */
ALWAYS_INLINE __m256i times_alpha(int standard, __m256i x, __m256i n)
{
    const __m256i rest = _mm256_sub_epi64(_mm256_set1_epi64x(64), n);
    __m256i moved, over, out;
    if (standard == CSVF_STANDARD_IEEE) {
        over = _mm256_srlv_epi64(x, rest);
        out = _mm256_bsrli_epi128(over, 8);
        moved = XOR(_mm256_sllv_epi64(x, n), _mm256_shuffle_epi32(over, 0x4e));
        moved = XOR(moved, _mm256_slli_epi64(out, 1));
        out = XOR(_mm256_slli_epi64(out, 2), _mm256_slli_epi64(out, 7));
    } else {
        over = _mm256_sllv_epi64(x, rest);
        out = _mm256_bslli_epi128(over, 8);
        moved = XOR(_mm256_srlv_epi64(x, n), _mm256_shuffle_epi32(over, 0x4e));
        moved = XOR(moved, _mm256_srli_epi64(out, 1));
        out = XOR(_mm256_srli_epi64(out, 2), _mm256_srli_epi64(out, 7));
    }
    return XOR(moved, out);
}

/* ---- Byte-sliced: byte k of 32 tweaks in t[k]; the byte at position j of lane l is that of tweak 2 j + l ---------------------- */

/* t = tweak, tweak alpha, ..., tweak alpha^31. Not inlined: see burn_stack. */
static __attribute__((noinline)) void sliced_tweaks(int standard, __m256i t[16], const uint8_t tweak[16])
{
    const fold f = fold_of(standard);
    __m256i x = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)tweak)), first[4];
    if (standard != CSVF_STANDARD_IEEE)
        x = reverse_bytes(x);
    __m256i n = _mm256_setr_epi64x(0, 0, 1, 1);
    UNROLL(4)
    for (int i = 0; i < 4; i++) { /* tweaks 2 i and 2 i + 1 */
        first[i] = times_alpha(standard, x, n);
        if (standard != CSVF_STANDARD_IEEE)
            first[i] = reverse_bytes(first[i]);
        n = _mm256_add_epi64(n, _mm256_set1_epi64x(2));
    }
    /* Dword k of q[0..3], counted through, becomes byte k of the four tweaks of the lane: call it E[k]. */
    const __m256i a = _mm256_unpacklo_epi8(first[0], first[2]), b = _mm256_unpacklo_epi8(first[1], first[3]);
    const __m256i c = _mm256_unpackhi_epi8(first[0], first[2]), d = _mm256_unpackhi_epi8(first[1], first[3]);
    const __m256i q[4] = { _mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b), _mm256_unpacklo_epi8(c, d),
                           _mm256_unpackhi_epi8(c, d) };
    /* The next tweaks of a lane are alpha^8 times these, i.e. one byte further: t[k] = E[k], E[k-1], E[k-2], E[k-3]. */
    __m256i before = _mm256_setzero_si256();
    UNROLL(4)
    for (int i = 0; i < 4; i++) {
        const __m256i back = _mm256_shuffle_epi32(q[i], 0x1b);
        t[4 * i] = _mm256_alignr_epi8(before, back, 12);
        t[4 * i + 1] = _mm256_alignr_epi8(before, back, 8);
        t[4 * i + 2] = _mm256_alignr_epi8(before, back, 4);
        t[4 * i + 3] = back;
        before = back;
    }
    __m256i low, high;
    const __m256i none = _mm256_setzero_si256();
    fold_bytes(&f, _mm256_alignr_epi8(before, none, 12), &low, &high);
    t[0] = XOR(t[0], low);
    t[1] = XOR(t[1], high);
    fold_bytes(&f, _mm256_alignr_epi8(before, none, 8), &low, &high);
    t[1] = XOR(t[1], low);
    t[2] = XOR(t[2], high);
    fold_bytes(&f, _mm256_alignr_epi8(before, none, 4), &low, &high);
    t[2] = XOR(t[2], low);
    t[3] = XOR(t[3], high);
}

/* next = alpha^32 t: four bytes further, the last four folded into the first five. */
static void sliced_tweaks_next(int standard, __m256i next[16], const __m256i t[16])
{
    const fold f = fold_of(standard);
    __m256i low, high, over = _mm256_setzero_si256();
    UNROLL(4)
    for (int i = 0; i < 4; i++) {
        fold_bytes(&f, _mm256_load_si256(t + 12 + i), &low, &high);
        _mm256_store_si256(next + i, XOR(low, over));
        over = high;
    }
    _mm256_store_si256(next + 4, XOR(_mm256_load_si256(t), over));
    UNROLL(16)
    for (int i = 5; i < 16; i++)
        _mm256_store_si256(next + i, _mm256_load_si256(t + i - 4));
}

/* ---- Plain blocks ------------------------------------------------------------------------------------------------------- */

/* The 128-bit number x times x^7 + x^2 + x + 1, the bits beyond 128 dropped; mirrored for GB. */
ALWAYS_INLINE __m128i times_polynomial(int standard, __m128i x)
{
    if (standard == CSVF_STANDARD_IEEE) {
        const __m128i over = _mm_xor_si128(_mm_xor_si128(_mm_srli_epi64(x, 63), _mm_srli_epi64(x, 62)), _mm_srli_epi64(x, 57));
        const __m128i moved = _mm_xor_si128(_mm_xor_si128(_mm_slli_epi64(x, 1), _mm_slli_epi64(x, 2)), _mm_slli_epi64(x, 7));
        return _mm_xor_si128(_mm_xor_si128(x, moved), _mm_bslli_si128(over, 8));
    }
    const __m128i over = _mm_xor_si128(_mm_xor_si128(_mm_slli_epi64(x, 63), _mm_slli_epi64(x, 62)), _mm_slli_epi64(x, 57));
    const __m128i moved = _mm_xor_si128(_mm_xor_si128(_mm_srli_epi64(x, 1), _mm_srli_epi64(x, 2)), _mm_srli_epi64(x, 7));
    return _mm_xor_si128(_mm_xor_si128(x, moved), _mm_bsrli_si128(over, 8));
}

/* base alpha^(8 bytes), bytes < 16 (public); the result byte-reversed for GB. */
ALWAYS_INLINE __m128i times_alpha_bytes(int standard, __m128i base, size_t bytes)
{
    /* pshufb orders: 16 bytes from window + 16 - n move a tweak n bytes up, from window + 32 - n leave what fell out. */
    static const uint8_t window[48] = { 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128,
                                        0,   1,   2,   3,   4,   5,   6,   7,   8,   9,   10,  11,  12,  13,  14,  15,
                                        128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 128 };
    __m128i moved = _mm_shuffle_epi8(base, _mm_loadu_si128((const __m128i *)(window + 16 - bytes)));
    __m128i out = _mm_shuffle_epi8(base, _mm_loadu_si128((const __m128i *)(window + 32 - bytes)));
    if (standard != CSVF_STANDARD_IEEE) {
        const __m128i reversed = _mm_setr_epi8(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        moved = _mm_shuffle_epi8(moved, reversed);
        out = _mm_shuffle_epi8(out, reversed);
    }
    return _mm_xor_si128(moved, times_polynomial(standard, out));
}

/* base alpha^power for power < 256, less the last power & 7; the result byte-reversed for GB. */
ALWAYS_INLINE __m128i times_alpha_coarse(int standard, __m128i base, uint32_t power)
{
    __m128i x = times_alpha_bytes(standard, base, power >> 3 & 15);
    if (power & 128) {
        /* x^128 = x^7 + x^2 + x + 1; the 7 bits beyond 128 fold once more */
        __m128i out;
        if (standard == CSVF_STANDARD_IEEE) {
            const __m128i top = _mm_bsrli_si128(x, 8);
            out = _mm_xor_si128(_mm_xor_si128(_mm_srli_epi64(top, 63), _mm_srli_epi64(top, 62)), _mm_srli_epi64(top, 57));
        } else {
            const __m128i low = _mm_bslli_si128(x, 8);
            out = _mm_xor_si128(_mm_xor_si128(_mm_slli_epi64(low, 63), _mm_slli_epi64(low, 62)), _mm_slli_epi64(low, 57));
        }
        x = _mm_xor_si128(times_polynomial(standard, x), times_polynomial(standard, out));
    }
    return x;
}

ALWAYS_INLINE void tweaks_of(int standard, uint8_t *out, const uint8_t *bases, const uint32_t *powers, size_t count, size_t runs)
{
    for (size_t r = 0; r < runs; r++, out += 16 * count) {
        const uint32_t power = powers ? powers[r] : 0;
        const __m128i base = _mm_loadu_si128((const __m128i *)(bases + 16 * r));
        const __m256i x = _mm256_broadcastsi128_si256(times_alpha_coarse(standard, base, power));
        __m256i n = _mm256_add_epi64(_mm256_set1_epi64x(power & 7), _mm256_setr_epi64x(0, 0, 1, 1));
        for (size_t j = 0; j < count; j += 2) {
            __m256i t = times_alpha(standard, x, n);
            if (standard != CSVF_STANDARD_IEEE)
                t = reverse_bytes(t);
            if (count - j >= 2)
                _mm256_storeu_si256((__m256i *)(out + 16 * j), t);
            else
                _mm_storeu_si128((__m128i *)(out + 16 * j), _mm256_castsi256_si128(t));
            n = _mm256_add_epi64(n, _mm256_set1_epi64x(2));
        }
    }
}

/* What the vector form covers; longer runs (which the bulk path makes itself) and higher powers go to the portable code. */
enum { TWEAK_COUNT = 48, TWEAK_POWERS = 256 };

static void tweaks(int standard, uint8_t *out, const uint8_t *bases, const uint32_t *powers, size_t count, size_t runs)
{
    for (size_t r = 0, n; r < runs; r += n) {
        const uint32_t *from = powers ? powers + r : NULL;
        uint8_t *to = out + 16 * r * count;
        n = powers || count > TWEAK_COUNT ? 1 : runs;
        if (count > TWEAK_COUNT || (powers && from[0] >= TWEAK_POWERS)) {
            csvf__sm4_tweaks_portable(standard, to, bases + 16 * r, from, count, 1);
            continue;
        }
        while (powers && r + n < runs && from[n] < TWEAK_POWERS)
            n++;
        if (standard == CSVF_STANDARD_IEEE)
            tweaks_of(CSVF_STANDARD_IEEE, to, bases + 16 * r, from, count, n);
        else
            tweaks_of(CSVF_STANDARD_GB, to, bases + 16 * r, from, count, n);
    }
}
