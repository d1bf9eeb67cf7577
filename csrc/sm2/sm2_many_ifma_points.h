/* Points of the SM2 curve in eight lanes, for sm2_many_ifma.c alone. Jacobian coordinates: x = X / Z^2, y = Y / Z^3. Public data only.
 *
 * Exceptional additions. The formula divides by nothing, but for equal or opposite points it gives Z = 0 (mod p) instead of the double or
 * of infinity. Every later Z is a multiple of this one, so a lane that met such a case, whenever, ends with Z = 0, and no other does: the
 * caller looks once, at the end, and does that lane again elsewhere. Infinity as the first operand, where every sum begins, is not told by
 * Z but by a mask of lanes.
 *
 * Forms and bounds (see sm2_many_ifma_field.h) of a point between operations: X and Y strict, below 1.01 p; Z ready, below 2.4 p, and
 * its square ready, below 1.4 p. Formulas: https://hyperelliptic.org/EFD/g1p/auto-shortw-jacobian-3.html, dbl-2001-b with Z3 = 2 Y Z,
 * add-1998-cmo-2.
 *
 * Order. A product takes the multipliers about 70 cycles and is ready some 15 later, and a CPU looks two products ahead, not more. So no
 * product stands right behind one it needs, and the square of Z3, with which the next operation begins, is taken before X3 and Y3 end this one. */
#ifndef CSVF_SM2_MANY_IFMA_POINTS_H
#define CSVF_SM2_MANY_IFMA_POINTS_H

#include "sm2_kernel.h"
#include "sm2_many_ifma_field.h"

enum { SM2_LANES = 8 };

typedef struct lanes_point {
    lanes_number x, y, z, zz;     /* zz = Z^2 */
} lanes_point;

/* A second operand as fetched from a table: the addition takes or leaves it, or its negative, lane by lane. */
typedef struct lanes_affine {
    lanes_number x, y;            /* ready, up to 16.01 p */
} lanes_affine;

typedef struct lanes_multiple {
    lanes_point point;
    lanes_number zzz;             /* Z^3: ready, below 1.3 p */
} lanes_multiple;

static const uint64_t montgomery_one[SM2_LIMBS] = {   /* 2^260 mod p */
    0x10, 0xffffffff0000, 0, 0, 0x100000};
static const uint64_t montgomery_square[SM2_LIMBS] = {   /* 2^520 mod p */
    0x20000000300, 0xffffffff00000, 0x100000002, 0x200000001000, 0x4000000};

static __attribute__((noinline)) void lanes_double(lanes_point *point)
{
    const lanes_number x = point->x, y = point->y, z = point->z, delta = point->zz;         /* delta < 1.4 */
    const lanes_number product = lanes_multiply(lanes_ready(lanes_plus_p(lanes_subtract(x, lanes_trim(delta)), 2)),
                                                lanes_ready(lanes_add(x, lanes_trim(delta))));   /* < 3.1 * 2.5 / 16 + 1 < 1.5 */
    const lanes_number gamma = lanes_ready(lanes_square(y));                                /* < 1.1 */
    const lanes_number z3 = lanes_ready(lanes_shift(lanes_multiply(y, z), 1));              /* < 2.4 */
    const lanes_number alpha = lanes_ready(lanes_add(product, lanes_shift(product, 1)));    /* < 4.5 */
    const lanes_number beta = lanes_multiply(x, gamma);                                     /* < 1.1 */
    const lanes_number alpha_squared = lanes_square(alpha);                                 /* < 2.3 */
    point->z = z3;
    point->zz = lanes_ready(lanes_square(z3));
    const lanes_number x3 = lanes_fold(lanes_plus_p(lanes_subtract(alpha_squared, lanes_shift(beta, 3)), 9));
    const lanes_wide minus_8_gamma_squared = lanes_wide_times_minus_8(lanes_square_wide(gamma));
    const lanes_number factor = lanes_ready(lanes_plus_p(lanes_subtract(lanes_shift(beta, 2), x3), 2));   /* < 6.4 */
    point->x = x3;
    point->y = lanes_fold(lanes_plus_p(lanes_reduce_with_product(minus_8_gamma_squared, alpha, factor), 1));   /* > 1 - 9.7 / 16 */
}

/* What both additions share: h = u2 - u1 and r = s2 - s1 are given, z_product is Z1 or Z1 Z2. */
SM2_INLINE lanes_point lanes_add_tail(lanes_number u1, lanes_number s1, lanes_number h, lanes_number r, lanes_number z_product)
{
    lanes_point sum;
    sum.z = lanes_ready(lanes_multiply(z_product, h));                                      /* < 2.4 * 4.41 / 16 + 1 < 1.7 */
    const lanes_number hh = lanes_ready(lanes_square(h));                                   /* h < 4.41: < 2.3 */
    const lanes_number r_squared = lanes_square(r);                                         /* r < 6.3: < 3.5 */
    sum.zz = lanes_ready(lanes_square(sum.z));                                              /* < 1.2 */
    const lanes_number hhh = lanes_multiply(h, hh);                                         /* < 1.7 */
    const lanes_number v = lanes_multiply(u1, hh);                                          /* < 1.3 */
    sum.x = lanes_fold(lanes_plus_p(lanes_subtract(lanes_subtract(r_squared, hhh), lanes_shift(v, 1)), 5));
    const lanes_number minus_hhh = lanes_ready(lanes_plus_p(lanes_subtract(lanes_zero(), hhh), 2));
    const lanes_number factor = lanes_ready(lanes_plus_p(lanes_subtract(v, sum.x), 2));     /* < 3.3 */
    sum.y = lanes_fold(lanes_multiply_two(r, factor, s1, minus_hhh));
    return sum;
}

