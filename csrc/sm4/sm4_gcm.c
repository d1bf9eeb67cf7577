/* SM4-GCM (NIST SP 800-38D; SM4 in it: RFC 8998) over any SM4 kernel and any GHASH kernel, and the list of the latter. */
#include <string.h>

#include "../cpu.h"
#include "../declassify.h"
#include "../include/csvfast.h"
#include "ghash_kernel.h"
#include "sm4_buffers.h"
#include "sm4_kernel.h"

enum {
    BLOCK = 16,
    COUNTED_NONCE = 12,   /* bytes of a nonce that is followed by a plain block counter */
    STREAM_BLOCKS = 128,  /* of keystream made here for counters that come out of a hash */
    CHUNK_BLOCKS = 1024   /* encrypted and hashed together, so that the second finds the bytes in L1 */
};

extern const csvf_ghash_kernel csvf__ghash_portable;
#if defined(__x86_64__)
extern const csvf_ghash_kernel csvf__ghash_pclmul;
#endif

const csvf_ghash_kernel *const csvf__ghash_kernels[] = {
#if defined(__x86_64__)
    &csvf__ghash_pclmul,
#endif
    &csvf__ghash_portable,
    NULL
};

/* What csvf_sm4_gcm.opaque holds. */
typedef struct __attribute__((may_alias)) gcm_state {
    const csvf_sm4_kernel *kernel;
    const csvf_ghash_kernel *hash;
    csvf_sm4_schedule schedule;
    csvf_ghash_key hash_key;
} gcm_state;

_Static_assert(sizeof(gcm_state) <= sizeof(csvf_sm4_gcm), "csvf_sm4_gcm is too small");

static void put_be64(uint8_t *p, uint64_t x)
{
    for (int i = 0; i < 8; i++)
        p[i] = (uint8_t)(x >> (56 - 8 * i));
}

