/* The cache model at physical addresses: lines, levels, flushes, contexts without coherency, the fabric, replacement, arguments. */
#include "cache_fixture.h"

enum { BASE = 1 << 20, SIZE = 64 * PAGE };

static csvf_engine *engine;

static void begin(void)
{
    engine = fixture_engine(SIZE, BASE, CSVF_STANDARD_GB, CSVF_TWEAK_XTS, 1);
    fixture_install(engine, 1);
    fixture_install(engine, 2);
}

static void end(csvf_cache *cache)
{
    csvf_cache_destroy(cache);
    csvf_engine_destroy(engine);
}

/* ---- Lines ---- */

static void test_hits_touch_no_sm4(void)
{
    begin();
    const csvf_cache_config config = fixture_small();
    csvf_cache *cache = fixture_cache(engine, &config);
    uint8_t data[200], seen[200], sealed[LINE], zero[LINE] = {0};
    test_fill(data, sizeof data, 1);
    CHECK_STATUS(csvf_write(engine, 1, BASE, data, LINE), CSVF_OK);
    memcpy(sealed, csvf_engine_dram(engine), LINE);
    csvf_stats before = {.struct_size = sizeof before}, after = before;
    CHECK_STATUS(csvf_engine_stats(engine, &before), CSVF_OK);
    CHECK_STATUS(csvf_cache_read(cache, seen, LINE, 1, BASE, 1), CSVF_OK);
    CHECK_BYTES(seen, data, LINE);
    for (int i = 0; i < 100; i++) {
        CHECK_STATUS(csvf_cache_write(cache, 1, BASE + 3, data + i, 8, 1), CSVF_OK);
        CHECK_STATUS(csvf_cache_read(cache, seen, 8, 1, BASE + 3, 1), CSVF_OK);
        CHECK_BYTES(seen, data + i, 8);
    }
    CHECK_STATUS(csvf_engine_stats(engine, &after), CSVF_OK);
    CHECK(after.bytes_decrypted - before.bytes_decrypted == LINE && after.bytes_encrypted == before.bytes_encrypted);
    CHECK_BYTES(csvf_engine_dram(engine), sealed, LINE);    /* written back, not through */
    csvf_cache_stats stats = fixture_stats(cache, 1);
    CHECK(stats.reads == 101 && stats.writes == 100 && stats.misses == 1 && stats.hits[0] == 200 && stats.hits[1] == 0);
    CHECK(stats.cycles == 107 + 200 && stats.encryption_cycles == 7);

    /* Eviction encrypts. */
    memcpy(data + 3, data + 99, 8);
    csvf_cache_write_back(cache);
    fixture_cipher(sealed, data, LINE, 1, BASE, CSVF_STANDARD_GB, CSVF_TWEAK_XTS, 0);
    CHECK_BYTES(csvf_engine_dram(engine), sealed, LINE);
    stats = fixture_stats(cache, 1);
    CHECK(stats.write_backs == 1 && stats.bytes_encrypted == LINE && stats.lines_lost == 0);

    /* The host's line of the same frame is another line, of the ciphertext; the rest of the memory is untouched. */
    CHECK_STATUS(csvf_cache_read(cache, seen, LINE, 0, BASE, 0), CSVF_OK);
    CHECK_BYTES(seen, sealed, LINE);
    CHECK_BYTES(csvf_engine_dram(engine) + LINE, zero, LINE);
    stats = fixture_stats(cache, 0);
    CHECK(stats.misses == 1 && stats.bytes_decrypted == 0 && stats.encryption_cycles == 0 && stats.cycles == 100);
    end(cache);
}

