/* The AVX2 SM4 kernels, once for every S-box. Internal; included by sm4_gfni_avx2.c and sm4_aesni_avx2.c, which define before:
 *   invert, substitute   byte-sliced S-box in two steps, the second with the two matrices of the linear layer; one of them adds the round
 *                        key (round_key, round_key_of, round_constants); INVERT_APART = 1 if they are better done in two sweeps
 *   substitute_words     the same for the word-sliced path (WORD_VECTOR_256 or not), and the third matrix
 *   substitute_key       the S-box of the key schedule
 *   into_basis, out_of_basis, words_into_basis, words_out_of_basis
 *   fold, fold_of, fold_bytes    x^128 times a byte, for tweaks
 *   ROUND_CONSTANT, KEY_ROUND_CONSTANT
 *
 * Bulk: a group is 32 blocks in 16 vectors; vector (word, byte) holds that byte of all of them, so rotations by bytes are renaming.
 * One round of a group lasts longer than its instructions need, so up to four groups go through each pair of rounds in turn. Their
 * state lives in memory: sixteen registers hold what one pair of rounds needs and no more.
 *
 * Everything is static, one copy per kernel file, so no instruction set leaks into another. Scratch that held data or tweaks is wiped
 * once at the end of each call. Thread-safety: PURE. */

/* Before a loop whose count is a constant (n or less) once everything is inlined. */
#define PRAGMA_TEXT(text) _Pragma(#text)
#if defined(__clang__)
#define UNROLL(n) _Pragma("clang loop unroll(full)")
/* Without optimisation it is not done, which is no reason for a warning. */
#pragma clang diagnostic ignored "-Wpass-failed"
#else
#define UNROLL(n) PRAGMA_TEXT(GCC unroll n)
#endif

#define XOR(a, b) _mm256_xor_si256(a, b)
#define LOAD(p) _mm256_load_si256(p)
#define STORE(p, x) _mm256_store_si256(p, x)
/* Keeps the compiler from moving loads and stores of one group's rounds into another's, where they would spill. */
#define BARRIER() __asm__ volatile("" : : : "memory")

#include <string.h>

#include "sm4_avx2_schedule.h"
#include "sm4_avx2_tweak.h"
#include "sm4_avx2_words.h"

enum { GROUP_BLOCKS = 32, GROUPS = 4, BATCH_BLOCKS = GROUP_BLOCKS * GROUPS };

/* Scratch of one call. `used` and `padded` say what has to be wiped. */
typedef struct batch {
    __m256i state[GROUPS][16]; /* 4 (word modulo 4) + byte by weight */
    __m256i tweak[GROUPS][16]; /* byte in memory order */
    __m256i shared[GROUPS][4]; /* sum of two words, between the two rounds of a pair */
    __m256i inverted[GROUPS][4];
    __m256i stage[16];
    __m256i pad[GROUP_BLOCKS / 2];
} batch;

ALWAYS_INLINE void wipe_batch(batch *b, size_t groups, int tweaked)
{
    wipe_vectors(b->state, 16 * groups);
    if (tweaked)
        wipe_vectors(b->tweak, 16 * groups);
    wipe_vectors(b->shared, 8 * GROUPS + 32);
}

/* ---- Rounds --------------------------------------------------------------------------------------------------------------- */

ALWAYS_INLINE __m256i broadcast(uint32_t x) { return _mm256_set1_epi32((int)x); }

/* n = x0 + L(S), four byte vectors each, from what `invert` gave; stored over x0. */
ALWAYS_INLINE void linear_layer(__m256i n[4], __m256i *x0, const __m256i y[4], const round_key key[4])
{
    __m256i u[4], w[4];
    substitute(y[0], key[3], u, w);
    substitute(y[1], key[2], u + 1, w + 1);
    w[0] = XOR(w[0], u[1]);
    substitute(y[2], key[1], u + 2, w + 2);
    w[1] = XOR(w[1], u[2]);
    substitute(y[3], key[0], u + 3, w + 3);
    w[2] = XOR(w[2], u[3]);
    w[3] = XOR(w[3], u[0]);
    const __m256i p = XOR(w[0], w[1]), q = XOR(w[2], w[3]);
    n[0] = XOR(XOR(w[1], LOAD(x0)), q);
    n[1] = XOR(XOR(w[0], LOAD(x0 + 1)), q);
    n[2] = XOR(XOR(w[3], LOAD(x0 + 2)), p);
    n[3] = XOR(XOR(w[2], LOAD(x0 + 3)), p);
    UNROLL(4)
    for (int b = 0; b < 4; b++)
        STORE(x0 + b, n[b]);
}

