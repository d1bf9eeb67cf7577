/* Powers of alpha in portable C, for kernels and tests. Internal. */
#ifndef CSVF_SM4_TWEAK_H
#define CSVF_SM4_TWEAK_H

#include <stddef.h>
#include <stdint.h>

/* out[16 j ..] = tweak * alpha^j for j < count; tweak is left at tweak * alpha^count, ready for the next call. Constant time in
 * the tweak. */
void csvf__sm4_tweak_run(int standard, uint8_t *out, uint8_t tweak[16], size_t count);

#endif
