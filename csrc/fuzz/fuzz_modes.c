/* libFuzzer target: CTR, GCM and SM3 calls with fuzzed geometry, every kernel against the portable one. CTR in pieces equals CTR at once, GCM
 * is undone and notices one changed bit, many messages and blocks equal the single stream, HMAC and SM3 in pieces equal them at once. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../include/csvfast.h"

#define CHECK(condition) do { if (!(condition)) { fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); abort(); } } while (0)

enum { MOST = 1 << 14, MESSAGES = 70 };

typedef struct geometry {
    uint8_t key[16], nonce[40];     /* the counter of CTR, too */
    uint16_t length, cut, flip;
    uint8_t nonce_length, aad_length, tag_length, prefix, count, block, steps;
} geometry;

static uint8_t *exact(size_t length) { return malloc(length ? length : 1); }  /* so that ASan sees every byte past the end */

static void ctr(const geometry *g, const uint8_t *plain, size_t length, uint8_t *expected, int is_first)
{
    csvf_sm4_ctr stream;
    uint8_t *out = exact(length);
    CHECK(csvf_sm4_ctr_init(&stream, g->key, g->nonce) == CSVF_OK);
    CHECK(csvf_sm4_ctr_crypt(&stream, is_first ? expected : out, plain, length) == CSVF_OK);
    CHECK(is_first || memcmp(out, expected, length) == 0);
    CHECK(csvf_sm4_ctr_init(&stream, g->key, g->nonce) == CSVF_OK);
    for (size_t at = 0, piece = g->cut % 97 + 1; at < length; at += piece, piece = (piece * 5 + g->steps) % 300 + 1) {
        piece = piece < length - at ? piece : length - at;
        memcpy(out + at, plain + at, piece);
        CHECK(csvf_sm4_ctr_crypt(&stream, out + at, out + at, piece) == CSVF_OK);
    }
    CHECK(memcmp(out, expected, length) == 0);
    free(out);
}

static void gcm(const geometry *g, const uint8_t *plain, size_t length, uint8_t *expected, uint8_t first_tag[16], int is_first)
{
    static const uint8_t tags[] = {4, 8, 12, 13, 14, 15, 16};
    const size_t tag_length = tags[g->tag_length % sizeof tags], nonce_length = 1 + g->nonce_length % sizeof g->nonce;
    const size_t aad_length = g->aad_length < length ? g->aad_length : length;
    csvf_sm4_gcm cipher;
    uint8_t tag[16], *out = exact(length), *nonce = exact(nonce_length), *aad = exact(aad_length);
    memcpy(nonce, g->nonce, nonce_length);
    memcpy(aad, plain, aad_length);
    CHECK(csvf_sm4_gcm_init(&cipher, g->key) == CSVF_OK);
    CHECK(csvf_sm4_gcm_encrypt(&cipher, out, tag, tag_length, nonce, nonce_length, aad, aad_length, plain, length) == CSVF_OK);
    if (is_first) {
        memcpy(expected, out, length);
        memcpy(first_tag, tag, tag_length);
    }
    CHECK(memcmp(out, expected, length) == 0 && memcmp(tag, first_tag, tag_length) == 0);
    CHECK(csvf_sm4_gcm_decrypt(&cipher, out, tag, tag_length, nonce, nonce_length, aad, aad_length, out, length) == CSVF_OK);
    CHECK(memcmp(out, plain, length) == 0);
    memcpy(out, expected, length);
    const size_t bit = g->flip % (8 * (length + tag_length));
    uint8_t *changed = bit / 8 < length ? out + bit / 8 : tag + (bit / 8 - length);
    *changed ^= (uint8_t)(1u << bit % 8);
    CHECK(csvf_sm4_gcm_decrypt(&cipher, out, tag, tag_length, nonce, nonce_length, aad, aad_length, out, length) == CSVF_ERR_AUTHENTICATION);
    for (size_t i = 0; i < length; i++)
        CHECK(out[i] == 0);
    free(out), free(nonce), free(aad);
}

static void sm3(const geometry *g, const uint8_t *plain, size_t length)
{
    uint8_t digests[MESSAGES * 32], expected[32], piecewise[32];
    const uint8_t *messages[MESSAGES] = {NULL};
    size_t lengths[MESSAGES] = {0}, count = g->count % (MESSAGES + 1);
    for (size_t i = 0; i < count; i++) {
        const size_t at = (i * (g->steps + 1u) * 61) % (length + 1), most = length - at;
        messages[i] = plain + at;
        lengths[i] = i % 7 == g->steps % 7 ? most : (i * g->cut + g->flip) % 700 % (most + 1);
    }
    csvf_sm3_many(digests, messages, lengths, count);
    for (size_t i = 0; i < count; i++) {
        csvf_sm3_digest(expected, messages[i], lengths[i]);
        CHECK(memcmp(digests + 32 * i, expected, 32) == 0);
    }
    const size_t prefix = g->prefix < length ? g->prefix : length, block = g->block + 1u;
    const size_t blocks = length / block < MESSAGES ? length / block : MESSAGES;
    CHECK(csvf_sm3_blocks(digests, plain, prefix, plain, block, blocks) == CSVF_OK);
    for (size_t i = 0; i < blocks; i++) {
        csvf_sm3 stream;
        csvf_sm3_init(&stream);
        csvf_sm3_update(&stream, plain, prefix);
        csvf_sm3_update(&stream, plain + block * i, block);
        csvf_sm3_final(&stream, expected);
        CHECK(memcmp(digests + 32 * i, expected, 32) == 0);
    }
    csvf_hmac_sm3 mac;
    const size_t cut = g->cut % (length + 1);
    csvf_hmac_sm3_init(&mac, plain, prefix);
    csvf_hmac_sm3_update(&mac, plain, length);
    csvf_hmac_sm3_final(&mac, expected);
    csvf_hmac_sm3_update(&mac, plain, cut);
    csvf_hmac_sm3_update(&mac, plain + cut, length - cut);
    csvf_hmac_sm3_final(&mac, piecewise);
    CHECK(memcmp(expected, piecewise, 32) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    geometry g;
    if (size < sizeof g)
        return 0;
    memcpy(&g, data, sizeof g);
    data += sizeof g;
    size -= sizeof g;
    const size_t length = g.length % MOST;
    uint8_t *plain = exact(length), *stream = exact(length), *sealed = exact(length), tag[16];
    for (size_t i = 0; i < length; i++)
        plain[i] = size ? (uint8_t)(data[i % size] + i / size) : (uint8_t)i;
    for (int primitive = 0; primitive < CSVF_PRIMITIVE_COUNT; primitive++) {
        for (size_t k = csvf_kernel_count(primitive); k-- > 0;) {      /* the portable one is the last */
            if (csvf_force_kernel(primitive, csvf_kernel_at(primitive, k)) != CSVF_OK)
                continue;
            const int is_first = primitive == 0 && k + 1 == csvf_kernel_count(primitive);
            if (primitive == CSVF_PRIMITIVE_SM4)
                ctr(&g, plain, length, stream, is_first);
            if (primitive == CSVF_PRIMITIVE_SM4 || primitive == CSVF_PRIMITIVE_GHASH)
                gcm(&g, plain, length, sealed, tag, is_first);
            else
                sm3(&g, plain, length);
        }
        CHECK(csvf_force_kernel(primitive, NULL) == CSVF_OK);
    }
    free(plain), free(stream), free(sealed);
    return 0;
}
