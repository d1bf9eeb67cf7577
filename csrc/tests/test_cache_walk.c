/* Address translation of the cache model: tables with the C-bit, nested tables, the TLB and its flushes, faults. */
#include "cache_fixture.h"

enum { SIZE = 256 * PAGE, PRESENT = 1, WRITABLE = 2, USER = 4, LARGE = 128 };
#define C_BIT (UINT64_C(1) << 47)
#define NO_EXECUTE (UINT64_C(1) << 63)
#define FULL (PRESENT | WRITABLE | USER)

static csvf_engine *engine;
static csvf_cache *cache;
static uint64_t next_frame;     /* page frames of tables are taken from the top down */

static void begin(void)
{
    engine = fixture_engine(SIZE, 0, CSVF_STANDARD_GB, CSVF_TWEAK_XTS, 1);
    fixture_install(engine, 1);
    fixture_install(engine, 2);
    const csvf_cache_config config = fixture_small();
    cache = fixture_cache(engine, &config);
    next_frame = SIZE / PAGE;
}

static void end(void)
{
    csvf_cache_destroy(cache);
    csvf_engine_destroy(engine);
}

static uint64_t take_frame(void) { return --next_frame * PAGE; }

static void put(uint32_t owner, uint64_t place, uint64_t entry) { CHECK_STATUS(csvf_write(engine, owner, place, &entry, 8), CSVF_OK); }

static uint64_t get(uint32_t owner, uint64_t place)
{
    uint64_t entry;
    CHECK_STATUS(csvf_read(engine, &entry, 8, owner, place), CSVF_OK);
    return entry;
}

static uint64_t new_table(uint32_t owner)
{
    static const uint8_t empty[PAGE];
    const uint64_t table = take_frame();
    CHECK_STATUS(csvf_write(engine, owner, table, empty, PAGE), CSVF_OK);
    return table;
}

/* Enters a page of 4 KiB (level 1), 2 MiB (2) or 1 GiB (3). `owner` is the ASID whose memory the tables are, 0 for the host's; `offset` is
 * where the tables' addresses stand in system memory (guest tables under nested ones name guest addresses). */
static void map(uint32_t owner, uint64_t root, uint64_t address, uint64_t entry, int level, uint64_t offset)
{
    uint64_t table = root;
    for (int at = 4; at > level; at--) {
        const uint64_t place = offset + table + (address >> (12 + 9 * (at - 1)) & 511) * 8;
        if (!(get(owner, place) & PRESENT))
            put(owner, place, (new_table(owner) - offset) | FULL);
        table = get(owner, place) & ~(uint64_t)0xFFF;
    }
    put(owner, offset + table + (address >> (12 + 9 * (level - 1)) & 511) * 8, entry | (level > 1 ? LARGE : 0));
}

static csvf_translation translate(uint32_t asid, uint64_t address, uint32_t access, int status)
{
    csvf_translation found;
    memset(&found, 0xEE, sizeof found);
    CHECK_STATUS(csvf_cache_translate(cache, &found, asid, address, access), status);
    return found;
}

/* The caches hold tables that the tests rewrite behind their back. */
static void forget(void)
{
    csvf_cache_write_back(cache);
    csvf_tlb_flush(cache);
}

/* ---- Guest tables ---- */

