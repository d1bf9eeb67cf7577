/* SM4 in portable C: constant time, bitsliced, 32 blocks at a time in 128-bit vectors of the compiler. Internal.
 *
 * A word of the state (one of SM4's four) is eight planes, one per bit of a byte. A plane is a vector of four 32-bit lanes,
 * one per byte of the word (lane 0 = most significant), and bit 8 q + n of a lane belongs to block 8 q + n of the group. So
 * one pass of the S-box circuit serves all four bytes of 32 blocks; a rotation by 8 turns the lanes, and a rotation by 2
 * renames the planes. That needs four times fewer blocks than one plane per bit of the word for about the same work per byte,
 * keeps the state (32 vectors) and the circuit's values close to the register file of SSE2 and NEON, and makes a single block
 * four times cheaper.
 *
 * SM4: GB/T 32907-2016. The S-box circuit: sm4_portable_sbox.h. */
#include <string.h>

#include "../include/csvfast.h"
#include "sm4_kernel.h"
#include "sm4_portable_sbox.h"
#include "sm4_tweak.h"

typedef uint32_t planes4 __attribute__((vector_size(16)));   /* one plane: four lanes */
typedef uint64_t pair64 __attribute__((vector_size(16)));
typedef uint8_t bytes16 __attribute__((vector_size(16)));

enum { GROUP = 32, GROUP_BYTES = 16 * GROUP, ROUNDS = 32 };

#define INLINE static inline __attribute__((always_inline))

/* Round key planes: [round][bit], each lane all ones or all zeros. */
typedef struct masks { planes4 round[ROUNDS][8]; } masks;

/* Lanes turned so that lane i holds what was in lane i + n: a rotation of the word to the left by 8 n bits. */
#define TURNED(n) (n), ((n) + 1) & 3, ((n) + 2) & 3, ((n) + 3) & 3
#define LOW_BYTES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_BYTES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#if defined(__clang__) || __GNUC__ >= 12
#  define TURN(x, n) __builtin_shufflevector(x, x, TURNED(n))
#  define UNPACK_LOW(a, b) (pair64) __builtin_shufflevector((bytes16)(a), (bytes16)(b), LOW_BYTES)
#  define UNPACK_HIGH(a, b) (pair64) __builtin_shufflevector((bytes16)(a), (bytes16)(b), HIGH_BYTES)
#else
#  define TURN(x, n) __builtin_shuffle(x, (planes4){ TURNED(n) })
#  define UNPACK_LOW(a, b) (pair64) __builtin_shuffle((bytes16)(a), (bytes16)(b), (bytes16){ LOW_BYTES })
#  define UNPACK_HIGH(a, b) (pair64) __builtin_shuffle((bytes16)(a), (bytes16)(b), (bytes16){ HIGH_BYTES })
#endif

/* ---- Key schedule ------------------------------------------------------------------------------------------------- */

static uint32_t load_be32(const uint8_t *p)
{
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

static uint32_t rotate_left(uint32_t x, int n) { return x << n | x >> (32 - n); }

/* The S-box on the four bytes of a word, without a table: the circuit on eight planes of four bits each. */
static uint32_t substitute(uint32_t x)
{
    const uint32_t low = 0x01010101u;
    uint32_t p[8], y[8];
    x ^= CSVF_SBOX_INPUT * low;
    for (int i = 0; i < 8; i++)
        p[i] = x >> i & low;
#define CSVF_SBOX_WORD uint32_t
    CSVF_SBOX(p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], y[0], y[1], y[2], y[3], y[4], y[5], y[6], y[7]);
#undef CSVF_SBOX_WORD
    uint32_t out = 0;
    for (int i = 0; i < 8; i++)
        out |= y[i] << i;
    return out ^ CSVF_SBOX_OUTPUT * low;
}

/* The circuit leaves out the S-box's constants; the round keys make up for both. Without the constant on its output every new
 * word of the state lacks L(OUTPUT in all bytes), and a word that has been replaced twice lacks nothing. Round r reads words
 * r + 1 .. r + 3, and word j has been replaced j / 4 times; after 32 rounds all have been replaced eight times. */
static uint32_t round_constant(int round)
{
    const uint32_t output = CSVF_SBOX_OUTPUT * 0x01010101u;
    const uint32_t missing = output ^ rotate_left(output, 2) ^ rotate_left(output, 10) ^ rotate_left(output, 18) ^
                             rotate_left(output, 24);
    uint32_t constant = CSVF_SBOX_INPUT * 0x01010101u;
    for (int j = round + 1; j <= round + 3; j++)
        constant ^= (uint32_t)-(j / 4 & 1) & missing;
    return constant;
}

