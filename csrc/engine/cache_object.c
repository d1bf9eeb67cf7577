/* Life of a core's caches, their configuration and statistics; traces. */
#define _GNU_SOURCE
#include <string.h>
#include <sys/mman.h>

#include "cache.h"

_Static_assert(sizeof(csvf_trace_access) == 16, "a record of a trace has no padding");

int csvf_cache_defaults(csvf_cache_config *config)
{
    if (!config || config->struct_size < sizeof *config)
        return CSVF_ERR_ARGUMENT;
    *config = (csvf_cache_config){
        .struct_size = sizeof *config,
        .levels = {{.size = 32 << 10, .ways = 8, .cycles = 4},
                   {.size = 512 << 10, .ways = 8, .cycles = 12},
                   {.size = 8 << 20, .ways = 16, .cycles = 40}},
        .tlb_entries = 1536,
        .tlb_ways = 12,
        .fabric_lines = 16,
        .c_bit = 47,
        .memory_cycles = 200,
        .encryption_cycles = 20,
    };
    return CSVF_OK;
}

/* ---- Configuration ---- */

/* Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_LENGTH. */
static int check_ways(uint64_t entries, uint32_t ways, int replacement)
{
    if (ways < 1 || ways > CSVF_CACHE_WAYS_MAX || replacement < CSVF_REPLACE_LRU || replacement > CSVF_REPLACE_RANDOM ||
        (replacement == CSVF_REPLACE_TREE && (ways & (ways - 1))))
        return CSVF_ERR_ARGUMENT;
    const uint64_t sets = entries / ways;
    return entries % ways || sets == 0 || (sets & (sets - 1)) || entries > (UINT64_C(1) << 31) ? CSVF_ERR_LENGTH : CSVF_OK;
}

static int read_config(csvf_cache_config *settings, uint32_t *last, const csvf_cache_config *config)
{
    settings->struct_size = sizeof *settings;
    if (!config) {
        const int status = csvf_cache_defaults(settings);
        if (status != CSVF_OK)
            return status;
    } else {
        if (config->struct_size < sizeof *config)
            return CSVF_ERR_ARGUMENT;
        for (size_t i = sizeof *config; i < config->struct_size; i++)
            if (((const uint8_t *)config)[i])
                return CSVF_ERR_ARGUMENT;
        *settings = *config;
    }
    if (settings->reserved || settings->fabric_lines > CSVF_FABRIC_LINES_MAX || settings->c_bit < 32 || settings->c_bit > 51 ||
        (settings->fill != CSVF_FILL_LINE && settings->fill != CSVF_FILL_PAGE) || settings->levels[0].size == 0)
        return CSVF_ERR_ARGUMENT;
    for (uint32_t level = 0; level < CSVF_CACHE_LEVELS; level++) {
        const csvf_cache_level *wanted = &settings->levels[level];
        if (wanted->size == 0) {
            for (uint32_t after = level + 1; after < CSVF_CACHE_LEVELS; after++)
                if (settings->levels[after].size)
                    return CSVF_ERR_ARGUMENT;
            break;
        }
        const int status = check_ways(wanted->size / CSVF_LINE_BYTES, wanted->ways, wanted->replacement);
        if (status != CSVF_OK || wanted->reserved || wanted->size % CSVF_LINE_BYTES)
            return status != CSVF_OK ? status : wanted->reserved ? CSVF_ERR_ARGUMENT : CSVF_ERR_LENGTH;
        *last = level;
    }
    return settings->tlb_entries ? check_ways(settings->tlb_entries, settings->tlb_ways, settings->tlb_replacement) : CSVF_OK;
}

/* ---- Memory: one mapping, laid out twice: once to add up, once to hand out ---- */

typedef struct layout {
    uint8_t *start;     /* NULL while adding up */
    size_t used;
} layout;

static void *take(layout *space, size_t count, size_t size)
{
    const size_t at = (space->used + CSVF_LINE_BYTES - 1) / CSVF_LINE_BYTES * CSVF_LINE_BYTES;
    space->used = at + count * size;
    return space->start ? space->start + at : NULL;
}

