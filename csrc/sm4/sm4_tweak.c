/* Multiplication of XTS tweaks by powers of alpha, in both bit orders.
 *
 * IEEE 1619-2018 5.2: the tweak is a little-endian number v, alpha v = v << 1, reduced by x^128 = x^7 + x^2 + x + 1 (0x87).
 * GB/T 17964-2021: the same field with the bits of every byte, and so of the whole string, numbered the other way round: a
 * big-endian number, alpha v = v >> 1, reduced by 0xe1 << 120. Carries are taken by arithmetic, never by a branch. */
#include "sm4_tweak.h"

#include <string.h>

#include "../include/csvfast.h"
#include "sm4_kernel.h"

/* A tweak as the two halves of its number. */
typedef struct number { uint64_t high, low; } number;

static inline uint64_t order_le(uint64_t x)
{
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return __builtin_bswap64(x);
#else
    return x;
#endif
}

static inline number get(int standard, const uint8_t p[16])
{
    uint64_t a, b;
    memcpy(&a, p, 8);
    memcpy(&b, p + 8, 8);
    a = order_le(a);
    b = order_le(b);
    if (standard == CSVF_STANDARD_IEEE)
        return (number){ b, a };
    return (number){ __builtin_bswap64(a), __builtin_bswap64(b) };
}

static inline void put(int standard, uint8_t p[16], number v)
{
    uint64_t a = v.low, b = v.high;
    if (standard != CSVF_STANDARD_IEEE) {
        a = __builtin_bswap64(v.high);
        b = __builtin_bswap64(v.low);
    }
    a = order_le(a);
    b = order_le(b);
    memcpy(p, &a, 8);
    memcpy(p + 8, &b, 8);
}

static inline number times_alpha_ieee(number v)
{
    const uint64_t carry = (uint64_t)((int64_t)v.high >> 63) & 0x87;
    return (number){ v.high << 1 | v.low >> 63, (v.low << 1) ^ carry };
}

static inline number times_alpha_gb(number v)
{
    const uint64_t carry = (0 - (v.low & 1)) & 0xe100000000000000u;
    return (number){ v.high >> 1 ^ carry, v.low >> 1 | v.high << 63 };
}

/* v * alpha^n for 0 < n < 58: the n bits that fall out come back times x^7 + x^2 + x + 1, which fits in one half. */
static inline number times_alpha_power(int standard, number v, unsigned n)
{
    if (standard == CSVF_STANDARD_IEEE) {
        const uint64_t out = v.high >> (64 - n);
        return (number){ v.high << n | v.low >> (64 - n), v.low << n ^ out ^ out << 1 ^ out << 2 ^ out << 7 };
    }
    const uint64_t out = v.low << (64 - n);
    return (number){ v.high >> n ^ out ^ out >> 1 ^ out >> 2 ^ out >> 7, v.low >> n | v.high << (64 - n) };
}

static number times_alpha_to(int standard, number v, uint32_t power)
{
    for (; power >= 56; power -= 56)
        v = times_alpha_power(standard, v, 56);
    return power ? times_alpha_power(standard, v, power) : v;
}

static inline __attribute__((always_inline)) number run(int standard, uint8_t *out, number v, size_t count)
{
    for (size_t j = 0; j < count; j++) {
        put(standard, out + 16 * j, v);
        v = standard == CSVF_STANDARD_IEEE ? times_alpha_ieee(v) : times_alpha_gb(v);
    }
    return v;
}

/* `standard` as a constant in each branch lets the compiler drop the other one from the loop. */
static inline number run_of(int standard, uint8_t *out, number v, size_t count)
{
    return standard == CSVF_STANDARD_IEEE ? run(CSVF_STANDARD_IEEE, out, v, count) : run(CSVF_STANDARD_GB, out, v, count);
}

void csvf__sm4_tweak_run(int standard, uint8_t *out, uint8_t tweak[16], size_t count)
{
    put(standard, tweak, run_of(standard, out, get(standard, tweak), count));
}

void csvf__sm4_tweaks_portable(int standard, uint8_t *out, const uint8_t *bases, const uint32_t *powers, size_t count,
                               size_t runs)
{
    for (size_t i = 0; i < runs; i++) {
        number v = get(standard, bases + 16 * i);
        if (powers)
            v = times_alpha_to(standard, v, powers[i]);
        run_of(standard, out + 16 * i * count, v, count);
    }
}
