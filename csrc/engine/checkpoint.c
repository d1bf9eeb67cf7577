/* An engine's state in a file. All numbers are little-endian, as is every machine this compiles for:
 *
 *   header      "CSVFCKPT", u32 version 1, u32 1 if the end is an HMAC, u64 base address, u64 size, u32 standard, u32 tweak model,
 *               u32 count of ASIDs, u32 0
 *   ASIDs       u32 ASID, u32 0, u64 generation to go back to; ascending
 *   page runs   u64 first page (from the DRAM's start), u64 pages, the pages; ascending; the last has 0 pages. Other pages are zeros
 *   end         32 bytes: SM3 of everything before, or its HMAC-SM3 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine.h"

typedef struct header {
    char magic[8];
    uint32_t version, is_keyed;
    uint64_t base, size;
    uint32_t standard, tweak_model, asids, zero;
} header;

typedef struct asid_entry {
    uint32_t asid, zero;
    uint64_t generation;
} asid_entry;

typedef struct page_run {
    uint64_t first, pages;
} page_run;

_Static_assert(sizeof(header) == 48 && sizeof(asid_entry) == 16 && sizeof(page_run) == 16, "the file's layout");

static const char magic[8] = {'C', 'S', 'V', 'F', 'C', 'K', 'P', 'T'};
static const size_t step = (size_t)1 << 20;     /* hashed while it is still in cache */

typedef struct stream {
    int fd;
    int is_keyed;
    union {
        csvf_sm3 plain;
        csvf_hmac_sm3 keyed;
    } digest;
} stream;

static void stream_begin(stream *to, int fd, const uint8_t *key, size_t key_length)
{
    to->fd = fd;
    to->is_keyed = key != NULL;
    if (key)
        csvf_hmac_sm3_init(&to->digest.keyed, key, key_length);
    else
        csvf_sm3_init(&to->digest.plain);
}

static void stream_digest(stream *to, const void *data, size_t length)
{
    if (to->is_keyed)
        csvf_hmac_sm3_update(&to->digest.keyed, data, length);
    else
        csvf_sm3_update(&to->digest.plain, data, length);
}

/* Also wipes the key's state. */
static void stream_end(stream *to, uint8_t digest[CSVF_SM3_BYTES])
{
    if (to->is_keyed)
        csvf_hmac_sm3_final(&to->digest.keyed, digest);
    else
        csvf_sm3_final(&to->digest.plain, digest);
    csvf_wipe(to, sizeof *to);
}

static int write_all(int fd, const void *data, size_t length)
{
    const uint8_t *at = data;
    while (length) {
        const ssize_t done = write(fd, at, length < step ? length : step);
        if (done < 0 && errno != EINTR)
            return CSVF_ERR_SYSTEM;
        if (done > 0)
            at += done, length -= (size_t)done;
    }
    return CSVF_OK;
}

static int read_all(int fd, void *data, size_t length)
{
    uint8_t *at = data;
    while (length) {
        const ssize_t done = read(fd, at, length < step ? length : step);
        if (done == 0)
            return CSVF_ERR_LENGTH;
        if (done < 0 && errno != EINTR)
            return CSVF_ERR_SYSTEM;
        if (done > 0)
            at += done, length -= (size_t)done;
    }
    return CSVF_OK;
}

static int put(stream *to, const void *data, size_t length)
{
    int status = CSVF_OK;
    for (size_t at = 0; at < length && status == CSVF_OK; at += step) {
        const size_t now = length - at < step ? length - at : step;
        stream_digest(to, (const uint8_t *)data + at, now);
        status = write_all(to->fd, (const uint8_t *)data + at, now);
    }
    return status;
}

static int take(stream *from, void *data, size_t length)
{
    int status = CSVF_OK;
    for (size_t at = 0; at < length && status == CSVF_OK; at += step) {
        const size_t now = length - at < step ? length - at : step;
        status = read_all(from->fd, (uint8_t *)data + at, now);
        if (status == CSVF_OK)
            stream_digest(from, (uint8_t *)data + at, now);
    }
    return status;
}

static int is_zero(const uint8_t *page)
{
    return page[0] == 0 && memcmp(page, page + 1, CSVF_PAGE_BYTES - 1) == 0;
}

/* What an ASID goes back to: 0 = nothing to keep. */
static uint64_t kept_generation(const csvf_engine *engine, uint32_t asid)
{
    const uint64_t state = atomic_load(&engine->keys.states[asid]);
    const uint64_t has_key = (state & ((1u << CSVF__KEY_STATE_BITS) - 1)) == CSVF__KEY_ACTIVE;
    return (state >> CSVF__KEY_STATE_BITS) - has_key;
}

