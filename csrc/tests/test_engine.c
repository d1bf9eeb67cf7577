/* The engine in one thread: what stands in DRAM, what each ASID sees, every refusal. */
#define _GNU_SOURCE
#include "engine_fixture.h"

#include "../engine/engine.h"

enum { PAGE = 4096 };
static const uint64_t high_base = UINT64_C(0xFFFFFFFFFFF00000);    /* the last MiB of the address space but a page */

/* ---- Ciphertext ---- */

/* Writes through every call, and compares DRAM with the independent transform. */
static void raw_view(uint64_t base, int standard, int model)
{
    enum { SIZE = 40 * PAGE };
    csvf_engine *engine = fixture_engine(SIZE, base, standard, model, 1);
    static uint8_t plain[SIZE], expected[SIZE], seen[SIZE];
    fixture_install(engine, 3);
    fixture_install(engine, 4);
    test_fill(plain, SIZE, 5);
    uint8_t *raw = csvf_engine_dram(engine);

    CHECK(csvf_write_pages(engine, 3, base / PAGE, plain, SIZE / PAGE) == CSVF_OK);
    fixture_cipher(expected, plain, SIZE, 3, base, standard, model, 0);
    CHECK(!memcmp(raw, expected, SIZE));
    if (model == CSVF_TWEAK_XTS) {      /* and with the bulk call of the library */
        csvf_xts xts;
        uint8_t key[32];
        fixture_key(key, 3);
        CHECK(csvf_xts_init(&xts, key, standard) == CSVF_OK);
        CHECK(csvf_xts_encrypt(&xts, seen, plain, SIZE, PAGE, base / PAGE) == CSVF_OK);
        CHECK(!memcmp(raw, seen, SIZE));
    }
    memset(seen, 0, SIZE);
    CHECK(csvf_read_pages(engine, seen, SIZE / PAGE, 3, base / PAGE) == CSVF_OK && !memcmp(seen, plain, SIZE));

    /* Another guest sees exactly the decryption under its own key; the host sees the ciphertext. */
    fixture_cipher(expected, raw, SIZE, 4, base, standard, model, 1);
    CHECK(csvf_read(engine, seen, SIZE, 4, base) == CSVF_OK && !memcmp(seen, expected, SIZE));
    CHECK(memcmp(seen, plain, SIZE));
    CHECK(csvf_read(engine, seen, SIZE, 0, base) == CSVF_OK && !memcmp(seen, raw, SIZE));
    CHECK(csvf_read(engine, seen, 100, 4, base + 77) == CSVF_OK && !memcmp(seen, expected + 77, 100));

    /* Lines, and block runs inside pages. */
    fixture_cipher(expected, plain, SIZE, 3, base, standard, model, 0);
    for (size_t at = 0; at < SIZE; at += 64) {
        uint8_t line[64];
        memset(raw + at, 0xEE, 64);
        CHECK(csvf_write_line(engine, 3, base + at, plain + at) == CSVF_OK && !memcmp(raw + at, expected + at, 64));
        CHECK(csvf_read_line(engine, line, 3, base + at) == CSVF_OK && !memcmp(line, plain + at, 64));
    }
    for (size_t at = 0; at < 2 * PAGE; at += 16 * 37)
        for (size_t length = 16; length <= 3 * PAGE; length += 16 * 51) {
            memset(raw + at, 0xEE, length);
            CHECK(csvf_write(engine, 3, base + at, plain + at, length) == CSVF_OK && !memcmp(raw + at, expected + at, length));
        }
    CHECK(!memcmp(raw, expected, SIZE));
    csvf_engine_destroy(engine);
}

static void test_raw_view(void)
{
    for (int standard = 0; standard < 2; standard++)
        for (int model = 0; model < 2; model++) {
            raw_view(0, standard, model);
            raw_view((uint64_t)1 << 40, standard, model);
            raw_view(high_base, standard, model);
        }
}

