/* The ASID key table. Internal.
 *
 * An access pins its key; removal marks the key as leaving, waits until no pin is left, and wipes it. The pin count of an ASID is
 * striped by thread: with a single count, two threads working as one guest would send its cache line back and forth at every access (~100-200
 * cycles), while a count in a line that stays in this core's cache costs ~20. Both sides are Dekker's pattern and hence sequentially
 * consistent: a pin writes its count and then reads the state, removal writes the state and then reads the counts, so at least one
 * sees the other. */
#ifndef CSVF_KEYTABLE_H
#define CSVF_KEYTABLE_H

#include <pthread.h>
#include <stdatomic.h>

#include "../include/csvfast.h"

enum {
    CSVF__STRIPE_BITS = 5,
    CSVF__STRIPES = 1 << CSVF__STRIPE_BITS,
    CSVF__KEY_FREE = 0,
    CSVF__KEY_ACTIVE = 1,
    CSVF__KEY_CHANGING = 2,     /* being installed or removed: no access may start */
    CSVF__KEY_STATE_BITS = 2
};

typedef struct csvf__keytable {
    csvf_xts *keys;             /* [asid_max + 1], touched only where a key is installed */
    _Atomic uint64_t *states;   /* [asid_max + 1], generation << 2 | CSVF__KEY_* */
    _Atomic uint32_t *pins;     /* [CSVF__STRIPES][pitch] */
    size_t pitch;               /* whole cache lines: stripes never share one */
    uint32_t asid_max;
    void *mapping;
    size_t mapping_length;
} csvf__keytable;

/* A key held in place. `tag` names this very key: generation << 16 | ASID, never 0. */
typedef struct csvf__pin {
    const csvf_xts *xts;
    uint64_t tag;
    _Atomic uint32_t *count;
} csvf__pin;

int csvf__keytable_create(csvf__keytable *table, uint32_t asid_max);
/* Wipes what is installed and unmaps. No pin may be left. */
void csvf__keytable_destroy(csvf__keytable *table);

int csvf__keytable_install(csvf__keytable *table, uint64_t *generation, uint32_t asid, const uint8_t key[32], int standard);
/* Two halves, so that the caller wipes what it derived from the key in between: after begin no access uses the key. */
int csvf__keytable_remove_begin(csvf__keytable *table, uint32_t asid);
void csvf__keytable_remove_end(csvf__keytable *table, uint32_t asid);

/* A small number that tends to differ between threads. Derived from the thread's address, so there is no thread-local variable to
 * initialise or to run out of; two threads that share a stripe are slower, not wrong. */
static inline uint32_t csvf__stripe(void)
{
    return (uint32_t)(((uint64_t)(uintptr_t)pthread_self() * UINT64_C(0x9E3779B97F4A7C15)) >> (64 - CSVF__STRIPE_BITS));
}

static inline void csvf__keytable_unpin(const csvf__pin *pin)
{
    atomic_fetch_sub_explicit(pin->count, 1, memory_order_release);
}

/* Returns: CSVF_OK, CSVF_ERR_ASID (nothing is pinned then). */
static inline int csvf__keytable_pin(const csvf__keytable *table, csvf__pin *pin, uint32_t asid, uint32_t stripe)
{
    if (asid == 0 || asid > table->asid_max)
        return CSVF_ERR_ASID;
    pin->count = &table->pins[stripe * table->pitch + asid];
    atomic_fetch_add_explicit(pin->count, 1, memory_order_seq_cst);
    const uint64_t state = atomic_load_explicit(&table->states[asid], memory_order_seq_cst);
    if ((state & ((1u << CSVF__KEY_STATE_BITS) - 1)) != CSVF__KEY_ACTIVE) {
        csvf__keytable_unpin(pin);
        return CSVF_ERR_ASID;
    }
    pin->xts = &table->keys[asid];
    pin->tag = state >> CSVF__KEY_STATE_BITS << 16 | asid;
    return CSVF_OK;
}

#endif