static void test_guest_tables(void)
{
    begin();
    const uint64_t root = new_table(1), high = UINT64_C(0xFFFF800000000000);
    map(1, root, 0x401000, 5 * PAGE | C_BIT | FULL, 1, 0);
    map(1, root, 0x402000, 6 * PAGE | FULL, 1, 0);
    map(1, root, high, 7 * PAGE | C_BIT | PRESENT | NO_EXECUTE, 1, 0);
    CHECK_STATUS(csvf_cache_set_tables(cache, 1, root, CSVF_NO_TABLE), CSVF_OK);

    csvf_translation found = translate(1, 0x401234, CSVF_ACCESS_WRITE | CSVF_ACCESS_USER, CSVF_OK);
    CHECK(found.address == 5 * PAGE + 0x234 && found.c_bit == 1 && found.fault_stage == CSVF_STAGE_NONE);
    CHECK(found.allowed == (CSVF_ACCESS_WRITE | CSVF_ACCESS_EXECUTE | CSVF_ACCESS_USER));
    found = translate(1, 0x402000, CSVF_ACCESS_READ, CSVF_OK);
    CHECK(found.address == 6 * PAGE && found.c_bit == 0);
    found = translate(1, high + 1, CSVF_ACCESS_READ, CSVF_OK);
    CHECK(found.address == 7 * PAGE + 1 && found.allowed == 0);
    csvf_cache_stats stats = fixture_stats(cache, 1);
    CHECK(stats.tlb_misses == 3 && stats.tlb_hits == 0 && stats.walk_reads == 12);
    CHECK(stats.walk_reads == stats.hits[0] + stats.hits[1] + stats.misses && stats.reads == 0);

    /* Encrypted page and shared page, as the entry's C-bit says. */
    uint8_t seen[20], sealed[16];
    CHECK_STATUS(csvf_cache_write_virtual(cache, 1, 0x401FF8, "across two pages", 16, CSVF_ACCESS_USER), CSVF_OK);
    CHECK_STATUS(csvf_cache_read_virtual(cache, seen, 16, 1, 0x401FF8, CSVF_ACCESS_USER), CSVF_OK);
    CHECK_BYTES(seen, "across two pages", 16);
    csvf_cache_write_back(cache);
    CHECK_BYTES(csvf_engine_dram(engine) + 6 * PAGE, "wo pages", 8);
    CHECK_STATUS(csvf_read(engine, sealed, 8, 1, 5 * PAGE + 0xFF8), CSVF_OK);
    CHECK_BYTES(sealed, "across t", 8);
    CHECK(memcmp(csvf_engine_dram(engine) + 5 * PAGE + 0xFF8, "across t", 8) != 0);

    /* Refusals say where. */
    found = translate(1, 0x403000, CSVF_ACCESS_READ, CSVF_ERR_FAULT);
    CHECK(found.fault_stage == CSVF_STAGE_GUEST && found.fault_level == 1 && found.address == 0x403000);
    found = translate(1, UINT64_C(1) << 30, CSVF_ACCESS_READ, CSVF_ERR_FAULT);
    CHECK(found.fault_level == 3);
    found = translate(1, UINT64_C(1) << 47, CSVF_ACCESS_READ, CSVF_ERR_FAULT);
    CHECK(found.fault_stage == CSVF_STAGE_GUEST && found.fault_level == 0);
    translate(1, high, CSVF_ACCESS_WRITE, CSVF_ERR_FAULT);
    translate(1, high, CSVF_ACCESS_USER, CSVF_ERR_FAULT);
    translate(1, high, CSVF_ACCESS_EXECUTE, CSVF_ERR_FAULT);
    translate(1, high, CSVF_ACCESS_READ, CSVF_OK);
    CHECK(fixture_stats(cache, 1).faults == 6);
    /* What a fault keeps from being read is not written to, what stands before it is. */
    memset(seen, 0xEE, sizeof seen);
    CHECK_STATUS(csvf_cache_read_virtual(cache, seen, 16, 1, 0x402FF8, 0), CSVF_ERR_FAULT);
    CHECK(seen[7] == 0 && seen[8] == 0xEE);
    end();
}

static void test_large_pages_and_reserved_bits(void)
{
    begin();
    const uint64_t root = new_table(1), mega = 2 << 20, giga = 1 << 30;
    map(1, root, 3 * (uint64_t)mega, (UINT64_C(8) << 21) | C_BIT | FULL, 2, 0);
    map(1, root, 5 * giga, (UINT64_C(9) << 30) | FULL, 3, 0);
    CHECK_STATUS(csvf_cache_set_tables(cache, 1, root | C_BIT, CSVF_NO_TABLE), CSVF_OK);    /* CR3 with the C-bit, as Linux has it */
    csvf_translation found = translate(1, 3 * mega + 0x12345, CSVF_ACCESS_WRITE, CSVF_OK);
    CHECK(found.address == 8 * mega + 0x12345 && found.c_bit == 1);
    found = translate(1, 5 * giga + 0x7654321, CSVF_ACCESS_WRITE, CSVF_OK);
    CHECK(found.address == 9 * giga + 0x7654321 && found.c_bit == 0);
    uint8_t byte;
    CHECK_STATUS(csvf_cache_read_virtual(cache, &byte, 1, 1, 5 * giga, 0), CSVF_ERR_RANGE);     /* no such memory */

    static const uint64_t bad[] = {UINT64_C(1) << 48, UINT64_C(1) << 51};
    for (int i = 0; i < 2; i++) {
        map(1, root, 0x1000, 3 * PAGE | FULL | bad[i], 1, 0);
        forget();
        CHECK(translate(1, 0x1000, 0, CSVF_ERR_FAULT).fault_level == 1);
    }
    map(1, root, 0x1000, 3 * PAGE | FULL | UINT64_C(1) << 52, 1, 0);    /* software's own bit */
    forget();
    translate(1, 0x1000, 0, CSVF_OK);
    put(1, root, get(1, root) | LARGE);
    forget();
    CHECK(translate(1, 0x1000, 0, CSVF_ERR_FAULT).fault_level == 4);
    end();
}

