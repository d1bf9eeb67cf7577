/* SM4 kernels and CTR: the standard's vectors and an independent implementation, on every kernel this CPU can run. */
#include "test.h"

#include "../cpu.h"
#include "../include/csvfast.h"
#include "../sm4/sm4_kernel.h"
#include "../sm4/sm4_tweak.h"
#include "reference_sm4.h"

enum { MOST = 600 };

static const uint8_t standard_key[16] = { 0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef, 0xfe, 0xdc, 0xba, 0x98, 0x76, 0x54, 0x32, 0x10 };

/* Runs a function with every available kernel in use; at least one must exist. */
static void with_each_kernel(void (*function)(const csvf_sm4_kernel *))
{
    unsigned tried = 0;
    for (size_t i = 0; i < csvf_kernel_count(CSVF_PRIMITIVE_SM4); i++) {
        const char *name = csvf_kernel_at(CSVF_PRIMITIVE_SM4, i);
        if (!csvf_kernel_available(CSVF_PRIMITIVE_SM4, name))
            continue;
        CHECK_STATUS(csvf_force_kernel(CSVF_PRIMITIVE_SM4, name), CSVF_OK);
        CHECK(strcmp(csvf__sm4()->name, name) == 0);
        function(csvf__sm4());
        tried++;
    }
    CHECK(tried > 0);
    CHECK_STATUS(csvf_force_kernel(CSVF_PRIMITIVE_SM4, NULL), CSVF_OK);
}

static void vector_on(const csvf_sm4_kernel *kernel)
{
    uint8_t block[16], want[16];
    csvf_sm4_schedule enc, dec;
    test_case("%s", kernel->name);
    test_hex(want, 16, "681edf34d206965e86b3e94f536e4246");
    kernel->expand(&enc, &dec, standard_key);
    kernel->ecb(&enc, block, standard_key, 1);
    CHECK_BYTES(block, want, 16);
    kernel->ecb(&dec, block, block, 1);
    CHECK_BYTES(block, standard_key, 16);
    csvf_sm4_schedule alone;
    kernel->expand(&alone, NULL, standard_key);
    kernel->ecb(&alone, block, standard_key, 1);
    CHECK_BYTES(block, want, 16);
}
static void standard_vector(void) { with_each_kernel(vector_on); }

/* The annex's second example: a chain, so a million calls of one block each. */
static void million_on(const csvf_sm4_kernel *kernel)
{
    uint8_t block[16], want[16];
    csvf_sm4_schedule enc;
    test_case("%s", kernel->name);
    test_hex(want, 16, "595298c7c6fd271f0402f804c33d3f66");
    kernel->expand(&enc, NULL, standard_key);
    memcpy(block, standard_key, 16);
    for (int i = 0; i < 1000000; i++)
        kernel->ecb(&enc, block, block, 1);
    CHECK_BYTES(block, want, 16);
}
static void standard_vector_million_times(void) { with_each_kernel(million_on); }

/* Every count of blocks, buffers that end at a guard page, in place and not, every byte against the reference. */
static void ecb_on(const csvf_sm4_kernel *kernel)
{
    static uint8_t data[16 * MOST], want[16 * MOST], back[16 * MOST];
    test_guarded in = test_guard(16 * MOST), out = test_guard(16 * MOST);
    uint8_t key[16];
    csvf_sm4_schedule enc, dec;
    test_fill(key, 16, 11);
    test_fill(data, sizeof data, 12);
    for (size_t i = 0; i < MOST; i++) {
        reference_sm4(want + 16 * i, data + 16 * i, key, 0);
        reference_sm4(back + 16 * i, data + 16 * i, key, 1);
    }
    kernel->expand(&enc, &dec, key);
    for (size_t n = 0; n <= MOST; n++) {
        test_case("%s, %zu blocks", kernel->name, n);
        uint8_t *i = in.end - 16 * n, *o = out.end - 16 * n;
        memcpy(i, data, 16 * n);
        kernel->ecb(&enc, o, i, n);
        CHECK_BYTES(o, want, 16 * n);
        CHECK_BYTES(i, data, 16 * n);
        kernel->ecb(&dec, i, i, n);
        CHECK_BYTES(i, back, 16 * n);
        if (n > 70 && n < MOST - 10)
            n += 6;
    }
    /* starting at a guard page, unaligned */
    for (size_t n = 1; n < 140; n += 3)
        for (size_t shift = 0; shift < 18; shift += 5) {
            test_case("%s, %zu blocks at +%zu", kernel->name, n, shift);
            memcpy(in.first + shift, data, 16 * n);
            memset(out.first, 0xcc, 16 * n + 2 * shift + 32);
            kernel->ecb(&enc, out.first + shift, in.first + shift, n);
            CHECK_BYTES(out.first + shift, want, 16 * n);
            for (size_t k = 0; k < shift; k++)
                CHECK(out.first[k] == 0xcc);
            CHECK(out.first[shift + 16 * n] == 0xcc && out.first[shift + 16 * n + 31] == 0xcc);
        }
    test_unguard(in);
    test_unguard(out);
}
static void ecb_every_count(void) { with_each_kernel(ecb_on); }

