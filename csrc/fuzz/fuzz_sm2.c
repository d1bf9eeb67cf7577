/* libFuzzer target: SM2 over arbitrary bytes. The first byte chooses ONE operation, the second the kernels, so that an input costs a few multiplications
 * and a campaign gets far; keys that serve many inputs, and their tables, are made once.
 *
 * Whatever public_init accepts has one point in all its encodings; two ways of verification, drawn from kernels, table and lanes, say the
 * same; what is signed verifies and what is changed does not; what is encrypted decrypts, what is changed is refused and wiped; both
 * sides of an agreement end with one key; a batch of good and bad signatures gets its own answer in every place. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../include/csvfast.h"

#define CHECK(condition) do { if (!(condition)) { fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); abort(); } } while (0)

/* Input: operation, kernels, then what the operation takes; where the input ends, zeros follow. */
typedef struct stream {
    const uint8_t *data;
    size_t left;
} stream;

static void take(stream *in, void *out, size_t length)
{
    const size_t have = length < in->left ? length : in->left;
    memset(out, 0, length);
    if (have)
        memcpy(out, in->data, have);
    in->data += have;
    in->left -= have;
}

static uint8_t take_byte(stream *in)
{
    uint8_t byte;
    take(in, &byte, 1);
    return byte;
}

static uint8_t *exact(const void *data, size_t length)     /* so that ASan sees every byte past the end */
{
    uint8_t *copy = malloc(length ? length : 1);
    CHECK(copy);
    if (length)
        memcpy(copy, data, length);
    return copy;
}

/* ---- Keys that every input shares ---- */

enum { KEYS = 4, MOST_LANES = 20 };

static const uint8_t ORDER[32] = {0xff, 0xff, 0xff, 0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
                                  0x72, 0x03, 0xdf, 0x6b, 0x21, 0xc6, 0x05, 0x2b, 0x53, 0xbb, 0xf4, 0x09, 0x39, 0xd5, 0x41, 0x23};

static csvf_sm2_private private_keys[KEYS];     /* 1, n - 2, 2, and one like any other */
static csvf_sm2_public public_keys[KEYS];
static csvf_sm2_table *tables[KEYS];
static uint8_t signatures[KEYS][64], digests[KEYS][32];

static void prepare(void)
{
    static int done;
    uint8_t d[KEYS][32] = {{0}};
    if (done)
        return;
    done = 1;
    d[0][31] = 1;
    memcpy(d[1], ORDER, 32);
    d[1][31] -= 2;
    d[2][31] = 2;
    memset(d[3], 0x5c, 32);
    for (int i = 0; i < KEYS; i++) {
        memset(digests[i], 17 * i, 32);
        CHECK(csvf_sm2_private_init(&private_keys[i], d[i]) == CSVF_OK);
        csvf_sm2_private_public(&public_keys[i], &private_keys[i]);
        CHECK(csvf_sm2_table_create(&tables[i], &public_keys[i]) == CSVF_OK);
        CHECK(csvf_sm2_sign_digest_with_nonce(signatures[i], &private_keys[i], digests[i], d[3]) == CSVF_OK);
    }
}

/* ---- Kernels ---- */

/* The index-th kernel this CPU can run, counted round. */
static void force(int primitive, unsigned index)
{
    unsigned usable = 0;
    for (size_t k = 0; k < csvf_kernel_count(primitive); k++)
        usable += (unsigned)csvf_kernel_available(primitive, csvf_kernel_at(primitive, k));
    index %= usable;
    for (size_t k = 0; k < csvf_kernel_count(primitive); k++)
        if (csvf_kernel_available(primitive, csvf_kernel_at(primitive, k)) && index-- == 0)
            CHECK(csvf_force_kernel(primitive, csvf_kernel_at(primitive, k)) == CSVF_OK);
}

/* Verifies in the way `way` says: kernel, table or none, alone or in one of many lanes. */
static int verify_in_way(unsigned way, const csvf_sm2_public *key, const csvf_sm2_table *table, const uint8_t *signature,
                         const uint8_t *digest)
{
    const csvf_sm2_table *used = way & 1 ? table : NULL;
    force(CSVF_PRIMITIVE_SM2, way >> 1 & 1);
    if (way & 4) {
        csvf_sm2_check checks[MOST_LANES];
        uint8_t valid[MOST_LANES];
        const size_t count = 1 + (way >> 4) % MOST_LANES;
        force(CSVF_PRIMITIVE_SM2_MANY, way >> 3 & 1);
        for (size_t i = 0; i < count; i++)
            checks[i] = (csvf_sm2_check){key, used, signature, digest};
        CHECK(csvf_sm2_verify_many_var(valid, checks, count) == CSVF_OK);
        for (size_t i = 1; i < count; i++)
            CHECK(valid[i] == valid[0]);
        return valid[0];
    }
    const int status = csvf_sm2_verify_digest_var(key, used, signature, digest);
    CHECK(status == CSVF_OK || status == CSVF_ERR_AUTHENTICATION);
    return status == CSVF_OK;
}

