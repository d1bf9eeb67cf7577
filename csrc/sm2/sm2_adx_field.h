/* Arithmetic modulo p for x86-64 with BMI2 and ADX: the functions of sm2_field.h in inline assembly (compilers do not interleave the two
 * carry chains of adcx and adox), and table scans with AVX2. Internal; only sm2_adx.c includes it.
 *
 * Montgomery form and reduction as in sm2_field.h. No block needs more than thirteen registers, so that builds with a frame and a base
 * pointer find enough. The "memory" clobber stands for the limbs read through pointers, and `volatile` with it: without, gcc 12 at -O3
 * runs a statement once for all rounds of a loop, its pointers being the same, although the limbs behind them changed (x = x^4 by two products
 * in place became x^2). Memory operands instead would take registers of their own at -O0. */
#ifndef CSVF_SM2_ADX_FIELD_H
#define CSVF_SM2_ADX_FIELD_H

#include <immintrin.h>

#include "sm2_number.h"

/* One reduction step takes two limbs. With m1:m0 = t1:t0 (1 + 2^64 - 2^96) mod 2^128 and w = 2^32 m1:m0 = w2:w1:w0,
 *     (t + (m1:m0) p) / 2^128 = t5:t4:t3:t2 + (m1, m0, 0, m1) - (w2, w1, w0 + w2, w1) + the carry of t1 + m0 - w0, most significant first,
 * where w0 + w2 has no carry: w0 ends and w2 begins with 32 zero bits. One chain of additions and one of subtractions: what limits this code is the
 * two instructions a cycle that may consume a carry, so there are as few of them as possible (adcx and adox in rows of products, each chain
 * reaching over every limb, need more). Instructions between the links of a chain keep the flags. */
#define REDUCE_FACTORS(l0, l1) \
    "mov $32, %%edx\n\t" \
    "shlx %%rdx, %[" l0 "], %[t0]\n\t" \
    "shrx %%rdx, %[" l0 "], %[t1]\n\t" \
    "mov %[t0], %[t2]\n\t" \
    "neg %[t2]\n\t" \
    "add %[" l0 "], %[" l1 "]\n\t" \
    "lea (%[" l1 "],%[t2]), %[t2]\n\t"     /* m1 */

/* l5:..:l0 into l0:l5:l4:l3:l2, l0 being a carry of 0 or 1 */
#define REDUCE_SIX(l0, l1, l2, l3, l4, l5) \
    REDUCE_FACTORS(l0, l1) \
    "adc %[t2], %[" l2 "]\n\t" \
    "shlx %%rdx, %[t2], %[t3]\n\t" \
    "adc $0, %[" l3 "]\n\t" \
    "adc %[" l0 "], %[" l4 "]\n\t" \
    "mov $0, %k[" l0 "]\n\t" \
    "adc %[t2], %[" l5 "]\n\t" \
    "shrx %%rdx, %[t2], %[t2]\n\t"         /* w2 */ \
    "adc $0, %[" l0 "]\n\t" \
    "lea (%[t1],%[t3]), %[t1]\n\t"         /* w1 */ \
    "sub %[t0], %[" l1 "]\n\t" \
    "lea (%[t0],%[t2]), %[t0]\n\t"         /* w0 + w2 */ \
    "sbb %[t1], %[" l2 "]\n\t" \
    "sbb %[t0], %[" l3 "]\n\t" \
    "sbb %[t1], %[" l4 "]\n\t" \
    "sbb %[t2], %[" l5 "]\n\t" \
    "sbb $0, %[" l0 "]\n\t"

