/* Arithmetic modulo the SM2 prime p = 2^256 - 2^224 - 2^96 + 2^64 - 1 in eight lanes, for sm2_many_ifma.c alone. Public data only.
 *
 * A number is five limbs of radix 2^52, one vector each, in Montgomery form with R = 2^260. vpmadd52 multiplies the low 52 bits of a lane
 * and ignores the rest; that leaves three forms of the same five vectors, told apart in the comments:
 *   loose   any signed 64-bit limbs; their weighted sum is the value. What products and sums give.
 *   ready   carries have moved up, but the bits from 52 on still stand there too: fit for multiplication, and for nothing else.
 *   strict  limbs in 0 .. 2^52 - 1. Fit for everything.
 * Values are not reduced. R is 16 p and a bit, so a product of a < A p and b < B p is less than (A B / 16 + 1) p; the bounds in the comments
 * are in units of p, and a multiplicand must be nonnegative and below 16 (2^260).
 *
 * The reduction: p = -1 (mod 2^52), so the digit that clears a limb is the limb itself, and adding q p = -q + q (2^64 - 2^96) +
 * q (2^256 - 2^224) takes one product for each bracket. The first is negative: those products have sums of their own, to be subtracted. */
#ifndef CSVF_SM2_MANY_IFMA_FIELD_H
#define CSVF_SM2_MANY_IFMA_FIELD_H

#include <immintrin.h>
#include <stdint.h>

enum { SM2_LIMBS = 5 };

typedef struct lanes_number {
    __m512i l0, l1, l2, l3, l4;
} lanes_number;

#define SM2_INLINE static inline __attribute__((always_inline))

#define LIMB_MASK ((INT64_C(1) << 52) - 1)
#define WORD(value) _mm512_set1_epi64((long long)(value))
#define ADD(a, b) _mm512_add_epi64(a, b)
#define SUB(a, b) _mm512_sub_epi64(a, b)
#define LOW(sum, a, b) sum = _mm512_madd52lo_epu64(sum, a, b)
#define HIGH(sum, a, b) sum = _mm512_madd52hi_epu64(sum, a, b)

/* p with signed limbs: only three are not zero. */
#define P0 INT64_C(-1)
#define P1 ((INT64_C(1) << 12) - (INT64_C(1) << 44))
#define P4 ((INT64_C(1) << 48) - (INT64_C(1) << 16))

/* Ten sums, weights 2^(52 i): a product before its reduction. */
typedef struct lanes_wide {
    __m512i t0, t1, t2, t3, t4, t5, t6, t7, t8, t9;
} lanes_wide;

/* Clears sum a by adding q p, q = a mod 2^52; its carry goes to b, the next one. n1 and n2 hold what is to be taken off b and the sum after it. */
#define CLEAR(a, b, n1, n2, e, f)                        \
    do {                                                 \
        LOW(n1, a, WORD(-P1)); HIGH(n2, a, WORD(-P1));   \
        LOW(e, a, WORD(P4)); HIGH(f, a, WORD(P4));       \
        b = SUB(ADD(b, _mm512_srai_epi64(a, 52)), n1);   \
    } while (0)

/* s0 .. s5 += limb * b */
#define ROW(limb, b, s0, s1, s2, s3, s4, s5)             \
    do {                                                 \
        LOW(s0, limb, b.l0); LOW(s1, limb, b.l1);        \
        LOW(s2, limb, b.l2); LOW(s3, limb, b.l3);        \
        LOW(s4, limb, b.l4);                             \
        HIGH(s1, limb, b.l0); HIGH(s2, limb, b.l1);      \
        HIGH(s3, limb, b.l2); HIGH(s4, limb, b.l3);      \
        HIGH(s5, limb, b.l4);                            \
    } while (0)

SM2_INLINE lanes_wide lanes_wide_zero(void)
{
    const __m512i zero = WORD(0);
    return (lanes_wide){zero, zero, zero, zero, zero, zero, zero, zero, zero, zero};
}

/* (t + a b) / R. In: sums of 2^60 at most in size; a, b ready or strict. Out: loose. A product adds at most 10 terms below 2^52 to a sum, the
 * reduction 4. */
