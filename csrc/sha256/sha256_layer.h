/* What a container image's layer is hashed with when it is encrypted: up to three SHA-256 states in step. Internal.
 *
 *   sealed   SHA-256 of the ciphertext
 *   mac      HMAC-SHA-256 of the ciphertext: its inner hash has one block in front, so both take the same blocks of message and
 *            can share the message schedule
 *   clear    SHA-256 of the plaintext, which has as many bytes
 *
 * One state after the other each waits for its own rounds; two states together cost what one costs, three a sixth more (Zen 4).
 * There is no portable kernel: without SHA instructions OpenSSL's single streams are faster than anything here would be.
 *
 * Source: FIPS 180-4, RFC 2104. PURE, constant time in the data. */
#ifndef CSVF_SHA256_LAYER_H
#define CSVF_SHA256_LAYER_H

#include <stddef.h>
#include <stdint.h>

typedef struct csvf_sha256_layer {
    uint32_t sealed[8], mac[8], clear[8];   /* in the order of the instructions */
    uint32_t outer[8];            /* HMAC's outer hash after its key block */
    uint8_t sealed_rest[64];      /* total % 64 bytes that wait for the rest of their block */
    uint8_t clear_rest[64];
    uint64_t total;
} csvf_sha256_layer;

/* 1 if this CPU has what the functions below need. */
int csvf__sha256_layer_usable(void);

/* In: key   of HMAC, at most 64 bytes */
void csvf__sha256_layer_init(csvf_sha256_layer *layer, const uint8_t *key, size_t length);

/* In: clear   as many bytes as sealed, or NULL in every call: the plaintext is not hashed */
void csvf__sha256_layer_update(csvf_sha256_layer *layer, const uint8_t *sealed, const uint8_t *clear, size_t length);

/* Out: of what came so far; the state goes on from there. clear is meaningless if no plaintext came */
void csvf__sha256_layer_digests(const csvf_sha256_layer *layer, uint8_t sealed[32], uint8_t mac[32], uint8_t clear[32]);

#endif
