/* Shared by the cache model's tests: small caches whose sets can be filled by hand, and what their counters say. */
#ifndef CSVF_CACHE_FIXTURE_H
#define CSVF_CACHE_FIXTURE_H

/* test.h before any system header: it asks for MAP_ANONYMOUS. */
#include "test.h"

#include "engine_fixture.h"

enum { LINE = 64, PAGE = 4096 };

/* Two levels of 4 and 16 lines, a TLB of 8 entries, no fabric: everything happens at once. */
static inline csvf_cache_config fixture_small(void)
{
    csvf_cache_config config = {.struct_size = sizeof config};
    CHECK_STATUS(csvf_cache_defaults(&config), CSVF_OK);
    config.levels[0] = (csvf_cache_level){.size = 4 * LINE, .ways = 2, .cycles = 1};
    config.levels[1] = (csvf_cache_level){.size = 16 * LINE, .ways = 4, .cycles = 10};
    config.levels[2] = (csvf_cache_level){0};
    config.tlb_entries = 8;
    config.tlb_ways = 2;
    config.fabric_lines = 0;
    config.memory_cycles = 100;
    config.encryption_cycles = 7;
    return config;
}

static inline csvf_cache *fixture_cache(csvf_engine *engine, const csvf_cache_config *config)
{
    csvf_cache *cache = NULL;
    CHECK_STATUS(csvf_cache_create(&cache, engine, config), CSVF_OK);
    if (!cache)
        abort();
    return cache;
}

static inline csvf_cache_stats fixture_stats(const csvf_cache *cache, uint32_t asid)
{
    csvf_cache_stats stats = {.struct_size = sizeof stats};
    CHECK_STATUS(csvf_cache_statistics(cache, &stats, asid), CSVF_OK);
    return stats;
}

/* Another key than fixture_install's: the ASID's next guest. */
static inline void fixture_install_other(csvf_engine *engine, uint32_t asid)
{
    uint8_t key[32];
    test_fill(key, sizeof key, 777 + asid);
    CHECK_STATUS(csvf_asid_install(engine, asid, key, sizeof key), CSVF_OK);
}

#endif