/* Every offset 0..80 and length 0..200 (and around page ends) against a shadow of the plaintext. */
static void unaligned(int model)
{
    enum { SIZE = 4 * PAGE };
    const uint64_t base = 0x10000;
    csvf_engine *engine = fixture_engine(SIZE, base, CSVF_STANDARD_GB, model, 1);
    static uint8_t shadow[SIZE], seen[SIZE], data[SIZE], cipher[SIZE];
    fixture_install(engine, 1);
    test_fill(shadow, SIZE, 1);
    CHECK(csvf_write(engine, 1, base, shadow, SIZE) == CSVF_OK);
    static const size_t starts[] = {0, PAGE - 100, 2 * PAGE - 40};
    for (size_t s = 0; s < 3; s++)
        for (size_t offset = 0; offset <= 80; offset++)
            for (size_t length = 0; length <= 200; length++) {
                const size_t at = starts[s] + offset;
                test_fill(data, length, at * 1000 + length);
                int ok = csvf_write(engine, 1, base + at, data, length) == CSVF_OK;
                memcpy(shadow + at, data, length);
                /* Around the write first (a lost or doubled edge), then the part itself by an unaligned read. */
                const size_t from = at < 48 ? 0 : (at - 48) / 16 * 16;
                ok &= csvf_read(engine, seen, 336, 1, base + from) == CSVF_OK && !memcmp(seen, shadow + from, 336);
                memset(seen, 0xA5, length + 1);
                ok &= csvf_read(engine, seen, length, 1, base + at) == CSVF_OK && !memcmp(seen, shadow + at, length) &&
                      seen[length] == 0xA5;
                CHECK(ok);
            }
    CHECK(csvf_read(engine, seen, SIZE, 1, base) == CSVF_OK && !memcmp(seen, shadow, SIZE));
    fixture_cipher(cipher, shadow, SIZE, 1, base, CSVF_STANDARD_GB, model, 0);
    CHECK(!memcmp(csvf_engine_dram(engine), cipher, SIZE));

    /* Long unaligned ones, over the limit of the small path. */
    uint64_t random = 7;
    for (int i = 0; i < 300; i++) {
        const size_t at = test_random(&random) % SIZE, length = test_random(&random) % (SIZE - at + 1);
        test_fill(data, length, (uint64_t)i);
        memcpy(shadow + at, data, length);
        int ok = csvf_write(engine, 1, base + at, data, length) == CSVF_OK;
        const size_t from = test_random(&random) % SIZE, count = test_random(&random) % (SIZE - from + 1);
        ok &= csvf_read(engine, seen, count, 1, base + from) == CSVF_OK && !memcmp(seen, shadow + from, count);
        CHECK(ok);
    }
    csvf_engine_destroy(engine);
}

static void test_unaligned(void)
{
    unaligned(CSVF_TWEAK_XTS);
    unaligned(CSVF_TWEAK_LINE);
}

/* Section 5.2's acceptance property: a page of one repeated block gives 64 groups of 4 equal ciphertext blocks, all groups different. In the
 * default model all 256 differ. */
static void test_line_model(void)
{
    uint8_t page[PAGE];
    memset(page, 0xAB, PAGE);
    for (int model = 0; model < 2; model++) {
        csvf_engine *engine = fixture_engine(2 * PAGE, 0, CSVF_STANDARD_GB, model, 1);
        fixture_install(engine, 1);
        CHECK(csvf_write_pages(engine, 1, 1, page, 1) == CSVF_OK);
        const uint8_t *raw = csvf_engine_dram(engine) + PAGE;
        for (size_t a = 0; a < 256; a++)
            for (size_t b = 0; b < a; b++)
                CHECK(!memcmp(raw + 16 * a, raw + 16 * b, 16) == (model == CSVF_TWEAK_LINE && a / 4 == b / 4));
        /* Swapping two ciphertext blocks of a line swaps the plaintext blocks in the line model only. */
        uint8_t line[64], block[16], after[64];
        for (int i = 0; i < 64; i++)
            line[i] = (uint8_t)i;
        CHECK(csvf_write_line(engine, 1, PAGE, line) == CSVF_OK);
        uint8_t *dram = csvf_engine_dram(engine) + PAGE;
        memcpy(block, dram, 16);
        memcpy(dram, dram + 32, 16);
        memcpy(dram + 32, block, 16);
        CHECK(csvf_read_line(engine, after, 1, PAGE) == CSVF_OK);
        CHECK((!memcmp(after, line + 32, 16) && !memcmp(after + 32, line, 16)) == (model == CSVF_TWEAK_LINE));
        CHECK(!memcmp(after + 16, line + 16, 16));
        csvf_engine_destroy(engine);
    }
}

/* ---- Launch ---- */

