/* Where SM2's secret numbers come from. */
#if !defined(_GNU_SOURCE)
#  define _GNU_SOURCE 1     /* getrandom under -std=c11 */
#endif
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>
#if defined(__linux__) || defined(__APPLE__)
#  include <sys/random.h>
#endif

#include "../include/csvfast.h"
#include "sm2_objects.h"

/* The kernel's generator, which blocks until it was seeded once after boot. There is no second source: weak numbers in place of none
 * would give keys away. */
int csvf__sm2_random(uint8_t *out, size_t length)
{
    size_t done = 0;
    while (done < length) {
#if defined(__linux__)
        const ssize_t got = getrandom(out + done, length - done, 0);
#else
        const size_t wanted = length - done < 256 ? length - done : 256;
        const ssize_t got = getentropy(out + done, wanted) == 0 ? (ssize_t)wanted : -1;
#endif
        if (got > 0)
            done += (size_t)got;
        else if (got == 0 || errno != EINTR) {
            if (got == 0)
                errno = EIO;
            csvf_wipe(out, length);
            return CSVF_ERR_SYSTEM;
        }
    }
    return CSVF_OK;
}

void csvf__sm2_reduce_wide(uint64_t out[4], const uint8_t wide[64])
{
    static const uint64_t r[4] = {0xac440bf6c62abedd, 0x8dfc2094de39fad4, 0x0000000000000000, 0x0000000100000000};   /* 2^256 mod n */
    uint64_t high[4], low[4];
    number_load(high, wide);
    number_load(low, wide + 32);
    csvf__sm2()->scalar_multiply(high, high, r);
    number_reduce_once(low, 0, low, csvf__sm2_n);
    number_add_modulo(out, high, low, csvf__sm2_n);
    csvf_wipe(high, sizeof high);
    csvf_wipe(low, sizeof low);
}

/* Why both sources: with a generator that repeats or can be guessed, the nonce is still a keyed function of what is signed, as in RFC 6979,
 * so two signatures never share one unless they are the same; and with good randomness it does not repeat even for one message, so that
 * faults and side channels cannot compare two computations with the same nonce. 512 bits leave a bias of 2^-256 after the reduction;
 * SM2 keys fall to biases of a few bits. */
void csvf__sm2_nonce(uint64_t nonce[4], const uint8_t *key, size_t key_length, const uint8_t random[32], const uint8_t *context,
                     size_t context_length, uint8_t counter)
{
    csvf_hmac_sm3 hmac, second;
    uint8_t wide[64];
    const uint8_t labels[2] = {(uint8_t)(2 * counter), (uint8_t)(2 * counter + 1)};
    csvf_hmac_sm3_init(&hmac, key, key_length);
    csvf_hmac_sm3_update(&hmac, random, 32);
    csvf_hmac_sm3_update(&hmac, context, context_length);
    second = hmac;
    csvf_hmac_sm3_update(&hmac, labels, 1);
    csvf_hmac_sm3_final(&hmac, wide);
    csvf_hmac_sm3_update(&second, labels + 1, 1);
    csvf_hmac_sm3_final(&second, wide + 32);
    csvf__sm2_reduce_wide(nonce, wide);
    csvf_wipe(wide, sizeof wide);
    csvf_wipe(&hmac, sizeof hmac);
    csvf_wipe(&second, sizeof second);
}

/* Deeper than any operation of SM2 goes (fill_table_var goes deeper but sees no secret). */
__attribute__((noinline)) void csvf__sm2_burn_stack(void)
{
    uint8_t depth[8192];
    csvf_wipe(depth, sizeof depth);
}
