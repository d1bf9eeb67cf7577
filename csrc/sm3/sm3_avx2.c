/* One SM3 stream with BMI2 rounds and vector message expansion. Standard: GB/T 32905-2016, 5.3. PURE, constant time in the data.
 *
 * A chain of seven dependent operations leads from e to the next e (rounds 16..63: the choice, its two additions, the addition
 * of SS1, a rotation and two exclusive ors of P0), so 432 cycles a block are the floor. Compilers add 15 % to it by
 * reassociation, hence the assembler. The order inside a round was found by measuring: schedulers take the oldest ready
 * operation first, so what leads to h stands before what leads to d, and the choice before SS1. Splitting the choice over the
 * two terms of P0 shortens the chain to six but costs two more operations, of which Zen 4 has no room for (7.7 against 7.1
 * cycles per byte).
 *
 * The expansion runs in vector registers, four words a step, some rounds ahead; out-of-order execution puts it into the gaps. */
#if defined(__x86_64__)
#define CSVF_TARGET_AVX2
#include "../target_begin.h"

#include <immintrin.h>

#include "../cpu.h"
#include "sm3_common.h"
#include "sm3_kernel.h"

/* t0 = a <<< 12, t1 = SS1. The constant is added while e is not yet known. */
#define SUM(a, e)                                                                                                      \
    "rorx $20, %k[" a "], %k[t0]\n\t"                                                                                  \
    "leal %c[constant](%q[t0]), %k[t1]\n\t"                                                                            \
    "addl %k[" e "], %k[t1]\n\t"                                                                                       \
    "rorx $25, %k[t1], %k[t1]\n\t"

/* The last addition to d, b and f rotated, h = P0(h). */
#define FINISH(b, d, f, h)                                                                                             \
    "addl %k[t0], %k[" d "]\n\t"                                                                                       \
    "rorx $23, %k[" b "], %k[" b "]\n\t"                                                                               \
    "rorx $13, %k[" f "], %k[" f "]\n\t"                                                                               \
    "rorx $23, %k[" h "], %k[t2]\n\t"                                                                                  \
    "rorx $15, %k[" h "], %k[t3]\n\t"                                                                                  \
    "xorl %k[t2], %k[" h "]\n\t"                                                                                       \
    "xorl %k[t3], %k[" h "]\n\t"

/* Rounds 0..15: FF and GG are exclusive ors. */
#define EARLY(a, b, c, d, e, f, g, h)                                                                                  \
    "addl %[word], %k[" h "]\n\t"                                                                                      \
    "movl %k[" f "], %k[t2]\n\t"                                                                                       \
    "xorl %k[" g "], %k[t2]\n\t"                                                                                       \
    "xorl %k[" e "], %k[t2]\n\t"                                                                                       \
    "addl %[pair], %k[" d "]\n\t"                                                                                      \
    SUM(a, e)                                                                                                          \
    "addl %k[t2], %k[" h "]\n\t"                                                                                       \
    "addl %k[t1], %k[" h "]\n\t"                                                                                       \
    "xorl %k[t1], %k[t0]\n\t"                                                                                          \
    "movl %k[" b "], %k[t3]\n\t"                                                                                       \
    "xorl %k[" c "], %k[t3]\n\t"                                                                                       \
    "xorl %k[" a "], %k[t3]\n\t"                                                                                       \
    "addl %k[t3], %k[" d "]\n\t"                                                                                       \
    FINISH(b, d, f, h)