/* ---- Operations ---- */

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

static void encodings(stream *in)
{
    csvf_sm2_public key;
    (void)parse_public(&key, in->data, in->left);
    if (in->left > 65)
        (void)parse_public(&key, in->data, 65);
    if (in->left > 33)
        (void)parse_public(&key, in->data, 33);
}

/* Any signature, a parsed key or one of ours: two ways must agree. */
static void two_ways(stream *in)
{
    csvf_sm2_public parsed;
    uint8_t signature[64], digest[32], encoded[33];
    const unsigned which = take_byte(in), one = take_byte(in), other = take_byte(in);
    take(in, signature, 64);
    take(in, digest, 32);
    if (which & 128 && (take(in, encoded, 33), parse_public(&parsed, encoded, 33))) {
        CHECK(verify_in_way(one & ~1u, &parsed, NULL, signature, digest) == verify_in_way(other & ~1u, &parsed, NULL, signature, digest));
        return;
    }
    const unsigned k = which % KEYS;
    CHECK(verify_in_way(one, &public_keys[k], tables[k], signature, digest) == verify_in_way(other, &public_keys[k], tables[k], signature, digest));
}

static void sign_and_spoil(stream *in)
{
    uint8_t signature[64], digest[32], nonce[32];
    const unsigned which = take_byte(in) % KEYS, one = take_byte(in), other = take_byte(in), at = take_byte(in) % 96, flip = take_byte(in);
    /* s + delta stands for the point (nonce + delta (1 + d)) G: whoever chooses nonce and delta makes it -nonce G, of the same x, and the
     * signature valid again. One changed byte can do that where 1 + d is small, so s is spoiled under the ordinary key only. */
    const unsigned k = at >= 32 && at < 64 ? KEYS - 1 : which;
    take(in, nonce, 32);
    take(in, digest, 32);
    int status = csvf_sm2_sign_digest_with_nonce(signature, &private_keys[k], digest, nonce);
    CHECK(status == CSVF_OK || status == CSVF_ERR_KEY);
    if (status != CSVF_OK)
        CHECK(csvf_sm2_sign_digest(signature, &private_keys[k], digest) == CSVF_OK);
    CHECK(verify_in_way(one, &public_keys[k], tables[k], signature, digest) == 1);
    if (at < 64)
        signature[at] ^= (uint8_t)flip;
    else
        digest[at - 64] ^= (uint8_t)flip;
    /* One byte of e changed by a multiple of n? n has no factor below 2^16, so never: e and e + delta 256^i differ mod n. */
    CHECK(verify_in_way(other, &public_keys[k], tables[k], signature, digest) == !flip);
}

static void encryption(stream *in)
{
    const size_t overhead = CSVF_SM2_ENCRYPTION_OVERHEAD;
    const unsigned k = take_byte(in) % KEYS, at = take_byte(in), flip = take_byte(in);
    uint8_t nonce[32];
    take(in, nonce, 32);
    const size_t size = in->left;
    uint8_t *plain = exact(in->data, size), *cipher = malloc(size + overhead), *out = malloc(size + 1);
    CHECK(cipher && out);
    int status = csvf_sm2_encrypt_with_nonce(cipher, &public_keys[k], plain, size, nonce);
    CHECK(status == CSVF_OK || status == (size ? CSVF_ERR_KEY : CSVF_ERR_LENGTH));
    if (size && status != CSVF_OK)
        status = csvf_sm2_encrypt(cipher, &public_keys[k], plain, size);
    if (status == CSVF_OK) {
        CHECK(csvf_sm2_decrypt(out, &private_keys[k], cipher, size + overhead) == CSVF_OK);
        CHECK(!memcmp(out, plain, size));
        if (flip) {
            cipher[at * 7 % (size + overhead)] ^= (uint8_t)flip;
            memset(out, 0xA5, size);
            status = csvf_sm2_decrypt(out, &private_keys[k], cipher, size + overhead);
            CHECK(status == CSVF_ERR_POINT || status == CSVF_ERR_AUTHENTICATION);
            for (size_t i = 0; i < size; i++)
                CHECK(out[i] == 0);
        }
    }
    free(plain);
    free(cipher);
    free(out);
}

/* The input as a ciphertext, as it comes or behind the C1 of a known point: refused and wiped, unless the fuzzer learns to hash. */
static void ciphertexts(stream *in)
{
    const unsigned choice = take_byte(in);
    const size_t size = in->left, overhead = CSVF_SM2_ENCRYPTION_OVERHEAD;
    uint8_t *cipher = exact(in->data, size), *out = malloc(size + 1);
    CHECK(out);
    memset(out, 0xA5, size + 1);
    if (choice & 128 && size > 65) {
        cipher[0] = 4;
        csvf_sm2_public_bytes(cipher + 1, &public_keys[choice / 4 % KEYS]);
    }
    const int status = csvf_sm2_decrypt(out, &private_keys[choice % KEYS], cipher, size);
    if (size <= overhead)
        CHECK(status == CSVF_ERR_LENGTH);
    else
        CHECK(status == CSVF_OK || status == CSVF_ERR_POINT || status == CSVF_ERR_AUTHENTICATION);
    const size_t written = size > overhead ? size - overhead : 0;
    for (size_t i = 0; i <= size; i++)
        CHECK(i >= written ? out[i] == 0xA5 : status == CSVF_OK || out[i] == 0);
    free(cipher);
    free(out);
}

