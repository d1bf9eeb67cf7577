/* Cache of encrypted data unit tweaks (T_0) for line and small accesses. Internal.
 *
 * Direct mapped, shared by all threads. Each entry is a sequence lock: readers write nothing, so a hit costs loads of one cache
 * line only; a writer that finds the entry taken leaves it. Tweaks are secret: they are wiped when their key goes. The tag
 * names the key by generation too, so a tweak of an earlier key of the same ASID is never found.
 *
 * Every field is atomic and the orders are those of H.-J. Boehm, "Can seqlocks get along with programming language memory
 * models?" (2012), with acquire loads instead of a fence: the same instructions on x86. */
#ifndef CSVF_TWEAKCACHE_H
#define CSVF_TWEAKCACHE_H

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>

enum { CSVF__TWEAK_ENTRIES = 1024 };   /* 64 KiB: the pages of 4 MiB of working set */

typedef struct csvf__tweak_entry {
    _Alignas(64) _Atomic uint64_t sequence;   /* odd while a writer is inside */
    _Atomic uint64_t tag;                     /* generation << 16 | ASID; 0 = empty */
    _Atomic uint64_t unit;
    _Atomic uint64_t tweak[2];
} csvf__tweak_entry;

typedef struct csvf__tweakcache {
    csvf__tweak_entry entries[CSVF__TWEAK_ENTRIES];
} csvf__tweakcache;

/* Guests run the same page numbers under different ASIDs; the multiplier keeps them apart. */
static inline csvf__tweak_entry *csvf__tweak_entry_of(csvf__tweakcache *cache, uint64_t tag, uint64_t unit)
{
    return &cache->entries[(unit + (tag & 0xFFFF) * 0x9E5u) % CSVF__TWEAK_ENTRIES];
}

/* Returns 1 and the tweak, or 0. */
static inline int csvf__tweak_find(csvf__tweakcache *cache, uint8_t tweak[16], uint64_t tag, uint64_t unit)
{
    csvf__tweak_entry *entry = csvf__tweak_entry_of(cache, tag, unit);
    const uint64_t before = atomic_load_explicit(&entry->sequence, memory_order_acquire);
    const uint64_t found_tag = atomic_load_explicit(&entry->tag, memory_order_acquire);
    const uint64_t found_unit = atomic_load_explicit(&entry->unit, memory_order_acquire);
    const uint64_t words[2] = {atomic_load_explicit(&entry->tweak[0], memory_order_acquire),
                               atomic_load_explicit(&entry->tweak[1], memory_order_acquire)};
    if ((before & 1) || found_tag != tag || found_unit != unit ||
        atomic_load_explicit(&entry->sequence, memory_order_relaxed) != before)
        return 0;
    memcpy(tweak, words, 16);
    return 1;
}

static inline void csvf__tweak_fill(csvf__tweak_entry *entry, uint64_t tag, uint64_t unit, const uint64_t words[2])
{
    atomic_store_explicit(&entry->tag, tag, memory_order_release);
    atomic_store_explicit(&entry->unit, unit, memory_order_release);
    atomic_store_explicit(&entry->tweak[0], words[0], memory_order_release);
    atomic_store_explicit(&entry->tweak[1], words[1], memory_order_release);
}

static inline void csvf__tweak_store(csvf__tweakcache *cache, const uint8_t tweak[16], uint64_t tag, uint64_t unit)
{
    csvf__tweak_entry *entry = csvf__tweak_entry_of(cache, tag, unit);
    uint64_t sequence = atomic_load_explicit(&entry->sequence, memory_order_relaxed), words[2];
    if ((sequence & 1) || !atomic_compare_exchange_strong_explicit(&entry->sequence, &sequence, sequence + 1,
                                                                   memory_order_acq_rel, memory_order_relaxed))
        return;
    memcpy(words, tweak, 16);
    csvf__tweak_fill(entry, tag, unit, words);
    atomic_store_explicit(&entry->sequence, sequence + 2, memory_order_release);
}

/* Wipes every tweak of an ASID. Nobody may be storing tweaks of that ASID: its key has no pins any more. */
static inline void csvf__tweak_forget(csvf__tweakcache *cache, uint32_t asid)
{
    const uint64_t zero[2] = {0, 0};
    for (size_t i = 0; i < CSVF__TWEAK_ENTRIES; i++) {
        csvf__tweak_entry *entry = &cache->entries[i];
        while ((atomic_load_explicit(&entry->tag, memory_order_acquire) & 0xFFFF) == asid) {
            uint64_t sequence = atomic_load_explicit(&entry->sequence, memory_order_relaxed);
            if ((sequence & 1) || !atomic_compare_exchange_strong_explicit(&entry->sequence, &sequence, sequence + 1,
                                                                           memory_order_acq_rel, memory_order_relaxed))
                continue;   /* another ASID's writer is about to replace it: a few stores */
            if ((atomic_load_explicit(&entry->tag, memory_order_relaxed) & 0xFFFF) == asid)
                csvf__tweak_fill(entry, 0, 0, zero);
            atomic_store_explicit(&entry->sequence, sequence + 2, memory_order_release);
        }
    }
}

#endif
