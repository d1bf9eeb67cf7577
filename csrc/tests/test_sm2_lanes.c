/* The arithmetic under the eight-lane SM2 kernel at its limits: limbs of all ones and all zeros, junk above the limbs, values as large as its
 * comments allow, against sums and doublings mod p one at a time. */
#define _GNU_SOURCE 1
#if defined(__x86_64__)
#define csvf__sm2_many_ifma tested_ifma
#include "../sm2/sm2_many_ifma.c"
#endif

#include "test.h"

#include "../include/csvfast.h"
#include "../sm2/sm2_kernel.h"
#include "../sm2/sm2_number.h"

#if defined(__x86_64__)
#include "../target_begin.h"

enum { ROUNDS = 400 };

typedef struct limbs {
    int64_t of[SM2_LIMBS][SM2_LANES];
} limbs;

static limbs limbs_of(lanes_number a)
{
    limbs out;
    _Static_assert(sizeof out == sizeof a, "limbs by lanes");
    memcpy(&out, &a, sizeof out);
    return out;
}

static lanes_number number_of(const limbs *a)
{
    lanes_number out;
    memcpy(&out, a, sizeof out);
    return out;
}

/* Sum of signed limbs 2^(52 i) mod p, slowly. */
static void residue(uint64_t out[4], const int64_t *limb, size_t count, size_t stride)
{
    memset(out, 0, 32);
    for (size_t i = count; i-- > 0;) {
        const int64_t value = limb[i * stride];
        const uint64_t magnitude[4] = {value < 0 ? 0 - (uint64_t)value : (uint64_t)value, 0, 0, 0};
        for (int bit = 0; bit < 52; bit++)
            number_add_modulo(out, out, out, csvf__sm2_p);
        if (value < 0)
            number_subtract_modulo(out, out, magnitude, csvf__sm2_p);
        else
            number_add_modulo(out, out, magnitude, csvf__sm2_p);
    }
}

static void lane_residue(uint64_t out[4], const limbs *a, int lane) { residue(out, &a->of[0][lane], SM2_LIMBS, SM2_LANES); }

/* A number below 2^bits_of_top + 208, its limbs often at an end of their range. */
static limbs make_limbs(uint64_t *seed, unsigned bits_of_top)
{
    limbs out;
    for (int i = 0; i < SM2_LIMBS; i++)
        for (int lane = 0; lane < SM2_LANES; lane++) {
            const int64_t most = (INT64_C(1) << (i == 4 ? bits_of_top : 52)) - 1;
            const uint64_t x = test_random(seed);
            switch (x % 6) {
            case 0: out.of[i][lane] = 0; break;
            case 1: out.of[i][lane] = most; break;
            case 2: out.of[i][lane] = most - 1; break;
            case 3: out.of[i][lane] = 1; break;
            default: out.of[i][lane] = (int64_t)(x >> 8) & most;
            }
        }
    return out;
}

/* Bits that multiplication must not see. */
static lanes_number with_junk(limbs a, uint64_t *seed)
{
    for (int i = 0; i < SM2_LIMBS; i++)
        for (int lane = 0; lane < SM2_LANES; lane++)
            a.of[i][lane] |= (int64_t)(test_random(seed) << 52);
    return number_of(&a);
}

/* 2^260 got = a b + c d (mod p) in every lane; signs of the second product by `sign`. */
static void check_product(lanes_number got, const limbs *a, const limbs *b, const limbs *c, const limbs *d, int64_t sign)
{
    const limbs result = limbs_of(got);
    for (int lane = 0; lane < SM2_LANES; lane++) {
        uint64_t x[4], y[4], want[4], have[4];
        lane_residue(x, a, lane);
        lane_residue(y, b, lane);
        csvf__sm2_portable.field_multiply(want, x, y);     /* a b / 2^256 */
        if (c) {
            lane_residue(x, c, lane);
            lane_residue(y, d, lane);
            csvf__sm2_portable.field_multiply(x, x, y);
            for (int64_t n = 0; n < (sign < 0 ? -sign : sign); n++)
                (sign < 0 ? number_subtract_modulo : number_add_modulo)(want, want, x, csvf__sm2_p);
        }
        lane_residue(have, &result, lane);
        for (int i = 0; i < 4; i++)
            number_add_modulo(have, have, have, csvf__sm2_p);
        CHECK_BYTES(have, want, 32);
        for (int i = 0; i < SM2_LIMBS; i++)     /* what later sums count on */
            CHECK(result.of[i][lane] < INT64_C(1) << 57 && result.of[i][lane] > -(INT64_C(1) << 59));
    }
}

static void products(void)
{
    uint64_t seed = 1;
    for (int round = 0; round < ROUNDS; round++) {
        const limbs a = make_limbs(&seed, 52), b = make_limbs(&seed, 52), c = make_limbs(&seed, 52), d = make_limbs(&seed, 52);
        const lanes_number x = with_junk(a, &seed), y = with_junk(b, &seed), z = with_junk(c, &seed), u = with_junk(d, &seed);
        check_product(lanes_multiply(x, y), &a, &b, NULL, NULL, 0);
        check_product(lanes_square(x), &a, &a, NULL, NULL, 0);
        check_product(lanes_multiply_two(x, y, z, u), &a, &b, &c, &d, 1);
        check_product(lanes_reduce_with_product(lanes_wide_times_minus_8(lanes_square_wide(z)), x, y), &a, &b, &c, &c, -8);
    }
}

