/* Verification of many signatures: every kernel by name against single verification and against what the signatures were made to be, with every
 * count, with and without tables; sums built to meet exceptional additions in chosen lanes, and how often a kernel had to hand a lane
 * back; r, s and x at the edges. */
#if defined(__x86_64__)
/* The kernel once more, with its way back to single verification counted. */
#define _GNU_SOURCE 1
#define csvf__sm2 counted_sm2
#define csvf__sm2_many_ifma counted_ifma
#include "../sm2/sm2_many_ifma.c"
#undef csvf__sm2
#undef csvf__sm2_many_ifma
extern const csvf_sm2_many_kernel csvf__sm2_many_ifma;
#endif

#include "test.h"

#include "../cpu.h"
#include "../include/csvfast.h"
#include "../sm2/sm2_kernel.h"
#include "../sm2/sm2_number.h"
#include "../sm2/sm2_objects.h"

const csvf_sm2_kernel *csvf__sm2(void);

static size_t handed_back;

const csvf_sm2_kernel *counted_sm2(void)
{
    handed_back++;
    return &csvf__sm2_portable;
}

/* ---- Making cases ---- */

enum { KEYS = 5 };

static csvf_sm2_private private_keys[KEYS];
static csvf_sm2_public public_keys[KEYS];
static csvf_sm2_table *tables[KEYS];

/* One signature to verify, with everything it points to. */
typedef struct sample {
    csvf_sm2_public public_key;
    csvf_sm2_table *table;      /* or NULL; owned only where `made_table` */
    uint8_t signature[64], digest[32];
    int expected, made_table;
} sample;

static void scalar_random(uint64_t out[4], uint64_t *seed)
{
    do
        for (int i = 0; i < 4; i++)
            out[i] = test_random(seed);
    while (!number_is_below(out, csvf__sm2_n) || number_is_zero(out));
}

static void make_keys(void)
{
    uint64_t seed = 20;
    for (int i = 0; i < KEYS; i++) {
        uint64_t d[4];
        uint8_t bytes[32];
        scalar_random(d, &seed);
        number_store(bytes, d);
        CHECK_STATUS(csvf_sm2_private_init(&private_keys[i], bytes), CSVF_OK);
        csvf_sm2_private_public(&public_keys[i], &private_keys[i]);
        CHECK_STATUS(csvf_sm2_table_create(&tables[i], &public_keys[i]), CSVF_OK);
    }
}

/* A signature by one of the keys, every second one spoilt: a bit of r, s or e, or the wrong key. */
static void make_signed(sample *out, uint64_t *seed)
{
    uint64_t nonce[4];
    uint8_t bytes[32];
    size_t key = test_random(seed) % KEYS;
    memset(out, 0, sizeof *out);
    test_fill(out->digest, 32, test_random(seed));
    scalar_random(nonce, seed);
    number_store(bytes, nonce);
    CHECK_STATUS(csvf_sm2_sign_digest_with_nonce(out->signature, &private_keys[key], out->digest, bytes), CSVF_OK);
    const size_t bit = test_random(seed) % 256;
    out->expected = 0;
    switch (test_random(seed) % 8) {
    case 0: out->signature[bit / 8] ^= (uint8_t)(1 << bit % 8); break;
    case 1: out->signature[32 + bit / 8] ^= (uint8_t)(1 << bit % 8); break;
    case 2: out->digest[bit / 8] ^= (uint8_t)(1 << bit % 8); break;
    case 3: key = (key + 1) % KEYS; break;
    default: out->expected = 1;
    }
    out->public_key = public_keys[key];
    out->table = tables[key];
}

static void set_signature(sample *out, const uint64_t s[4], const uint64_t t[4], const uint64_t x[4])
{
    uint64_t r[4], e[4];
    number_subtract_modulo(r, t, s, csvf__sm2_n);
    number_reduce_once(e, 0, x, csvf__sm2_n);
    number_subtract_modulo(e, r, e, csvf__sm2_n);      /* e + x = r */
    number_store(out->signature, r);
    number_store(out->signature + 32, s);
    number_store(out->digest, e);
    CHECK(!number_is_zero(r) && !number_is_zero(s) && !number_is_zero(t));
    CHECK_STATUS(csvf_sm2_table_create(&out->table, &out->public_key), CSVF_OK);
    out->made_table = 1;
}

