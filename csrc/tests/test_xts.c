/* SM4-XTS: vectors of both standards, every class of unit size, stealing, spans, lines and refusals, on every kernel this CPU can run. */
#include "test.h"

#include "../include/csvfast.h"
#include "../sm4/sm4_xts.h"
#include "reference_sm4.h"

static uint8_t key[32];          /* 00 01 .. 1f */
static const char *kernel_name;  /* the kernel in use */

static void with_each_kernel(void (*function)(void))
{
    unsigned tried = 0;
    for (size_t i = 0; i < csvf_kernel_count(CSVF_PRIMITIVE_SM4); i++) {
        kernel_name = csvf_kernel_at(CSVF_PRIMITIVE_SM4, i);
        if (!csvf_kernel_available(CSVF_PRIMITIVE_SM4, kernel_name))
            continue;
        CHECK_STATUS(csvf_force_kernel(CSVF_PRIMITIVE_SM4, kernel_name), CSVF_OK);
        CHECK(strcmp(csvf_kernel_name(CSVF_PRIMITIVE_SM4), kernel_name) == 0);
        function();
        tried++;
    }
    CHECK(tried > 0);
    CHECK_STATUS(csvf_force_kernel(CSVF_PRIMITIVE_SM4, NULL), CSVF_OK);
}

/* ---- Vectors ------------------------------------------------------------------------------------------------------ */

/* OpenSSL test/recipes/30-test_evp_data/evpciph_sm4.txt; the IEEE result of the second one computed from the definition. */
static const struct { const char *key, *iv, *plain, *gb, *ieee; } unit_vectors[] = {
    { "2B7E151628AED2A6ABF7158809CF4F3C 000102030405060708090A0B0C0D0E0F", "F0F1F2F3F4F5F6F7F8F9FAFBFCFDFEFF",
      "6BC1BEE22E409F96E93D7E117393172A AE2D8A571E03AC9C9EB76FAC45AF8E51 30C81C46A35CE411E5FBC1191A0A52EF F69F2445DF4F9B17",
      "E9538251C71D7B80BBE4483FEF497BD1 2C5C581BD6242FC51E08964FB4F60FDB 0BA42F63499279213D318D2C11F6886E 903BE7F93A1B3479",
      "E9538251C71D7B80BBE4483FEF497BD1 B3DB1A3E60408C575D63FF7DB39F8326 0869F9E2585FEC9F0B863BF8FD784B86 27D16C0DB6D2CFC7" },
    { "FFFEFDFCFBFAF9F8F7F6F5F4F3F2F1F0 BFBEBDBCBBBAB9B8B7B6B5B4B3B2B1B0", "9A785634120000000000000000000000",
      "000102030405060708090A0B0C0D0E0F10", "9E52443A35410CA0BA5637B94C0766F469", "98940CEB051BD5BDF267902F6B1B741C69" },
};

static void unit_vectors_here(void)
{
    for (size_t v = 0; v < sizeof unit_vectors / sizeof *unit_vectors; v++)
        for (int standard = 0; standard < 2; standard++) {
            uint8_t k[32], iv[16], plain[64], want[64], out[64];
            csvf_xts xts;
            test_case("%s, vector %zu, standard %d", kernel_name, v, standard);
            test_hex(k, 32, unit_vectors[v].key);
            test_hex(iv, 16, unit_vectors[v].iv);
            const size_t length = test_hex(plain, 64, unit_vectors[v].plain);
            CHECK(test_hex(want, 64, standard ? unit_vectors[v].ieee : unit_vectors[v].gb) == length);
            CHECK_STATUS(csvf_xts_init(&xts, k, standard), CSVF_OK);
            CHECK_STATUS(csvf_xts_encrypt_unit(&xts, out, plain, length, iv), CSVF_OK);
            CHECK_BYTES(out, want, length);
            CHECK_STATUS(csvf_xts_decrypt_unit(&xts, out, out, length, iv), CSVF_OK);
            CHECK_BYTES(out, plain, length);
        }
}
static void openssl_vectors(void) { with_each_kernel(unit_vectors_here); }