static void launch(uint32_t threads, int model, size_t start, size_t length, int linear, int tree)
{
    enum { SIZE = 600 * PAGE };
    const uint64_t base = 0x400000;
    static uint8_t plain[SIZE], cipher[SIZE], digests[32 * 600 + 1], seen[SIZE];
    csvf_engine *engine = fixture_engine(SIZE, base, CSVF_STANDARD_GB, model, threads);
    fixture_install(engine, 9);
    test_fill(plain, SIZE, start + length);
    CHECK(csvf_write(engine, 0, base, plain, SIZE) == CSVF_OK);
    memset(digests, 0x77, sizeof digests);
    csvf_sm3 sm3;
    uint8_t got[32], expected[32];
    csvf_sm3_init(&sm3);
    csvf_sm3_update(&sm3, "before", 6);
    CHECK(csvf_launch_update(engine, linear ? &sm3 : NULL, tree ? digests : NULL, 9, base + start, length) == CSVF_OK);
    if (linear) {
        csvf_sm3 again;
        csvf_sm3_init(&again);
        csvf_sm3_update(&again, "before", 6);
        csvf_sm3_update(&again, plain + start, length);
        csvf_sm3_final(&again, expected);
        csvf_sm3_final(&sm3, got);
        CHECK(!memcmp(got, expected, 32));
    }
    for (size_t i = 0; tree && i < length / PAGE; i++) {
        csvf_sm3_digest(expected, plain + start + i * PAGE, PAGE);
        CHECK(!memcmp(digests + 32 * i, expected, 32));
    }
    CHECK(digests[tree ? length / PAGE * 32 : 0] == 0x77);
    memcpy(cipher, plain, SIZE);
    fixture_cipher(cipher + start, plain + start, length, 9, base + start, CSVF_STANDARD_GB, model, 0);
    CHECK(!memcmp(csvf_engine_dram(engine), cipher, SIZE));
    CHECK(csvf_read(engine, seen, length, 9, base + start) == CSVF_OK && !memcmp(seen, plain + start, length));
    csvf_stats stats = {.struct_size = sizeof stats};
    CHECK(csvf_engine_stats(engine, &stats) == CSVF_OK && stats.bytes_encrypted == length && stats.bytes_decrypted == length);
    csvf_engine_destroy(engine);
}

static void test_launch(void)
{
    for (uint32_t threads = 1; threads <= 3; threads++)
        for (int model = 0; model < 2; model++) {
            launch(threads, model, 0, 0, 1, 1);
            launch(threads, model, PAGE, PAGE, 1, 1);
            launch(threads, model, 0, 33 * PAGE, 1, 1);
            launch(threads, model, 2 * PAGE, 597 * PAGE, 1, 1);
            launch(threads, model, 2 * PAGE, 597 * PAGE, 0, 1);
            launch(threads, model, 0, 600 * PAGE, 1, 0);
            launch(threads, model, 48, 16, 1, 0);
            launch(threads, model, PAGE - 16, 300 * PAGE + 32, 1, 0);
            launch(threads, model, 16, 4080 + 129 * PAGE + 4080, 0, 0);
        }
}

/* ---- Keys ---- */

