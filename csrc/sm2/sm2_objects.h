/* What lies inside csvf_sm2_private and csvf_sm2_public, and what the protocols share. Internal. */
#ifndef CSVF_SM2_OBJECTS_H
#define CSVF_SM2_OBJECTS_H

#include "sm2_kernel.h"
#include "sm2_number.h"

typedef struct __attribute__((may_alias)) csvf__sm2_public {
    csvf_sm2_affine point;
    uint8_t bytes[64];         /* x || y */
} csvf__sm2_public;

typedef struct __attribute__((may_alias)) csvf__sm2_private {
    uint64_t d[4];             /* secret */
    uint64_t inverse[4];       /* secret: 1 / (1 + d) mod n */
    csvf__sm2_public public_key;
} csvf__sm2_private;

_Static_assert(sizeof(csvf__sm2_public) <= sizeof(csvf_sm2_public), "csvf_sm2_public is too small");
_Static_assert(sizeof(csvf__sm2_private) <= sizeof(csvf_sm2_private), "csvf_sm2_private is too small");

static inline const csvf__sm2_public *csvf__sm2_public_of(const csvf_sm2_public *p) { return (const csvf__sm2_public *)p; }
static inline const csvf__sm2_private *csvf__sm2_private_of(const csvf_sm2_private *p) { return (const csvf__sm2_private *)p; }

/* x || y of a point, and a point of x || y: CSVF_ERR_POINT unless both are below p and on the curve. */
void csvf__sm2_point_bytes(uint8_t bytes[64], const csvf_sm2_affine *point);
int csvf__sm2_point_init(csvf_sm2_affine *point, const uint8_t bytes[64]);

/* Bytes of the operating system's generator: CSVF_OK or CSVF_ERR_SYSTEM (errno says how; out is wiped). */
int csvf__sm2_random(uint8_t *out, size_t length);

/* A scalar below n (0 has a chance of 2^-256) out of key, context, 32 random bytes and a counter: HMAC-SM3 under `key` of
 * random || context || 2 counter and of random || context || 2 counter + 1, 512 bits in all, reduced mod n. */
void csvf__sm2_nonce(uint64_t nonce[4], const uint8_t *key, size_t key_length, const uint8_t random[32], const uint8_t *context,
                     size_t context_length, uint8_t counter);

/* wide mod n, the first 32 bytes most significant. Constant time. */
void csvf__sm2_reduce_wide(uint64_t out[4], const uint8_t wide[64]);

/* The numbers of one verification. Returns CSVF_OK, CSVF_ERR_AUTHENTICATION (r or s outside 1 .. n - 1, r + s = n) or CSVF_ERR_ARGUMENT (NULL, or
 * the table of another key); r = e mod n leaves x_mod_n = 0, which is a job like any other. */
int csvf__sm2_job_init_var(csvf_sm2_job *job, const csvf_sm2_check *check);

/* Overwrites the stack below the caller's frame: what compilers spilled there is out of reach of any other wipe. */
void csvf__sm2_burn_stack(void);

#endif