/* Rounds 16..63: choice as (e & f) + (~e & g), majority as (b & c) + (a & (b ^ c)): disjoint bits, so sums are allowed. */
#define LATE(a, b, c, d, e, f, g, h)                                                                                   \
    "addl %[word], %k[" h "]\n\t"                                                                                      \
    "movl %k[" f "], %k[t2]\n\t"                                                                                       \
    "andl %k[" e "], %k[t2]\n\t"                                                                                       \
    "andnl %k[" g "], %k[" e "], %k[t3]\n\t"                                                                           \
    "addl %[pair], %k[" d "]\n\t"                                                                                      \
    SUM(a, e)                                                                                                          \
    "addl %k[t3], %k[" h "]\n\t"                                                                                       \
    "addl %k[t2], %k[" h "]\n\t"                                                                                       \
    "addl %k[t1], %k[" h "]\n\t"                                                                                       \
    "xorl %k[t1], %k[t0]\n\t"                                                                                          \
    "movl %k[" b "], %k[t2]\n\t"                                                                                       \
    "andl %k[" c "], %k[t2]\n\t"                                                                                       \
    "addl %k[t2], %k[" d "]\n\t"                                                                                       \
    "movl %k[" b "], %k[t3]\n\t"                                                                                       \
    "xorl %k[" c "], %k[t3]\n\t"                                                                                       \
    "andl %k[" a "], %k[t3]\n\t"                                                                                       \
    "addl %k[t3], %k[" d "]\n\t"                                                                                       \
    FINISH(b, d, f, h)

#define ROUND(text, j)                                                                                                 \
    __asm__ volatile(text                                                                                              \
                     : [a] "+r"(a), [b] "+r"(b), [c] "+r"(c), [d] "+r"(d), [e] "+r"(e), [f] "+r"(f), [g] "+r"(g),      \
                       [h] "+r"(h), [t0] "=&r"(t0), [t1] "=&r"(t1), [t2] "=&r"(t2), [t3] "=&r"(t3)                     \
                     : [constant] "i"((int32_t)(TJ(j))), [word] "m"(words[(j) & 15]), [pair] "m"(pairs[(j) & 15])      \
                     : "cc")

/* T_j <<< j as a constant expression. */
#define TJ_BASE(j) ((j) < 16 ? 0x79cc4519u : 0x7a879d8au)
#define TJ(j) ((j) % 32 ? TJ_BASE(j) << (j) % 32 | TJ_BASE(j) >> ((32 - (j) % 32) & 31) : TJ_BASE(j))

#define FOUR_ROUNDS(KIND, j)                                                                                           \
    ROUND(KIND("a", "b", "c", "d", "e", "f", "g", "h"), (j));                                                          \
    ROUND(KIND("d", "a", "b", "c", "h", "e", "f", "g"), (j) + 1);                                                      \
    ROUND(KIND("c", "d", "a", "b", "g", "h", "e", "f"), (j) + 2);                                                      \
    ROUND(KIND("b", "c", "d", "a", "f", "g", "h", "e"), (j) + 3)

#define ROL128(x, n) _mm_or_si128(_mm_slli_epi32(x, n), _mm_srli_epi32(x, 32 - (n)))

static inline __attribute__((always_inline)) __m128i xor3(__m128i x, __m128i y, __m128i z)
{
    return _mm_xor_si128(_mm_xor_si128(x, y), z);
}

/* The next four words of the schedule from the last sixteen (w0 the oldest). Word 3 also needs word 0 of its own step; the
 * expansion is linear, so its share P1(word 0 <<< 15) is added afterwards. Shifting a word doubled into 64 bits rotates it. */
static inline __attribute__((always_inline)) __m128i expand(__m128i w0, __m128i w1, __m128i w2, __m128i w3)
{
    const __m128i by_8 = _mm_setr_epi8(3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14);
    const __m128i double_word_0 = _mm_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, 0, 1, 2, 3, 0, 1, 2, 3);
    const __m128i minus_3 = _mm_srli_si128(w3, 4), minus_6 = _mm_alignr_epi8(w3, w2, 8);
    const __m128i minus_9 = _mm_alignr_epi8(w2, w1, 12), minus_13 = _mm_alignr_epi8(w1, w0, 12);
    const __m128i x = xor3(w0, minus_9, ROL128(minus_3, 15));
    const __m128i x15 = ROL128(x, 15);
    const __m128i p1 = xor3(x, x15, _mm_shuffle_epi8(x15, by_8));
    const __m128i w4 = xor3(p1, ROL128(minus_13, 7), minus_6);
    const __m128i y = _mm_shuffle_epi8(w4, double_word_0);
    const __m128i share = xor3(_mm_srli_epi64(y, 17), _mm_srli_epi64(y, 2), _mm_srli_epi64(y, 26));
    return _mm_xor_si128(w4, _mm_slli_epi64(share, 32));
}

