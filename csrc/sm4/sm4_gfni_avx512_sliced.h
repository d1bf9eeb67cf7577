/* Byte-sliced SM4 with GFNI and AVX-512: included by sm4_gfni_avx512.c only.
 *
 * A group is 64 blocks in 16 registers: register k holds byte k of every block (byte order of memory). Inside a register, byte 8 h + m of
 * 128-bit lane l belongs to block 8 m + 4 h + l: what four unpack stages make of rows loaded in the order 0 2 4 .. 14 1 3 .. 15.
 *
 * Slicing turns the rotations by whole bytes into a choice of registers and leaves 22 instructions for a round of 64 blocks:
 * 4 + 4 + 4 three-way xors, 8 gf2p8affineinvqb (S-box output with the linear layer folded in), 2 xors. State bytes are kept as P x + kappa
 * (tools/sm4_tables.py), so that the sum of three words is already the argument of the inversion.
 *
 * Two groups run together. One lives wholly in registers; of the other only its two newest words do, the older two are
 * read from memory, so that a round of both costs 8 loads and 4 stores of state. (Four groups with all words in memory cost 12 loads
 * and 4 stores each, which is more than the load ports give; one group alone is bound by latency.) */
#ifndef CSVF_SM4_GFNI_AVX512_SLICED_H
#define CSVF_SM4_GFNI_AVX512_SLICED_H

#define GROUP_BLOCKS 64u
#define GROUP_BYTES 1024u
#define AHEAD 4096u /* how far the rounds of a pair prefetch in front of their input, in bytes */

typedef struct group {
    V state[16];
    V tweak[16];
} group;

/* Which block of its group each byte of a register belongs to. */
#define BLOCKS_OF_LANE(l)                                                                                                       \
    l, l + 8, l + 16, l + 24, l + 32, l + 40, l + 48, l + 56, l + 4, l + 12, l + 20, l + 28, l + 36, l + 44, l + 52, l + 60
static const uint8_t block_of_byte[64] __attribute__((aligned(64))) = {BLOCKS_OF_LANE(0), BLOCKS_OF_LANE(1), BLOCKS_OF_LANE(2),
                                                                       BLOCKS_OF_LANE(3)};

/* Keeps values in memory between rounds: without it the compilers hold more in registers than there are, and spill. */
#define KEEP_IN_MEMORY() __asm__ volatile("" ::: "memory")

#define UNPACK_STAGE(to, from)                                                                                                  \
    do {                                                                                                                        \
        UNPACK_PAIR(to, from, 0) UNPACK_PAIR(to, from, 1) UNPACK_PAIR(to, from, 2) UNPACK_PAIR(to, from, 3)                     \
        UNPACK_PAIR(to, from, 4) UNPACK_PAIR(to, from, 5) UNPACK_PAIR(to, from, 6) UNPACK_PAIR(to, from, 7)                     \
    } while (0)
#define UNPACK_PAIR(to, from, k)                                                                                                \
    to[2 * k] = _mm512_unpacklo_epi8(from[k], from[k + 8]);                                                                     \
    to[2 * k + 1] = _mm512_unpackhi_epi8(from[k], from[k + 8]);

/* 16 x 16 bytes in every 128-bit lane; its own inverse. */
INLINE void transpose(V a[16])
{
    V t[16];
    UNPACK_STAGE(t, a);
    UNPACK_STAGE(a, t);
    UNPACK_STAGE(t, a);
    UNPACK_STAGE(a, t);
}

/* Which register row `i` (blocks 4 i .. 4 i + 3) is loaded into. */
#define ROW_REGISTER(i) (8 * ((i) & 1) + ((i) >> 1))

INLINE V load_row(const uint8_t *in, size_t blocks, size_t i)
{
    return blocks == GROUP_BLOCKS ? LOADU(in + 64 * i) : _mm512_maskz_loadu_epi32(row_mask(blocks, i), in + 64 * i);
}

INLINE void store_row(uint8_t *out, size_t blocks, size_t i, V x)
{
    if (blocks == GROUP_BLOCKS)
        _mm512_storeu_si512(out + 64 * i, x);
    else
        _mm512_mask_storeu_epi32(out + 64 * i, row_mask(blocks, i), x);
}

/* state = blocks of `in`, xor sliced tweaks (NULL = none), xor unsliced 16-byte tweaks (NULL = none), in the state's basis.
 * Blocks that do not exist (blocks < 64) are zero. */
INLINE void load_group(const csvf_sm4_schedule *schedule, V state[16], const uint8_t *in, size_t blocks, const V *sliced,
                       const uint8_t *unsliced)
{
    const V p = MATRIX(CSVF_SM4_P);
    V a[16];
    UNROLL for (int i = 0; i < 16; i++) {
        V x = load_row(in, blocks, (size_t)i);
        a[ROW_REGISTER(i)] = unsliced ? XOR(x, load_row(unsliced, blocks, (size_t)i)) : x;
    }
    transpose(a);
    UNROLL for (int k = 0; k < 16; k++) {
        V x = AFFINE(sliced ? XOR(a[k], sliced[k]) : a[k], p);
        state[k] = k < 12 ? x : XOR(x, BROADCAST(schedule->words[KEY_IN + k - 12]));
    }
}