/* Every level's bits count: writable, user and no-execute of the way down together. */
static void test_rights_of_every_level(void)
{
    begin();
    const uint64_t root = new_table(1);
    map(1, root, 0, 3 * PAGE | C_BIT | FULL, 1, 0);
    CHECK_STATUS(csvf_cache_set_tables(cache, 1, root, CSVF_NO_TABLE), CSVF_OK);
    uint64_t table = root;
    for (int level = 4; level >= 1; level--) {
        const uint64_t entry = get(1, table);
        static const struct { uint64_t clear, set; uint32_t access; } cases[] = {
            {WRITABLE, 0, CSVF_ACCESS_WRITE}, {USER, 0, CSVF_ACCESS_USER}, {0, NO_EXECUTE, CSVF_ACCESS_EXECUTE}};
        for (int i = 0; i < 3; i++) {
            test_case("level %d, case %d", level, i);
            put(1, table, (entry & ~cases[i].clear) | cases[i].set);
            forget();
            const csvf_translation found = translate(1, 0, cases[i].access, CSVF_ERR_FAULT);
            CHECK(found.fault_stage == CSVF_STAGE_GUEST && found.fault_level == 1);
            CHECK(translate(1, 0, 0, CSVF_OK).allowed == ((uint32_t)7 & ~cases[i].access));
        }
        put(1, table, entry);
        forget();
        CHECK(translate(1, 0, 7, CSVF_OK).allowed == 7);
        table = entry & 0xFFFFF000;
    }
    end();
}

/* ---- Nested tables ---- */

static void test_nested_tables(void)
{
    begin();
    /* Guest physical page n is system page n + 64 of this host's memory; the guest's tables are put there by hand. */
    enum { OFFSET = 64 * PAGE };
    const uint64_t nested = new_table(0);
    for (uint64_t page = 0; page < 128; page++)
        map(0, nested, page * PAGE, (OFFSET + page * PAGE) | FULL | (page == 9 ? NO_EXECUTE : 0), 1, 0);
    next_frame = (OFFSET + 128 * PAGE) / PAGE;
    const uint64_t root = new_table(1) - OFFSET;
    map(1, root, 0x7000, 5 * PAGE | C_BIT | FULL, 1, OFFSET);
    map(1, root, 0x8000, 9 * PAGE | FULL, 1, OFFSET);
    map(1, root, 0x9000, 200 * PAGE | C_BIT | FULL, 1, OFFSET);
    CHECK_STATUS(csvf_cache_set_tables(cache, 1, root, nested), CSVF_OK);
    csvf_translation found = translate(1, 0x7010, CSVF_ACCESS_WRITE, CSVF_OK);
    CHECK(found.address == OFFSET + 5 * PAGE + 0x10 && found.c_bit == 1);
    CHECK(fixture_stats(cache, 1).walk_reads == 4 * 5 + 4);     /* four guest entries, each found by four nested ones, and the page */
    found = translate(1, 0x8000, CSVF_ACCESS_WRITE, CSVF_OK);
    CHECK(found.allowed == (CSVF_ACCESS_WRITE | CSVF_ACCESS_USER) && found.c_bit == 0);
    found = translate(1, 0x8000, CSVF_ACCESS_EXECUTE, CSVF_ERR_FAULT);
    CHECK(found.fault_stage == CSVF_STAGE_NESTED && found.fault_level == 1 && found.address == 9 * PAGE);
    found = translate(1, 0x9000, CSVF_ACCESS_READ, CSVF_ERR_FAULT);
    CHECK(found.fault_stage == CSVF_STAGE_NESTED && found.address == 200 * PAGE);

    /* A guest without paging: its addresses go to the nested tables alone, and count as encrypted. */
    CHECK_STATUS(csvf_cache_set_tables(cache, 2, CSVF_NO_TABLE, nested), CSVF_OK);
    found = translate(2, 3 * PAGE + 5, CSVF_ACCESS_EXECUTE, CSVF_OK);
    CHECK(found.address == OFFSET + 3 * PAGE + 5 && found.c_bit == 1);
    CHECK(translate(2, UINT64_C(1) << 47, 0, CSVF_ERR_FAULT).fault_stage == CSVF_STAGE_GUEST);

    /* The host's entry must not ask for the host's own encryption, which is not modelled, and must be one of user mode. */
    static const uint64_t bad[] = {C_BIT | FULL, PRESENT | WRITABLE, 0};
    for (int i = 0; i < 3; i++) {
        map(0, nested, 5 * PAGE, (OFFSET + 5 * PAGE) | bad[i], 1, 0);
        forget();
        found = translate(1, 0x7000, 0, CSVF_ERR_FAULT);
        CHECK(found.fault_stage == CSVF_STAGE_NESTED && found.address == 5 * PAGE);
    }
    map(0, nested, 5 * PAGE, (OFFSET + 5 * PAGE) | PRESENT | USER, 1, 0);   /* read only for the host's reasons: still writable for reads */
    forget();
    translate(1, 0x7000, CSVF_ACCESS_READ, CSVF_OK);
    translate(1, 0x7000, CSVF_ACCESS_WRITE, CSVF_ERR_FAULT);
    end();
}

