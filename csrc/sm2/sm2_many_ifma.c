/* Eight SM2 verifications side by side with AVX-512 IFMA. Variable time: everything here is public. PURE.
 *
 * Every lane computes the sum of digit times table entry over signed windows of its scalars: t P from the key's table (43 additions) or, for a
 * key without one, from 16 multiples computed here (52 additions between 255 doublings); then s G from the base table (37 additions).
 * No inversion: r - e = x mod n is asked as X = x Z^2 mod p. A lane whose sum met an exceptional addition has Z = 0
 * (sm2_many_ifma_points.h); so has one whose sum is infinity. Both are rare unless somebody makes them on purpose, and are decided
 * by the kernel for single signatures. */
#if defined(__x86_64__)
#define CSVF_TARGET_AVX512_IFMA
#include "../target_begin.h"

#include "../cpu.h"
#include "sm2_many_ifma_points.h"
#include "sm2_number.h"

enum { BITS = 5, WINDOWS = 52, ENTRIES = 16 };   /* for keys without a table */

/* One signed digit of every lane's scalar, in -2^(bits - 1) .. 2^(bits - 1). */
typedef struct lanes_digit {
    uint8_t index[SM2_LANES];        /* size of the digit less 1; 0 for the digit 0 */
    __mmask8 negative, used;         /* used: the digit is not 0 */
} lanes_digit;

_Static_assert((int)WINDOWS >= (int)CSVF_SM2_KEY_WINDOWS && (int)WINDOWS >= (int)CSVF_SM2_BASE_WINDOWS, "room for every geometry");

/* words[j] = word j of every lane's number */
static void load_words(__m512i words[4], const uint64_t numbers[SM2_LANES][4])
{
    const uint64_t *rows[SM2_LANES];
    for (unsigned lane = 0; lane < SM2_LANES; lane++)
        rows[lane] = numbers[lane];
    transpose_four_words(words, rows, 0);
}

/* Booth's digits: each comes from its bits and the one below, v, as (v + 1) / 2, less 2^bits for those that begin with a 1. */
static void recode(lanes_digit digits[WINDOWS], const uint64_t scalars[SM2_LANES][4], unsigned bits, unsigned windows)
{
    __m512i twice[6], words[4];      /* twice the scalar: the bit below the first one is 0 */
    load_words(words, scalars);
    twice[0] = _mm512_slli_epi64(words[0], 1);
    for (unsigned i = 1; i < 4; i++)
        twice[i] = _mm512_or_si512(_mm512_slli_epi64(words[i], 1), _mm512_srli_epi64(words[i - 1], 63));
    twice[4] = _mm512_srli_epi64(words[3], 63);
    twice[5] = WORD(0);
    const __m512i mask = WORD((2u << bits) - 1), top = WORD(1u << bits), one = WORD(1);
    for (unsigned w = 0; w < windows; w++) {
        const unsigned at = w * bits;
        const __m128i down = _mm_cvtsi32_si128((int)(at % 64)), up = _mm_cvtsi32_si128((int)(64 - at % 64));   /* a shift by 64 gives 0 */
        const __m512i value = _mm512_or_si512(_mm512_srl_epi64(twice[at / 64], down), _mm512_sll_epi64(twice[at / 64 + 1], up));
        const __mmask8 negative = _mm512_test_epi64_mask(value, top);
        const __m512i size = _mm512_and_si512(_mm512_mask_xor_epi64(value, negative, value, mask), mask);
        const __m512i digit = _mm512_srli_epi64(ADD(size, one), 1);
        const __mmask8 used = _mm512_test_epi64_mask(digit, digit);
        _mm_storel_epi64((void *)digits[w].index, _mm512_maskz_cvtepi64_epi8(used, SUB(digit, one)));
        digits[w].negative = negative;
        digits[w].used = used;
    }
}

typedef struct lanes_sum {
    lanes_point point;
    __mmask8 infinite;      /* lanes whose sum is still empty */
} lanes_sum;

/* sum += digits * tables, windows of `entries` affine points each; no doublings. */
static void add_windows(lanes_sum *sum, const csvf_sm2_affine *const tables[SM2_LANES], const lanes_digit *digits, unsigned windows,
                        unsigned entries)
{
    const csvf_sm2_affine *points[SM2_LANES], *next[SM2_LANES];
    for (unsigned lane = 0; lane < SM2_LANES; lane++)
        next[lane] = tables[lane] + digits[0].index[lane];
    for (unsigned w = 0; w < windows; w++) {
        for (unsigned lane = 0; lane < SM2_LANES; lane++) {
            points[lane] = next[lane];
            if (w + 1 < windows) {
                next[lane] = tables[lane] + (w + 1) * entries + digits[w + 1].index[lane];
                _mm_prefetch((const char *)next[lane], _MM_HINT_T0);
                _mm_prefetch((const char *)next[lane] + 63, _MM_HINT_T0);
            }
        }
        const lanes_affine fetched = lanes_fetch_affine(points);
        lanes_add_affine(&sum->point, &sum->infinite, &fetched, digits[w].negative, digits[w].used);
    }
}