static void test_long_access(void)
{
    begin();
    const csvf_cache_config config = fixture_small();
    csvf_cache *cache = fixture_cache(engine, &config);
    static uint8_t data[10 * PAGE], seen[10 * PAGE];
    test_fill(data, sizeof data, 2);
    CHECK_STATUS(csvf_cache_write(cache, 2, BASE + 37, data, sizeof data - 100, 1), CSVF_OK);
    CHECK_STATUS(csvf_cache_read(cache, seen, sizeof data - 100, 2, BASE + 37, 1), CSVF_OK);
    CHECK_BYTES(seen, data, sizeof data - 100);
    csvf_cache_write_back(cache);
    CHECK_STATUS(csvf_read(engine, seen, sizeof data - 100, 2, BASE + 37), CSVF_OK);
    CHECK_BYTES(seen, data, sizeof data - 100);
    uint64_t lines = 1;
    CHECK_STATUS(csvf_cache_contents(cache, &lines, NULL, NULL, 2), CSVF_OK);
    CHECK(lines == 0);
    end(cache);
}

static void test_levels_are_inclusive(void)
{
    begin();
    const csvf_cache_config config = fixture_small();
    csvf_cache *cache = fixture_cache(engine, &config);
    uint8_t byte;
    /* Set 0 of the second level: every fourth line. Four of its ways, then a fifth line pushes out the first. */
    for (int i = 0; i < 4; i++)
        CHECK_STATUS(csvf_cache_read(cache, &byte, 1, 1, BASE + 4 * LINE * i, 1), CSVF_OK);
    for (int i = 0; i < 2; i++)     /* kept young in the first level, old in the second, which hits above do not reach */
        CHECK_STATUS(csvf_cache_read(cache, &byte, 1, 1, BASE + 4 * LINE * 3, 1), CSVF_OK);
    csvf_cache_stats stats = fixture_stats(cache, 1);
    CHECK(stats.misses == 4 && stats.hits[0] == 2 && stats.hits[1] == 0);
    CHECK_STATUS(csvf_cache_read(cache, &byte, 1, 1, BASE, 1), CSVF_OK);            /* left the first level, is in the second */
    stats = fixture_stats(cache, 1);
    CHECK(stats.misses == 4 && stats.hits[1] == 1);
    for (int i = 4; i < 7; i++)     /* lines 1, 2, 3 go, though line 0 was the first */
        CHECK_STATUS(csvf_cache_read(cache, &byte, 1, 1, BASE + 4 * LINE * i, 1), CSVF_OK);
    CHECK_STATUS(csvf_cache_read(cache, &byte, 1, 1, BASE, 1), CSVF_OK);
    stats = fixture_stats(cache, 1);
    CHECK(stats.misses == 7 && stats.hits[1] == 2);
    CHECK_STATUS(csvf_cache_read(cache, &byte, 1, 1, BASE + 4 * LINE * 3, 1), CSVF_OK);
    stats = fixture_stats(cache, 1);
    CHECK(stats.misses == 8);
    uint64_t lines;
    CHECK_STATUS(csvf_cache_contents(cache, &lines, NULL, NULL, 1), CSVF_OK);
    CHECK(lines == 4);
    end(cache);
}

/* What a second level gives up leaves the first level too, also when the first one has just used it. */
static void test_inclusion_victim(void)
{
    begin();
    csvf_cache_config config = fixture_small();
    config.levels[0] = (csvf_cache_level){.size = 2 * LINE, .ways = 2, .cycles = 1};
    config.levels[1] = (csvf_cache_level){.size = 2 * LINE, .ways = 2, .cycles = 10};
    csvf_cache *cache = fixture_cache(engine, &config);
    uint8_t byte = 9, seen = 0;
    CHECK_STATUS(csvf_cache_write(cache, 1, BASE, &byte, 1, 1), CSVF_OK);
    CHECK_STATUS(csvf_cache_read(cache, &seen, 1, 1, BASE + LINE, 1), CSVF_OK);
    CHECK_STATUS(csvf_cache_read(cache, &seen, 1, 1, BASE, 1), CSVF_OK);            /* a hit above: the second level does not know */
    CHECK_STATUS(csvf_cache_read(cache, &seen, 1, 1, BASE + 2 * LINE, 1), CSVF_OK); /* gives up line 0 */
    CHECK_STATUS(csvf_cache_read(cache, &seen, 1, 1, BASE, 1), CSVF_OK);
    CHECK(seen == 9);
    const csvf_cache_stats stats = fixture_stats(cache, 1);
    CHECK(stats.misses == 4 && stats.hits[0] == 1 && stats.write_backs == 1);
    csvf_cache_write_back(cache);       /* what took a dirty line's place is clean */
    CHECK(fixture_stats(cache, 1).write_backs == 1);
    end(cache);

    /* The same between the first two of three levels: the line is found in the third again, not in the first. */
    begin();
    config.levels[2] = (csvf_cache_level){.size = 8 * LINE, .ways = 8, .cycles = 50};
    cache = fixture_cache(engine, &config);
    static const int uses[] = {0, 1, 0, 2, 0};
    for (int i = 0; i < 5; i++)
        CHECK_STATUS(csvf_cache_read(cache, &seen, 1, 1, BASE + (uint64_t)LINE * uses[i], 1), CSVF_OK);
    const csvf_cache_stats three = fixture_stats(cache, 1);
    CHECK(three.misses == 3 && three.hits[0] == 1 && three.hits[1] == 0 && three.hits[2] == 1);
    CHECK(three.cycles == 3 * 107 + 1 + 50);
    end(cache);
}