/* Wrong key, other tables: a guest whose tables another guest wrote reads noise as entries, and gets nowhere. */
static void test_tables_of_another_guest(void)
{
    begin();
    const uint64_t root = new_table(1);
    map(1, root, 0x1000, 3 * PAGE | C_BIT | FULL, 1, 0);
    CHECK_STATUS(csvf_cache_set_tables(cache, 2, root, CSVF_NO_TABLE), CSVF_OK);
    csvf_translation found;
    const int status = csvf_cache_translate(cache, &found, 2, 0x1000, 0);
    CHECK(status == CSVF_ERR_FAULT || status == CSVF_ERR_RANGE);
    /* The host's tables are read as they are: under ASID 0 the C-bit is a reserved bit. */
    const uint64_t own = new_table(0);
    map(0, own, 0x1000, 3 * PAGE | FULL, 1, 0);
    map(0, own, 0x2000, 3 * PAGE | C_BIT | FULL, 1, 0);
    CHECK_STATUS(csvf_cache_set_tables(cache, 0, own, CSVF_NO_TABLE), CSVF_OK);
    CHECK(translate(0, 0x1000, 0, CSVF_OK).c_bit == 0);
    translate(0, 0x2000, 0, CSVF_ERR_FAULT);
    end();
}

/* ---- TLB ---- */

/* A translation stays until it is invalidated, whatever happens to the tables; INVLPGA and flush by ASID take exactly what they name. */
static void test_stale_translations(void)
{
    begin();
    const uint64_t root = new_table(1), other = new_table(2);
    map(1, root, 0x1000, 3 * PAGE | C_BIT | FULL, 1, 0);
    map(1, root, 0x2000, 4 * PAGE | C_BIT | FULL, 1, 0);
    map(2, other, 0x1000, 5 * PAGE | C_BIT | FULL, 1, 0);
    CHECK_STATUS(csvf_cache_set_tables(cache, 1, root, CSVF_NO_TABLE), CSVF_OK);
    CHECK_STATUS(csvf_cache_set_tables(cache, 2, other, CSVF_NO_TABLE), CSVF_OK);
    translate(1, 0x1000, 0, CSVF_OK);
    translate(1, 0x2000, 0, CSVF_OK);
    CHECK(translate(2, 0x1000, 0, CSVF_OK).address == 5 * PAGE);        /* guests do not alias */
    map(1, root, 0x1000, 6 * PAGE | C_BIT | FULL, 1, 0);
    map(1, root, 0x2000, 7 * PAGE | C_BIT | FULL, 1, 0);
    csvf_cache_write_back(cache);                                        /* WBINVD is no TLB flush */
    CHECK(translate(1, 0x1000, 0, CSVF_OK).address == 3 * PAGE);
    CHECK_STATUS(csvf_tlb_invalidate_page(cache, 2, 0x1000), CSVF_OK);
    CHECK(translate(1, 0x1000, 0, CSVF_OK).address == 3 * PAGE);
    CHECK_STATUS(csvf_tlb_invalidate_page(cache, 1, 0x1FFF), CSVF_OK);
    CHECK(translate(1, 0x1000, 0, CSVF_OK).address == 6 * PAGE);
    CHECK(translate(1, 0x2000, 0, CSVF_OK).address == 4 * PAGE);
    CHECK_STATUS(csvf_tlb_flush_asid(cache, 2), CSVF_OK);
    CHECK(translate(1, 0x2000, 0, CSVF_OK).address == 4 * PAGE);
    CHECK_STATUS(csvf_tlb_flush_asid(cache, 1), CSVF_OK);
    CHECK(translate(1, 0x2000, 0, CSVF_OK).address == 7 * PAGE);
    const uint64_t misses = fixture_stats(cache, 2).tlb_misses;
    translate(2, 0x1000, 0, CSVF_OK);
    CHECK(fixture_stats(cache, 2).tlb_misses == misses + 1);

    /* A right that the tables have granted since is found without an invalidation; one they took away is not noticed. */
    map(1, root, 0x2000, 7 * PAGE | C_BIT | PRESENT, 1, 0);
    forget();
    CHECK(translate(1, 0x2000, 0, CSVF_OK).allowed == CSVF_ACCESS_EXECUTE);
    map(1, root, 0x2000, 7 * PAGE | C_BIT | FULL, 1, 0);
    csvf_cache_write_back(cache);
    translate(1, 0x2000, CSVF_ACCESS_WRITE, CSVF_OK);
    map(1, root, 0x2000, 0, 1, 0);
    csvf_cache_write_back(cache);
    const uint64_t hits = fixture_stats(cache, 1).tlb_hits;
    translate(1, 0x2000, CSVF_ACCESS_WRITE, CSVF_OK);
    CHECK(fixture_stats(cache, 1).tlb_hits == hits + 1);
    CHECK_STATUS(csvf_tlb_invalidate_page(cache, 1, 0x2000), CSVF_OK);      /* and there is only one to invalidate */
    translate(1, 0x2000, CSVF_ACCESS_READ, CSVF_ERR_FAULT);
    end();
}