static void agreement(stream *in)
{
    csvf_sm2_private ephemeral;
    csvf_sm2_public ephemeral_public;
    uint8_t z[32], peer_z[32], d[32], key[2][40], confirmation[2][64];
    const unsigned k = take_byte(in) % KEYS;
    take(in, d, 32);
    take(in, peer_z, 32);
    if (csvf_sm2_private_init(&ephemeral, d) != CSVF_OK)
        return;
    csvf_sm2_private_public(&ephemeral_public, &ephemeral);
    CHECK(csvf_sm2_z(z, &public_keys[k], in->data, in->left) == (in->left > CSVF_SM2_ID_MAX ? CSVF_ERR_LENGTH : CSVF_OK));
    if (in->left > CSVF_SM2_ID_MAX)
        return;
    /* one with oneself, the roles of the long-term and the ephemeral key exchanged */
    const int a = csvf_sm2_agree(key[0], 40, confirmation[0], 1, &private_keys[k], &ephemeral, z, &ephemeral_public, &public_keys[k], peer_z);
    const int b = csvf_sm2_agree(key[1], 40, confirmation[1], 0, &ephemeral, &private_keys[k], peer_z, &public_keys[k], &ephemeral_public, z);
    CHECK(a == b && (a == CSVF_OK || a == CSVF_ERR_POINT));
    CHECK(a != CSVF_OK || (!memcmp(key[0], key[1], 40) && !memcmp(confirmation[0], confirmation[1], 64)));
    csvf_wipe(&ephemeral, sizeof ephemeral);
}

/* Good signatures, spoilt ones and ones at the ends of the range, with and without tables, side by side. */
static void batch(stream *in)
{
    csvf_sm2_check checks[MOST_LANES];
    uint8_t signature[MOST_LANES][64], digest[MOST_LANES][32], valid[MOST_LANES], expected[MOST_LANES];
    const size_t count = take_byte(in) % (MOST_LANES + 1u);
    for (size_t i = 0; i < count; i++) {
        const unsigned kind = take_byte(in), k = kind % KEYS, at = take_byte(in), flip = take_byte(in);
        memcpy(signature[i], signatures[k], 64);
        memcpy(digest[i], digests[k], 32);
        expected[i] = 1;
        if (kind & 8 && flip) {
            if (at & 128)
                digest[i][at % 32] ^= (uint8_t)flip;
            else
                signature[i][at % 64] ^= (uint8_t)flip;
            expected[i] = 0;
        } else if (kind & 16) {
            uint8_t *number = signature[i] + (at & 32);
            memcpy(number, ORDER, 32);
            if (flip & 1)
                memset(number, 0, 32);
            else
                number[31] = (uint8_t)(number[31] + (flip >> 1) % 100);
            expected[i] = 0;
        }
        checks[i] = (csvf_sm2_check){&public_keys[k], kind & 4 ? tables[k] : NULL, signature[i], digest[i]};
    }
    CHECK(csvf_sm2_verify_many_var(valid, checks, count) == CSVF_OK);
    for (size_t i = 0; i < count; i++)
        CHECK(valid[i] == expected[i]);
}

/* Which numbers are private keys, and one key in every kernel. */
static void private_keys_of(stream *in)
{
    csvf_sm2_private key, again;
    uint8_t d[32], most[32], bytes[32];
    static const uint8_t zero[32];
    take(in, d, 32);
    memcpy(most, ORDER, 32);
    most[31] -= 2;
    const int is_good = memcmp(d, zero, 32) != 0 && memcmp(d, most, 32) <= 0;
    CHECK(csvf_sm2_private_init(&key, d) == (is_good ? CSVF_OK : CSVF_ERR_KEY));
    if (!is_good)
        return;
    csvf_sm2_private_bytes(bytes, &key);
    CHECK(!memcmp(bytes, d, 32));
    force(CSVF_PRIMITIVE_SM2, 1);
    CHECK(csvf_sm2_private_init(&again, d) == CSVF_OK && !memcmp(&key, &again, sizeof key));
    csvf_wipe(&key, sizeof key);
    csvf_wipe(&again, sizeof again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static void (*const operations[8])(stream *) = {encodings, two_ways, sign_and_spoil, encryption, ciphertexts, agreement, batch, private_keys_of};
    stream in = {data, size};
    if (size < 2)
        return 0;
    prepare();
    const unsigned operation = take_byte(&in) % 8, kernels = take_byte(&in);
    force(CSVF_PRIMITIVE_SM2, kernels % 8 == 0);     /* the slow one now and then */
    force(CSVF_PRIMITIVE_SM2_MANY, kernels / 8 % 4 == 0);
    operations[operation](&in);
    return 0;
}
