/* Access to encrypted memory, as a guest or (ASID 0) as the host. */
#include <sched.h>
#include <string.h>

#include "engine.h"

enum { SMALL_READ = 512 };      /* an unaligned read of so few bytes is decrypted in one piece on the stack */

/* ---- Blocks shared by threads that use different bytes of them ---- */

static csvf__spinlock *lock_block(csvf_engine *engine, uint64_t address)
{
    const uint64_t block = address / CSVF_BLOCK_BYTES;
    csvf__spinlock *lock = &engine->locks[(block ^ block >> 6) % CSVF__BLOCK_LOCKS];
    unsigned tries = 0;
    while (atomic_exchange_explicit(&lock->taken, 1, memory_order_acquire))
        while (atomic_load_explicit(&lock->taken, memory_order_relaxed))
            if (++tries % 128 == 0)
                sched_yield();      /* the holder may have lost its core */
#if defined(__x86_64__)
            else
                __builtin_ia32_pause();
#endif
    return lock;
}

static void unlock_block(csvf__spinlock *lock) { atomic_store_explicit(&lock->taken, 0, memory_order_release); }

/* Writes `length` bytes inside one block: decrypts it, merges, encrypts it again, all under the block's lock, so that
 * writers of the other bytes lose nothing. */
static void write_part(csvf__access *access, uint64_t address, const uint8_t *data, size_t length)
{
    uint8_t block[CSVF_BLOCK_BYTES];
    const uint64_t start = address / CSVF_BLOCK_BYTES * CSVF_BLOCK_BYTES;
    uint8_t *place = csvf__at(access->engine, start);
    csvf__spinlock *lock = lock_block(access->engine, start);
    csvf__transform(access, block, place, start, sizeof block, 1);
    memcpy(block + (address - start), data, length);
    csvf__transform(access, place, block, start, sizeof block, 0);
    unlock_block(lock);
    csvf_wipe(block, sizeof block);
    access->merged++;
}

static void copy_block_whole(csvf_engine *engine, uint8_t *out, uint64_t address)
{
    csvf__spinlock *lock = lock_block(engine, address);
    memcpy(out, csvf__at(engine, address), CSVF_BLOCK_BYTES);
    unlock_block(lock);
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
    if (head)
        write_part(access, address, data, head);
    const size_t middle = (length - head) / CSVF_BLOCK_BYTES * CSVF_BLOCK_BYTES;
    if (middle)
        csvf__transform(access, csvf__at(access->engine, address + head), data + head, address + head, middle, 0);
    const size_t tail = length - head - middle;
    if (tail)
        write_part(access, address + head + middle, data + head + middle, tail);
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
        return CSVF_OK;
    }
    csvf__access access;
    const int status = csvf__access_begin(&access, engine, asid);
    if (status != CSVF_OK)
        return status;
    write_guest(&access, address, data, length);
    csvf__access_end(&access);
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
        return CSVF_OK;
    }
    csvf__access access;
    const int status = csvf__access_begin(&access, engine, asid);
    if (status != CSVF_OK)
        return status;
    read_guest(&access, data, address, length);
    csvf__access_end(&access);
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
