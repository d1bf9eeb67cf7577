/* A set-associative array of tags with a replacement policy: what caches and TLB have in common. Internal. */
#ifndef CSVF_WAYS_H
#define CSVF_WAYS_H

#include "../include/csvfast.h"

typedef struct csvf__ways {
    uint64_t *tags;         /* [sets * ways]; 0 = free */
    uint64_t *stamps;       /* [sets * ways]: time of the last use (LRU) or of the fill (FIFO); 0 where free */
    uint64_t *trees;        /* [sets], node n of the tree being bit n, the root bit 1; set = the right half is older */
    uint64_t clock, random;
    uint64_t mask;          /* sets - 1 */
    uint32_t ways;
    int replacement;
} csvf__ways;

/* Index of the way that holds the tag, or -1. All ways are looked at: which of them has it cannot be predicted, and a wrong guess costs more
 * than the comparisons. */
static inline int64_t csvf__ways_find(const csvf__ways *array, uint64_t set, uint64_t tag)
{
    const uint64_t first = (set & array->mask) * array->ways;
    const uint64_t *tags = array->tags + first;
    int64_t found = -1;
    for (uint32_t way = 0; way < array->ways; way++)
        found = tags[way] == tag ? (int64_t)way : found;
    return found < 0 ? found : (int64_t)first + found;
}

static inline void csvf__ways_point_away(csvf__ways *array, uint64_t set, uint32_t way)
{
    uint64_t tree = array->trees[set];
    for (uint32_t half = array->ways / 2, node = 1; half; half /= 2) {
        const uint32_t is_right = (way & half) != 0;
        tree = is_right ? tree & ~(UINT64_C(1) << node) : tree | UINT64_C(1) << node;
        node = 2 * node + is_right;
    }
    array->trees[set] = tree;
}

/* The entry at this index has been used. */
static inline void csvf__ways_touch(csvf__ways *array, uint64_t set, uint64_t index)
{
    if (array->replacement == CSVF_REPLACE_LRU)
        array->stamps[index] = ++array->clock;
    else if (array->replacement == CSVF_REPLACE_TREE)
        csvf__ways_point_away(array, set & array->mask, (uint32_t)(index % array->ways));
}

/* The way whose stamp is oldest; a free one's is 0. */
static inline uint32_t csvf__ways_oldest(const uint64_t *stamps, uint32_t ways)
{
    uint64_t stamp = stamps[0];
    uint32_t oldest = 0;
    for (uint32_t way = 1; way < ways; way++) {
        const int is_older = stamps[way] < stamp;
        oldest = is_older ? way : oldest;
        stamp = is_older ? stamps[way] : stamp;
    }
    return oldest;
}

/* Index where the next tag of a set goes: the first free way, or the one that the policy gives up. */
static inline uint64_t csvf__ways_victim(csvf__ways *array, uint64_t set)
{
    const uint64_t first = (set & array->mask) * array->ways;
    if (array->replacement == CSVF_REPLACE_LRU || array->replacement == CSVF_REPLACE_FIFO)
        return first + csvf__ways_oldest(array->stamps + first, array->ways);
    for (uint32_t way = 0; way < array->ways; way++)
        if (array->tags[first + way] == 0)
            return first + way;
    if (array->replacement == CSVF_REPLACE_TREE) {
        const uint64_t tree = array->trees[set & array->mask];
        uint32_t node = 1;
        while (node < array->ways)
            node = 2 * node + (uint32_t)(tree >> node & 1);
        return first + node - array->ways;
    }
    array->random ^= array->random << 13;
    array->random ^= array->random >> 7;
    array->random ^= array->random << 17;
    return first + (array->random >> 32) % array->ways;
}

static inline void csvf__ways_put(csvf__ways *array, uint64_t set, uint64_t index, uint64_t tag)
{
    array->tags[index] = tag;
    if (array->replacement == CSVF_REPLACE_FIFO)
        array->stamps[index] = ++array->clock;
    else
        csvf__ways_touch(array, set, index);
}

static inline void csvf__ways_drop(csvf__ways *array, uint64_t index)
{
    array->tags[index] = 0;
    array->stamps[index] = 0;
}

#endif