static void test_keys(void)
{
    csvf_engine *engine = fixture_engine(PAGE, 0, CSVF_STANDARD_GB, CSVF_TWEAK_XTS, 1);
    uint8_t key[32], bad[32], line[64], again[64];
    uint64_t generation = 99;
    int installed = 99;
    fixture_key(key, 1);
    memcpy(bad, key, 16);
    memcpy(bad + 16, key, 16);

    CHECK(csvf_asid_state(engine, &generation, &installed, 1) == CSVF_OK && generation == 0 && installed == 0);
    CHECK(csvf_asid_state(engine, NULL, NULL, 509) == CSVF_OK);
    CHECK(csvf_asid_state(engine, NULL, NULL, 510) == CSVF_ERR_ASID && csvf_asid_state(engine, NULL, NULL, 0) == CSVF_ERR_ASID);
    CHECK(csvf_asid_install(engine, 1, bad, 32) == CSVF_ERR_KEY);
    CHECK(csvf_asid_state(engine, &generation, &installed, 1) == CSVF_OK && generation == 0 && installed == 0);
    CHECK(csvf_asid_install(engine, 1, key, 31) == CSVF_ERR_LENGTH && csvf_asid_install(engine, 1, key, 33) == CSVF_ERR_LENGTH &&
          csvf_asid_install(engine, 1, key, 0) == CSVF_ERR_LENGTH);
    CHECK(csvf_asid_install(engine, 0, key, 32) == CSVF_ERR_ASID && csvf_asid_install(engine, 510, key, 32) == CSVF_ERR_ASID &&
          csvf_asid_install(engine, UINT32_MAX, key, 32) == CSVF_ERR_ASID);
    CHECK(csvf_asid_install(engine, 1, NULL, 32) == CSVF_ERR_ARGUMENT && csvf_asid_install(NULL, 1, key, 32) == CSVF_ERR_ARGUMENT);
    CHECK(csvf_asid_remove(engine, 1) == CSVF_ERR_ASID && csvf_asid_remove(engine, 0) == CSVF_ERR_ASID);

    CHECK(csvf_asid_install(engine, 1, key, 32) == CSVF_OK && csvf_asid_install(engine, 1, key, 32) == CSVF_ERR_BUSY);
    CHECK(csvf_asid_state(engine, &generation, &installed, 1) == CSVF_OK && generation == 1 && installed == 1);
    memset(line, 0x42, 64);
    CHECK(csvf_write_line(engine, 1, 64, line) == CSVF_OK && csvf_read_line(engine, again, 1, 64) == CSVF_OK && !memcmp(line, again, 64));
    CHECK(csvf_asid_remove(engine, 1) == CSVF_OK && csvf_asid_remove(engine, 1) == CSVF_ERR_ASID);
    memset(again, 0x11, 64);
    CHECK(csvf_read_line(engine, again, 1, 64) == CSVF_ERR_ASID && again[0] == 0x11 && again[63] == 0x11);
    CHECK(csvf_asid_state(engine, &generation, &installed, 1) == CSVF_OK && generation == 1 && installed == 0);

    /* A new key for the same ASID must not meet a cached tweak of the old one. */
    fixture_key(key, 2);
    CHECK(csvf_asid_install(engine, 1, key, 32) == CSVF_OK);
    CHECK(csvf_asid_state(engine, &generation, &installed, 1) == CSVF_OK && generation == 2 && installed == 1);
    uint8_t expected[64];
    fixture_cipher(expected, csvf_engine_dram(engine) + 64, 64, 2, 64, CSVF_STANDARD_GB, CSVF_TWEAK_XTS, 1);
    CHECK(csvf_read_line(engine, again, 1, 64) == CSVF_OK && !memcmp(again, expected, 64) && memcmp(again, line, 64));
    csvf_engine_destroy(engine);

    /* The widest table, its last ASID. */
    const csvf_config config = {.struct_size = sizeof config, .asid_max = 65535};
    CHECK(csvf_engine_create(&engine, PAGE, &config) == CSVF_OK);
    CHECK(csvf_asid_install(engine, 65535, key, 32) == CSVF_OK && csvf_asid_install(engine, 65536, key, 32) == CSVF_ERR_ASID);
    CHECK(csvf_write(engine, 65535, 1, line, 50) == CSVF_OK && csvf_read(engine, again, 50, 65535, 1) == CSVF_OK && !memcmp(line, again, 50));
    csvf_engine_destroy(engine);
}

/* After removal neither the expanded key nor any tweak made with it is left; another guest's stay. */
static void test_wipe(void)
{
    csvf_engine *engine = fixture_engine(600 * PAGE, 0, CSVF_STANDARD_GB, CSVF_TWEAK_XTS, 1);
    uint8_t line[64] = {1};
    fixture_install(engine, 1);
    fixture_install(engine, 2);
    for (uint64_t pfn = 0; pfn < 600; pfn++)
        CHECK(csvf_write_line(engine, 1 + pfn % 2, pfn * PAGE, line) == CSVF_OK);
    static const csvf_xts zero;
    CHECK(memcmp(&engine->keys.keys[1], &zero, sizeof zero) && memcmp(&engine->keys.keys[2], &zero, sizeof zero));
    CHECK(csvf_asid_remove(engine, 1) == CSVF_OK);
    CHECK(!memcmp(&engine->keys.keys[1], &zero, sizeof zero) && memcmp(&engine->keys.keys[2], &zero, sizeof zero));
    size_t tweaks = 0;
    int is_wiped = 1;
    for (size_t i = 0; i < CSVF__TWEAK_ENTRIES; i++) {
        csvf__tweak_entry *entry = &engine->tweaks.entries[i];
        is_wiped &= entry->tag ? (entry->tag & 0xFFFF) == 2 : !entry->tweak[0] && !entry->tweak[1];
        tweaks += entry->tag != 0;
    }
    CHECK(is_wiped && tweaks > 100);
    csvf_engine_destroy(engine);
}

