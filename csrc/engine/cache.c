/* Lines of a core's caches: hits, fills, evictions, the fabric, and access at physical addresses. */
#include <string.h>

#include "cache.h"

/* ---- Towards DRAM ---- */

/* The engine's part: encryption under the key that the line's ASID has now, or none for an unencrypted line. A line without a key is
 * lost: to write its plaintext would be worse than anything the hardware could do. */
static void write_line(csvf_cache *cache, uint64_t tag, const uint8_t *data)
{
    const uint32_t asid = csvf__tag_asid(tag);
    const uint64_t address = cache->engine->base + (tag >> CSVF__TAG_LINE_SHIFT) * CSVF_LINE_BYTES;
    csvf__cache_counts *counts = &cache->counts[asid];
    if (csvf_write(cache->engine, asid, address, data, CSVF_LINE_BYTES) != CSVF_OK)
        counts->lines_lost++;
    else if (asid)
        counts->bytes_encrypted += CSVF_LINE_BYTES;
}

/* Lets the oldest `count` waiting lines go. */
static void drain(csvf_cache *cache, uint32_t count)
{
    for (; count; count--) {
        const uint32_t at = cache->fabric_first;
        write_line(cache, cache->fabric_tags[at], cache->fabric_data[at]);
        memset(cache->fabric_data[at], 0, CSVF_LINE_BYTES);
        cache->fabric_first = (at + 1) % cache->config.fabric_lines;
        cache->fabric_count--;
    }
}

/* The fabric keeps the order of what is done to one physical line, whatever its tag: before lines [line, line + count) are read from
 * DRAM, what waits for one of them goes there. */
static void drain_lines(csvf_cache *cache, uint64_t line, uint64_t count)
{
    for (uint32_t i = cache->fabric_count; i; i--) {
        const uint32_t at = (cache->fabric_first + i - 1) % cache->config.fabric_lines;
        if ((cache->fabric_tags[at] >> CSVF__TAG_LINE_SHIFT) - line < count) {
            drain(cache, i);
            return;
        }
    }
}

/* A dirty line leaves the caches. `counts` is of the ASID at work, which the write-back may hold up. */
static void write_back(csvf_cache *cache, csvf__cache_counts *counts, uint64_t place)
{
    const uint64_t tag = cache->levels[cache->last].tags[place];
    cache->counts[csvf__tag_asid(tag)].write_backs++;
    if (counts)
        counts->cycles += cache->config.write_back_cycles;
    if (cache->config.fabric_lines == 0) {
        write_line(cache, tag, csvf__cache_line(cache, place));
        return;
    }
    if (cache->fabric_count == cache->config.fabric_lines)
        drain(cache, 1);
    const uint32_t at = (cache->fabric_first + cache->fabric_count++) % cache->config.fabric_lines;
    cache->fabric_tags[at] = tag;
    memcpy(cache->fabric_data[at], csvf__cache_line(cache, place), CSVF_LINE_BYTES);
}

/* ---- Levels ---- */

/* Inclusion: what leaves level `from` leaves those above it. */
static void drop_above(csvf_cache *cache, uint32_t from, uint64_t tag)
{
    const uint64_t set = csvf__tag_set(cache, tag);
    for (uint32_t level = 0; level < from; level++) {
        const int64_t index = csvf__ways_find(&cache->levels[level], set, tag);
        if (index >= 0)
            csvf__ways_drop(&cache->levels[level], (uint64_t)index);
    }
}

/* Makes room in the last level and puts a line's bytes there. */
static uint64_t put_line(csvf_cache *cache, csvf__cache_counts *counts, uint64_t tag, const uint8_t *data)
{
    csvf__ways *last = &cache->levels[cache->last];
    const uint64_t set = csvf__tag_set(cache, tag), place = csvf__ways_victim(last, set);
    if (last->tags[place]) {
        drop_above(cache, cache->last, last->tags[place]);
        if (cache->dirty[place])
            write_back(cache, counts, place);
    }
    csvf__ways_put(last, set, place, tag);
    cache->dirty[place] = 0;
    memcpy(csvf__cache_line(cache, place), data, CSVF_LINE_BYTES);
    return place;
}

