/* SM4 with GFNI and AVX-512 (F, BW, DQ, VL, VBMI): the kernel "gfni-avx512".
 *
 * Two forms, by the number of blocks: word-sliced for up to 16 blocks (short chain, low latency), byte-sliced in groups of 64 blocks,
 * two groups at a time, for everything else. Constant time: secrets only pass through vector arithmetic.
 *
 * Sources: GB/T 32907-2016 (SM4), GB/T 17964-2021 and IEEE 1619-2018 (XTS); the constants are derived in tools/sm4_tables.py. */
#if defined(__x86_64__)

#define CSVF_TARGET_GFNI_AVX512
#include "../target_begin.h"

#include <immintrin.h>
#include <string.h>

#include "../cpu.h"
#include "../include/csvfast.h"
#include "sm4_kernel.h"
#include "sm4_tables.h"

typedef __m512i V;

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))
#if defined(__clang__)
#  define UNROLL _Pragma("clang loop unroll(full)")
#else
#  define UNROLL _Pragma("GCC unroll 16")
#endif

#define XOR(a, b) _mm512_xor_si512(a, b)
#define XOR3(a, b, c) _mm512_ternarylogic_epi32(a, b, c, 0x96)
#define LOADU(p) _mm512_loadu_si512(p)
#define MATRIX(m) _mm512_set1_epi64((long long)(m))
#define BROADCAST(word) _mm512_set1_epi32((int)(word))
#define AFFINE(x, m) _mm512_gf2p8affine_epi64_epi8(x, m, 0)
#define INVERT(x, m) _mm512_gf2p8affineinv_epi64_epi8(x, m, 0)

/* csvf_sm4_schedule.words of this kernel. Sliced constants are bytes repeated four times, ready for broadcasting loads. */
enum {
    KEY_SLICED = 0,      /* [32][4] constant of round i, byte m */
    KEY_IN = 128,        /* [4] what word 3 carries at the start, byte m */
    KEY_OUT = 132,       /* [16] what byte k of the output has to lose */
    KEY_WORDS = 148,     /* [32] constant of round i as a word, bytes in memory order */
    KEY_WORDS_IN = 180,  /* [1] */
    KEY_WORDS_OUT = 181, /* [4] */
    KEY_END = 185
};
_Static_assert(KEY_END <= sizeof(((csvf_sm4_schedule *)0)->words) / 4, "schedule too small");

/* Mask of the dwords of row i (four blocks) that exist in `blocks` blocks. */
INLINE __mmask16 row_mask(size_t blocks, size_t i)
{
    if (blocks >= 4 * i + 4)
        return 0xffff;
    return blocks > 4 * i ? (__mmask16)((1u << (4 * (blocks - 4 * i))) - 1) : 0;
}

#include "sm4_gfni_avx512_tweaks.h"
#include "sm4_gfni_avx512_sliced.h"
#include "sm4_gfni_avx512_words.h"
#include "sm4_gfni_avx512_page.h"
#include "sm4_gfni_avx512_lines.h"

/* What a pair of groups has to prefetch of its output: nothing new if the input stands there. */
INLINE uintptr_t to_write(const uint8_t *out, const uint8_t *in) { return (uintptr_t)(out == in ? in + AHEAD : out); }