/* l3:l2:l1:l0 into l1:l0:l3:l2; no carry: the result is below p + 2^128 < 2^256 */
#define REDUCE_FOUR(l0, l1, l2, l3) \
    REDUCE_FACTORS(l0, l1) \
    "adc %[t2], %[" l2 "]\n\t" \
    "shlx %%rdx, %[t2], %[t3]\n\t" \
    "adc $0, %[" l3 "]\n\t" \
    "shrx %%rdx, %[t2], %%rdx\n\t"         /* w2 */ \
    "adc $0, %[" l0 "]\n\t" \
    "adc $0, %[t2]\n\t" \
    "lea (%[t1],%[t3]), %[t1]\n\t" \
    "sub %[t0], %[" l1 "]\n\t" \
    "lea (%[t0],%%rdx), %[t0]\n\t" \
    "sbb %[t1], %[" l2 "]\n\t" \
    "sbb %[t0], %[" l3 "]\n\t" \
    "sbb %[t1], %[" l0 "]\n\t" \
    "sbb %%rdx, %[t2]\n\t" \
    "mov %[t2], %[" l1 "]\n\t"

/* l3:l2:l1:l0 = carry:l3:l2:l1:l0 mod p, once; `spare` is a register to overwrite */
#define REDUCE_ONCE(carry, l0, l1, l2, l3, spare) \
    "mov %[" l0 "], %[t0]\n\t" \
    "mov $0xffffffff00000000, %%rdx\n\t" \
    "mov %[" l1 "], %[t1]\n\t" \
    "mov $0xfffffffeffffffff, %[" spare "]\n\t" \
    "sub $-1, %[t0]\n\t" \
    "mov %[" l2 "], %[t2]\n\t" \
    "sbb %%rdx, %[t1]\n\t" \
    "mov %[" l3 "], %[t3]\n\t" \
    "sbb $-1, %[t2]\n\t" \
    "sbb %[" spare "], %[t3]\n\t" \
    "sbb $0, %[" carry "]\n\t" \
    "cmovnc %[t0], %[" l0 "]\n\t" \
    "cmovnc %[t1], %[" l1 "]\n\t" \
    "cmovnc %[t2], %[" l2 "]\n\t" \
    "cmovnc %[t3], %[" l3 "]\n\t"

/* x4:x3:x2:x1:x0 += a * the limb of b at `offset`: first the low halves, then the high ones. TOP takes t3, the highest, into x4. */
#define MULTIPLY_ROW(offset, x0, x1, x2, x3, TOP) \
    "mov " offset "(%[b]), %%rdx\n\t" \
    "mulx (%[a]), %[t3], %[t0]\n\t" \
    "add %[t3], %[" x0 "]\n\t" \
    "mulx 8(%[a]), %[t3], %[t1]\n\t" \
    "adc %[t3], %[" x1 "]\n\t" \
    "mulx 16(%[a]), %[t3], %[t2]\n\t" \
    "adc %[t3], %[" x2 "]\n\t" \
    "mulx 24(%[a]), %%rdx, %[t3]\n\t" \
    "adc %%rdx, %[" x3 "]\n\t" \
    "adc $0, %[t3]\n\t" \
    "add %[t0], %[" x1 "]\n\t" \
    "adc %[t1], %[" x2 "]\n\t" \
    "adc %[t2], %[" x3 "]\n\t" \
    TOP