ALWAYS_INLINE void load_round_keys(round_key key[4], const uint32_t *words)
{
    UNROLL(4)
    for (int b = 0; b < 4; b++)
        key[b] = round_key_of(words[b]);
}

/* Two rounds of one group, in registers: the second one's argument shares x2 + x3 with the first one's. For one or two groups. */
ALWAYS_INLINE void pair_of_rounds_near(__m256i *state, int x0, const uint32_t *words)
{
    const int x1 = (x0 + 4) % 16, x2 = (x0 + 8) % 16, x3 = (x0 + 12) % 16;
    __m256i shared[4], y[4], n[4];
    round_key key[4];
    load_round_keys(key, words);
    UNROLL(4)
    for (int b = 0; b < 4; b++) {
        shared[b] = XOR(LOAD(state + x2 + b), LOAD(state + x3 + b));
        y[b] = invert(XOR(shared[b], LOAD(state + x1 + b)), key[3 - b]);
    }
    linear_layer(n, state + x0, y, key);
    load_round_keys(key, words + 4);
    UNROLL(4)
    for (int b = 0; b < 4; b++)
        y[b] = invert(XOR(shared[b], n[b]), key[3 - b]);
    linear_layer(n, state + x1, y, key);
    BARRIER();
}

/* S-box and linear layer of one round for every group; with INVERT_APART in two sweeps. */
ALWAYS_INLINE void finish_round(batch *b, const size_t groups, size_t g, int x0, __m256i z[4], const round_key key[4])
{
    __m256i n[4];
    UNROLL(4)
    for (int i = 0; i < 4; i++)
        z[i] = invert(z[i], key[3 - i]);
    if (!INVERT_APART) {
        linear_layer(n, b->state[g] + x0, z, key);
    } else {
        UNROLL(4)
        for (int i = 0; i < 4; i++)
            STORE(b->inverted[g] + i, z[i]);
        if (g + 1 == groups) {
            UNROLL(4)
            for (size_t h = 0; h < groups; h++) {
                BARRIER();
                linear_layer(n, b->state[h] + x0, b->inverted[h], key);
            }
        }
    }
    BARRIER();
}

/* The same two rounds for more groups, one round of every group and then the next: independent work has to be near enough for the
 * CPU's scheduler to see it, which a pair of rounds, or with AES-NI even one round, is too long for. */
ALWAYS_INLINE void pair_of_rounds_far(batch *b, const size_t groups, int x0, const uint32_t *words)
{
    const int x1 = (x0 + 4) % 16, x2 = (x0 + 8) % 16, x3 = (x0 + 12) % 16;
    __m256i z[4];
    round_key key[4];
    load_round_keys(key, words);
    UNROLL(4)
    for (size_t g = 0; g < groups; g++) {
        const __m256i *state = b->state[g];
        UNROLL(4)
        for (int i = 0; i < 4; i++) {
            z[i] = XOR(LOAD(state + x2 + i), LOAD(state + x3 + i));
            STORE(b->shared[g] + i, z[i]);
            z[i] = XOR(z[i], LOAD(state + x1 + i));
        }
        finish_round(b, groups, g, x0, z, key);
    }
    load_round_keys(key, words + 4);
    UNROLL(4)
    for (size_t g = 0; g < groups; g++) {
        UNROLL(4)
        for (int i = 0; i < 4; i++)
            z[i] = XOR(LOAD(b->shared[g] + i), LOAD(b->state[g] + x0 + i));
        finish_round(b, groups, g, x1, z, key);
    }
}