/* The cache on its own: the tag's generation and every bit of the unit count, and forgetting is by ASID. */
static void test_tweak_cache(void)
{
    static csvf__tweakcache cache;
    const uint8_t tweak[16] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
    uint8_t found[16] = {0};
    const uint64_t tag = (uint64_t)3 << 16 | 7, unit = 0x123456789;
    CHECK(!csvf__tweak_find(&cache, found, tag, unit));
    csvf__tweak_store(&cache, tweak, tag, unit);
    CHECK(csvf__tweak_find(&cache, found, tag, unit) && !memcmp(found, tweak, 16));
    CHECK(!csvf__tweak_find(&cache, found, (uint64_t)4 << 16 | 7, unit));
    for (int bit = 0; bit < 64; bit++)
        CHECK(!csvf__tweak_find(&cache, found, tag, unit ^ UINT64_C(1) << bit));
    csvf__tweak_forget(&cache, 6);
    CHECK(csvf__tweak_find(&cache, found, tag, unit));
    csvf__tweak_forget(&cache, 7);
    CHECK(!csvf__tweak_find(&cache, found, tag, unit));
    csvf__tweak_entry *entry = csvf__tweak_entry_of(&cache, tag, unit);
    CHECK(!entry->tag && !entry->tweak[0] && !entry->tweak[1] && entry->sequence % 2 == 0);
    entry->sequence++;      /* a writer inside: neither found nor overwritten */
    csvf__tweak_store(&cache, tweak, tag, unit);
    CHECK(!csvf__tweak_find(&cache, found, tag, unit) && !entry->tag);
}

/* ---- Refusals ---- */

static void test_refusals(void)
{
    enum { SIZE = 8 * PAGE };
    const uint64_t base = 0x100000;
    csvf_engine *engine = fixture_engine(SIZE, base, CSVF_STANDARD_GB, CSVF_TWEAK_XTS, 1);
    uint8_t *raw = csvf_engine_dram(engine), buffer[2 * PAGE], untouched[2 * PAGE], *before = malloc(SIZE);
    fixture_install(engine, 1);
    test_fill(raw, SIZE, 3);
    memcpy(before, raw, SIZE);
    test_fill(buffer, sizeof buffer, 4);
    memcpy(untouched, buffer, sizeof buffer);

    static const struct { uint64_t address; size_t length; } outside[] = {
        {0xFFFFF, 1}, {0, 16}, {0x108000, 1}, {0x107FFF, 2}, {0x100000, SIZE + 1}, {UINT64_MAX, 1}, {UINT64_MAX, 2},
        {0x100000, SIZE_MAX}, {UINT64_MAX - 15, 32}, {0x108001, 0}, {0xFFFF0, 0}, {0x107FF0, (size_t)-16}};
    for (uint32_t asid = 0; asid < 2; asid++)
        for (size_t i = 0; i < sizeof outside / sizeof outside[0]; i++) {
            CHECK(csvf_write(engine, asid, outside[i].address, buffer, outside[i].length) == CSVF_ERR_RANGE);
            CHECK(csvf_read(engine, buffer, outside[i].length, asid, outside[i].address) == CSVF_ERR_RANGE);
        }
    CHECK(csvf_write(engine, 1, base + SIZE, buffer, 0) == CSVF_OK && csvf_read(engine, NULL, 0, 1, base) == CSVF_OK);
    CHECK(csvf_write(engine, 1, base + SIZE - 1, buffer, 1) == CSVF_OK);
    memcpy(raw, before, SIZE);
    static const struct { uint64_t pfn; size_t count; } outside_pages[] = {
        {0xFF, 1}, {0x108, 1}, {0x107, 2}, {0x100, 9}, {UINT64_MAX, 1}, {UINT64_MAX / PAGE + 1, 0}, {0x100, SIZE_MAX},
        {0x100, SIZE_MAX / PAGE + 2}, {((uint64_t)1 << 52) + 0x100, 1}};
    for (size_t i = 0; i < sizeof outside_pages / sizeof outside_pages[0]; i++) {
        CHECK(csvf_write_pages(engine, 1, outside_pages[i].pfn, buffer, outside_pages[i].count) == CSVF_ERR_RANGE);
        CHECK(csvf_read_pages(engine, buffer, outside_pages[i].count, 1, outside_pages[i].pfn) == CSVF_ERR_RANGE);
    }
    for (uint64_t off = 1; off < 64; off++)
        CHECK(csvf_write_line(engine, 1, base + off, buffer) == CSVF_ERR_ALIGNMENT &&
              csvf_read_line(engine, buffer, 1, base + off) == CSVF_ERR_ALIGNMENT);
    CHECK(csvf_write_line(engine, 1, base + SIZE, buffer) == CSVF_ERR_RANGE && csvf_read_line(engine, buffer, 1, 0) == CSVF_ERR_RANGE);

    static const uint32_t asids[] = {2, 509, 510, 65535, UINT32_MAX};
    for (size_t i = 0; i < 5; i++) {
        CHECK(csvf_write(engine, asids[i], base, buffer, 64) == CSVF_ERR_ASID && csvf_read(engine, buffer, 64, asids[i], base) == CSVF_ERR_ASID);
        CHECK(csvf_encrypt_in_place(engine, asids[i], base, 64) == CSVF_ERR_ASID);
    }
    CHECK(csvf_encrypt_in_place(engine, 0, base, 64) == CSVF_ERR_ASID);
    for (uint64_t off = 1; off < 16; off++) {
        CHECK(csvf_encrypt_in_place(engine, 1, base + off, 64) == CSVF_ERR_ALIGNMENT);
        CHECK(csvf_encrypt_in_place(engine, 1, base, 64 + off) == CSVF_ERR_LENGTH);
    }
    CHECK(csvf_encrypt_in_place(engine, 1, base + SIZE - 16, 32) == CSVF_ERR_RANGE);
    csvf_sm3 sm3, sm3_before;
    csvf_sm3_init(&sm3);
    sm3_before = sm3;
    CHECK(csvf_launch_update(engine, &sm3, buffer, 1, base + 16, PAGE) == CSVF_ERR_ALIGNMENT);
    CHECK(csvf_launch_update(engine, &sm3, buffer, 1, base, PAGE + 16) == CSVF_ERR_LENGTH);
    CHECK(csvf_launch_update(engine, &sm3, buffer, 2, base, PAGE) == CSVF_ERR_ASID);
    CHECK(csvf_launch_update(engine, &sm3, buffer, 1, base, SIZE + PAGE) == CSVF_ERR_RANGE);
    CHECK(csvf_launch_update(engine, &sm3, raw + 10, 1, base, PAGE) == CSVF_ERR_OVERLAP);
    CHECK(csvf_launch_update(engine, (csvf_sm3 *)(void *)raw, NULL, 1, base, PAGE) == CSVF_ERR_OVERLAP);
    CHECK(!memcmp(&sm3, &sm3_before, sizeof sm3));

    /* A buffer of the caller's inside the DRAM, at either edge, by one byte. */
    for (uint32_t asid = 0; asid < 2; asid++) {
        CHECK(csvf_write(engine, asid, base, raw + 64, 64) == CSVF_ERR_OVERLAP && csvf_read(engine, raw, 64, asid, base) == CSVF_ERR_OVERLAP);
        CHECK(csvf_write(engine, asid, base, raw - 63, 64) == CSVF_ERR_OVERLAP && csvf_read(engine, raw + SIZE - 1, 1, asid, base) == CSVF_ERR_OVERLAP);
        CHECK(csvf_write_pages(engine, asid, base / PAGE, raw, 1) == CSVF_ERR_OVERLAP && csvf_read_line(engine, raw + 5, asid, base) == CSVF_ERR_OVERLAP);
    }
    CHECK(csvf_write(engine, 1, base, NULL, 1) == CSVF_ERR_ARGUMENT && csvf_read(engine, NULL, 1, 1, base) == CSVF_ERR_ARGUMENT);
    CHECK(csvf_write(NULL, 1, base, buffer, 1) == CSVF_ERR_ARGUMENT && csvf_read(NULL, buffer, 1, 1, base) == CSVF_ERR_ARGUMENT);
    CHECK(csvf_write_line(engine, 1, base, NULL) == CSVF_ERR_ARGUMENT && csvf_read_pages(engine, NULL, 1, 1, base / PAGE) == CSVF_ERR_ARGUMENT);
    CHECK(csvf_launch_update(NULL, NULL, NULL, 1, base, 16) == CSVF_ERR_ARGUMENT && csvf_engine_sync(NULL) == CSVF_ERR_ARGUMENT);

    CHECK(!memcmp(raw, before, SIZE));
    CHECK(!memcmp(buffer, untouched, sizeof buffer));
    free(before);
    csvf_engine_destroy(engine);
    csvf_engine_destroy(NULL);
}

