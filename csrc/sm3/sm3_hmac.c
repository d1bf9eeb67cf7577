/* HMAC-SM3 (RFC 2104, GB/T 15852.2) and the X9.63 key derivation (GB/T 32918.4-2016, 5.4.3). */
#include "../include/csvfast.h"
#include "sm3_common.h"

/* The contents of csvf_hmac_sm3. A key is kept only as the two chaining values it leaves behind, so a message costs no
 * compression for the key. */
typedef struct __attribute__((may_alias)) hmac_state {
    csvf_sm3 inner_start; /* after key ^ 0x36.. */
    csvf_sm3 outer_start; /* after key ^ 0x5c.. */
    csvf_sm3 inner;       /* the message under way */
} hmac_state;

_Static_assert(sizeof(hmac_state) <= sizeof(csvf_hmac_sm3), "csvf_hmac_sm3 is too small");

void csvf_hmac_sm3_init(csvf_hmac_sm3 *hmac, const uint8_t *key, size_t key_length)
{
    hmac_state *s = (hmac_state *)hmac;
    uint8_t pad[64] = {0};
    if (key_length > sizeof pad)
        csvf_sm3_digest(pad, key, key_length);
    else if (key_length)
        memcpy(pad, key, key_length);

    csvf_sm3_init(&s->inner_start);
    s->outer_start = s->inner_start; /* a copy, so that both use one kernel */
    for (size_t i = 0; i < sizeof pad; i++)
        pad[i] ^= 0x36;
    csvf_sm3_update(&s->inner_start, pad, sizeof pad);
    for (size_t i = 0; i < sizeof pad; i++)
        pad[i] ^= 0x36 ^ 0x5c;
    csvf_sm3_update(&s->outer_start, pad, sizeof pad);

    s->inner = s->inner_start;
    csvf__wipe(pad, sizeof pad);
}

void csvf_hmac_sm3_update(csvf_hmac_sm3 *hmac, const void *data, size_t length)
{
    csvf_sm3_update(&((hmac_state *)hmac)->inner, data, length);
}

void csvf_hmac_sm3_final(csvf_hmac_sm3 *hmac, uint8_t mac[32])
{
    hmac_state *s = (hmac_state *)hmac;
    uint8_t inner_digest[32];
    csvf_sm3_final(&s->inner, inner_digest);
    csvf_sm3 outer = s->outer_start;
    csvf_sm3_update(&outer, inner_digest, sizeof inner_digest);
    csvf_sm3_final(&outer, mac);
    s->inner = s->inner_start;
    csvf__wipe(&outer, sizeof outer);
    csvf__wipe(inner_digest, sizeof inner_digest);
}

int csvf_sm3_kdf(uint8_t *out, size_t out_length, const uint8_t *secret, size_t secret_length)
{
    if ((!out && out_length) || (!secret && secret_length))
        return CSVF_ERR_ARGUMENT;
    if ((uint64_t)out_length > (uint64_t)32 * UINT32_MAX)
        return CSVF_ERR_LENGTH;

    csvf_sm3 start, s;
    csvf_sm3_init(&start);
    csvf_sm3_update(&start, secret, secret_length);
    uint8_t number[4], digest[32];
    for (uint32_t i = 1; out_length; i++) {
        s = start;
        csvf__store_be32(number, i);
        csvf_sm3_update(&s, number, sizeof number);
        csvf_sm3_final(&s, digest);
        size_t take = out_length < sizeof digest ? out_length : sizeof digest;
        memcpy(out, digest, take);
        out += take;
        out_length -= take;
    }
    csvf__wipe(&start, sizeof start);
    csvf__wipe(&s, sizeof s);
    csvf__wipe(digest, sizeof digest);
    return CSVF_OK;
}