static __attribute__((noinline)) void rounds(const csvf_sm4_schedule *schedule, batch *b, size_t groups)
{
    const uint32_t *words = schedule->words + SLICED_KEYS;
    for (const uint32_t *end = words + 128; words != end; words += 16) {
        if (groups == 4) {
            pair_of_rounds_far(b, 4, 0, words);
            pair_of_rounds_far(b, 4, 8, words + 8);
        } else if (groups == 3) {
            pair_of_rounds_far(b, 3, 0, words);
            pair_of_rounds_far(b, 3, 8, words + 8);
        } else {
            for (size_t g = 0; g < groups; g++)
                pair_of_rounds_near(b->state[g], 0, words);
            for (size_t g = 0; g < groups; g++)
                pair_of_rounds_near(b->state[g], 8, words + 8);
        }
    }
}

/* ---- Into and out of byte slices ------------------------------------------------------------------------------------------ */

/* Half of a 16 x 16 byte transposition in each lane: applied to vectors q, q + 4, q + 8, q + 12 for q = 0..3, its results being vectors
 * 4 q .. 4 q + 3, it is two of the four perfect shuffles that make one. */
ALWAYS_INLINE void shuffle_twice(__m256i x[4])
{
    const __m256i a = _mm256_unpacklo_epi8(x[0], x[2]), b = _mm256_unpackhi_epi8(x[0], x[2]);
    const __m256i c = _mm256_unpacklo_epi8(x[1], x[3]), d = _mm256_unpackhi_epi8(x[1], x[3]);
    x[0] = _mm256_unpacklo_epi8(a, c);
    x[1] = _mm256_unpackhi_epi8(a, c);
    x[2] = _mm256_unpacklo_epi8(b, d);
    x[3] = _mm256_unpackhi_epi8(b, d);
}

ALWAYS_INLINE __m256i load_blocks(const uint8_t *p, size_t vector)
{
    return _mm256_loadu_si256((const __m256i *)p + vector);
}

/* state = 32 blocks of `in`, plus `before` (32 blocks, NULL = 0), plus `tweak` (byte-sliced, NULL = 0). */
static __attribute__((noinline)) void load_group(const csvf_sm4_schedule *schedule, __m256i state[16], __m256i stage[16],
                                                 const uint8_t *in, const uint8_t *before, const __m256i *tweak)
{
    __m256i x[4];
    UNROLL(4)
    for (size_t q = 0; q < 4; q++) {
        UNROLL(4)
        for (size_t i = 0; i < 4; i++) {
            x[i] = load_blocks(in, q + 4 * i);
            if (before)
                x[i] = XOR(x[i], load_blocks(before, q + 4 * i));
        }
        shuffle_twice(x);
        UNROLL(4)
        for (size_t i = 0; i < 4; i++)
            STORE(stage + 4 * q + i, x[i]);
    }
    UNROLL(4)
    for (size_t q = 0; q < 4; q++) { /* word q */
        UNROLL(4)
        for (size_t i = 0; i < 4; i++)
            x[i] = LOAD(stage + q + 4 * i);
        shuffle_twice(x);
        UNROLL(4)
        for (size_t i = 0; i < 4; i++) { /* memory order i is weight 3 - i */
            if (tweak)
                x[i] = XOR(x[i], LOAD(tweak + 4 * q + i));
            x[i] = into_basis(x[i]);
            if (q == 3)
                x[i] = XOR(x[i], broadcast(schedule->words[KAPPA_IN + i]));
            STORE(state + 4 * q + 3 - i, x[i]);
        }
    }
}

/* 32 blocks of out = state, plus `after` (32 blocks, NULL = 0), plus `tweak` (byte-sliced, NULL = 0). */
static __attribute__((noinline)) void store_group(const csvf_sm4_schedule *schedule, uint8_t *out, const __m256i state[16],
                                                  __m256i stage[16], const uint8_t *after, const __m256i *tweak)
{
    __m256i x[4];
    UNROLL(4)
    for (size_t q = 0; q < 4; q++) {
        UNROLL(4)
        for (size_t i = 0; i < 4; i++) {
            /* byte q + 4 i of a block: word i, which is state word 35 - i, weight 3 - q */
            x[i] = out_of_basis(LOAD(state + 4 * (3 - i) + 3 - q));
            x[i] = XOR(x[i], broadcast(schedule->words[KAPPA_OUT + q + 4 * i]));
            if (tweak)
                x[i] = XOR(x[i], LOAD(tweak + q + 4 * i));
        }
        shuffle_twice(x);
        UNROLL(4)
        for (size_t i = 0; i < 4; i++)
            STORE(stage + 4 * q + i, x[i]);
    }
    UNROLL(4)
    for (size_t q = 0; q < 4; q++) {
        UNROLL(4)
        for (size_t i = 0; i < 4; i++)
            x[i] = LOAD(stage + q + 4 * i);
        shuffle_twice(x);
        UNROLL(4)
        for (size_t i = 0; i < 4; i++) {
            if (after)
                x[i] = XOR(x[i], load_blocks(after, 4 * q + i));
            _mm256_storeu_si256((__m256i *)out + 4 * q + i, x[i]);
        }
    }
}

