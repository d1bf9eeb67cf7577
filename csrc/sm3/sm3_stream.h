/* The contents of csvf_sm3. Internal. */
#ifndef CSVF_SM3_STREAM_H
#define CSVF_SM3_STREAM_H

#include "../include/csvfast.h"
#include "sm3_kernel.h"

/* The kernel is kept so that forcing another one never changes a live stream. */
typedef struct __attribute__((may_alias)) csvf__sm3_stream {
    uint32_t h[8];
    uint8_t buffer[64]; /* total % 64 bytes that wait for the rest of their block */
    uint64_t total;     /* bytes taken so far */
    const csvf_sm3_kernel *kernel;
} csvf__sm3_stream;

_Static_assert(sizeof(csvf__sm3_stream) <= sizeof(csvf_sm3), "csvf_sm3 is too small");
_Static_assert(_Alignof(csvf__sm3_stream) <= _Alignof(csvf_sm3), "csvf_sm3 is not aligned enough");

#endif
