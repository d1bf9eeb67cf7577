/* CPU features that decide which kernels may run. Internal. */
#ifndef CSVF_CPU_H
#define CSVF_CPU_H

#include <stdint.h>

/* What the sources take for granted: SM3 reads words with one byte swap, addresses and lengths of guest memory fit a size_t. */
#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#  error "csvfast needs a little-endian CPU"
#endif
_Static_assert(sizeof(void *) == 8 && SIZE_MAX == UINT64_MAX, "csvfast needs 64-bit addresses and lengths");

enum {
    CSVF_CPU_AES = 1u << 0,
    CSVF_CPU_PCLMUL = 1u << 1,
    CSVF_CPU_AVX2 = 1u << 2,   /* AVX2 with the ymm state enabled by the OS */
    CSVF_CPU_BMI2 = 1u << 3,
    CSVF_CPU_GFNI = 1u << 4,
    CSVF_CPU_VAES = 1u << 5,
    CSVF_CPU_AVX512 = 1u << 6, /* F, BW, DQ, VL, VBMI with the zmm state enabled by the OS */
    CSVF_CPU_ADX = 1u << 7,
    CSVF_CPU_IFMA = 1u << 8,   /* AVX512_IFMA, and AVX512 as above */
    CSVF_CPU_SHA = 1u << 9     /* SHA-256's rounds, and SSE4.1 */
};

/* Features of this CPU less those named in CSVFAST_DISABLE. Cached after the first call. */
uint32_t csvf__cpu(void);

#endif
