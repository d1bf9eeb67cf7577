/* Drivers that keep the vector lanes full: messages of any number and mix of lengths (csvf_sm3_many), pieces of streams under way
 * (csvf_sm3_update_many), and equal blocks behind one prefix (csvf_sm3_blocks). Nothing is allocated; everything stands on the stack and is wiped. PURE. */
#include "../include/csvfast.h"
#include "sm3_common.h"
#include "sm3_kernel.h"
#include "sm3_stream.h"

#define MOST_LANES 32
#define WINDOW 256 /* messages among which the longest is started next */

typedef void (*lanes_function)(uint32_t *state, const uint8_t *const *data, size_t blocks);

/* How many lanes serve `live` messages best: a kernel's lanes, its narrow lanes, or 1 for single streams. */
static size_t best_width(const csvf_sm3_many_kernel *kernel, size_t live)
{
    if (kernel->lanes > 1 && live >= kernel->worthwhile)
        return kernel->lanes;
    if (kernel->narrow_lanes && live >= kernel->narrow_worthwhile)
        return kernel->narrow_lanes;
    return 1;
}

static lanes_function function_of_width(const csvf_sm3_many_kernel *kernel, size_t width)
{
    return width == kernel->lanes ? kernel->compress : kernel->compress_narrow;
}

static void load_column(uint32_t h[8], const uint32_t *state, size_t width, size_t lane)
{
    for (size_t i = 0; i < 8; i++)
        h[i] = state[i * width + lane];
}

static void store_column(uint32_t *state, size_t width, size_t lane, const uint32_t h[8])
{
    for (size_t i = 0; i < 8; i++)
        state[i * width + lane] = h[i];
}

/* ---- Messages of different lengths ---- */

typedef struct waiting {
    size_t blocks; /* what it costs: the heap's order */
    size_t message;
} waiting;

/* A message under way: first its whole blocks where the caller has them, then its padded tail (of a stream: what is left goes into
 * its buffer). */
typedef struct lane {
    const uint8_t *at;
    size_t blocks; /* left at `at` */
    size_t message;
    int in_tail;
} lane;

typedef struct crowd {
    uint8_t *digests;
    csvf_sm3 *const *streams; /* what continues with the messages; NULL: every message is a whole one, with a digest */
    const uint8_t *const *data;
    const size_t *lengths;
    size_t count;
    size_t next;     /* first message not yet in the heap */
    size_t heap_size;
    size_t width;    /* lanes of `state` and of one call */
    size_t live;     /* lanes 0 .. live - 1 have a message */
    uint32_t state[8 * MOST_LANES];
    lane lanes[MOST_LANES];
    uint8_t tails[MOST_LANES][128];
    waiting heap[WINDOW];
} crowd;

/* Takes the caller's next message that has whole blocks to be compressed; streams without are served at once. 0: there is none. */
static int take_next(crowd *c, waiting *taken)
{
    while (c->next < c->count) {
        const size_t message = c->next++;
        size_t length = c->lengths[message];
        if (c->streams) {
            const size_t used = ((csvf__sm3_stream *)c->streams[message])->total % 64, missing = (64 - used) % 64;
            length = missing < length ? length - missing : 0;
            if (length < 64) {
                csvf_sm3_update(c->streams[message], c->data[message], c->lengths[message]);
                continue;
            }
        }
        *taken = (waiting){.blocks = length / 64, .message = message};
        return 1;
    }
    return 0;
}

static void fill_heap(crowd *c)
{
    waiting added;
    while (c->heap_size < WINDOW && take_next(c, &added)) {
        size_t i = c->heap_size++;
        for (; i && c->heap[(i - 1) / 2].blocks < added.blocks; i = (i - 1) / 2)
            c->heap[i] = c->heap[(i - 1) / 2];
        c->heap[i] = added;
    }
}

/* Takes the longest message of the window and lets the next of the caller's list into it. Starting long messages first leaves
 * short ones for the end, when lanes would otherwise run empty. Equal lengths cost a few cycles. */
static size_t take_longest(crowd *c)
{
    const size_t taken = c->heap[0].message;
    waiting moved;
    if (!take_next(c, &moved))
        moved = c->heap[--c->heap_size];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= c->heap_size)
            break;
        child += child + 1 < c->heap_size && c->heap[child + 1].blocks > c->heap[child].blocks;
        if (c->heap[child].blocks <= moved.blocks)
            break;
        c->heap[i] = c->heap[child];
        i = child;
    }
    c->heap[i] = moved;
    return taken;
}