static void test_page_fill(void)
{
    begin();
    csvf_cache_config config = fixture_small();
    config.fill = CSVF_FILL_PAGE;
    config.levels[1] = (csvf_cache_level){.size = 128 * LINE, .ways = 4, .cycles = 10};
    csvf_cache *cache = fixture_cache(engine, &config);
    uint8_t data[PAGE], seen[PAGE];
    test_fill(data, PAGE, 3);
    CHECK_STATUS(csvf_write_pages(engine, 1, BASE / PAGE, data, 1), CSVF_OK);
    for (int i = 0; i < PAGE / LINE; i++)
        CHECK_STATUS(csvf_cache_read(cache, seen + LINE * i, LINE, 1, BASE + (uint64_t)LINE * i, 1), CSVF_OK);
    CHECK_BYTES(seen, data, PAGE);
    const csvf_cache_stats stats = fixture_stats(cache, 1);
    CHECK(stats.misses == 1 && stats.hits[0] + stats.hits[1] == 63 && stats.bytes_decrypted == PAGE);
    end(cache);

    /* A dirty line that its own page's fill pushes out keeps what was written to it: one level of eight lines. */
    begin();
    config.levels[0] = (csvf_cache_level){.size = 8 * LINE, .ways = 2, .cycles = 1};
    config.levels[1] = (csvf_cache_level){0};
    for (uint32_t fabric = 0; fabric < 4; fabric += 3) {
        config.fabric_lines = fabric;
        cache = fixture_cache(engine, &config);
        uint64_t random = 5;
        memset(data, 0, PAGE);
        CHECK_STATUS(csvf_write_pages(engine, 1, BASE / PAGE, data, 1), CSVF_OK);
        for (int i = 0; i < 2000; i++) {
            /* One byte each of a few lines, the page's last ones among them: they are what a fill leaves in the cache. */
            static const size_t places[] = {5, 20 * LINE, 58 * LINE, 60 * LINE, 61 * LINE + 1, 62 * LINE, 63 * LINE, 63 * LINE + 63};
            const size_t at = places[test_random(&random) % 8];
            data[at] = (uint8_t)test_random(&random);
            CHECK_STATUS(csvf_cache_write(cache, 1, BASE + at, data + at, 1, 1), CSVF_OK);
            const size_t look = places[test_random(&random) % 8];
            CHECK_STATUS(csvf_cache_read(cache, seen, 1, 1, BASE + look, 1), CSVF_OK);
            CHECK(seen[0] == data[look]);
        }
        csvf_cache_destroy(cache);
    }
    csvf_engine_destroy(engine);
}

/* ---- Contexts ---- */

