/* The cache model: what a hit costs through the public API, and how many accesses of a trace a core does. */
#include <stdlib.h>

#include "bench.h"

enum { ACCESSES = 1 << 20, HITS = 1 << 16, MEMORY = 64 << 20, PAGE = 4096 };

static csvf_engine *engine;
static csvf_cache *cache;
static csvf_trace_access *trace;
static uint64_t addresses[HITS];

static void must(int status) { bench_require(status == CSVF_OK, csvf_status_text(status)); }

static void run_reads(void *context)
{
    uint64_t word, sum = 0;
    (void)context;
    for (int i = 0; i < HITS; i++) {
        must(csvf_cache_read(cache, &word, sizeof word, 1, addresses[i], 1));
        sum += word;
    }
    __asm__ volatile("" : : "r"(sum));
}

static void run_writes(void *context)
{
    (void)context;
    for (int i = 0; i < HITS; i++)
        must(csvf_cache_write(cache, 1, addresses[i], &addresses[i], 8, 1));
}

static void run_virtual_reads(void *context)
{
    uint64_t word, sum = 0;
    (void)context;
    for (int i = 0; i < HITS; i++) {
        must(csvf_cache_read_virtual(cache, &word, sizeof word, 1, addresses[i], CSVF_ACCESS_USER));
        sum += word;
    }
    __asm__ volatile("" : : "r"(sum));
}

static void run_trace(void *context)
{
    must(csvf_cache_run(cache, NULL, 1, trace, ACCESSES, *(const int *)context, 1));
}

static uint64_t random_number(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state >> 11;
}

/* Aligned words, anywhere in the first `span` bytes. */
static void spread_words(uint64_t span)
{
    uint64_t state = 88172645463325252u;
    for (int i = 0; i < HITS; i++)
        addresses[i] = random_number(&state) % (span / 8) * 8;
}

/* What programs do, roughly: half on a stack of 4 KiB, most of the rest in 16 KiB, one in twenty in 256 KiB around them that move every
 * half million accesses, one in two hundred on the next line of a stream; one in four is a write. The last level is one of 512 KiB here, so
 * that runs after the first still go to DRAM: 94.6 % of the accesses hit the first level, 1.5 % miss the last. */
static void make_trace(void)
{
    uint64_t state = 88172645463325252u, stream = 0, set = 0;
    for (int i = 0; i < ACCESSES; i++) {
        const uint64_t dice = random_number(&state) % 200;
        uint64_t address;
        if (i % 500000 == 0)
            set = (16 << 20) + random_number(&state) % (16 << 20) / 262144 * 262144;
        if (dice == 0)
            address = stream = (stream + 64) % (16 << 20);
        else if (dice <= 100)
            address = random_number(&state) % 4096;
        else if (dice < 190)
            address = set + random_number(&state) % 16384;
        else
            address = set + random_number(&state) % 262144;
        trace[i] = (csvf_trace_access){address & ~(uint64_t)7, 8, random_number(&state) % 4 ? CSVF_ACCESS_READ : CSVF_ACCESS_WRITE};
    }
}

/* Page tables of the guest that map every page to itself, encrypted: in the memory's last megabyte. */
static void map_all(void)
{
    const uint64_t c_bit = UINT64_C(1) << 47, rights = 7, root = MEMORY - (1 << 20), second = root + PAGE, third = second + PAGE,
                   first = third + PAGE;
    uint64_t entry = second | rights;
    must(csvf_write(engine, 1, root, &entry, 8));
    entry = third | rights;
    must(csvf_write(engine, 1, second, &entry, 8));
    for (uint64_t i = 0; i < MEMORY / PAGE / 512; i++) {
        entry = (first + i * PAGE) | rights;
        must(csvf_write(engine, 1, third + i * 8, &entry, 8));
    }
    for (uint64_t page = 0; page < MEMORY / PAGE; page++) {
        entry = page * PAGE | c_bit | rights;
        must(csvf_write(engine, 1, first + page * 8, &entry, 8));
    }
    must(csvf_cache_set_tables(cache, 1, root, CSVF_NO_TABLE));
}

static void measure(const char *name, const char *variant, size_t operations, void (*run)(void *), void *context)
{
    bench_measure(&(bench_case){.name = name, .variant = variant, .kernel = csvf_kernel_name(CSVF_PRIMITIVE_SM4),
                                .operations = operations, .threads = 1, .run = run, .context = context});
}

void bench_cache_cases(void)
{
    if (!bench_wanted("cache-hit/8") && !bench_wanted("cache-trace"))
        return;
    static const uint8_t key[32] = {1, 2, 3};
    static const int physical = 0, virtually = 1;
    must(csvf_engine_create(&engine, MEMORY, NULL));
    must(csvf_asid_install(engine, 1, key, sizeof key));
    must(csvf_cache_create(&cache, engine, NULL));
    trace = malloc(ACCESSES * sizeof *trace);
    bench_require(trace != NULL, "memory for a trace");
    map_all();
    make_trace();
    spread_words(16 << 10);
    measure("cache-hit/8", "read, first level", HITS, run_reads, NULL);
    measure("cache-hit/8", "write, first level", HITS, run_writes, NULL);
    measure("cache-hit/8", "virtual read, first level", HITS, run_virtual_reads, NULL);
    spread_words(256 << 10);
    measure("cache-hit/8", "read, first or second level", HITS, run_reads, NULL);
    csvf_cache_destroy(cache);
    csvf_cache_config config = {.struct_size = sizeof config};
    must(csvf_cache_defaults(&config));
    config.levels[2].size = 0;
    must(csvf_cache_create(&cache, engine, &config));
    map_all();
    measure("cache-trace", "physical", ACCESSES, run_trace, (void *)&physical);
    measure("cache-trace", "virtual", ACCESSES, run_trace, (void *)&virtually);
    free(trace);
    csvf_cache_destroy(cache);
    csvf_engine_destroy(engine);
}