/* The same for a group of which only `blocks` exist. */
static __attribute__((noinline)) void load_part(const csvf_sm4_schedule *schedule, batch *b, size_t slot, const uint8_t *in,
                                                const uint8_t *before, const __m256i *tweak, size_t blocks)
{
    uint8_t *pad = (uint8_t *)b->pad;
    for (size_t i = 0; i < blocks; i++) {
        __m128i x = _mm_loadu_si128((const __m128i *)in + i);
        if (before)
            x = _mm_xor_si128(x, _mm_loadu_si128((const __m128i *)before + i));
        _mm_store_si128((__m128i *)pad + i, x);
    }
    memset(pad + 16 * blocks, 0, 16 * (GROUP_BLOCKS - blocks));
    load_group(schedule, b->state[slot], b->stage, pad, NULL, tweak);
}

static __attribute__((noinline)) void store_part(const csvf_sm4_schedule *schedule, uint8_t *out, batch *b, size_t slot,
                                                 const uint8_t *after, const __m256i *tweak, size_t blocks)
{
    uint8_t *pad = (uint8_t *)b->pad;
    store_group(schedule, pad, b->state[slot], b->stage, NULL, tweak);
    for (size_t i = 0; i < blocks; i++) {
        __m128i x = _mm_load_si128((const __m128i *)pad + i);
        if (after)
            x = _mm_xor_si128(x, _mm_loadu_si128((const __m128i *)after + i));
        _mm_storeu_si128((__m128i *)out + i, x);
    }
}

/* ---- The kernel's functions ----------------------------------------------------------------------------------------------- */

/* Blocks of the next batch: whole groups, and a part of one only if that is cheaper than the word-sliced path. */
ALWAYS_INLINE size_t batch_of(size_t blocks)
{
    if (blocks >= BATCH_BLOCKS)
        return BATCH_BLOCKS;
    return blocks % GROUP_BLOCKS <= WORDS_MAX ? blocks / GROUP_BLOCKS * GROUP_BLOCKS : blocks;
}

/* out = E(in + tweaks) + tweaks; NULL tweaks = 0. */
static void cipher(const csvf_sm4_schedule *schedule, uint8_t *out, const uint8_t *in, const uint8_t *tweaks, size_t blocks)
{
    if (blocks > WORDS_MAX) {
        batch b;
        size_t most = 0;
        while (blocks > WORDS_MAX) {
            const size_t now = batch_of(blocks), groups = (now + GROUP_BLOCKS - 1) / GROUP_BLOCKS;
            for (size_t g = 0; g < groups; g++) {
                const size_t at = g * GROUP_BLOCKS;
                const uint8_t *mask = tweaks ? tweaks + 16 * at : NULL;
                if (now - at >= GROUP_BLOCKS)
                    load_group(schedule, b.state[g], b.stage, in + 16 * at, mask, NULL);
                else
                    load_part(schedule, &b, g, in + 16 * at, mask, NULL, now - at);
            }
            rounds(schedule, &b, groups);
            for (size_t g = 0; g < groups; g++) {
                const size_t at = g * GROUP_BLOCKS;
                const uint8_t *mask = tweaks ? tweaks + 16 * at : NULL;
                if (now - at >= GROUP_BLOCKS)
                    store_group(schedule, out + 16 * at, b.state[g], b.stage, mask, NULL);
                else
                    store_part(schedule, out + 16 * at, &b, g, mask, NULL, now - at);
            }
            most = groups > most ? groups : most;
            in += 16 * now;
            out += 16 * now;
            tweaks = tweaks ? tweaks + 16 * now : NULL;
            blocks -= now;
        }
        wipe_batch(&b, most, 0);
    }
    if (blocks)
        words_cipher(schedule, out, in, tweaks, tweaks, blocks);
}