/* The same frame under several tags: each sees its own line until it is flushed, exactly as without coherency. */
static void test_contexts_are_not_coherent(void)
{
    begin();
    const csvf_cache_config config = fixture_small();
    csvf_cache *cache = fixture_cache(engine, &config);
    uint8_t seen[16];
    CHECK_STATUS(csvf_cache_read(cache, seen, 16, 0, BASE, 0), CSVF_OK);
    CHECK_STATUS(csvf_cache_write(cache, 1, BASE, "guest 1's secret", 16, 1), CSVF_OK);
    CHECK_STATUS(csvf_cache_write(cache, 2, BASE, "guest 2's secret", 16, 1), CSVF_OK);
    CHECK_STATUS(csvf_cache_read(cache, seen, 16, 1, BASE, 1), CSVF_OK);
    CHECK_BYTES(seen, "guest 1's secret", 16);
    CHECK_STATUS(csvf_cache_read(cache, seen, 16, 2, BASE, 1), CSVF_OK);
    CHECK_BYTES(seen, "guest 2's secret", 16);

    /* Stale: what guest 1 wrote is flushed to DRAM, but the host still has its old line. CLFLUSH of the host's tag cures it. */
    uint8_t sealed[16], zero[16] = {0};
    CHECK_STATUS(csvf_cache_flush(cache, 1, BASE, 16, 1), CSVF_OK);
    fixture_cipher(sealed, (const uint8_t *)"guest 1's secret", 16, 1, BASE, CSVF_STANDARD_GB, CSVF_TWEAK_XTS, 0);
    CHECK_BYTES(csvf_engine_dram(engine), sealed, 16);
    CHECK_STATUS(csvf_cache_read(cache, seen, 16, 0, BASE, 0), CSVF_OK);
    CHECK_BYTES(seen, zero, 16);
    CHECK_STATUS(csvf_cache_flush(cache, 0, BASE, 16, 0), CSVF_OK);
    CHECK_STATUS(csvf_cache_read(cache, seen, 16, 0, BASE, 0), CSVF_OK);
    CHECK_BYTES(seen, sealed, 16);

    /* The lost update: guest 2's dirty line of the frame goes back later and wins. */
    CHECK_STATUS(csvf_cache_flush(cache, 2, BASE, 16, 1), CSVF_OK);
    CHECK_STATUS(csvf_cache_read(cache, seen, 16, 1, BASE, 1), CSVF_OK);
    CHECK(memcmp(seen, "guest 1's secret", 16) != 0);
    CHECK(memcmp(seen, "guest 2's secret", 16) != 0);

    /* Shared memory has one context: guest and host see each other at once. */
    CHECK_STATUS(csvf_cache_write(cache, 1, BASE + PAGE, "a buffer of both", 16, 0), CSVF_OK);
    CHECK_STATUS(csvf_cache_read(cache, seen, 16, 0, BASE + PAGE, 0), CSVF_OK);
    CHECK_BYTES(seen, "a buffer of both", 16);
    csvf_cache_write_back(cache);
    CHECK_BYTES(csvf_engine_dram(engine) + PAGE, "a buffer of both", 16);
    CHECK(fixture_stats(cache, 0).write_backs == 1 && fixture_stats(cache, 0).bytes_encrypted == 0);
    end(cache);
}

/* The firmware's rule before an ASID is used again is WBINVD, DF_FLUSH, then a new key. Bit 0 of `kept`: the WBINVD is done, bit 1:
 * the DF_FLUSH. Gives the 16 bytes that the ASID's next guest finds in the frame where the first one wrote. */
static void reuse(uint8_t found[16], uint32_t kept, uint64_t *lost)
{
    begin();
    csvf_cache_config config = fixture_small();
    config.fabric_lines = 16;
    csvf_cache *cache = fixture_cache(engine, &config);
    CHECK_STATUS(csvf_cache_write(cache, 1, BASE, "the first secret", 16, 1), CSVF_OK);
    if (kept & 1)
        csvf_cache_write_back(cache);
    if (kept & 2)
        csvf_cache_fabric_flush(cache);
    CHECK_STATUS(csvf_asid_remove(engine, 1), CSVF_OK);
    fixture_install_other(engine, 1);
    CHECK_STATUS(csvf_cache_read(cache, found, 16, 1, BASE, 1), CSVF_OK);
    *lost = fixture_stats(cache, 1).lines_lost;
    end(cache);
}

