/* SM2 public-key encryption, GB/T 32918.4-2016 (6.1, 7.1), with the order C1 || C3 || C2. The cofactor h is 1. */
#include "../include/csvfast.h"
#include "../declassify.h"
#include "sm2_kernel.h"
#include "sm2_objects.h"

enum { C3 = 65, C2 = 97 };
_Static_assert(C2 == CSVF_SM2_ENCRYPTION_OVERHEAD, "C1 and C3 fill the overhead");

static int overlaps(const uint8_t *a, size_t a_length, const uint8_t *b, size_t b_length)
{
    const uintptr_t x = (uintptr_t)a, y = (uintptr_t)b;
    return x < y ? y - x < a_length : x - y < b_length;
}

/* Zero if every byte is zero. */
static uint32_t any_bit(const uint8_t *bytes, size_t length)
{
    uint32_t any = 0;
    for (size_t i = 0; i < length; i++)
        any |= bytes[i];
    return any;
}

/* C3 = SM3(x2 || M || y2) */
static void checksum(uint8_t digest[32], const uint8_t shared[64], const uint8_t *message, size_t length)
{
    csvf_sm3 sm3;
    csvf_sm3_init(&sm3);
    csvf_sm3_update(&sm3, shared, 32);
    csvf_sm3_update(&sm3, message, length);
    csvf_sm3_update(&sm3, shared + 32, 32);
    csvf_sm3_final(&sm3, digest);
    csvf_wipe(&sm3, sizeof sm3);
}

/* Replaces the key stream in `out` by its sum with `in`. */
static void add_stream(uint8_t *restrict out, const uint8_t *restrict in, size_t length)
{
    for (size_t i = 0; i < length; i++)
        out[i] ^= in[i];
}

/* The nonce is in 0 .. n - 1. CSVF_ERR_KEY: the standard asks for another; nothing was written. */
static __attribute__((noinline)) int encrypt_with(uint8_t *ciphertext, const csvf__sm2_public *key, const uint8_t *plaintext, size_t length,
                                                  const uint64_t nonce[4])
{
    const csvf_sm2_kernel *kernel = csvf__sm2();
    csvf_sm2_affine point;
    uint8_t shared[64], start[32];
    uint64_t is_zero = number_is_zero(nonce);
    csvf__declassify(&is_zero, sizeof is_zero);
    if (is_zero)
        return CSVF_ERR_KEY;
    (void)kernel->multiply(&point, &key->point, nonce);     /* finite: the key has order n */
    csvf__sm2_point_bytes(shared, &point);
    const size_t first = length < sizeof start ? length : sizeof start;
    int status = csvf_sm3_kdf(start, first, shared, sizeof shared);
    /* A longer stream whose first 32 bytes are zero is taken for all zero: a chance of 2^-256, and another nonce is always right. */
    int is_zero_stream = any_bit(start, first) == 0;     /* public: it becomes the status */
    csvf__declassify(&is_zero_stream, sizeof is_zero_stream);
    if (status == CSVF_OK && is_zero_stream)
        status = CSVF_ERR_KEY;
    if (status == CSVF_OK)
        status = csvf_sm3_kdf(ciphertext + C2, length, shared, sizeof shared);
    if (status == CSVF_OK) {
        add_stream(ciphertext + C2, plaintext, length);
        checksum(ciphertext + C3, shared, plaintext, length);
        kernel->multiply_base(&point, nonce);
        ciphertext[0] = 4;
        csvf__sm2_point_bytes(ciphertext + 1, &point);
        csvf__declassify(ciphertext, length + C2);
    }
    csvf_wipe(&point, sizeof point);
    csvf_wipe(shared, sizeof shared);
    csvf_wipe(start, sizeof start);
    return status;
}

static int check_encrypt(const uint8_t *ciphertext, const csvf_sm2_public *public_key, const uint8_t *plaintext, size_t length)
{
    if (!ciphertext || !public_key || !plaintext)
        return CSVF_ERR_ARGUMENT;
    if (length == 0 || length > UINT32_MAX)
        return CSVF_ERR_LENGTH;
    return overlaps(ciphertext, length + C2, plaintext, length) ? CSVF_ERR_OVERLAP : CSVF_OK;
}

