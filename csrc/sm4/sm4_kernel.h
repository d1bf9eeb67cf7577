/* What an SM4 kernel is: a name, the CPU features it needs, and functions over many independent blocks. Internal.
 *
 * Width is the kernel's business: every function takes any number of blocks, including 0 and 1. All functions are constant
 * time in keys, data and tweaks. `out` equals `in` or does not overlap it. No alignment is needed anywhere. */
#ifndef CSVF_SM4_KERNEL_H
#define CSVF_SM4_KERNEL_H

#include <stddef.h>
#include <stdint.h>

/* Round keys of one key and one direction, in the form of the kernel that expanded them (opaque to everyone else). */
typedef struct csvf_sm4_schedule {
    uint32_t words[192];
} csvf_sm4_schedule;

typedef struct csvf_sm4_kernel {
    const char *name;       /* "gfni-avx512", "gfni-avx2", "aesni-avx2", "portable" */
    uint32_t features;      /* csvf__cpu() bits needed */

    /* Expands a key for encryption and, unless dec is NULL, for decryption. */
    void (*expand)(csvf_sm4_schedule *enc, csvf_sm4_schedule *dec, const uint8_t key[16]);

    /* out[i] = E(in[i]) (or D with the decryption schedule). */
    void (*ecb)(const csvf_sm4_schedule *schedule, uint8_t *out, const uint8_t *in, size_t blocks);

    /* out = in xor E(counter), E(counter + 1), ...; counter is 128-bit big-endian and is left advanced by `blocks`. */
    void (*ctr)(const csvf_sm4_schedule *schedule, uint8_t *out, const uint8_t *in, size_t blocks, uint8_t counter[16]);

    /* Runs of consecutive blocks, each run with its own first tweak: run r covers blocks [r * run_blocks, (r+1) * run_blocks)
     * of the buffers, and block j of it is C = E(P xor T) xor T with T = tweaks[16 r ..] * alpha^j in the order of
     * `standard` (csvf_standard). This is the bulk path: run_blocks = 256 for pages. */
    void (*xts)(const csvf_sm4_schedule *schedule, int standard, uint8_t *out, const uint8_t *in, const uint8_t *tweaks,
                size_t run_blocks, size_t runs);

    /* C[i] = E(P[i] xor T[i]) xor T[i] with a tweak given for every block. tweaks may not overlap out. */
    void (*xex)(const csvf_sm4_schedule *schedule, uint8_t *out, const uint8_t *in, const uint8_t *tweaks, size_t blocks);

    /* Tweaks of short runs: out[16 (i * count + j)] = bases[16 i ..] * alpha^(powers[i] + j), for i < runs, j < count.
     * powers may be NULL (all 0); each is public and below 2^20. out may not overlap bases. */
    void (*tweaks)(int standard, uint8_t *out, const uint8_t *bases, const uint32_t *powers, size_t count, size_t runs);

    /* Optional; NULL = the caller makes it of `tweaks` and `xex`. Lines of four blocks: block j of line i has the tweak
     * bases[16 i ..] * alpha^(powers[i] + j); each power is public, a multiple of 4 and below 256. */
    void (*lines)(const csvf_sm4_schedule *schedule, int standard, uint8_t *out, const uint8_t *in, const uint8_t *bases,
                  const uint32_t *powers, size_t count);
} csvf_sm4_kernel;

/* Compiled-in kernels, most preferred first, NULL-terminated (sm4/sm4.c). */
extern const csvf_sm4_kernel *const csvf__sm4_kernels[];

/* The kernel in use now (dispatch.c). */
const csvf_sm4_kernel *csvf__sm4(void);

/* Kernel tables, one per file: sm4_portable.c sm4_aesni_avx2.c sm4_gfni_avx2.c sm4_gfni_avx512.c */
extern const csvf_sm4_kernel csvf__sm4_portable;
#if defined(__x86_64__)
extern const csvf_sm4_kernel csvf__sm4_aesni_avx2;
extern const csvf_sm4_kernel csvf__sm4_gfni_avx2;
extern const csvf_sm4_kernel csvf__sm4_gfni_avx512;
#endif

/* alpha-powers in portable C (sm4/sm4_tweak.c); the default for a kernel's `tweaks`. */
void csvf__sm4_tweaks_portable(int standard, uint8_t *out, const uint8_t *bases, const uint32_t *powers, size_t count,
                               size_t runs);

#endif