static void test_asid_reuse(void)
{
    uint8_t found[16];
    uint64_t lost;
    reuse(found, 3, &lost);
    CHECK(memcmp(found, "the first secret", 16) != 0 && lost == 0);
    reuse(found, 2, &lost);                             /* no WBINVD: the line is still there */
    CHECK_BYTES(found, "the first secret", 16);
    reuse(found, 1, &lost);                             /* no DF_FLUSH: the write-back is encrypted under the next guest's key */
    CHECK_BYTES(found, "the first secret", 16);
    reuse(found, 0, &lost);
    CHECK_BYTES(found, "the first secret", 16);
}

/* A hit needs no key, a miss does, and a dirty line whose key is gone never becomes plaintext in DRAM. */
static void test_key_removed(void)
{
    begin();
    const csvf_cache_config config = fixture_small();
    csvf_cache *cache = fixture_cache(engine, &config);
    uint8_t seen[16], before[LINE], other[LINE] = {0xEE, 0xEE};
    CHECK_STATUS(csvf_cache_write(cache, 1, BASE, "the first secret", 16, 1), CSVF_OK);
    memcpy(before, csvf_engine_dram(engine), LINE);
    CHECK_STATUS(csvf_asid_remove(engine, 1), CSVF_OK);
    CHECK_STATUS(csvf_cache_read(cache, seen, 16, 1, BASE, 1), CSVF_OK);
    CHECK_BYTES(seen, "the first secret", 16);
    memset(seen, 0xEE, sizeof seen);
    CHECK_STATUS(csvf_cache_read(cache, seen, 16, 1, BASE + LINE, 1), CSVF_ERR_ASID);
    CHECK(seen[0] == 0xEE && seen[15] == 0xEE);
    CHECK_STATUS(csvf_cache_write(cache, 1, BASE + LINE, other, 2, 1), CSVF_ERR_ASID);
    csvf_cache_write_back(cache);
    CHECK_BYTES(csvf_engine_dram(engine), before, LINE);
    const csvf_cache_stats stats = fixture_stats(cache, 1);
    CHECK(stats.lines_lost == 1 && stats.write_backs == 1 && stats.bytes_encrypted == 0 && stats.misses == 1 && stats.hits[0] == 1);
    end(cache);
}

/* ---- Fabric ---- */

static void test_fabric(void)
{
    begin();
    csvf_cache_config config = fixture_small();
    config.fabric_lines = 2;
    csvf_cache *cache = fixture_cache(engine, &config);
    uint8_t seen[16], zero[16] = {0};
    const uint8_t *dram = csvf_engine_dram(engine);
    uint64_t waiting;
    for (int i = 0; i < 3; i++) {
        CHECK_STATUS(csvf_cache_write(cache, 1, BASE + (uint64_t)LINE * i, "sixteen letters!", 16, 1), CSVF_OK);
        CHECK_STATUS(csvf_cache_flush(cache, 1, BASE + (uint64_t)LINE * i, 1, 1), CSVF_OK);
    }
    CHECK_STATUS(csvf_cache_contents(cache, NULL, NULL, &waiting, 1), CSVF_OK);
    CHECK(waiting == 2);
    CHECK(memcmp(dram, zero, 16) != 0);             /* the oldest had to go */
    CHECK_BYTES(dram + LINE, zero, 16);
    CHECK_BYTES(dram + 2 * LINE, zero, 16);
    /* Whoever reads the line through the core finds it, under whatever tag; with it goes what waited before it. */
    CHECK_STATUS(csvf_cache_read(cache, seen, 16, 0, BASE + 2 * LINE, 0), CSVF_OK);
    CHECK(memcmp(seen, zero, 16) != 0);
    CHECK_BYTES(seen, dram + 2 * LINE, 16);
    CHECK(memcmp(dram + LINE, zero, 16) != 0);
    CHECK_STATUS(csvf_cache_read(cache, seen, 16, 1, BASE + LINE, 1), CSVF_OK);
    CHECK_BYTES(seen, "sixteen letters!", 16);
    csvf_cache_write_back(cache);
    csvf_cache_fabric_flush(cache);
    CHECK_STATUS(csvf_read(engine, seen, 16, 1, BASE + 2 * LINE), CSVF_OK);
    CHECK_BYTES(seen, "sixteen letters!", 16);
    CHECK(fixture_stats(cache, 1).bytes_encrypted == 3 * LINE);
    end(cache);
}