static void enter_tail(crowd *c, size_t slot)
{
    lane *l = &c->lanes[slot];
    const size_t length = c->lengths[l->message], used = length % 64;
    if (used)
        memcpy(c->tails[slot], c->data[l->message] + length - used, used);
    l->blocks = csvf__sm3_pad(c->tails[slot], used, length);
    l->at = c->tails[slot];
    l->in_tail = 1;
}

/* A stream's message: what completes the block in its buffer goes first. */
static void start_stream(crowd *c, size_t slot, size_t message)
{
    csvf__sm3_stream *s = (csvf__sm3_stream *)c->streams[message];
    const size_t head = (64 - s->total % 64) % 64;
    csvf_sm3_update(c->streams[message], c->data[message], head);
    const size_t whole = (c->lengths[message] - head) / 64;
    s->total += 64 * (uint64_t)whole;
    c->lanes[slot] = (lane){.at = c->data[message] + head, .blocks = whole, .message = message, .in_tail = 0};
    store_column(c->state, c->width, slot, s->h);
}

static void start_message(crowd *c, size_t slot, size_t message)
{
    if (c->streams) {
        start_stream(c, slot, message);
        return;
    }
    const size_t whole = c->lengths[message] / 64;
    if (whole) {
        __builtin_prefetch(c->data[message]);
        __builtin_prefetch(c->data[message] + (whole > 1 ? 64 : 0));
    }
    c->lanes[slot] = (lane){.at = c->data[message], .blocks = whole, .message = message, .in_tail = 0};
    store_column(c->state, c->width, slot, csvf__sm3_iv);
    if (whole == 0)
        enter_tail(c, slot);
}

/* The chaining value h of a message that has ended becomes its digest, or its stream's. */
static void end_message(crowd *c, const lane *l, const uint32_t h[8])
{
    if (!c->streams) {
        csvf__sm3_store_digest(c->digests + 32 * l->message, h);
        return;
    }
    memcpy(((csvf__sm3_stream *)c->streams[l->message])->h, h, 32);
    csvf_sm3_update(c->streams[l->message], l->at, (size_t)(c->data[l->message] + c->lengths[l->message] - l->at));
}

/* The last live lane takes the place of one that has ended. */
static void close_gap(crowd *c, size_t slot)
{
    const size_t last = --c->live;
    uint32_t h[8];
    if (slot == last)
        return;
    load_column(h, c->state, c->width, last);
    store_column(c->state, c->width, slot, h);
    csvf__wipe(h, sizeof h);
    c->lanes[slot] = c->lanes[last];
    if (c->lanes[slot].in_tail) {
        memcpy(c->tails[slot], c->tails[last], sizeof c->tails[slot]);
        c->lanes[slot].at = c->tails[slot] + (c->lanes[last].at - c->tails[last]);
    }
}

/* One call of the kernel: as many blocks as every live lane has in one piece. */
static void advance(crowd *c, lanes_function compress)
{
    const uint8_t *data[MOST_LANES];
    size_t step = c->lanes[0].blocks;
    for (size_t i = 0; i < c->live; i++) {
        data[i] = c->lanes[i].at;
        step = c->lanes[i].blocks < step ? c->lanes[i].blocks : step;
    }
    for (size_t i = c->live; i < c->width; i++)
        data[i] = data[0]; /* idle lanes repeat a live one: readable memory, a result nobody looks at */
    compress(c->state, data, step);

    for (size_t i = 0; i < c->live;) {
        lane *l = &c->lanes[i];
        l->at += step * 64;
        l->blocks -= step;
        if (l->blocks == 0) {
            if (!l->in_tail && !c->streams) {
                enter_tail(c, i);
            } else {
                uint32_t h[8];
                load_column(h, c->state, c->width, i);
                end_message(c, l, h);
                csvf__wipe(h, sizeof h);
                if (c->heap_size == 0) {
                    close_gap(c, i);
                    continue; /* slot i now holds another lane, not yet moved on */
                }
                start_message(c, i, take_longest(c));
            }
        }
        i++;
    }
}