/* Different keys must not share anything: many random keys, one lane looked at each time. */
static void keys_on(const csvf_sm4_kernel *kernel)
{
    uint64_t seed = 77;
    for (size_t k = 0; k < 300; k++) {
        uint8_t key[16], data[16 * 300], want[16];
        csvf_sm4_schedule enc, dec;
        const size_t lane = k % 300, n = lane + 1;
        test_case("%s, key %zu", kernel->name, k);
        test_fill(key, 16, test_random(&seed));
        test_fill(data, 16 * n, test_random(&seed));
        reference_sm4(want, data + 16 * lane, key, 0);
        uint8_t plain[16];
        memcpy(plain, data + 16 * lane, 16);
        kernel->expand(&enc, &dec, key);
        kernel->ecb(&enc, data, data, n);
        CHECK_BYTES(data + 16 * lane, want, 16);
        kernel->ecb(&dec, data, data, n);
        CHECK_BYTES(data + 16 * lane, plain, 16);
    }
}
static void random_keys(void) { with_each_kernel(keys_on); }

static void tweaks_on(const csvf_sm4_kernel *kernel)
{
    uint8_t bases[16 * 9], out[16 * 9 * 40], want[16 * 9 * 40], portable[16 * 9 * 40];
    const uint32_t powers[9] = { 0, 1, 55, 56, 57, 63, 128, 1000, 0xfffff };
    test_guarded g = test_guard(sizeof out);
    test_fill(bases, sizeof bases, 5);
    memset(bases + 16, 0xff, 16);
    for (int standard = 0; standard < 2; standard++)
        for (size_t runs = 0; runs <= 9; runs++)
            for (size_t count = 0; count <= 40; count += count < 10 ? 1 : 7)
                for (int with = 0; with < 2; with++) {
                    test_case("%s, standard %d, %zu runs of %zu%s", kernel->name, standard, runs, count, with ? ", powers" : "");
                    for (size_t i = 0; i < runs; i++) {
                        uint8_t t[16];
                        memcpy(t, bases + 16 * i, 16);
                        for (uint32_t p = 0; with && p < powers[i]; p++)
                            reference_times_alpha(t, standard);
                        for (size_t j = 0; j < count; j++) {
                            memcpy(want + 16 * (i * count + j), t, 16);
                            reference_times_alpha(t, standard);
                        }
                    }
                    const size_t length = 16 * runs * count;
                    kernel->tweaks(standard, g.end - length, bases, with ? powers : NULL, count, runs);
                    CHECK_BYTES(g.end - length, want, length);
                    csvf__sm4_tweaks_portable(standard, portable, bases, with ? powers : NULL, count, runs);
                    CHECK_BYTES(portable, want, length);
                    if (with && runs == 9)
                        count += 13;   /* the reference walks 0xfffff steps there */
                }
    test_unguard(g);
}
static void powers_of_alpha(void) { with_each_kernel(tweaks_on); }

