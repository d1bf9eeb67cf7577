/* 256-bit numbers for SM2: four 64-bit limbs, least significant first. Internal; everything is static inline, constant time and PURE.
 * Masks are all ones for yes, zero for no. */
#ifndef CSVF_SM2_NUMBER_H
#define CSVF_SM2_NUMBER_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__) && !defined(__clang__)
#  include <immintrin.h>
#endif

__extension__ typedef unsigned __int128 csvf__u128;

/* Stands before loops over limbs: gcc leaves them rolled at -O2, in memory and three times slower. */
#if defined(__clang__)
#  define CSVF_UNROLL _Pragma("clang loop unroll(full)")
#else
#  define CSVF_UNROLL _Pragma("GCC unroll 8")
#endif

/* Field prime, group order (GB/T 32918.5-2017). */
static const uint64_t csvf__sm2_p[4] = {0xffffffffffffffff, 0xffffffff00000000, 0xffffffffffffffff, 0xfffffffeffffffff};
static const uint64_t csvf__sm2_n[4] = {0x53bbf40939d54123, 0x7203df6b21c6052b, 0xffffffffffffffff, 0xfffffffeffffffff};

#if defined(__has_feature)
#  if __has_feature(memory_sanitizer)
#    define CSVF_HIDE(word) ((void)(word))     /* MSan takes an operand of inline assembly for a use of it */
#  endif
#endif
#if !defined(CSVF_HIDE)
#  define CSVF_HIDE(word) __asm__("" : "+r"(word))
#endif

/* The compiler knows nothing of what comes out, so it cannot turn a selection by mask into a branch. */
static inline uint64_t number_hide(uint64_t word)
{
    CSVF_HIDE(word);
    return word;
}

static inline uint64_t number_mask_zero(uint64_t word) { return number_hide(0 - ((~word & (word - 1)) >> 63)); }

static inline uint64_t number_is_zero(const uint64_t a[4]) { return number_mask_zero(a[0] | a[1] | a[2] | a[3]); }

static inline uint64_t number_is_equal(const uint64_t a[4], const uint64_t b[4])
{
    return number_mask_zero((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]));
}

/* *out = a + b + carry and a - b - borrow; return the carry or borrow, 0 or 1. gcc 12 makes chains of adc and sbb out of the intrinsics only;
 * clang makes them out of either, and its MemorySanitizer knows no rules for the intrinsics. */
#if defined(__x86_64__) && !defined(__clang__)
static inline uint8_t limb_add(uint64_t *out, uint64_t a, uint64_t b, uint8_t carry)
{
    unsigned long long sum;
    carry = _addcarry_u64(carry, a, b, &sum);
    *out = sum;
    return carry;
}

static inline uint8_t limb_subtract(uint64_t *out, uint64_t a, uint64_t b, uint8_t borrow)
{
    unsigned long long difference;
    borrow = _subborrow_u64(borrow, a, b, &difference);
    *out = difference;
    return borrow;
}
#else
static inline uint8_t limb_add(uint64_t *out, uint64_t a, uint64_t b, uint8_t carry)
{
    const csvf__u128 sum = (csvf__u128)a + b + carry;
    *out = (uint64_t)sum;
    return (uint8_t)(sum >> 64);
}

static inline uint8_t limb_subtract(uint64_t *out, uint64_t a, uint64_t b, uint8_t borrow)
{
    const csvf__u128 difference = (csvf__u128)a - b - borrow;
    *out = (uint64_t)difference;
    return (uint8_t)(difference >> 64) & 1;
}
#endif

/* out = a + b; returns the carry. */
static inline uint64_t number_add(uint64_t out[4], const uint64_t a[4], const uint64_t b[4])
{
    uint8_t carry = limb_add(&out[0], a[0], b[0], 0);
    carry = limb_add(&out[1], a[1], b[1], carry);
    carry = limb_add(&out[2], a[2], b[2], carry);
    return limb_add(&out[3], a[3], b[3], carry);
}

/* out = a - b; returns the borrow, 0 or 1. */
static inline uint64_t number_subtract(uint64_t out[4], const uint64_t a[4], const uint64_t b[4])
{
    uint8_t borrow = limb_subtract(&out[0], a[0], b[0], 0);
    borrow = limb_subtract(&out[1], a[1], b[1], borrow);
    borrow = limb_subtract(&out[2], a[2], b[2], borrow);
    return limb_subtract(&out[3], a[3], b[3], borrow);
}

/* Is a below b? */
static inline uint64_t number_is_below(const uint64_t a[4], const uint64_t b[4])
{
    uint64_t unused[4];
    return number_hide(0 - number_subtract(unused, a, b));
}

/* out = mask ? a : b */
static inline void number_select(uint64_t out[4], uint64_t mask, const uint64_t a[4], const uint64_t b[4])
{
    CSVF_UNROLL
    for (int i = 0; i < 4; i++)
        out[i] = b[i] ^ (mask & (a[i] ^ b[i]));
}

/* out = carry:a mod m, for carry:a below 2 m. */
static inline void number_reduce_once(uint64_t out[4], uint64_t carry, const uint64_t a[4], const uint64_t m[4])
{
    uint64_t less[4];
    const uint64_t borrow = number_subtract(less, a, m);
    number_select(out, number_hide(0 - (borrow & ~carry & 1)), a, less);
}

/* out = a + b mod m and a - b mod m, for a, b below m. */
static inline void number_add_modulo(uint64_t out[4], const uint64_t a[4], const uint64_t b[4], const uint64_t m[4])
{
    uint64_t sum[4];
    const uint64_t carry = number_add(sum, a, b);
    number_reduce_once(out, carry, sum, m);
}

static inline void number_subtract_modulo(uint64_t out[4], const uint64_t a[4], const uint64_t b[4], const uint64_t m[4])
{
    uint64_t difference[4], masked[4];
    const uint64_t mask = number_hide(0 - number_subtract(difference, a, b));
    CSVF_UNROLL
    for (int i = 0; i < 4; i++)
        masked[i] = m[i] & mask;
    (void)number_add(out, difference, masked);
}

static inline void number_load(uint64_t out[4], const uint8_t bytes[32])
{
    CSVF_UNROLL
    for (int i = 0; i < 4; i++) {
        uint64_t word;
        memcpy(&word, bytes + 24 - 8 * i, 8);
        out[i] = __builtin_bswap64(word);
    }
}

static inline void number_store(uint8_t bytes[32], const uint64_t a[4])
{
    CSVF_UNROLL
    for (int i = 0; i < 4; i++) {
        const uint64_t word = __builtin_bswap64(a[i]);
        memcpy(bytes + 24 - 8 * i, &word, 8);
    }
}

#endif