static void ecb(const csvf_sm4_schedule *schedule, uint8_t *out, const uint8_t *in, size_t blocks)
{
    cipher(schedule, out, in, NULL, blocks);
}

static void xex(const csvf_sm4_schedule *schedule, uint8_t *out, const uint8_t *in, const uint8_t *tweaks, size_t blocks)
{
    cipher(schedule, out, in, tweaks, blocks);
}

/* One part of a run in a batch. */
typedef struct part {
    uint8_t *out;
    const uint8_t *in;
    size_t blocks;
} part;

static void xts_batch(const csvf_sm4_schedule *schedule, batch *b, const part *parts, size_t groups)
{
    for (size_t g = 0; g < groups; g++) {
        if (parts[g].blocks == GROUP_BLOCKS)
            load_group(schedule, b->state[g], b->stage, parts[g].in, NULL, b->tweak[g]);
        else
            load_part(schedule, b, g, parts[g].in, NULL, b->tweak[g], parts[g].blocks);
    }
    /* Lines to be written come into the cache during the rounds; where the input stands they are there already. */
    for (size_t g = 0; g < groups; g++)
        if (parts[g].out != parts[g].in)
            for (size_t i = 0; i < parts[g].blocks; i += 4)
                __builtin_prefetch(parts[g].out + 16 * i, 1);
    rounds(schedule, b, groups);
    for (size_t g = 0; g < groups; g++) {
        if (parts[g].blocks == GROUP_BLOCKS)
            store_group(schedule, parts[g].out, b->state[g], b->stage, NULL, b->tweak[g]);
        else
            store_part(schedule, parts[g].out, b, g, NULL, b->tweak[g], parts[g].blocks);
    }
}

/* Runs shorter than a group: their tweaks as plain blocks, many runs to a batch. */
static void xts_short(const csvf_sm4_schedule *schedule, int standard, uint8_t *out, const uint8_t *in, const uint8_t *bases,
                      size_t run_blocks, size_t runs)
{
    __m256i tweak[BATCH_BLOCKS / 2];
    const size_t most = BATCH_BLOCKS / run_blocks;
    while (runs) {
        const size_t now = runs < most ? runs : most, bytes = 16 * now * run_blocks;
        tweaks(standard, (uint8_t *)tweak, bases, NULL, run_blocks, now);
        cipher(schedule, out, in, (const uint8_t *)tweak, now * run_blocks);
        out += bytes;
        in += bytes;
        bases += 16 * now;
        runs -= now;
    }
    wipe_vectors(tweak, BATCH_BLOCKS / 2);
}

/* Tweaks that the compiler keeps in stack slots of sliced_tweaks (sixteen registers are too few): this frame stands where that one stood. */
static __attribute__((noinline)) void burn_stack(void)
{
    __m256i below[16];
    wipe_vectors(below, 16);
}

static void xts(const csvf_sm4_schedule *schedule, int standard, uint8_t *out, const uint8_t *in, const uint8_t *bases,
                size_t run_blocks, size_t runs)
{
    if (run_blocks == 0 || runs == 0)
        return;
    if (run_blocks < GROUP_BLOCKS) {
        xts_short(schedule, standard, out, in, bases, run_blocks, runs);
        return;
    }
    batch b;
    part parts[GROUPS] = { { NULL, NULL, 0 } };
    size_t slot = 0, most = 0;
    for (size_t r = 0; r < runs; r++) {
        for (size_t at = 0; at < run_blocks; at += GROUP_BLOCKS) {
            if (at == 0)
                sliced_tweaks(standard, b.tweak[slot], bases + 16 * r);
            else
                sliced_tweaks_next(standard, b.tweak[slot], b.tweak[(slot + GROUPS - 1) % GROUPS]);
            const size_t left = run_blocks - at, blocks = left < GROUP_BLOCKS ? left : GROUP_BLOCKS;
            parts[slot++] = (part){ out, in, blocks };
            out += 16 * blocks;
            in += 16 * blocks;
            most = slot > most ? slot : most;
            if (slot == GROUPS) {
                xts_batch(schedule, &b, parts, GROUPS);
                slot = 0;
            }
        }
    }
    xts_batch(schedule, &b, parts, slot);
    wipe_batch(&b, most, 1);
    burn_stack();
}