static void expand(csvf_sm4_schedule *enc, csvf_sm4_schedule *dec, const uint8_t key[16])
{
    static const uint32_t family[4] = { 0xa3b1bac6u, 0x56aa3350u, 0x677d9197u, 0xb27022dcu };
    uint32_t k[4];
    for (int i = 0; i < 4; i++)
        k[i] = load_be32(key + 4 * i) ^ family[i];
    for (int r = 0; r < ROUNDS; r++) {
        uint32_t ck = 0;
        for (int j = 0; j < 4; j++)
            ck = ck << 8 | (uint32_t)((4 * r + j) * 7 & 255);
        const uint32_t t = substitute(k[(r + 1) & 3] ^ k[(r + 2) & 3] ^ k[(r + 3) & 3] ^ ck);
        const uint32_t word = k[r & 3] ^ t ^ rotate_left(t, 13) ^ rotate_left(t, 23);
        k[r & 3] = word;
        enc->words[r] = word ^ round_constant(r);
        if (dec)
            dec->words[ROUNDS - 1 - r] = word ^ round_constant(ROUNDS - 1 - r);
    }
    csvf_wipe(k, sizeof k);
}

static void spread_keys(masks *out, const csvf_sm4_schedule *schedule)
{
    for (int r = 0; r < ROUNDS; r++) {
        const uint32_t k = schedule->words[r];
        const planes4 bytes = { k >> 24, k >> 16, k >> 8, k };
        for (int i = 0; i < 8; i++)
            out->round[r][i] = (planes4)((bytes >> i & 1) == 1);
    }
}

/* ---- Transposition ------------------------------------------------------------------------------------------------ */

/* Exchanges the bits of `mask` in a with the bits of mask << n in b. */
#define SWAP_MOVE(a, b, mask, n)                 \
    do {                                         \
        const pair64 t_ = ((a >> n) ^ b) & mask; \
        b ^= t_;                                 \
        a ^= t_ << n;                            \
    } while (0)

/* 8 x 8 bits in every byte position: bit n of plane i <-> bit i of vector n. An involution. */
INLINE void transpose_bits(pair64 v[8])
{
    const pair64 m1 = { 0x5555555555555555u, 0x5555555555555555u };
    const pair64 m2 = { 0x3333333333333333u, 0x3333333333333333u };
    const pair64 m4 = { 0x0f0f0f0f0f0f0f0fu, 0x0f0f0f0f0f0f0f0fu };
    SWAP_MOVE(v[0], v[1], m1, 1);
    SWAP_MOVE(v[2], v[3], m1, 1);
    SWAP_MOVE(v[4], v[5], m1, 1);
    SWAP_MOVE(v[6], v[7], m1, 1);
    SWAP_MOVE(v[0], v[2], m2, 2);
    SWAP_MOVE(v[1], v[3], m2, 2);
    SWAP_MOVE(v[4], v[6], m2, 2);
    SWAP_MOVE(v[5], v[7], m2, 2);
    SWAP_MOVE(v[0], v[4], m4, 4);
    SWAP_MOVE(v[1], v[5], m4, 4);
    SWAP_MOVE(v[2], v[6], m4, 4);
    SWAP_MOVE(v[3], v[7], m4, 4);
}

INLINE pair64 load(const uint8_t *p)
{
    pair64 v;
    memcpy(&v, p, 16);
    return v;
}

/* 32 blocks to planes. Blocks n, n + 8, n + 16, n + 24 are first mixed so that vector n of a word has byte b of block n + 8 q
 * at 4 b + q. */
static void gather(planes4 state[4][8], const uint8_t in[GROUP_BYTES])
{
    pair64 v[4][8];
    for (int n = 0; n < 8; n++) {
        const pair64 a = load(in + 16 * n), b = load(in + 16 * n + 128), c = load(in + 16 * n + 256), d = load(in + 16 * n + 384);
        const pair64 ac0 = UNPACK_LOW(a, c), ac1 = UNPACK_HIGH(a, c), bd0 = UNPACK_LOW(b, d), bd1 = UNPACK_HIGH(b, d);
        v[0][n] = UNPACK_LOW(ac0, bd0);
        v[1][n] = UNPACK_HIGH(ac0, bd0);
        v[2][n] = UNPACK_LOW(ac1, bd1);
        v[3][n] = UNPACK_HIGH(ac1, bd1);
    }
    for (int w = 0; w < 4; w++) {
        transpose_bits(v[w]);
        memcpy(state[w], v[w], sizeof v[w]);
    }
}

