/* Four byte-sliced groups (256 blocks, one 4 KiB page) at a time: the bulk form of XTS. Included by sm4_gfni_avx512.c only.
 *
 * The state of all four groups lives in memory that stays in the L1 cache; of each group only the newest word is kept in registers.
 * A barrier after every round of a group stops the compiler from holding more than 32 registers' worth and spilling. Four
 * independent chains cover the latency of a round on cores with full 512-bit units, where two are not enough. */
#ifndef CSVF_SM4_GFNI_AVX512_PAGE_H
#define CSVF_SM4_GFNI_AVX512_PAGE_H

#define PAGE_GROUPS 4u
#define PAGE_BLOCKS (PAGE_GROUPS * GROUP_BLOCKS)

typedef struct page {
    V tweak[16 * PAGE_GROUPS];
    V state[16 * PAGE_GROUPS];
} page;

#define BARRIER() __asm__ volatile("" ::: "memory")
#define LOADA(p) _mm512_load_si512(p)
#define STOREA(p, x) _mm512_store_si512(p, x)

/* One round of one group: x = the word to replace, a and b = the next two (in memory), n0..n3 = the newest word (in registers), which becomes the
 * new one. d0..d3 = the round's constants. */
#define ROUND_OF_PAGE(n, x, a, b)                                                                                               \
    do {                                                                                                                        \
        V z0 = XOR3(n##0, LOADA(b), LOADA(a)), z1 = XOR3(n##1, LOADA(b + 1), LOADA(a + 1));                                     \
        V z2 = XOR3(n##2, LOADA(b + 2), LOADA(a + 2)), z3 = XOR3(n##3, LOADA(b + 3), LOADA(a + 3));                             \
        V u0 = INVERT(z0, u), u1 = INVERT(z1, u), u2 = INVERT(z2, u), u3 = INVERT(z3, u);                                       \
        V s0 = XOR3(INVERT(z0, w), u3, d0), s1 = XOR3(INVERT(z1, w), u0, d1);                                                   \
        V s2 = XOR3(INVERT(z2, w), u1, d2), s3 = XOR3(INVERT(z3, w), u2, d3);                                                   \
        V p = XOR(s0, s1), q = XOR(s2, s3);                                                                                     \
        n##0 = XOR3(s1, q, LOADA(x)), n##1 = XOR3(s0, q, LOADA(x + 1));                                                         \
        n##2 = XOR3(s3, p, LOADA(x + 2)), n##3 = XOR3(s2, p, LOADA(x + 3));                                                     \
        STOREA(x, n##0), STOREA(x + 1, n##1), STOREA(x + 2, n##2), STOREA(x + 3, n##3);                                         \
        BARRIER();                                                                                                              \
    } while (0)

#define NEWEST(n, g)                                                                                                            \
    V n##0 = LOADA(state + 16 * (g) + 12), n##1 = LOADA(state + 16 * (g) + 13), n##2 = LOADA(state + 16 * (g) + 14),            \
      n##3 = LOADA(state + 16 * (g) + 15)

#define WORD_OF(g, i) (state + 16 * (g) + 4 * ((i) & 3))
#define ROUND_OF_GROUP(n, g, i) ROUND_OF_PAGE(n, WORD_OF(g, i), WORD_OF(g, (i) + 1), WORD_OF(g, (i) + 2))

/* Round i of the four groups; prefetches 128 bytes of the next input, and of the output unless the input stands there. */
#define ROUND_OF_ALL(i)                                                                                                         \
    do {                                                                                                                        \
        const V d0 = BROADCAST(key[4 * (i)]), d1 = BROADCAST(key[4 * (i) + 1]);                                                 \
        const V d2 = BROADCAST(key[4 * (i) + 2]), d3 = BROADCAST(key[4 * (i) + 3]);                                             \
        ROUND_OF_GROUP(first, 0, i);                                                                                            \
        ROUND_OF_GROUP(second, 1, i);                                                                                           \
        ROUND_OF_GROUP(third, 2, i);                                                                                            \
        ROUND_OF_GROUP(fourth, 3, i);                                                                                           \
        _mm_prefetch(ahead + 128 * (i), _MM_HINT_T0);                                                                           \
        _mm_prefetch(ahead + 128 * (i) + 64, _MM_HINT_T0);                                                                      \
        if (apart) {                                                                                                            \
            __builtin_prefetch(target + 128 * (i), 1);                                                                          \
            __builtin_prefetch(target + 128 * (i) + 64, 1);                                                                     \
        }                                                                                                                       \
    } while (0)

/* All rounds of a page. Prefetches the 4 KiB from `next` on, a little in every round: without it 64 MiB runs 15 % slower; and the 4 KiB
 * of `out`, to be written when the rounds are done, if they stand apart from the input. */
INLINE void rounds_of_page(const csvf_sm4_schedule *schedule, V *state, uintptr_t next, uintptr_t out, int apart)
{
    const V u = MATRIX(CSVF_SM4_U), w = MATRIX(CSVF_SM4_W);
    const uint32_t *key = schedule->words + KEY_SLICED;
    const char *ahead = (const char *)next, *target = (const char *)out;
    NEWEST(first, 0);
    NEWEST(second, 1);
    NEWEST(third, 2);
    NEWEST(fourth, 3);
    for (int i = 0; i < 32; i += 4) {
        ROUND_OF_ALL(0);
        ROUND_OF_ALL(1);
        ROUND_OF_ALL(2);
        ROUND_OF_ALL(3);
        key += 16;
        ahead += 512;
        target += 512;
    }
}

/* 256 blocks with the tweaks in p->tweak. */
NOINLINE void crypt_page(const csvf_sm4_schedule *schedule, page *p, uint8_t *out, const uint8_t *in)
{
    BARRIER();
    for (unsigned g = 0; g < PAGE_GROUPS; g++) {
        load_group(schedule, p->state + 16 * g, in + GROUP_BYTES * g, GROUP_BLOCKS, p->tweak + 16 * g, NULL);
        BARRIER();
    }
    const int apart = out != in;
    rounds_of_page(schedule, p->state, (uintptr_t)in + PAGE_BLOCKS * 16, (uintptr_t)out, apart);
    BARRIER();
    for (unsigned g = 0; g < PAGE_GROUPS; g++) {
        store_group(schedule, out + GROUP_BYTES * g, p->state + 16 * g, GROUP_BLOCKS, p->tweak + 16 * g, NULL);
        BARRIER();
    }
}

/* 256 blocks of one run, from the tweak of the first one (NULL = they follow those in page->tweak). */
INLINE void xts_page(const csvf_sm4_schedule *schedule, const tweak_matrices *m, page *p, uint8_t *out, const uint8_t *in,
                       const uint8_t *base)
{
    if (base)
        first_tweaks(m, p->tweak, base);
    else
        following_tweaks(m, p->tweak, p->tweak + 16 * (PAGE_GROUPS - 1));
    for (unsigned g = 1; g < PAGE_GROUPS; g++)
        following_tweaks(m, p->tweak + 16 * g, p->tweak + 16 * (g - 1));
    crypt_page(schedule, p, out, in);
}

#endif
