/* GHASH kernels (NIST SP 800-38D 6.4). Internal. Constant time: no tables indexed by data. */
#ifndef CSVF_GHASH_KERNEL_H
#define CSVF_GHASH_KERNEL_H

#include <stddef.h>
#include <stdint.h>

typedef struct csvf_ghash_key { uint64_t words[64]; } csvf_ghash_key;  /* powers of H, in the kernel's own form */

typedef struct csvf_ghash_kernel {
    const char *name;      /* "pclmul-avx2", "portable" */
    uint32_t features;
    void (*init)(csvf_ghash_key *key, const uint8_t h[16]);
    /* y = (y xor block_0) H, ... over whole 16-byte blocks */
    void (*update)(const csvf_ghash_key *key, uint8_t y[16], const uint8_t *data, size_t blocks);
} csvf_ghash_kernel;

extern const csvf_ghash_kernel *const csvf__ghash_kernels[];   /* most preferred first, NULL-terminated (sm4/sm4_gcm.c) */
const csvf_ghash_kernel *csvf__ghash(void);                    /* dispatch.c */

#endif