/* What stands in lanes that hold no point yet. */
SM2_INLINE lanes_point lanes_no_point(void) { return (lanes_point){lanes_zero(), lanes_zero(), lanes_zero(), lanes_zero()}; }

SM2_INLINE lanes_point lanes_point_choose(__mmask8 which, const lanes_point *a, const lanes_point *b)
{
    return (lanes_point){lanes_choose(which, a->x, b->x), lanes_choose(which, a->y, b->y), lanes_choose(which, a->z, b->z),
                         lanes_choose(which, a->zz, b->zz)};
}

/* point += other (-other in the lanes of `negative`) in the lanes of `use`. Lanes of *infinite hold no point yet: they take `other`. */
static __attribute__((noinline)) void lanes_add_affine(lanes_point *point, __mmask8 *infinite, const lanes_affine *other,
                                                       __mmask8 negative, __mmask8 use)
{
    const __mmask8 first = *infinite & use;
    lanes_point sum = *point;
    if (first != use) {
        const lanes_number x = point->x, y = point->y, z = point->z, zz = point->zz;
        const lanes_number zzz = lanes_ready(lanes_multiply(z, zz));                        /* < 1.3 */
        const lanes_number u2 = lanes_multiply(other->x, zz);                               /* < 16.01 * 1.4 / 16 + 1 < 2.41 */
        const lanes_number s2 = lanes_negate_some(lanes_multiply(other->y, zzz), negative); /* between -2.4 and 2.4 */
        const lanes_number h = lanes_ready(lanes_plus_p(lanes_subtract(u2, x), 2));         /* < 4.41, > 0.9 */
        const lanes_number r = lanes_ready(lanes_plus_p(lanes_subtract(s2, y), 4));         /* < 6.3, > 0.5 */
        sum = lanes_add_tail(x, y, h, r, z);
        if (use != 0xff)
            sum = lanes_point_choose(use, point, &sum);
    }
    if (first) {
        const lanes_point fetched = {lanes_fold(lanes_trim(other->x)),
                                     lanes_fold(lanes_plus_p(lanes_negate_some(lanes_trim(other->y), negative), 17)),
                                     lanes_constant(montgomery_one), lanes_constant(montgomery_one)};
        sum = lanes_point_choose(first, &sum, &fetched);
        *infinite &= (__mmask8)~use;
    }
    *point = sum;
}

/* The same with an operand in Jacobian coordinates. */
static __attribute__((noinline)) void lanes_add_multiple(lanes_point *point, __mmask8 *infinite, const lanes_multiple *other,
                                                         __mmask8 negative, __mmask8 use)
{
    const __mmask8 first = *infinite & use;
    lanes_point sum = *point;
    if (first != use) {
        const lanes_number z = point->z, zz = point->zz;
        const lanes_number zzz = lanes_ready(lanes_multiply(z, zz));                        /* < 1.3 */
        const lanes_number u2 = lanes_multiply(other->point.x, zz);                         /* < 1.1 */
        const lanes_number u1 = lanes_multiply(point->x, other->point.zz);                  /* < 1.1 */
        const lanes_number s2 = lanes_negate_some(lanes_multiply(other->point.y, zzz), negative);   /* between -1.1 and 1.1 */
        const lanes_number s1 = lanes_multiply(point->y, other->zzz);                       /* < 1.1 */
        const lanes_number z_product = lanes_ready(lanes_multiply(z, other->point.z));      /* < 2.4 * 2.4 / 16 + 1 < 1.4 */
        const lanes_number h = lanes_ready(lanes_plus_p(lanes_subtract(u2, u1), 2));        /* < 3.1 */
        const lanes_number r = lanes_ready(lanes_plus_p(lanes_subtract(s2, s1), 3));        /* < 4.1 */
        sum = lanes_add_tail(lanes_ready(u1), lanes_ready(s1), h, r, z_product);
        if (use != 0xff)
            sum = lanes_point_choose(use, point, &sum);
    }
    if (first) {
        const lanes_point fetched = {other->point.x, lanes_fold(lanes_plus_p(lanes_negate_some(other->point.y, negative), 2)),
                                     other->point.z, other->point.zz};
        sum = lanes_point_choose(first, &sum, &fetched);
        *infinite &= (__mmask8)~use;
    }
    *point = sum;
}