SM2_INLINE lanes_number lanes_reduce_with_product(lanes_wide t, lanes_number a, lanes_number b)
{
    const __m512i zero = WORD(0);
    __m512i n1 = zero, n2 = zero, n3 = zero, n4 = zero, n5 = zero, n6 = zero;
    ROW(a.l0, b, t.t0, t.t1, t.t2, t.t3, t.t4, t.t5);
    CLEAR(t.t0, t.t1, n1, n2, t.t4, t.t5);
    ROW(a.l1, b, t.t1, t.t2, t.t3, t.t4, t.t5, t.t6);
    CLEAR(t.t1, t.t2, n2, n3, t.t5, t.t6);
    ROW(a.l2, b, t.t2, t.t3, t.t4, t.t5, t.t6, t.t7);
    CLEAR(t.t2, t.t3, n3, n4, t.t6, t.t7);
    ROW(a.l3, b, t.t3, t.t4, t.t5, t.t6, t.t7, t.t8);
    CLEAR(t.t3, t.t4, n4, n5, t.t7, t.t8);
    ROW(a.l4, b, t.t4, t.t5, t.t6, t.t7, t.t8, t.t9);
    CLEAR(t.t4, t.t5, n5, n6, t.t8, t.t9);
    return (lanes_number){t.t5, SUB(t.t6, n6), t.t7, t.t8, t.t9};
}

/* a b / R. In: ready or strict. Out: loose. */
SM2_INLINE lanes_number lanes_multiply(lanes_number a, lanes_number b) { return lanes_reduce_with_product(lanes_wide_zero(), a, b); }

/* (a b + c d) / R. As lanes_multiply. */
SM2_INLINE lanes_number lanes_multiply_two(lanes_number a, lanes_number b, lanes_number c, lanes_number d)
{
    lanes_wide t = lanes_wide_zero();
    ROW(c.l0, d, t.t0, t.t1, t.t2, t.t3, t.t4, t.t5);
    ROW(c.l1, d, t.t1, t.t2, t.t3, t.t4, t.t5, t.t6);
    ROW(c.l2, d, t.t2, t.t3, t.t4, t.t5, t.t6, t.t7);
    ROW(c.l3, d, t.t3, t.t4, t.t5, t.t6, t.t7, t.t8);
    ROW(c.l4, d, t.t4, t.t5, t.t6, t.t7, t.t8, t.t9);
    return lanes_reduce_with_product(t, a, b);
}

#define TWICE(a) a = ADD(a, a)

/* a^2, not reduced: products of unequal limbs once and doubled. In: ready or strict. */
SM2_INLINE lanes_wide lanes_square_wide(lanes_number a)
{
    lanes_wide t = lanes_wide_zero();
    LOW(t.t1, a.l0, a.l1); LOW(t.t2, a.l0, a.l2); LOW(t.t3, a.l0, a.l3); LOW(t.t4, a.l0, a.l4);
    HIGH(t.t2, a.l0, a.l1); HIGH(t.t3, a.l0, a.l2); HIGH(t.t4, a.l0, a.l3); HIGH(t.t5, a.l0, a.l4);
    LOW(t.t3, a.l1, a.l2); LOW(t.t4, a.l1, a.l3); LOW(t.t5, a.l1, a.l4);
    HIGH(t.t4, a.l1, a.l2); HIGH(t.t5, a.l1, a.l3); HIGH(t.t6, a.l1, a.l4);
    TWICE(t.t1); TWICE(t.t2); TWICE(t.t3); TWICE(t.t4);
    LOW(t.t0, a.l0, a.l0); HIGH(t.t1, a.l0, a.l0); LOW(t.t2, a.l1, a.l1); HIGH(t.t3, a.l1, a.l1); LOW(t.t4, a.l2, a.l2);
    LOW(t.t5, a.l2, a.l3); LOW(t.t6, a.l2, a.l4); HIGH(t.t6, a.l2, a.l3); HIGH(t.t7, a.l2, a.l4);
    LOW(t.t7, a.l3, a.l4); HIGH(t.t8, a.l3, a.l4);
    TWICE(t.t5); TWICE(t.t6); TWICE(t.t7); TWICE(t.t8);
    HIGH(t.t5, a.l2, a.l2); LOW(t.t6, a.l3, a.l3); HIGH(t.t7, a.l3, a.l3); LOW(t.t8, a.l4, a.l4); HIGH(t.t9, a.l4, a.l4);
    return t;
}