/* Loading and storing with the choices that matter fixed at compile time; groups that are not full share one slower copy. */
NOINLINE void load_plain(const csvf_sm4_schedule *schedule, group *g, const uint8_t *in)
{
    load_group(schedule, g->state, in, GROUP_BLOCKS, NULL, NULL);
}
NOINLINE void load_unsliced(const csvf_sm4_schedule *schedule, group *g, const uint8_t *in, const uint8_t *tweaks)
{
    load_group(schedule, g->state, in, GROUP_BLOCKS, NULL, tweaks);
}
NOINLINE void load_sliced(const csvf_sm4_schedule *schedule, group *g, const uint8_t *in)
{
    load_group(schedule, g->state, in, GROUP_BLOCKS, g->tweak, NULL);
}
/* A full group whose tweaks follow those of `before`: makes them on the way (one pass: the tweak arithmetic fills what the shuffles leave). */
NOINLINE void load_next(const csvf_sm4_schedule *schedule, const tweak_matrices *m, group *g, const V before[16], const uint8_t *in)
{
    const V p = MATRIX(CSVF_SM4_P);
    V a[16];
    load_bytes(a, in, GROUP_BLOCKS, NULL);
    UNROLL for (int k = 0; k < 16; k++) {
        const V t = next_tweak(m, before, k), x = AFFINE(XOR(a[k], t), p);
        g->tweak[k] = t;
        g->state[k] = k < 12 ? x : XOR(x, BROADCAST(schedule->words[KEY_IN + k - 12]));
    }
}
NOINLINE void load_part(const csvf_sm4_schedule *schedule, group *g, const uint8_t *in, size_t blocks, const V *sliced,
                        const uint8_t *tweaks)
{
    load_group(schedule, g->state, in, blocks, sliced, tweaks);
}
NOINLINE void store_plain(const csvf_sm4_schedule *schedule, uint8_t *out, const group *g)
{
    store_group(schedule, out, g->state, GROUP_BLOCKS, NULL, NULL);
}
NOINLINE void store_unsliced(const csvf_sm4_schedule *schedule, uint8_t *out, const group *g, const uint8_t *mask)
{
    store_group(schedule, out, g->state, GROUP_BLOCKS, NULL, mask);
}
NOINLINE void store_sliced(const csvf_sm4_schedule *schedule, uint8_t *out, const group *g)
{
    store_group(schedule, out, g->state, GROUP_BLOCKS, g->tweak, NULL);
}
NOINLINE void store_part(const csvf_sm4_schedule *schedule, uint8_t *out, const group *g, size_t blocks, const V *sliced,
                         const uint8_t *mask)
{
    store_group(schedule, out, g->state, blocks, sliced, mask);
}

INLINE void store_xts(const csvf_sm4_schedule *schedule, uint8_t *out, const group *g, size_t blocks)
{
    if (blocks == GROUP_BLOCKS)
        store_sliced(schedule, out, g);
    else
        store_part(schedule, out, g, blocks, g->tweak, NULL);
}

/* The tweaks of these groups are given by the caller or unused. */
INLINE void wipe_states(group g[2], int both)
{
    csvf_wipe(g[0].state, sizeof g[0].state);
    if (both)
        csvf_wipe(g[1].state, sizeof g[1].state);
}

