/* The public calls that split their work over a pool. Each checks the whole call before the first piece runs, because a piece sees only
 * its own part of the buffers, and so that a refused call has written nothing. */
#include "pool.h"

enum { PIECE_BYTES = 256 << 10 };   /* stays in L2; long against the cost of handing out a piece (~100 cycles) */

typedef int (*xts_call)(const csvf_xts *, uint8_t *, const uint8_t *, size_t, size_t, uint64_t);

typedef struct xts_work {
    xts_call call;
    const csvf_xts *xts;
    uint8_t *out;
    const uint8_t *in;
    size_t length, unit_size;
    uint64_t first_unit;
} xts_work;

static int xts_piece(void *context, size_t begin, size_t end)
{
    const xts_work *work = context;
    const size_t from = begin * work->unit_size;
    const size_t to = end > work->length / work->unit_size ? work->length : end * work->unit_size;
    return work->call(work->xts, work->out + from, work->in + from, to - from, work->unit_size, work->first_unit + begin);
}

static int pool_xts(csvf_pool *pool, xts_call call, const csvf_xts *xts, uint8_t *out, const uint8_t *in, size_t length,
                    size_t unit_size, uint64_t first_unit)
{
    /* The plain call makes every check itself when it sees the whole call. */
    if (!pool || length < 2 * PIECE_BYTES || !xts || !out || !in || unit_size < CSVF_XTS_UNIT_MIN ||
        unit_size > CSVF_XTS_UNIT_MAX)
        return call(xts, out, in, length, unit_size, first_unit);
    const size_t tail = length % unit_size, units = length / unit_size + (tail != 0);
    if (tail != 0 && tail < CSVF_XTS_UNIT_MIN)
        return CSVF_ERR_LENGTH;
    if (units - 1 > UINT64_MAX - first_unit)
        return CSVF_ERR_RANGE;
    const uintptr_t x = (uintptr_t)out, y = (uintptr_t)in;
    if (x != y && (x > y ? x - y : y - x) < length)
        return CSVF_ERR_OVERLAP;
    xts_work work = {call, xts, out, in, length, unit_size, first_unit};
    return csvf__pool_run(pool, xts_piece, &work, units, unit_size < PIECE_BYTES ? PIECE_BYTES / unit_size : 1);
}

int csvf_pool_xts_encrypt(csvf_pool *pool, const csvf_xts *xts, uint8_t *out, const uint8_t *in, size_t length,
                          size_t unit_size, uint64_t first_unit)
{
    return pool_xts(pool, csvf_xts_encrypt, xts, out, in, length, unit_size, first_unit);
}

int csvf_pool_xts_decrypt(csvf_pool *pool, const csvf_xts *xts, uint8_t *out, const uint8_t *in, size_t length,
                          size_t unit_size, uint64_t first_unit)
{
    return pool_xts(pool, csvf_xts_decrypt, xts, out, in, length, unit_size, first_unit);
}

typedef struct blocks_work {
    uint8_t *digests;
    const uint8_t *prefix;
    size_t prefix_length;
    const uint8_t *data;
    size_t block_length;
} blocks_work;

static int blocks_piece(void *context, size_t begin, size_t end)
{
    const blocks_work *work = context;
    return csvf_sm3_blocks(work->digests + CSVF_SM3_BYTES * begin, work->prefix, work->prefix_length,
                           work->data + work->block_length * begin, work->block_length, end - begin);
}

int csvf_pool_sm3_blocks(csvf_pool *pool, uint8_t *digests, const uint8_t *prefix, size_t prefix_length,
                         const uint8_t *data, size_t block_length, size_t count)
{
    size_t length, digests_length;
    if (!pool || !digests || !data || block_length == 0 || prefix_length > 256 || (prefix_length && !prefix) ||
        __builtin_mul_overflow(block_length, count, &length) ||
        __builtin_mul_overflow((size_t)CSVF_SM3_BYTES, count, &digests_length) || length < 2 * PIECE_BYTES)
        return csvf_sm3_blocks(digests, prefix, prefix_length, data, block_length, count);
    blocks_work work = {digests, prefix, prefix_length, data, block_length};
    /* A multiple of 32 blocks, or every piece but a few would leave vector lanes empty. */
    const size_t per_piece = block_length < PIECE_BYTES ? PIECE_BYTES / block_length : 1;
    return csvf__pool_run(pool, blocks_piece, &work, count, (per_piece + 31) / 32 * 32);
}