/* Words j .. j + 3 (and their pairs W_j ^ W_(j+4)) to memory for the rounds. */
#define PUBLISH(j, w, next)                                                                                            \
    do {                                                                                                               \
        _mm_store_si128((__m128i *)(void *)(words + ((j) & 15)), w);                                                   \
        _mm_store_si128((__m128i *)(void *)(pairs + ((j) & 15)), _mm_xor_si128(w, next));                              \
    } while (0)

/* Four rounds from j while the schedule moves on: w0 (words j + 8 ..) is published, then replaced by words j + 24 .. */
#define STEP(KIND, j, w0, w1, w2, w3)                                                                                  \
    PUBLISH((j) + 8, w0, w1);                                                                                          \
    w0 = expand(w0, w1, w2, w3);                                                                                       \
    FOUR_ROUNDS(KIND, j)

static void compress(uint32_t state[8], const uint8_t *data, size_t blocks)
{
    const __m128i big_endian = _mm_setr_epi8(3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12);
    uint32_t words[16] __attribute__((aligned(16))), pairs[16] __attribute__((aligned(16)));
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
    uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
    uint32_t t0, t1, t2, t3;

    for (; blocks; blocks--, data += CSVF__SM3_BLOCK) {
        __m128i w0 = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(const void *)data), big_endian);
        __m128i w1 = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(const void *)(data + 16)), big_endian);
        __m128i w2 = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(const void *)(data + 32)), big_endian);
        __m128i w3 = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(const void *)(data + 48)), big_endian);
        PUBLISH(0, w0, w1);
        w0 = expand(w0, w1, w2, w3);
        PUBLISH(4, w1, w2);
        w1 = expand(w1, w2, w3, w0);
        STEP(EARLY, 0, w2, w3, w0, w1);
        STEP(EARLY, 4, w3, w0, w1, w2);
        STEP(EARLY, 8, w0, w1, w2, w3);
        STEP(EARLY, 12, w1, w2, w3, w0);
        STEP(LATE, 16, w2, w3, w0, w1);
        STEP(LATE, 20, w3, w0, w1, w2);
        STEP(LATE, 24, w0, w1, w2, w3);
        STEP(LATE, 28, w1, w2, w3, w0);
        STEP(LATE, 32, w2, w3, w0, w1);
        STEP(LATE, 36, w3, w0, w1, w2);
        STEP(LATE, 40, w0, w1, w2, w3);
        PUBLISH(52, w1, w2);
        FOUR_ROUNDS(LATE, 44);
        PUBLISH(56, w2, w3);
        FOUR_ROUNDS(LATE, 48);
        PUBLISH(60, w3, w0);
        FOUR_ROUNDS(LATE, 52);
        FOUR_ROUNDS(LATE, 56);
        FOUR_ROUNDS(LATE, 60);
        a = state[0] ^= a, b = state[1] ^= b, c = state[2] ^= c, d = state[3] ^= d;
        e = state[4] ^= e, f = state[5] ^= f, g = state[6] ^= g, h = state[7] ^= h;
    }
    csvf__wipe(words, sizeof words);
    csvf__wipe(pairs, sizeof pairs);
}

const csvf_sm3_kernel csvf__sm3_avx2 = {
    .name = "avx2", .features = CSVF_CPU_AVX2 | CSVF_CPU_BMI2, .compress = compress};

#include "../target_end.h"
#endif