/* out = E(in xor tweaks) xor tweaks with a 16-byte tweak for every block, or none (NULL). */
INLINE void xex_blocks(const csvf_sm4_schedule *schedule, uint8_t *out, const uint8_t *in, const uint8_t *tweaks, size_t blocks)
{
    group g[2];
    const int sliced = blocks > WORDS_BLOCKS, pairs = blocks > GROUP_BLOCKS + WORDS_BLOCKS;
    for (; blocks >= 2 * GROUP_BLOCKS; blocks -= 2 * GROUP_BLOCKS) {
        if (tweaks) {
            load_unsliced(schedule, &g[0], in, tweaks);
            load_unsliced(schedule, &g[1], in + GROUP_BYTES, tweaks + GROUP_BYTES);
            rounds_of_two(schedule, g[0].state, g[1].state, (uintptr_t)in + AHEAD, to_write(out, in));
            store_unsliced(schedule, out, &g[0], tweaks);
            store_unsliced(schedule, out + GROUP_BYTES, &g[1], tweaks + GROUP_BYTES);
            tweaks += 2 * GROUP_BYTES;
        } else {
            load_plain(schedule, &g[0], in);
            load_plain(schedule, &g[1], in + GROUP_BYTES);
            rounds_of_two(schedule, g[0].state, g[1].state, (uintptr_t)in + AHEAD, to_write(out, in));
            store_plain(schedule, out, &g[0]);
            store_plain(schedule, out + GROUP_BYTES, &g[1]);
        }
        in += 2 * GROUP_BYTES, out += 2 * GROUP_BYTES;
    }
    if (blocks > GROUP_BLOCKS + WORDS_BLOCKS) {
        const size_t rest = blocks - GROUP_BLOCKS;
        const uint8_t *rest_tweaks = tweaks ? tweaks + GROUP_BYTES : NULL;
        load_part(schedule, &g[0], in, GROUP_BLOCKS, NULL, tweaks);
        load_part(schedule, &g[1], in + GROUP_BYTES, rest, NULL, rest_tweaks);
        rounds_of_two(schedule, g[0].state, g[1].state, (uintptr_t)in, to_write(out, in));
        store_part(schedule, out, &g[0], GROUP_BLOCKS, NULL, tweaks);
        store_part(schedule, out + GROUP_BYTES, &g[1], rest, NULL, rest_tweaks);
        blocks = 0;
    } else if (blocks > WORDS_BLOCKS) {
        const size_t now = blocks < GROUP_BLOCKS ? blocks : GROUP_BLOCKS;
        if (now == GROUP_BLOCKS && !tweaks) {
            load_plain(schedule, &g[0], in);
            rounds_of_one(schedule, g[0].state);
            store_plain(schedule, out, &g[0]);
        } else {
            load_part(schedule, &g[0], in, now, NULL, tweaks);
            rounds_of_one(schedule, g[0].state);
            store_part(schedule, out, &g[0], now, NULL, tweaks);
        }
        in += 16 * now, out += 16 * now, blocks -= now;
        if (tweaks)
            tweaks += 16 * now;
    }
    if (blocks)
        words_blocks(schedule, out, in, blocks, tweaks, tweaks);
    if (sliced)
        wipe_states(g, pairs);
}

static void ecb(const csvf_sm4_schedule *schedule, uint8_t *out, const uint8_t *in, size_t blocks)
{
    xex_blocks(schedule, out, in, NULL, blocks);
}

static void xex(const csvf_sm4_schedule *schedule, uint8_t *out, const uint8_t *in, const uint8_t *tweaks, size_t blocks)
{
    xex_blocks(schedule, out, in, tweaks, blocks);
}

/* A 128-bit big-endian counter. */
typedef struct counter {
    uint64_t high, low;
} counter;

INLINE counter counter_load(const uint8_t bytes[16])
{
    uint64_t words[2];
    memcpy(words, bytes, 16);
    return (counter){__builtin_bswap64(words[0]), __builtin_bswap64(words[1])};
}

INLINE void counter_store(uint8_t bytes[16], counter c)
{
    const uint64_t words[2] = {__builtin_bswap64(c.high), __builtin_bswap64(c.low)};
    memcpy(bytes, words, 16);
}

INLINE counter counter_add(counter c, uint64_t n)
{
    return (counter){c.high + (c.low + n < n), c.low + n};
}

/* Sliced state of the counters c .. c + 63: bytes 0..14 are those of c, or of c + 256 where byte 15 wrapped around. */
INLINE void load_counters(const csvf_sm4_schedule *schedule, group *g, counter c)
{
    const __m128i p = _mm_set1_epi64x((long long)CSVF_SM4_P);
    const V number = _mm512_add_epi8(_mm512_load_si512(block_of_byte), _mm512_set1_epi8((char)c.low));
    const __mmask64 wrapped = _mm512_cmplt_epu8_mask(number, _mm512_set1_epi8((char)c.low));
    uint8_t bytes[2][16] __attribute__((aligned(16)));
    counter_store(bytes[0], c);
    counter_store(bytes[1], counter_add(c, 256));
    for (int i = 0; i < 2; i++) {
        const __m128i in_basis = _mm_gf2p8affine_epi64_epi8(_mm_load_si128((const __m128i *)bytes[i]), p, 0);
        _mm_store_si128((__m128i *)bytes[i], in_basis);
    }
    UNROLL for (int k = 0; k < 15; k++) {
        V x = _mm512_mask_set1_epi8(_mm512_set1_epi8((char)bytes[0][k]), wrapped, (char)bytes[1][k]);
        g->state[k] = k < 12 ? x : XOR(x, BROADCAST(schedule->words[KEY_IN + k - 12]));
    }
    g->state[15] = XOR(AFFINE(number, MATRIX(CSVF_SM4_P)), BROADCAST(schedule->words[KEY_IN + 3]));
}