/* A new guest under a used ASID, with or without the TLB flush that its first VMRUN owes: without it the new guest's address leads to
 * the old one's frame. */
static void test_asid_reuse(void)
{
    for (int is_flushed = 0; is_flushed < 2; is_flushed++) {
        begin();
        const uint64_t root = new_table(1);
        map(1, root, 0x1000, 3 * PAGE | C_BIT | FULL, 1, 0);
        CHECK_STATUS(csvf_cache_set_tables(cache, 1, root, CSVF_NO_TABLE), CSVF_OK);
        translate(1, 0x1000, 0, CSVF_OK);
        csvf_cache_write_back(cache);
        CHECK_STATUS(csvf_asid_remove(engine, 1), CSVF_OK);
        fixture_install_other(engine, 1);
        const uint64_t next = new_table(1);
        map(1, next, 0x1000, 9 * PAGE | C_BIT | FULL, 1, 0);
        CHECK_STATUS(csvf_cache_set_tables(cache, 1, next, CSVF_NO_TABLE), CSVF_OK);
        if (is_flushed)
            CHECK_STATUS(csvf_tlb_flush_asid(cache, 1), CSVF_OK);
        CHECK(translate(1, 0x1000, 0, CSVF_OK).address == (is_flushed ? 9u : 3u) * PAGE);
        end();
    }
}

static void test_no_tlb(void)
{
    begin();
    csvf_cache_destroy(cache);
    csvf_cache_config config = fixture_small();
    config.tlb_entries = 0;
    cache = fixture_cache(engine, &config);
    const uint64_t root = new_table(1);
    map(1, root, 0x1000, 3 * PAGE | C_BIT | FULL, 1, 0);
    CHECK_STATUS(csvf_cache_set_tables(cache, 1, root, CSVF_NO_TABLE), CSVF_OK);
    for (int i = 0; i < 3; i++)
        translate(1, 0x1000, 0, CSVF_OK);
    CHECK(fixture_stats(cache, 1).tlb_misses == 3 && fixture_stats(cache, 1).walk_reads == 12);
    CHECK_STATUS(csvf_tlb_invalidate_page(cache, 1, 0), CSVF_OK);
    CHECK_STATUS(csvf_tlb_flush_asid(cache, 1), CSVF_OK);
    csvf_tlb_flush(cache);
    end();
}

