/* Launch: plaintext already in DRAM is measured and becomes a guest's memory.
 *
 * What a linear digest covers is read once, into a private copy that is hashed and then encrypted from: a host that writes to the
 * memory meanwhile must not get other bytes encrypted than were measured. Page digests alone work in place.
 *
 * The work goes in chunks that stay in cache between being hashed and being encrypted: measuring everything first would fetch the
 * memory twice. A linear digest is serial, so with workers the encryption of one chunk runs beside the hashing of the next. */
#include <stdlib.h>
#include <string.h>

#include "engine.h"

enum {
    CHUNK_PAGES = 32,           /* 128 KiB: a full set of SM3 lanes */
    COPY_PAGES = 8,             /* 32 KiB on the stack */
    STEP = 2048,                /* copied and hashed while the processor fetches the next */
    PIPELINE_PAGES = 64,        /* 256 KiB, ~0.5 ms of serial hashing: long against waking a worker */
    POOL_PAGES_MIN = 128
};

typedef struct launch_work {
    const csvf_engine *engine;
    const csvf_xts *xts;
    uint8_t *pages;             /* in the DRAM */
    const uint8_t *plain;       /* what is encrypted into them: the copy, or the pages themselves */
    uint8_t *digests;           /* NULL = not wanted */
    uint64_t pfn;
} launch_work;

/* Page digests, then encryption, of pages [begin, end). */
static int launch_piece(void *context, size_t begin, size_t end)
{
    const launch_work *work = context;
    for (size_t first = begin; first < end; first += CHUNK_PAGES) {
        const size_t count = end - first < CHUNK_PAGES ? end - first : CHUNK_PAGES;
        const uint8_t *plain = work->plain + first * CSVF_PAGE_BYTES;
        if (work->digests) {
            const int status = csvf_sm3_blocks(work->digests + first * CSVF_SM3_BYTES, NULL, 0, plain, CSVF_PAGE_BYTES, count);
            if (status != CSVF_OK)
                return status;
        }
        csvf__transform_pages(work->engine, work->xts, work->pages + first * CSVF_PAGE_BYTES, plain, work->pfn + first, count, 0);
    }
    return CSVF_OK;
}

/* Without workers. Small steps: the processor fetches the next one from memory while this one is hashed. */
static int launch_alone(const launch_work *work, csvf_sm3 *linear, size_t pages)
{
    if (!linear)
        return launch_piece((void *)work, 0, pages);
    uint8_t near[COPY_PAGES * CSVF_PAGE_BYTES] __attribute__((aligned(64)));
    /* Page digests are quick with many pages at once only. */
    uint8_t *far = work->digests ? aligned_alloc(CSVF_PAGE_BYTES, (size_t)CHUNK_PAGES * CSVF_PAGE_BYTES) : NULL;
    uint8_t *copy = far ? far : near;
    const size_t room = far ? CHUNK_PAGES : COPY_PAGES, length = pages * CSVF_PAGE_BYTES;
    launch_work now = *work;
    int status = CSVF_OK;
    now.plain = copy;
    for (size_t first = 0; first < pages && status == CSVF_OK; first += room) {
        const size_t count = pages - first < room ? pages - first : room, start = first * CSVF_PAGE_BYTES;
        now.pages = work->pages + start;
        now.digests = work->digests ? work->digests + first * CSVF_SM3_BYTES : NULL;
        now.pfn = work->pfn + first;
        for (size_t at = 0; at < count * CSVF_PAGE_BYTES; at += STEP) {
            memcpy(copy + at, now.pages + at, STEP);
            for (size_t line = start + at + STEP; line < start + at + 2 * STEP && line < length; line += CSVF_LINE_BYTES)
                __builtin_prefetch(work->pages + line);
            csvf_sm3_update(linear, copy + at, STEP);
        }
        status = launch_piece(&now, 0, count);
    }
    csvf_wipe(copy, room * CSVF_PAGE_BYTES);
    free(far);
    return status;
}

