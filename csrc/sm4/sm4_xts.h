/* XTS over a kernel, for the public calls and for the engine. Internal. */
#ifndef CSVF_SM4_XTS_H
#define CSVF_SM4_XTS_H

#include "../include/csvfast.h"
#include "sm4_kernel.h"

/* What csvf_xts.opaque holds. The kernel is fixed at init, so csvf_force_kernel never changes a live key. may_alias: callers copy the
 * opaque words with '=', which a compiler that sees both sides could otherwise move past these fields. */
typedef struct __attribute__((may_alias)) csvf__xts {
    const csvf_sm4_kernel *kernel;
    int standard;
    csvf_sm4_schedule encrypt, decrypt, tweak;
} csvf__xts;

_Static_assert(sizeof(csvf__xts) <= sizeof(csvf_xts), "csvf_xts is too small");
_Static_assert(_Alignof(csvf__xts) <= _Alignof(csvf_xts), "csvf_xts is not aligned enough");

static inline const csvf__xts *csvf__xts_of(const csvf_xts *xts) { return (const csvf__xts *)xts; }

/* Encrypted tweaks T_0 of count data units: out[16 i ..] = SM4(K2, LE128(units[i])). */
void csvf__xts_unit_tweaks(const csvf_xts *xts, uint8_t *out, const uint64_t *units, size_t count);
/* The same for consecutive units. */
void csvf__xts_unit_tweaks_run(const csvf_xts *xts, uint8_t *out, uint64_t first_unit, size_t count);

/* Whole pages (4096-byte units numbered from first_unit), arguments already checked. decrypt = 0 or 1. */
void csvf__xts_pages(const csvf_xts *xts, uint8_t *out, const uint8_t *in, uint64_t first_unit, size_t pages, int decrypt);

/* Blocks of one unit from block index `first` on, given the unit's encrypted tweak T_0. */
void csvf__xts_span(const csvf_xts *xts, uint8_t *out, const uint8_t *in, size_t blocks, const uint8_t tweak[16],
                    size_t first, int decrypt);

#endif