/* Planes to 32 blocks, the words in reverse order as SM4 ends. */
static void scatter(uint8_t out[GROUP_BYTES], planes4 state[4][8])
{
    pair64 v[4][8];
    for (int w = 0; w < 4; w++) {
        memcpy(v[w], state[3 - w], sizeof v[w]);
        transpose_bits(v[w]);
    }
    for (int n = 0; n < 8; n++) {
        /* each unpack moves the top bit of a byte's place into the vector's number and the number's bit to the bottom */
        const pair64 p0 = UNPACK_LOW(v[0][n], v[2][n]), p1 = UNPACK_HIGH(v[0][n], v[2][n]);
        const pair64 p2 = UNPACK_LOW(v[1][n], v[3][n]), p3 = UNPACK_HIGH(v[1][n], v[3][n]);
        const pair64 q00 = UNPACK_LOW(p0, p2), q01 = UNPACK_HIGH(p0, p2), q10 = UNPACK_LOW(p1, p3), q11 = UNPACK_HIGH(p1, p3);
        const pair64 r00 = UNPACK_LOW(q00, q10), r10 = UNPACK_HIGH(q00, q10);
        const pair64 r01 = UNPACK_LOW(q01, q11), r11 = UNPACK_HIGH(q01, q11);
        const pair64 a = UNPACK_LOW(r00, r01), b = UNPACK_HIGH(r00, r01), c = UNPACK_LOW(r10, r11), d = UNPACK_HIGH(r10, r11);
        memcpy(out + 16 * n, &a, 16);
        memcpy(out + 16 * n + 128, &b, 16);
        memcpy(out + 16 * n + 256, &c, 16);
        memcpy(out + 16 * n + 384, &d, 16);
    }
}

/* ---- Rounds ------------------------------------------------------------------------------------------------------- */

/* a ^= L(S(b ^ c ^ d ^ key)) with L(B) = B ^ B<<<2 ^ B<<<10 ^ B<<<18 ^ B<<<24. With w = B ^ B<<<24 and
 * v = B ^ w<<<16 = B ^ B<<<8 ^ B<<<16 it is L(B) = w ^ v<<<2. */
INLINE void one_round(planes4 a[8], const planes4 b[8], const planes4 c[8], const planes4 d[8], const planes4 key[8])
{
    planes4 y[8];
/* d is the newest word: one operation after it */
#define IN(i) const planes4 x##i = b[i] ^ c[i] ^ key[i] ^ d[i]
    IN(0); IN(1); IN(2); IN(3); IN(4); IN(5); IN(6); IN(7);
#undef IN
#define CSVF_SBOX_WORD planes4
    CSVF_SBOX(x0, x1, x2, x3, x4, x5, x6, x7, y[0], y[1], y[2], y[3], y[4], y[5], y[6], y[7]);
#undef CSVF_SBOX_WORD
#define OUT(i, n, turn)                         \
    do {                                        \
        const planes4 w = y[i] ^ TURN(y[i], 3); \
        const planes4 v = y[i] ^ TURN(w, 2);    \
        a[i] ^= w;                              \
        a[n] ^= turn(v);                        \
    } while (0)
#define WRAPS(x) TURN(x, 1)
#define STAYS(x) x
    /* a rotation by 2 moves plane i to i + 2; the top two planes pass into the next byte */
    OUT(0, 2, STAYS); OUT(1, 3, STAYS); OUT(2, 4, STAYS); OUT(3, 5, STAYS);
    OUT(4, 6, STAYS); OUT(5, 7, STAYS); OUT(6, 0, WRAPS); OUT(7, 1, WRAPS);
#undef OUT
#undef WRAPS
#undef STAYS
}

static void rounds(planes4 state[4][8], const masks *keys)
{
    for (int r = 0; r < ROUNDS; r += 4) {
        one_round(state[0], state[1], state[2], state[3], keys->round[r]);
        one_round(state[1], state[2], state[3], state[0], keys->round[r + 1]);
        one_round(state[2], state[3], state[0], state[1], keys->round[r + 2]);
        one_round(state[3], state[0], state[1], state[2], keys->round[r + 3]);
    }
}

/* ---- The kernel's functions --------------------------------------------------------------------------------------- */

/* Everything of a call that holds secrets, wiped at its end. */
typedef struct scratch {
    masks keys;
    planes4 state[4][8];
    uint8_t blocks[GROUP_BYTES];
    uint8_t tweaks[GROUP_BYTES];
} scratch;

static void group(scratch *s, uint8_t out[GROUP_BYTES], const uint8_t in[GROUP_BYTES])
{
    gather(s->state, in);
    rounds(s->state, &s->keys);
    scatter(out, s->state);
}