/* The inverse, words in reverse order as SM4 ends; then out ^= unsliced. */
INLINE void store_group(const csvf_sm4_schedule *schedule, uint8_t *out, const V state[16], size_t blocks, const V *sliced,
                        const uint8_t *unsliced)
{
    const V p_inverse = MATRIX(CSVF_SM4_P_INVERSE);
    const uint32_t *key_out = schedule->words + KEY_OUT;
    V a[16];
    UNROLL for (int k = 0; k < 16; k++) {
        V x = AFFINE(state[12 - 4 * (k / 4) + k % 4], p_inverse);
        a[k] = sliced ? XOR3(x, sliced[k], BROADCAST(key_out[k])) : XOR(x, BROADCAST(key_out[k]));
    }
    transpose(a);
    UNROLL for (int i = 0; i < 16; i++) {
        V x = a[ROW_REGISTER(i)];
        store_row(out, blocks, (size_t)i, unsliced ? XOR(x, load_row(unsliced, blocks, (size_t)i)) : x);
    }
}

/* One round of one group. s[i] is the sum of what inverted bytes i and i - 1 give to the other bytes: the new byte is the old one plus the three
 * s of other index. X0 may name memory; the new word is left in F0..F3. Order matters: it keeps six temporaries alive at most. */
#define ROUND(F0, F1, F2, F3, X00, X01, X02, X03, Z0, Z1, Z2, Z3, d)                                                            \
    do {                                                                                                                        \
        V z_ = (Z3), u3_ = INVERT(z_, u), s3_ = INVERT(z_, w);                                                                  \
        z_ = (Z0);                                                                                                              \
        V s0_ = XOR3(INVERT(z_, w), u3_, BROADCAST((d)[0]));                                                                    \
        V u0_ = INVERT(z_, u);                                                                                                  \
        z_ = (Z1);                                                                                                              \
        V s1_ = XOR3(INVERT(z_, w), u0_, BROADCAST((d)[1]));                                                                    \
        V u1_ = INVERT(z_, u);                                                                                                  \
        z_ = (Z2);                                                                                                              \
        V s2_ = XOR3(INVERT(z_, w), u1_, BROADCAST((d)[2]));                                                                    \
        V u2_ = INVERT(z_, u);                                                                                                  \
        V p_ = XOR(s0_, s1_);                                                                                                   \
        s3_ = XOR3(s3_, u2_, BROADCAST((d)[3]));                                                                                \
        F2 = XOR3(X02, s3_, p_);                                                                                                \
        F3 = XOR3(X03, s2_, p_);                                                                                                \
        V q_ = XOR(s2_, s3_);                                                                                                   \
        F0 = XOR3(X00, s1_, q_);                                                                                                \
        F1 = XOR3(X01, s0_, q_);                                                                                                \
    } while (0)

/* Round r (modulo 4) of a group held in registers x[0..15]. */
#define ROUND_REGISTERS(x, r, d)                                                                                                \
    ROUND(x[4 * (r)], x[4 * (r) + 1], x[4 * (r) + 2], x[4 * (r) + 3], x[4 * (r)], x[4 * (r) + 1], x[4 * (r) + 2], x[4 * (r) + 3],   \
          SUM_OTHERS(x, r, 0), SUM_OTHERS(x, r, 1), SUM_OTHERS(x, r, 2), SUM_OTHERS(x, r, 3), d)
#define SUM_OTHERS(x, r, m) XOR3(x[4 * (((r) + 1) & 3) + (m)], x[4 * (((r) + 2) & 3) + (m)], x[4 * (((r) + 3) & 3) + (m)])

/* Round r of a group in memory s[0..15] whose newest word is also in n[0..3] and the one before in o[0..3]. Leaves the new word in o. */
#define ROUND_MEMORY(s, n, o, r, d)                                                                                             \
    do {                                                                                                                        \
        V z0_ = XOR3(n[0], o[0], s[4 * (((r) + 1) & 3)]), z1_ = XOR3(n[1], o[1], s[4 * (((r) + 1) & 3) + 1]);                   \
        V z2_ = XOR3(n[2], o[2], s[4 * (((r) + 1) & 3) + 2]), z3_ = XOR3(n[3], o[3], s[4 * (((r) + 1) & 3) + 3]);               \
        ROUND(o[0], o[1], o[2], o[3], s[4 * (r)], s[4 * (r) + 1], s[4 * (r) + 2], s[4 * (r) + 3], z0_, z1_, z2_, z3_, d);       \
        s[4 * (r)] = o[0], s[4 * (r) + 1] = o[1], s[4 * (r) + 2] = o[2], s[4 * (r) + 3] = o[3];                                 \
        KEEP_IN_MEMORY();                                                                                                       \
    } while (0)