static int is_strict(const limbs *a, int lane, int64_t top_end)
{
    for (int i = 0; i < SM2_LIMBS; i++)
        if (a->of[i][lane] < 0 || a->of[i][lane] >= (i == 4 ? top_end : INT64_C(1) << 52))
            return 0;
    return 1;
}

static void carries_and_folds(void)
{
    uint64_t seed = 2;
    for (int round = 0; round < ROUNDS; round++) {
        limbs a = make_limbs(&seed, 54);
        for (int lane = 0; lane < SM2_LANES; lane++)
            if (test_random(&seed) % 3 == 0)    /* just above a multiple of 2^256, or below it when the other limbs owe */
                a.of[4][lane] = (a.of[4][lane] >> 48 << 48) + (int64_t)(test_random(&seed) % 300);
        for (int lane = 0; lane < SM2_LANES; lane++)
            for (int i = 0; i < 4; i++) {       /* up to 2^58 in size, of either sign */
                if (test_random(&seed) % 2)
                    a.of[i][lane] <<= 6;
                if (a.of[4][lane] > 1 << 8 && test_random(&seed) % 2)
                    a.of[i][lane] = -a.of[i][lane];
            }
        const limbs folded = limbs_of(lanes_fold(number_of(&a))), strict = limbs_of(lanes_strict(number_of(&a)));
        const limbs ready = limbs_of(lanes_ready(number_of(&a)));
        for (int lane = 0; lane < SM2_LANES; lane++) {
            uint64_t want[4], have[4];
            lane_residue(want, &a, lane);
            lane_residue(have, &folded, lane);
            CHECK_BYTES(have, want, 32);
            CHECK(is_strict(&folded, lane, (INT64_C(1) << 48) + (INT64_C(1) << 22)));     /* below (1 + 2^-26) 2^256 */
            lane_residue(have, &strict, lane);
            CHECK_BYTES(have, want, 32);
            CHECK(is_strict(&strict, lane, (INT64_C(1) << 54) + 128));
            for (int i = 0; i < 4; i++)
                CHECK((ready.of[i][lane] & LIMB_MASK) == strict.of[i][lane]);
        }
    }
}

static void sums(void)
{
    uint64_t seed = 3;
    for (int round = 0; round < ROUNDS; round++) {
        const limbs a = make_limbs(&seed, 52), b = make_limbs(&seed, 52);
        const lanes_number x = number_of(&a), y = number_of(&b);
        const __mmask8 which = (__mmask8)test_random(&seed);
        const limbs sum = limbs_of(lanes_add(x, y)), difference = limbs_of(lanes_subtract(x, y)), more = limbs_of(lanes_plus_p(x, 9));
        const limbs negated = limbs_of(lanes_negate_some(x, which)), chosen = limbs_of(lanes_choose(which, x, y));
        const limbs shifted = limbs_of(lanes_shift(x, 3));
        for (int lane = 0; lane < SM2_LANES; lane++) {
            uint64_t p[4], q[4], want[4], have[4];
            static const uint64_t zero[4];
            lane_residue(p, &a, lane);
            lane_residue(q, &b, lane);
            number_add_modulo(want, p, q, csvf__sm2_p);
            lane_residue(have, &sum, lane);
            CHECK_BYTES(have, want, 32);
            number_subtract_modulo(want, p, q, csvf__sm2_p);
            lane_residue(have, &difference, lane);
            CHECK_BYTES(have, want, 32);
            lane_residue(have, &more, lane);
            CHECK_BYTES(have, p, 32);
            number_subtract_modulo(want, zero, p, csvf__sm2_p);
            lane_residue(have, &negated, lane);
            CHECK_BYTES(have, which >> lane & 1 ? want : p, 32);
            lane_residue(have, &chosen, lane);
            CHECK_BYTES(have, which >> lane & 1 ? q : p, 32);
            lane_residue(have, &shifted, lane);
            for (int i = 0; i < 3; i++)
                number_add_modulo(p, p, p, csvf__sm2_p);
            CHECK_BYTES(have, p, 32);
        }
    }
}

static void multiples_of_p_are_zero(void)
{
    for (int64_t k = 0; k < 16; k++) {
        const lanes_number multiple = lanes_plus_p(lanes_zero(), k);
        limbs one = {{{0}}};
        for (int lane = 0; lane < SM2_LANES; lane += 3)
            one.of[lane % SM2_LIMBS][lane] = 1;     /* lanes 0, 3, 6 are not zero */
        test_case("%d p", (int)k);
        CHECK(lanes_are_zero(lanes_ready(multiple)) == 0xff);
        CHECK(lanes_are_zero(lanes_ready(lanes_add(multiple, number_of(&one)))) == (0xff & ~0x49));
    }
}