/* ---- Replacement ---- */

/* Which of four lines of one set a fifth pushes out, after uses in the order 0 1 2 3 0 2. */
static int pushed_out(int replacement, uint64_t seed)
{
    begin();
    csvf_cache_config config = fixture_small();
    config.levels[0] = (csvf_cache_level){.size = 4 * LINE, .ways = 4, .replacement = replacement, .cycles = 1};
    config.levels[1] = (csvf_cache_level){0};
    config.seed = seed;
    csvf_cache *cache = fixture_cache(engine, &config);
    static const int uses[] = {0, 1, 2, 3, 0, 2, 4};
    uint8_t byte;
    for (size_t i = 0; i < sizeof uses / sizeof *uses; i++)
        CHECK_STATUS(csvf_cache_read(cache, &byte, 1, 1, BASE + (uint64_t)LINE * uses[i], 1), CSVF_OK);
    int victim = -1;
    for (int line = 0; line < 4; line++) {
        const uint64_t before = fixture_stats(cache, 1).misses;
        CHECK_STATUS(csvf_cache_flush(cache, 1, BASE + 4 * LINE, 1, 1), CSVF_OK);   /* room, so that looking pushes out nothing */
        CHECK_STATUS(csvf_cache_read(cache, &byte, 1, 1, BASE + (uint64_t)LINE * line, 1), CSVF_OK);
        if (fixture_stats(cache, 1).misses != before) {
            CHECK(victim == -1);
            victim = line;
        }
    }
    end(cache);
    return victim;
}

static void test_replacement(void)
{
    CHECK(pushed_out(CSVF_REPLACE_LRU, 0) == 1);
    CHECK(pushed_out(CSVF_REPLACE_FIFO, 0) == 0);
    CHECK(pushed_out(CSVF_REPLACE_TREE, 0) == 1);   /* away from 2's half, then away from 0 */
    int seen[4] = {0}, different = 0;
    for (uint64_t seed = 0; seed < 64; seed++) {
        const int victim = pushed_out(CSVF_REPLACE_RANDOM, seed);
        CHECK(victim == pushed_out(CSVF_REPLACE_RANDOM, seed));
        different += seen[victim]++ == 0;
    }
    CHECK(different == 4);
}

/* ---- Arguments ---- */

static int create_status(const csvf_cache_config *config)
{
    csvf_cache *cache = (csvf_cache *)&cache;
    const int status = csvf_cache_create(&cache, engine, config);
    CHECK((status == CSVF_OK) == (cache != NULL));
    csvf_cache_destroy(cache);
    return status;
}

#define CHECK_CONFIG(change, expected)              \
    do {                                            \
        csvf_cache_config config = fixture_small(); \
        change;                                     \
        CHECK_STATUS(create_status(&config), expected); \
    } while (0)