static inline __attribute__((always_inline)) void field_multiply(uint64_t out[4], const uint64_t a[4], const uint64_t b[4])
{
    uint64_t r0, r1, r2, r3, r4, r5, t0, t1, t2, t3;
    __asm__ volatile("mov (%[b]), %%rdx\n\t"
            "mulx (%[a]), %[r0], %[r1]\n\t"
            "mulx 8(%[a]), %[t0], %[r2]\n\t"
            "mulx 16(%[a]), %[t1], %[r3]\n\t"
            "add %[t0], %[r1]\n\t"
            "mulx 24(%[a]), %[t0], %[r4]\n\t"
            "adc %[t1], %[r2]\n\t"
            "adc %[t0], %[r3]\n\t"
            "adc $0, %[r4]\n\t"
            MULTIPLY_ROW("8", "r1", "r2", "r3", "r4", "mov %[t3], %[r5]\n\tadc $0, %[r5]\n\t")
            REDUCE_SIX("r0", "r1", "r2", "r3", "r4", "r5")
            MULTIPLY_ROW("16", "r2", "r3", "r4", "r5", "adc %[t3], %[r0]\n\t")
            MULTIPLY_ROW("24", "r3", "r4", "r5", "r0", "mov %[t3], %[r1]\n\tadc $0, %[r1]\n\t")
            REDUCE_SIX("r2", "r3", "r4", "r5", "r0", "r1")
            REDUCE_ONCE("r2", "r4", "r5", "r0", "r1", "r3")
            : [r0] "=&r"(r0), [r1] "=&r"(r1), [r2] "=&r"(r2), [r3] "=&r"(r3), [r4] "=&r"(r4), [r5] "=&r"(r5), [t0] "=&r"(t0),
              [t1] "=&r"(t1), [t2] "=&r"(t2), [t3] "=&r"(t3)
            : [a] "r"(a), [b] "r"(b)
            : "rdx", "cc", "memory");
    out[0] = r4, out[1] = r5, out[2] = r0, out[3] = r1;
}

/* a3:a2:a1:a0 = their square: 2 (products of different limbs) + squares, the doubling and the squares on two carry chains. In registers, so that
 * chains of squarings never wait for memory. a2 and a3 live in t2 and t3, which are free once they are squared. */
#define SQUARE(a0, a1, a2, a3) \
    __asm__("mov %[x0], %%rdx\n\t" \
            "mulx %[x1], %[r1], %[r2]\n\t" \
            "mulx %[t2], %[t0], %[r3]\n\t" \
            "mulx %[t3], %[t1], %[r4]\n\t" \
            "add %[t0], %[r2]\n\t" \
            "adc %[t1], %[r3]\n\t" \
            "adc $0, %[r4]\n\t" \
            "mov %[x1], %%rdx\n\t" \
            "mulx %[t2], %[t0], %[t1]\n\t" \
            "mulx %[t3], %%rdx, %[r5]\n\t" \
            "add %[t0], %[r3]\n\t" \
            "adc %%rdx, %[r4]\n\t" \
            "mov %[t2], %%rdx\n\t" \
            "adc $0, %[r5]\n\t" \
            "mulx %[t3], %[t0], %[r6]\n\t" \
            "mov %[x0], %%rdx\n\t" \
            "add %[t1], %[r4]\n\t" \
            "adc %[t0], %[r5]\n\t" \
            "adc $0, %[r6]\n\t" \
            "mulx %[x0], %[x0], %[t1]\n\t" \
            "mov %[x1], %%rdx\n\t" \
            "xor %k[x1], %k[x1]\n\t" \
            "adcx %[r1], %[r1]\n\t" \
            "adox %[t1], %[r1]\n\t" \
            "mulx %%rdx, %[t0], %[t1]\n\t" \
            "mov %[t2], %%rdx\n\t" \
            "adcx %[r2], %[r2]\n\t" \
            "adox %[t0], %[r2]\n\t" \
            "adcx %[r3], %[r3]\n\t" \
            "adox %[t1], %[r3]\n\t" \
            "mulx %%rdx, %[t0], %[t1]\n\t" \
            "mov %[t3], %%rdx\n\t" \
            "adcx %[r4], %[r4]\n\t" \
            "adox %[t0], %[r4]\n\t" \
            "adcx %[r5], %[r5]\n\t" \
            "adox %[t1], %[r5]\n\t" \
            "mulx %%rdx, %[t0], %[t1]\n\t" \
            "adcx %[r6], %[r6]\n\t" \
            "adox %[t0], %[r6]\n\t" \
            "adcx %[x1], %[x1]\n\t" \
            "adox %[t1], %[x1]\n\t" \
            REDUCE_FOUR("x0", "r1", "r2", "r3") \
            REDUCE_FOUR("r2", "r3", "x0", "r1") \
            "xor %k[t0], %k[t0]\n\t" \
            "add %[x0], %[r4]\n\t" \
            "adc %[r1], %[r5]\n\t" \
            "adc %[r2], %[r6]\n\t" \
            "adc %[r3], %[x1]\n\t" \
            "adc $0, %[t0]\n\t" \
            "mov %[t0], %[r1]\n\t" \
            REDUCE_ONCE("r1", "r4", "r5", "r6", "x1", "r2") \
            : [x0] "+&r"(a0), [x1] "+&r"(a1), [t2] "+&r"(a2), [t3] "+&r"(a3), [r1] "=&r"(r1), [r2] "=&r"(r2), [r3] "=&r"(r3), \
              [r4] "=&r"(r4), [r5] "=&r"(r5), [r6] "=&r"(r6), [t0] "=&r"(t0), [t1] "=&r"(t1) \
            : \
            : "rdx", "cc")