static void tweak_examples(void)
{
    /* the examples of both orders: one bit at either end of the number */
    static const struct { const char *in, *ieee, *gb; } examples[] = {
        { "80000000000000000000000000000000", "00010000000000000000000000000000", "40000000000000000000000000000000" },
        { "00000000000000000000000000000001", "00000000000000000000000000000002", "e1000000000000000000000000000000" },
        { "00000000000000000000000000000080", "87000000000000000000000000000000", "00000000000000000000000000000040" },
        { "01000000000000000000000000000000", "02000000000000000000000000000000", "00800000000000000000000000000000" },
        { "4e7e2942e173d393b68f90d46355533b", "9cfc5284c2e7a6276d1f21a9c7aaa676", "c63f14a170b9e9c9db47c86a31aaa99d" },
    };
    for (size_t i = 0; i < sizeof examples / sizeof *examples; i++)
        for (int standard = 0; standard < 2; standard++) {
            uint8_t t[16], want[16], first[16], in[16];
            test_case("example %zu, standard %d", i, standard);
            test_hex(in, 16, examples[i].in);
            test_hex(want, 16, standard ? examples[i].ieee : examples[i].gb);
            memcpy(t, in, 16);
            csvf__sm4_tweak_run(standard, first, t, 1);
            CHECK_BYTES(first, in, 16);
            CHECK_BYTES(t, want, 16);
        }
}

static void xex_on(const csvf_sm4_kernel *kernel)
{
    static uint8_t data[16 * 300], tweaks[16 * 300], want[16 * 300];
    test_guarded in = test_guard(sizeof data), out = test_guard(sizeof data), tw = test_guard(sizeof data);
    uint8_t key[16];
    csvf_sm4_schedule enc, dec;
    test_fill(key, 16, 31);
    test_fill(data, sizeof data, 32);
    test_fill(tweaks, sizeof tweaks, 33);
    for (size_t i = 0; i < 300; i++)
        reference_xex(want + 16 * i, data + 16 * i, tweaks + 16 * i, key, 0);
    kernel->expand(&enc, &dec, key);
    for (size_t n = 0; n <= 300; n += n < 80 ? 1 : 11) {
        test_case("%s, %zu blocks", kernel->name, n);
        uint8_t *i = in.end - 16 * n, *o = out.end - 16 * n, *t = tw.end - 16 * n;
        memcpy(i, data, 16 * n);
        memcpy(t, tweaks, 16 * n);
        kernel->xex(&enc, o, i, t, n);
        CHECK_BYTES(o, want, 16 * n);
        kernel->xex(&dec, o, o, t, n);
        CHECK_BYTES(o, data, 16 * n);
        CHECK_BYTES(t, tweaks, 16 * n);
    }
    test_unguard(in);
    test_unguard(out);
    test_unguard(tw);
}
static void xex_every_count(void) { with_each_kernel(xex_on); }

/* Runs of every length class, several runs in one call; also not in place with buffers at guard pages. */
static void xts_on(const csvf_sm4_kernel *kernel)
{
    static const size_t lengths[] = { 1, 2, 3, 4, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 255, 256, 257, 320, 511, 512, 513, 1024, 1100 };
    static uint8_t data[16 * 1100 * 5], want[sizeof data];
    uint8_t key[16], tweaks[16 * 5];
    csvf_sm4_schedule enc, dec;
    test_guarded in = test_guard(sizeof data), out = test_guard(sizeof data);
    test_fill(key, 16, 41);
    test_fill(data, sizeof data, 42);
    test_fill(tweaks, sizeof tweaks, 43);
    kernel->expand(&enc, &dec, key);
    for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++)
        for (size_t runs = 0; runs <= 5; runs++)
            for (int standard = 0; standard < 2; standard++) {
                const size_t run = lengths[l], length = 16 * run * runs;
                test_case("%s, standard %d, %zu runs of %zu blocks", kernel->name, standard, runs, run);
                for (size_t r = 0; r < runs; r++) {
                    uint8_t t[16];
                    memcpy(t, tweaks + 16 * r, 16);
                    for (size_t j = 0; j < run; j++) {
                        reference_xex(want + 16 * (r * run + j), data + 16 * (r * run + j), t, key, 0);
                        reference_times_alpha(t, standard);
                    }
                }
                uint8_t *i = in.end - length, *o = out.end - length;
                memcpy(i, data, length);
                kernel->xts(&enc, standard, o, i, tweaks, run, runs);
                CHECK_BYTES(o, want, length);
                CHECK_BYTES(i, data, length);
                kernel->xts(&dec, standard, o, o, tweaks, run, runs);
                CHECK_BYTES(o, data, length);
                kernel->xts(&enc, standard, i, i, tweaks, run, runs);
                CHECK_BYTES(i, want, length);
            }
    test_unguard(in);
    test_unguard(out);
}
static void xts_runs(void) { with_each_kernel(xts_on); }