/* Enters a line of the last level into the levels above `from`, nearest last. */
static void raise_line(csvf_cache *cache, uint32_t from, uint64_t tag, uint64_t place)
{
    const uint64_t set = csvf__tag_set(cache, tag);
    for (uint32_t level = from; level-- > 0;) {
        csvf__ways *ways = &cache->levels[level];
        const uint64_t index = csvf__ways_victim(ways, set);
        if (ways->tags[index])
            drop_above(cache, level, ways->tags[index]);
        csvf__ways_put(ways, set, index, tag);
        cache->places[level][index] = (uint32_t)place;
    }
}

/* Decrypts the line, or in page mode its page, and puts it into the last level. */
static int fill(csvf_cache *cache, uint64_t *place, csvf__cache_counts *counts, uint64_t tag)
{
    const uint32_t asid = csvf__tag_asid(tag), is_page = cache->config.fill == CSVF_FILL_PAGE;
    const uint64_t lines = is_page ? CSVF_PAGE_BYTES / CSVF_LINE_BYTES : 1;
    const uint64_t wanted = tag >> CSVF__TAG_LINE_SHIFT, line = wanted / lines * lines;
    const uint64_t context = tag & ((UINT64_C(1) << CSVF__TAG_LINE_SHIFT) - 1);
    drain_lines(cache, line, lines);
    const int status = csvf_read(cache->engine, cache->page, lines * CSVF_LINE_BYTES, asid,
                                 cache->engine->base + line * CSVF_LINE_BYTES);
    if (status != CSVF_OK)
        return status;
    if (asid)
        counts->bytes_decrypted += lines * CSVF_LINE_BYTES;
    if (is_page) {
        /* Which of them are cached is settled before the first one goes in: a dirty line that its neighbours push out must not
         * be filled again with what DRAM held before. */
        uint64_t absent = 0;
        for (uint64_t i = 0; i < lines; i++) {
            const uint64_t other = (line + i) << CSVF__TAG_LINE_SHIFT | context;
            if (csvf__ways_find(&cache->levels[cache->last], csvf__tag_set(cache, other), other) < 0)
                absent |= UINT64_C(1) << i;
        }
        for (uint64_t i = 0; i < lines; i++)
            if ((absent >> i & 1) && line + i != wanted)
                (void)put_line(cache, counts, (line + i) << CSVF__TAG_LINE_SHIFT | context, cache->page + i * CSVF_LINE_BYTES);
    }
    *place = put_line(cache, counts, tag, cache->page + (wanted - line) * CSVF_LINE_BYTES);
    csvf_wipe(cache->page, lines * CSVF_LINE_BYTES);
    return CSVF_OK;
}

int csvf__cache_fetch(csvf_cache *cache, uint64_t *place, csvf__cache_counts *counts, uint64_t tag)
{
    const uint64_t set = csvf__tag_set(cache, tag);
    for (uint32_t level = 1; level <= cache->last; level++) {
        csvf__ways *ways = &cache->levels[level];
        const int64_t index = csvf__ways_find(ways, set, tag);
        if (index < 0)
            continue;
        csvf__ways_touch(ways, set, (uint64_t)index);
        counts->hits[level]++;
        counts->cycles += cache->config.levels[level].cycles;
        *place = level == cache->last ? (uint64_t)index : cache->places[level][index];
        raise_line(cache, level, tag, *place);
        return CSVF_OK;
    }
    const int status = fill(cache, place, counts, tag);
    if (status != CSVF_OK)
        return status;
    counts->misses++;
    counts->cycles += cache->config.memory_cycles;
    if (csvf__tag_asid(tag)) {
        counts->cycles += cache->config.encryption_cycles;
        counts->encryption_cycles += cache->config.encryption_cycles;
    }
    raise_line(cache, cache->last, tag, *place);
    return CSVF_OK;
}

/* ---- Access ---- */

static inline size_t part_of_line(uint64_t address, size_t length)
{
    const size_t room = CSVF_LINE_BYTES - address % CSVF_LINE_BYTES;
    return length < room ? length : room;
}

/* Words of the sizes that instructions move need no call. */
static inline void copy(uint8_t *to, const uint8_t *from, size_t length)
{
    if (length == 8)
        memcpy(to, from, 8);
    else if (length == 4)
        memcpy(to, from, 4);
    else
        memcpy(to, from, length);
}