static void test_config(void)
{
    begin();
    CHECK_CONFIG((void)0, CSVF_OK);
    CHECK_CONFIG(config.struct_size--, CSVF_ERR_ARGUMENT);
    CHECK_CONFIG(config.levels[0].ways = 0, CSVF_ERR_ARGUMENT);
    CHECK_CONFIG(config.levels[0].ways = 65, CSVF_ERR_ARGUMENT);
    CHECK_CONFIG(config.levels[0].ways = 3, CSVF_ERR_LENGTH);
    CHECK_CONFIG(config.levels[1].size = 12 * LINE, CSVF_ERR_LENGTH);
    CHECK_CONFIG((config.levels[1].size = 12 * LINE, config.levels[1].ways = 3), CSVF_OK);
    CHECK_CONFIG((config.levels[1].size = 12 * LINE, config.levels[1].ways = 3, config.levels[1].replacement = CSVF_REPLACE_TREE),
                 CSVF_ERR_ARGUMENT);
    CHECK_CONFIG(config.levels[1].size++, CSVF_ERR_LENGTH);
    CHECK_CONFIG(config.levels[0].replacement = 4, CSVF_ERR_ARGUMENT);
    CHECK_CONFIG(config.levels[0].reserved = 1, CSVF_ERR_ARGUMENT);
    CHECK_CONFIG(config.levels[1].size = 0, CSVF_OK);
    CHECK_CONFIG(config.levels[0].size = 0, CSVF_ERR_ARGUMENT);
    CHECK_CONFIG((config.levels[2] = config.levels[1], config.levels[1].size = 0), CSVF_ERR_ARGUMENT);
    CHECK_CONFIG(config.tlb_entries = 0, CSVF_OK);
    CHECK_CONFIG(config.tlb_entries = 6, CSVF_ERR_LENGTH);
    CHECK_CONFIG(config.tlb_ways = 0, CSVF_ERR_ARGUMENT);
    CHECK_CONFIG(config.fill = 2, CSVF_ERR_ARGUMENT);
    CHECK_CONFIG(config.fabric_lines = 65, CSVF_ERR_ARGUMENT);
    CHECK_CONFIG(config.fabric_lines = 64, CSVF_OK);
    CHECK_CONFIG(config.c_bit = 31, CSVF_ERR_ARGUMENT);
    CHECK_CONFIG(config.c_bit = 52, CSVF_ERR_ARGUMENT);
    CHECK_CONFIG(config.reserved = 1, CSVF_ERR_ARGUMENT);
    CHECK_STATUS(create_status(NULL), CSVF_OK);

    /* A newer caller's longer struct, as long as it asks for nothing new. */
    struct { csvf_cache_config config; uint64_t more; } newer = {fixture_small(), 0};
    newer.config.struct_size = sizeof newer;
    CHECK_STATUS(create_status(&newer.config), CSVF_OK);
    newer.more = 1;
    CHECK_STATUS(create_status(&newer.config), CSVF_ERR_ARGUMENT);
    csvf_cache *cache;
    CHECK_STATUS(csvf_cache_create(&cache, NULL, NULL), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_cache_create(NULL, engine, NULL), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_cache_defaults(NULL), CSVF_ERR_ARGUMENT);
    csvf_engine_destroy(engine);
}

static void test_arguments(void)
{
    begin();
    csvf_cache *cache = fixture_cache(engine, NULL);
    uint8_t data[16] = {0};
    CHECK_STATUS(csvf_cache_read(NULL, data, 1, 1, BASE, 1), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_cache_read(cache, NULL, 1, 1, BASE, 1), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_cache_read(cache, NULL, 0, 1, BASE, 1), CSVF_OK);
    CHECK_STATUS(csvf_cache_read(cache, data, 1, 1, BASE, 2), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_cache_read(cache, data, 1, 0, BASE, 1), CSVF_ERR_ASID);
    CHECK_STATUS(csvf_cache_read(cache, data, 1, 510, BASE, 0), CSVF_ERR_ASID);
    CHECK_STATUS(csvf_cache_read(cache, data, 1, 3, BASE, 1), CSVF_ERR_ASID);
    CHECK_STATUS(csvf_cache_read(cache, data, 1, 3, BASE, 0), CSVF_OK);     /* shared memory needs no key */
    CHECK_STATUS(csvf_cache_read(cache, data, 1, 1, BASE - 1, 1), CSVF_ERR_RANGE);
    CHECK_STATUS(csvf_cache_read(cache, data, 2, 1, BASE + SIZE - 1, 1), CSVF_ERR_RANGE);
    CHECK_STATUS(csvf_cache_read(cache, data, SIZE_MAX, 1, BASE, 1), CSVF_ERR_RANGE);
    CHECK_STATUS(csvf_cache_read(cache, csvf_engine_dram(engine), 1, 1, BASE, 1), CSVF_ERR_OVERLAP);
    CHECK_STATUS(csvf_cache_write(cache, 1, BASE, NULL, 1, 1), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_cache_write(cache, 1, BASE + SIZE, data, 1, 1), CSVF_ERR_RANGE);
    CHECK_STATUS(csvf_cache_flush(cache, 0, BASE, 1, 1), CSVF_ERR_ASID);
    CHECK_STATUS(csvf_cache_flush(cache, 1, BASE, SIZE + 1, 1), CSVF_ERR_RANGE);
    CHECK_STATUS(csvf_cache_flush(cache, 1, BASE, SIZE, 1), CSVF_OK);
    csvf_cache_stats stats = {.struct_size = sizeof stats - 1};
    CHECK_STATUS(csvf_cache_statistics(cache, &stats, 1), CSVF_ERR_ARGUMENT);
    stats.struct_size++;
    CHECK_STATUS(csvf_cache_statistics(cache, &stats, 510), CSVF_ERR_ASID);
    CHECK_STATUS(csvf_cache_contents(cache, NULL, NULL, NULL, 510), CSVF_ERR_ASID);
    csvf_cache_write_back(NULL);
    csvf_cache_fabric_flush(NULL);
    csvf_cache_destroy(NULL);
    end(cache);
}

