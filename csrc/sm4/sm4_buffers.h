/* Buffer checks shared by the SM4 modes. Internal. */
#ifndef CSVF_SM4_BUFFERS_H
#define CSVF_SM4_BUFFERS_H

#include <stddef.h>
#include <stdint.h>

/* 1 if [a, a + a_length) and [b, b + b_length) share a byte. */
static inline int csvf__share_bytes(const void *a, size_t a_length, const void *b, size_t b_length)
{
    const uintptr_t x = (uintptr_t)a, y = (uintptr_t)b;
    if (a_length == 0 || b_length == 0)
        return 0;
    return x < y ? y - x < a_length : x - y < b_length;
}

/* 1 if out and in overlap without being the same buffer. */
static inline int csvf__overlap(const void *out, const void *in, size_t length)
{
    return out != in && csvf__share_bytes(out, length, in, length);
}

#endif