int csvf_sm2_encrypt(uint8_t *ciphertext, const csvf_sm2_public *public_key, const uint8_t *plaintext, size_t length)
{
    uint8_t random[32];
    uint64_t nonce[4];
    int status = check_encrypt(ciphertext, public_key, plaintext, length);
    if (status != CSVF_OK)
        return status;
    const csvf__sm2_public *key = csvf__sm2_public_of(public_key);
    do {
        /* Hedged as signatures are, with the plaintext for the secret. A short plaintext may give a zero stream again and again: fresh bytes. */
        status = csvf__sm2_random(random, sizeof random);
        if (status == CSVF_OK) {
            csvf__sm2_nonce(nonce, plaintext, length, random, key->bytes, sizeof key->bytes, 0);
            status = encrypt_with(ciphertext, key, plaintext, length, nonce);
        }
    } while (status == CSVF_ERR_KEY);
    csvf_wipe(random, sizeof random);
    csvf_wipe(nonce, sizeof nonce);
    csvf__sm2_burn_stack();
    return status;
}

int csvf_sm2_encrypt_with_nonce(uint8_t *ciphertext, const csvf_sm2_public *public_key, const uint8_t *plaintext, size_t length,
                                const uint8_t nonce[32])
{
    uint64_t k[4];
    int status = nonce ? check_encrypt(ciphertext, public_key, plaintext, length) : CSVF_ERR_ARGUMENT;
    if (status != CSVF_OK)
        return status;
    number_load(k, nonce);
    uint64_t is_good = number_is_below(k, csvf__sm2_n);
    csvf__declassify(&is_good, sizeof is_good);
    status = is_good ? encrypt_with(ciphertext, csvf__sm2_public_of(public_key), plaintext, length, k) : CSVF_ERR_KEY;
    csvf_wipe(k, sizeof k);
    csvf__sm2_burn_stack();
    return status;
}

static __attribute__((noinline)) int decrypt_with(uint8_t *plaintext, const uint64_t d[4], const csvf_sm2_affine *c1,
                                                  const uint8_t *ciphertext, size_t length)
{
    csvf_sm2_affine point;
    uint8_t shared[64], digest[32];
    (void)csvf__sm2()->multiply(&point, c1, d);     /* finite: d is in 1 .. n - 2 */
    csvf__sm2_point_bytes(shared, &point);
    int status = csvf_sm3_kdf(plaintext, length, shared, sizeof shared);
    if (status == CSVF_OK) {
        /* One verdict at the end: a sender of bent ciphertexts does not learn, not by time either, which of the two checks refused. */
        const uint32_t stream_bits = any_bit(plaintext, length);
        add_stream(plaintext, ciphertext + C2, length);
        checksum(digest, shared, plaintext, length);
        int is_good = csvf_equal(digest, ciphertext + C3, sizeof digest) & (int)((0 - (uint64_t)stream_bits) >> 63);
        csvf__declassify(&is_good, sizeof is_good);
        if (!is_good)
            status = CSVF_ERR_AUTHENTICATION;
    }
    if (status != CSVF_OK)
        csvf_wipe(plaintext, length);
    csvf_wipe(&point, sizeof point);
    csvf_wipe(shared, sizeof shared);
    csvf_wipe(digest, sizeof digest);
    return status;
}

int csvf_sm2_decrypt(uint8_t *plaintext, const csvf_sm2_private *private_key, const uint8_t *ciphertext, size_t length)
{
    csvf_sm2_affine c1;
    if (!plaintext || !private_key || !ciphertext)
        return CSVF_ERR_ARGUMENT;
    if (length <= C2 || length - C2 > UINT32_MAX)
        return CSVF_ERR_LENGTH;
    if (overlaps(plaintext, length - C2, ciphertext, length))
        return CSVF_ERR_OVERLAP;
    if (ciphertext[0] != 4 || csvf__sm2_point_init(&c1, ciphertext + 1) != CSVF_OK) {
        csvf_wipe(plaintext, length - C2);
        return CSVF_ERR_POINT;
    }
    const int status = decrypt_with(plaintext, csvf__sm2_private_of(private_key)->d, &c1, ciphertext, length - C2);
    csvf__sm2_burn_stack();
    return status;
}
