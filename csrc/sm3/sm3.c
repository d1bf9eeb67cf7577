/* SM3: the kernel lists, the streaming interface and the one-shot digest. Standard: GB/T 32905-2016. */
#include "../include/csvfast.h"
#include "sm3_common.h"
#include "sm3_kernel.h"
#include "sm3_stream.h"

const csvf_sm3_kernel *const csvf__sm3_kernels[] = {
#if defined(__x86_64__)
    &csvf__sm3_avx2,
#endif
    &csvf__sm3_portable,
    NULL,
};

const csvf_sm3_many_kernel *const csvf__sm3_many_kernels[] = {
#if defined(__x86_64__)
    &csvf__sm3_many_avx512,
    &csvf__sm3_many_avx2,
#endif
    &csvf__sm3_many_portable,
    NULL,
};

typedef csvf__sm3_stream stream;

static void start(stream *s, const csvf_sm3_kernel *kernel)
{
    memcpy(s->h, csvf__sm3_iv, sizeof s->h);
    s->total = 0;
    s->kernel = kernel;
}

void csvf_sm3_init(csvf_sm3 *sm3)
{
    memset(sm3, 0, sizeof *sm3);
    start((stream *)sm3, csvf__sm3());
}

void csvf_sm3_update(csvf_sm3 *sm3, const void *data, size_t length)
{
    stream *s = (stream *)sm3;
    const uint8_t *in = data;
    size_t used = s->total % 64;
    if (length == 0)
        return;
    s->total += length;
    if (used) {
        size_t take = 64 - used < length ? 64 - used : length;
        memcpy(s->buffer + used, in, take);
        if (used + take < 64)
            return;
        s->kernel->compress(s->h, s->buffer, 1);
        in += take;
        length -= take;
    }
    if (length >= 64)
        s->kernel->compress(s->h, in, length / 64);
    memcpy(s->buffer, in + (length & ~(size_t)63), length % 64);
}

/* The end of a message: the chaining value and the `used` bytes after the last whole block become a digest. */
static void finish(uint8_t digest[32], uint32_t h[8], const uint8_t *rest, uint64_t total,
                   const csvf_sm3_kernel *kernel)
{
    uint8_t tail[128];
    size_t used = total % 64;
    if (used)
        memcpy(tail, rest, used);
    kernel->compress(h, tail, csvf__sm3_pad(tail, used, total));
    csvf__sm3_store_digest(digest, h);
    csvf__wipe(tail, sizeof tail);
}

void csvf_sm3_final(csvf_sm3 *sm3, uint8_t digest[32])
{
    stream *s = (stream *)sm3;
    finish(digest, s->h, s->buffer, s->total, s->kernel);
    csvf__wipe(s->buffer, sizeof s->buffer);
    start(s, s->kernel);
}

void csvf_sm3_digest(uint8_t digest[32], const void *data, size_t length)
{
    const csvf_sm3_kernel *kernel = csvf__sm3();
    const uint8_t *in = data;
    uint32_t h[8];
    memcpy(h, csvf__sm3_iv, sizeof h);
    if (length >= 64)
        kernel->compress(h, in, length / 64);
    finish(digest, h, length ? in + (length & ~(size_t)63) : NULL, length, kernel);
    csvf__wipe(h, sizeof h);
}