/* a^2 / R. As lanes_multiply. */
SM2_INLINE lanes_number lanes_square(lanes_number a)
{
    const __m512i zero = WORD(0);
    __m512i n1 = zero, n2 = zero, n3 = zero, n4 = zero, n5 = zero, n6 = zero;
    lanes_wide t = lanes_square_wide(a);
    CLEAR(t.t0, t.t1, n1, n2, t.t4, t.t5);
    CLEAR(t.t1, t.t2, n2, n3, t.t5, t.t6);
    CLEAR(t.t2, t.t3, n3, n4, t.t6, t.t7);
    CLEAR(t.t3, t.t4, n4, n5, t.t7, t.t8);
    CLEAR(t.t4, t.t5, n5, n6, t.t8, t.t9);
    return (lanes_number){t.t5, SUB(t.t6, n6), t.t7, t.t8, t.t9};
}

/* -8 t */
SM2_INLINE lanes_wide lanes_wide_times_minus_8(lanes_wide t)
{
    const __m512i zero = WORD(0);
#define MINUS_8(sum) SUB(zero, _mm512_slli_epi64(sum, 3))
    return (lanes_wide){MINUS_8(t.t0), MINUS_8(t.t1), MINUS_8(t.t2), MINUS_8(t.t3), MINUS_8(t.t4),
                        MINUS_8(t.t5), MINUS_8(t.t6), MINUS_8(t.t7), MINUS_8(t.t8), MINUS_8(t.t9)};
}

/* Limb by limb; loose results. The caller adds enough multiples of p to keep values from being negative. */
SM2_INLINE lanes_number lanes_add(lanes_number a, lanes_number b)
{
    return (lanes_number){ADD(a.l0, b.l0), ADD(a.l1, b.l1), ADD(a.l2, b.l2), ADD(a.l3, b.l3), ADD(a.l4, b.l4)};
}

SM2_INLINE lanes_number lanes_subtract(lanes_number a, lanes_number b)
{
    return (lanes_number){SUB(a.l0, b.l0), SUB(a.l1, b.l1), SUB(a.l2, b.l2), SUB(a.l3, b.l3), SUB(a.l4, b.l4)};
}

SM2_INLINE lanes_number lanes_zero(void)
{
    const __m512i zero = WORD(0);
    return (lanes_number){zero, zero, zero, zero, zero};
}

/* a 2^bits */
SM2_INLINE lanes_number lanes_shift(lanes_number a, unsigned bits)
{
    return (lanes_number){_mm512_slli_epi64(a.l0, bits), _mm512_slli_epi64(a.l1, bits), _mm512_slli_epi64(a.l2, bits),
                          _mm512_slli_epi64(a.l3, bits), _mm512_slli_epi64(a.l4, bits)};
}

/* a + times p */
SM2_INLINE lanes_number lanes_plus_p(lanes_number a, int64_t times)
{
    a.l0 = ADD(a.l0, WORD(times * P0));
    a.l1 = ADD(a.l1, WORD(times * P1));
    a.l4 = ADD(a.l4, WORD(times * P4));
    return a;
}

/* -a in the chosen lanes. */
SM2_INLINE lanes_number lanes_negate_some(lanes_number a, __mmask8 which)
{
    const __m512i zero = WORD(0);
    a.l0 = _mm512_mask_sub_epi64(a.l0, which, zero, a.l0);
    a.l1 = _mm512_mask_sub_epi64(a.l1, which, zero, a.l1);
    a.l2 = _mm512_mask_sub_epi64(a.l2, which, zero, a.l2);
    a.l3 = _mm512_mask_sub_epi64(a.l3, which, zero, a.l3);
    a.l4 = _mm512_mask_sub_epi64(a.l4, which, zero, a.l4);
    return a;
}

/* b in the chosen lanes, a in the others. */
SM2_INLINE lanes_number lanes_choose(__mmask8 which, lanes_number a, lanes_number b)
{
    return (lanes_number){_mm512_mask_blend_epi64(which, a.l0, b.l0), _mm512_mask_blend_epi64(which, a.l1, b.l1),
                          _mm512_mask_blend_epi64(which, a.l2, b.l2), _mm512_mask_blend_epi64(which, a.l3, b.l3),
                          _mm512_mask_blend_epi64(which, a.l4, b.l4)};
}

/* Loose to ready: a value in 0 .. 2^260 - 1. */
SM2_INLINE lanes_number lanes_ready(lanes_number a)
{
    a.l1 = ADD(a.l1, _mm512_srai_epi64(a.l0, 52));
    a.l2 = ADD(a.l2, _mm512_srai_epi64(a.l1, 52));
    a.l3 = ADD(a.l3, _mm512_srai_epi64(a.l2, 52));
    a.l4 = ADD(a.l4, _mm512_srai_epi64(a.l3, 52));
    return a;
}

