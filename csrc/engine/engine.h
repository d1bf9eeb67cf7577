/* The engine's parts and the block-aligned transform under every kind of access. Internal. */
#ifndef CSVF_ENGINE_H
#define CSVF_ENGINE_H

#include <stdatomic.h>

#include "../include/csvfast.h"
#include "../pool.h"
#include "keytable.h"
#include "tweakcache.h"

/* One thread's share of the statistics, in cache lines of its own (two: neighbours are fetched in pairs). */
typedef struct csvf__counters {
    _Alignas(128) _Atomic uint64_t encrypted;
    _Atomic uint64_t decrypted, host, merged, hits, misses;
} csvf__counters;

typedef struct csvf__spinlock {
    _Alignas(64) _Atomic uint32_t taken;
} csvf__spinlock;

enum { CSVF__BLOCK_LOCKS = 64 };

typedef enum csvf__backing { CSVF__OWN_MEMORY, CSVF__CALLERS_MEMORY, CSVF__FILE_MAPPING } csvf__backing;

struct csvf_engine {
    uint8_t *dram;
    size_t size;
    uint64_t base;
    int standard, tweak_model;
    csvf_pool *pool;            /* NULL = everything in the calling thread */
    csvf__keytable keys;
    csvf__backing backing;
    void *mapping;              /* of the DRAM, unless the caller owns it */
    size_t mapping_length;
    _Atomic uint64_t installed, removed;
    csvf__counters counters[CSVF__STRIPES];
    csvf__spinlock locks[CSVF__BLOCK_LOCKS];    /* of 16-byte blocks of which threads touch different parts */
    csvf__tweakcache tweaks;
    csvf_observer observer;     /* NULL = nobody watches */
    void *observer_context;
    int is_deterministic;
    uint8_t seed[CSVF_SM3_BYTES];   /* SM3 of the caller's */
};

/* Tells the observer, if there is one, of a call that succeeded. */
static inline void csvf__observe(const csvf_engine *engine, int kind, uint32_t asid, uint64_t address, uint64_t length)
{
    if (__builtin_expect(engine->observer != NULL, 0) && length) {
        const csvf_event event = {.address = address, .length = length, .asid = asid, .kind = kind, .is_encrypted = asid != 0};
        engine->observer(engine->observer_context, &event);
    }
}

/* One guest access under way: its key is pinned, its counts not yet added to the engine's. Bytes count where they really go
 * through SM4: a block read for a part of it counts as 16, a block written in part as 16 decrypted and 16 encrypted, and the whole
 * blocks between the edges of a short unaligned write are decrypted with them. */
typedef struct csvf__access {
    csvf_engine *engine;
    csvf__pin pin;
    uint32_t stripe;
    uint64_t encrypted, decrypted, merged, hits, misses;
} csvf__access;

/* Returns: CSVF_OK, CSVF_ERR_ASID (then there is nothing to end). */
static inline int csvf__access_begin(csvf__access *access, csvf_engine *engine, uint32_t asid)
{
    *access = (csvf__access){.engine = engine, .stripe = csvf__stripe()};
    return csvf__keytable_pin(&engine->keys, &access->pin, asid, access->stripe);
}

static inline void csvf__count(_Atomic uint64_t *counter, uint64_t more)
{
    if (more)
        atomic_fetch_add_explicit(counter, more, memory_order_relaxed);
}

static inline void csvf__access_end(csvf__access *access)
{
    csvf__counters *counters = &access->engine->counters[access->stripe];
    csvf__count(&counters->encrypted, access->encrypted);
    csvf__count(&counters->decrypted, access->decrypted);
    csvf__count(&counters->merged, access->merged);
    csvf__count(&counters->hits, access->hits);
    csvf__count(&counters->misses, access->misses);
    csvf__keytable_unpin(&access->pin);
}

/* Is [address, address + length) inside the memory? Returns: CSVF_OK, CSVF_ERR_RANGE. */
static inline int csvf__check_range(const csvf_engine *engine, uint64_t address, uint64_t length)
{
    const uint64_t offset = address - engine->base;
    return address < engine->base || offset > engine->size || length > engine->size - offset ? CSVF_ERR_RANGE : CSVF_OK;
}

/* A caller's buffer inside the DRAM would be read as plaintext and overwritten as ciphertext at once. */
static inline int csvf__check_outside(const csvf_engine *engine, const void *data, size_t length)
{
    const uintptr_t start = (uintptr_t)data, dram = (uintptr_t)engine->dram;
    const int is_apart = length == 0 || (start >= dram ? start - dram >= engine->size : dram - start >= length);
    return is_apart ? CSVF_OK : CSVF_ERR_OVERLAP;
}

static inline uint8_t *csvf__at(const csvf_engine *engine, uint64_t address)
{
    return engine->dram + (address - engine->base);
}

/* SM4 over whole 16-byte blocks that stand (or will stand) at `address`, under the engine's tweak model. Address and length are
 * multiples of 16 and already checked; one of out and in may be the DRAM, or both. Long runs use the engine's workers. Adds the
 * bytes to the access's counts. (transform.c) */
void csvf__transform(csvf__access *access, uint8_t *out, const uint8_t *in, uint64_t address, size_t length, int decrypt);

/* The same in this thread only and without counts, for whole pages: for workers. (transform.c) */
void csvf__transform_pages(const csvf_engine *engine, const csvf_xts *xts, uint8_t *out, const uint8_t *in, uint64_t pfn,
                           size_t pages, int decrypt);

#endif