static int create(size_t size, csvf_config config)
{
    csvf_engine *engine = (csvf_engine *)&config;
    const int status = csvf_engine_create(&engine, size, &config);
    CHECK((status == CSVF_OK) == (engine != NULL));
    csvf_engine_destroy(engine);
    return status;
}

static void test_create(void)
{
    const csvf_config plain = {.struct_size = sizeof plain};
    csvf_config config = plain;
    csvf_engine *engine;
    CHECK(create(PAGE, plain) == CSVF_OK);
    CHECK(create(0, plain) == CSVF_ERR_LENGTH && create(PAGE - 1, plain) == CSVF_ERR_LENGTH && create(PAGE + 16, plain) == CSVF_ERR_LENGTH);
    config = plain, config.base_address = 100;
    CHECK(create(PAGE, config) == CSVF_ERR_ALIGNMENT);
    config.base_address = UINT64_MAX - 4095;
    CHECK(create(PAGE, config) == CSVF_ERR_ARGUMENT);       /* its end would be 2^64 */
    config.base_address = UINT64_MAX - 8191;
    CHECK(create(PAGE, config) == CSVF_OK && create(2 * PAGE, config) == CSVF_ERR_ARGUMENT);
    config = plain, config.standard = 2;
    CHECK(create(PAGE, config) == CSVF_ERR_ARGUMENT);
    config = plain, config.tweak_model = -1;
    CHECK(create(PAGE, config) == CSVF_ERR_ARGUMENT);
    config = plain, config.asid_max = 65536;
    CHECK(create(PAGE, config) == CSVF_ERR_ARGUMENT);
    config = plain, config.threads = 1000000;
    CHECK(create(PAGE, config) == CSVF_ERR_ARGUMENT);
    config = plain, config.struct_size = sizeof config - 1;
    CHECK(create(PAGE, config) == CSVF_ERR_ARGUMENT);
    config.struct_size = 0;
    CHECK(create(PAGE, config) == CSVF_ERR_ARGUMENT);
    struct { csvf_config config; uint64_t more; } longer = {{.struct_size = sizeof longer}, 0};
    CHECK(csvf_engine_create(&engine, PAGE, &longer.config) == CSVF_OK);
    csvf_engine_destroy(engine);
    longer.more = 1;
    CHECK(csvf_engine_create(&engine, PAGE, &longer.config) == CSVF_ERR_ARGUMENT && !engine);
    CHECK(csvf_engine_create(NULL, PAGE, NULL) == CSVF_ERR_ARGUMENT);
    const int huge = create((size_t)1 << 62, plain);
    CHECK(huge == CSVF_ERR_MEMORY);
    CHECK(create(SIZE_MAX / PAGE * PAGE, plain) == CSVF_ERR_MEMORY);

    static _Alignas(64) uint8_t ram[2 * PAGE + 64];
    CHECK(csvf_engine_create_on(&engine, ram + 1, PAGE, NULL) == CSVF_ERR_ALIGNMENT && !engine);
    CHECK(csvf_engine_create_on(&engine, ram + 32, PAGE, NULL) == CSVF_ERR_ALIGNMENT && !engine);
    CHECK(csvf_engine_create_on(&engine, NULL, PAGE, NULL) == CSVF_ERR_ARGUMENT && !engine);
    CHECK(csvf_engine_create_on(&engine, ram, PAGE + 1, NULL) == CSVF_ERR_LENGTH && !engine);
    CHECK(csvf_engine_create_on(&engine, ram + 64, 2 * PAGE, NULL) == CSVF_OK);
    CHECK(csvf_engine_dram(engine) == ram + 64 && csvf_engine_size(engine) == 2 * PAGE && csvf_engine_base(engine) == 0);
    fixture_install(engine, 1);
    uint8_t line[64] = {1}, expected[64];
    CHECK(csvf_write_line(engine, 1, PAGE + 64, line) == CSVF_OK);
    csvf_engine_destroy(engine);        /* the caller's memory keeps its ciphertext */
    fixture_cipher(expected, line, 64, 1, PAGE + 64, CSVF_STANDARD_GB, CSVF_TWEAK_XTS, 0);
    CHECK(!memcmp(ram + 64 + PAGE + 64, expected, 64));

    /* Fresh memory is zero and belongs to the host. */
    engine = fixture_engine(3 << 20, 0, CSVF_STANDARD_GB, CSVF_TWEAK_XTS, 1);
    int is_zero = (uintptr_t)csvf_engine_dram(engine) % PAGE == 0;
    for (size_t i = 0; i < 3 << 20; i++)
        is_zero &= csvf_engine_dram(engine)[i] == 0;
    CHECK(is_zero);
    csvf_engine_destroy(engine);
}