/* Ready to strict. */
SM2_INLINE lanes_number lanes_trim(lanes_number a)
{
    const __m512i mask = WORD(LIMB_MASK);
    return (lanes_number){_mm512_and_si512(a.l0, mask), _mm512_and_si512(a.l1, mask), _mm512_and_si512(a.l2, mask),
                          _mm512_and_si512(a.l3, mask), a.l4};
}

/* Loose to strict. As lanes_ready. */
SM2_INLINE lanes_number lanes_strict(lanes_number a) { return lanes_trim(lanes_ready(a)); }

/* Loose to strict and below (1 + 2^-26) p, from any value in 0 .. 2^262 whose lower limbs are below 2^60 in size. Takes k p off, k being the
 * value / 2^256 as the top limb alone tells. The lower limbs may owe the top one up to 2^9, but nothing becomes negative: what stays of
 * the value for k > 0 is at least k 2^224 (which is 2^16 k in the top limb) less that, for k = 0 it is the value; k = -1 adds p. */
SM2_INLINE lanes_number lanes_fold(lanes_number a)
{
    const __m512i k = _mm512_srai_epi64(a.l4, 48);
    a.l0 = ADD(a.l0, k);
    a.l1 = ADD(a.l1, SUB(_mm512_slli_epi64(k, 44), _mm512_slli_epi64(k, 12)));
    a.l4 = ADD(a.l4, SUB(_mm512_slli_epi64(k, 16), _mm512_slli_epi64(k, 48)));
    return lanes_strict(a);
}

/* Which lanes are 0 mod p? In: ready. A Montgomery product with 1 lies in 0 .. p: it is 0 or p exactly for multiples of p. */
SM2_INLINE __mmask8 lanes_are_zero(lanes_number a)
{
    const __m512i zero = WORD(0), all = WORD(LIMB_MASK);
    const lanes_number one = {WORD(1), zero, zero, zero, zero}, v = lanes_strict(lanes_multiply(a, one));
    const __m512i any = _mm512_or_si512(_mm512_or_si512(_mm512_or_si512(v.l0, v.l1), _mm512_or_si512(v.l2, v.l3)), v.l4);
    const __m512i top = _mm512_xor_si512(v.l4, WORD(P4 - 1)), second = _mm512_xor_si512(v.l1, WORD(LIMB_MASK + P1));
    const __m512i rest = _mm512_xor_si512(_mm512_and_si512(_mm512_and_si512(v.l0, v.l2), v.l3), all);
    const __m512i differs = _mm512_or_si512(_mm512_or_si512(top, second), rest);
    return (__mmask8)(_mm512_cmpeq_epi64_mask(any, zero) | _mm512_cmpeq_epi64_mask(differs, zero));
}

/* Four 64-bit words a lane to five limbs of value * 16: what takes Montgomery form from R = 2^256 to 2^260. Ready, below 16 p + 2^229. */
SM2_INLINE lanes_number lanes_from_words_times_16(__m512i w0, __m512i w1, __m512i w2, __m512i w3)
{
    return (lanes_number){_mm512_slli_epi64(w0, 4),
                          _mm512_or_si512(_mm512_srli_epi64(w0, 48), _mm512_slli_epi64(w1, 16)),
                          _mm512_or_si512(_mm512_srli_epi64(w1, 36), _mm512_slli_epi64(w2, 28)),
                          _mm512_or_si512(_mm512_srli_epi64(w2, 24), _mm512_slli_epi64(w3, 40)),
                          _mm512_srli_epi64(w3, 12)};
}

/* The same without the factor. Ready. */
SM2_INLINE lanes_number lanes_from_words(__m512i w0, __m512i w1, __m512i w2, __m512i w3)
{
    return (lanes_number){w0,
                          _mm512_or_si512(_mm512_srli_epi64(w0, 52), _mm512_slli_epi64(w1, 12)),
                          _mm512_or_si512(_mm512_srli_epi64(w1, 40), _mm512_slli_epi64(w2, 24)),
                          _mm512_or_si512(_mm512_srli_epi64(w2, 28), _mm512_slli_epi64(w3, 36)),
                          _mm512_srli_epi64(w3, 16)};
}

/* A constant's five strict limbs in every lane. */
SM2_INLINE lanes_number lanes_constant(const uint64_t limbs[SM2_LIMBS])
{
    return (lanes_number){WORD(limbs[0]), WORD(limbs[1]), WORD(limbs[2]), WORD(limbs[3]), WORD(limbs[4])};
}

#endif