int csvf__cache_load(csvf_cache *cache, uint8_t *data, size_t length, csvf__cache_counts *counts, uint32_t asid, uint64_t address,
                     int c_bit)
{
    while (length) {
        const size_t part = part_of_line(address, length);
        uint64_t place;
        const int status = csvf__cache_find(cache, &place, counts, csvf__cache_tag(cache, asid, address, c_bit));
        if (status != CSVF_OK)
            return status;
        if (data) {
            copy(data, csvf__cache_line(cache, place) + address % CSVF_LINE_BYTES, part);
            data += part;
        }
        counts->reads++;
        address += part;
        length -= part;
    }
    return CSVF_OK;
}

int csvf__cache_store(csvf_cache *cache, csvf__cache_counts *counts, uint32_t asid, uint64_t address, const uint8_t *data,
                      size_t length, int c_bit)
{
    while (length) {
        const size_t part = part_of_line(address, length);
        uint64_t place;
        const int status = csvf__cache_find(cache, &place, counts, csvf__cache_tag(cache, asid, address, c_bit));
        if (status != CSVF_OK)
            return status;
        if (data) {
            copy(csvf__cache_line(cache, place) + address % CSVF_LINE_BYTES, data, part);
            data += part;
        }
        cache->dirty[place] = 1;
        counts->writes++;
        address += part;
        length -= part;
    }
    return CSVF_OK;
}

/* Returns: CSVF_OK, and what csvf_cache_read says. */
static inline int check(const csvf_cache *cache, const void *data, size_t length, uint32_t asid, uint64_t address, int c_bit)
{
    if (!cache || (!data && length) || (c_bit != 0 && c_bit != 1))
        return CSVF_ERR_ARGUMENT;
    int status = csvf__cache_check_asid(cache, asid, c_bit);
    if (status == CSVF_OK)
        status = csvf__check_range(cache->engine, address, length);
    return status == CSVF_OK ? csvf__check_outside(cache->engine, data, length) : status;
}

int csvf_cache_read(csvf_cache *cache, void *data, size_t length, uint32_t asid, uint64_t address, int c_bit)
{
    const int status = check(cache, data, length, asid, address, c_bit);
    return status == CSVF_OK ? csvf__cache_load(cache, data, length, &cache->counts[asid], asid, address, c_bit) : status;
}

int csvf_cache_write(csvf_cache *cache, uint32_t asid, uint64_t address, const void *data, size_t length, int c_bit)
{
    const int status = check(cache, data, length, asid, address, c_bit);
    return status == CSVF_OK ? csvf__cache_store(cache, &cache->counts[asid], asid, address, data, length, c_bit) : status;
}

/* ---- Flushes ---- */

static void flush_place(csvf_cache *cache, csvf__cache_counts *counts, uint64_t place)
{
    csvf__ways *last = &cache->levels[cache->last];
    drop_above(cache, cache->last, last->tags[place]);
    if (cache->dirty[place])
        write_back(cache, counts, place);
    csvf__ways_drop(last, place);
    cache->dirty[place] = 0;
    csvf_wipe(csvf__cache_line(cache, place), CSVF_LINE_BYTES);
}

int csvf_cache_flush(csvf_cache *cache, uint32_t asid, uint64_t address, size_t length, int c_bit)
{
    if (!cache || (c_bit != 0 && c_bit != 1))
        return CSVF_ERR_ARGUMENT;
    int status = csvf__cache_check_asid(cache, asid, c_bit);
    if (status == CSVF_OK)
        status = csvf__check_range(cache->engine, address, length);
    if (status != CSVF_OK)
        return status;
    while (length) {
        const size_t part = part_of_line(address, length);
        const uint64_t tag = csvf__cache_tag(cache, asid, address, c_bit);
        const int64_t place = csvf__ways_find(&cache->levels[cache->last], csvf__tag_set(cache, tag), tag);
        if (place >= 0)
            flush_place(cache, &cache->counts[asid], (uint64_t)place);
        address += part;
        length -= part;
    }
    return CSVF_OK;
}

void csvf_cache_write_back(csvf_cache *cache)
{
    if (!cache)
        return;
    const uint64_t places = cache->data_length / CSVF_LINE_BYTES;
    for (uint64_t place = 0; place < places; place++)
        if (cache->levels[cache->last].tags[place])
            flush_place(cache, NULL, place);
}

void csvf_cache_fabric_flush(csvf_cache *cache)
{
    if (cache)
        drain(cache, cache->fabric_count);
}
