/* The ASID-tagged TLB, and access at virtual addresses. */
#include <string.h>

#include "cache.h"

/* A TLB tag: the page number's 48 bits that tell canonical and low addresses apart, the ASID, and a bit that makes it nonzero. */
enum { ASID_SHIFT = 1, PAGE_SHIFT = 17 };

static inline uint64_t page_number(uint64_t address) { return address / CSVF_PAGE_BYTES & ((UINT64_C(1) << 47) - 1); }

static inline uint64_t tag_of(uint32_t asid, uint64_t address)
{
    return page_number(address) << PAGE_SHIFT | (uint64_t)asid << ASID_SHIFT | 1;
}

static inline uint32_t allowed_by(uint64_t entry)
{
    return (entry & CSVF__TLB_WRITE ? CSVF_ACCESS_WRITE : 0) | (entry & CSVF__TLB_EXECUTE ? CSVF_ACCESS_EXECUTE : 0) |
           (entry & CSVF__TLB_USER ? CSVF_ACCESS_USER : 0);
}

static inline void translate_by(csvf_translation *translation, uint64_t entry, uint64_t address)
{
    *translation = (csvf_translation){
        .address = entry / CSVF_PAGE_BYTES * CSVF_PAGE_BYTES + address % CSVF_PAGE_BYTES,
        .c_bit = (int)(entry & CSVF__TLB_C_BIT),
        .allowed = allowed_by(entry),
    };
}

int csvf__tlb_translate(csvf_cache *cache, csvf_translation *translation, uint32_t asid, uint64_t address, uint32_t access)
{
    csvf__cache_counts *counts = &cache->counts[asid];
    const uint64_t set = page_number(address), tag = tag_of(asid, address);
    if (cache->config.tlb_entries) {
        const int64_t index = csvf__ways_find(&cache->tlb, set, tag);
        if (index >= 0) {
            translate_by(translation, cache->translations[index], address);
            if ((access & ~translation->allowed) == 0) {
                csvf__ways_touch(&cache->tlb, set, (uint64_t)index);
                counts->tlb_hits++;
                return CSVF_OK;
            }
            /* As on x86-64: what a cached translation forbids is looked up again before it is a fault. */
            csvf__ways_drop(&cache->tlb, (uint64_t)index);
        }
    }
    counts->tlb_misses++;
    uint64_t entry;
    const int status = csvf__walk(cache, translation, &entry, asid, address, access);
    if (status == CSVF_ERR_FAULT)
        counts->faults++;
    if (status != CSVF_OK)
        return status;
    translate_by(translation, entry, address);
    if (cache->config.tlb_entries) {
        const uint64_t index = csvf__ways_victim(&cache->tlb, set);
        csvf__ways_put(&cache->tlb, set, index, tag);
        cache->translations[index] = entry;
    }
    return CSVF_OK;
}

/* ---- Public ---- */

static const uint32_t every_access = CSVF_ACCESS_WRITE | CSVF_ACCESS_EXECUTE | CSVF_ACCESS_USER;

static int check(const csvf_cache *cache, uint32_t asid, uint32_t access)
{
    if (!cache || access & ~every_access)
        return CSVF_ERR_ARGUMENT;
    return csvf__cache_check_asid(cache, asid, 0);
}

int csvf_cache_translate(csvf_cache *cache, csvf_translation *translation, uint32_t asid, uint64_t address, uint32_t access)
{
    if (!translation)
        return CSVF_ERR_ARGUMENT;
    const int status = check(cache, asid, access);
    if (status != CSVF_OK)
        return status;
    csvf_translation found = {0};
    const int outcome = csvf__tlb_translate(cache, &found, asid, address, access);
    if (outcome == CSVF_OK || outcome == CSVF_ERR_FAULT)
        *translation = found;
    return outcome;
}