static const struct { uint64_t pfn; int standard; const char *head, *digest; } page_vectors[] = {
    { 0, CSVF_STANDARD_GB, "2cfe26c802ab254b7354e0b54b39032c74ed5fb0833faeda5b25682fc8e0b2e4", "4ae9d3c112c1100e8ddb25ee1882238ab1ebd1ded1608d2e71758882cd252a41" },
    { 0, CSVF_STANDARD_IEEE, "2cfe26c802ab254b7354e0b54b39032c1dbbe7bb3b6bcd0bc12944107d35e92e", "d8b5c9aad4bd7a81c7e3aee2e85f657dac65c53d69421a07265964d75eccfe45" },
    { 1, CSVF_STANDARD_GB, "4c89a9e3bd286cca7e445f9263f7698f40e31f1e0667958d5c4a8dcb8cc8f953", "c9dae932bbd42a71e35e9d6bfbff770cfed3b0f4c4ff374481f3ffccee47c25a" },
    { 1, CSVF_STANDARD_IEEE, "4c89a9e3bd286cca7e445f9263f7698f14334a250b00fef07e0af6803c9e8a10", "52d47953a23f3ffdc959a5ee599bc1cd29f037560242850e6d1760219c5741a7" },
    { 0x12345, CSVF_STANDARD_GB, "e31f69233a4baf09683049f7fdac99cad3286be931e1bc21e73166cfc199004e", "9d25d5e92ddf41fdf0c874690ef662ad8d0389a55941657d4fce8d1ed5488cca" },
    { 0x12345, CSVF_STANDARD_IEEE, "e31f69233a4baf09683049f7fdac99ca96eac24ca33ad381eb992895de5c57c2", "6988acca22233ebfcd13414abe80a8c44c0f17d40ade12034858040bca2bfa47" },
};

static void page_vectors_here(void)
{
    for (size_t v = 0; v < sizeof page_vectors / sizeof *page_vectors; v++) {
        static uint8_t plain[CSVF_PAGE_BYTES], page[CSVF_PAGE_BYTES];
        uint8_t head[32], digest[32], got[32];
        csvf_xts xts;
        test_case("%s, page vector %zu", kernel_name, v);
        test_hex(head, 32, page_vectors[v].head);
        test_hex(digest, 32, page_vectors[v].digest);
        for (size_t i = 0; i < sizeof plain; i++)
            plain[i] = (uint8_t)i;
        CHECK_STATUS(csvf_xts_init(&xts, key, page_vectors[v].standard), CSVF_OK);
        CHECK_STATUS(csvf_xts_encrypt(&xts, page, plain, sizeof page, CSVF_PAGE_BYTES, page_vectors[v].pfn), CSVF_OK);
        CHECK_BYTES(page, head, 32);
        csvf_sm3_digest(got, page, sizeof page);
        CHECK_BYTES(got, digest, 32);
        CHECK_STATUS(csvf_xts_decrypt(&xts, page, page, sizeof page, CSVF_PAGE_BYTES, page_vectors[v].pfn), CSVF_OK);
        CHECK_BYTES(page, plain, sizeof page);
    }
}
static void page_model_vectors(void) { with_each_kernel(page_vectors_here); }

/* ---- Units -------------------------------------------------------------------------------------------------------- */