/* ---- Counter mode --------------------------------------------------------------------------------------------------------- */

/* A 128-bit counter as two numbers. */
typedef struct counter_value {
    uint64_t high, low;
} counter_value;

ALWAYS_INLINE counter_value counter_plus(counter_value c, uint64_t n)
{
    const uint64_t low = c.low + n;
    return (counter_value){ c.high + (low < n), low };
}

ALWAYS_INLINE __m128i counter_bytes(counter_value c)
{
    return _mm_set_epi64x((long long)__builtin_bswap64(c.low), (long long)__builtin_bswap64(c.high));
}

/* state = 32 counter blocks from c on. Only the last byte differs from block to block, but for one carry into the rest: so the other
 * bytes are those of c or, under a mask, those of c + 256. No transposition is needed. */
static void load_counters(const csvf_sm4_schedule *schedule, __m256i state[16], counter_value c)
{
    const __m256i order = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 1, 3, 5, 7, 9, 11, 13,
                                           15, 17, 19, 21, 23, 25, 27, 29, 31);
    const __m128i bytes = counter_bytes(c), carried = counter_bytes(counter_plus(c, 256));
    const __m256i last = _mm256_add_epi8(_mm256_broadcastb_epi8(_mm_cvtsi32_si128((int)(c.low & 0xff))), order);
    const __m256i whole = _mm256_cmpeq_epi8(_mm256_min_epu8(last, order), order); /* no carry */
    uint8_t base[16] __attribute__((aligned(16))), change[16] __attribute__((aligned(16)));
    _mm_store_si128((__m128i *)base, into_basis_128(bytes));
    _mm_store_si128((__m128i *)change, into_basis_128(_mm_xor_si128(bytes, carried)));
    UNROLL(16)
    for (size_t k = 0; k < 16; k++) {
        __m256i x = k == 15 ? into_basis(last)
                            : XOR(_mm256_andnot_si256(whole, _mm256_set1_epi8((char)change[k])), _mm256_set1_epi8((char)base[k]));
        if (k >= 12)
            x = XOR(x, broadcast(schedule->words[KAPPA_IN + k - 12]));
        STORE(state + (k ^ 3), x);
    }
}

static void ctr(const csvf_sm4_schedule *schedule, uint8_t *out, const uint8_t *in, size_t blocks, uint8_t counter[16])
{
    uint64_t halves[2];
    memcpy(halves, counter, 16);
    counter_value c = { __builtin_bswap64(halves[0]), __builtin_bswap64(halves[1]) };
    if (blocks > WORDS_MAX) {
        batch b;
        size_t most = 0;
        while (blocks > WORDS_MAX) {
            const size_t now = batch_of(blocks), groups = (now + GROUP_BLOCKS - 1) / GROUP_BLOCKS;
            for (size_t g = 0; g < groups; g++)
                load_counters(schedule, b.state[g], counter_plus(c, g * GROUP_BLOCKS));
            rounds(schedule, &b, groups);
            for (size_t g = 0; g < groups; g++) {
                const size_t at = g * GROUP_BLOCKS;
                if (now - at >= GROUP_BLOCKS)
                    store_group(schedule, out + 16 * at, b.state[g], b.stage, in + 16 * at, NULL);
                else
                    store_part(schedule, out + 16 * at, &b, g, in + 16 * at, NULL, now - at);
            }
            most = groups > most ? groups : most;
            in += 16 * now;
            out += 16 * now;
            blocks -= now;
            c = counter_plus(c, now);
        }
        wipe_batch(&b, most, 0);
    }
    if (blocks) {
        __m128i counters[WORDS_MAX];
        for (size_t i = 0; i < blocks; i++)
            counters[i] = counter_bytes(counter_plus(c, i));
        words_cipher(schedule, out, (const uint8_t *)counters, NULL, in, blocks);
        c = counter_plus(c, blocks);
    }
    _mm_storeu_si128((__m128i *)counter, counter_bytes(c));
}