/* One page's part of an access: translates it and checks that the frame lies in the memory. */
static int next_part(csvf_cache *cache, csvf_translation *found, size_t *part, uint32_t asid, uint64_t address, size_t length,
                     uint32_t access)
{
    const size_t room = CSVF_PAGE_BYTES - address % CSVF_PAGE_BYTES;
    *part = length < room ? length : room;
    const int status = csvf__tlb_translate(cache, found, asid, address, access);
    return status == CSVF_OK ? csvf__check_range(cache->engine, found->address, *part) : status;
}

int csvf_cache_read_virtual(csvf_cache *cache, void *data, size_t length, uint32_t asid, uint64_t address, uint32_t access)
{
    int status = check(cache, asid, access);
    if (status == CSVF_OK && ((!data && length) || access & CSVF_ACCESS_WRITE))
        status = CSVF_ERR_ARGUMENT;
    if (status == CSVF_OK)
        status = csvf__check_outside(cache->engine, data, length);
    uint8_t *out = data;
    while (status == CSVF_OK && length) {
        csvf_translation found;
        size_t part;
        status = next_part(cache, &found, &part, asid, address, length, access);
        if (status == CSVF_OK)
            status = csvf__cache_load(cache, out, part, &cache->counts[asid], asid, found.address, found.c_bit);
        out += part;
        address += part;
        length -= part;
    }
    return status;
}

int csvf_cache_write_virtual(csvf_cache *cache, uint32_t asid, uint64_t address, const void *data, size_t length, uint32_t access)
{
    int status = check(cache, asid, access);
    if (status == CSVF_OK && ((!data && length) || access & CSVF_ACCESS_EXECUTE))
        status = CSVF_ERR_ARGUMENT;
    if (status == CSVF_OK)
        status = csvf__check_outside(cache->engine, data, length);
    const uint8_t *in = data;
    while (status == CSVF_OK && length) {
        csvf_translation found;
        size_t part;
        status = next_part(cache, &found, &part, asid, address, length, access | CSVF_ACCESS_WRITE);
        if (status == CSVF_OK)
            status = csvf__cache_store(cache, &cache->counts[asid], asid, found.address, in, part, found.c_bit);
        in += part;
        address += part;
        length -= part;
    }
    return status;
}

int csvf_cache_set_tables(csvf_cache *cache, uint32_t asid, uint64_t guest_root, uint64_t nested_root)
{
    const int status = check(cache, asid, 0);
    if (status != CSVF_OK)
        return status;
    if ((guest_root != CSVF_NO_TABLE && guest_root % CSVF_PAGE_BYTES) ||
        (nested_root != CSVF_NO_TABLE && nested_root % CSVF_PAGE_BYTES))
        return CSVF_ERR_ALIGNMENT;
    cache->tables[asid] = (csvf__tables){guest_root, nested_root};
    return CSVF_OK;
}

int csvf_tlb_invalidate_page(csvf_cache *cache, uint32_t asid, uint64_t address)
{
    const int status = check(cache, asid, 0);
    if (status != CSVF_OK || cache->config.tlb_entries == 0)
        return status;
    const int64_t index = csvf__ways_find(&cache->tlb, page_number(address), tag_of(asid, address));
    if (index >= 0)
        csvf__ways_drop(&cache->tlb, (uint64_t)index);
    return CSVF_OK;
}

int csvf_tlb_flush_asid(csvf_cache *cache, uint32_t asid)
{
    const int status = check(cache, asid, 0);
    if (status != CSVF_OK)
        return status;
    for (uint64_t index = 0; index < cache->config.tlb_entries; index++)
        if ((cache->tlb.tags[index] >> ASID_SHIFT & 0xFFFF) == asid)
            csvf__ways_drop(&cache->tlb, index);
    return CSVF_OK;
}

void csvf_tlb_flush(csvf_cache *cache)
{
    if (!cache)
        return;
    for (uint64_t index = 0; index < cache->config.tlb_entries; index++)
        csvf__ways_drop(&cache->tlb, index);
}