static void test_file(void)
{
    char name[] = "/tmp/csvfast-test-XXXXXX";
    const int fd = mkstemp(name);
    CHECK(fd >= 0 && unlink(name) == 0 && ftruncate(fd, 5 * PAGE + 100) == 0);
    csvf_engine *engine;
    CHECK(csvf_engine_create_file(&engine, fd, PAGE, 5 * PAGE, NULL) == CSVF_ERR_LENGTH && !engine);
    CHECK(csvf_engine_create_file(&engine, fd, 100, PAGE, NULL) == CSVF_ERR_ALIGNMENT && !engine);
    CHECK(csvf_engine_create_file(&engine, fd, 0, 100, NULL) == CSVF_ERR_LENGTH && !engine);
    CHECK(csvf_engine_create_file(&engine, -1, 0, PAGE, NULL) == CSVF_ERR_SYSTEM && !engine);
    CHECK(csvf_engine_create_file(&engine, fd, UINT64_MAX / PAGE * PAGE, PAGE, NULL) == CSVF_ERR_ARGUMENT && !engine);
    int pipes[2];
    CHECK(pipe(pipes) == 0 && csvf_engine_create_file(&engine, pipes[0], 0, PAGE, NULL) == CSVF_ERR_ARGUMENT && !engine);
    close(pipes[0]), close(pipes[1]);

    uint8_t page[PAGE], expected[PAGE], seen[PAGE];
    test_fill(page, PAGE, 8);
    CHECK(csvf_engine_create_file(&engine, fd, PAGE, 4 * PAGE, NULL) == CSVF_OK);
    fixture_install(engine, 6);
    CHECK(csvf_write_pages(engine, 6, 2, page, 1) == CSVF_OK && csvf_engine_sync(engine) == CSVF_OK);
    fixture_cipher(expected, page, PAGE, 6, 2 * PAGE, CSVF_STANDARD_GB, CSVF_TWEAK_XTS, 0);
    CHECK(pread(fd, seen, PAGE, 3 * PAGE) == PAGE && !memcmp(seen, expected, PAGE));
    csvf_engine_destroy(engine);

    /* Another engine over the same file with the same key goes on where the first one ended. */
    CHECK(csvf_engine_create_file(&engine, fd, PAGE, 4 * PAGE, NULL) == CSVF_OK);
    close(fd);
    fixture_install(engine, 6);
    CHECK(csvf_read_pages(engine, seen, 1, 6, 2) == CSVF_OK && !memcmp(seen, page, PAGE));
    csvf_engine_destroy(engine);
}

