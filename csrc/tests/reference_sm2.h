/* SM2 points by the book, for comparison: plain integers, reduction by folding 2^256 mod p, complete addition in projective coordinates
 * (Renes, Costello, Batina, "Complete addition formulas for prime order elliptic curves", algorithm 1, any a), double-and-add. Shares nothing
 * with the library: no Montgomery form, no windows, no Jacobian formulas. Slow, variable time. */
#ifndef CSVF_TESTS_REFERENCE_SM2_H
#define CSVF_TESTS_REFERENCE_SM2_H

#include <stdint.h>
#include <string.h>

#include "test.h"

__extension__ typedef unsigned __int128 ref_wide;
typedef struct ref_number { uint64_t v[4]; } ref_number;
typedef struct ref_point { ref_number x, y, z; } ref_point;     /* (X : Y : Z), infinity is (0 : 1 : 0) */

static const ref_number REF_P = {{0xffffffffffffffff, 0xffffffff00000000, 0xffffffffffffffff, 0xfffffffeffffffff}};
static const ref_number REF_N = {{0x53bbf40939d54123, 0x7203df6b21c6052b, 0xffffffffffffffff, 0xfffffffeffffffff}};

static TEST_UNUSED ref_number ref_from_bytes(const uint8_t bytes[32])
{
    ref_number out = {{0}};
    for (int i = 0; i < 32; i++)
        out.v[3 - i / 8] = out.v[3 - i / 8] << 8 | bytes[i];
    return out;
}

static TEST_UNUSED void ref_to_bytes(uint8_t bytes[32], ref_number a)
{
    for (int i = 0; i < 32; i++)
        bytes[i] = (uint8_t)(a.v[3 - i / 8] >> (56 - 8 * (i % 8)));
}

static TEST_UNUSED ref_number ref_hex(const char *hex)
{
    uint8_t bytes[32];
    if (test_hex(bytes, 32, hex) != 32)
        abort();
    return ref_from_bytes(bytes);
}

static TEST_UNUSED int ref_compare(ref_number a, ref_number b)
{
    for (int i = 3; i >= 0; i--)
        if (a.v[i] != b.v[i])
            return a.v[i] < b.v[i] ? -1 : 1;
    return 0;
}

static TEST_UNUSED ref_number ref_small(uint64_t value) { return (ref_number){{value}}; }

/* a - b for a >= b, and wrapping otherwise */
static TEST_UNUSED ref_number ref_minus(ref_number a, ref_number b)
{
    uint64_t borrow = 0;
    for (int i = 0; i < 4; i++) {
        const ref_wide d = (ref_wide)a.v[i] - b.v[i] - borrow;
        a.v[i] = (uint64_t)d;
        borrow = d >> 64 != 0;
    }
    return a;
}

/* a b + c mod m for any m above 2^255: 2^256 = 2^256 - m is folded in until nothing lies above 256 bits. */
static TEST_UNUSED ref_number ref_multiply_add(ref_number a, ref_number b, ref_number c, ref_number m)
{
    const ref_number fold = ref_minus((ref_number){{0}}, m);
    uint64_t t[8] = {c.v[0], c.v[1], c.v[2], c.v[3]};
    for (;;) {
        for (int i = 0; i < 4; i++) {
            uint64_t carry = 0;
            for (int j = 0; j + i < 8; j++) {
                const ref_wide s = (ref_wide)a.v[i] * (j < 4 ? b.v[j] : 0) + t[i + j] + carry;
                t[i + j] = (uint64_t)s;
                carry = (uint64_t)(s >> 64);
            }
        }
        if (!(t[4] | t[5] | t[6] | t[7]))
            break;
        memcpy(a.v, t + 4, sizeof a.v);
        memset(t + 4, 0, 32);
        b = fold;
    }
    ref_number out = {{t[0], t[1], t[2], t[3]}};
    while (ref_compare(out, m) >= 0)
        out = ref_minus(out, m);
    return out;
}

static TEST_UNUSED ref_number ref_mul(ref_number a, ref_number b, ref_number m) { return ref_multiply_add(a, b, ref_small(0), m); }
static TEST_UNUSED ref_number ref_plus(ref_number a, ref_number b, ref_number m) { return ref_multiply_add(a, ref_small(1), b, m); }
static TEST_UNUSED ref_number ref_negate(ref_number a, ref_number m) { return ref_compare(a, ref_small(0)) ? ref_minus(m, a) : a; }