/* Encrypts and decrypts buffers that end at a guard page, apart and in place, and compares with the reference. */
static void compare(test_guarded in, test_guarded out, size_t length, size_t unit_size, uint64_t unit, int standard)
{
    static uint8_t data[1 << 17], want[1 << 17];
    csvf_xts xts;
    test_case("%s, standard %d, %zu bytes in units of %zu from %llu", kernel_name, standard, length, unit_size, (unsigned long long)unit);
    if (length > sizeof data)
        abort();
    test_fill(data, length, length * 31 + unit_size);
    reference_xts_units(want, data, length, unit_size, unit, key, standard, 0);
    uint8_t *i = in.end - length, *o = out.end - length;
    memcpy(i, data, length);
    CHECK_STATUS(csvf_xts_init(&xts, key, standard), CSVF_OK);
    CHECK_STATUS(csvf_xts_encrypt(&xts, o, i, length, unit_size, unit), CSVF_OK);
    CHECK_BYTES(o, want, length);
    CHECK_BYTES(i, data, length);
    CHECK_STATUS(csvf_xts_encrypt(&xts, i, i, length, unit_size, unit), CSVF_OK);
    CHECK_BYTES(i, want, length);
    memset(o, 0x5a, length);
    CHECK_STATUS(csvf_xts_decrypt(&xts, o, i, length, unit_size, unit), CSVF_OK);
    CHECK_BYTES(o, data, length);
    CHECK_STATUS(csvf_xts_decrypt(&xts, i, i, length, unit_size, unit), CSVF_OK);
    CHECK_BYTES(i, data, length);
}

static void lengths_here(void)
{
    test_guarded in = test_guard(1 << 17), out = test_guard(1 << 17);
    for (int standard = 0; standard < 2; standard++) {
        /* one unit of every length */
        for (size_t length = 16; length <= 600; length++)
            compare(in, out, length, 4096, 7, standard);
        /* all lengths as units of 16, the last one never under 16 */
        for (size_t length = 0; length <= 600; length += 16)
            compare(in, out, length, 16, 3, standard);
        /* a short last unit after several whole ones */
        for (size_t length = 0; length <= 600; length++)
            if (length % 64 == 0 || length % 64 >= 16)
                compare(in, out, length, 64, UINT64_MAX - 20, standard);
    }
    test_unguard(in);
    test_unguard(out);
}
static void lengths_0_to_600(void) { with_each_kernel(lengths_here); }

static void unit_sizes_here(void)
{
    static const size_t sizes[] = { 16, 17, 31, 32, 33, 47, 48, 64, 100, 128, 255, 256, 500, 512, 520, 528, 1000, 1023, 1024, 1025, 1040, 1041,
                                    2048, 2049, 3000, 4096, 4097, 4104, 4160, 5000, 8192, 10000, 65536, 65537 };
    test_guarded in = test_guard(1 << 17), out = test_guard(1 << 17);
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
        for (int standard = 0; standard < 2; standard++) {
            const size_t size = sizes[s];
            for (size_t units = 1; units <= 5 && size * units <= 1 << 17; units++)
                compare(in, out, size * units, size, 1000 * units, standard);
            if (2 * size + 16 + size / 2 <= 1 << 17 && size > 33)
                compare(in, out, 2 * size + 16 + size / 2 % (size - 16), size, UINT32_MAX - 1, standard);
            /* more units than are batched anywhere */
            const size_t many = 300 * size <= 1 << 17 ? 300 : (1 << 17) / size;
            compare(in, out, many * size, size, 1, standard);
        }
    test_unguard(in);
    test_unguard(out);
}
static void unit_sizes(void) { with_each_kernel(unit_sizes_here); }