/* With workers. `copies` has room for two chunks: one is hashed while the other is encrypted. */
static int launch_pipeline(const launch_work *work, csvf_sm3 *linear, size_t pages, csvf_pool *pool, uint8_t *copies)
{
    launch_work now = *work;
    int status = CSVF_OK, is_running = 0;
    for (size_t first = 0; first < pages && status == CSVF_OK; first += PIPELINE_PAGES) {
        const size_t count = pages - first < PIPELINE_PAGES ? pages - first : PIPELINE_PAGES;
        uint8_t *copy = copies + first / PIPELINE_PAGES % 2 * PIPELINE_PAGES * CSVF_PAGE_BYTES;
        memcpy(copy, work->pages + first * CSVF_PAGE_BYTES, count * CSVF_PAGE_BYTES);
        csvf_sm3_update(linear, copy, count * CSVF_PAGE_BYTES);
        if (is_running)
            status = csvf__pool_finish(pool);
        now.pages = work->pages + first * CSVF_PAGE_BYTES;
        now.plain = copy;
        now.digests = work->digests ? work->digests + first * CSVF_SM3_BYTES : NULL;
        now.pfn = work->pfn + first;
        is_running = csvf__pool_begin_if_idle(pool, launch_piece, &now, count, CHUNK_PAGES);
        if (!is_running && status == CSVF_OK)
            status = launch_piece(&now, 0, count);
    }
    if (is_running) {
        const int last = csvf__pool_finish(pool);
        status = status == CSVF_OK ? last : status;
    }
    return status;
}

static int launch_pages(csvf__access *access, csvf_sm3 *linear, uint8_t *digests, uint64_t address, size_t pages)
{
    csvf_engine *engine = access->engine;
    uint8_t *place = csvf__at(engine, address);
    launch_work work = {engine, access->pin.xts, place, place, digests, address / CSVF_PAGE_BYTES};
    access->encrypted += (uint64_t)pages * CSVF_PAGE_BYTES;
    if (engine->pool && pages >= POOL_PAGES_MIN) {
        const size_t room = (size_t)2 * PIPELINE_PAGES * CSVF_PAGE_BYTES;
        uint8_t *copies = linear ? aligned_alloc(CSVF_PAGE_BYTES, room) : NULL;
        if (copies) {
            const int status = launch_pipeline(&work, linear, pages, engine->pool, copies);
            csvf_wipe(copies, room);
            free(copies);
            return status;
        }
        if (!linear && csvf__pool_begin_if_idle(engine->pool, launch_piece, &work, pages, CHUNK_PAGES))
            return csvf__pool_finish(engine->pool);
    }
    return launch_alone(&work, linear, pages);
}

/* A run inside one page. */
static void launch_part(csvf__access *access, csvf_sm3 *linear, uint64_t address, size_t length)
{
    uint8_t *place = csvf__at(access->engine, address);
    if (!linear) {
        csvf__transform(access, place, place, address, length, 0);
        return;
    }
    uint8_t copy[CSVF_PAGE_BYTES];
    memcpy(copy, place, length);
    csvf_sm3_update(linear, copy, length);
    csvf__transform(access, place, copy, address, length, 0);
    csvf_wipe(copy, length);
}

int csvf_launch_update(csvf_engine *engine, csvf_sm3 *linear, uint8_t *digests, uint32_t asid, uint64_t address,
                       size_t length)
{
    if (!engine)
        return CSVF_ERR_ARGUMENT;
    const uint32_t unit = digests ? CSVF_PAGE_BYTES : CSVF_BLOCK_BYTES;
    if (csvf__check_range(engine, address, length))
        return CSVF_ERR_RANGE;
    if (address % unit)
        return CSVF_ERR_ALIGNMENT;
    if (length % unit)
        return CSVF_ERR_LENGTH;
    if (csvf__check_outside(engine, linear, linear ? sizeof *linear : 0) ||
        csvf__check_outside(engine, digests, digests ? length / CSVF_PAGE_BYTES * CSVF_SM3_BYTES : 0))
        return CSVF_ERR_OVERLAP;
    csvf__access access;
    int status = csvf__access_begin(&access, engine, asid);
    if (status != CSVF_OK)
        return status;

    size_t head = (size_t)(-address % CSVF_PAGE_BYTES);
    head = head < length ? head : length;
    const size_t pages = (length - head) / CSVF_PAGE_BYTES, tail = (length - head) % CSVF_PAGE_BYTES;
    if (head)
        launch_part(&access, linear, address, head);
    if (pages)
        status = launch_pages(&access, linear, digests, address + head, pages);
    if (tail && status == CSVF_OK)
        launch_part(&access, linear, address + length - tail, tail);
    csvf__access_end(&access);
    if (status == CSVF_OK)
        csvf__observe(engine, CSVF_EVENT_LAUNCH, asid, address, length);
    return status;
}

int csvf_encrypt_in_place(csvf_engine *engine, uint32_t asid, uint64_t address, size_t length)
{
    return csvf_launch_update(engine, NULL, NULL, asid, address, length);
}
