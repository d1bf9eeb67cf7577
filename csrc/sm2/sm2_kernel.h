/* SM2 kernels: the arithmetic of one instruction set behind the operations the protocols need. Internal.
 *
 * Numbers are four 64-bit limbs, least significant first. Scalars are plain integers below n; coordinates are in Montgomery form
 * (x * 2^256 mod p), fully reduced, so that tables and points are the same bytes for every kernel. */
#ifndef CSVF_SM2_KERNEL_H
#define CSVF_SM2_KERNEL_H

#include <stddef.h>
#include <stdint.h>

#include "../include/csvfast.h"

typedef struct csvf_sm2_affine {
    uint64_t x[4], y[4];   /* Montgomery form; the point at infinity has no affine form */
} csvf_sm2_affine;

/* Tables of signed windows: entry (w, i) is (i + 1) * 2^(bits * w) * P. One geometry for the base point, one for keys. */
enum {
    CSVF_SM2_BASE_BITS = 7, CSVF_SM2_BASE_WINDOWS = 37, CSVF_SM2_BASE_ENTRIES = 64,   /* 148 KiB, in read-only data */
    CSVF_SM2_KEY_BITS = 6, CSVF_SM2_KEY_WINDOWS = 43, CSVF_SM2_KEY_ENTRIES = 32       /* 86 KiB a key */
};

extern const csvf_sm2_affine csvf__sm2_base_table[CSVF_SM2_BASE_WINDOWS * CSVF_SM2_BASE_ENTRIES];   /* tools/sm2_tables.py */

struct csvf_sm2_table {
    csvf_sm2_affine point;     /* the key it belongs to */
    csvf_sm2_affine entries[CSVF_SM2_KEY_WINDOWS * CSVF_SM2_KEY_ENTRIES];
};

/* One operation at a time. "ct" below: constant time in the scalar and in the result. */
typedef struct csvf_sm2_kernel {
    const char *name;      /* "adx" (BMI2 and ADX), "portable" */
    uint32_t features;
    /* ct: out = scalar * G. The scalar is in 1 .. n - 1. */
    void (*multiply_base)(csvf_sm2_affine *out, const uint64_t scalar[4]);
    /* ct: out = scalar * point; returns 1, or 0 for infinity (scalar 0), out then all zero. */
    int (*multiply)(csvf_sm2_affine *out, const csvf_sm2_affine *point, const uint64_t scalar[4]);
    /* Is the x of s * G + t * P, taken mod n, equal to r - e (mod n)? s and t in 1 .. n - 1; x_mod_n = r - e mod n. Variable time. */
    int (*verify_var)(const uint64_t s[4], const uint64_t t[4], const csvf_sm2_affine *point, const csvf_sm2_table *table,
                      const uint64_t x_mod_n[4]);
    /* out[i] = points of the key's table (struct csvf_sm2_table.entries) for a public point. Variable time. */
    void (*fill_table_var)(csvf_sm2_table *table, const csvf_sm2_affine *point);
    /* out = point + scalar * other; returns 1, or 0 for infinity, out then all zero. Variable time. */
    int (*combine_var)(csvf_sm2_affine *out, const csvf_sm2_affine *point, const csvf_sm2_affine *other, const uint64_t scalar[4]);
    /* Field and scalar helpers the protocols need: Montgomery product mod p; product and inverse mod n of plain integers (ct). */
    void (*field_multiply)(uint64_t out[4], const uint64_t a[4], const uint64_t b[4]);
    void (*scalar_multiply)(uint64_t out[4], const uint64_t a[4], const uint64_t b[4]);
    void (*scalar_invert)(uint64_t out[4], const uint64_t a[4]);
} csvf_sm2_kernel;

/* Signatures side by side in vector lanes. */
typedef struct csvf_sm2_job {      /* one signature whose r, s were found in range */
    uint64_t s[4], t[4], x_mod_n[4];
    const csvf_sm2_affine *point;
    const csvf_sm2_table *table;   /* or NULL */
} csvf_sm2_job;

typedef struct csvf_sm2_many_kernel {
    const char *name;      /* "ifma-avx512" (8 lanes), "portable" (lanes 1, verify_var NULL: one by one with the kernel of csvf__sm2()). That
                              name, as of every primitive's last kernel, so that CSVFAST_KERNEL=portable speaks for all of them */
    uint32_t features;
    size_t lanes;
    size_t worthwhile_with_table, worthwhile_without;   /* from how many jobs of a kind on a call beats singles */
    /* valid[i] = 1 or 0. count is 1 .. lanes; either all jobs have a table, or none is used. Variable time. */
    void (*verify_var)(uint8_t *valid, const csvf_sm2_job *const *jobs, size_t count);
} csvf_sm2_many_kernel;

extern const csvf_sm2_kernel *const csvf__sm2_kernels[];             /* most preferred first, NULL-terminated (sm2/sm2.c) */
extern const csvf_sm2_many_kernel *const csvf__sm2_many_kernels[];   /* (sm2/sm2_many.c) */

const csvf_sm2_kernel *csvf__sm2(void);            /* the kernels in use now (dispatch.c) */
const csvf_sm2_many_kernel *csvf__sm2_many(void);

extern const csvf_sm2_kernel csvf__sm2_portable;
extern const csvf_sm2_many_kernel csvf__sm2_many_single;
#if defined(__x86_64__)
extern const csvf_sm2_kernel csvf__sm2_adx;
extern const csvf_sm2_many_kernel csvf__sm2_many_ifma;
#endif

#endif
