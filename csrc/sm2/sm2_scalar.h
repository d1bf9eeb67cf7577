/* Arithmetic modulo the group order n. Internal; compiled into each kernel for its instruction set. Constant time, PURE. */
#ifndef CSVF_SM2_SCALAR_H
#define CSVF_SM2_SCALAR_H

#include "sm2_number.h"

/* out = a b / 2^256 mod n, below n, for a b below 2^256 n. */
static inline void scalar_montgomery(uint64_t out[4], const uint64_t a[4], const uint64_t b[4])
{
    const uint64_t minus_inverse = 0x327f9e8872350975;     /* -1/n mod 2^64 */
    uint64_t t[6] = {0};
    CSVF_UNROLL
    for (int i = 0; i < 4; i++) {
        csvf__u128 sum = 0;
        CSVF_UNROLL
        for (int j = 0; j < 4; j++) {
            sum += (csvf__u128)a[i] * b[j] + t[j];
            t[j] = (uint64_t)sum;
            sum >>= 64;
        }
        sum += t[4];
        t[4] = (uint64_t)sum;
        t[5] = (uint64_t)(sum >> 64);
        const uint64_t m = t[0] * minus_inverse;
        sum = ((csvf__u128)m * csvf__sm2_n[0] + t[0]) >> 64;
        CSVF_UNROLL
        for (int j = 1; j < 4; j++) {
            sum += (csvf__u128)m * csvf__sm2_n[j] + t[j];
            t[j - 1] = (uint64_t)sum;
            sum >>= 64;
        }
        sum += t[4];
        t[3] = (uint64_t)sum;
        t[4] = t[5] + (uint64_t)(sum >> 64);
    }
    number_reduce_once(out, t[4], t, csvf__sm2_n);
}

static const uint64_t scalar_r_squared[4] = {0x901192af7c114f20, 0x3464504ade6fa2fa, 0x620fc84c3affe0d4, 0x1eb5e412a22b3d3b};   /* 2^512 mod n */

/* out = a b mod n; a may be any 256-bit number, b is below n. */
static void scalar_multiply(uint64_t out[4], const uint64_t a[4], const uint64_t b[4])
{
    uint64_t t[4];
    scalar_montgomery(t, a, b);
    scalar_montgomery(out, t, scalar_r_squared);
}

/* out = a^(n - 2) = 1/a mod n, and 0 for 0. The exponent is public, four bits at a time; the base is not. */
static void scalar_invert(uint64_t out[4], const uint64_t a[4])
{
    static const uint64_t one[4] = {1, 0, 0, 0};
    static const uint64_t exponent[4] = {0x53bbf40939d54121, 0x7203df6b21c6052b, 0xffffffffffffffff, 0xfffffffeffffffff};
    uint64_t powers[16][4], t[4];
    scalar_montgomery(powers[1], a, scalar_r_squared);
    for (int i = 2; i < 16; i++)
        scalar_montgomery(powers[i], powers[i - 1], powers[1]);
    memcpy(t, powers[15], sizeof t);
    for (int i = 62; i >= 0; i--) {
        for (int j = 0; j < 4; j++)
            scalar_montgomery(t, t, t);
        const unsigned digit = exponent[i / 16] >> 4 * (i % 16) & 15;
        if (digit)
            scalar_montgomery(t, t, powers[digit]);
    }
    scalar_montgomery(out, t, one);
}

#endif
