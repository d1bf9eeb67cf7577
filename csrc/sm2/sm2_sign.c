/* SM2 signatures, GB/T 32918.2-2016: Z and e (5.5, 6.1), signing (6.1), verification (7.1), tables of keys that verify often. */
#include <stdlib.h>

#include "../include/csvfast.h"
#include "../declassify.h"
#include "sm2_kernel.h"
#include "sm2_objects.h"

/* a || b || xG || yG */
static const uint8_t CURVE[128] = {
    0xff, 0xff, 0xff, 0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    0xff, 0xff, 0xff, 0xff, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfc,
    0x28, 0xe9, 0xfa, 0x9e, 0x9d, 0x9f, 0x5e, 0x34, 0x4d, 0x5a, 0x9e, 0x4b, 0xcf, 0x65, 0x09, 0xa7,
    0xf3, 0x97, 0x89, 0xf5, 0x15, 0xab, 0x8f, 0x92, 0xdd, 0xbc, 0xbd, 0x41, 0x4d, 0x94, 0x0e, 0x93,
    0x32, 0xc4, 0xae, 0x2c, 0x1f, 0x19, 0x81, 0x19, 0x5f, 0x99, 0x04, 0x46, 0x6a, 0x39, 0xc9, 0x94,
    0x8f, 0xe3, 0x0b, 0xbf, 0xf2, 0x66, 0x0b, 0xe1, 0x71, 0x5a, 0x45, 0x89, 0x33, 0x4c, 0x74, 0xc7,
    0xbc, 0x37, 0x36, 0xa2, 0xf4, 0xf6, 0x77, 0x9c, 0x59, 0xbd, 0xce, 0xe3, 0x6b, 0x69, 0x21, 0x53,
    0xd0, 0xa9, 0x87, 0x7c, 0xc6, 0x2a, 0x47, 0x40, 0x02, 0xdf, 0x32, 0xe5, 0x21, 0x39, 0xf0, 0xa0,
};

static int identity_hash(uint8_t z[32], const csvf__sm2_public *key, const uint8_t *id, size_t id_length)
{
    if (!id && id_length)
        return CSVF_ERR_ARGUMENT;
    if (id_length > CSVF_SM2_ID_MAX)
        return CSVF_ERR_LENGTH;
    const uint8_t bits[2] = {(uint8_t)(id_length >> 5), (uint8_t)(id_length << 3)};
    csvf_sm3 sm3;
    csvf_sm3_init(&sm3);
    csvf_sm3_update(&sm3, bits, sizeof bits);
    csvf_sm3_update(&sm3, id, id_length);
    csvf_sm3_update(&sm3, CURVE, sizeof CURVE);
    csvf_sm3_update(&sm3, key->bytes, 64);
    csvf_sm3_final(&sm3, z);
    return CSVF_OK;
}

static int message_hash(uint8_t digest[32], const csvf__sm2_public *key, const uint8_t *id, size_t id_length, const void *message,
                        size_t length)
{
    uint8_t z[32];
    csvf_sm3 sm3;
    if (!message && length)
        return CSVF_ERR_ARGUMENT;
    const int status = identity_hash(z, key, id, id_length);
    if (status != CSVF_OK)
        return status;
    csvf_sm3_init(&sm3);
    csvf_sm3_update(&sm3, z, sizeof z);
    csvf_sm3_update(&sm3, message, length);
    csvf_sm3_final(&sm3, digest);
    return CSVF_OK;
}

int csvf_sm2_z(uint8_t z[32], const csvf_sm2_public *public_key, const uint8_t *id, size_t id_length)
{
    return z && public_key ? identity_hash(z, csvf__sm2_public_of(public_key), id, id_length) : CSVF_ERR_ARGUMENT;
}

int csvf_sm2_digest(uint8_t digest[32], const csvf_sm2_public *public_key, const uint8_t *id, size_t id_length, const void *message,
                    size_t length)
{
    if (!digest || !public_key)
        return CSVF_ERR_ARGUMENT;
    return message_hash(digest, csvf__sm2_public_of(public_key), id, id_length, message, length);
}

/* ---- Signing ---------------------------------------------------------------------------------------------------------- */

/* out = e mod n: 2^256 < 2 n */
static void load_digest(uint64_t out[4], const uint8_t digest[32])
{
    number_load(out, digest);
    number_reduce_once(out, 0, out, csvf__sm2_n);
}

/* r = e + x(k G), s = (k - r d) / (1 + d) = (k + r) / (1 + d) - r, mod n. The nonce is in 0 .. n - 1. Returns CSVF_ERR_KEY where the standard asks
 * for another nonce; that it does is public, with a chance of 2^-254 for an honest nonce. */
static int sign_with(uint8_t signature[64], const csvf__sm2_private *key, const uint8_t digest[32], const uint64_t nonce[4])
{
    const csvf_sm2_kernel *kernel = csvf__sm2();
    csvf_sm2_affine point;
    uint64_t r[4], s[4], sum[4];
    uint8_t bytes[64];
    kernel->multiply_base(&point, nonce);
    csvf__sm2_point_bytes(bytes, &point);
    number_load(sum, bytes);
    number_reduce_once(sum, 0, sum, csvf__sm2_n);
    load_digest(r, digest);
    number_add_modulo(r, r, sum, csvf__sm2_n);
    number_add_modulo(sum, nonce, r, csvf__sm2_n);
    kernel->scalar_multiply(s, sum, key->inverse);
    number_subtract_modulo(s, s, r, csvf__sm2_n);
    uint64_t is_bad = number_is_zero(nonce) | number_is_zero(r) | number_is_zero(sum) | number_is_zero(s);
    csvf__declassify(&is_bad, sizeof is_bad);
    if (!is_bad) {
        number_store(signature, r);
        number_store(signature + 32, s);
        csvf__declassify(signature, 64);
    }
    csvf_wipe(&point, sizeof point);
    csvf_wipe(bytes, sizeof bytes);
    csvf_wipe(r, sizeof r);
    csvf_wipe(s, sizeof s);
    csvf_wipe(sum, sizeof sum);
    return is_bad ? CSVF_ERR_KEY : CSVF_OK;
}