/* One unit of 16 MiB, the largest: compared at its ends and by a round trip, and by spans from its middle. */
static void largest_here(void)
{
    const size_t length = CSVF_XTS_UNIT_MAX;
    uint8_t *data = malloc(length), *out = malloc(length), head[4096], part[4096];
    csvf_xts xts;
    test_case("%s", kernel_name);
    if (!data || !out)
        abort();
    test_fill(data, length, 9);
    for (int standard = 0; standard < 2; standard++) {
        uint8_t iv[16];
        CHECK_STATUS(csvf_xts_init(&xts, key, standard), CSVF_OK);
        CHECK_STATUS(csvf_xts_encrypt(&xts, out, data, length, length, 77), CSVF_OK);
        reference_unit_iv(iv, 77);
        reference_xts(head, data, sizeof head, iv, key, standard, 0);
        CHECK_BYTES(out, head, sizeof head);
        const size_t offsets[] = { 16, 4096, 8 << 20, length - 4096 };
        for (size_t i = 0; i < 4; i++) {
            CHECK_STATUS(csvf_xts_encrypt_span(&xts, part, data + offsets[i], sizeof part, 77, offsets[i]), CSVF_OK);
            CHECK_BYTES(part, out + offsets[i], sizeof part);
        }
        uint8_t tweak[16];
        reference_sm4(tweak, iv, key + 16, 0);
        for (size_t j = 0; j < length / 16 - 1; j++)
            reference_times_alpha(tweak, standard);
        reference_xex(head, data + length - 16, tweak, key, 0);
        CHECK_BYTES(out + length - 16, head, 16);
        CHECK_STATUS(csvf_xts_decrypt(&xts, out, out, length, length, 77), CSVF_OK);
        CHECK_BYTES(out, data, length);
    }
    free(data);
    free(out);
}
static void largest_unit(void) { with_each_kernel(largest_here); }

static void unaligned_here(void)
{
    static uint8_t data[3 * 4096 + 64], want[3 * 4096];
    test_guarded in = test_guard(4 * 4096), out = test_guard(4 * 4096);
    csvf_xts xts;
    test_fill(data, sizeof data, 21);
    CHECK_STATUS(csvf_xts_init(&xts, key, CSVF_STANDARD_GB), CSVF_OK);
    reference_xts_units(want, data, sizeof want, 4096, 5, key, 0, 0);
    for (size_t a = 0; a < 64; a += 7)
        for (size_t b = 0; b < 64; b += 9) {
            test_case("%s, in +%zu, out +%zu", kernel_name, a, b);
            memcpy(in.first + a, data, sizeof want);
            memset(out.first, 0xee, sizeof want + 128);
            CHECK_STATUS(csvf_xts_encrypt(&xts, out.first + b, in.first + a, sizeof want, 4096, 5), CSVF_OK);
            CHECK_BYTES(out.first + b, want, sizeof want);
            CHECK(out.first[b + sizeof want] == 0xee && (b == 0 || out.first[b - 1] == 0xee));
        }
    test_unguard(in);
    test_unguard(out);
}
static void unaligned_pages(void) { with_each_kernel(unaligned_here); }

/* Pages by the internal call the engine uses, and tweaks of scattered units. */
static void pages_here(void)
{
    static uint8_t data[200 * 4096], want[sizeof data], out[sizeof data];
    csvf_xts xts;
    test_fill(data, sizeof data, 71);
    for (int standard = 0; standard < 2; standard++) {
        CHECK_STATUS(csvf_xts_init(&xts, key, standard), CSVF_OK);
        reference_xts_units(want, data, sizeof data, 4096, UINT64_MAX - 199, key, standard, 0);
        for (size_t n = 0; n <= 200; n += n < 5 ? 1 : 39) {
            test_case("%s, standard %d, %zu pages", kernel_name, standard, n);
            memset(out, 0, sizeof out);
            csvf__xts_pages(&xts, out, data, UINT64_MAX - 199, n, 0);
            CHECK_BYTES(out, want, 4096 * n);
            csvf__xts_pages(&xts, out, out, UINT64_MAX - 199, n, 1);
            CHECK_BYTES(out, data, 4096 * n);
            CHECK(n == 200 || out[4096 * n] == 0);
        }
    }
    const uint64_t units[5] = { 0, 1, 1u << 20, UINT64_MAX, 0x123456789abcdefu };
    uint8_t tweaks[80], iv[16], one[16];
    csvf__xts_unit_tweaks(&xts, tweaks, units, 5);
    for (size_t i = 0; i < 5; i++) {
        reference_unit_iv(iv, units[i]);
        reference_sm4(one, iv, key + 16, 0);
        CHECK_BYTES(tweaks + 16 * i, one, 16);
    }
}
static void engine_pages(void) { with_each_kernel(pages_here); }

