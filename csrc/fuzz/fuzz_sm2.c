/* libFuzzer target: SM2 over arbitrary bytes. Whatever public_init accepts has one point in all its encodings; single verification, verification of
 * many, with a table and without, say the same under every kernel; what is signed verifies and what is changed does not; what is encrypted
 * decrypts, what is changed is refused and wiped; both sides of an agreement end with one key. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../include/csvfast.h"

#define CHECK(condition) do { if (!(condition)) { fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); abort(); } } while (0)

typedef struct parameters {
    uint8_t d[32], nonce[32], digest[32], signature[64];
    uint8_t flip_at, flip, lanes, choice;
} parameters;

enum { WITH_TABLE = 1, PARSED_KEY = 2, AGREE = 4, MOST_LANES = 20 };

static uint8_t *exact(const void *data, size_t length)     /* so that ASan sees every byte past the end */
{
    uint8_t *copy = malloc(length ? length : 1);
    CHECK(copy);
    if (length)
        memcpy(copy, data, length);
    return copy;
}

/* Sets *key if the bytes are an encoding of a point. */
static int parse_public(csvf_sm2_public *key, const uint8_t *data, size_t length)
{
    csvf_sm2_public again;
    uint8_t point[65], same[64];
    uint8_t *encoded = exact(data, length);
    const int status = csvf_sm2_public_init(key, encoded, length);
    free(encoded);
    if (status != CSVF_OK) {
        CHECK(status == CSVF_ERR_LENGTH || status == CSVF_ERR_POINT);
        CHECK(status == CSVF_ERR_POINT || !(length == 33 || length == 64 || length == 65));
        return 0;
    }
    csvf_sm2_public_bytes(point + 1, key);
    const uint8_t parity = point[64] & 1;
    const struct { uint8_t first; size_t length; int status; } forms[] = {
        {4, 65, CSVF_OK}, {(uint8_t)(6 + parity), 65, CSVF_OK}, {(uint8_t)(2 + parity), 33, CSVF_OK},
        {(uint8_t)(7 - parity), 65, CSVF_ERR_POINT}, {5, 65, CSVF_ERR_POINT}, {4, 33, CSVF_ERR_POINT}};
    for (size_t i = 0; i < sizeof forms / sizeof forms[0]; i++) {
        point[0] = forms[i].first;
        CHECK(csvf_sm2_public_init(&again, point, forms[i].length) == forms[i].status);
        if (forms[i].status != CSVF_OK)
            continue;
        csvf_sm2_public_bytes(same, &again);
        CHECK(!memcmp(same, point + 1, 64));
    }
    CHECK(csvf_sm2_public_init(&again, point + 1, 64) == CSVF_OK);
    return 1;
}

/* Every way to verify must agree; returns what they say. */
static int verify_all_ways(const csvf_sm2_public *key, const csvf_sm2_table *table, const uint8_t *signature, const uint8_t *digest,
                           size_t lanes)
{
    csvf_sm2_check checks[MOST_LANES];
    uint8_t valid[MOST_LANES];
    int first = -1;
    const char *name;
    for (size_t k = 0; (name = csvf_kernel_at(CSVF_PRIMITIVE_SM2, k)); k++) {
        if (!csvf_kernel_available(CSVF_PRIMITIVE_SM2, name))
            continue;
        CHECK(csvf_force_kernel(CSVF_PRIMITIVE_SM2, name) == CSVF_OK);
        const int status = csvf_sm2_verify_digest_var(key, NULL, signature, digest);
        CHECK(status == CSVF_OK || status == CSVF_ERR_AUTHENTICATION);
        if (first < 0)
            first = status == CSVF_OK;
        CHECK(first == (status == CSVF_OK));
        CHECK(!table || csvf_sm2_verify_digest_var(key, table, signature, digest) == status);
    }
    CHECK(csvf_force_kernel(CSVF_PRIMITIVE_SM2, NULL) == CSVF_OK);
    for (size_t k = 0; (name = csvf_kernel_at(CSVF_PRIMITIVE_SM2_MANY, k)); k++) {
        if (!csvf_kernel_available(CSVF_PRIMITIVE_SM2_MANY, name))
            continue;
        CHECK(csvf_force_kernel(CSVF_PRIMITIVE_SM2_MANY, name) == CSVF_OK);
        for (size_t i = 0; i < lanes; i++)
            checks[i] = (csvf_sm2_check){key, i % 2 ? table : NULL, signature, digest};
        CHECK(csvf_sm2_verify_many_var(valid, checks, lanes) == CSVF_OK);
        for (size_t i = 0; i < lanes; i++)
            CHECK(valid[i] == first);
    }
    CHECK(csvf_force_kernel(CSVF_PRIMITIVE_SM2_MANY, NULL) == CSVF_OK);
    return first;
}