/* The signature whose verification computes s G + t P for P = k G. Valid, unless the sum is infinity. */
static void make_sum(sample *out, const uint64_t s[4], const uint64_t t[4], const uint64_t k[4])
{
    uint64_t sum[4], x[4] = {7, 0, 0, 0};
    uint8_t bytes[64];
    csvf_sm2_private private_key;
    memset(out, 0, sizeof *out);
    number_store(bytes, k);
    CHECK_STATUS(csvf_sm2_private_init(&private_key, bytes), CSVF_OK);
    csvf_sm2_private_public(&out->public_key, &private_key);
    csvf__sm2_portable.scalar_multiply(sum, t, k);
    number_add_modulo(sum, sum, s, csvf__sm2_n);
    out->expected = !number_is_zero(sum);
    if (out->expected) {
        csvf_sm2_affine point;
        csvf__sm2_portable.multiply_base(&point, sum);
        csvf__sm2_point_bytes(bytes, &point);
        number_load(x, bytes);
    }
    set_signature(out, s, t, x);
}

static void release(sample *samples, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (samples[i].made_table)
            csvf_sm2_table_destroy(samples[i].table);
}

/* ---- Checking them ---- */

enum { WITHOUT, WITH, MIXED, TABLE_MODES, MOST = 40 };

static void check_of(csvf_sm2_check *check, const sample *one, int use_table)
{
    *check = (csvf_sm2_check){&one->public_key, use_table ? one->table : NULL, one->signature, one->digest};
}

/* The first `count` samples with every kernel and table mode, in one call, against what they should give. */
static void check_batch(const sample *samples, size_t count)
{
    csvf_sm2_check checks[MOST];
    uint8_t valid[MOST + 8];
    for (int mode = 0; mode < TABLE_MODES; mode++) {
        for (size_t i = 0; i < count; i++) {
            check_of(&checks[i], &samples[i], mode == WITH || (mode == MIXED && (i * 7 + count) % 3));
            CHECK((csvf_sm2_verify_digest_var(checks[i].public_key, checks[i].table, checks[i].signature, checks[i].digest) == CSVF_OK) ==
                  samples[i].expected);
        }
        const char *name;
        for (size_t k = 0; (name = csvf_kernel_at(CSVF_PRIMITIVE_SM2_MANY, k)); k++) {
            if (!csvf_kernel_available(CSVF_PRIMITIVE_SM2_MANY, name))
                continue;
            test_case("%s, %zu signatures, table mode %d", name, count, mode);
            CHECK_STATUS(csvf_force_kernel(CSVF_PRIMITIVE_SM2_MANY, name), CSVF_OK);
            memset(valid, 0xEE, sizeof valid);
            CHECK_STATUS(csvf_sm2_verify_many_var(valid, checks, count), CSVF_OK);
            for (size_t i = 0; i < count; i++)
                CHECK(valid[i] == samples[i].expected);
            for (size_t i = count; i < sizeof valid; i++)
                CHECK(valid[i] == 0xEE);
        }
        CHECK_STATUS(csvf_force_kernel(CSVF_PRIMITIVE_SM2_MANY, NULL), CSVF_OK);
    }
}

static void every_count_and_mix(void)
{
    sample samples[MOST];
    uint64_t seed = 1;
    size_t good = 0, bad = 0;
    for (size_t count = 0; count <= 33; count++) {
        for (size_t i = 0; i < count; i++) {
            make_signed(&samples[i], &seed);
            good += samples[i].expected == 1;
            bad += samples[i].expected == 0;
        }
        check_batch(samples, count);
    }
    CHECK(good > 200 && bad > 200);
}

static void every_flipped_bit(void)
{
    static sample original, flipped[768];
    static csvf_sm2_check checks[769];
    static uint8_t valid[769];
    uint64_t seed = 2;
    do
        make_signed(&original, &seed);
    while (!original.expected);
    for (int with_table = 0; with_table < 2; with_table++) {
        for (size_t bit = 0; bit < 768; bit++) {
            flipped[bit] = original;
            if (bit < 512)
                flipped[bit].signature[bit / 8] ^= (uint8_t)(1 << bit % 8);
            else
                flipped[bit].digest[(bit - 512) / 8] ^= (uint8_t)(1 << bit % 8);
            check_of(&checks[bit], &flipped[bit], with_table);
        }
        check_of(&checks[768], &original, with_table);
        CHECK_STATUS(csvf_sm2_verify_many_var(valid, checks, 769), CSVF_OK);
        for (size_t bit = 0; bit < 768; bit++)
            CHECK(valid[bit] == 0);
        CHECK(valid[768] == 1);
    }
}