static uint32_t get_be32(const uint8_t *p)
{
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

static void put_be32(uint8_t *p, uint32_t x)
{
    p[0] = (uint8_t)(x >> 24);
    p[1] = (uint8_t)(x >> 16);
    p[2] = (uint8_t)(x >> 8);
    p[3] = (uint8_t)x;
}

/* GHASH kernels have more powers of H than the CPU has registers, and compilers keep the rest in stack slots no wipe reaches. This
 * one covers the slots: it stands where the frames of the calls before it stood. */
static __attribute__((noinline)) void burn_stack(void)
{
    uint8_t below[1024];
    csvf_wipe(below, sizeof below);
}

int csvf_sm4_gcm_init(csvf_sm4_gcm *gcm, const uint8_t key[16])
{
    if (!gcm || !key)
        return CSVF_ERR_ARGUMENT;
    gcm_state *s = (gcm_state *)gcm;
    uint8_t h[BLOCK] = { 0 };
    s->kernel = csvf__sm4();
    s->hash = csvf__ghash();
    s->kernel->expand(&s->schedule, NULL, key);
    s->kernel->ecb(&s->schedule, h, h, 1);
    s->hash->init(&s->hash_key, h);
    csvf_wipe(h, sizeof h);
    burn_stack();
    return CSVF_OK;
}

/* y over data padded with zeros to whole blocks. */
static void hash_padded(const gcm_state *s, uint8_t y[BLOCK], const uint8_t *data, size_t length)
{
    const size_t blocks = length / BLOCK, rest = length % BLOCK;
    if (blocks)
        s->hash->update(&s->hash_key, y, data, blocks);
    if (rest) {
        uint8_t last[BLOCK] = { 0 };
        memcpy(last, data + BLOCK * blocks, rest);
        s->hash->update(&s->hash_key, y, last, 1);
        csvf_wipe(last, sizeof last);
    }
}

static void hash_lengths(const gcm_state *s, uint8_t y[BLOCK], uint64_t first_bytes, uint64_t second_bytes)
{
    uint8_t lengths[BLOCK];
    put_be64(lengths, first_bytes * 8);
    put_be64(lengths + 8, second_bytes * 8);
    s->hash->update(&s->hash_key, y, lengths, 1);
}

/* J_0 of SP 800-38D 7.1. */
static void first_counter(const gcm_state *s, uint8_t counter[BLOCK], const uint8_t *nonce, size_t nonce_length)
{
    memset(counter, 0, BLOCK);
    if (nonce_length == COUNTED_NONCE) {
        memcpy(counter, nonce, COUNTED_NONCE);
        counter[15] = 1;
        return;
    }
    hash_padded(s, counter, nonce, nonce_length);
    hash_lengths(s, counter, 0, nonce_length);
}

static void next_counter(uint8_t counter[BLOCK]) { put_be32(counter + 12, get_be32(counter + 12) + 1); }

/* out = in xor keystream from `counter` on, which moves. Only its last 32 bits count, and kernels count in 128. After a nonce
 * of 12 bytes they never reach their end within the length limit. Any other nonce gives a counter that comes out of GHASH: it
 * may wrap, and it must be treated as secret, so its blocks are made here, without a branch on it. */
static void crypt_blocks(const gcm_state *s, uint8_t *out, const uint8_t *in, size_t blocks, uint8_t counter[BLOCK], int hashed)
{
    if (!hashed) {
        s->kernel->ctr(&s->schedule, out, in, blocks, counter);
        return;
    }
    uint8_t stream[BLOCK * STREAM_BLOCKS];
    while (blocks) {
        const size_t count = blocks < STREAM_BLOCKS ? blocks : STREAM_BLOCKS;
        for (size_t i = 0; i < count; i++) {
            memcpy(stream + BLOCK * i, counter, BLOCK);
            next_counter(counter);
        }
        s->kernel->ecb(&s->schedule, stream, stream, count);
        for (size_t i = 0; i < BLOCK * count; i++)
            out[i] = in[i] ^ stream[i];
        out += BLOCK * count;
        in += BLOCK * count;
        blocks -= count;
    }
    csvf_wipe(stream, sizeof stream);
}

static void crypt(const gcm_state *s, uint8_t *out, const uint8_t *in, size_t length, uint8_t counter[BLOCK], int hashed)
{
    const size_t blocks = length / BLOCK, rest = length % BLOCK;
    if (blocks)
        crypt_blocks(s, out, in, blocks, counter, hashed);
    if (rest) {
        uint8_t last[BLOCK] = { 0 };
        memcpy(last, in + BLOCK * blocks, rest);
        crypt_blocks(s, last, last, 1, counter, hashed);
        memcpy(out + BLOCK * blocks, last, rest);
        csvf_wipe(last, sizeof last);
    }
}

/* tag = E(J_0) xor the finished hash. */
static void finish_tag(const gcm_state *s, uint8_t tag[BLOCK], const uint8_t y[BLOCK], const uint8_t first[BLOCK])
{
    uint8_t pad[BLOCK];
    s->kernel->ecb(&s->schedule, pad, first, 1);
    for (int i = 0; i < BLOCK; i++)
        tag[i] = y[i] ^ pad[i];
    csvf_wipe(pad, sizeof pad);
}

static int check(const csvf_sm4_gcm *gcm, const uint8_t *out, const uint8_t *tag, size_t tag_length, const uint8_t *nonce,
                 size_t nonce_length, const uint8_t *aad, size_t aad_length, const uint8_t *in, size_t length)
{
    if (!gcm || !tag || !nonce || (aad_length && !aad) || (length && (!out || !in)))
        return CSVF_ERR_ARGUMENT;
    if (tag_length != 4 && tag_length != 8 && (tag_length < 12 || tag_length > 16))
        return CSVF_ERR_LENGTH;
    if (nonce_length == 0 || (uint64_t)nonce_length >= UINT64_C(1) << 61 || (uint64_t)aad_length >= UINT64_C(1) << 61)
        return CSVF_ERR_LENGTH;
    if ((uint64_t)length > (UINT64_C(1) << 36) - 32)
        return CSVF_ERR_LENGTH;
    if (csvf__overlap(out, in, length) || csvf__share_bytes(out, length, tag, tag_length) ||
        csvf__share_bytes(out, length, nonce, nonce_length) || csvf__share_bytes(out, length, aad, aad_length))
        return CSVF_ERR_OVERLAP;
    return CSVF_OK;
}

int csvf_sm4_gcm_encrypt(const csvf_sm4_gcm *gcm, uint8_t *out, uint8_t *tag, size_t tag_length, const uint8_t *nonce,
                         size_t nonce_length, const uint8_t *aad, size_t aad_length, const uint8_t *in, size_t length)
{
    const int status = check(gcm, out, tag, tag_length, nonce, nonce_length, aad, aad_length, in, length);
    if (status != CSVF_OK)
        return status;
    if (csvf__share_bytes(tag, tag_length, in, length) || csvf__share_bytes(tag, tag_length, nonce, nonce_length) ||
        csvf__share_bytes(tag, tag_length, aad, aad_length))
        return CSVF_ERR_OVERLAP;
    const gcm_state *s = (const gcm_state *)gcm;
    uint8_t first[BLOCK], counter[BLOCK], y[BLOCK] = { 0 };
    first_counter(s, first, nonce, nonce_length);
    memcpy(counter, first, BLOCK);
    next_counter(counter);
    hash_padded(s, y, aad, aad_length);
    for (size_t left = length; left;) {
        const size_t bytes = left < BLOCK * CHUNK_BLOCKS ? left : BLOCK * CHUNK_BLOCKS;
        crypt(s, out, in, bytes, counter, nonce_length != COUNTED_NONCE);
        hash_padded(s, y, out, bytes);
        out += bytes;
        in += bytes;
        left -= bytes;
    }
    hash_lengths(s, y, aad_length, length);
    finish_tag(s, y, y, first);
    memcpy(tag, y, tag_length);
    csvf_wipe(y, sizeof y);
    csvf_wipe(first, sizeof first);
    csvf_wipe(counter, sizeof counter);
    burn_stack();
    return CSVF_OK;
}

int csvf_sm4_gcm_decrypt(const csvf_sm4_gcm *gcm, uint8_t *out, const uint8_t *tag, size_t tag_length, const uint8_t *nonce,
                         size_t nonce_length, const uint8_t *aad, size_t aad_length, const uint8_t *in, size_t length)
{
    const int status = check(gcm, out, tag, tag_length, nonce, nonce_length, aad, aad_length, in, length);
    if (status != CSVF_OK)
        return status;
    const gcm_state *s = (const gcm_state *)gcm;
    uint8_t first[BLOCK], y[BLOCK] = { 0 };
    first_counter(s, first, nonce, nonce_length);
    hash_padded(s, y, aad, aad_length);
    hash_padded(s, y, in, length);
    hash_lengths(s, y, aad_length, length);
    finish_tag(s, y, y, first);
    const int genuine = csvf_equal(y, tag, tag_length);
    csvf__declassify(&genuine, sizeof genuine);
    csvf_wipe(y, sizeof y);
    if (genuine) {
        next_counter(first);
        crypt(s, out, in, length, first, nonce_length != COUNTED_NONCE);
    } else
        csvf_wipe(out, length);
    csvf_wipe(first, sizeof first);
    burn_stack();
    return genuine ? CSVF_OK : CSVF_ERR_AUTHENTICATION;
}
