/* The parts of a core's caches and the steps that its files share. Internal.
 *
 * Levels above the last hold tags and the place of the line in the last one: in an inclusive hierarchy that cannot be told from copies
 * of the line at every level, and no copy can be forgotten. */
#ifndef CSVF_CACHE_H
#define CSVF_CACHE_H

#include "engine.h"
#include "ways.h"

/* A cache tag: line number inside the memory, ASID, C-bit, and a bit that makes it nonzero. */
enum { CSVF__TAG_VALID = 1, CSVF__TAG_C_BIT = 2, CSVF__TAG_ASID_SHIFT = 2, CSVF__TAG_LINE_SHIFT = 18 };
#define CSVF__CACHE_MEMORY_MAX (UINT64_C(1) << 52)   /* line numbers have 46 bits */

typedef struct csvf__cache_counts {
    uint64_t reads, writes, walk_reads, hits[CSVF_CACHE_LEVELS], misses, write_backs, lines_lost, bytes_decrypted, bytes_encrypted,
        tlb_hits, tlb_misses, faults, cycles, encryption_cycles;
} csvf__cache_counts;

typedef struct csvf__tables {
    uint64_t guest_root, nested_root;
} csvf__tables;

struct csvf_cache {
    csvf_engine *engine;
    uint64_t first_line;            /* of the memory, in system physical lines: sets are chosen by physical address */
    uint32_t last;                  /* the last level's number */
    csvf__ways levels[CSVF_CACHE_LEVELS];
    uint32_t *places[CSVF_CACHE_LEVELS];    /* levels above the last: index of the line in the last level */
    uint8_t *data;                  /* the last level's lines, 64 bytes each: plaintext */
    uint8_t *dirty;
    csvf__ways tlb;
    uint64_t *translations;         /* beside tlb.tags: frame address and csvf__tlb_* flags */
    csvf__tables *tables;           /* [asid_max + 1] */
    csvf__cache_counts *counts;     /* [asid_max + 1] */
    csvf_cache_config config;
    uint32_t fabric_first, fabric_count;
    uint64_t fabric_tags[CSVF_FABRIC_LINES_MAX];
    _Alignas(64) uint8_t fabric_data[CSVF_FABRIC_LINES_MAX][CSVF_LINE_BYTES];
    _Alignas(64) uint8_t page[CSVF_PAGE_BYTES];     /* a page on its way in */
    void *mapping;
    size_t mapping_length, data_length;
};

/* Flags of a cached translation, below its frame address. */
enum { CSVF__TLB_C_BIT = 1, CSVF__TLB_WRITE = 2, CSVF__TLB_USER = 4, CSVF__TLB_EXECUTE = 8 };

/* Unencrypted lines are of one context, whoever asks. */
static inline uint64_t csvf__cache_tag(const csvf_cache *cache, uint32_t asid, uint64_t address, int c_bit)
{
    const uint64_t line = (address - cache->engine->base) / CSVF_LINE_BYTES;
    return line << CSVF__TAG_LINE_SHIFT | (c_bit ? (uint64_t)asid << CSVF__TAG_ASID_SHIFT | CSVF__TAG_C_BIT : 0) | CSVF__TAG_VALID;
}

static inline uint32_t csvf__tag_asid(uint64_t tag) { return (uint32_t)(tag >> CSVF__TAG_ASID_SHIFT & 0xFFFF); }

static inline uint64_t csvf__tag_set(const csvf_cache *cache, uint64_t tag)
{
    return cache->first_line + (tag >> CSVF__TAG_LINE_SHIFT);
}

/* Returns: CSVF_OK, CSVF_ERR_ASID. */
static inline int csvf__cache_check_asid(const csvf_cache *cache, uint32_t asid, int c_bit)
{
    return asid > cache->engine->keys.asid_max || (c_bit && asid == 0) ? CSVF_ERR_ASID : CSVF_OK;
}

/* Not found in the first level: looks further, fills from DRAM if need be, and moves the line up. (cache.c)
 * Returns: CSVF_OK, CSVF_ERR_ASID (the line is encrypted and its ASID has no key; nothing has changed). */
int csvf__cache_fetch(csvf_cache *cache, uint64_t *place, csvf__cache_counts *counts, uint64_t tag);

/* Place of a line in the last level, brought there if need be. Counts hits, misses and cycles for `counts`. */
static inline int csvf__cache_find(csvf_cache *cache, uint64_t *place, csvf__cache_counts *counts, uint64_t tag)
{
    csvf__ways *first = &cache->levels[0];
    const uint64_t set = csvf__tag_set(cache, tag);
    const int64_t index = csvf__ways_find(first, set, tag);
    if (index < 0)
        return csvf__cache_fetch(cache, place, counts, tag);
    csvf__ways_touch(first, set, (uint64_t)index);
    counts->hits[0]++;
    counts->cycles += cache->config.levels[0].cycles;
    *place = cache->last ? cache->places[0][index] : (uint64_t)index;
    return CSVF_OK;
}

static inline uint8_t *csvf__cache_line(const csvf_cache *cache, uint64_t place) { return cache->data + place * CSVF_LINE_BYTES; }

/* Reads or writes that lie in range and whose arguments are checked; a write without data makes lines dirty only. (cache.c) */
int csvf__cache_load(csvf_cache *cache, uint8_t *data, size_t length, csvf__cache_counts *counts, uint32_t asid, uint64_t address,
                     int c_bit);
int csvf__cache_store(csvf_cache *cache, csvf__cache_counts *counts, uint32_t asid, uint64_t address, const uint8_t *data,
                      size_t length, int c_bit);

/* ---- Translation ---- */

/* Translation of one page through the TLB. Returns: as csvf_cache_translate. (tlb.c) */
int csvf__tlb_translate(csvf_cache *cache, csvf_translation *translation, uint32_t asid, uint64_t address, uint32_t access);

/* Translation by the tables alone: `entry` is what the TLB keeps of it. (walk.c) */
int csvf__walk(csvf_cache *cache, csvf_translation *translation, uint64_t *entry, uint32_t asid, uint64_t address,
               uint32_t access);

#endif
