/* SM3 kernels. Internal. Constant time in the data (SM3 has no tables and no data-dependent branches). */
#ifndef CSVF_SM3_KERNEL_H
#define CSVF_SM3_KERNEL_H

#include <stddef.h>
#include <stdint.h>

/* One stream. */
typedef struct csvf_sm3_kernel {
    const char *name;      /* "avx2" (BMI2 rounds, vector message expansion), "portable" */
    uint32_t features;
    /* Compresses consecutive 64-byte blocks into the chaining value h (host-order words). */
    void (*compress)(uint32_t h[8], const uint8_t *data, size_t blocks);
} csvf_sm3_kernel;

/* Many independent streams in vector lanes. */
typedef struct csvf_sm3_many_kernel {
    const char *name;      /* "avx512", "avx2", "portable" */
    uint32_t features;
    size_t lanes;          /* lanes of one call of `compress`; 1 = no vector kernel (compress is NULL): callers use single streams */
    size_t worthwhile;     /* from how many live lanes on a call beats the narrow one (or single streams) */
    /* state[i * lanes + l] is word i of lane l; data[l] points at `blocks` 64-byte blocks of lane l. */
    void (*compress)(uint32_t *state, const uint8_t *const *data, size_t blocks);
    /* the same with fewer lanes for small counts (NULL if none): narrow_lanes < lanes */
    size_t narrow_lanes;
    size_t narrow_worthwhile;
    void (*compress_narrow)(uint32_t *state, const uint8_t *const *data, size_t blocks);
} csvf_sm3_many_kernel;

extern const csvf_sm3_kernel *const csvf__sm3_kernels[];            /* most preferred first, NULL-terminated (sm3/sm3.c) */
extern const csvf_sm3_many_kernel *const csvf__sm3_many_kernels[];

const csvf_sm3_kernel *csvf__sm3(void);            /* the kernels in use now (dispatch.c) */
const csvf_sm3_many_kernel *csvf__sm3_many(void);

extern const csvf_sm3_kernel csvf__sm3_portable;
extern const csvf_sm3_many_kernel csvf__sm3_many_portable;
#if defined(__x86_64__)
extern const csvf_sm3_kernel csvf__sm3_avx2;
extern const csvf_sm3_many_kernel csvf__sm3_many_avx2;
extern const csvf_sm3_many_kernel csvf__sm3_many_avx512;
#endif

#endif
