/* The arithmetic under the SM2 kernels at its limits, against plain integers: limbs of all ones and all zeros, the numbers next to 0, p and 2^256 - p, and
 * products made to come out there, where carries run the longest and the last subtraction of p decides. The including test brings one
 * kernel's source along, whose functions are static. */
#ifndef CSVF_TESTS_SM2_FIELD_CASES_H
#define CSVF_TESTS_SM2_FIELD_CASES_H

#include "reference_sm2.h"
#include "test.h"

#include "../sm2/sm2_kernel.h"

static ref_number edges[200];
static size_t edge_count;

static void add_edge(ref_number a, ref_number m)
{
    while (ref_compare(a, m) >= 0)
        a = ref_minus(a, m);
    edges[edge_count++] = a;
}

static void prepare_edges(ref_number m)
{
    static const uint64_t words[] = {0, 1, UINT64_MAX, 0xffffffff, 0xffffffff00000000, 0x8000000000000000};
    const ref_number gap = ref_minus(ref_small(0), m);     /* 2^256 - m */
    edge_count = 0;
    for (uint64_t i = 0; i < 5; i++) {
        add_edge(ref_small(i), m);
        add_edge(ref_minus(m, ref_small(i + 1)), m);
        add_edge(ref_minus(gap, ref_small(i)), m);
        add_edge(ref_plus(gap, ref_small(i + 1), m), m);
        add_edge(ref_minus(m, ref_minus(gap, ref_small(i))), m);
    }
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        for (int j = 0; j < 4; j++) {
            ref_number one = {{0}}, others = {{words[i], words[i], words[i], words[i]}};
            one.v[j] = words[i];
            others.v[j] = ~words[i];
            add_edge(one, m);
            add_edge(others, m);
        }
}

/* Each limb at an end of its range, or any. */
static ref_number bent_number(uint64_t *state, ref_number m)
{
    ref_number out;
    do
        for (int i = 0; i < 4; i++) {
            const uint64_t x = test_random(state), y = test_random(state);
            out.v[i] = x % 5 == 0 ? 0 : x % 5 == 1 ? UINT64_MAX : x % 5 == 2 ? y >> (x >> 8) % 64 : x % 5 == 3 ? ~(y >> (x >> 8) % 64) : y;
        }
    while (ref_compare(out, m) >= 0);
    return out;
}

static void check_pair(ref_number a, ref_number b)
{
    const ref_number r = ref_minus(ref_small(0), REF_P);     /* 2^256 mod p */
    ref_number got, again;
    field_multiply(got.v, a.v, b.v);
    CHECK(ref_compare(got, REF_P) < 0 && !ref_compare(ref_mul(got, r, REF_P), ref_mul(a, b, REF_P)));
    field_add(got.v, a.v, b.v);
    CHECK(!ref_compare(got, ref_plus(a, b, REF_P)));
    field_subtract(got.v, a.v, b.v);
    CHECK(!ref_compare(got, ref_plus(a, ref_negate(b, REF_P), REF_P)));
    again = a;     /* in place, from either side, and both operands the same */
    field_multiply(again.v, again.v, b.v);
    field_multiply(got.v, a.v, b.v);
    CHECK(!ref_compare(again, got));
    again = b;
    field_subtract(again.v, a.v, again.v);
    field_add(again.v, again.v, b.v);
    CHECK(!ref_compare(again, a));
}

/* gcc at -O3 once took inline assembly out of the loop below, the pointers in it being always the same. */
#if defined(__clang__)
#  define AS_AT_O3
#else
#  define AS_AT_O3 __attribute__((optimize("O3")))
#endif

static AS_AT_O3 void check_one(ref_number a)
{
    ref_number got, want, squared;
    field_square(got.v, a.v);
    field_multiply(want.v, a.v, a.v);
    CHECK(!ref_compare(got, want));
    squared = a;
    field_square(squared.v, squared.v);
    CHECK(!ref_compare(squared, want));
    field_square_times(got.v, a.v, 3);
    for (int i = 0; i < 2; i++)
        field_multiply(want.v, want.v, want.v);
    CHECK(!ref_compare(got, want));
    want = a;
    field_add(want.v, want.v, want.v);
    field_add(want.v, want.v, want.v);
    field_subtract(want.v, want.v, a.v);
    field_subtract(want.v, want.v, a.v);
    field_subtract(want.v, want.v, a.v);
    CHECK(!ref_compare(want, a));
    field_halve(got.v, a.v);
    CHECK(ref_compare(got, REF_P) < 0 && !ref_compare(ref_plus(got, got, REF_P), a));
    for (uint64_t mask = 0; mask < 2; mask++) {
        field_negate_if(got.v, a.v, 0 - mask);
        CHECK(!ref_compare(got, mask ? ref_negate(a, REF_P) : a));
    }
}

static void field_at_the_edges(void)
{
    uint64_t state = 1;
    prepare_edges(REF_P);
    for (size_t i = 0; i < edge_count; i++) {
        check_one(edges[i]);
        for (size_t j = 0; j < edge_count; j++)
            check_pair(edges[i], edges[j]);
    }
    for (int i = 0; i < 3000; i++) {
        const ref_number a = bent_number(&state, REF_P);
        check_one(a);
        check_pair(a, bent_number(&state, REF_P));
    }
}

