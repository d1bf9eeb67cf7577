/* Byte-sliced SM4 with GFNI and AVX-512: included by sm4_gfni_avx512.c only.
 *
 * A group is 64 blocks in 16 registers: register k holds byte k of every block (byte order of memory). Inside a register, byte 8 h + m of
 * 128-bit lane l belongs to block 8 m + 4 h + l: what four unpack stages make of rows loaded in the order 0 2 4 .. 14 1 3 .. 15.
 *
 * Slicing turns the rotations by whole bytes into a choice of registers and leaves 22 instructions for a round of 64 blocks:
 * 4 + 4 + 4 three-way xors, 8 gf2p8affineinvqb (S-box output with the linear layer folded in), 2 xors. State bytes are kept as P x + kappa
 * (tools/sm4_tables.py), so that the sum of three words is already the argument of the inversion.
 *
 * Two groups run together here: everything but whole pages (sm4_gfni_avx512_page.h takes those four groups at a time). One lives wholly in
 * registers; of the other only its two newest words do, the older two are read from memory, so that a round of both costs 8 loads and
 * 4 stores of state. One group alone is bound by latency. */
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

/* The 16 bytes of the blocks of `in`, xor unsliced 16-byte tweaks (NULL = none). Blocks that do not exist (blocks < 64) are zero. */
INLINE void load_bytes(V a[16], const uint8_t *in, size_t blocks, const uint8_t *unsliced)
{
    UNROLL for (int i = 0; i < 16; i++) {
        V x = load_row(in, blocks, (size_t)i);
        a[ROW_REGISTER(i)] = unsliced ? XOR(x, load_row(unsliced, blocks, (size_t)i)) : x;
    }
    transpose(a);
}

