/* SM4-CTR (GB/T 17964-2021), streaming, over any SM4 kernel. */
#include <string.h>

#include "../include/csvfast.h"
#include "sm4_buffers.h"
#include "sm4_kernel.h"

enum { BLOCK = 16 };

/* What csvf_sm4_ctr.opaque holds. */
typedef struct __attribute__((may_alias)) ctr_state {
    const csvf_sm4_kernel *kernel;
    csvf_sm4_schedule schedule;
    uint8_t counter[BLOCK];     /* of the next whole block */
    uint8_t keystream[BLOCK];   /* of the block under way; its last `left` bytes are unused yet */
    size_t left;
} ctr_state;

_Static_assert(sizeof(ctr_state) <= sizeof(csvf_sm4_ctr), "csvf_sm4_ctr is too small");

int csvf_sm4_ctr_init(csvf_sm4_ctr *ctr, const uint8_t key[16], const uint8_t counter[16])
{
    if (!ctr || !key || !counter)
        return CSVF_ERR_ARGUMENT;
    ctr_state *s = (ctr_state *)ctr;
    s->kernel = csvf__sm4();
    s->kernel->expand(&s->schedule, NULL, key);
    memcpy(s->counter, counter, BLOCK);
    memset(s->keystream, 0, BLOCK);
    s->left = 0;
    return CSVF_OK;
}

int csvf_sm4_ctr_crypt(csvf_sm4_ctr *ctr, uint8_t *out, const uint8_t *in, size_t length)
{
    if (!ctr || (length && (!out || !in)))
        return CSVF_ERR_ARGUMENT;
    if (csvf__overlap(out, in, length))
        return CSVF_ERR_OVERLAP;
    ctr_state *s = (ctr_state *)ctr;
    for (; s->left && length; s->left--, length--)
        *out++ = *in++ ^ s->keystream[BLOCK - s->left];
    if (length == 0)
        return CSVF_OK;
    const size_t blocks = length / BLOCK;
    s->kernel->ctr(&s->schedule, out, in, blocks, s->counter);
    out += BLOCK * blocks;
    in += BLOCK * blocks;
    length %= BLOCK;
    if (length) {
        memset(s->keystream, 0, BLOCK);
        s->kernel->ctr(&s->schedule, s->keystream, s->keystream, 1, s->counter);
        for (size_t i = 0; i < length; i++)
            out[i] = in[i] ^ s->keystream[i];
        s->left = BLOCK - length;
    }
    return CSVF_OK;
}