/* ---- CTR ---------------------------------------------------------------------------------------------------------- */

static void ctr_vector_on(const csvf_sm4_kernel *kernel)
{
    uint8_t in[64], want[64], out[64];
    csvf_sm4_ctr ctr;
    test_case("%s", kernel->name);
    test_hex(in, 64, "aaaaaaaaaaaaaaaabbbbbbbbbbbbbbbbccccccccccccccccdddddddddddddddd"
                     "eeeeeeeeeeeeeeeeffffffffffffffffeeeeeeeeeeeeeeeeaaaaaaaaaaaaaaaa");
    test_hex(want, 64, "c2b4759e78ac3cf43d0852f4e8d5f9fd7256e8a5fcb65a350ee00630912e4449"
                       "2a0b17e1b85b060d0fba612d8a95831638b361fd5ffacd942f081485a83ca35d");
    CHECK_STATUS(csvf_sm4_ctr_init(&ctr, standard_key, standard_key), CSVF_OK);
    CHECK_STATUS(csvf_sm4_ctr_crypt(&ctr, out, in, 64), CSVF_OK);
    CHECK_BYTES(out, want, 64);
}
static void ctr_vector(void) { with_each_kernel(ctr_vector_on); }

/* Lengths 0..600, counters that carry across every byte and wrap. */
static void ctr_lengths_on(const csvf_sm4_kernel *kernel)
{
    static const char *const counters[] = { "00000000000000000000000000000000", "000000000000000000000000fffffffe",
                                            "0000000000000000fffffffffffffff0", "ffffffffffffffffffffffffffffffe1",
                                            "123456789abcdef0fffffffffffffffd", "ffffffffffffffffffffffffffffffff" };
    uint8_t data[MOST], want[MOST], counter[16];
    test_guarded in = test_guard(MOST), out = test_guard(MOST);
    test_fill(data, sizeof data, 51);
    for (size_t c = 0; c < sizeof counters / sizeof *counters; c++) {
        test_hex(counter, 16, counters[c]);
        reference_ctr(want, data, MOST, standard_key, counter, 16);
        for (size_t n = 0; n <= MOST; n++) {
            csvf_sm4_ctr ctr;
            test_case("%s, counter %zu, %zu bytes", kernel->name, c, n);
            memcpy(in.end - n, data, n);
            CHECK_STATUS(csvf_sm4_ctr_init(&ctr, standard_key, counter), CSVF_OK);
            CHECK_STATUS(csvf_sm4_ctr_crypt(&ctr, out.end - n, in.end - n, n), CSVF_OK);
            CHECK_BYTES(out.end - n, want, n);
        }
    }
    test_unguard(in);
    test_unguard(out);
}
static void ctr_lengths_and_carries(void) { with_each_kernel(ctr_lengths_on); }

