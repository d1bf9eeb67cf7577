/* Points of y^2 = x^3 - 3 x + b over the field the including kernel brought along (field_multiply, ...). Internal; PURE.
 *
 * Jacobian coordinates: (X : Y : Z) is (X / Z^2, Y / Z^3), Z = 0 is infinity. Formulas: Hankerson, Menezes, Vanstone, Guide to Elliptic Curve
 * Cryptography, 3.2.2 (doubling for a = -3 with 4 M + 4 S, mixed addition with 8 M + 3 S). The group has prime order n and cofactor 1,
 * so every point but infinity has order n, and no point has y = 0. */
#ifndef CSVF_SM2_POINTS_H
#define CSVF_SM2_POINTS_H

#include "sm2_kernel.h"
#include "sm2_number.h"

typedef struct jacobian {
    uint64_t x[4], y[4], z[4];
} jacobian;

static const uint64_t field_one[4] = {0x0000000000000001, 0x00000000ffffffff, 0x0000000000000000, 0x0000000100000000};   /* 2^256 mod p */

/* out = mask ? -a : a */
static inline void field_negate_if(uint64_t out[4], const uint64_t a[4], uint64_t mask)
{
    static const uint64_t zero[4];
    uint64_t negated[4];
    field_subtract(negated, zero, a);
    number_select(out, mask, negated, a);
}

/* out = 1 / a, and 0 for 0: a^(p - 2), the bits of p - 2 being 31 ones, 0, 128 ones, 32 zeros, 62 ones, 0, 1. */
static void field_invert(uint64_t out[4], const uint64_t a[4])
{
    uint64_t x2[4], x4[4], x6[4], x8[4], x16[4], x30[4], x31[4], x32[4], t[4];     /* xN = a^(2^N - 1) */
    field_square(t, a);
    field_multiply(x2, t, a);
    field_square_times(t, x2, 2);
    field_multiply(x4, t, x2);
    field_square_times(t, x4, 2);
    field_multiply(x6, t, x2);
    field_square_times(t, x6, 2);
    field_multiply(x8, t, x2);
    field_square_times(t, x8, 8);
    field_multiply(x16, t, x8);
    field_square_times(t, x16, 8);
    field_multiply(t, t, x8);
    field_square_times(t, t, 6);
    field_multiply(x30, t, x6);
    field_square(t, x30);
    field_multiply(x31, t, a);
    field_square(t, x31);
    field_multiply(x32, t, a);
    field_square_times(t, x31, 33);     /* 31 ones, 0, 32 ones */
    field_multiply(t, t, x32);
    field_square_times(t, t, 32);
    field_multiply(t, t, x32);
    field_square_times(t, t, 32);
    field_multiply(t, t, x32);
    field_square_times(t, t, 32);       /* 128 ones in all */
    field_multiply(t, t, x32);
    field_square_times(t, t, 62);       /* 32 zeros, 30 ones */
    field_multiply(t, t, x30);
    field_square_times(t, t, 32);       /* 32 more ones: 62 */
    field_multiply(t, t, x32);
    field_square_times(t, t, 2);        /* 0, 1 */
    field_multiply(out, t, a);
}

/* Infinity doubles to infinity. The order is that of the machine, not of the book: between the links of the long chain Z^2, M, M^2, X, Y stand
 * multiplications that do not wait for it. */
static __attribute__((noinline)) void point_double(jacobian *out, const jacobian *a)
{
    uint64_t s[4], m[4], t[4], y[4], z_squared[4];
    field_square(z_squared, a->z);
    field_add(y, a->y, a->y);
    field_add(t, a->x, z_squared);
    field_subtract(m, a->x, z_squared);
    field_multiply(out->z, y, a->z);
    field_square(y, y);                     /* 4 Y^2 */
    field_multiply(m, m, t);
    field_multiply(s, y, a->x);             /* S = 4 X Y^2 */
    field_add(t, m, m);
    field_square(y, y);
    field_add(m, m, t);                     /* M = 3 (X - Z^2)(X + Z^2) */
    field_add(t, s, s);
    field_square(out->x, m);
    field_halve(y, y);                      /* 8 Y^4 */
    field_subtract(out->x, out->x, t);
    field_subtract(t, s, out->x);
    field_multiply(t, t, m);
    field_subtract(out->y, t, y);
}

/* What an addition is, once h = U2 - U1 and r = S2 - S1 are known: out = a + b for h != 0. u and s belong to a; out->z is the caller's. */
static inline void point_add_finish(jacobian *out, const uint64_t u[4], const uint64_t s[4], const uint64_t h[4], const uint64_t r[4])
{
    uint64_t square[4], cube[4], v[4], t[4];
    field_square(t, h);
    field_square(square, r);
    field_multiply(cube, t, h);
    field_multiply(v, t, u);
    field_subtract(square, square, cube);
    field_multiply(t, cube, s);
    field_subtract(square, square, v);
    field_subtract(out->x, square, v);      /* r^2 - h^3 - 2 u h^2 */
    field_subtract(v, v, out->x);
    field_multiply(v, v, r);
    field_subtract(out->y, v, t);
}

