/* Page-table walks: guest tables with the C-bit in the entry, nested tables, both read through the caches. What tables hold are
 * addresses, which are public here as everywhere: they decide branches and index memory. */
#include <string.h>

#include "cache.h"

enum {
    LEVELS = 4,
    ENTRY_BYTES = 8,
    PRESENT = 1,
    WRITABLE = 2,
    USER = 4,
    LARGE = 128,
    INDEX_BITS = 9,
    PAGE_BITS = 12
};
#define NO_EXECUTE (UINT64_C(1) << 63)
#define BITS(low, high) ((UINT64_MAX << (low)) & (UINT64_MAX >> (63 - (high))))

/* What one stage found. */
typedef struct stage {
    uint64_t address;
    int c_bit, is_writable, is_user, is_executable;
} stage;

static int fault(csvf_translation *translation, uint64_t address, int where, int level)
{
    *translation = (csvf_translation){.address = address, .fault_stage = where, .fault_level = level};
    return CSVF_ERR_FAULT;
}

/* An entry at a system physical address. Guests' tables are read as encrypted, the host's as they are. */
static int read_entry(csvf_cache *cache, uint64_t *entry, csvf__cache_counts *counts, uint32_t asid, uint64_t address)
{
    int status = csvf__check_range(cache->engine, address, ENTRY_BYTES);
    uint64_t place;
    if (status == CSVF_OK)
        status = csvf__cache_find(cache, &place, counts, csvf__cache_tag(cache, asid, address, asid != 0));
    if (status != CSVF_OK)
        return status;
    memcpy(entry, csvf__cache_line(cache, place) + address % CSVF_LINE_BYTES, ENTRY_BYTES);
    counts->walk_reads++;
    return CSVF_OK;
}

static int is_allowed(const stage *found, uint32_t access)
{
    return (found->is_writable || !(access & CSVF_ACCESS_WRITE)) && (found->is_user || !(access & CSVF_ACCESS_USER)) &&
           (found->is_executable || !(access & CSVF_ACCESS_EXECUTE));
}

/* What an entry adds to the way down. Returns 1 if the walk ends here with a page, 0 if it goes on, -1 if the entry refuses. */
static int take_entry(stage *found, uint64_t *table, uint64_t entry, int level, uint32_t c_bit, int allows_c_bit)
{
    const uint64_t reserved = c_bit < 51 ? BITS(c_bit + 1, 51) : 0;
    const int has_c_bit = (int)(entry >> c_bit & 1), is_large = level > 1 && (entry & LARGE);
    if (!(entry & PRESENT) || entry & reserved || (has_c_bit && !allows_c_bit) || (is_large && level == LEVELS))
        return -1;
    found->is_writable &= (entry & WRITABLE) != 0;
    found->is_user &= (entry & USER) != 0;
    found->is_executable &= !(entry & NO_EXECUTE);
    if (level > 1 && !is_large) {
        *table = entry & BITS(PAGE_BITS, c_bit - 1);
        return 0;
    }
    const uint32_t bits = PAGE_BITS + INDEX_BITS * ((uint32_t)level - 1);
    found->address = (entry & BITS(bits, c_bit - 1)) | (found->address & ((UINT64_C(1) << bits) - 1));
    found->c_bit = has_c_bit;
    return 1;
}

/* The nested stage: a guest physical address becomes a system physical one. Every access to it is one from user mode. */
static int walk_nested(csvf_cache *cache, csvf_translation *translation, stage *found, csvf__cache_counts *counts, uint32_t asid,
                       uint64_t address, uint32_t access)
{
    *found = (stage){.address = address, .is_writable = 1, .is_user = 1, .is_executable = 1};
    uint64_t table = cache->tables[asid].nested_root;
    if (table == CSVF_NO_TABLE)
        return CSVF_OK;
    if (address >> (PAGE_BITS + LEVELS * INDEX_BITS))
        return fault(translation, address, CSVF_STAGE_NESTED, 0);
    for (int level = LEVELS; level >= 1; level--) {
        const uint64_t index = address >> (PAGE_BITS + INDEX_BITS * (level - 1)) & ((1 << INDEX_BITS) - 1);
        uint64_t entry;
        const int status = read_entry(cache, &entry, counts, 0, table + index * ENTRY_BYTES);
        if (status != CSVF_OK)
            return status;
        const int end = take_entry(found, &table, entry, level, cache->config.c_bit, 0);
        if (end < 0 || (end && !is_allowed(found, access | CSVF_ACCESS_USER)))
            return fault(translation, address, CSVF_STAGE_NESTED, level);
        if (end)
            break;
    }
    return CSVF_OK;
}

/* The guest's stage: a virtual address becomes a guest physical one; its tables' addresses go through the nested stage. */
static int walk_guest(csvf_cache *cache, csvf_translation *translation, stage *found, csvf__cache_counts *counts, uint32_t asid,
                      uint64_t address, uint32_t access)
{
    const uint32_t c_bit = cache->config.c_bit;
    *found = (stage){.address = address, .c_bit = asid != 0, .is_writable = 1, .is_user = 1, .is_executable = 1};
    uint64_t table = cache->tables[asid].guest_root;
    if (table == CSVF_NO_TABLE)
        return address >> c_bit ? fault(translation, address, CSVF_STAGE_GUEST, 0) : CSVF_OK;
    const uint64_t above = address >> 47;
    if (above != 0 && above != UINT64_MAX >> 47)
        return fault(translation, address, CSVF_STAGE_GUEST, 0);
    table &= BITS(PAGE_BITS, c_bit - 1);
    for (int level = LEVELS; level >= 1; level--) {
        const uint64_t index = address >> (PAGE_BITS + INDEX_BITS * (level - 1)) & ((1 << INDEX_BITS) - 1);
        stage place;
        uint64_t entry;
        int status = walk_nested(cache, translation, &place, counts, asid, table + index * ENTRY_BYTES, CSVF_ACCESS_READ);
        if (status == CSVF_OK)
            status = read_entry(cache, &entry, counts, asid, place.address);
        if (status != CSVF_OK)
            return status;
        const int end = take_entry(found, &table, entry, level, c_bit, asid != 0);
        if (end < 0 || (end && !is_allowed(found, access)))
            return fault(translation, address, CSVF_STAGE_GUEST, level);
        if (end)
            break;
    }
    return CSVF_OK;
}

int csvf__walk(csvf_cache *cache, csvf_translation *translation, uint64_t *entry, uint32_t asid, uint64_t address, uint32_t access)
{
    csvf__cache_counts *counts = &cache->counts[asid];
    stage guest, nested;
    int status = walk_guest(cache, translation, &guest, counts, asid, address, access);
    if (status == CSVF_OK)
        status = walk_nested(cache, translation, &nested, counts, asid, guest.address, access & ~CSVF_ACCESS_USER);
    if (status != CSVF_OK)
        return status;
    *entry = nested.address / CSVF_PAGE_BYTES * CSVF_PAGE_BYTES | (guest.c_bit ? CSVF__TLB_C_BIT : 0) |
             (guest.is_writable && nested.is_writable ? CSVF__TLB_WRITE : 0) | (guest.is_user ? CSVF__TLB_USER : 0) |
             (guest.is_executable && nested.is_executable ? CSVF__TLB_EXECUTE : 0);
    return CSVF_OK;
}