static void ctr(const csvf_sm4_schedule *schedule, uint8_t *out, const uint8_t *in, size_t blocks, uint8_t counter_bytes[16])
{
    group g[2];
    counter c = counter_load(counter_bytes);
    counter_store(counter_bytes, counter_add(c, blocks));
    const int sliced = blocks > WORDS_BLOCKS, pairs = blocks > GROUP_BLOCKS + WORDS_BLOCKS;
    for (; blocks >= 2 * GROUP_BLOCKS; blocks -= 2 * GROUP_BLOCKS) {
        load_counters(schedule, &g[0], c);
        load_counters(schedule, &g[1], counter_add(c, GROUP_BLOCKS));
        rounds_of_two(schedule, g[0].state, g[1].state, (uintptr_t)in + AHEAD, to_write(out, in));
        store_unsliced(schedule, out, &g[0], in);
        store_unsliced(schedule, out + GROUP_BYTES, &g[1], in + GROUP_BYTES);
        in += 2 * GROUP_BYTES, out += 2 * GROUP_BYTES;
        c = counter_add(c, 2 * GROUP_BLOCKS);
    }
    while (blocks > WORDS_BLOCKS) {
        const size_t now = blocks < GROUP_BLOCKS ? blocks : GROUP_BLOCKS;
        load_counters(schedule, &g[0], c);
        rounds_of_one(schedule, g[0].state);
        store_part(schedule, out, &g[0], now, NULL, in);
        in += 16 * now, out += 16 * now, blocks -= now;
        c = counter_add(c, now);
    }
    if (blocks) {
        uint8_t counters[16 * WORDS_BLOCKS];
        for (size_t i = 0; i < blocks && i < WORDS_BLOCKS; i++, c = counter_add(c, 1))
            counter_store(counters + 16 * i, c);
        words_blocks(schedule, out, counters, blocks, NULL, in);
    }
    if (sliced)
        wipe_states(g, pairs);
}

/* Runs of whole pages. */
static void xts_pages(const csvf_sm4_schedule *schedule, int standard, uint8_t *out, const uint8_t *in, const uint8_t *tweaks,
                      size_t run_pages, size_t runs)
{
    const tweak_matrices m = matrices_of(standard);
    page p;
    for (size_t r = 0; r < runs; r++)
        for (size_t i = 0; i < run_pages; i++) {
            xts_page(schedule, &m, &p, out, in, i ? NULL : tweaks + 16 * r);
            in += 16 * PAGE_BLOCKS, out += 16 * PAGE_BLOCKS;
        }
    csvf_wipe(&p, sizeof p);
}

