/* Access to encrypted memory, as a guest or (ASID 0) as the host. */
#include <sched.h>
#include <string.h>

#include "engine.h"

enum {
    SMALL_READ = 512,   /* an unaligned access with no more bytes than this in its blocks is done in one piece on the stack: */
    SMALL_WRITE = 256   /* a kernel call for a few blocks costs little more than one for a single block */
};

/* ---- Blocks shared by threads that use different bytes of them ---- */

static csvf__spinlock *lock_of(csvf_engine *engine, uint64_t address)
{
    const uint64_t block = address / CSVF_BLOCK_BYTES;
    return &engine->locks[(block ^ block >> 6) % CSVF__BLOCK_LOCKS];
}

static void lock(csvf__spinlock *spinlock)
{
    unsigned tries = 0;
    while (atomic_exchange_explicit(&spinlock->taken, 1, memory_order_acquire))
        while (atomic_load_explicit(&spinlock->taken, memory_order_relaxed))
            if (++tries % 128 == 0)
                sched_yield();      /* the holder may have lost its core */
#if defined(__x86_64__)
            else
                __builtin_ia32_pause();
#endif
}

static void unlock(csvf__spinlock *spinlock) { atomic_store_explicit(&spinlock->taken, 0, memory_order_release); }

/* Writes bytes that need not begin or end on a block, at most SMALL_WRITE with the blocks around them: decrypts those blocks,
 * merges, encrypts them again, all under the locks of the first and the last one, so that writers of their other bytes lose
 * nothing. The lower lock is taken first, or two writers could wait for each other. */
static void write_small(csvf__access *access, uint64_t address, const uint8_t *data, size_t length)
{
    uint8_t scratch[SMALL_WRITE];
    const size_t skipped = address % CSVF_BLOCK_BYTES, covered = (skipped + length + 15) / 16 * 16;
    const uint64_t start = address - skipped;
    uint8_t *place = csvf__at(access->engine, start);
    csvf__spinlock *low = lock_of(access->engine, start);
    csvf__spinlock *high = lock_of(access->engine, start + covered - CSVF_BLOCK_BYTES);
    if (low > high) {
        csvf__spinlock *other = low;
        low = high, high = other;
    }
    lock(low);
    if (high != low)
        lock(high);
    csvf__transform(access, scratch, place, start, covered, 1);
    memcpy(scratch + skipped, data, length);
    csvf__transform(access, place, scratch, start, covered, 0);
    if (high != low)
        unlock(high);
    unlock(low);
    csvf_wipe(scratch, covered);
    const size_t after = covered - skipped - length;
    access->merged += covered == CSVF_BLOCK_BYTES ? 1 : (uint64_t)(skipped != 0) + (after != 0);
}

static void copy_block_whole(csvf_engine *engine, uint8_t *out, uint64_t address)
{
    csvf__spinlock *spinlock = lock_of(engine, address);
    lock(spinlock);
    memcpy(out, csvf__at(engine, address), CSVF_BLOCK_BYTES);
    unlock(spinlock);
}

/* Reads bytes that need not begin or end on a block, at most SMALL_READ with the blocks around them. A block wanted only in part is
 * fetched under its lock: another thread may be writing its other bytes, which changes all 16 bytes of ciphertext. */
static void read_small(csvf__access *access, uint8_t *out, uint64_t address, size_t length)
{
    uint8_t scratch[SMALL_READ];
    csvf_engine *engine = access->engine;
    const size_t skipped = address % CSVF_BLOCK_BYTES, covered = (skipped + length + 15) / 16 * 16;
    const uint64_t start = address - skipped;
    memcpy(scratch + CSVF_BLOCK_BYTES, csvf__at(engine, start) + CSVF_BLOCK_BYTES,
           covered > 2 * CSVF_BLOCK_BYTES ? covered - 2 * CSVF_BLOCK_BYTES : 0);
    copy_block_whole(engine, scratch, start);
    if (covered > CSVF_BLOCK_BYTES)
        copy_block_whole(engine, scratch + covered - CSVF_BLOCK_BYTES, start + covered - CSVF_BLOCK_BYTES);
    csvf__transform(access, scratch, scratch, start, covered, 1);
    memcpy(out, scratch + skipped, length);
    csvf_wipe(scratch, covered);
}

/* ---- Any address, any length ---- */

/* Bytes before the first block boundary, or all of them if no boundary is reached. */
static size_t head_length(uint64_t address, size_t length)
{
    const size_t head = (size_t)(-address % CSVF_BLOCK_BYTES);
    return head < length ? head : length;
}

static void write_guest(csvf__access *access, uint64_t address, const uint8_t *data, size_t length)
{
    const size_t head = head_length(address, length);
    const size_t middle = (length - head) / CSVF_BLOCK_BYTES * CSVF_BLOCK_BYTES;
    const size_t tail = length - head - middle;
    if ((head || tail) && length <= SMALL_WRITE - 2 * CSVF_BLOCK_BYTES) {
        write_small(access, address, data, length);
        return;
    }
    if (head)
        write_small(access, address, data, head);
    if (middle)
        csvf__transform(access, csvf__at(access->engine, address + head), data + head, address + head, middle, 0);
    if (tail)
        write_small(access, address + head + middle, data + head + middle, tail);
}

