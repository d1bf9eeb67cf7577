/* Eight SM3 messages in AVX2 lanes. Two interleaved vectors are slower: sixteen registers do not hold their state. PURE,
 * constant time in the data. */
#if defined(__x86_64__)
#define CSVF_TARGET_AVX2
#include "../target_begin.h"

#include <immintrin.h>

#include "../cpu.h"
#include "sm3_common.h"
#include "sm3_kernel.h"

#define VECTOR __m256i
#define GROUP_LANES 8
#define VLOAD(p) _mm256_loadu_si256((const __m256i *)(const void *)(p))
#define VSTORE(p, x) _mm256_storeu_si256((__m256i *)(void *)(p), x)
#define VADD(x, y) _mm256_add_epi32(x, y)
#define VXOR(x, y) _mm256_xor_si256(x, y)
#define VROL(x, n) _mm256_or_si256(_mm256_slli_epi32(x, n), _mm256_srli_epi32(x, 32 - (n)))
#define VXOR3(x, y, z) VXOR(VXOR(x, y), z)
#define VMAJORITY(x, y, z) VXOR(_mm256_and_si256(VXOR(x, y), VXOR(y, z)), y)
#define VCHOOSE(x, y, z) VXOR(_mm256_and_si256(VXOR(y, z), x), z)
#define VP0(x) permute(x, VROL(x, 9))
#define VP1(x) permute(x, VROL(x, 15))
#define VBROADCAST(word) broadcast(&(word))

/* gcc 12 takes _mm256_set1_epi32 of memory through a general register: two operations more. */
static inline __attribute__((always_inline)) VECTOR broadcast(const uint32_t *word)
{
    VECTOR x;
    __asm__("vpbroadcastd %1, %0" : "=x"(x) : "m"(*word));
    return x;
}

/* P0 and P1 rotate by 9 and 17, 15 and 23: the second is the first by one byte more, which a byte shuffle does in one. */
static inline __attribute__((always_inline)) VECTOR permute(VECTOR x, VECTOR rotated)
{
    const VECTOR by_8 = _mm256_setr_epi8(3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14,
                                         3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14);
    return VXOR3(x, rotated, _mm256_shuffle_epi8(rotated, by_8));
}

#define ROW(i) VECTOR r##i = VLOAD(rows + 64 * (i))
#define PAIR(i, j) VECTOR t##i = _mm256_unpacklo_epi32(r##i, r##j), t##j = _mm256_unpackhi_epi32(r##i, r##j)
#define QUAD(i, j, k, l)                                                                                               \
    VECTOR u##i = _mm256_unpacklo_epi64(t##i, t##k), u##j = _mm256_unpackhi_epi64(t##i, t##k),                         \
           u##k = _mm256_unpacklo_epi64(t##j, t##l), u##l = _mm256_unpackhi_epi64(t##j, t##l)
#define TILES(n, i, j)                                                                                                 \
    do {                                                                                                               \
        w[n] = _mm256_permute2x128_si256(u##i, u##j, 0x20);                                                            \
        w[(n) + 4] = _mm256_permute2x128_si256(u##i, u##j, 0x31);                                                      \
    } while (0)

static inline __attribute__((always_inline)) void stage(uint8_t *row, const uint8_t *in)
{
    const VECTOR big_endian = _mm256_setr_epi8(3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12,
                                               3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12);
    VSTORE(row, _mm256_shuffle_epi8(VLOAD(in), big_endian));
    VSTORE(row + 32, _mm256_shuffle_epi8(VLOAD(in + 32), big_endian));
}

/* Words 0..7 of the half rows at rows. */
static inline __attribute__((always_inline)) void load_half(VECTOR w[8], const uint8_t *rows)
{
    ROW(0); ROW(1); ROW(2); ROW(3); PAIR(0, 1); PAIR(2, 3); QUAD(0, 1, 2, 3);
    ROW(4); ROW(5); ROW(6); ROW(7); PAIR(4, 5); PAIR(6, 7); QUAD(4, 5, 6, 7);
    TILES(0, 0, 4);
    TILES(1, 1, 5);
    TILES(2, 2, 6);
    TILES(3, 3, 7);
}

static inline __attribute__((always_inline)) void load_schedule(VECTOR w[16], const uint8_t *rows)
{
    load_half(w, rows);
    load_half(w + 8, rows + 32);
}

#define LANES_FUNCTION compress_8
#define GROUPS 1
#include "sm3_lanes.h"

const csvf_sm3_many_kernel csvf__sm3_many_avx2 = {
    .name = "avx2",
    .features = CSVF_CPU_AVX2 | CSVF_CPU_BMI2,
    .lanes = 8,
    .worthwhile = 4,
    .compress = compress_8,
    .narrow_lanes = 0,
    .narrow_worthwhile = SIZE_MAX,
    .compress_narrow = NULL,
};

#include "../target_end.h"
#endif