static void test_arguments(void)
{
    begin();
    csvf_translation found;
    uint8_t byte = 0;
    CHECK_STATUS(csvf_cache_translate(NULL, &found, 1, 0, 0), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_cache_translate(cache, NULL, 1, 0, 0), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_cache_translate(cache, &found, 1, 0, 8), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_cache_translate(cache, &found, 510, 0, 0), CSVF_ERR_ASID);
    CHECK_STATUS(csvf_cache_read_virtual(cache, &byte, 1, 1, 0, CSVF_ACCESS_WRITE), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_cache_read_virtual(cache, NULL, 1, 1, 0, 0), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_cache_read_virtual(cache, csvf_engine_dram(engine), 1, 1, 0, 0), CSVF_ERR_OVERLAP);
    CHECK_STATUS(csvf_cache_read_virtual(cache, &byte, 1, 1, SIZE, 0), CSVF_ERR_RANGE);
    CHECK_STATUS(csvf_cache_write_virtual(cache, 1, 0, &byte, 1, CSVF_ACCESS_EXECUTE), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_cache_write_virtual(cache, 3, 0, &byte, 1, 0), CSVF_ERR_ASID);    /* no key */
    CHECK_STATUS(csvf_cache_set_tables(cache, 1, 8, CSVF_NO_TABLE), CSVF_ERR_ALIGNMENT);
    CHECK_STATUS(csvf_cache_set_tables(cache, 1, 0, 1), CSVF_ERR_ALIGNMENT);
    CHECK_STATUS(csvf_cache_set_tables(cache, 510, 0, 0), CSVF_ERR_ASID);
    CHECK_STATUS(csvf_cache_set_tables(cache, 1, UINT64_C(1) << 40, CSVF_NO_TABLE), CSVF_OK);
    CHECK_STATUS(csvf_cache_translate(cache, &found, 1, 0, 0), CSVF_ERR_RANGE);         /* tables outside the memory */
    CHECK_STATUS(csvf_tlb_flush_asid(cache, 510), CSVF_ERR_ASID);
    CHECK_STATUS(csvf_tlb_flush_asid(NULL, 1), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_tlb_invalidate_page(cache, 510, 0), CSVF_ERR_ASID);
    csvf_tlb_flush(NULL);
    end();
}

/* A virtual trace counts as the accesses it lists. */
static void test_virtual_trace(void)
{
    begin();
    const uint64_t root = new_table(1);
    for (uint64_t page = 0; page < 20; page++)
        map(1, root, 0x10000 + page * PAGE, page * PAGE | C_BIT | FULL, 1, 0);
    const csvf_cache_config config = fixture_small();
    csvf_cache *single = fixture_cache(engine, &config);
    CHECK_STATUS(csvf_cache_set_tables(cache, 1, root, CSVF_NO_TABLE), CSVF_OK);
    CHECK_STATUS(csvf_cache_set_tables(single, 1, root, CSVF_NO_TABLE), CSVF_OK);
    enum { COUNT = 2000 };
    static csvf_trace_access accesses[COUNT];
    uint8_t data[300] = {0};
    uint64_t random = 8;
    size_t done;
    for (int i = 0; i < COUNT; i++)
        accesses[i] = (csvf_trace_access){0x10000 + test_random(&random) % (19 * PAGE), 1 + test_random(&random) % 250,
                                          test_random(&random) & 1};
    CHECK_STATUS(csvf_cache_run(cache, &done, 1, accesses, COUNT, 1, 0), CSVF_OK);
    for (int i = 0; i < COUNT; i++)
        CHECK_STATUS(accesses[i].access ? csvf_cache_write_virtual(single, 1, accesses[i].address, data, accesses[i].length, 0)
                                        : csvf_cache_read_virtual(single, data, accesses[i].length, 1, accesses[i].address, 0), CSVF_OK);
    const csvf_cache_stats one = fixture_stats(cache, 1), other = fixture_stats(single, 1);
    CHECK_BYTES(&one, &other, sizeof one);
    CHECK(done == COUNT && one.tlb_hits && one.tlb_misses > 20);
    accesses[7].address = 0x10000 + 20 * PAGE - 4;
    accesses[7].length = 8;
    CHECK_STATUS(csvf_cache_run(cache, &done, 1, accesses, COUNT, 1, 0), CSVF_ERR_FAULT);
    CHECK(done == 7);
    csvf_cache_destroy(single);
    end();
}

int main(void)
{
    RUN(test_guest_tables);
    RUN(test_large_pages_and_reserved_bits);
    RUN(test_rights_of_every_level);
    RUN(test_nested_tables);
    RUN(test_tables_of_another_guest);
    RUN(test_stale_translations);
    RUN(test_asid_reuse);
    RUN(test_no_tlb);
    RUN(test_arguments);
    RUN(test_virtual_trace);
    return test_report();
}