static void read_guest(csvf__access *access, uint8_t *data, uint64_t address, size_t length)
{
    const size_t head = head_length(address, length);
    const size_t middle = (length - head) / CSVF_BLOCK_BYTES * CSVF_BLOCK_BYTES;
    const size_t tail = length - head - middle;
    if ((head || tail) && length <= SMALL_READ - 2 * CSVF_BLOCK_BYTES) {
        read_small(access, data, address, length);
        return;
    }
    if (head)
        read_small(access, data, address, head);
    if (middle)
        csvf__transform(access, data + head, csvf__at(access->engine, address + head), address + head, middle, 1);
    if (tail)
        read_small(access, data + head + middle, address + head + middle, tail);
}

/* ---- Public ---- */

static void count_host(csvf_engine *engine, size_t length)
{
    csvf__count(&engine->counters[csvf__stripe()].host, length);
}

int csvf_write(csvf_engine *engine, uint32_t asid, uint64_t address, const void *data, size_t length)
{
    if (!engine || (!data && length))
        return CSVF_ERR_ARGUMENT;
    if (csvf__check_range(engine, address, length))
        return CSVF_ERR_RANGE;
    if (csvf__check_outside(engine, data, length))
        return CSVF_ERR_OVERLAP;
    if (asid == 0) {
        if (length)
            memcpy(csvf__at(engine, address), data, length);
        count_host(engine, length);
        csvf__observe(engine, CSVF_EVENT_WRITE, asid, address, length);
        return CSVF_OK;
    }
    csvf__access access;
    const int status = csvf__access_begin(&access, engine, asid);
    if (status != CSVF_OK)
        return status;
    write_guest(&access, address, data, length);
    csvf__access_end(&access);
    csvf__observe(engine, CSVF_EVENT_WRITE, asid, address, length);
    return CSVF_OK;
}

int csvf_read(csvf_engine *engine, void *data, size_t length, uint32_t asid, uint64_t address)
{
    if (!engine || (!data && length))
        return CSVF_ERR_ARGUMENT;
    if (csvf__check_range(engine, address, length))
        return CSVF_ERR_RANGE;
    if (csvf__check_outside(engine, data, length))
        return CSVF_ERR_OVERLAP;
    if (asid == 0) {
        if (length)
            memcpy(data, csvf__at(engine, address), length);
        count_host(engine, length);
        csvf__observe(engine, CSVF_EVENT_READ, asid, address, length);
        return CSVF_OK;
    }
    csvf__access access;
    const int status = csvf__access_begin(&access, engine, asid);
    if (status != CSVF_OK)
        return status;
    read_guest(&access, data, address, length);
    csvf__access_end(&access);
    csvf__observe(engine, CSVF_EVENT_READ, asid, address, length);
    return CSVF_OK;
}

/* Turns a page run into an address and a length. */
static int page_run(uint64_t *address, size_t *length, uint64_t pfn, size_t count)
{
    if (pfn > UINT64_MAX / CSVF_PAGE_BYTES || count > SIZE_MAX / CSVF_PAGE_BYTES)
        return CSVF_ERR_RANGE;
    *address = pfn * CSVF_PAGE_BYTES;
    *length = count * CSVF_PAGE_BYTES;
    return CSVF_OK;
}

int csvf_write_pages(csvf_engine *engine, uint32_t asid, uint64_t pfn, const void *data, size_t count)
{
    uint64_t address;
    size_t length;
    if (!engine || (!data && count))
        return CSVF_ERR_ARGUMENT;
    return page_run(&address, &length, pfn, count) ? CSVF_ERR_RANGE : csvf_write(engine, asid, address, data, length);
}

int csvf_read_pages(csvf_engine *engine, void *data, size_t count, uint32_t asid, uint64_t pfn)
{
    uint64_t address;
    size_t length;
    if (!engine || (!data && count))
        return CSVF_ERR_ARGUMENT;
    return page_run(&address, &length, pfn, count) ? CSVF_ERR_RANGE : csvf_read(engine, data, length, asid, address);
}

int csvf_write_line(csvf_engine *engine, uint32_t asid, uint64_t address, const uint8_t data[64])
{
    return address % CSVF_LINE_BYTES ? CSVF_ERR_ALIGNMENT : csvf_write(engine, asid, address, data, CSVF_LINE_BYTES);
}

int csvf_read_line(csvf_engine *engine, uint8_t data[64], uint32_t asid, uint64_t address)
{
    return address % CSVF_LINE_BYTES ? CSVF_ERR_ALIGNMENT : csvf_read(engine, data, CSVF_LINE_BYTES, asid, address);
}
