/* Arithmetic modulo p = 2^256 - 2^224 - 2^96 + 2^64 - 1 in plain C. Internal; included by the kernels that have no better one.
 *
 * Montgomery form with R = 2^256, always fully reduced. Because -1/p = 1 mod 2^64, the factor of a reduction step is the lowest limb
 * m itself, and m p = m 2^256 - m 2^224 - m 2^96 + m 2^64 - m is made of shifts: reduction needs no multiplication. */
#ifndef CSVF_SM2_FIELD_H
#define CSVF_SM2_FIELD_H

#include "sm2_number.h"

/* l3:l2:l1:l0 = (l3:l2:l1:l0 + (m1:m0) p) / 2^128 for m1:m0 = l1:l0 (1 + 2^64 - 2^96) mod 2^128. With w2:w1:w0 = 2^32 m1:m0 that is
 * m1:m0:l3:l2 + (0, 0, 0, m1) - (w2, w1, w0 + w2, w1) + the carry of l1 + m0 - w0, most significant first; w0 + w2 has no carry, since w0 ends and
 * w2 begins with 32 zero bits. Below p + 2^128 < 2^256, so four limbs stay four; twice gives p at most. */
static inline void field_reduce_two(uint64_t *l0, uint64_t *l1, uint64_t *l2, uint64_t *l3)
{
    const uint64_t m0 = *l0, w0 = m0 << 32;
    uint64_t sum, n0, n1, n2, n3, unused;
    uint8_t carry = limb_add(&sum, *l1, m0, 0);
    const uint64_t m1 = sum - w0, w1 = m0 >> 32 | m1 << 32, w2 = m1 >> 32;
    carry = limb_add(&n0, *l2, m1, carry);
    carry = limb_add(&n1, *l3, 0, carry);
    carry = limb_add(&n2, m0, 0, carry);
    (void)limb_add(&n3, m1, 0, carry);
    uint8_t borrow = limb_subtract(&unused, sum, w0, 0);
    borrow = limb_subtract(l0, n0, w1, borrow);
    borrow = limb_subtract(l1, n1, w0 | w2, borrow);
    borrow = limb_subtract(l2, n2, w1, borrow);
    (void)limb_subtract(l3, n3, w2, borrow);
}

/* out = t / R mod p for t below p R */
static inline void field_reduce(uint64_t out[4], uint64_t t[8])
{
    field_reduce_two(&t[0], &t[1], &t[2], &t[3]);
    field_reduce_two(&t[0], &t[1], &t[2], &t[3]);
    const uint64_t carry = number_add(t, t, t + 4);
    number_reduce_once(out, carry, t, csvf__sm2_p);
}

static inline void field_multiply(uint64_t out[4], const uint64_t a[4], const uint64_t b[4])
{
    uint64_t t[8] = {0};
    CSVF_UNROLL
    for (int i = 0; i < 4; i++) {
        uint64_t carry = 0;
        CSVF_UNROLL
        for (int j = 0; j < 4; j++) {
            const csvf__u128 product = (csvf__u128)a[i] * b[j] + t[i + j] + carry;
            t[i + j] = (uint64_t)product;
            carry = (uint64_t)(product >> 64);
        }
        t[i + 4] = carry;
    }
    field_reduce(out, t);
}

static inline void field_square(uint64_t out[4], const uint64_t a[4])
{
    uint64_t t[8];
    csvf__u128 product = (csvf__u128)a[0] * a[1];      /* the six products of different limbs */
    t[1] = (uint64_t)product;
    product = (csvf__u128)a[0] * a[2] + (uint64_t)(product >> 64);
    t[2] = (uint64_t)product;
    product = (csvf__u128)a[0] * a[3] + (uint64_t)(product >> 64);
    t[3] = (uint64_t)product;
    t[4] = (uint64_t)(product >> 64);
    product = (csvf__u128)a[1] * a[2] + t[3];
    t[3] = (uint64_t)product;
    product = (csvf__u128)a[1] * a[3] + t[4] + (uint64_t)(product >> 64);
    t[4] = (uint64_t)product;
    t[5] = (uint64_t)(product >> 64);
    product = (csvf__u128)a[2] * a[3] + t[5];
    t[5] = (uint64_t)product;
    t[6] = (uint64_t)(product >> 64);
    t[7] = t[6] >> 63;                                 /* twice, and the squares */
    CSVF_UNROLL
    for (int i = 6; i > 1; i--)
        t[i] = t[i] << 1 | t[i - 1] >> 63;
    t[1] <<= 1;
    csvf__u128 sum = 0;
    CSVF_UNROLL
    for (int i = 0; i < 4; i++) {
        const csvf__u128 square = (csvf__u128)a[i] * a[i];
        sum += (uint64_t)square;
        if (i)
            sum += t[2 * i];
        t[2 * i] = (uint64_t)sum;
        sum = (sum >> 64) + t[2 * i + 1] + (uint64_t)(square >> 64);
        t[2 * i + 1] = (uint64_t)sum;
        sum >>= 64;
    }
    field_reduce(out, t);
}

static inline void field_square_times(uint64_t out[4], const uint64_t a[4], int times)
{
    field_square(out, a);
    while (--times)
        field_square(out, out);
}

static inline void field_add(uint64_t out[4], const uint64_t a[4], const uint64_t b[4]) { number_add_modulo(out, a, b, csvf__sm2_p); }

static inline void field_subtract(uint64_t out[4], const uint64_t a[4], const uint64_t b[4])
{
    number_subtract_modulo(out, a, b, csvf__sm2_p);
}

static inline void field_halve(uint64_t out[4], const uint64_t a[4])
{
    const uint64_t odd = number_hide(0 - (a[0] & 1));
    uint64_t sum[4], masked[4];
    CSVF_UNROLL
    for (int i = 0; i < 4; i++)
        masked[i] = csvf__sm2_p[i] & odd;
    const uint64_t carry = number_add(sum, a, masked);
    CSVF_UNROLL
    for (int i = 0; i < 3; i++)
        out[i] = sum[i] >> 1 | sum[i + 1] << 63;
    out[3] = sum[3] >> 1 | carry << 63;
}

/* out = table[index - 1], or zeros for index 0: every entry is read. Entries of `words` (4 k) limbs. */
static inline void table_select(uint64_t *out, const uint64_t *table, size_t words, size_t count, uint64_t index)
{
    memset(out, 0, 8 * words);
    for (size_t i = 0; i < count; i++) {
        const uint64_t mask = number_mask_zero(index ^ (i + 1));
        for (size_t w = 0; w < words; w++)
            out[w] |= table[words * i + w] & mask;
    }
}

#endif