static TEST_UNUSED ref_number ref_invert(ref_number a, ref_number m)
{
    const ref_number exponent = ref_minus(m, ref_small(2));
    ref_number out = ref_small(1);
    for (int i = 255; i >= 0; i--) {
        out = ref_mul(out, out, m);
        if (exponent.v[i / 64] >> i % 64 & 1)
            out = ref_mul(out, a, m);
    }
    return out;
}

#define M_(a, b) ref_mul(a, b, REF_P)
#define A_(a, b) ref_plus(a, b, REF_P)
#define S_(a, b) ref_plus(a, ref_negate(b, REF_P), REF_P)
static TEST_UNUSED ref_point ref_add(ref_point p, ref_point q)
{
    static const ref_number a = {{0xfffffffffffffffc, 0xffffffff00000000, 0xffffffffffffffff, 0xfffffffeffffffff}};
    static const ref_number b3 = {{0x993637c3e8bc2bb9, 0xdac69ddf4102aeb8, 0xe80fdae36e2f1cf7, 0x7abdefdbd8de1a9c}};     /* 3 b */
    ref_number t0 = M_(p.x, q.x), t1 = M_(p.y, q.y), t2 = M_(p.z, q.z);
    const ref_number t3 = S_(M_(A_(p.x, p.y), A_(q.x, q.y)), A_(t0, t1));
    const ref_number t4 = S_(M_(A_(p.x, p.z), A_(q.x, q.z)), A_(t0, t2));
    const ref_number t5 = S_(M_(A_(p.y, p.z), A_(q.y, q.z)), A_(t1, t2));
    const ref_number s = A_(M_(a, t4), M_(b3, t2)), x = S_(t1, s), z = A_(t1, s);
    const ref_number w = A_(M_(t0, ref_small(3)), M_(a, t2));
    const ref_number v = A_(M_(b3, t4), M_(a, S_(t0, M_(a, t2))));
    ref_point out;
    out.x = S_(M_(t3, x), M_(t5, v));
    out.y = A_(M_(x, z), M_(w, v));
    out.z = A_(M_(t5, z), M_(t3, w));
    return out;
}
#undef M_
#undef A_
#undef S_

static TEST_UNUSED ref_point ref_base(void)
{
    return (ref_point){ref_hex("32c4ae2c1f1981195f9904466a39c9948fe30bbff2660be1715a4589334c74c7"),
                       ref_hex("bc3736a2f4f6779c59bdcee36b692153d0a9877cc62a474002df32e52139f0a0"), ref_small(1)};
}

static TEST_UNUSED ref_point ref_times(ref_number k, ref_point p)
{
    ref_point out = {ref_small(0), ref_small(1), ref_small(0)};
    for (int i = 255; i >= 0; i--) {
        out = ref_add(out, out);
        if (k.v[i / 64] >> i % 64 & 1)
            out = ref_add(out, p);
    }
    return out;
}

/* x || y; returns 0 and zeros for infinity */
static TEST_UNUSED int ref_bytes(uint8_t bytes[64], ref_point p)
{
    memset(bytes, 0, 64);
    if (!ref_compare(p.z, ref_small(0)))
        return 0;
    const ref_number inverse = ref_invert(p.z, REF_P);
    ref_to_bytes(bytes, ref_mul(p.x, inverse, REF_P));
    ref_to_bytes(bytes + 32, ref_mul(p.y, inverse, REF_P));
    return 1;
}

static TEST_UNUSED ref_point ref_from_point(const uint8_t bytes[64])
{
    return (ref_point){ref_from_bytes(bytes), ref_from_bytes(bytes + 32), ref_small(1)};
}

static TEST_UNUSED ref_number ref_random(uint64_t *state)
{
    ref_number out;
    do
        for (int i = 0; i < 4; i++)
            out.v[i] = test_random(state);
    while (ref_compare(out, REF_N) >= 0 || !ref_compare(out, ref_small(0)));
    return out;
}

#endif
