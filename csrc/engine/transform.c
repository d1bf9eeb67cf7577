/* SM4 over block-aligned runs of memory, under either tweak model. PURE given a pinned key. */
#include "../sm4/sm4_xts.h"
#include "engine.h"

enum {
    LINES_PER_PAGE = CSVF_PAGE_BYTES / CSVF_LINE_BYTES,
    BLOCKS_PER_LINE = CSVF_LINE_BYTES / CSVF_BLOCK_BYTES,
    BLOCKS_PER_PAGE = CSVF_PAGE_BYTES / CSVF_BLOCK_BYTES,
    POOL_PAGES_MIN = 128,   /* 512 KiB, ~60 us: below it, waking a worker costs more than it gives */
    POOL_PAGES_GRAIN = 32
};

/* T_0 of a data unit (a page, or a line in the line model), from the cache or computed and kept there. */
static inline void unit_tweak(csvf__access *access, uint8_t tweak[16], uint64_t unit)
{
    csvf__tweakcache *cache = &access->engine->tweaks;
    if (csvf__tweak_find(cache, tweak, access->pin.tag, unit)) {
        access->hits++;
        return;
    }
    access->misses++;
    csvf__xts_unit_tweaks(access->pin.xts, tweak, &unit, 1);
    csvf__tweak_store(cache, tweak, access->pin.tag, unit);
}

/* Blocks inside one line or in several, at most a page's worth: every block of a line has the line's tweak, unmultiplied. */
static void transform_lines(csvf__access *access, const csvf_xts *xts, uint8_t *out, const uint8_t *in, uint64_t address,
                            size_t blocks, int decrypt)
{
    uint8_t line_tweaks[(LINES_PER_PAGE + 1) * 16], tweaks[BLOCKS_PER_PAGE * 16];
    const size_t skipped = address % CSVF_LINE_BYTES / CSVF_BLOCK_BYTES;
    const size_t lines = (skipped + blocks + BLOCKS_PER_LINE - 1) / BLOCKS_PER_LINE;
    /* LE64(line) || 0^8 is exactly the data unit encoding of the number `line`. */
    if (access && lines == 1)
        unit_tweak(access, line_tweaks, address / CSVF_LINE_BYTES);
    else
        csvf__xts_unit_tweaks_run(xts, line_tweaks, address / CSVF_LINE_BYTES, lines);
    for (size_t i = 0; i < blocks; i++)
        memcpy(tweaks + 16 * i, line_tweaks + 16 * ((skipped + i) / BLOCKS_PER_LINE), 16);
    const csvf__xts *key = csvf__xts_of(xts);
    key->kernel->xex(decrypt ? &key->decrypt : &key->encrypt, out, in, tweaks, blocks);
    csvf_wipe(line_tweaks, 16 * lines);
    csvf_wipe(tweaks, 16 * blocks);
}

void csvf__transform_pages(const csvf_engine *engine, const csvf_xts *xts, uint8_t *out, const uint8_t *in, uint64_t pfn,
                           size_t pages, int decrypt)
{
    if (engine->tweak_model == CSVF_TWEAK_XTS) {
        csvf__xts_pages(xts, out, in, pfn, pages, decrypt);
        return;
    }
    for (size_t i = 0; i < pages; i++)
        transform_lines(NULL, xts, out + i * CSVF_PAGE_BYTES, in + i * CSVF_PAGE_BYTES, (pfn + i) * CSVF_PAGE_BYTES,
                        BLOCKS_PER_PAGE, decrypt);
}

typedef struct pages_work {
    const csvf_engine *engine;
    const csvf_xts *xts;
    uint8_t *out;
    const uint8_t *in;
    uint64_t pfn;
    int decrypt;
} pages_work;

static int pages_piece(void *context, size_t begin, size_t end)
{
    const pages_work *work = context;
    csvf__transform_pages(work->engine, work->xts, work->out + begin * CSVF_PAGE_BYTES,
                          work->in + begin * CSVF_PAGE_BYTES, work->pfn + begin, end - begin, work->decrypt);
    return CSVF_OK;
}

static void whole_pages(csvf__access *access, uint8_t *out, const uint8_t *in, uint64_t pfn, size_t pages, int decrypt)
{
    const csvf_engine *engine = access->engine;
    if (pages == 1 && engine->tweak_model == CSVF_TWEAK_XTS) {
        /* A lone tweak block costs a third of the page; runs encrypt theirs together. */
        uint8_t tweak[16];
        unit_tweak(access, tweak, pfn);
        csvf__xts_span(access->pin.xts, out, in, BLOCKS_PER_PAGE, tweak, 0, decrypt);
        csvf_wipe(tweak, sizeof tweak);
        return;
    }
    pages_work work = {engine, access->pin.xts, out, in, pfn, decrypt};
    /* The caller's pin covers the workers: it lasts until finish has returned. When another thread has the workers, this one
     * is quicker alone than waiting. */
    if (engine->pool && pages >= POOL_PAGES_MIN &&
        csvf__pool_begin_if_idle(engine->pool, pages_piece, &work, pages, POOL_PAGES_GRAIN))
        (void)csvf__pool_finish(engine->pool);
    else
        (void)pages_piece(&work, 0, pages);
}

void csvf__transform(csvf__access *access, uint8_t *out, const uint8_t *in, uint64_t address, size_t length, int decrypt)
{
    if (decrypt)
        access->decrypted += length;
    else
        access->encrypted += length;
    while (length > 0) {
        const size_t offset = address % CSVF_PAGE_BYTES;
        size_t step = CSVF_PAGE_BYTES - offset < length ? CSVF_PAGE_BYTES - offset : length;
        if (step == CSVF_PAGE_BYTES) {
            step = length / CSVF_PAGE_BYTES * CSVF_PAGE_BYTES;
            whole_pages(access, out, in, address / CSVF_PAGE_BYTES, step / CSVF_PAGE_BYTES, decrypt);
        } else if (access->engine->tweak_model == CSVF_TWEAK_XTS) {
            uint8_t tweak[16];
            unit_tweak(access, tweak, address / CSVF_PAGE_BYTES);
            csvf__xts_span(access->pin.xts, out, in, step / CSVF_BLOCK_BYTES, tweak, offset / CSVF_BLOCK_BYTES, decrypt);
            csvf_wipe(tweak, sizeof tweak);
        } else {
            transform_lines(access, access->pin.xts, out, in, address, step / CSVF_BLOCK_BYTES, decrypt);
        }
        out += step;
        in += step;
        address += step;
        length -= step;
    }
}