/* ---- Statistics ---- */

static void test_stats(void)
{
    csvf_engine *engine = fixture_engine(64 * PAGE, 0, CSVF_STANDARD_GB, CSVF_TWEAK_XTS, 1);
    csvf_stats stats = {.struct_size = sizeof stats};
    static uint8_t data[64 * PAGE];
    fixture_install(engine, 1);
    fixture_install(engine, 2);
    CHECK(csvf_asid_remove(engine, 2) == CSVF_OK);
    CHECK(csvf_write(engine, 1, 0, data, 10 * PAGE) == CSVF_OK);    /* bulk: no tweak lookups */
    CHECK(csvf_write(engine, 1, 100, data, 20) == CSVF_OK);         /* two edge blocks, there and back: miss, hit */
    CHECK(csvf_read(engine, data, 10, 1, 3) == CSVF_OK);            /* one block: hit */
    CHECK(csvf_write_line(engine, 1, 20 * PAGE, data) == CSVF_OK);  /* miss */
    CHECK(csvf_read_line(engine, data, 1, 20 * PAGE) == CSVF_OK);   /* hit */
    CHECK(csvf_write(engine, 0, 5, data, 1000) == CSVF_OK && csvf_read(engine, data, 17, 0, 5) == CSVF_OK);
    CHECK(csvf_encrypt_in_place(engine, 1, 30 * PAGE, 2 * PAGE) == CSVF_OK);
    CHECK(csvf_write(engine, 1, 0, data, 0) == CSVF_OK && csvf_write(engine, 7, 0, data, 16) == CSVF_ERR_ASID);
    CHECK(csvf_engine_stats(engine, &stats) == CSVF_OK);
    CHECK(stats.bytes_encrypted == 10 * PAGE + 32 + 64 + 2 * PAGE);
    CHECK(stats.bytes_decrypted == 32 + 16 + 64);
    CHECK(stats.bytes_host == 1017 && stats.read_modify_writes == 2);
    CHECK(stats.tweak_misses == 2 && stats.tweak_hits == 3);
    CHECK(stats.keys_installed == 2 && stats.keys_removed == 1 && stats.asids_active == 1);
    CHECK(stats.struct_size == sizeof stats);
    stats.struct_size = sizeof stats - 8;
    CHECK(csvf_engine_stats(engine, &stats) == CSVF_ERR_ARGUMENT && csvf_engine_stats(engine, NULL) == CSVF_ERR_ARGUMENT &&
          csvf_engine_stats(NULL, &stats) == CSVF_ERR_ARGUMENT);
    csvf_engine_destroy(engine);
}

int main(void)
{
    RUN(test_raw_view);
    RUN(test_unaligned);
    RUN(test_line_model);
    RUN(test_launch);
    RUN(test_keys);
    RUN(test_wipe);
    RUN(test_tweak_cache);
    RUN(test_refusals);
    RUN(test_create);
    RUN(test_file);
    RUN(test_stats);
    return test_report();
}