/* ---- Traces ---- */

/* A trace counts as the accesses it lists, changes no byte, and stops where one is refused. */
static void test_trace(void)
{
    begin();
    const csvf_cache_config config = fixture_small();
    csvf_cache *run = fixture_cache(engine, &config), *single = fixture_cache(engine, &config);
    enum { COUNT = 3000 };
    static csvf_trace_access accesses[COUNT];
    static uint8_t before[SIZE], seen[SIZE], scratch[300];
    test_fill(before, SIZE, 9);
    CHECK_STATUS(csvf_write(engine, 1, BASE, before, SIZE), CSVF_OK);
    uint64_t random = 4;
    for (int i = 0; i < COUNT; i++)
        accesses[i] = (csvf_trace_access){BASE + test_random(&random) % (40 * LINE), 1 + test_random(&random) % 200,
                                          test_random(&random) & 1};
    size_t done;
    CHECK_STATUS(csvf_cache_run(run, &done, 1, accesses, COUNT, 0, 1), CSVF_OK);
    CHECK(done == COUNT);
    for (int i = 0; i < COUNT; i++) {
        const uint64_t at = accesses[i].address;
        if (accesses[i].access & CSVF_ACCESS_WRITE)
            CHECK_STATUS(csvf_cache_write(single, 1, at, before + (at - BASE), accesses[i].length, 1), CSVF_OK);
        else
            CHECK_STATUS(csvf_cache_read(single, scratch, accesses[i].length, 1, at, 1), CSVF_OK);
    }
    const csvf_cache_stats one = fixture_stats(run, 1), other = fixture_stats(single, 1);
    CHECK_BYTES(&one, &other, sizeof one);
    CHECK(one.write_backs > 100 && one.misses > 100 && one.hits[0] && one.hits[1]);
    csvf_cache_write_back(run);
    CHECK_STATUS(csvf_read(engine, seen, SIZE, 1, BASE), CSVF_OK);
    CHECK_BYTES(seen, before, SIZE);

    accesses[2].length = 0;
    CHECK_STATUS(csvf_cache_run(run, &done, 1, accesses, COUNT, 0, 1), CSVF_ERR_LENGTH);
    CHECK(done == 2);
    accesses[1].address = BASE + SIZE;
    CHECK_STATUS(csvf_cache_run(run, &done, 1, accesses, COUNT, 0, 1), CSVF_ERR_RANGE);
    CHECK(done == 1);
    accesses[0].access = 8;
    CHECK_STATUS(csvf_cache_run(run, &done, 1, accesses, COUNT, 0, 1), CSVF_ERR_ARGUMENT);
    CHECK(done == 0);
    CHECK_STATUS(csvf_cache_run(run, NULL, 0, accesses, 0, 0, 1), CSVF_ERR_ASID);
    csvf_cache_destroy(single);
    end(run);
}

int main(void)
{
    RUN(test_hits_touch_no_sm4);
    RUN(test_long_access);
    RUN(test_levels_are_inclusive);
    RUN(test_inclusion_victim);
    RUN(test_page_fill);
    RUN(test_contexts_are_not_coherent);
    RUN(test_asid_reuse);
    RUN(test_key_removed);
    RUN(test_fabric);
    RUN(test_replacement);
    RUN(test_config);
    RUN(test_arguments);
    RUN(test_trace);
    return test_report();
}