static void ctr_pieces_on(const csvf_sm4_kernel *kernel)
{
    static uint8_t data[20000], want[20000], out[20000];
    uint64_t seed = 61;
    test_fill(data, sizeof data, 62);
    reference_ctr(want, data, sizeof data, standard_key, standard_key, 16);
    for (int round = 0; round < 30; round++) {
        csvf_sm4_ctr ctr;
        memcpy(out, data, sizeof out);
        CHECK_STATUS(csvf_sm4_ctr_init(&ctr, standard_key, standard_key), CSVF_OK);
        for (size_t done = 0; done < sizeof out;) {
            size_t piece = test_random(&seed) % (round < 15 ? 40 : 3000);
            if (piece > sizeof out - done)
                piece = sizeof out - done;
            test_case("%s, round %d, %zu bytes at %zu", kernel->name, round, piece, done);
            CHECK_STATUS(csvf_sm4_ctr_crypt(&ctr, out + done, out + done, piece), CSVF_OK);
            CHECK_BYTES(out + done, want + done, piece);
            done += piece;
        }
    }
}
static void ctr_in_pieces(void) { with_each_kernel(ctr_pieces_on); }

static void ctr_bad_arguments(void)
{
    csvf_sm4_ctr ctr;
    uint8_t buffer[64] = { 0 }, zero[64] = { 0 };
    CHECK_STATUS(csvf_sm4_ctr_init(NULL, standard_key, standard_key), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm4_ctr_init(&ctr, NULL, standard_key), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm4_ctr_init(&ctr, standard_key, NULL), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm4_ctr_init(&ctr, standard_key, standard_key), CSVF_OK);
    CHECK_STATUS(csvf_sm4_ctr_crypt(NULL, buffer, buffer, 1), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm4_ctr_crypt(&ctr, NULL, buffer, 1), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm4_ctr_crypt(&ctr, buffer, NULL, 1), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm4_ctr_crypt(&ctr, NULL, NULL, 0), CSVF_OK);
    CHECK_STATUS(csvf_sm4_ctr_crypt(&ctr, buffer + 1, buffer, 16), CSVF_ERR_OVERLAP);
    CHECK_STATUS(csvf_sm4_ctr_crypt(&ctr, buffer, buffer + 15, 16), CSVF_ERR_OVERLAP);
    CHECK_BYTES(buffer, zero, sizeof buffer);
    CHECK_STATUS(csvf_sm4_ctr_crypt(&ctr, buffer, buffer + 16, 16), CSVF_OK);
}

static void kernels_and_names(void)
{
    CHECK(csvf_kernel_count(CSVF_PRIMITIVE_SM4) >= 1);
    CHECK_STATUS(csvf_force_kernel(CSVF_PRIMITIVE_SM4, "no-such-kernel"), CSVF_ERR_KERNEL);
    CHECK_STATUS(csvf_force_kernel(CSVF_PRIMITIVE_SM4, "portable"), CSVF_OK);
    CHECK(strcmp(csvf_kernel_name(CSVF_PRIMITIVE_SM4), "portable") == 0);
    /* a live object keeps its kernel */
    csvf_sm4_ctr ctr;
    uint8_t a[16] = { 0 }, b[16] = { 0 };
    CHECK_STATUS(csvf_sm4_ctr_init(&ctr, standard_key, standard_key), CSVF_OK);
    CHECK_STATUS(csvf_force_kernel(CSVF_PRIMITIVE_SM4, NULL), CSVF_OK);
    CHECK_STATUS(csvf_sm4_ctr_crypt(&ctr, a, a, 16), CSVF_OK);
    reference_ctr(b, b, 16, standard_key, standard_key, 16);
    CHECK_BYTES(a, b, 16);
    printf("       kernels tested:");
    for (size_t i = 0; i < csvf_kernel_count(CSVF_PRIMITIVE_SM4); i++)
        if (csvf_kernel_available(CSVF_PRIMITIVE_SM4, csvf_kernel_at(CSVF_PRIMITIVE_SM4, i)))
            printf(" %s", csvf_kernel_at(CSVF_PRIMITIVE_SM4, i));
    printf("\n");
}

int main(void)
{
    RUN(kernels_and_names);
    RUN(standard_vector);
    RUN(standard_vector_million_times);
    RUN(ecb_every_count);
    RUN(random_keys);
    RUN(tweak_examples);
    RUN(powers_of_alpha);
    RUN(xex_every_count);
    RUN(xts_runs);
    RUN(ctr_vector);
    RUN(ctr_lengths_and_carries);
    RUN(ctr_in_pieces);
    RUN(ctr_bad_arguments);
    return test_report();
}