/* h and r of a + (x, y) */
static inline void mixed_start(uint64_t h[4], uint64_t r[4], const jacobian *a, const uint64_t x[4], const uint64_t y[4])
{
    uint64_t z_squared[4], t[4];
    field_square(z_squared, a->z);
    field_multiply(t, z_squared, a->z);
    field_multiply(h, z_squared, x);
    field_multiply(r, t, y);
    field_subtract(h, h, a->x);
    field_subtract(r, r, a->y);
}

/* out = a + b for b affine, a != b. The result is meaningless where a or b is infinity: callers select around it. */
static __attribute__((noinline)) void point_add_mixed(jacobian *out, const jacobian *a, const csvf_sm2_affine *b)
{
    uint64_t h[4], r[4];
    mixed_start(h, r, a, b->x, b->y);
    field_multiply(out->z, a->z, h);
    point_add_finish(out, a->x, a->y, h, r);
}

/* u, s, h, r of a + b, b's y given apart */
static inline void full_start(uint64_t u[4], uint64_t s[4], uint64_t h[4], uint64_t r[4], const jacobian *a, const jacobian *b,
                              const uint64_t y[4])
{
    uint64_t za[4], zb[4], t[4];
    field_square(za, a->z);
    field_square(zb, b->z);
    field_multiply(u, a->x, zb);
    field_multiply(h, b->x, za);
    field_multiply(t, za, a->z);
    field_multiply(r, y, t);
    field_multiply(t, zb, b->z);
    field_multiply(s, a->y, t);
    field_subtract(h, h, u);
    field_subtract(r, r, s);
}

/* out = a + b, a != b, neither infinity (see point_add_mixed). */
static __attribute__((noinline)) void point_add(jacobian *out, const jacobian *a, const jacobian *b)
{
    uint64_t u[4], s[4], h[4], r[4];
    full_start(u, s, h, r, a, b, b->y);
    field_multiply(out->z, a->z, b->z);
    field_multiply(out->z, out->z, h);
    point_add_finish(out, u, s, h, r);
}

static inline void point_select(jacobian *out, uint64_t mask, const jacobian *a, const jacobian *b)
{
    number_select(out->x, mask, a->x, b->x);
    number_select(out->y, mask, a->y, b->y);
    number_select(out->z, mask, a->z, b->z);
}

/* Affine form; returns 1, or 0 and zeros for infinity. Constant time. */
static int point_to_affine(csvf_sm2_affine *out, const jacobian *a)
{
    uint64_t inverse[4], t[4];
    field_invert(inverse, a->z);
    field_square(t, inverse);
    field_multiply(out->x, a->x, t);
    field_multiply(t, t, inverse);
    field_multiply(out->y, a->y, t);
    return (int)(1 + number_is_zero(a->z));     /* a mask is -1 or 0 */
}

/* ---- Public points: any two, equal, opposite or infinite -------------------------------------------------------------- */

static __attribute__((noinline)) void point_add_mixed_var(jacobian *a, const csvf_sm2_affine *b, int negate)
{
    static const uint64_t zero[4];
    uint64_t h[4], r[4], negated[4];
    const uint64_t *y = b->y;
    if (negate) {
        field_subtract(negated, zero, y);
        y = negated;
    }
    if (number_is_zero(a->z)) {
        memcpy(a->x, b->x, sizeof a->x);
        memcpy(a->y, y, sizeof a->y);
        memcpy(a->z, field_one, sizeof a->z);
        return;
    }
    mixed_start(h, r, a, b->x, y);
    if (__builtin_expect(number_is_zero(h) != 0, 0)) {
        if (number_is_zero(r))
            point_double(a, a);
        else
            memset(a, 0, sizeof *a);
        return;
    }
    field_multiply(a->z, a->z, h);
    point_add_finish(a, a->x, a->y, h, r);
}

static __attribute__((noinline)) void point_add_var(jacobian *a, const jacobian *b, int negate)
{
    static const uint64_t zero[4];
    uint64_t u[4], s[4], h[4], r[4], negated[4];
    const uint64_t *y = b->y;
    if (number_is_zero(b->z))
        return;
    if (negate) {
        field_subtract(negated, zero, y);
        y = negated;
    }
    if (number_is_zero(a->z)) {
        *a = *b;
        memcpy(a->y, y, sizeof a->y);
        return;
    }
    full_start(u, s, h, r, a, b, y);
    if (__builtin_expect(number_is_zero(h) != 0, 0)) {
        if (number_is_zero(r))
            point_double(a, a);
        else
            memset(a, 0, sizeof *a);
        return;
    }
    field_multiply(a->z, a->z, b->z);
    field_multiply(a->z, a->z, h);
    point_add_finish(a, u, s, h, r);
}

#endif