static void take_ways(layout *space, csvf__ways *array, uint64_t entries, uint32_t ways, int replacement, uint64_t seed)
{
    *array = (csvf__ways){.mask = entries / ways - 1, .ways = ways, .replacement = replacement, .random = 1 | seed * UINT64_C(0x9E3779B97F4A7C15)};
    array->tags = take(space, entries, sizeof *array->tags);
    array->stamps = take(space, entries, sizeof *array->stamps);
    array->trees = take(space, entries / ways, sizeof *array->trees);
}

static void take_parts(csvf_cache *cache, layout *space, size_t asids)
{
    const csvf_cache_config *config = &cache->config;
    for (uint32_t level = 0; level <= cache->last; level++) {
        const csvf_cache_level *wanted = &config->levels[level];
        const uint64_t entries = wanted->size / CSVF_LINE_BYTES;
        /* Another seed for each array: with one, all would give up the same way in turn. */
        take_ways(space, &cache->levels[level], entries, wanted->ways, wanted->replacement, config->seed + 2 * (level + 1));
        if (level < cache->last)
            cache->places[level] = take(space, entries, sizeof *cache->places[level]);
    }
    cache->data_length = config->levels[cache->last].size;
    cache->data = take(space, cache->data_length, 1);
    cache->dirty = take(space, cache->data_length / CSVF_LINE_BYTES, 1);
    if (config->tlb_entries) {
        take_ways(space, &cache->tlb, config->tlb_entries, config->tlb_ways, config->tlb_replacement,
                  config->seed + 2 * (CSVF_CACHE_LEVELS + 1));
        cache->translations = take(space, config->tlb_entries, sizeof *cache->translations);
    }
    cache->tables = take(space, asids, sizeof *cache->tables);
    cache->counts = take(space, asids, sizeof *cache->counts);
}

int csvf_cache_create(csvf_cache **result, csvf_engine *engine, const csvf_cache_config *config)
{
    if (!result)
        return CSVF_ERR_ARGUMENT;
    *result = NULL;
    if (!engine)
        return CSVF_ERR_ARGUMENT;
    csvf_cache shape = {.engine = engine, .first_line = engine->base / CSVF_LINE_BYTES};
    const int status = read_config(&shape.config, &shape.last, config);
    if (status != CSVF_OK)
        return status;
    if (engine->size >= CSVF__CACHE_MEMORY_MAX)
        return CSVF_ERR_LENGTH;

    const size_t asids = (size_t)engine->keys.asid_max + 1;
    layout space = {.start = NULL};
    (void)take(&space, 1, sizeof(csvf_cache));
    take_parts(&shape, &space, asids);
    const size_t length = (space.used + CSVF_PAGE_BYTES - 1) / CSVF_PAGE_BYTES * CSVF_PAGE_BYTES;
    void *mapping = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED)
        return CSVF_ERR_MEMORY;
    (void)madvise(mapping, length, MADV_DONTDUMP);      /* guests' plaintext */
    (void)madvise(mapping, length, MADV_HUGEPAGE);
    space = (layout){.start = mapping};
    csvf_cache *cache = take(&space, 1, sizeof *cache);
    *cache = shape;
    take_parts(cache, &space, asids);
    cache->mapping = mapping;
    cache->mapping_length = length;
    for (size_t asid = 0; asid < asids; asid++)
        cache->tables[asid] = (csvf__tables){CSVF_NO_TABLE, CSVF_NO_TABLE};
    *result = cache;
    return CSVF_OK;
}

void csvf_cache_destroy(csvf_cache *cache)
{
    if (!cache)
        return;
    void *mapping = cache->mapping;
    const size_t length = cache->mapping_length;
    csvf_wipe(cache->data, cache->data_length);
    csvf_wipe(cache, sizeof *cache);    /* the fabric's lines */
    munmap(mapping, length);
}

/* ---- Facts ---- */

int csvf_cache_contents(const csvf_cache *cache, uint64_t *lines, uint64_t *dirty, uint64_t *waiting, uint32_t asid)
{
    if (!cache)
        return CSVF_ERR_ARGUMENT;
    if (asid > cache->engine->keys.asid_max)
        return CSVF_ERR_ASID;
    uint64_t found = 0, found_dirty = 0, found_waiting = 0;
    for (uint64_t place = 0; place < cache->data_length / CSVF_LINE_BYTES; place++) {
        const uint64_t tag = cache->levels[cache->last].tags[place];
        const int is_its = tag && csvf__tag_asid(tag) == asid;
        found += (uint64_t)is_its;
        found_dirty += (uint64_t)(is_its && cache->dirty[place]);
    }
    for (uint32_t i = 0; i < cache->fabric_count; i++)
        found_waiting += csvf__tag_asid(cache->fabric_tags[(cache->fabric_first + i) % cache->config.fabric_lines]) == asid;
    if (lines)
        *lines = found;
    if (dirty)
        *dirty = found_dirty;
    if (waiting)
        *waiting = found_waiting;
    return CSVF_OK;
}

