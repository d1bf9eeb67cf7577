/* The ASID key table: see keytable.h for the protocol. */
#define _GNU_SOURCE
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "keytable.h"

_Static_assert(sizeof(csvf_xts) % 64 == 0, "keys would share cache lines");

enum { STATE_MASK = (1 << CSVF__KEY_STATE_BITS) - 1 };

static size_t whole_pages(size_t length) { return (length + CSVF_PAGE_BYTES - 1) / CSVF_PAGE_BYTES * CSVF_PAGE_BYTES; }

int csvf__keytable_create(csvf__keytable *table, uint32_t asid_max)
{
    const size_t count = (size_t)asid_max + 1, pitch = (count + 15) / 16 * 16;
    const size_t keys = whole_pages(count * sizeof(csvf_xts)), states = whole_pages(count * sizeof(uint64_t)),
                 pins = whole_pages(CSVF__STRIPES * pitch * sizeof(uint32_t));

    /* 65535 keys would be 210 MB. Reserved address space costs nothing until a key is installed, and installing allocates
     * nothing that could fail. */
    const size_t length = keys + states + pins;
    uint8_t *mapping = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED)
        return CSVF_ERR_MEMORY;
    /* Keys stay out of core dumps, and one key must not pull in a huge page. Advice only: failure changes nothing else. */
    (void)madvise(mapping, length, MADV_DONTDUMP);
    (void)madvise(mapping, length, MADV_NOHUGEPAGE);
    *table = (csvf__keytable){
        .keys = (csvf_xts *)mapping,
        .states = (_Atomic uint64_t *)(mapping + keys),
        .pins = (_Atomic uint32_t *)(mapping + keys + states),
        .pitch = pitch,
        .asid_max = asid_max,
        .mapping = mapping,
        .mapping_length = length,
    };
    return CSVF_OK;
}

void csvf__keytable_destroy(csvf__keytable *table)
{
    if (!table->mapping)
        return;
    for (uint32_t asid = 1; asid <= table->asid_max; asid++)
        if ((atomic_load(&table->states[asid]) & STATE_MASK) != CSVF__KEY_FREE)
            csvf_wipe(&table->keys[asid], sizeof table->keys[asid]);
    munmap(table->mapping, table->mapping_length);
    *table = (csvf__keytable){0};
}

int csvf__keytable_install(csvf__keytable *table, uint64_t *generation, uint32_t asid, const uint8_t key[32], int standard)
{
    uint64_t state = atomic_load(&table->states[asid]);
    do {
        if ((state & STATE_MASK) != CSVF__KEY_FREE)
            return CSVF_ERR_BUSY;
    } while (!atomic_compare_exchange_weak(&table->states[asid], &state, state | CSVF__KEY_CHANGING));

    const int status = csvf_xts_init(&table->keys[asid], key, standard);
    if (status != CSVF_OK) {
        csvf_wipe(&table->keys[asid], sizeof table->keys[asid]);
        atomic_store(&table->states[asid], state);
        return status;
    }
    *generation = (state >> CSVF__KEY_STATE_BITS) + 1;
    atomic_store(&table->states[asid], *generation << CSVF__KEY_STATE_BITS | CSVF__KEY_ACTIVE);
    return CSVF_OK;
}

/* Accesses are short except bulk ones, which last milliseconds: first yield, then sleep. */
static void wait_for_pins(const csvf__keytable *table, uint32_t asid)
{
    unsigned tries = 0;
    for (uint32_t stripe = 0; stripe < CSVF__STRIPES; stripe++)
        while (atomic_load(&table->pins[stripe * table->pitch + asid]) != 0) {
            if (++tries < 200)
                sched_yield();
            else
                nanosleep(&(struct timespec){0, 50000}, NULL);
        }
}

int csvf__keytable_remove_begin(csvf__keytable *table, uint32_t asid)
{
    uint64_t state = atomic_load(&table->states[asid]);
    do {
        if ((state & STATE_MASK) != CSVF__KEY_ACTIVE)
            return CSVF_ERR_ASID;
    } while (!atomic_compare_exchange_weak(&table->states[asid], &state,
                                           (state & ~(uint64_t)STATE_MASK) | CSVF__KEY_CHANGING));
    wait_for_pins(table, asid);
    csvf_wipe(&table->keys[asid], sizeof table->keys[asid]);
    return CSVF_OK;
}

void csvf__keytable_remove_end(csvf__keytable *table, uint32_t asid)
{
    const uint64_t state = atomic_load(&table->states[asid]);
    atomic_store(&table->states[asid], state & ~(uint64_t)STATE_MASK);
}