/* ---- Fetching: eight lanes' rows of words to vectors, one word of every lane in each ---- */

/* Rows 0 and 2 of an 8 x 4 group side by side, as the transposition wants them: pairs (0, 2), (1, 3), (4, 6), (5, 7). */
SM2_INLINE __m512i pair_of_rows(const uint64_t *a, const uint64_t *b)
{
    const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256((const void *)a));
    return _mm512_inserti64x4(low, _mm256_loadu_si256((const void *)b), 1);
}

/* out[j] = word j of all eight rows, j = 0 .. 3. */
SM2_INLINE void transpose_four_words(__m512i out[4], const uint64_t *const rows[SM2_LANES], unsigned offset)
{
    const __m512i a0 = pair_of_rows(rows[0] + offset, rows[2] + offset), a1 = pair_of_rows(rows[1] + offset, rows[3] + offset);
    const __m512i a2 = pair_of_rows(rows[4] + offset, rows[6] + offset), a3 = pair_of_rows(rows[5] + offset, rows[7] + offset);
    const __m512i t0 = _mm512_unpacklo_epi64(a0, a1), t1 = _mm512_unpackhi_epi64(a0, a1);   /* words 0, 2 and 1, 3 of rows 0 .. 3 */
    const __m512i t2 = _mm512_unpacklo_epi64(a2, a3), t3 = _mm512_unpackhi_epi64(a2, a3);   /* of rows 4 .. 7 */
    out[0] = _mm512_shuffle_i64x2(t0, t2, 0x88);
    out[1] = _mm512_shuffle_i64x2(t1, t3, 0x88);
    out[2] = _mm512_shuffle_i64x2(t0, t2, 0xdd);
    out[3] = _mm512_shuffle_i64x2(t1, t3, 0xdd);
}

/* From tables of R = 2^256. */
SM2_INLINE lanes_affine lanes_fetch_affine(const csvf_sm2_affine *const points[SM2_LANES])
{
    const uint64_t *rows[SM2_LANES];
    __m512i x[4], y[4];
    for (int lane = 0; lane < SM2_LANES; lane++)
        rows[lane] = points[lane]->x;
    transpose_four_words(x, rows, 0);
    for (int lane = 0; lane < SM2_LANES; lane++)
        rows[lane] = points[lane]->y;
    transpose_four_words(y, rows, 0);
    return (lanes_affine){lanes_from_words_times_16(x[0], x[1], x[2], x[3]), lanes_from_words_times_16(y[0], y[1], y[2], y[3])};
}

/* One lane's multiple in memory: its 25 limbs, X first, and 3 unused words. */
enum { MULTIPLE_WORDS = 28 };

SM2_INLINE void lanes_store_multiple(uint64_t (*rows)[MULTIPLE_WORDS], const lanes_multiple *multiple)
{
    const __m512i *limbs = (const __m512i *)multiple;
    _Static_assert(sizeof *multiple == 25 * sizeof *limbs, "25 limbs");
    for (unsigned pair = 0; pair < 13; pair++) {
        const __m512i a = limbs[2 * pair], b = pair < 12 ? limbs[2 * pair + 1] : a;
        const __m512i even = _mm512_unpacklo_epi64(a, b), odd = _mm512_unpackhi_epi64(a, b);   /* lanes 0, 2, 4, 6 and 1, 3, 5, 7 */
        _mm_storeu_si128((void *)&rows[0][2 * pair], _mm512_castsi512_si128(even));
        _mm_storeu_si128((void *)&rows[1][2 * pair], _mm512_castsi512_si128(odd));
        _mm_storeu_si128((void *)&rows[2][2 * pair], _mm512_extracti64x2_epi64(even, 1));
        _mm_storeu_si128((void *)&rows[3][2 * pair], _mm512_extracti64x2_epi64(odd, 1));
        _mm_storeu_si128((void *)&rows[4][2 * pair], _mm512_extracti64x2_epi64(even, 2));
        _mm_storeu_si128((void *)&rows[5][2 * pair], _mm512_extracti64x2_epi64(odd, 2));
        _mm_storeu_si128((void *)&rows[6][2 * pair], _mm512_extracti64x2_epi64(even, 3));
        _mm_storeu_si128((void *)&rows[7][2 * pair], _mm512_extracti64x2_epi64(odd, 3));
    }
}

SM2_INLINE lanes_multiple lanes_fetch_multiple(const uint64_t *const rows[SM2_LANES])
{
    __m512i w[MULTIPLE_WORDS];
    for (unsigned group = 0; group < MULTIPLE_WORDS / 4; group++)
        transpose_four_words(w + 4 * group, rows, 4 * group);
    return (lanes_multiple){{{w[0], w[1], w[2], w[3], w[4]}, {w[5], w[6], w[7], w[8], w[9]}, {w[10], w[11], w[12], w[13], w[14]},
                             {w[15], w[16], w[17], w[18], w[19]}}, {w[20], w[21], w[22], w[23], w[24]}};
}

#endif