static void signatures(const parameters *p, const csvf_sm2_private *private_key, const csvf_sm2_public *public_key, size_t lanes)
{
    csvf_sm2_table *table = NULL;
    uint8_t signature[64], digest[32];
    if (p->choice & WITH_TABLE)
        CHECK(csvf_sm2_table_create(&table, public_key) == CSVF_OK);
    (void)verify_all_ways(public_key, table, p->signature, p->digest, lanes);     /* hardly ever valid */
    int status = csvf_sm2_sign_digest_with_nonce(signature, private_key, p->digest, p->nonce);
    CHECK(status == CSVF_OK || status == CSVF_ERR_KEY);
    if (status != CSVF_OK)
        CHECK(csvf_sm2_sign_digest(signature, private_key, p->digest) == CSVF_OK);
    memcpy(digest, p->digest, 32);
    CHECK(verify_all_ways(public_key, table, signature, digest, lanes) == 1);
    if (p->flip_at % 96 < 64)
        signature[p->flip_at % 96] ^= p->flip;
    else
        digest[p->flip_at % 96 - 64] ^= p->flip;
    /* One byte of e changed by a multiple of n? n has no factor below 2^16, so never: e and e + delta 256^i differ mod n. */
    CHECK(verify_all_ways(public_key, table, signature, digest, lanes) == !p->flip);
    csvf_sm2_table_destroy(table);
}

static void encryption(const parameters *p, const csvf_sm2_private *private_key, const csvf_sm2_public *public_key, const uint8_t *data,
                       size_t size)
{
    const size_t overhead = CSVF_SM2_ENCRYPTION_OVERHEAD;
    uint8_t *plain = exact(data, size), *cipher = malloc(size + overhead), *out = malloc(size + 1);
    CHECK(cipher && out);
    int status = csvf_sm2_encrypt_with_nonce(cipher, public_key, plain, size, p->nonce);
    CHECK(status == CSVF_OK || status == (size ? CSVF_ERR_KEY : CSVF_ERR_LENGTH));
    if (size && status != CSVF_OK)
        status = csvf_sm2_encrypt(cipher, public_key, plain, size);
    if (status == CSVF_OK) {
        CHECK(csvf_sm2_decrypt(out, private_key, cipher, size + overhead) == CSVF_OK);
        CHECK(!memcmp(out, plain, size));
        if (p->flip) {
            cipher[(p->flip_at * 7 + p->lanes) % (size + overhead)] ^= p->flip;
            memset(out, 0xA5, size);
            status = csvf_sm2_decrypt(out, private_key, cipher, size + overhead);
            CHECK(status == CSVF_ERR_POINT || status == CSVF_ERR_AUTHENTICATION);
            for (size_t i = 0; i < size; i++)
                CHECK(out[i] == 0);
        }
    }
    /* the input as a ciphertext: refused, unless the fuzzer learns to hash */
    status = csvf_sm2_decrypt(out, private_key, plain, size);
    CHECK(status == (size > overhead ? CSVF_ERR_POINT : CSVF_ERR_LENGTH) || (size > overhead && (status == CSVF_ERR_AUTHENTICATION || !status)));
    free(plain);
    free(cipher);
    free(out);
}

static void agreement(const parameters *p, const csvf_sm2_private *private_key, const csvf_sm2_public *public_key)
{
    csvf_sm2_private ephemeral;
    csvf_sm2_public ephemeral_public;
    uint8_t z[32], key[2][40], confirmation[2][64];
    if (csvf_sm2_private_init(&ephemeral, p->nonce) != CSVF_OK)
        return;
    csvf_sm2_private_public(&ephemeral_public, &ephemeral);
    CHECK(csvf_sm2_z(z, public_key, p->signature, p->lanes % 65u) == CSVF_OK);
    /* one with oneself, the roles of the long-term and the ephemeral key exchanged */
    const int a = csvf_sm2_agree(key[0], 40, confirmation[0], 1, private_key, &ephemeral, z, &ephemeral_public, public_key, p->digest);
    const int b = csvf_sm2_agree(key[1], 40, confirmation[1], 0, &ephemeral, private_key, p->digest, public_key, &ephemeral_public, z);
    CHECK(a == b && (a == CSVF_OK || a == CSVF_ERR_POINT));
    CHECK(a != CSVF_OK || (!memcmp(key[0], key[1], 40) && !memcmp(confirmation[0], confirmation[1], 64)));
    csvf_wipe(&ephemeral, sizeof ephemeral);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    parameters p;
    csvf_sm2_public parsed, public_key;
    csvf_sm2_private private_key;
    if (size < sizeof p)
        return 0;
    memcpy(&p, data, sizeof p);
    data += sizeof p;
    size -= sizeof p;
    const size_t lanes = p.lanes % (MOST_LANES + 1);
    int has_parsed = parse_public(&parsed, data, size);
    if (size >= 65)
        has_parsed |= parse_public(&parsed, data, p.choice & 64 ? 65 : 64);
    if (!has_parsed) {                      /* half of all x are of a point */
        uint8_t compressed[33] = {(uint8_t)(2 + (p.choice >> 7))};
        memcpy(compressed + 1, p.digest, 32);
        has_parsed = parse_public(&parsed, compressed, 33);
    }
    if (has_parsed && p.choice & PARSED_KEY)
        (void)verify_all_ways(&parsed, NULL, p.signature, p.digest, lanes);
    const int status = csvf_sm2_private_init(&private_key, p.d);
    if (status != CSVF_OK) {
        CHECK(status == CSVF_ERR_KEY);
        return 0;
    }
    csvf_sm2_private_public(&public_key, &private_key);
    uint8_t d[32];
    csvf_sm2_private_bytes(d, &private_key);
    CHECK(!memcmp(d, p.d, 32));
    signatures(&p, &private_key, &public_key, lanes);
    encryption(&p, &private_key, &public_key, data, size);
    if (p.choice & AGREE)
        agreement(&p, &private_key, &public_key);
    csvf_wipe(&private_key, sizeof private_key);
    return 0;
}