/* Goes over to fewer lanes. Rows move towards the front, so nothing is overwritten before it is read. */
static void narrow(crowd *c, size_t width)
{
    for (size_t i = 0; i < 8; i++)
        memmove(c->state + i * width, c->state + i * c->width, width * sizeof *c->state);
    c->width = width;
}

/* All messages of a crowd whose first five members are set; `width` > 1 lanes are worthwhile if every message has blocks. */
static void run(crowd *c, const csvf_sm3_many_kernel *kernel, size_t width)
{
    c->next = 0;
    c->heap_size = 0;
    c->width = width;
    fill_heap(c);
    for (c->live = 0; c->live < width && c->heap_size; c->live++)
        start_message(c, c->live, take_longest(c));
    for (size_t idle = c->live; idle < width; idle++)
        store_column(c->state, width, idle, csvf__sm3_iv);

    for (;;) {
        const size_t wanted = best_width(kernel, c->live);
        width = wanted < width ? wanted : width;
        if (width == 1)
            break;
        if (width < c->width)
            narrow(c, width);
        advance(c, function_of_width(kernel, width));
    }
    const csvf_sm3_kernel *single = csvf__sm3();
    for (size_t i = 0; i < c->live; i++) {
        lane *l = &c->lanes[i];
        uint32_t h[8];
        load_column(h, c->state, c->width, i);
        single->compress(h, l->at, l->blocks);
        l->at += 64 * l->blocks;
        if (!l->in_tail && !c->streams) {
            enter_tail(c, i);
            single->compress(h, l->at, l->blocks);
        }
        end_message(c, l, h);
        csvf__wipe(h, sizeof h);
    }
    csvf__wipe(c->state, sizeof c->state);
    csvf__wipe(c->tails, sizeof c->tails);
}

void csvf_sm3_many(uint8_t *digests, const uint8_t *const *data, const size_t *lengths, size_t count)
{
    const csvf_sm3_many_kernel *kernel = csvf__sm3_many();
    const size_t width = best_width(kernel, count);
    if (width == 1) {
        for (size_t i = 0; i < count; i++)
            csvf_sm3_digest(digests + 32 * i, data[i], lengths[i]);
        return;
    }
    crowd c;
    c.digests = digests;
    c.streams = NULL;
    c.data = data;
    c.lengths = lengths;
    c.count = count;
    run(&c, kernel, width);
}

void csvf_sm3_update_many(csvf_sm3 *const *streams, const uint8_t *const *data, const size_t *lengths, size_t count)
{
    const csvf_sm3_many_kernel *kernel = csvf__sm3_many();
    const size_t width = best_width(kernel, count);
    if (width == 1) {
        for (size_t i = 0; i < count; i++)
            csvf_sm3_update(streams[i], data[i], lengths[i]);
        return;
    }
    crowd c;
    c.digests = NULL;
    c.streams = streams;
    c.data = data;
    c.lengths = lengths;
    c.count = count;
    run(&c, kernel, width);
}

/* ---- Equal blocks behind one prefix ---- */

/* The one layout of all messages of a call, after the whole 64-byte blocks of the prefix:
 *   head      one block, the rest of the prefix and the block's first bytes (only if the prefix leaves a rest)
 *   middle    whole blocks where the caller has them, whatever their alignment
 *   tail      the last bytes and the padding, one or two blocks */
typedef struct layout {
    uint32_t h[8];          /* after the whole blocks of the prefix */
    uint8_t rest[64];       /* of the prefix */
    size_t rest_length;
    size_t head_data;       /* bytes of the caller's block in the head */
    int has_head;
    size_t middle_blocks;
    size_t tail_data;       /* bytes of the caller's block in the tail */
    size_t tail_at;         /* where they stand in the tail: after the rest of the prefix if there is no head */
    size_t tail_blocks;
    uint8_t tail[128];      /* the tail without the caller's bytes */
} layout;