/* ---- Spans and lines ---------------------------------------------------------------------------------------------- */

static void spans_here(void)
{
    static uint8_t data[4096], want[4096];
    test_guarded in = test_guard(4096), out = test_guard(4096);
    csvf_xts xts;
    uint64_t seed = 5;
    test_fill(data, sizeof data, 81);
    for (int standard = 0; standard < 2; standard++) {
        CHECK_STATUS(csvf_xts_init(&xts, key, standard), CSVF_OK);
        reference_xts_units(want, data, 4096, 4096, 0xabcdef, key, standard, 0);
        for (int round = 0; round < 400; round++) {
            /* every 64-byte line first, then any span */
            const size_t offset = round < 64 ? 64 * (size_t)round : 16 * (test_random(&seed) % 256);
            const size_t length = round < 64 ? 64 : 16 * (test_random(&seed) % (257 - offset / 16));
            test_case("%s, standard %d, %zu bytes at %zu", kernel_name, standard, length, offset);
            uint8_t *i = in.end - length, *o = out.end - length;
            memcpy(i, data + offset, length);
            CHECK_STATUS(csvf_xts_encrypt_span(&xts, o, i, length, 0xabcdef, offset), CSVF_OK);
            CHECK_BYTES(o, want + offset, length);
            CHECK_STATUS(csvf_xts_decrypt_span(&xts, o, o, length, 0xabcdef, offset), CSVF_OK);
            CHECK_BYTES(o, data + offset, length);
        }
    }
    test_unguard(in);
    test_unguard(out);
}
static void spans(void) { with_each_kernel(spans_here); }

static void lines_here(void)
{
    enum { PAGES = 12, MOST = 700 };
    static uint8_t data[PAGES * 4096], want[PAGES * 4096], packed[MOST * 64];
    test_guarded in = test_guard(MOST * 64), out = test_guard(MOST * 64);
    uint64_t addresses[MOST], seed = 6;
    const uint64_t base = UINT64_C(0xfedcba9876543000);
    csvf_xts xts;
    test_fill(data, sizeof data, 91);
    for (int standard = 0; standard < 2; standard++) {
        CHECK_STATUS(csvf_xts_init(&xts, key, standard), CSVF_OK);
        reference_xts_units(want, data, sizeof data, 4096, base / 4096, key, standard, 0);
        for (size_t n = 0; n <= MOST; n += n < 20 ? 1 : 68)
            for (int order = 0; order < 2; order++) {
                test_case("%s, standard %d, %zu lines, order %d", kernel_name, standard, n, order);
                uint8_t *i = in.end - 64 * n, *o = out.end - 64 * n;
                for (size_t l = 0; l < n; l++) {
                    const uint64_t place = order ? test_random(&seed) % (PAGES * 64) : l % (PAGES * 64);
                    addresses[l] = base + 64 * place;
                    memcpy(i + 64 * l, data + 64 * place, 64);
                    memcpy(packed + 64 * l, want + 64 * place, 64);
                }
                CHECK_STATUS(csvf_xts_encrypt_lines(&xts, o, i, addresses, n), CSVF_OK);
                CHECK_BYTES(o, packed, 64 * n);
                CHECK_STATUS(csvf_xts_decrypt_lines(&xts, o, o, addresses, n), CSVF_OK);
                CHECK_BYTES(o, i, 64 * n);
            }
    }
    test_unguard(in);
    test_unguard(out);
}
static void scattered_lines(void) { with_each_kernel(lines_here); }

/* ---- Kernels against each other, and refusals --------------------------------------------------------------------- */