static void words_and_tables(void)
{
    uint64_t seed = 4;
    for (int round = 0; round < ROUNDS; round++) {
        csvf_sm2_affine points[SM2_LANES];
        const csvf_sm2_affine *pointers[SM2_LANES];
        uint64_t numbers[SM2_LANES][4], rows[SM2_LANES][MULTIPLE_WORDS];
        const uint64_t *fetched_rows[SM2_LANES];
        for (int lane = 0; lane < SM2_LANES; lane++) {
            pointers[lane] = &points[lane];
            for (int i = 0; i < 4; i++) {
                points[lane].x[i] = test_random(&seed) | (0 - (uint64_t)(test_random(&seed) % 3 == 0));
                points[lane].y[i] = test_random(&seed) & (0 - (uint64_t)(test_random(&seed) % 3 != 0));
                numbers[lane][i] = points[lane].x[i];
            }
            fetched_rows[lane] = rows[lane];
        }
        const lanes_affine fetched = lanes_fetch_affine(pointers);
        const limbs x = limbs_of(lanes_trim(fetched.x)), y = limbs_of(lanes_trim(fetched.y));
        const limbs plain = limbs_of(lanes_trim(load_numbers((const uint64_t (*)[4])numbers)));
        for (int lane = 0; lane < SM2_LANES; lane++) {
            const uint64_t *const words[3] = {points[lane].x, points[lane].y, points[lane].x};
            const limbs *const got[3] = {&x, &y, &plain};
            for (int n = 0; n < 3; n++) {
                uint64_t want[4], have[4];
                number_reduce_once(want, 0, words[n], csvf__sm2_p);
                for (int i = 0; i < 4 && n < 2; i++)
                    number_add_modulo(want, want, want, csvf__sm2_p);      /* times 16 */
                lane_residue(have, got[n], lane);
                CHECK_BYTES(have, want, 32);
                CHECK(is_strict(got[n], lane, INT64_C(1) << 52));
            }
        }
        lanes_multiple stored, again;
        test_fill(&stored, sizeof stored, (uint64_t)round + 99);
        lanes_store_multiple(rows, &stored);
        again = lanes_fetch_multiple(fetched_rows);
        CHECK_BYTES(&again, &stored, sizeof stored);
    }
}

/* Digits make up the scalar again, and stay within the tables. */
static void digits_of_scalars(void)
{
    static const unsigned geometry[3][3] = {{CSVF_SM2_BASE_BITS, CSVF_SM2_BASE_WINDOWS, CSVF_SM2_BASE_ENTRIES},
                                            {CSVF_SM2_KEY_BITS, CSVF_SM2_KEY_WINDOWS, CSVF_SM2_KEY_ENTRIES}, {BITS, WINDOWS, ENTRIES}};
    uint64_t seed = 5;
    for (int round = 0; round < ROUNDS; round++) {
        uint64_t scalars[SM2_LANES][4];
        for (int lane = 0; lane < SM2_LANES; lane++)
            for (int i = 0; i < 4; i++) {
                const uint64_t x = test_random(&seed);
                scalars[lane][i] = x % 4 == 0 ? 0 : x % 4 == 1 ? UINT64_MAX : test_random(&seed);
            }
        for (int g = 0; g < 3; g++) {
            lanes_digit digits[WINDOWS];
            recode(digits, (const uint64_t (*)[4])scalars, geometry[g][0], geometry[g][1]);
            for (int lane = 0; lane < SM2_LANES; lane++) {
                uint64_t sum[5] = {0};      /* mod 2^320 */
                for (unsigned w = geometry[g][1]; w-- > 0;) {
                    const int used = digits[w].used >> lane & 1;
                    int64_t digit = used ? digits[w].index[lane] + 1 : 0;
                    CHECK(digits[w].index[lane] < geometry[g][2]);
                    if (digits[w].negative >> lane & 1)
                        digit = -digit;
                    for (int i = 4; i >= 0; i--)
                        sum[i] = sum[i] << geometry[g][0] | (i ? sum[i - 1] >> (64 - geometry[g][0]) : 0);
                    csvf__u128 carry = 0;
                    for (int i = 0; i < 5; i++) {
                        carry += (csvf__u128)sum[i] + (uint64_t)(i ? digit >> 63 : digit);
                        sum[i] = (uint64_t)carry;
                        carry >>= 64;
                    }
                }
                CHECK_BYTES(sum, scalars[lane], 32);
                CHECK(sum[4] == 0);
            }
        }
    }
}

#include "../target_end.h"

int main(void)
{
    if (!csvf_kernel_available(CSVF_PRIMITIVE_SM2_MANY, "ifma-avx512")) {
        printf("skipped: this CPU has no AVX-512 IFMA\n0 passed, 0 failed\n");
        return 0;
    }
    RUN(products);
    RUN(carries_and_folds);
    RUN(sums);
    RUN(multiples_of_p_are_zero);
    RUN(words_and_tables);
    RUN(digits_of_scalars);
    return test_report();
}
#else
int main(void)
{
    printf("skipped: no x86-64\n0 passed, 0 failed\n");
    return 0;
}
#endif