/* sum = digits * points. Even multiples by doubling, odd ones by one more addition of the point: as 16 < n, none is exceptional. */
static void multiply_points(lanes_sum *sum, const csvf_sm2_affine *const points[SM2_LANES], const lanes_digit *digits)
{
    uint64_t table[ENTRIES][SM2_LANES][MULTIPLE_WORDS];
    lanes_point multiples[ENTRIES];
    const lanes_affine point = lanes_fetch_affine(points);
    __mmask8 infinite = 0xff;
    multiples[0] = lanes_no_point();
    lanes_add_affine(&multiples[0], &infinite, &point, 0, 0xff);
    for (unsigned i = 0; i < ENTRIES; i++) {
        if (i % 2) {
            multiples[i] = multiples[i / 2];
            lanes_double(&multiples[i]);
        } else if (i) {
            multiples[i] = multiples[i - 1];
            lanes_add_affine(&multiples[i], &infinite, &point, 0, 0xff);
        }
        const lanes_multiple multiple = {multiples[i], lanes_ready(lanes_multiply(multiples[i].z, multiples[i].zz))};
        lanes_store_multiple(table[i], &multiple);
    }
    for (unsigned w = WINDOWS; w--;) {
        if (w != WINDOWS - 1)
            for (unsigned i = 0; i < BITS; i++)
                lanes_double(&sum->point);
        const uint64_t *rows[SM2_LANES];
        for (unsigned lane = 0; lane < SM2_LANES; lane++)
            rows[lane] = table[digits[w].index[lane]][lane];
        const lanes_multiple fetched = lanes_fetch_multiple(rows);
        lanes_add_multiple(&sum->point, &sum->infinite, &fetched, digits[w].negative, digits[w].used);
    }
}

static lanes_number load_numbers(const uint64_t numbers[SM2_LANES][4])
{
    __m512i words[4];
    load_words(words, numbers);
    return lanes_from_words(words[0], words[1], words[2], words[3]);
}

/* Lanes whose affine x is the given number below p. */
static __mmask8 have_x(const lanes_point *point, const uint64_t x[SM2_LANES][4])
{
    const lanes_number wanted = lanes_ready(lanes_multiply(load_numbers(x), lanes_constant(montgomery_square)));   /* < 1.1 p */
    const lanes_number product = lanes_multiply(wanted, point->zz);                                                /* < 1.1 p */
    return lanes_are_zero(lanes_ready(lanes_plus_p(lanes_subtract(point->x, product), 2)));
}

/* The field has more elements than the group: a number below p - n may stand for itself plus n too. Returns whether it may. */
static unsigned second_candidate(uint64_t second[4], const uint64_t x[4])
{
    static const uint64_t p_less_n[4] = {0xac440bf6c62abedc, 0x8dfc2093de39fad5, 0, 0};
    return !number_is_below(x, p_less_n) ? 0 : (number_add(second, x, csvf__sm2_n), 1);
}

/* The stack holds 50 KiB. */
static void verify_var(uint8_t *valid, const csvf_sm2_job *const *jobs, size_t count)
{
    const csvf_sm2_affine *points[SM2_LANES], *tables[SM2_LANES], *base[SM2_LANES];
    uint64_t s_words[SM2_LANES][4], t_words[SM2_LANES][4], x[SM2_LANES][4], second[SM2_LANES][4] = {{0}};
    const int with_table = jobs[0]->table != NULL;
    __mmask8 has_second = 0;
    lanes_digit s[WINDOWS], t[WINDOWS];
    for (unsigned lane = 0; lane < SM2_LANES; lane++) {
        const csvf_sm2_job *job = jobs[lane < count ? lane : 0];        /* idle lanes repeat the first job */
        points[lane] = job->point;
        tables[lane] = with_table ? job->table->entries : NULL;
        base[lane] = csvf__sm2_base_table;
        memcpy(s_words[lane], job->s, sizeof job->s);
        memcpy(t_words[lane], job->t, sizeof job->t);
        memcpy(x[lane], job->x_mod_n, sizeof job->x_mod_n);
        has_second |= (__mmask8)(second_candidate(second[lane], job->x_mod_n) << lane);
    }
    recode(s, (const uint64_t (*)[4])s_words, CSVF_SM2_BASE_BITS, CSVF_SM2_BASE_WINDOWS);
    recode(t, (const uint64_t (*)[4])t_words, with_table ? CSVF_SM2_KEY_BITS : BITS, with_table ? CSVF_SM2_KEY_WINDOWS : WINDOWS);
    lanes_sum sum = {lanes_no_point(), 0xff};
    if (with_table)
        add_windows(&sum, tables, t, CSVF_SM2_KEY_WINDOWS, CSVF_SM2_KEY_ENTRIES);
    else
        multiply_points(&sum, points, t);
    add_windows(&sum, base, s, CSVF_SM2_BASE_WINDOWS, CSVF_SM2_BASE_ENTRIES);

    __mmask8 equal = have_x(&sum.point, x);
    if (has_second)
        equal |= have_x(&sum.point, second) & has_second;
    const __mmask8 exceptional = lanes_are_zero(sum.point.z);
    for (unsigned lane = 0; lane < count; lane++) {
        const csvf_sm2_job *job = jobs[lane];
        valid[lane] = exceptional >> lane & 1
                          ? (uint8_t)(csvf__sm2()->verify_var(job->s, job->t, job->point, job->table, job->x_mod_n) != 0)
                          : equal >> lane & 1;
    }
}

const csvf_sm2_many_kernel csvf__sm2_many_ifma = {"ifma-avx512", CSVF_CPU_AVX512 | CSVF_CPU_IFMA | CSVF_CPU_AVX2 | CSVF_CPU_BMI2, SM2_LANES, 2, 2,
                                                  verify_var};

#include "../target_end.h"
#endif