static void kernels_agree(void)
{
    static uint8_t data[100000], first[sizeof data], other[sizeof data];
    uint64_t seed = 1234;
    for (int round = 0; round < 60; round++) {
        uint8_t k[32];
        const size_t unit_size = round % 3 ? 16 + test_random(&seed) % 9000 : 4096;
        size_t length = test_random(&seed) % sizeof data;
        if (length % unit_size < 16)
            length -= length % unit_size;
        const uint64_t unit = test_random(&seed) >> 1;
        test_fill(k, 32, test_random(&seed));
        test_fill(data, length, test_random(&seed));
        const char *reference = NULL;
        for (size_t i = 0; i < csvf_kernel_count(CSVF_PRIMITIVE_SM4); i++) {
            const char *name = csvf_kernel_at(CSVF_PRIMITIVE_SM4, i);
            csvf_xts xts;
            if (!csvf_kernel_available(CSVF_PRIMITIVE_SM4, name))
                continue;
            test_case("%s against %s, %zu bytes in units of %zu", name, reference ? reference : "nothing", length, unit_size);
            CHECK_STATUS(csvf_force_kernel(CSVF_PRIMITIVE_SM4, name), CSVF_OK);
            CHECK_STATUS(csvf_xts_init(&xts, k, round & 1), CSVF_OK);
            CHECK_STATUS(csvf_xts_encrypt(&xts, reference ? other : first, data, length, unit_size, unit), CSVF_OK);
            if (reference)
                CHECK_BYTES(other, first, length);
            reference = name;
        }
    }
    CHECK_STATUS(csvf_force_kernel(CSVF_PRIMITIVE_SM4, NULL), CSVF_OK);
}