/* Runs of at least 64 blocks: a group never spans two runs, pairs may. */
static void xts_long_runs(const csvf_sm4_schedule *schedule, int standard, uint8_t *out, const uint8_t *in, const uint8_t *tweaks,
                          size_t run_blocks, size_t runs)
{
    const tweak_matrices m = matrices_of(standard);
    group g[2];
    uint8_t *first_out = NULL;
    size_t first_blocks = 0;
    int slot = 0;
    for (size_t r = 0; r < runs; r++) {
        for (size_t left = run_blocks; left;) {
            const size_t now = left < GROUP_BLOCKS ? left : GROUP_BLOCKS;
            const V *before = g[slot ^ 1].tweak;
            if (left != run_blocks && now == GROUP_BLOCKS) {
                load_next(schedule, &m, &g[slot], before, in);
            } else {
                if (left == run_blocks)
                    first_tweaks(&m, g[slot].tweak, tweaks + 16 * r);
                else
                    UNROLL for (int k = 0; k < 16; k++) g[slot].tweak[k] = next_tweak(&m, before, k);
                if (now == GROUP_BLOCKS)
                    load_sliced(schedule, &g[slot], in);
                else
                    load_part(schedule, &g[slot], in, now, g[slot].tweak, NULL);
            }
            if (slot == 0) {
                first_out = out, first_blocks = now;
            } else {
                rounds_of_two(schedule, g[0].state, g[1].state, (uintptr_t)in + AHEAD,
                              out == in ? (uintptr_t)in + AHEAD : (uintptr_t)first_out);
                store_xts(schedule, first_out, &g[0], first_blocks);
                store_xts(schedule, out, &g[1], now);
            }
            slot ^= 1;
            in += 16 * now, out += 16 * now, left -= now;
        }
    }
    if (slot) {
        rounds_of_one(schedule, g[0].state);
        store_xts(schedule, first_out, &g[0], first_blocks);
    }
    csvf_wipe(g, sizeof g);
}

static void xts(const csvf_sm4_schedule *schedule, int standard, uint8_t *out, const uint8_t *in, const uint8_t *tweaks,
                size_t run_blocks, size_t runs)
{
    if (run_blocks && run_blocks % PAGE_BLOCKS == 0) {
        xts_pages(schedule, standard, out, in, tweaks, run_blocks / PAGE_BLOCKS, runs);
        return;
    }
    if (run_blocks >= GROUP_BLOCKS) {
        xts_long_runs(schedule, standard, out, in, tweaks, run_blocks, runs);
        return;
    }
    if (run_blocks == 0 || runs == 0)
        return;
    uint8_t expanded[16 * 4 * GROUP_BLOCKS] __attribute__((aligned(64)));
    const size_t at_once = runs < 4 * GROUP_BLOCKS / run_blocks ? runs : 4 * GROUP_BLOCKS / run_blocks;
    for (size_t r = 0; r < runs; r += at_once) {
        const size_t now = runs - r < at_once ? runs - r : at_once;
        const size_t offset = 16 * run_blocks * r;
        tweaks_of_runs(standard, expanded, tweaks + 16 * r, NULL, run_blocks, now);
        xex_blocks(schedule, out + offset, in + offset, expanded, run_blocks * now);
    }
    csvf_wipe(expanded, 16 * run_blocks * at_once);
}

static void lines(const csvf_sm4_schedule *schedule, int standard, uint8_t *out, const uint8_t *in, const uint8_t *bases,
                  const uint32_t *powers, size_t count)
{
    const size_t whole = count - count % PAGE_LINES, rest = count - whole;
    if (whole)
        lines_by_page(schedule, standard, out, in, bases, powers, whole);
    if (rest) {
        uint8_t tweaks[16 * LINE_BLOCKS * PAGE_LINES];
        tweaks_of_runs(standard, tweaks, bases + 16 * whole, powers + whole, LINE_BLOCKS, rest);
        xex_blocks(schedule, out + CSVF_LINE_BYTES * whole, in + CSVF_LINE_BYTES * whole, tweaks, LINE_BLOCKS * rest);
        csvf_wipe(tweaks, 16 * LINE_BLOCKS * rest);
    }
}

const csvf_sm4_kernel csvf__sm4_gfni_avx512 = {
    .name = "gfni-avx512",
    .features = CSVF_CPU_AVX2 | CSVF_CPU_BMI2 | CSVF_CPU_GFNI | CSVF_CPU_AVX512,
    .expand = expand,
    .ecb = ecb,
    .ctr = ctr,
    .xts = xts,
    .xex = xex,
    .tweaks = tweaks_of_runs,
    .lines = lines,
};

#include "../target_end.h"
#endif