static inline __attribute__((always_inline)) void field_square(uint64_t out[4], const uint64_t a[4])
{
    uint64_t a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3], r1, r2, r3, r4, r5, r6, t0, t1;
    SQUARE(a0, a1, a2, a3);
    out[0] = r4, out[1] = r5, out[2] = r6, out[3] = a1;
}

static inline void field_square_times(uint64_t out[4], const uint64_t a[4], int times)
{
    uint64_t a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3], r1, r2, r3, r4, r5, r6, t0, t1;
    do {
        SQUARE(a0, a1, a2, a3);
        a3 = a1;
        a0 = r4, a1 = r5, a2 = r6;
    } while (--times);
    out[0] = a0, out[1] = a1, out[2] = a2, out[3] = a3;
}

static inline __attribute__((always_inline)) void field_add(uint64_t out[4], const uint64_t a[4], const uint64_t b[4])
{
    uint64_t r0 = a[0], r1 = a[1], r2 = a[2], r3 = a[3], t0, t1, t2, t3, carry;
    __asm__ volatile("xor %k[carry], %k[carry]\n\t"
            "add (%[b]), %[r0]\n\t"
            "adc 8(%[b]), %[r1]\n\t"
            "adc 16(%[b]), %[r2]\n\t"
            "adc 24(%[b]), %[r3]\n\t"
            "mov %[r0], %[t0]\n\t"
            "adc $0, %[carry]\n\t"
            "mov %[r1], %[t1]\n\t"
            "sub $-1, %[t0]\n\t"
            "mov %[r2], %[t2]\n\t"
            "sbb %[p1], %[t1]\n\t"
            "mov %[r3], %[t3]\n\t"
            "sbb $-1, %[t2]\n\t"
            "sbb %[p3], %[t3]\n\t"
            "sbb $0, %[carry]\n\t"
            "cmovnc %[t0], %[r0]\n\t"
            "cmovnc %[t1], %[r1]\n\t"
            "cmovnc %[t2], %[r2]\n\t"
            "cmovnc %[t3], %[r3]\n\t"
            : [r0] "+&r"(r0), [r1] "+&r"(r1), [r2] "+&r"(r2), [r3] "+&r"(r3), [t0] "=&r"(t0), [t1] "=&r"(t1), [t2] "=&r"(t2),
              [t3] "=&r"(t3), [carry] "=&r"(carry)
            : [b] "r"(b), [p1] "r"(csvf__sm2_p[1]), [p3] "r"(csvf__sm2_p[3])
            : "cc", "memory");
    out[0] = r0, out[1] = r1, out[2] = r2, out[3] = r3;
}

