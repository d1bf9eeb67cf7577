/* Where SM2's secret numbers come from, with the system's generator in the test's hand: what each is derived from, and what happens when the generator
 * gives little at a time, is interrupted, repeats itself, gives numbers that are no keys, or fails. */
#include "test.h"

#include <errno.h>
#include <sys/syscall.h>
#include <sys/types.h>

#include "../include/csvfast.h"
#include "../sm2/sm2_objects.h"
#include "reference_sm2.h"

#if defined(__linux__)

typedef enum behaviour { REAL, FIXED, MEAGRE, SCRIPT, NONE, BROKEN } behaviour;

static behaviour generator = REAL;
static uint8_t fixed[64], script[4][64];
static unsigned calls;

/* Stands before the C library's function of that name. */
ssize_t getrandom(void *out, size_t length, unsigned flags)
{
    calls++;
    switch (generator) {
    case FIXED:
        memcpy(out, fixed, length);
        return (ssize_t)length;
    case MEAGRE:        /* every second call interrupted, the others three bytes at most */
        if (calls % 2) {
            errno = EINTR;
            return -1;
        }
        length = length < 3 ? length : 3;
        memset(out, (int)calls, length);
        return (ssize_t)length;
    case SCRIPT:
        if (length != 64 || calls > 4)
            abort();
        memcpy(out, script[calls - 1], 64);
        return 64;
    case NONE:
        return 0;
    case BROKEN:
        memset(out, 0x3c, length / 2);      /* what a failed call may leave behind is nobody's random number */
        errno = ENOSYS;
        return -1;
    default:
        return syscall(SYS_getrandom, out, length, flags);
    }
}

static const uint8_t digest[32] = {0xf0, 0xb4, 0x3e, 0x94};

static csvf_sm2_private make_key(uint8_t seed)
{
    csvf_sm2_private key;
    uint8_t d[32];
    memset(d, seed, sizeof d);
    CHECK_STATUS(csvf_sm2_private_init(&key, d), CSVF_OK);
    return key;
}

/* HMAC-SM3(key, random || context || 0) || HMAC-SM3(key, random || context || 1) mod n: the formula of sm2_objects.h, by the reference. */
static void expected_nonce(uint8_t nonce[32], const uint8_t *key, size_t key_length, const uint8_t *context, size_t context_length)
{
    uint8_t wide[64];
    for (uint8_t half = 0; half < 2; half++) {
        csvf_hmac_sm3 hmac;
        csvf_hmac_sm3_init(&hmac, key, key_length);
        csvf_hmac_sm3_update(&hmac, fixed, 32);
        csvf_hmac_sm3_update(&hmac, context, context_length);
        csvf_hmac_sm3_update(&hmac, &half, 1);
        csvf_hmac_sm3_final(&hmac, wide + 32 * half);
    }
    const ref_number r = ref_minus(ref_small(0), REF_N);     /* 2^256 mod n */
    ref_to_bytes(nonce, ref_multiply_add(ref_from_bytes(wide), r, ref_from_bytes(wide + 32), REF_N));
}

/* With a generator that repeats itself, nonces still depend on the key and on all of what is signed. */
static void signing(void)
{
    generator = FIXED;
    test_fill(fixed, sizeof fixed, 1);
    uint8_t seen[40][32];
    size_t count = 0;
    for (uint8_t seed = 1; seed < 5; seed++) {
        const csvf_sm2_private key = make_key(seed);
        for (size_t bit = 0; bit < 256; bit += 29) {
            uint8_t changed[32], d[32], nonce[32], got[64], want[64];
            memcpy(changed, digest, 32);
            changed[bit / 8] ^= (uint8_t)(1 << bit % 8);
            csvf_sm2_private_bytes(d, &key);
            expected_nonce(nonce, d, 32, changed, 32);
            CHECK_STATUS(csvf_sm2_sign_digest(got, &key, changed), CSVF_OK);
            CHECK_STATUS(csvf_sm2_sign_digest_with_nonce(want, &key, changed, nonce), CSVF_OK);
            CHECK_BYTES(got, want, 64);
            for (size_t i = 0; i < count; i++)
                CHECK(memcmp(seen[i], nonce, 32) != 0);
            memcpy(seen[count++], nonce, 32);
        }
    }
    CHECK(count == 36);
}