int csvf_cache_statistics(const csvf_cache *cache, csvf_cache_stats *stats, uint32_t asid)
{
    if (!cache || !stats || stats->struct_size < sizeof *stats)
        return CSVF_ERR_ARGUMENT;
    if (asid > cache->engine->keys.asid_max)
        return CSVF_ERR_ASID;
    const csvf__cache_counts *counts = &cache->counts[asid];
    csvf_cache_stats filled = {
        .struct_size = stats->struct_size,
        .reads = counts->reads,
        .writes = counts->writes,
        .walk_reads = counts->walk_reads,
        .misses = counts->misses,
        .write_backs = counts->write_backs,
        .lines_lost = counts->lines_lost,
        .bytes_decrypted = counts->bytes_decrypted,
        .bytes_encrypted = counts->bytes_encrypted,
        .tlb_hits = counts->tlb_hits,
        .tlb_misses = counts->tlb_misses,
        .faults = counts->faults,
        .cycles = counts->cycles,
        .encryption_cycles = counts->encryption_cycles,
    };
    memcpy(filled.hits, counts->hits, sizeof filled.hits);
    *stats = filled;
    return CSVF_OK;
}

/* ---- Traces ---- */

static int run_one(csvf_cache *cache, csvf__cache_counts *counts, uint32_t asid, const csvf_trace_access *one, uint64_t address,
                   size_t length, int c_bit)
{
    return one->access & CSVF_ACCESS_WRITE ? csvf__cache_store(cache, counts, asid, address, NULL, length, c_bit)
                                           : csvf__cache_load(cache, NULL, length, counts, asid, address, c_bit);
}

static int run_virtual(csvf_cache *cache, csvf__cache_counts *counts, uint32_t asid, const csvf_trace_access *one)
{
    uint64_t address = one->address;
    for (size_t length = one->length; length;) {
        const size_t room = CSVF_PAGE_BYTES - address % CSVF_PAGE_BYTES, part = length < room ? length : room;
        csvf_translation found;
        int status = csvf__tlb_translate(cache, &found, asid, address, one->access);
        if (status == CSVF_OK)
            status = csvf__check_range(cache->engine, found.address, part);
        if (status == CSVF_OK)
            status = run_one(cache, counts, asid, one, found.address, part, found.c_bit);
        if (status != CSVF_OK)
            return status;
        address += part;
        length -= part;
    }
    return CSVF_OK;
}

int csvf_cache_run(csvf_cache *cache, size_t *done, uint32_t asid, const csvf_trace_access *accesses, size_t count, int is_virtual,
                   int c_bit)
{
    if (done)
        *done = 0;
    if (!cache || (!accesses && count) || (c_bit != 0 && c_bit != 1) || (is_virtual != 0 && is_virtual != 1))
        return CSVF_ERR_ARGUMENT;
    int status = csvf__cache_check_asid(cache, asid, is_virtual ? 0 : c_bit);
    if (status != CSVF_OK)
        return status;
    csvf__cache_counts *counts = &cache->counts[asid];
    size_t at = 0;
    for (; at < count; at++) {
        const csvf_trace_access *one = &accesses[at];
        if (one->access > (CSVF_ACCESS_WRITE | CSVF_ACCESS_EXECUTE | CSVF_ACCESS_USER))
            status = CSVF_ERR_ARGUMENT;
        else if (one->length == 0)
            status = CSVF_ERR_LENGTH;
        else if (is_virtual)
            status = run_virtual(cache, counts, asid, one);
        else if ((status = csvf__check_range(cache->engine, one->address, one->length)) == CSVF_OK)
            status = run_one(cache, counts, asid, one, one->address, one->length, c_bit);
        if (status != CSVF_OK)
            break;
    }
    if (done)
        *done = at;
    return status;
}