static int put_state(stream *to, const csvf_engine *engine)
{
    header head = {.version = 1, .is_keyed = (uint32_t)to->is_keyed, .base = engine->base, .size = engine->size,
                   .standard = (uint32_t)engine->standard, .tweak_model = (uint32_t)engine->tweak_model};
    memcpy(head.magic, magic, sizeof magic);
    for (uint32_t asid = 1; asid <= engine->keys.asid_max; asid++)
        head.asids += kept_generation(engine, asid) != 0;
    int status = put(to, &head, sizeof head);
    for (uint32_t asid = 1; asid <= engine->keys.asid_max && status == CSVF_OK; asid++) {
        const asid_entry entry = {.asid = asid, .generation = kept_generation(engine, asid)};
        if (entry.generation)
            status = put(to, &entry, sizeof entry);
    }
    const uint64_t pages = engine->size / CSVF_PAGE_BYTES;
    page_run run = {0, 0};
    for (uint64_t page = 0; page < pages && status == CSVF_OK; page = run.first + run.pages) {
        run = (page_run){.first = page};
        if (is_zero(engine->dram + page * CSVF_PAGE_BYTES)) {
            run.first++;
            continue;
        }
        while (run.first + run.pages < pages && !is_zero(engine->dram + (run.first + run.pages) * CSVF_PAGE_BYTES))
            run.pages++;
        status = put(to, &run, sizeof run);
        if (status == CSVF_OK)
            status = put(to, engine->dram + run.first * CSVF_PAGE_BYTES, run.pages * CSVF_PAGE_BYTES);
    }
    run = (page_run){.first = pages};
    return status == CSVF_OK ? put(to, &run, sizeof run) : status;
}

int csvf_engine_checkpoint(const csvf_engine *engine, int fd, const uint8_t *key, size_t key_length)
{
    if (!engine || (key == NULL) != (key_length == 0))
        return CSVF_ERR_ARGUMENT;
    stream to;
    uint8_t digest[CSVF_SM3_BYTES];
    stream_begin(&to, fd, key, key_length);
    const int status = put_state(&to, engine);
    stream_end(&to, digest);
    return status == CSVF_OK ? write_all(fd, digest, sizeof digest) : status;
}

static void clear_pages(csvf_engine *engine, uint64_t from, uint64_t to)
{
    for (; from < to; from++)   /* a page that is zeros already may be one that the system has not given yet */
        if (!is_zero(engine->dram + from * CSVF_PAGE_BYTES))
            memset(engine->dram + from * CSVF_PAGE_BYTES, 0, CSVF_PAGE_BYTES);
}

static int take_header(stream *from, const csvf_engine *engine, header *head)
{
    const int status = take(from, head, sizeof *head);
    if (status != CSVF_OK)
        return status;
    if (memcmp(head->magic, magic, sizeof magic) || head->version != 1 || head->is_keyed != (uint32_t)from->is_keyed ||
        head->base != engine->base || head->size != engine->size || head->standard != (uint32_t)engine->standard ||
        head->tweak_model != (uint32_t)engine->tweak_model || head->zero)
        return CSVF_ERR_ARGUMENT;
    return head->asids > engine->keys.asid_max ? CSVF_ERR_RANGE : CSVF_OK;
}

static int take_asids(stream *from, const csvf_engine *engine, asid_entry *entries, uint32_t count)
{
    const int status = take(from, entries, count * sizeof *entries);
    uint32_t before = 0;
    for (uint32_t i = 0; i < count && status == CSVF_OK; before = entries[i++].asid)
        if (entries[i].asid <= before || entries[i].asid > engine->keys.asid_max || entries[i].zero ||
            entries[i].generation >= UINT64_C(1) << 48)     /* what the tags of cached tweaks can hold */
            return CSVF_ERR_RANGE;
    return status;
}

static int take_pages(stream *from, csvf_engine *engine, int *is_touched)
{
    const uint64_t pages = engine->size / CSVF_PAGE_BYTES;
    uint64_t done = 0;
    for (;;) {
        page_run run;
        int status = take(from, &run, sizeof run);
        if (status != CSVF_OK)
            return status;
        if (run.first < done || run.first > pages || run.pages > pages - run.first)
            return CSVF_ERR_RANGE;
        *is_touched = 1;
        clear_pages(engine, done, run.pages ? run.first : pages);
        if (run.pages == 0)
            return run.first == pages ? CSVF_OK : CSVF_ERR_RANGE;
        status = take(from, engine->dram + run.first * CSVF_PAGE_BYTES, run.pages * CSVF_PAGE_BYTES);
        if (status != CSVF_OK)
            return status;
        done = run.first + run.pages;
    }
}

int csvf_engine_restore(csvf_engine *engine, int fd, const uint8_t *key, size_t key_length)
{
    if (!engine || (key == NULL) != (key_length == 0))
        return CSVF_ERR_ARGUMENT;
    if (atomic_load(&engine->installed))
        return CSVF_ERR_STATE;
    stream from;
    header head;
    asid_entry *entries = NULL;
    int is_touched = 0;
    stream_begin(&from, fd, key, key_length);
    int status = take_header(&from, engine, &head);
    if (status == CSVF_OK) {
        entries = malloc(((size_t)head.asids + 1) * sizeof *entries);
        status = entries ? take_asids(&from, engine, entries, head.asids) : CSVF_ERR_MEMORY;
    }
    if (status == CSVF_OK)
        status = take_pages(&from, engine, &is_touched);
    uint8_t digest[CSVF_SM3_BYTES], stored[CSVF_SM3_BYTES];
    stream_end(&from, digest);
    if (status == CSVF_OK)
        status = read_all(fd, stored, sizeof stored);
    if (status == CSVF_OK && !csvf_equal(digest, stored, sizeof stored))
        status = CSVF_ERR_AUTHENTICATION;
    if (status == CSVF_OK)
        for (uint32_t i = 0; i < head.asids; i++)
            atomic_store(&engine->keys.states[entries[i].asid], entries[i].generation << CSVF__KEY_STATE_BITS | CSVF__KEY_FREE);
    else if (is_touched) {
        const int saved = errno;
        clear_pages(engine, 0, engine->size / CSVF_PAGE_BYTES);
        errno = saved;
    }
    free(entries);
    return status;
}