/* r and s at and beyond their limits, each between good neighbours. */
static void numbers_out_of_range(void)
{
    static const char *const edges[] = {
        "0000000000000000000000000000000000000000000000000000000000000000",
        "fffffffeffffffffffffffffffffffff7203df6b21c6052b53bbf40939d54123",   /* n */
        "fffffffeffffffffffffffffffffffff7203df6b21c6052b53bbf40939d54124",
        "fffffffeffffffffffffffffffffffffffffffff00000000ffffffffffffffff",   /* p */
        "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    };
    sample samples[MOST];
    uint64_t seed = 3, r[4], s[4];
    size_t count = 0;
    for (size_t edge = 0; edge < sizeof edges / sizeof edges[0]; edge++)
        for (size_t field = 0; field < 2; field++) {
            make_signed(&samples[count++], &seed);
            make_signed(&samples[count], &seed);
            (void)test_hex(samples[count].signature + 32 * field, 32, edges[edge]);
            samples[count++].expected = 0;
        }
    make_signed(&samples[count], &seed);           /* r + s = n */
    number_load(r, samples[count].signature);
    (void)number_subtract(s, csvf__sm2_n, r);
    number_store(samples[count].signature + 32, s);
    samples[count++].expected = 0;
    make_signed(&samples[count], &seed);           /* the same number, above n: r + n where that fits 256 bits */
    memset(samples[count].signature, 0, 16);
    number_load(r, samples[count].signature);
    (void)number_add(r, r, csvf__sm2_n);
    number_store(samples[count].signature, r);
    samples[count++].expected = 0;
    check_batch(samples, count);

    /* One good signature in every lane, then the same with r spoilt: what the good one left behind must not speak for it. */
    do
        make_signed(&samples[0], &seed);
    while (!samples[0].expected);
    for (size_t i = 1; i < 32; i++) {
        samples[i] = samples[0];
        if (i >= 16) {
            (void)test_hex(samples[i].signature, 32, edges[i % 5]);
            samples[i].expected = 0;
        }
    }
    check_batch(samples, 32);
}

/* ---- Exceptional additions ---- */

/* Booth's digit of a window: its bits and the one below, the first bit counting negative. */
static int window_digit(const uint64_t scalar[4], unsigned bits, unsigned window)
{
    const unsigned first = window * bits;
    int digit = 0;
    for (unsigned at = first ? first - 1 : first; at < first + bits && at < 256; at++)
        if (scalar[at / 64] >> at % 64 & 1)
            digit += at < first ? 1 : at == first + bits - 1 ? -(1 << (bits - 1)) : 1 << (at - first);
    return digit;
}

/* out = digit * 2^shift mod n */
static void shifted(uint64_t out[4], int digit, unsigned shift)
{
    uint64_t magnitude[4] = {(uint64_t)(digit < 0 ? -digit : digit), 0, 0, 0};
    static const uint64_t zero[4];
    memcpy(out, magnitude, sizeof magnitude);
    for (unsigned i = 0; i < shift; i++)
        number_add_modulo(out, out, out, csvf__sm2_n);
    if (digit < 0)
        number_subtract_modulo(out, zero, out, csvf__sm2_n);
}

/* A key for which, when window w of s comes, the sum so far is the term to be added (sign 1) or its negative (sign -1). */
static void make_collision(sample *out, unsigned window, int sign, uint64_t *seed)
{
    uint64_t s[4], t[4], k[4], term[4], inverse[4];
    int digit;
    scalar_random(t, seed);
    do
        scalar_random(s, seed);
    while (!(digit = window_digit(s, CSVF_SM2_BASE_BITS, window)));
    shifted(k, sign * digit, CSVF_SM2_BASE_BITS * window);
    for (unsigned w = 0; w < window; w++) {
        shifted(term, window_digit(s, CSVF_SM2_BASE_BITS, w), CSVF_SM2_BASE_BITS * w);
        number_subtract_modulo(k, k, term, csvf__sm2_n);
    }
    csvf__sm2_portable.scalar_invert(inverse, t);
    csvf__sm2_portable.scalar_multiply(k, k, inverse);
    make_sum(out, s, t, k);
}

/* With the term's negative the sum is infinity for a moment; windows without digits left of it make that the end. */
static void colliding_additions(void)
{
    sample samples[MOST];
    uint64_t seed = 4;
    for (unsigned window = 0; window < CSVF_SM2_BASE_WINDOWS; window += 3) {
        for (size_t i = 0; i < 16; i++)
            if (i % 8 == 2 || i % 8 == 5)
                make_collision(&samples[i], window, i % 8 == 2 ? 1 : -1, &seed);
            else
                make_signed(&samples[i], &seed);
        check_batch(samples, 16);
        for (size_t i = 0; i < 16; i++)
            samples[i].digest[31] ^= 1, samples[i].expected = 0;     /* the lane's second opinion must be heard, not assumed */
        for (size_t i = 0; i < 16; i++)
            if (i % 8 != 2 && i % 8 != 5)
                make_signed(&samples[i], &seed);
        check_batch(samples, 16);
        release(samples, 16);
    }
}

static const uint64_t n_less_6[4] = {0x53bbf40939d5411d, 0x7203df6b21c6052b, 0xffffffffffffffff, 0xfffffffeffffffff};

/* t = n - 6: before its last 5-bit digit, -3, the sum is (n - 3) P = -3 P. (n mod 32 = 3: the one such t without a table.) And s G = -t P. */
static void colliding_doublings_and_infinity(void)
{
    sample samples[8];
    uint64_t seed = 5, s[4], k[4], t[4], inverse[4];
    static const uint64_t zero[4];
    for (size_t i = 0; i < 8; i++) {
        scalar_random(s, &seed);
        scalar_random(t, &seed);
        scalar_random(k, &seed);
        if (i % 3 == 0)
            make_sum(&samples[i], s, n_less_6, k);
        else if (i % 3 == 1) {
            number_subtract_modulo(k, zero, s, csvf__sm2_n);
            csvf__sm2_portable.scalar_invert(inverse, t);
            csvf__sm2_portable.scalar_multiply(k, k, inverse);
            make_sum(&samples[i], s, t, k);
            CHECK(samples[i].expected == 0);
        } else
            make_sum(&samples[i], s, t, k);
    }
    check_batch(samples, 8);
    release(samples, 8);
}

/* Scalars with empty windows, at both ends of their range, with few bits: lanes that start late, or stop early, beside full ones. */
static void structured_scalars(void)
{
    sample samples[MOST];
    uint64_t seed = 6;
    static const uint64_t zero[4];
    size_t count = 0;
    for (unsigned round = 0; round < 200; round++) {
        uint64_t numbers[3][4];
        for (int i = 0; i < 3; i++) {
            uint64_t *x = numbers[i], y = test_random(&seed);
            memset(x, 0, 32);
            switch (y % 5) {
            case 0: x[0] = 1 + y / 5 % 70; break;
            case 1: x[0] = 1 + y / 5 % 70, number_subtract_modulo(x, zero, x, csvf__sm2_n); break;
            case 2: x[y / 5 % 4] = UINT64_C(1) << y / 20 % 63; break;
            case 3: x[0] = UINT64_C(1), shifted(x, 1, (unsigned)(y / 5 % 255)), x[0] -= !!(x[0] > 1); break;
            default: scalar_random(x, &seed);
            }
        }
        if (number_is_equal(numbers[0], numbers[1]) || (numbers[2][0] == csvf__sm2_n[0] - 1 && numbers[2][3] == csvf__sm2_n[3]))
            continue;     /* r would be 0; k would be n - 1, which is no private key */
        make_sum(&samples[count++], numbers[0], numbers[1], numbers[2]);
        if (count == 24) {
            check_batch(samples, count);
            release(samples, count);
            count = 0;
        }
    }
    check_batch(samples, count);
    release(samples, count);
}

/* ---- x of the sum and its remainder mod n ---- */

/* A signature whose sum is a point of the given x, if the curve has one: P = (R - s G) / t. */
static int make_with_x(sample *out, const uint64_t x[4], uint64_t *seed)
{
    static const uint64_t one[4] = {1, 0, 0, 0};
    uint64_t s[4], t[4], minus_s[4], inverse[4];
    uint8_t encoded[33] = {2}, bytes[64];
    csvf_sm2_public r;
    csvf_sm2_affine base, point;
    memset(out, 0, sizeof *out);
    number_store(encoded + 1, x);
    if (csvf_sm2_public_init(&r, encoded, 33) != CSVF_OK)
        return 0;
    scalar_random(s, seed);
    scalar_random(t, seed);
    (void)number_subtract(minus_s, csvf__sm2_n, s);
    csvf__sm2_portable.multiply_base(&base, one);
    CHECK(csvf__sm2_portable.combine_var(&point, &csvf__sm2_public_of(&r)->point, &base, minus_s) == 1);
    csvf__sm2_portable.scalar_invert(inverse, t);
    CHECK(csvf__sm2_portable.multiply(&point, &point, inverse) == 1);
    csvf__sm2_point_bytes(bytes, &point);
    CHECK_STATUS(csvf_sm2_public_init(&out->public_key, bytes, 64), CSVF_OK);
    set_signature(out, s, t, x);
    out->expected = 1;
    return 1;
}

static void x_above_the_order(void)
{
    sample samples[MOST];
    uint64_t seed = 7, x[4] = {0};
    static const uint64_t below_p[4] = {0xffffffffffffffff, 0xffffffff00000000, 0xffffffffffffffff, 0xfffffffeffffffff};
    size_t count = 0;
    for (uint64_t j = 0; count < 6; j++) {          /* n, n + 1, ...: x mod n = j */
        number_add(x, csvf__sm2_n, (const uint64_t[4]){j, 0, 0, 0});
        count += (size_t)make_with_x(&samples[count], x, &seed);
    }
    for (uint64_t j = 1; count < 12; j++) {         /* p - 1, p - 2, ... */
        number_subtract(x, below_p, (const uint64_t[4]){j, 0, 0, 0});
        count += (size_t)make_with_x(&samples[count], x, &seed);
    }
    for (uint64_t j = 0; count < 18; j++)           /* 0, 1, ...: x mod n is that small number too */
        count += (size_t)make_with_x(&samples[count], (const uint64_t[4]){j, 0, 0, 0}, &seed);
    for (uint64_t j = 1; count < 22; j++) {         /* n - 1, n - 2, ...: not below p - n */
        number_subtract(x, csvf__sm2_n, (const uint64_t[4]){j, 0, 0, 0});
        count += (size_t)make_with_x(&samples[count], x, &seed);
    }
    while (count < 30)
        make_signed(&samples[count++], &seed);
    check_batch(samples, count);
    for (size_t i = 0; i < 22; i++)
        samples[i].digest[31] ^= 1, samples[i].expected = 0;
    check_batch(samples, count);
    release(samples, count);
}

/* ---- What goes back to single verification ---- */

#if defined(__x86_64__)
static int run_counted(const sample *samples, int with_table, size_t count)
{
    csvf_sm2_job jobs[8];
    const csvf_sm2_job *pointers[8];
    uint8_t valid[8];
    for (size_t i = 0; i < count; i++) {
        csvf_sm2_check check;
        check_of(&check, &samples[i], with_table);
        CHECK_STATUS(csvf__sm2_job_init_var(&jobs[i], &check), CSVF_OK);
        pointers[i] = &jobs[i];
    }
    handed_back = 0;
    counted_ifma.verify_var(valid, pointers, count);
    for (size_t i = 0; i < count; i++)
        CHECK(valid[i] == samples[i].expected);
    return (int)handed_back;
}

static void only_exceptional_lanes_go_back(void)
{
    sample samples[8];
    uint64_t seed = 8, t[4], k[4], s[4];
    for (int with_table = 0; with_table < 2; with_table++) {
        for (unsigned round = 0; round < 40; round++) {
            for (size_t i = 0; i < 8; i++)
                do      /* a job needs r and s in range */
                    make_signed(&samples[i], &seed);
                while (!samples[i].expected);
            CHECK(run_counted(samples, with_table, 1 + round % 8) == 0);
        }
        for (unsigned window = 0; window < CSVF_SM2_BASE_WINDOWS; window++) {
            for (size_t i = 0; i < 8; i++) {
                scalar_random(s, &seed);
                scalar_random(t, &seed);
                scalar_random(k, &seed);
                if (i == window % 8)
                    make_collision(&samples[i], window, window % 2 ? 1 : -1, &seed);
                else
                    make_sum(&samples[i], s, t, k);
            }
            test_case("window %u, table %d", window, with_table);
            CHECK(run_counted(samples, with_table, 8) == 1);
            release(samples, 8);
        }
        scalar_random(s, &seed);
        scalar_random(k, &seed);
        make_sum(&samples[0], s, n_less_6, k);
        CHECK(run_counted(samples, with_table, 1) == (with_table ? 0 : 1));
        release(samples, 1);
    }
}
#endif

/* ---- Arguments ---- */

static void bad_arguments(void)
{
    sample samples[3];
    csvf_sm2_check checks[3];
    uint8_t valid[3];
    uint64_t seed = 9;
    const uint8_t none[3] = {0};
    for (size_t i = 0; i < 3; i++)
        do
            make_signed(&samples[i], &seed);
        while (!samples[i].expected);
    for (int fault = 0; fault < 5; fault++) {
        for (size_t i = 0; i < 3; i++)
            check_of(&checks[i], &samples[i], 1);
        CHECK_STATUS(csvf_sm2_verify_many_var(valid, checks, 3), CSVF_OK);
        CHECK(valid[0] == 1 && valid[1] == 1 && valid[2] == 1);
        switch (fault) {
        case 0: checks[2].public_key = NULL; break;
        case 1: checks[2].signature = NULL; break;
        case 2: checks[2].digest = NULL; break;
        case 3: checks[2].table = tables[checks[2].table == tables[0]]; break;    /* another key's */
        default: break;
        }
        for (size_t k = 0; k < csvf_kernel_count(CSVF_PRIMITIVE_SM2_MANY); k++) {     /* with one lane, two answers were there already */
            if (csvf_force_kernel(CSVF_PRIMITIVE_SM2_MANY, csvf_kernel_at(CSVF_PRIMITIVE_SM2_MANY, k)) != CSVF_OK)
                continue;
            memset(valid, 0xEE, sizeof valid);
            CHECK_STATUS(csvf_sm2_verify_many_var(valid, fault < 4 ? checks : NULL, 3), CSVF_ERR_ARGUMENT);
            CHECK_BYTES(valid, none, 3);
        }
        CHECK_STATUS(csvf_force_kernel(CSVF_PRIMITIVE_SM2_MANY, NULL), CSVF_OK);
    }
    CHECK_STATUS(csvf_sm2_verify_many_var(NULL, checks, 3), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm2_verify_many_var(NULL, NULL, 0), CSVF_OK);
    CHECK_STATUS(csvf_force_kernel(CSVF_PRIMITIVE_SM2_MANY, "no such kernel"), CSVF_ERR_KERNEL);
}

int main(void)
{
    printf("sm2-many kernels:");
    for (size_t i = 0; i < csvf_kernel_count(CSVF_PRIMITIVE_SM2_MANY); i++)
        printf(" %s", csvf_kernel_at(CSVF_PRIMITIVE_SM2_MANY, i));
    printf("\n");
    RUN(make_keys);
    RUN(every_count_and_mix);
    RUN(every_flipped_bit);
    RUN(numbers_out_of_range);
    RUN(colliding_additions);
    RUN(colliding_doublings_and_infinity);
    RUN(structured_scalars);
    RUN(x_above_the_order);
#if defined(__x86_64__)
    if (csvf_kernel_available(CSVF_PRIMITIVE_SM2_MANY, "ifma-avx512"))
        RUN(only_exceptional_lanes_go_back);
    else
        printf("skipped: only_exceptional_lanes_go_back: this CPU has no AVX-512 IFMA\n");
#endif
    RUN(bad_arguments);
    for (int i = 0; i < KEYS; i++)
        csvf_sm2_table_destroy(tables[i]);
    return test_report();
}
