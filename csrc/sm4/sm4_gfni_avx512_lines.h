/* Many 64-byte lines of different 4 KiB units, 64 at a time: included by sm4_gfni_avx512.c only.
 *
 * A line's first tweak is its unit's times alpha^power, made for four lines in one register. The tweaks of all its blocks are then made in
 * sliced form: a register of the group holds the same 16 bytes, one for every line, in all four lanes, and lane l multiplies by alpha^l. That
 * takes a third of the instructions of making them block by block. Powers are public. */
#ifndef CSVF_SM4_GFNI_AVX512_LINES_H
#define CSVF_SM4_GFNI_AVX512_LINES_H

#define PAGE_LINES 64u
#define GROUP_LINES 16u
#define LINE_BLOCKS 4u

/* What the tweaks of lines need besides the standard's matrices: multiplication by alpha^4, and by alpha^l in lane l. */
typedef struct line_matrices {
    tweak_shift four, by_lane;
} line_matrices;

INLINE line_matrices line_matrices_of(const tweak_matrices *m)
{
    return (line_matrices){shift_by(m, _mm512_set1_epi64(4)), shift_by(m, _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3))};
}

/* The tweaks of four lines: bases times alpha^power, power a multiple of 4 below 256. */
INLINE V first_of_lines(const tweak_matrices *m, const line_matrices *lines, const uint8_t *bases, const uint32_t *powers)
{
    const V place = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    const V power = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
                                             _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)powers)));
    V t = LOADU(bases);
    t = _mm512_mask_mov_epi32(t, _mm512_test_epi32_mask(power, _mm512_set1_epi32(4)), shifted(t, &lines->four));
    V low = AFFINE(t, m->fold_low), high = AFFINE(t, m->fold_high);
    const V out16 = _mm512_bsrli_epi128(high, 15);
    const V moved16 = XOR3(low, _mm512_bslli_epi128(high, 1),
                           XOR(AFFINE(out16, m->fold_low), AFFINE(_mm512_bslli_epi128(out16, 1), m->fold_high)));
    t = _mm512_mask_mov_epi32(t, _mm512_test_epi32_mask(power, _mm512_set1_epi32(128)), moved16);
    low = AFFINE(t, m->fold_low), high = AFFINE(t, m->fold_high);
    /* By n whole bytes: byte k becomes t[k - n], or for k < n low[16 + k - n]; for 0 < k <= n also high[15 + k - n]. vpshufb gives
     * zero where bit 7 of the place is set, which flipping that bit turns round. */
    const V bytes = _mm512_and_si512(_mm512_srli_epi32(power, 3), _mm512_set1_epi32(15));
    const V here = _mm512_sub_epi8(place, _mm512_shuffle_epi8(bytes, _mm512_setzero_si512()));
    const V back = XOR(here, _mm512_set1_epi8((char)0x80));
    const V below = XOR(_mm512_sub_epi8(here, _mm512_set1_epi8(1)), _mm512_set1_epi8((char)0x80));
    return XOR3(_mm512_shuffle_epi8(t, here), _mm512_shuffle_epi8(low, back),
                _mm512_maskz_shuffle_epi8(UINT64_C(0xfffefffefffefffe), high, below));
}

/* Byte k of four lines next to each other, for every k. */
static const uint8_t four_lines_by_byte[64] __attribute__((aligned(64))) = {
    0,  16, 32, 48, 1,  17, 33, 49, 2,  18, 34, 50, 3,  19, 35, 51, 4,  20, 36, 52, 5,  21, 37, 53, 6,  22, 38, 54, 7,  23, 39, 55,
    8,  24, 40, 56, 9,  25, 41, 57, 10, 26, 42, 58, 11, 27, 43, 59, 12, 28, 44, 60, 13, 29, 45, 61, 14, 30, 46, 62, 15, 31, 47, 63};

/* Sliced tweaks of the blocks of 16 lines. */
NOINLINE void tweaks_of_lines(const tweak_matrices *m, const line_matrices *lines, V t[16], const uint8_t *bases,
                              const uint32_t *powers)
{
    const V by_byte = _mm512_load_si512(four_lines_by_byte);
    V d[4];
    UNROLL for (unsigned i = 0; i < 4; i++)
        d[i] = _mm512_permutexvar_epi8(by_byte, first_of_lines(m, lines, bases + 64 * i, powers + 4 * i));
    /* Lane l of register i: byte 4 l + i of all lines. Place 8 h + n of a sliced register is line 2 n + h (block_of_byte). */
    const V order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    const V low01 = _mm512_unpacklo_epi32(d[0], d[1]), high01 = _mm512_unpackhi_epi32(d[0], d[1]);
    const V low23 = _mm512_unpacklo_epi32(d[2], d[3]), high23 = _mm512_unpackhi_epi32(d[2], d[3]);
    V rows[4] = {_mm512_unpacklo_epi64(low01, low23), _mm512_unpackhi_epi64(low01, low23),
                 _mm512_unpacklo_epi64(high01, high23), _mm512_unpackhi_epi64(high01, high23)};
    UNROLL for (unsigned i = 0; i < 4; i++) rows[i] = _mm512_shuffle_epi8(rows[i], order);
#define LANE_TO_ALL(k) _mm512_shuffle_i32x4(rows[(k) % 4], rows[(k) % 4], 0x55 * ((k) / 4))
    const tweak_shift *s = &lines->by_lane;
    const V last = LANE_TO_ALL(15);
    V before = LANE_TO_ALL(0);
    t[0] = XOR(AFFINE(before, s->left), AFFINE(last, s->wrap_low));
    V this = LANE_TO_ALL(1);
    t[1] = XOR3(AFFINE(this, s->left), AFFINE(before, s->over), AFFINE(last, s->wrap_high));
#define TWEAK_BYTE(k)                                                                                                           \
    do {                                                                                                                        \
        before = this;                                                                                                          \
        this = LANE_TO_ALL(k);                                                                                                  \
        t[k] = XOR(AFFINE(this, s->left), AFFINE(before, s->over));                                                             \
    } while (0)
    TWEAK_BYTE(2); TWEAK_BYTE(3); TWEAK_BYTE(4); TWEAK_BYTE(5); TWEAK_BYTE(6); TWEAK_BYTE(7); TWEAK_BYTE(8);
    TWEAK_BYTE(9); TWEAK_BYTE(10); TWEAK_BYTE(11); TWEAK_BYTE(12); TWEAK_BYTE(13); TWEAK_BYTE(14); TWEAK_BYTE(15);
}

/* count lines, a multiple of 64. */
static void lines_by_page(const csvf_sm4_schedule *schedule, int standard, uint8_t *out, const uint8_t *in, const uint8_t *bases,
                          const uint32_t *powers, size_t count)
{
    const tweak_matrices m = matrices_of(standard);
    const line_matrices lines = line_matrices_of(&m);
    page p;
    for (; count; count -= PAGE_LINES) {
        for (unsigned g = 0; g < PAGE_GROUPS; g++)
            tweaks_of_lines(&m, &lines, p.tweak + 16 * g, bases + 16 * GROUP_LINES * g, powers + GROUP_LINES * g);
        crypt_page(schedule, &p, out, in);
        bases += 16 * PAGE_LINES, powers += PAGE_LINES;
        in += 16 * PAGE_BLOCKS, out += 16 * PAGE_BLOCKS;
    }
    csvf_wipe(&p, sizeof p);
}

#endif