static __attribute__((noinline)) int sign_hedged(uint8_t signature[64], const csvf__sm2_private *key, const uint8_t digest[32])
{
    uint8_t random[32], d[32];
    uint64_t nonce[4];
    int status = csvf__sm2_random(random, sizeof random);
    if (status != CSVF_OK)
        return status;
    number_store(d, key->d);
    uint8_t counter = 0;
    do {
        csvf__sm2_nonce(nonce, d, sizeof d, random, digest, 32, counter++);
        status = sign_with(signature, key, digest, nonce);
    } while (status == CSVF_ERR_KEY);
    csvf_wipe(random, sizeof random);
    csvf_wipe(d, sizeof d);
    csvf_wipe(nonce, sizeof nonce);
    return status;
}

int csvf_sm2_sign_digest(uint8_t signature[64], const csvf_sm2_private *private_key, const uint8_t digest[32])
{
    if (!signature || !private_key || !digest)
        return CSVF_ERR_ARGUMENT;
    const int status = sign_hedged(signature, csvf__sm2_private_of(private_key), digest);
    csvf__sm2_burn_stack();
    return status;
}

int csvf_sm2_sign(uint8_t signature[64], const csvf_sm2_private *private_key, const uint8_t *id, size_t id_length, const void *message,
                  size_t length)
{
    uint8_t digest[32];
    if (!signature || !private_key)
        return CSVF_ERR_ARGUMENT;
    const int status = message_hash(digest, &csvf__sm2_private_of(private_key)->public_key, id, id_length, message, length);
    return status == CSVF_OK ? csvf_sm2_sign_digest(signature, private_key, digest) : status;
}

int csvf_sm2_sign_digest_with_nonce(uint8_t signature[64], const csvf_sm2_private *private_key, const uint8_t digest[32],
                                    const uint8_t nonce[32])
{
    uint64_t k[4];
    if (!signature || !private_key || !digest || !nonce)
        return CSVF_ERR_ARGUMENT;
    number_load(k, nonce);
    uint64_t is_good = number_is_below(k, csvf__sm2_n) & ~number_is_zero(k);
    csvf__declassify(&is_good, sizeof is_good);
    const int status = is_good ? sign_with(signature, csvf__sm2_private_of(private_key), digest, k) : CSVF_ERR_KEY;
    csvf_wipe(k, sizeof k);
    csvf__sm2_burn_stack();
    return status;
}

/* ---- Verification ----------------------------------------------------------------------------------------------------- */

int csvf_sm2_table_create(csvf_sm2_table **table, const csvf_sm2_public *public_key)
{
    if (!table || !public_key)
        return CSVF_ERR_ARGUMENT;
    csvf_sm2_table *made = aligned_alloc(64, (sizeof *made + 63) / 64 * 64);
    if (!made)
        return CSVF_ERR_MEMORY;
    csvf__sm2()->fill_table_var(made, &csvf__sm2_public_of(public_key)->point);
    *table = made;
    return CSVF_OK;
}

void csvf_sm2_table_destroy(csvf_sm2_table *table) { free(table); }

int csvf__sm2_job_init_var(csvf_sm2_job *job, const csvf_sm2_check *check)
{
    uint64_t r[4], e[4];
    if (!check->public_key || !check->signature || !check->digest)
        return CSVF_ERR_ARGUMENT;
    job->point = &csvf__sm2_public_of(check->public_key)->point;
    job->table = check->table;
    if (job->table && memcmp(&job->table->point, job->point, sizeof *job->point))
        return CSVF_ERR_ARGUMENT;
    number_load(r, check->signature);
    number_load(job->s, check->signature + 32);
    if (number_is_zero(r) || number_is_zero(job->s) || !number_is_below(r, csvf__sm2_n) || !number_is_below(job->s, csvf__sm2_n))
        return CSVF_ERR_AUTHENTICATION;
    number_add_modulo(job->t, r, job->s, csvf__sm2_n);
    if (number_is_zero(job->t))
        return CSVF_ERR_AUTHENTICATION;
    load_digest(e, check->digest);
    number_subtract_modulo(job->x_mod_n, r, e, csvf__sm2_n);
    return CSVF_OK;
}

int csvf_sm2_verify_digest_var(const csvf_sm2_public *public_key, const csvf_sm2_table *table, const uint8_t signature[64],
                               const uint8_t digest[32])
{
    const csvf_sm2_check check = {public_key, table, signature, digest};
    csvf_sm2_job job;
    const int status = csvf__sm2_job_init_var(&job, &check);
    if (status != CSVF_OK)
        return status;
    return csvf__sm2()->verify_var(job.s, job.t, job.point, job.table, job.x_mod_n) ? CSVF_OK : CSVF_ERR_AUTHENTICATION;
}

int csvf_sm2_verify_var(const csvf_sm2_public *public_key, const csvf_sm2_table *table, const uint8_t signature[64], const uint8_t *id,
                        size_t id_length, const void *message, size_t length)
{
    uint8_t digest[32];
    if (!public_key)
        return CSVF_ERR_ARGUMENT;
    const int status = message_hash(digest, csvf__sm2_public_of(public_key), id, id_length, message, length);
    return status == CSVF_OK ? csvf_sm2_verify_digest_var(public_key, table, signature, digest) : status;
}