static void encryption(void)
{
    generator = FIXED;
    test_fill(fixed, sizeof fixed, 2);
    const csvf_sm2_private key = make_key(9);
    csvf_sm2_public point;
    uint8_t plain[100], bytes[64], nonce[32], got[197], want[197];
    csvf_sm2_private_public(&point, &key);
    csvf_sm2_public_bytes(bytes, &point);
    for (size_t length = 20; length <= 100; length += 16) {
        test_fill(plain, length, length);
        expected_nonce(nonce, plain, length, bytes, 64);
        CHECK_STATUS(csvf_sm2_encrypt(got, &point, plain, length), CSVF_OK);
        CHECK_STATUS(csvf_sm2_encrypt_with_nonce(want, &point, plain, length, nonce), CSVF_OK);
        CHECK_BYTES(got, want, length + 97);
    }
}

/* Zero, n and n - 1 are no private keys: the generator is asked again; n - 2 is one. */
static void generation(void)
{
    csvf_sm2_private key;
    uint8_t d[32], want[32];
    generator = SCRIPT;
    calls = 0;
    memset(script, 0, sizeof script);
    ref_to_bytes(script[1] + 32, REF_N);
    ref_to_bytes(script[2] + 32, ref_minus(REF_N, ref_small(1)));
    ref_to_bytes(script[3] + 32, ref_minus(REF_N, ref_small(2)));
    CHECK_STATUS(csvf_sm2_private_generate(&key), CSVF_OK);
    CHECK(calls == 4);
    csvf_sm2_private_bytes(d, &key);
    ref_to_bytes(want, ref_minus(REF_N, ref_small(2)));
    CHECK_BYTES(d, want, 32);
}

static void meagre(void)
{
    uint8_t got[64];
    generator = MEAGRE;
    calls = 0;
    CHECK_STATUS(csvf__sm2_random(got, 64), CSVF_OK);
    CHECK(calls == 44);      /* 22 times three bytes or less, each after an interruption */
    for (size_t i = 0; i < 64; i++)
        CHECK(got[i] == 2 * (i / 3 + 1));
}

/* No randomness: an error, and nothing written. */
static void failing(void)
{
    const csvf_sm2_private key = make_key(7);
    csvf_sm2_private made, untouched_key;
    csvf_sm2_public point;
    uint8_t signature[64], sealed[120], untouched[120], bytes[64];
    static const uint8_t zeros[64];
    csvf_sm2_private_public(&point, &key);
    memset(untouched, 0xab, sizeof untouched);
    memset(&untouched_key, 0xab, sizeof untouched_key);
    for (int way = 0; way < 2; way++) {
        generator = way ? NONE : BROKEN;
        memcpy(signature, untouched, 64);
        memcpy(sealed, untouched, sizeof sealed);
        made = untouched_key;
        errno = 0;
        CHECK_STATUS(csvf_sm2_sign_digest(signature, &key, digest), CSVF_ERR_SYSTEM);
        CHECK(errno == (way ? EIO : ENOSYS));
        CHECK_STATUS(csvf_sm2_sign(signature, &key, digest, 3, digest, 32), CSVF_ERR_SYSTEM);
        CHECK_STATUS(csvf_sm2_encrypt(sealed, &point, digest, 23), CSVF_ERR_SYSTEM);
        CHECK_STATUS(csvf_sm2_private_generate(&made), CSVF_ERR_SYSTEM);
        CHECK_BYTES(signature, untouched, 64);
        CHECK_BYTES(sealed, untouched, sizeof sealed);
        CHECK_BYTES(&made, &untouched_key, sizeof made);
        memset(bytes, 0x11, sizeof bytes);
        CHECK_STATUS(csvf__sm2_random(bytes, sizeof bytes), CSVF_ERR_SYSTEM);
        CHECK_BYTES(bytes, zeros, sizeof bytes);
    }
    generator = REAL;
    CHECK_STATUS(csvf_sm2_sign_digest(signature, &key, digest), CSVF_OK);
    CHECK_STATUS(csvf_sm2_verify_digest_var(&point, NULL, signature, digest), CSVF_OK);
}

int main(void)
{
    RUN(signing);
    RUN(encryption);
    RUN(generation);
    RUN(meagre);
    RUN(failing);
    return test_report();
}
#else
int main(void)
{
    printf("skipped: getrandom is Linux's\n0 passed, 0 failed\n");
    return 0;
}
#endif