/* state = blocks of `in`, xor sliced tweaks (NULL = none), xor unsliced ones (NULL = none), in the state's basis. */
INLINE void load_group(const csvf_sm4_schedule *schedule, V state[16], const uint8_t *in, size_t blocks, const V *sliced,
                       const uint8_t *unsliced)
{
    const V p = MATRIX(CSVF_SM4_P);
    V a[16];
    load_bytes(a, in, blocks, unsliced);
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

/* The rounds are written in assembly language because both compilers, given the same instructions as intrinsics, keep too much
 * alive and spill (measured: 10 % slower). A round costs about 15.7 cycles per group on Zen 4 in this form, in one with three groups and in one
 * with four; the instruction mix alone, without dependences, takes 12.9 there. Registers:
 *   zmm0..15   the group held in registers, register 4 w + m = byte m of word w
 *   zmm16..19, zmm20..23   the two newest words of the group in memory (%[second]), taking turns
 *   zmm24, zmm25   matrices U and W;  zmm26..31   temporaries
 * With i the inverted argument bytes, s[m] = W i[m] + U i[m-1] + constant, and new byte m = old byte m + the three s of other index. */
#define ASM_LINE(text) text "\n\t"
#define SUM_REGISTERS(to, a, b, c)                                                                                              \
    ASM_LINE("vpxorq %%zmm" #a ", %%zmm" #b ", %%zmm" #to)                                                                      \
    ASM_LINE("vpxorq %%zmm" #c ", %%zmm" #to ", %%zmm" #to)
#define SUM_MEMORY(to, a, b, c)                                                                                                 \
    LOAD_WORD(to, c)                                                                                                            \
    ASM_LINE("vpternlogd $0x96, %%zmm" #a ", %%zmm" #b ", %%zmm" #to)
#define INVERT_U(to, from) ASM_LINE("vgf2p8affineinvqb $0, %%zmm24, %%zmm" #from ", %%zmm" #to)
#define INVERT_W(to, from) ASM_LINE("vgf2p8affineinvqb $0, %%zmm25, %%zmm" #from ", %%zmm" #to)
#define ADD_KEY(to, other, offset) ASM_LINE("vpternlogd $0x96, " #offset "(%[key])%{1to16%}, %%zmm" #other ", %%zmm" #to)
#define ADD(to, a, b) ASM_LINE("vpternlogd $0x96, %%zmm" #a ", %%zmm" #b ", %%zmm" #to)
#define XOR_TO(to, a, b) ASM_LINE("vpxorq %%zmm" #a ", %%zmm" #b ", %%zmm" #to)
#define LOAD_WORD(to, offset) ASM_LINE("vmovdqa64 " #offset "(%[second]), %%zmm" #to)
#define STORE_WORD(from, offset) ASM_LINE("vmovdqa64 %%zmm" #from ", " #offset "(%[second])")

/* One round at key offset k0..k3 of a group in registers: x = word to replace, a b c = the three others. Byte 3 of the new word comes first: it
 * needs only three of the four s, and the next round starts with it. */
#define ROUND_REGISTERS(x0, x1, x2, x3, a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, k0, k1, k2, k3)                         \
    SUM_REGISTERS(26, a3, b3, c3)                                                                                               \
    INVERT_U(27, 26)                                                                                                            \
    SUM_REGISTERS(28, a0, b0, c0)                                                                                               \
    INVERT_W(29, 28) INVERT_U(28, 28)                                                                                           \
    ADD_KEY(29, 27, k0)                                                                                                         \
    SUM_REGISTERS(27, a1, b1, c1)                                                                                               \
    INVERT_W(30, 27) INVERT_U(27, 27)                                                                                           \
    ADD_KEY(30, 28, k1)                                                                                                         \
    SUM_REGISTERS(28, a2, b2, c2)                                                                                               \
    INVERT_W(31, 28) INVERT_U(28, 28)                                                                                           \
    ADD_KEY(31, 27, k2)                                                                                                         \
    XOR_TO(27, 29, 30)                                                                                                          \
    ADD(x3, 31, 27)                                                                                                             \
    INVERT_W(26, 26)                                                                                                            \
    ADD_KEY(26, 28, k3)                                                                                                         \
    XOR_TO(28, 31, 26)                                                                                                          \
    ADD(x0, 30, 28) ADD(x1, 29, 28) ADD(x2, 26, 27)

/* The same for the group in memory: n = its newest word, o = the one before, replaced by the new word; x and a = byte offsets of the
 * oldest word (also the place of the new one) and of the next. */
#define ROUND_MEMORY(n0, n1, n2, n3, o0, o1, o2, o3, x0, x1, x2, x3, a0, a1, a2, a3, k0, k1, k2, k3)                            \
    SUM_MEMORY(26, n3, o3, a3)                                                                                                  \
    INVERT_U(27, 26)                                                                                                            \
    LOAD_WORD(o3, x3)                                                                                                           \
    SUM_MEMORY(28, n0, o0, a0)                                                                                                  \
    INVERT_W(29, 28) INVERT_U(28, 28)                                                                                           \
    LOAD_WORD(o0, x0)                                                                                                           \
    ADD_KEY(29, 27, k0)                                                                                                         \
    SUM_MEMORY(27, n1, o1, a1)                                                                                                  \
    INVERT_W(30, 27) INVERT_U(27, 27)                                                                                           \
    LOAD_WORD(o1, x1)                                                                                                           \
    ADD_KEY(30, 28, k1)                                                                                                         \
    SUM_MEMORY(28, n2, o2, a2)                                                                                                  \
    INVERT_W(31, 28) INVERT_U(28, 28)                                                                                           \
    LOAD_WORD(o2, x2)                                                                                                           \
    ADD_KEY(31, 27, k2)                                                                                                         \
    XOR_TO(27, 29, 30)                                                                                                          \
    ADD(o3, 31, 27)                                                                                                             \
    INVERT_W(26, 26)                                                                                                            \
    ADD_KEY(26, 28, k3)                                                                                                         \
    XOR_TO(28, 31, 26)                                                                                                          \
    ADD(o0, 30, 28) ADD(o1, 29, 28) ADD(o2, 26, 27)                                                                             \
    STORE_WORD(o3, x3) STORE_WORD(o0, x0) STORE_WORD(o1, x1) STORE_WORD(o2, x2)

#define REGISTERS_0 ROUND_REGISTERS(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 4, 8, 12)
#define REGISTERS_1 ROUND_REGISTERS(4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 16, 20, 24, 28)
#define REGISTERS_2 ROUND_REGISTERS(8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7, 32, 36, 40, 44)
#define REGISTERS_3 ROUND_REGISTERS(12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 48, 52, 56, 60)
#define MEMORY_0 ROUND_MEMORY(16, 17, 18, 19, 20, 21, 22, 23, 0, 64, 128, 192, 256, 320, 384, 448, 0, 4, 8, 12)
#define MEMORY_1 ROUND_MEMORY(20, 21, 22, 23, 16, 17, 18, 19, 256, 320, 384, 448, 512, 576, 640, 704, 16, 20, 24, 28)
#define MEMORY_2 ROUND_MEMORY(16, 17, 18, 19, 20, 21, 22, 23, 512, 576, 640, 704, 768, 832, 896, 960, 32, 36, 40, 44)
#define MEMORY_3 ROUND_MEMORY(20, 21, 22, 23, 16, 17, 18, 19, 768, 832, 896, 960, 0, 64, 128, 192, 48, 52, 56, 60)

#define EACH_REGISTER(DO)                                                                                                       \
    DO(0, 0) DO(1, 64) DO(2, 128) DO(3, 192) DO(4, 256) DO(5, 320) DO(6, 384) DO(7, 448)                                        \
    DO(8, 512) DO(9, 576) DO(10, 640) DO(11, 704) DO(12, 768) DO(13, 832) DO(14, 896) DO(15, 960)
#define LOAD_FIRST(r, offset) ASM_LINE("vmovdqa64 " #offset "(%[first]), %%zmm" #r)
#define STORE_FIRST(r, offset) ASM_LINE("vmovdqa64 %%zmm" #r ", " #offset "(%[first])")
#define LOAD_MATRICES                                                                                                           \
    ASM_LINE("vpbroadcastq %[u], %%zmm24")                                                                                      \
    ASM_LINE("vpbroadcastq %[w], %%zmm25")
#define PREFETCH(offset) ASM_LINE("prefetcht0 " #offset "(%[next])") ASM_LINE("prefetcht0 " #offset "(%[out])")
#define ROUNDS_CLOBBERS                                                                                                         \
    "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",  \
        "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25",    \
        "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31"

static const uint64_t round_matrices[2] = {CSVF_SM4_U, CSVF_SM4_W};

/* All rounds of one group. */
NOINLINE void rounds_of_one(const csvf_sm4_schedule *schedule, V state[16])
{
    const uint32_t *key = schedule->words + KEY_SLICED, *end = key + 128;
    __asm__ volatile(LOAD_MATRICES EACH_REGISTER(LOAD_FIRST)
                     ASM_LINE(".p2align 4") ASM_LINE("1:")
                     REGISTERS_0 REGISTERS_1 REGISTERS_2 REGISTERS_3
                     ASM_LINE("addq $64, %[key]") ASM_LINE("cmpq %[end], %[key]") ASM_LINE("jne 1b")
                     EACH_REGISTER(STORE_FIRST)
                     : [key] "+r"(key)
                     : [end] "r"(end), [first] "r"(state), [u] "m"(round_matrices[0]), [w] "m"(round_matrices[1])
                     : ROUNDS_CLOBBERS);
}

/* All rounds of two groups; prefetches 2 KiB from `next` and from `out` on, 64 bytes in every round. `out` is where the result will go, or `next`
 * again if that is in the cache already. */
NOINLINE void rounds_of_two(const csvf_sm4_schedule *schedule, V first[16], V second[16], uintptr_t next, uintptr_t out)
{
    const uint32_t *key = schedule->words + KEY_SLICED, *end = key + 128;
    __asm__ volatile(LOAD_MATRICES EACH_REGISTER(LOAD_FIRST)
                     LOAD_WORD(20, 512) LOAD_WORD(21, 576) LOAD_WORD(22, 640) LOAD_WORD(23, 704)
                     LOAD_WORD(16, 768) LOAD_WORD(17, 832) LOAD_WORD(18, 896) LOAD_WORD(19, 960)
                     ASM_LINE(".p2align 4") ASM_LINE("1:")
                     REGISTERS_0 MEMORY_0 PREFETCH(0)
                     REGISTERS_1 MEMORY_1 PREFETCH(64)
                     REGISTERS_2 MEMORY_2 PREFETCH(128)
                     REGISTERS_3 MEMORY_3 PREFETCH(192)
                     ASM_LINE("addq $64, %[key]") ASM_LINE("addq $256, %[next]") ASM_LINE("addq $256, %[out]")
                     ASM_LINE("cmpq %[end], %[key]") ASM_LINE("jne 1b")
                     EACH_REGISTER(STORE_FIRST)
                     : [key] "+r"(key), [next] "+r"(next), [out] "+r"(out)
                     : [end] "r"(end), [first] "r"(first), [second] "r"(second), [u] "m"(round_matrices[0]),
                       [w] "m"(round_matrices[1])
                     : ROUNDS_CLOBBERS);
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

/* Byte k of the tweaks t, times alpha^64: the upper half moves out and returns folded, the lower half becomes the upper. */
INLINE V next_tweak(const tweak_matrices *m, const V t[16], int k)
{
    if (k == 0)
        return AFFINE(t[8], m->fold_low);
    if (k < 8)
        return XOR(AFFINE(t[8 + k], m->fold_low), AFFINE(t[7 + k], m->fold_high));
    return k == 8 ? XOR(t[0], AFFINE(t[15], m->fold_high)) : t[k - 8];
}

/* The tweaks of the 64 blocks after those of `before`. */
INLINE void following_tweaks(const tweak_matrices *m, V t[16], const V before[16])
{
    UNROLL for (int k = 0; k < 16; k++) t[k] = next_tweak(m, before, k);
}

#endif