/* b = wanted R / a: what stands before the last subtraction is `wanted` or `wanted` + p. */
static void products_at_the_edges(void)
{
    const ref_number r = ref_minus(ref_small(0), REF_P);
    uint64_t state = 2;
    prepare_edges(REF_P);
    for (size_t i = 0; i < edge_count; i++)
        for (int n = 0; n < 3; n++) {
            const ref_number a = n ? ref_random(&state) : edges[(i * 7 + 3) % edge_count];
            ref_number got;
            if (!ref_compare(a, ref_small(0)))
                continue;
            const ref_number b = ref_mul(ref_mul(edges[i], r, REF_P), ref_invert(a, REF_P), REF_P);
            field_multiply(got.v, a.v, b.v);
            CHECK(!ref_compare(got, edges[i]));
        }
}

static void inverses(void)
{
    const ref_number r = ref_minus(ref_small(0), REF_P);
    uint64_t state = 3;
    for (int i = 0; i < 40; i++) {
        const ref_number a = i < 25 ? edges[i * 3] : bent_number(&state, REF_P);
        ref_number got, product;
        field_invert(got.v, a.v);
        field_multiply(product.v, got.v, a.v);
        CHECK(!ref_compare(product, ref_compare(a, ref_small(0)) ? r : a));
    }
}

/* Modulo n, the first factor being any 256 bits. */
static void scalars_at_the_edges(void)
{
    uint64_t state = 4;
    prepare_edges(REF_N);
    const ref_number ones = ref_minus(ref_small(0), ref_small(1));
    for (size_t i = 0; i < edge_count; i++)
        for (size_t j = 0; j <= edge_count; j++) {
            const ref_number a = j < edge_count ? edges[j] : ones, b = edges[i];
            ref_number got;
            scalar_multiply(got.v, a.v, b.v);
            CHECK(!ref_compare(got, ref_mul(a, b, REF_N)));
        }
    for (int i = 0; i < 2000; i++) {
        const ref_number a = bent_number(&state, ones), b = bent_number(&state, REF_N);
        ref_number got;
        scalar_multiply(got.v, a.v, b.v);
        CHECK(!ref_compare(got, ref_mul(a, b, REF_N)));
    }
}

/* Any index, entries of 8 and of 12 limbs: that entry alone, or zeros. */
static void selections(void)
{
    enum { MOST = 64 };
    static uint64_t table[MOST * 12];
    uint64_t out[13], want[12];
    test_fill(table, sizeof table, 5);
    for (size_t words = 8; words <= 12; words += 4)
        for (size_t count = 1; count <= MOST; count += 7)
            for (uint64_t index = 0; index <= count + 1; index++) {
                memset(want, 0, sizeof want);
                if (index && index <= count)
                    memcpy(want, table + words * (index - 1), 8 * words);
                out[words] = 0x77;
                table_select(out, table, words, count, index);
                CHECK_BYTES(out, want, 8 * words);
                CHECK(out[words] == 0x77);
            }
}

/* The digits of every geometry, from any number, make up that number and stay within the tables. */
static void digits(void)
{
    static const unsigned geometry[3][2] = {{CSVF_SM2_BASE_BITS, CSVF_SM2_BASE_WINDOWS}, {CSVF_SM2_KEY_BITS, CSVF_SM2_KEY_WINDOWS},
                                            {MULTIPLY_BITS, MULTIPLY_WINDOWS}};
    uint64_t state = 6;
    for (int round = 0; round < 400; round++) {
        const ref_number k = bent_number(&state, REF_N);
        int8_t odd[257];
        for (int g = 0; g < 3; g++) {
            ref_number sum = ref_small(0);
            for (unsigned w = geometry[g][1]; w-- > 0;) {
                uint64_t sign;
                const uint64_t digit = booth_digit(&sign, k.v, geometry[g][0] * w, geometry[g][0]);
                CHECK(digit <= UINT64_C(1) << (geometry[g][0] - 1));
                sum = ref_multiply_add(sum, ref_small(UINT64_C(1) << geometry[g][0]), sign ? ref_negate(ref_small(digit), REF_N) : ref_small(digit), REF_N);
            }
            CHECK(!ref_compare(sum, k));
        }
        ref_number sum = ref_small(0);
        const int count = wnaf_var(odd, k.v);
        for (int i = 256; i >= 0; i--) {
            CHECK(i < count || odd[i] == 0);
            CHECK(odd[i] == 0 || (odd[i] % 2 && odd[i] < 16 && odd[i] > -16));
            sum = ref_multiply_add(sum, ref_small(2), odd[i] < 0 ? ref_negate(ref_small((uint64_t)-odd[i]), REF_N) : ref_small((uint64_t)odd[i]), REF_N);
        }
        CHECK(!ref_compare(sum, k));
    }
}

static int run_field_cases(void)
{
    RUN(field_at_the_edges);
    RUN(products_at_the_edges);
    RUN(inverses);
    RUN(scalars_at_the_edges);
    RUN(selections);
    RUN(digits);
    return test_report();
}

#endif