static void refusals(void)
{
    static uint8_t buffer[3 * 4096], zero[sizeof buffer];
    uint8_t same[32];
    uint64_t address = 64, crooked[2] = { 64, 65 };
    csvf_xts xts;
    memset(same, 7, sizeof same);
    CHECK_STATUS(csvf_xts_init(NULL, key, 0), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_xts_init(&xts, NULL, 0), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_xts_init(&xts, key, 2), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_xts_init(&xts, key, -1), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_xts_init(&xts, same, 0), CSVF_ERR_KEY);
    same[31] ^= 1;
    CHECK_STATUS(csvf_xts_init(&xts, same, 0), CSVF_OK);

    int (*const both[2])(const csvf_xts *, uint8_t *, const uint8_t *, size_t, size_t, uint64_t) = { csvf_xts_encrypt, csvf_xts_decrypt };
    for (int d = 0; d < 2; d++) {
        CHECK_STATUS(both[d](NULL, buffer, buffer, 16, 16, 0), CSVF_ERR_ARGUMENT);
        CHECK_STATUS(both[d](&xts, NULL, buffer, 16, 16, 0), CSVF_ERR_ARGUMENT);
        CHECK_STATUS(both[d](&xts, buffer, NULL, 16, 16, 0), CSVF_ERR_ARGUMENT);
        CHECK_STATUS(both[d](&xts, NULL, NULL, 0, 16, 0), CSVF_OK);
        CHECK_STATUS(both[d](&xts, buffer, buffer, 15, 4096, 0), CSVF_ERR_LENGTH);
        CHECK_STATUS(both[d](&xts, buffer, buffer, 4096 + 15, 4096, 0), CSVF_ERR_LENGTH);
        CHECK_STATUS(both[d](&xts, buffer, buffer, 64, 15, 0), CSVF_ERR_LENGTH);
        CHECK_STATUS(both[d](&xts, buffer, buffer, 64, 0, 0), CSVF_ERR_LENGTH);
        CHECK_STATUS(both[d](&xts, buffer, buffer, 64, CSVF_XTS_UNIT_MAX + 1, 0), CSVF_ERR_LENGTH);
        CHECK_STATUS(both[d](&xts, buffer, buffer, 8192, 4096, UINT64_MAX), CSVF_ERR_RANGE);
        CHECK_STATUS(both[d](&xts, buffer, buffer, 4096 + 16, 4096, UINT64_MAX), CSVF_ERR_RANGE);
        CHECK_STATUS(both[d](&xts, buffer + 1, buffer, 4096, 4096, 0), CSVF_ERR_OVERLAP);
        CHECK_STATUS(both[d](&xts, buffer, buffer + 4095, 4096, 4096, 0), CSVF_ERR_OVERLAP);
    }
    CHECK_STATUS(csvf_xts_encrypt_unit(&xts, buffer, buffer, 15, zero), CSVF_ERR_LENGTH);
    CHECK_STATUS(csvf_xts_encrypt_unit(&xts, buffer, buffer, (size_t)CSVF_XTS_UNIT_MAX + 1, zero), CSVF_ERR_LENGTH);
    CHECK_STATUS(csvf_xts_decrypt_unit(&xts, buffer, buffer, 16, NULL), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_xts_decrypt_unit(&xts, buffer, buffer + 8, 16, zero), CSVF_ERR_OVERLAP);
    CHECK_STATUS(csvf_xts_encrypt_unit(&xts, buffer, zero, 64, buffer + 32), CSVF_ERR_OVERLAP);

    CHECK_STATUS(csvf_xts_encrypt_span(&xts, buffer, buffer, 17, 0, 0), CSVF_ERR_LENGTH);
    CHECK_STATUS(csvf_xts_encrypt_span(&xts, buffer, buffer, 16, 0, 8), CSVF_ERR_ALIGNMENT);
    CHECK_STATUS(csvf_xts_encrypt_span(&xts, buffer, buffer, 32, 0, CSVF_XTS_UNIT_MAX - 16), CSVF_ERR_RANGE);
    CHECK_STATUS(csvf_xts_encrypt_span(&xts, buffer, buffer, 16, 0, SIZE_MAX - 15), CSVF_ERR_RANGE);
    CHECK_STATUS(csvf_xts_decrypt_span(&xts, buffer + 16, buffer, 32, 0, 0), CSVF_ERR_OVERLAP);
    CHECK_STATUS(csvf_xts_decrypt_span(NULL, buffer, buffer, 32, 0, 0), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_xts_decrypt_span(&xts, NULL, NULL, 0, 0, 0), CSVF_OK);

    CHECK_STATUS(csvf_xts_encrypt_lines(&xts, buffer, buffer, NULL, 1), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_xts_encrypt_lines(&xts, buffer, buffer, crooked, 2), CSVF_ERR_ALIGNMENT);
    CHECK_STATUS(csvf_xts_encrypt_lines(&xts, buffer + 16, buffer, &address, 1), CSVF_ERR_OVERLAP);
    CHECK_STATUS(csvf_xts_decrypt_lines(&xts, NULL, buffer, &address, 1), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_xts_decrypt_lines(&xts, buffer, buffer, &address, SIZE_MAX / 32), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_xts_decrypt_lines(&xts, NULL, NULL, NULL, 0), CSVF_OK);
    CHECK_BYTES(buffer, zero, sizeof buffer);   /* nothing was written by any of these */

    /* the last unit number there is */
    CHECK_STATUS(csvf_xts_encrypt(&xts, buffer, buffer, 4096, 4096, UINT64_MAX), CSVF_OK);
    CHECK(memcmp(buffer, zero, 4096) != 0);
}

int main(void)
{
    for (size_t i = 0; i < sizeof key; i++)
        key[i] = (uint8_t)i;
    RUN(openssl_vectors);
    RUN(page_model_vectors);
    RUN(lengths_0_to_600);
    RUN(unit_sizes);
    RUN(largest_unit);
    RUN(unaligned_pages);
    RUN(engine_pages);
    RUN(spans);
    RUN(scattered_lines);
    RUN(kernels_agree);
    RUN(refusals);
    return test_report();
}