/* p masked by m = -1 or 0 is (m, m << 32, m, m + (m << 32)), here and in field_halve. */
static inline __attribute__((always_inline)) void field_subtract(uint64_t out[4], const uint64_t a[4], const uint64_t b[4])
{
    uint64_t r0 = a[0], r1 = a[1], r2 = a[2], r3 = a[3], borrow, t1, t3;
    __asm__ volatile("sub (%[b]), %[r0]\n\t"
            "sbb 8(%[b]), %[r1]\n\t"
            "sbb 16(%[b]), %[r2]\n\t"
            "sbb 24(%[b]), %[r3]\n\t"
            "sbb %[borrow], %[borrow]\n\t"
            "mov %[borrow], %[t1]\n\t"
            "shl $32, %[t1]\n\t"
            "lea (%[borrow],%[t1]), %[t3]\n\t"
            "add %[borrow], %[r0]\n\t"
            "adc %[t1], %[r1]\n\t"
            "adc %[borrow], %[r2]\n\t"
            "adc %[t3], %[r3]\n\t"
            : [r0] "+&r"(r0), [r1] "+&r"(r1), [r2] "+&r"(r2), [r3] "+&r"(r3), [borrow] "=&r"(borrow), [t1] "=&r"(t1), [t3] "=&r"(t3)
            : [b] "r"(b)
            : "cc", "memory");
    out[0] = r0, out[1] = r1, out[2] = r2, out[3] = r3;
}

/* (a + (a odd ? p : 0)) / 2. Scalar throughout: vector loads of limbs just stored would wait for the stores. */
static inline __attribute__((always_inline)) void field_halve(uint64_t out[4], const uint64_t a[4])
{
    uint64_t r0 = a[0], r1 = a[1], r2 = a[2], r3 = a[3], odd, t1, t3;
    __asm__("mov %k[r0], %k[odd]\n\t"
            "and $1, %k[odd]\n\t"
            "neg %[odd]\n\t"
            "mov %[odd], %[t1]\n\t"
            "shl $32, %[t1]\n\t"
            "lea (%[odd],%[t1]), %[t3]\n\t"
            "add %[odd], %[r0]\n\t"
            "adc %[t1], %[r1]\n\t"
            "adc %[odd], %[r2]\n\t"
            "adc %[t3], %[r3]\n\t"
            "rcr $1, %[r3]\n\t"
            "rcr $1, %[r2]\n\t"
            "rcr $1, %[r1]\n\t"
            "rcr $1, %[r0]\n\t"
            : [r0] "+&r"(r0), [r1] "+&r"(r1), [r2] "+&r"(r2), [r3] "+&r"(r3), [odd] "=&r"(odd), [t1] "=&r"(t1), [t3] "=&r"(t3)
            :
            : "cc");
    out[0] = r0, out[1] = r1, out[2] = r2, out[3] = r3;
}

/* out = table[index - 1], or zeros for index 0: every entry is read. Entries of 8 or 12 limbs. */
static inline void table_select(uint64_t *out, const uint64_t *table, size_t words, size_t count, uint64_t index)
{
    const __m256i wanted = _mm256_set1_epi64x((long long)index), one = _mm256_set1_epi64x(1);
    __m256i at = one, sum0 = _mm256_setzero_si256(), sum1 = sum0, sum2 = sum0;
    for (size_t i = 0; i < count; i++) {
        const __m256i *entry = (const __m256i *)(const void *)(table + words * i), mask = _mm256_cmpeq_epi64(at, wanted);
        sum0 = _mm256_or_si256(sum0, _mm256_and_si256(mask, _mm256_loadu_si256(entry)));
        sum1 = _mm256_or_si256(sum1, _mm256_and_si256(mask, _mm256_loadu_si256(entry + 1)));
        if (words == 12)
            sum2 = _mm256_or_si256(sum2, _mm256_and_si256(mask, _mm256_loadu_si256(entry + 2)));
        at = _mm256_add_epi64(at, one);
    }
    _mm256_storeu_si256((__m256i *)(void *)out, sum0);
    _mm256_storeu_si256((__m256i *)(void *)(out + 4), sum1);
    if (words == 12)
        _mm256_storeu_si256((__m256i *)(void *)(out + 8), sum2);
}

#endif
