/* Many SM3 messages in AVX-512 lanes: 32 (two vectors in turn) or 16. Needs F, BW and VL. PURE, constant time in the data. */
#if defined(__x86_64__)
#define CSVF_TARGET_AVX512
#include "../target_begin.h"

#include <immintrin.h>

#include "../cpu.h"
#include "sm3_common.h"
#include "sm3_kernel.h"

#define VECTOR __m512i
#define GROUP_LANES 16
#define VLOAD(p) _mm512_loadu_si512(p)
#define VSTORE(p, x) _mm512_storeu_si512(p, x)
#define VADD(x, y) _mm512_add_epi32(x, y)
#define VXOR(x, y) _mm512_xor_si512(x, y)
#define VROL(x, n) _mm512_rol_epi32(x, n)
#define VXOR3(x, y, z) _mm512_ternarylogic_epi32(x, y, z, 0x96)
#define VMAJORITY(x, y, z) _mm512_ternarylogic_epi32(x, y, z, 0xe8)
#define VCHOOSE(x, y, z) _mm512_ternarylogic_epi32(x, y, z, 0xca)
#define VP0(x) VXOR3(x, VROL(x, 9), VROL(x, 17))
#define VP1(x) VXOR3(x, VROL(x, 15), VROL(x, 23))
#define VBROADCAST(word) _mm512_set1_epi32((int)(word))

static inline __attribute__((always_inline)) void stage(uint8_t *row, const uint8_t *in)
{
    const VECTOR big_endian = _mm512_set4_epi32(0x0c0d0e0f, 0x08090a0b, 0x04050607, 0x00010203);
    _mm512_store_si512(row, _mm512_shuffle_epi8(_mm512_loadu_si512(in), big_endian));
}

/* The transpose is written out because gcc at -O2 leaves loops over vector arrays in memory (five times slower). */
#define ROW(i) VECTOR r##i = _mm512_load_si512(rows + 64 * (i))
#define PAIR(i, j) VECTOR t##i = _mm512_unpacklo_epi32(r##i, r##j), t##j = _mm512_unpackhi_epi32(r##i, r##j)
/* Rows i..l as 4x4 tiles: u(i + k) holds words k, 4 + k, 8 + k, 12 + k of those rows. */
#define QUAD(i, j, k, l)                                                                                               \
    VECTOR u##i = _mm512_unpacklo_epi64(t##i, t##k), u##j = _mm512_unpackhi_epi64(t##i, t##k),                         \
           u##k = _mm512_unpacklo_epi64(t##j, t##l), u##l = _mm512_unpackhi_epi64(t##j, t##l)
#define TILES(n, i, j, k, l)                                                                                           \
    do {                                                                                                               \
        VECTOR low01 = _mm512_shuffle_i32x4(u##i, u##j, 0x44), high01 = _mm512_shuffle_i32x4(u##i, u##j, 0xee);        \
        VECTOR low23 = _mm512_shuffle_i32x4(u##k, u##l, 0x44), high23 = _mm512_shuffle_i32x4(u##k, u##l, 0xee);        \
        w[n] = _mm512_shuffle_i32x4(low01, low23, 0x88);                                                               \
        w[(n) + 4] = _mm512_shuffle_i32x4(low01, low23, 0xdd);                                                         \
        w[(n) + 8] = _mm512_shuffle_i32x4(high01, high23, 0x88);                                                       \
        w[(n) + 12] = _mm512_shuffle_i32x4(high01, high23, 0xdd);                                                      \
    } while (0)

static inline __attribute__((always_inline)) void load_schedule(VECTOR w[16], const uint8_t *rows)
{
    ROW(0); ROW(1); ROW(2); ROW(3); PAIR(0, 1); PAIR(2, 3); QUAD(0, 1, 2, 3);
    ROW(4); ROW(5); ROW(6); ROW(7); PAIR(4, 5); PAIR(6, 7); QUAD(4, 5, 6, 7);
    ROW(8); ROW(9); ROW(10); ROW(11); PAIR(8, 9); PAIR(10, 11); QUAD(8, 9, 10, 11);
    ROW(12); ROW(13); ROW(14); ROW(15); PAIR(12, 13); PAIR(14, 15); QUAD(12, 13, 14, 15);
    TILES(0, 0, 4, 8, 12);
    TILES(1, 1, 5, 9, 13);
    TILES(2, 2, 6, 10, 14);
    TILES(3, 3, 7, 11, 15);
}

#define LANES_FUNCTION compress_32
#define GROUPS 2
#include "sm3_lanes.h"

#define LANES_FUNCTION compress_16
#define GROUPS 1
#include "sm3_lanes.h"

const csvf_sm3_many_kernel csvf__sm3_many_avx512 = {
    .name = "avx512",
    .features = CSVF_CPU_AVX512,
    .lanes = 32,
    .worthwhile = 17,
    .compress = compress_32,
    .narrow_lanes = 16,
    .narrow_worthwhile = 4,
    .compress_narrow = compress_16,
};

#include "../target_end.h"
#endif