static void exclusive_or(uint8_t *out, const uint8_t *a, const uint8_t *b, size_t blocks)
{
    for (size_t i = 0; i < blocks; i++) {
        const pair64 v = load(a + 16 * i) ^ load(b + 16 * i);
        memcpy(out + 16 * i, &v, 16);
    }
}

static void ecb(const csvf_sm4_schedule *schedule, uint8_t *out, const uint8_t *in, size_t blocks)
{
    if (blocks == 0)
        return;
    scratch s;
    spread_keys(&s.keys, schedule);
    for (; blocks >= GROUP; blocks -= GROUP, in += GROUP_BYTES, out += GROUP_BYTES)
        group(&s, out, in);
    if (blocks) {
        memset(s.blocks, 0, GROUP_BYTES);
        memcpy(s.blocks, in, 16 * blocks);
        group(&s, s.blocks, s.blocks);
        memcpy(out, s.blocks, 16 * blocks);
    }
    csvf_wipe(&s, sizeof s);
}

static void put_be64(uint8_t *p, uint64_t x)
{
    for (int i = 0; i < 8; i++)
        p[i] = (uint8_t)(x >> (56 - 8 * i));
}

static void ctr(const csvf_sm4_schedule *schedule, uint8_t *out, const uint8_t *in, size_t blocks, uint8_t counter[16])
{
    if (blocks == 0)
        return;
    scratch s;
    uint64_t high = (uint64_t)load_be32(counter) << 32 | load_be32(counter + 4);
    uint64_t low = (uint64_t)load_be32(counter + 8) << 32 | load_be32(counter + 12);
    spread_keys(&s.keys, schedule);
    while (blocks) {
        const size_t count = blocks < GROUP ? blocks : GROUP;
        for (size_t i = 0; i < GROUP; i++) {
            /* counters are public; those past the end of the data are computed but not used */
            const uint64_t sum = low + i;
            put_be64(s.blocks + 16 * i, high + (sum < low));
            put_be64(s.blocks + 16 * i + 8, sum);
        }
        group(&s, s.blocks, s.blocks);
        exclusive_or(out, in, s.blocks, count);
        low += count;
        high += low < count;
        out += 16 * count;
        in += 16 * count;
        blocks -= count;
    }
    put_be64(counter, high);
    put_be64(counter + 8, low);
    csvf_wipe(&s, sizeof s);
}

/* One group or less: out = E(in ^ tweaks) ^ tweaks. */
static void xex_group(scratch *s, uint8_t *out, const uint8_t *in, const uint8_t *tweaks, size_t blocks)
{
    exclusive_or(s->blocks, in, tweaks, blocks);
    if (blocks < GROUP)
        memset(s->blocks + 16 * blocks, 0, GROUP_BYTES - 16 * blocks);
    group(s, s->blocks, s->blocks);
    exclusive_or(out, s->blocks, tweaks, blocks);
}

static void xex(const csvf_sm4_schedule *schedule, uint8_t *out, const uint8_t *in, const uint8_t *tweaks, size_t blocks)
{
    if (blocks == 0)
        return;
    scratch s;
    spread_keys(&s.keys, schedule);
    while (blocks) {
        const size_t count = blocks < GROUP ? blocks : GROUP;
        xex_group(&s, out, in, tweaks, count);
        out += 16 * count;
        in += 16 * count;
        tweaks += 16 * count;
        blocks -= count;
    }
    csvf_wipe(&s, sizeof s);
}

/* Groups run across the ends of runs, so that short runs fill them too. */
static void xts(const csvf_sm4_schedule *schedule, int standard, uint8_t *out, const uint8_t *in, const uint8_t *tweaks,
                size_t run_blocks, size_t runs)
{
    if (runs == 0 || run_blocks == 0)
        return;
    scratch s;
    spread_keys(&s.keys, schedule);
    size_t filled = 0;
    for (size_t r = 0; r < runs; r++) {
        uint8_t next[16];
        memcpy(next, tweaks + 16 * r, 16);
        for (size_t done = 0; done < run_blocks;) {
            const size_t room = GROUP - filled, left = run_blocks - done, count = left < room ? left : room;
            csvf__sm4_tweak_run(standard, s.tweaks + 16 * filled, next, count);
            done += count;
            filled += count;
            if (filled == GROUP) {
                xex_group(&s, out, in, s.tweaks, GROUP);
                out += GROUP_BYTES;
                in += GROUP_BYTES;
                filled = 0;
            }
        }
        csvf_wipe(next, sizeof next);
    }
    if (filled)
        xex_group(&s, out, in, s.tweaks, filled);
    csvf_wipe(&s, sizeof s);
}

const csvf_sm4_kernel csvf__sm4_portable = { "portable", 0, expand, ecb, ctr, xts, xex, csvf__sm4_tweaks_portable, NULL };