/* All rounds of one group. */
NOINLINE void rounds_of_one(const csvf_sm4_schedule *schedule, V state[16])
{
    const V u = MATRIX(CSVF_SM4_U), w = MATRIX(CSVF_SM4_W);
    V x[16];
    UNROLL for (int k = 0; k < 16; k++) x[k] = state[k];
    for (const uint32_t *d = schedule->words + KEY_SLICED; d < schedule->words + KEY_SLICED + 128; d += 16) {
        ROUND_REGISTERS(x, 0, d);
        ROUND_REGISTERS(x, 1, d + 4);
        ROUND_REGISTERS(x, 2, d + 8);
        ROUND_REGISTERS(x, 3, d + 12);
    }
    UNROLL for (int k = 0; k < 16; k++) state[k] = x[k];
}

/* All rounds of two groups; prefetches 2 KiB from `next` on, 64 bytes in every round. */
NOINLINE void rounds_of_two(const csvf_sm4_schedule *schedule, V first[16], V second[16], uintptr_t next)
{
    const V u = MATRIX(CSVF_SM4_U), w = MATRIX(CSVF_SM4_W);
    V x[16], n[4], o[4];
    UNROLL for (int k = 0; k < 16; k++) x[k] = first[k];
    UNROLL for (int k = 0; k < 4; k++) n[k] = second[12 + k], o[k] = second[8 + k];
    for (const uint32_t *d = schedule->words + KEY_SLICED; d < schedule->words + KEY_SLICED + 128; d += 16, next += 256) {
#define ROUND_OF_TWO(r, newest, older)                                                                                          \
    ROUND_REGISTERS(x, r, d + 4 * (r));                                                                                         \
    ROUND_MEMORY(second, newest, older, r, d + 4 * (r));                                                                        \
    _mm_prefetch((const char *)(next + 64 * (r)), _MM_HINT_T0);
        ROUND_OF_TWO(0, n, o)
        ROUND_OF_TWO(1, o, n)
        ROUND_OF_TWO(2, n, o)
        ROUND_OF_TWO(3, o, n)
    }
    UNROLL for (int k = 0; k < 16; k++) first[k] = x[k];
}

/* Tweaks of 64 consecutive blocks from the first one: T x^(8 m) by a byte gather (m = place in the register), then x^s by matrices that differ per
 * 64-bit element (s = 4 h + l). */
INLINE void first_tweaks(const tweak_matrices *m, V t[16], const uint8_t base[16])
{
    const V x = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)base));
    const V low = AFFINE(x, m->fold_low), high = AFFINE(x, m->fold_high);
    const V fold = XOR(low, _mm512_bslli_epi128(high, 1));
    const V head = XOR(x, _mm512_bsrli_epi128(high, 15));
    V table = _mm512_mask_blend_epi64(0x0c, x, fold); /* T | G | L | Z of gather_columns */
    table = _mm512_mask_blend_epi64(0x30, table, low);
    table = _mm512_mask_blend_epi64(0xc0, table, head);
    const V order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    const V left = _mm512_permutexvar_epi64(order, _mm512_load_si512(m->shift_left));
    const V over = _mm512_permutexvar_epi64(order, _mm512_load_si512(m->shift_over));
    const V wrap_low = _mm512_permutexvar_epi64(order, _mm512_load_si512(m->wrap_low));
    const V wrap_high = _mm512_permutexvar_epi64(order, _mm512_load_si512(m->wrap_high));
#define GATHERED(k) _mm512_permutexvar_epi8(_mm512_set1_epi64(((const long long *)csvf__sm4_gather_columns)[k]), table)
    const V last = GATHERED(15);
    V before = GATHERED(0);
    t[0] = XOR(AFFINE(before, left), AFFINE(last, wrap_low));
    V this = GATHERED(1);
    t[1] = XOR3(AFFINE(this, left), AFFINE(before, over), AFFINE(last, wrap_high));
    UNROLL for (int k = 2; k < 16; k++) {
        before = this;
        this = k < 15 ? GATHERED(k) : last;
        t[k] = XOR(AFFINE(this, left), AFFINE(before, over));
    }
}

/* next = t x^64: the upper half moves out and returns folded, the lower half becomes the upper. */
INLINE void next_tweaks(const tweak_matrices *m, V next[16], const V t[16])
{
    next[0] = AFFINE(t[8], m->fold_low);
    UNROLL for (int k = 1; k < 8; k++) next[k] = XOR(AFFINE(t[8 + k], m->fold_low), AFFINE(t[7 + k], m->fold_high));
    next[8] = XOR(t[0], AFFINE(t[15], m->fold_high));
    UNROLL for (int k = 9; k < 16; k++) next[k] = t[k - 8];
}

#endif