static void plan(layout *p, const csvf_sm3_kernel *single, const uint8_t *prefix, size_t prefix_length,
                 size_t block_length)
{
    memcpy(p->h, csvf__sm3_iv, sizeof p->h);
    p->rest_length = prefix_length % 64;
    if (prefix_length >= 64)
        single->compress(p->h, prefix, prefix_length / 64);
    if (p->rest_length)
        memcpy(p->rest, prefix + prefix_length - p->rest_length, p->rest_length);

    p->has_head = p->rest_length && block_length >= 64 - p->rest_length;
    p->head_data = p->has_head ? 64 - p->rest_length : 0;
    p->tail_at = p->has_head ? 0 : p->rest_length;
    p->middle_blocks = p->tail_at ? 0 : (block_length - p->head_data) / 64;
    p->tail_data = block_length - p->head_data - 64 * p->middle_blocks;

    memset(p->tail, 0, sizeof p->tail);
    if (p->tail_at)
        memcpy(p->tail, p->rest, p->rest_length);
    p->tail_blocks = csvf__sm3_pad(p->tail, p->tail_at + p->tail_data, (uint64_t)prefix_length + block_length);
}

static void one_lane(uint32_t *state, const uint8_t *const *data, size_t blocks)
{
    csvf__sm3()->compress(state, data[0], blocks);
}

/* Asks for the first cache line of every block of the next group: all of them miss at once, where the kernel would wait. (Two lines each are
 * too many: with blocks a page apart they fall into the same sets of the cache.) */
static void prefetch_group(const uint8_t *blocks, size_t block_length, size_t live)
{
    for (size_t l = 0; l < live; l++)
        __builtin_prefetch(blocks + l * block_length);
}

/* Hashes `live` consecutive blocks, at most `width`; `coming` more blocks will follow them next. */
static void hash_group(uint8_t *digests, const layout *p, const uint8_t *blocks, size_t block_length, size_t live,
                       size_t coming, size_t width, lanes_function compress)
{
    uint32_t state[8 * MOST_LANES];
    uint8_t staged[MOST_LANES][128];
    const uint8_t *data[MOST_LANES];
    for (size_t i = 0; i < 8; i++)
        for (size_t l = 0; l < width; l++)
            state[i * width + l] = p->h[i];

    if (p->has_head) {
        for (size_t l = 0; l < live; l++) {
            memcpy(staged[l], p->rest, p->rest_length);
            memcpy(staged[l] + p->rest_length, blocks + l * block_length, p->head_data);
        }
        for (size_t l = 0; l < width; l++)
            data[l] = staged[l < live ? l : 0];
        compress(state, data, 1);
    }
    if (p->middle_blocks) {
        for (size_t l = 0; l < width; l++)
            data[l] = blocks + (l < live ? l : 0) * block_length + p->head_data;
        compress(state, data, p->middle_blocks);
    }
    if (p->tail_data) {
        for (size_t l = 0; l < live; l++) {
            memcpy(staged[l], p->tail, 64 * p->tail_blocks);
            memcpy(staged[l] + p->tail_at, blocks + (l + 1) * block_length - p->tail_data, p->tail_data);
        }
        for (size_t l = 0; l < width; l++)
            data[l] = staged[l < live ? l : 0];
    } else {
        for (size_t l = 0; l < width; l++)
            data[l] = p->tail;
    }
    prefetch_group(blocks + live * block_length, block_length, coming);
    compress(state, data, p->tail_blocks);

    for (size_t l = 0; l < live; l++) {
        uint32_t h[8];
        load_column(h, state, width, l);
        csvf__sm3_store_digest(digests + 32 * l, h);
        csvf__wipe(h, sizeof h);
    }
    csvf__wipe(state, sizeof *state * 8 * width);
    csvf__wipe(staged, sizeof *staged * live);
}

int csvf_sm3_blocks(uint8_t *digests, const uint8_t *prefix, size_t prefix_length, const uint8_t *data,
                    size_t block_length, size_t count)
{
    if ((prefix_length && !prefix) || (count && (!data || !digests)))
        return CSVF_ERR_ARGUMENT;
    if (prefix_length > 256 || block_length == 0 || (count && block_length > SIZE_MAX / count))
        return CSVF_ERR_LENGTH;
    if (count == 0)
        return CSVF_OK;

    const csvf_sm3_many_kernel *kernel = csvf__sm3_many();
    layout p;
    plan(&p, csvf__sm3(), prefix, prefix_length, block_length);
    while (count) {
        const size_t width = best_width(kernel, count), live = count < width ? count : width;
        const size_t coming = count - live < width ? count - live : width;
        hash_group(digests, &p, data, block_length, live, coming, width,
                   width == 1 ? one_lane : function_of_width(kernel, width));
        digests += 32 * live;
        data += live * block_length;
        count -= live;
    }
    csvf__wipe(&p, sizeof p);
    return CSVF_OK;
}
