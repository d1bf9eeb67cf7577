/* SM2 key agreement, GB/T 32918.3-2016 6.1. The cofactor h is 1. */
#include "../include/csvfast.h"
#include "../declassify.h"
#include "sm2_kernel.h"
#include "sm2_objects.h"

/* 2^127 + the low 127 bits of an ephemeral key's x: w = ceil(ceil(log2 n) / 2) - 1 = 127. */
static void reduced_x(uint64_t out[4], const uint8_t point[64])
{
    number_load(out, point);
    out[1] |= UINT64_C(1) << 63;
    out[2] = out[3] = 0;
}

/* S = SM3(label || y || SM3(x || what both sides know)) */
static void confirm(uint8_t out[32], uint8_t label, const uint8_t shared[64], const uint8_t inner[32])
{
    csvf_sm3 sm3;
    csvf_sm3_init(&sm3);
    csvf_sm3_update(&sm3, &label, 1);
    csvf_sm3_update(&sm3, shared + 32, 32);
    csvf_sm3_update(&sm3, inner, 32);
    csvf_sm3_final(&sm3, out);
    csvf_wipe(&sm3, sizeof sm3);
}

static __attribute__((noinline)) int agree(uint8_t *key, size_t key_length, uint8_t *confirmation, int initiator, const csvf__sm2_private *own,
                                           const csvf__sm2_private *ephemeral, const uint8_t z[32], const csvf__sm2_public *peer,
                                           const csvf__sm2_public *peer_ephemeral, const uint8_t peer_z[32])
{
    const csvf_sm2_kernel *kernel = csvf__sm2();
    csvf_sm2_affine sum, point;
    uint64_t x[4], t[4];
    uint8_t secret[128], inner[32];      /* xV || yV || Z_A || Z_B */
    csvf_sm3 sm3;

    reduced_x(x, peer_ephemeral->bytes);
    if (!kernel->combine_var(&sum, &peer->point, &peer_ephemeral->point, x))
        return CSVF_ERR_POINT;
    reduced_x(x, ephemeral->public_key.bytes);
    kernel->scalar_multiply(t, x, ephemeral->d);
    number_add_modulo(t, t, own->d, csvf__sm2_n);
    int finite = kernel->multiply(&point, &sum, t);
    csvf__declassify(&finite, sizeof finite);
    int status = finite ? CSVF_OK : CSVF_ERR_POINT;
    if (status == CSVF_OK) {
        csvf__sm2_point_bytes(secret, &point);
        memcpy(secret + 64, initiator ? z : peer_z, 32);
        memcpy(secret + 96, initiator ? peer_z : z, 32);
        status = csvf_sm3_kdf(key, key_length, secret, sizeof secret);
    }
    if (status == CSVF_OK && confirmation) {
        csvf_sm3_init(&sm3);
        csvf_sm3_update(&sm3, secret, 32);
        csvf_sm3_update(&sm3, secret + 64, 64);
        csvf_sm3_update(&sm3, initiator ? ephemeral->public_key.bytes : peer_ephemeral->bytes, 64);
        csvf_sm3_update(&sm3, initiator ? peer_ephemeral->bytes : ephemeral->public_key.bytes, 64);
        csvf_sm3_final(&sm3, inner);
        confirm(confirmation, 2, secret, inner);
        confirm(confirmation + 32, 3, secret, inner);
        csvf_wipe(&sm3, sizeof sm3);
        csvf_wipe(inner, sizeof inner);
    }
    csvf_wipe(&point, sizeof point);
    csvf_wipe(t, sizeof t);
    csvf_wipe(secret, sizeof secret);
    return status;
}

int csvf_sm2_agree(uint8_t *key, size_t key_length, uint8_t *confirmation, int initiator, const csvf_sm2_private *private_key,
                   const csvf_sm2_private *ephemeral, const uint8_t z[32], const csvf_sm2_public *peer, const csvf_sm2_public *peer_ephemeral,
                   const uint8_t peer_z[32])
{
    if (!key || !private_key || !ephemeral || !z || !peer || !peer_ephemeral || !peer_z || (initiator != 0 && initiator != 1))
        return CSVF_ERR_ARGUMENT;
    if (key_length == 0 || key_length > UINT32_MAX)
        return CSVF_ERR_LENGTH;
    const int status = agree(key, key_length, confirmation, initiator, csvf__sm2_private_of(private_key), csvf__sm2_private_of(ephemeral), z,
                             csvf__sm2_public_of(peer), csvf__sm2_public_of(peer_ephemeral), peer_z);
    if (status != CSVF_OK)
        csvf_wipe(key, key_length);
    csvf__sm2_burn_stack();
    return status;
}
