/* SM2's protocols at their edges: signatures out of range or bent, x above n, ciphertexts bent, zero key streams, shared points at infinity. */
#include "test.h"

#include <sys/wait.h>

#include "../include/csvfast.h"
#include "../sm2/sm2_kernel.h"
#include "../sm2/sm2_objects.h"
#include "reference_sm2.h"

static const uint8_t ID[16] = "1234567812345678";

static void with_kernels(void (*test)(void))
{
    for (size_t i = 0; i < csvf_kernel_count(CSVF_PRIMITIVE_SM2); i++) {
        const char *name = csvf_kernel_at(CSVF_PRIMITIVE_SM2, i);
        if (csvf_force_kernel(CSVF_PRIMITIVE_SM2, name) != CSVF_OK)
            continue;
        test_case("kernel %s", name);
        test();
    }
    (void)csvf_force_kernel(CSVF_PRIMITIVE_SM2, NULL);
}

static csvf_sm2_private private_from(ref_number d)
{
    csvf_sm2_private key;
    uint8_t bytes[32];
    ref_to_bytes(bytes, d);
    CHECK_STATUS(csvf_sm2_private_init(&key, bytes), CSVF_OK);
    return key;
}

static csvf_sm2_public public_of(const csvf_sm2_private *key)
{
    csvf_sm2_public out;
    csvf_sm2_private_public(&out, key);
    return out;
}

static ref_number random_private(uint64_t *state) { return ref_minus(ref_random(state), ref_small(1)); }     /* 0 with no chance */

/* The ways of verification must say the same. */
static int verify(const csvf_sm2_public *key, const csvf_sm2_table *table, const uint8_t signature[64], const uint8_t digest[32])
{
    const int status = csvf_sm2_verify_digest_var(key, NULL, signature, digest);
    CHECK_STATUS(csvf_sm2_verify_digest_var(key, table, signature, digest), status);
    const csvf_sm2_check checks[2] = {{key, table, signature, digest}, {key, table, signature, digest}};
    uint8_t valid[2];
    CHECK_STATUS(csvf_sm2_verify_many_var(valid, checks, 2), CSVF_OK);
    CHECK(valid[0] == (status == CSVF_OK) && valid[1] == valid[0]);
    return status;
}

/* ---- Signatures ------------------------------------------------------------------------------------------------------- */

static void round_trips(void)
{
    uint64_t state = 31;
    uint8_t digest[32], signature[64], again[64];
    for (int i = 0; i < 25; i++) {
        const csvf_sm2_private key = private_from(random_private(&state));
        const csvf_sm2_public point = public_of(&key);
        csvf_sm2_table *table;
        CHECK_STATUS(csvf_sm2_table_create(&table, &point), CSVF_OK);
        test_fill(digest, 32, test_random(&state));
        if (i < 2)
            memset(digest, i ? 0xff : 0, sizeof digest);     /* e >= n is reduced */
        CHECK_STATUS(csvf_sm2_sign_digest(signature, &key, digest), CSVF_OK);
        CHECK_STATUS(verify(&point, table, signature, digest), CSVF_OK);
        CHECK_STATUS(csvf_sm2_sign_digest(again, &key, digest), CSVF_OK);
        CHECK(memcmp(signature, again, 64) != 0);            /* the generator has its say */
        for (int bit = i % 11; bit < 512; bit += 11) {
            signature[bit / 8] ^= (uint8_t)(1 << bit % 8);
            CHECK_STATUS(verify(&point, table, signature, digest), CSVF_ERR_AUTHENTICATION);
            signature[bit / 8] ^= (uint8_t)(1 << bit % 8);
        }
        for (int bit = i % 13; bit < 256; bit += 13) {
            digest[bit / 8] ^= (uint8_t)(1 << bit % 8);
            CHECK_STATUS(verify(&point, table, signature, digest), CSVF_ERR_AUTHENTICATION);
            digest[bit / 8] ^= (uint8_t)(1 << bit % 8);
        }
        const csvf_sm2_private other = private_from(random_private(&state));
        const csvf_sm2_public other_point = public_of(&other);
        CHECK_STATUS(csvf_sm2_verify_digest_var(&other_point, NULL, signature, digest), CSVF_ERR_AUTHENTICATION);
        CHECK_STATUS(csvf_sm2_verify_digest_var(&other_point, table, signature, digest), CSVF_ERR_ARGUMENT);
        csvf_sm2_table_destroy(table);

        uint8_t message[300];
        test_fill(message, sizeof message, test_random(&state));
        const size_t length = (size_t)i * 12;
        CHECK_STATUS(csvf_sm2_sign(signature, &key, ID, (size_t)i % 17, message, length), CSVF_OK);
        CHECK_STATUS(csvf_sm2_verify_var(&point, NULL, signature, ID, (size_t)i % 17, message, length), CSVF_OK);
        CHECK_STATUS(csvf_sm2_verify_var(&point, NULL, signature, ID, (size_t)(i + 1) % 17, message, length), CSVF_ERR_AUTHENTICATION);
        CHECK_STATUS(csvf_sm2_verify_var(&point, NULL, signature, ID, (size_t)i % 17, message, length + 1), CSVF_ERR_AUTHENTICATION);
    }
}

static void out_of_range(void)
{
    uint64_t state = 41;
    uint8_t digest[32], signature[64], bent[64];
    const csvf_sm2_private key = private_from(random_private(&state));
    const csvf_sm2_public point = public_of(&key);
    csvf_sm2_table *table;
    CHECK_STATUS(csvf_sm2_table_create(&table, &point), CSVF_OK);
    test_fill(digest, 32, 8);
    CHECK_STATUS(csvf_sm2_sign_digest(signature, &key, digest), CSVF_OK);
    const ref_number ones = ref_minus(ref_small(0), ref_small(1));
    const ref_number edges[] = {ref_small(0), ref_small(1), ref_minus(REF_N, ref_small(1)), REF_N, ref_minus(REF_N, ref_small(UINT64_MAX)),
                                ref_minus(ref_small(1), ref_minus(ref_small(0), REF_N)), REF_P, ones};
    enum { EDGES = sizeof edges / sizeof *edges };
    for (int i = 0; i < EDGES; i++)
        for (int j = 0; j <= EDGES; j++) {
            for (int half = 0; half < 2; half++) {
                memcpy(bent, signature, 64);
                ref_to_bytes(bent + 32 * half, edges[i]);
                if (j < EDGES)
                    ref_to_bytes(bent + 32 - 32 * half, edges[j]);
                CHECK_STATUS(verify(&point, table, bent, digest), CSVF_ERR_AUTHENTICATION);
            }
        }
    /* r + n and s + n are not r and s, where they fit: impossible for most, so r + s = n instead: t = 0 */
    ref_to_bytes(bent + 32, ref_minus(REF_N, ref_from_bytes(signature)));
    memcpy(bent, signature, 32);
    CHECK_STATUS(verify(&point, table, bent, digest), CSVF_ERR_AUTHENTICATION);
    /* ... and with the e that would make r right for s G alone */
    csvf_sm2_affine sum;
    uint8_t bytes[64];
    const ref_number s = ref_from_bytes(bent + 32);
    csvf__sm2()->multiply_base(&sum, s.v);
    csvf__sm2_point_bytes(bytes, &sum);
    const ref_number x = ref_plus(ref_from_bytes(bytes), ref_small(0), REF_N);
    ref_to_bytes(digest, ref_plus(ref_from_bytes(signature), ref_negate(x, REF_N), REF_N));
    CHECK_STATUS(verify(&point, table, bent, digest), CSVF_ERR_AUTHENTICATION);
    /* (r, s) = (e, 0) and the like, with everything zero */
    memset(bent, 0, 64);
    memset(digest, 0, 32);
    CHECK_STATUS(verify(&point, table, bent, digest), CSVF_ERR_AUTHENTICATION);
    csvf_sm2_table_destroy(table);
}

/* s G + t P with an x of n or more: r = e + x mod n has lost n, and the signature is valid all the same. Chance never meets this, so
 * Q is made from a small x - n, and P = (Q - s G) / t. Beside it: the x without the n must not pass for another point. */
static void x_above_n(void)
{
    uint64_t state = 51;
    unsigned found = 0;
    for (uint64_t above = 0; found < 6; above++) {
        uint8_t coded[33] = {2}, encoded[64], digest[32], signature[64];
        csvf_sm2_public q, key;
        csvf_sm2_table *table;
        ref_to_bytes(coded + 1, ref_plus(REF_N, ref_small(above), REF_P));
        if (csvf_sm2_public_init(&q, coded, 33) != CSVF_OK)
            continue;
        found++;
        csvf_sm2_public_bytes(encoded, &q);
        const ref_number r = ref_random(&state), s = ref_random(&state), t = ref_plus(r, s, REF_N);
        const ref_point difference = ref_add(ref_from_point(encoded), ref_times(ref_minus(REF_N, s), ref_base()));
        ref_bytes(encoded, ref_times(ref_invert(t, REF_N), difference));
        CHECK_STATUS(csvf_sm2_public_init(&key, encoded, 64), CSVF_OK);
        CHECK_STATUS(csvf_sm2_table_create(&table, &key), CSVF_OK);
        ref_to_bytes(signature, r);
        ref_to_bytes(signature + 32, s);
        ref_to_bytes(digest, ref_plus(r, ref_negate(ref_small(above), REF_N), REF_N));     /* e = r - x */
        CHECK_STATUS(verify(&key, table, signature, digest), CSVF_OK);
        ref_to_bytes(digest, ref_plus(r, ref_negate(ref_small(above + 1), REF_N), REF_N));
        CHECK_STATUS(verify(&key, table, signature, digest), CSVF_ERR_AUTHENTICATION);
        csvf_sm2_table_destroy(table);
    }
}

/* The digest for which s G + (r + s) P, P = k G, has the right x: whatever is refused after that is refused for its form alone. */
static void digest_for(uint8_t digest[32], ref_number r, ref_number s, ref_number k)
{
    csvf_sm2_affine sum;
    uint8_t bytes[64];
    const ref_number whole = ref_multiply_add(ref_plus(r, s, REF_N), k, s, REF_N);
    csvf__sm2()->multiply_base(&sum, whole.v);
    csvf__sm2_point_bytes(bytes, &sum);
    ref_to_bytes(digest, ref_plus(r, ref_negate(ref_plus(ref_from_bytes(bytes), ref_small(0), REF_N), REF_N), REF_N));
}

/* 0 for r or s, r + n and s + n for small ones, r + s = n, where everything else is right; and each of these numbers where it is good. */
static void equation_holds(void)
{
    uint64_t state = 55;
    uint8_t digest[32], signature[64];
    const ref_number k = random_private(&state), any = ref_random(&state);
    const ref_number numbers[] = {ref_small(0), ref_small(1), ref_small(5), any, ref_minus(REF_N, any), ref_minus(REF_N, ref_small(1))};
    enum { NUMBERS = sizeof numbers / sizeof *numbers };
    const csvf_sm2_private key = private_from(k);
    const csvf_sm2_public point = public_of(&key);
    csvf_sm2_table *table;
    CHECK_STATUS(csvf_sm2_table_create(&table, &point), CSVF_OK);
    unsigned good = 0;
    for (int i = 0; i < NUMBERS; i++)
        for (int j = 0; j < NUMBERS; j++)
            for (int form = 0; form < 4; form++) {
                ref_number r = numbers[i], s = numbers[j];
                const int is_good = form == 0 && i > 0 && j > 0 && ref_compare(ref_plus(r, s, REF_N), ref_small(0));
                if ((form & 1 && i > 2) || (form & 2 && j > 2))
                    continue;     /* does not fit 256 bits */
                digest_for(digest, r, s, k);
                if (form & 1)
                    r = ref_minus(r, ref_minus(ref_small(0), REF_N));
                if (form & 2)
                    s = ref_minus(s, ref_minus(ref_small(0), REF_N));
                ref_to_bytes(signature, r);
                ref_to_bytes(signature + 32, s);
                test_case("r %d, s %d, form %d", i, j, form);
                CHECK_STATUS(verify(&point, table, signature, digest), is_good ? CSVF_OK : CSVF_ERR_AUTHENTICATION);
                good += (unsigned)is_good;
                /* x + p - n and x + 2^256 - n are not x, though n more than each of them is, modulo p or 256 bits */
                const ref_number moduli[] = {REF_P, ref_small(0)};
                for (int m = 0; m < 2 && is_good; m++) {
                    const ref_number less = ref_minus(moduli[m], REF_N), e = ref_from_bytes(digest);
                    ref_to_bytes(digest, ref_plus(e, ref_negate(less, REF_N), REF_N));
                    CHECK_STATUS(verify(&point, table, signature, digest), CSVF_ERR_AUTHENTICATION);
                    ref_to_bytes(digest, e);
                }
            }
    CHECK(good == 21);
    csvf_sm2_table_destroy(table);
}

/* e of n and more, up to 2^256 - 1, under an r so small that r - e + n would still be negative: chance meets this once in 2^32. P is made
 * as in x_above_n. */
static void large_digests(void)
{
    uint64_t state = 57;
    const ref_number ones = ref_minus(ref_small(0), ref_small(1)), e = ref_plus(ones, ref_small(0), REF_N);
    uint8_t digest[32], coded[33] = {2}, encoded[64], signature[64];
    unsigned found = 0;
    ref_to_bytes(digest, ones);
    for (uint64_t small = 1; found < 3; small++) {
        csvf_sm2_public q, key;
        csvf_sm2_table *table;
        const ref_number r = ref_small(small), s = ref_random(&state), t = ref_plus(r, s, REF_N);
        ref_to_bytes(coded + 1, ref_plus(r, ref_negate(e, REF_N), REF_N));     /* x = r - e */
        if (csvf_sm2_public_init(&q, coded, 33) != CSVF_OK)
            continue;
        found++;
        csvf_sm2_public_bytes(encoded, &q);
        const ref_point difference = ref_add(ref_from_point(encoded), ref_times(ref_minus(REF_N, s), ref_base()));
        ref_bytes(encoded, ref_times(ref_invert(t, REF_N), difference));
        CHECK_STATUS(csvf_sm2_public_init(&key, encoded, 64), CSVF_OK);
        CHECK_STATUS(csvf_sm2_table_create(&table, &key), CSVF_OK);
        ref_to_bytes(signature, r);
        ref_to_bytes(signature + 32, s);
        CHECK_STATUS(verify(&key, table, signature, digest), CSVF_OK);
        csvf_sm2_table_destroy(table);
    }
}

static void nonces(void)
{
    uint64_t state = 61;
    uint8_t digest[32], nonce[32], signature[64], untouched[64];
    const ref_number d = random_private(&state);
    const csvf_sm2_private key = private_from(d);
    const csvf_sm2_public point = public_of(&key);
    test_fill(digest, 32, 3);
    memset(untouched, 0xab, 64);
    memcpy(signature, untouched, 64);
    const ref_number bad[] = {ref_small(0), REF_N, ref_minus(ref_small(0), ref_small(1)), ref_minus(ref_small(1), ref_minus(ref_small(0), REF_N))};
    for (int i = 0; i < 4; i++) {
        ref_to_bytes(nonce, bad[i]);
        CHECK_STATUS(csvf_sm2_sign_digest_with_nonce(signature, &key, digest, nonce), CSVF_ERR_KEY);
        CHECK_BYTES(signature, untouched, 64);
    }
    /* r = 0, r + k = n, s = 0 by choice of e: x is known beforehand */
    const ref_number k = ref_random(&state);
    uint8_t bytes[64];
    ref_bytes(bytes, ref_times(k, ref_base()));
    const ref_number x = ref_plus(ref_from_bytes(bytes), ref_small(0), REF_N);
    const ref_number inverse_d = ref_invert(d, REF_N);
    const ref_number r_bad[] = {ref_small(0), ref_negate(k, REF_N), ref_mul(k, inverse_d, REF_N)};     /* s = 0: k = r d */
    ref_to_bytes(nonce, k);
    for (int i = 0; i < 3; i++) {
        ref_to_bytes(digest, ref_plus(r_bad[i], ref_negate(x, REF_N), REF_N));
        CHECK_STATUS(csvf_sm2_sign_digest_with_nonce(signature, &key, digest, nonce), CSVF_ERR_KEY);
        CHECK_BYTES(signature, untouched, 64);
        CHECK_STATUS(csvf_sm2_sign_digest(signature, &key, digest), CSVF_OK);     /* with a nonce of its own it is a digest like any other */
        CHECK_STATUS(verify(&point, NULL, signature, digest), CSVF_OK);
        memcpy(signature, untouched, 64);
    }
    const ref_number good[] = {ref_small(1), ref_minus(REF_N, ref_small(1))};
    test_fill(digest, 32, 4);
    for (int i = 0; i < 2; i++) {
        ref_to_bytes(nonce, good[i]);
        CHECK_STATUS(csvf_sm2_sign_digest_with_nonce(signature, &key, digest, nonce), CSVF_OK);
        CHECK_STATUS(verify(&point, NULL, signature, digest), CSVF_OK);
        /* s (1 + d) = k - r d, by the reference */
        const ref_number r = ref_from_bytes(signature), s = ref_from_bytes(signature + 32);
        CHECK(!ref_compare(ref_plus(ref_mul(s, ref_plus(d, ref_small(1), REF_N), REF_N), ref_mul(r, d, REF_N), REF_N), good[i]));
    }
}

/* The derivation itself: another key, message, random string or counter gives another nonce; the same ones the same. */
static void test_nonce_derivation(void)
{
    uint8_t key[32] = {1}, random[32] = {2}, digest[32] = {3};
    uint64_t first[4], k[4];
    csvf__sm2_nonce(first, key, 32, random, digest, 32, 0);
    csvf__sm2_nonce(k, key, 32, random, digest, 32, 0);
    CHECK(!memcmp(first, k, 32));
    uint8_t *const inputs[] = {key, random, digest};
    for (int i = 0; i < 3; i++) {
        inputs[i][31] ^= 1;
        csvf__sm2_nonce(k, key, 32, random, digest, 32, 0);
        CHECK(memcmp(first, k, 32) != 0);
        inputs[i][31] ^= 1;
    }
    csvf__sm2_nonce(k, key, 32, random, digest, 32, 1);
    CHECK(memcmp(first, k, 32) != 0);
    /* 512 bits modulo n, against the reference */
    uint64_t state = 7;
    uint8_t wide[64];
    for (int i = 0; i < 300; i++) {
        test_fill(wide, sizeof wide, test_random(&state));
        if (i < 8)
            memset(wide + (i & 1 ? 0 : 32), i & 2 ? 0xff : 0, i & 4 ? 64u >> (i & 1 ? 0 : 1) : 32);
        csvf__sm2_reduce_wide(k, wide);
        const ref_number high = ref_from_bytes(wide), low = ref_from_bytes(wide + 32), r = ref_minus(ref_small(0), REF_N);
        const ref_number want = ref_multiply_add(high, r, low, REF_N);
        CHECK_BYTES(k, want.v, 32);
    }
}

static void test_signatures(void)
{
    with_kernels(round_trips);
    with_kernels(out_of_range);
    with_kernels(x_above_n);
    with_kernels(equation_holds);
    with_kernels(large_digests);
    with_kernels(nonces);
}

/* Two processes with one state of everything else: the nonces, and so the r, differ. */
static void test_fork(void)
{
    uint64_t state = 71;
    const csvf_sm2_private key = private_from(random_private(&state));
    uint8_t digest[32] = {9}, mine[64], theirs[64] = {0};
    int ends[2];
    CHECK(pipe(ends) == 0);
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        const int status = csvf_sm2_sign_digest(mine, &key, digest);
        _exit(status != CSVF_OK || write(ends[1], mine, 64) != 64);
    }
    CHECK_STATUS(csvf_sm2_sign_digest(mine, &key, digest), CSVF_OK);
    CHECK(read(ends[0], theirs, 64) == 64);
    int status = 1;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(memcmp(mine, theirs, 32) != 0);
    close(ends[0]);
    close(ends[1]);
}

/* ---- Encryption ------------------------------------------------------------------------------------------------------- */

static void encryption(void)
{
    enum { MOST = 300 };
    uint64_t state = 81;
    uint8_t plain[MOST], opened[MOST], sealed[MOST + 97];
    static const uint8_t zeros[MOST];
    const csvf_sm2_private key = private_from(random_private(&state)), other = private_from(random_private(&state));
    const csvf_sm2_public point = public_of(&key);
    test_guarded in = test_guard(MOST), out = test_guard(MOST + 97);
    for (size_t length = 1; length <= MOST; length += length < 70 ? 1 : 23) {
        test_fill(plain, length, length);
        uint8_t *from = in.end - length, *to = out.end - length - 97;
        memcpy(from, plain, length);
        CHECK_STATUS(csvf_sm2_encrypt(to, &point, from, length), CSVF_OK);
        memcpy(sealed, to, length + 97);
        CHECK_STATUS(csvf_sm2_decrypt(from, &key, to, length + 97), CSVF_OK);
        CHECK_BYTES(from, plain, length);
        memset(opened, 0x77, sizeof opened);
        CHECK_STATUS(csvf_sm2_decrypt(opened, &other, sealed, length + 97), CSVF_ERR_AUTHENTICATION);
        CHECK_BYTES(opened, zeros, length);
        for (size_t byte = 0; byte < length + 97; byte += length < 20 ? 1 : 17) {
            sealed[byte] ^= (uint8_t)(1 << (byte + length) % 8);
            memset(opened, 0x77, sizeof opened);
            CHECK_STATUS(csvf_sm2_decrypt(opened, &key, sealed, length + 97), byte < 65 ? CSVF_ERR_POINT : CSVF_ERR_AUTHENTICATION);
            CHECK_BYTES(opened, zeros, length);
            sealed[byte] ^= (uint8_t)(1 << (byte + length) % 8);
        }
    }
    test_unguard(in);
    test_unguard(out);
    for (size_t length = 0; length <= 97; length++)
        CHECK_STATUS(csvf_sm2_decrypt(opened, &key, sealed, length), CSVF_ERR_LENGTH);
    CHECK_STATUS(csvf_sm2_encrypt(sealed, &point, plain, 0), CSVF_ERR_LENGTH);
    CHECK_STATUS(csvf_sm2_encrypt(sealed, &point, plain, (size_t)1 << 32), CSVF_ERR_LENGTH);
    CHECK_STATUS(csvf_sm2_encrypt(sealed, &point, sealed + 100, 20), CSVF_ERR_OVERLAP);
    CHECK_STATUS(csvf_sm2_encrypt(sealed + 10, &point, sealed, 20), CSVF_ERR_OVERLAP);
    CHECK_STATUS(csvf_sm2_decrypt(sealed, &key, sealed, 117), CSVF_ERR_OVERLAP);
    CHECK_STATUS(csvf_sm2_decrypt(sealed + 116, &key, sealed, 117), CSVF_ERR_OVERLAP);
    CHECK_STATUS(csvf_sm2_encrypt(NULL, &point, plain, 1), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm2_encrypt(sealed, NULL, plain, 1), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm2_encrypt(sealed, &point, NULL, 1), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm2_encrypt_with_nonce(sealed, &point, plain, 1, NULL), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm2_decrypt(NULL, &key, sealed, 98), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm2_decrypt(plain, NULL, sealed, 98), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm2_decrypt(plain, &key, NULL, 98), CSVF_ERR_ARGUMENT);
}

/* One byte in 256 meets a key stream of one zero byte: refused with the caller's nonce, refused when someone else did it, never made. */
static void zero_stream(void)
{
    uint64_t state = 91;
    uint8_t plain[1] = {0x5a}, opened[1], sealed[98], untouched[98], nonce[32];
    const csvf_sm2_private key = private_from(random_private(&state));
    const csvf_sm2_public point = public_of(&key);
    uint8_t encoded[64];
    csvf_sm2_public_bytes(encoded, &point);
    const ref_number bad[] = {ref_small(0), REF_N, ref_minus(ref_small(0), ref_small(1))};
    memset(untouched, 0xcd, sizeof untouched);
    memcpy(sealed, untouched, sizeof sealed);
    for (int i = 0; i < 3; i++) {
        ref_to_bytes(nonce, bad[i]);
        CHECK_STATUS(csvf_sm2_encrypt_with_nonce(sealed, &point, plain, 1, nonce), CSVF_ERR_KEY);
        CHECK_BYTES(sealed, untouched, sizeof sealed);
    }
    unsigned refused = 0;
    for (uint64_t k = 1; refused < 2 && k < 5000; k++) {
        ref_to_bytes(nonce, ref_small(k));
        const int status = csvf_sm2_encrypt_with_nonce(sealed, &point, plain, 1, nonce);
        if (status == CSVF_OK) {
            memcpy(sealed, untouched, sizeof sealed);
            continue;
        }
        CHECK_STATUS(status, CSVF_ERR_KEY);
        CHECK_BYTES(sealed, untouched, sizeof sealed);
        refused++;
        uint8_t shared[64], message[65], c1[64];
        ref_bytes(shared, ref_times(ref_small(k), ref_from_point(encoded)));
        ref_bytes(c1, ref_times(ref_small(k), ref_base()));
        memcpy(message, shared, 32);
        message[32] = plain[0];
        memcpy(message + 33, shared + 32, 32);
        sealed[0] = 4;
        memcpy(sealed + 1, c1, 64);
        csvf_sm3_digest(sealed + 65, message, sizeof message);
        sealed[97] = plain[0];
        CHECK_STATUS(csvf_sm2_decrypt(opened, &key, sealed, 98), CSVF_ERR_AUTHENTICATION);
        memcpy(sealed, untouched, sizeof sealed);
    }
    CHECK(refused == 2);
    for (int i = 0; i < 600; i++) {
        CHECK_STATUS(csvf_sm2_encrypt(sealed, &point, plain, 1), CSVF_OK);
        CHECK(sealed[97] != plain[0]);
    }
}

static void test_encryption(void)
{
    with_kernels(encryption);
    with_kernels(zero_stream);
}

/* ---- Key agreement ---------------------------------------------------------------------------------------------------- */

static void agreement(void)
{
    uint64_t state = 101;
    uint8_t za[32], zb[32], key_a[100], key_b[100], both_a[64], both_b[64], x_bytes[64];
    static const uint8_t zeros[100];
    for (size_t i = 0; i < 12; i++) {
        const csvf_sm2_private a = private_from(random_private(&state)), b = private_from(random_private(&state));
        const csvf_sm2_private ra = private_from(random_private(&state)), rb = private_from(random_private(&state));
        const csvf_sm2_public pa = public_of(&a), pb = public_of(&b), pra = public_of(&ra), prb = public_of(&rb);
        const size_t length = 1 + 9 * i;
        CHECK_STATUS(csvf_sm2_z(za, &pa, ID, 16), CSVF_OK);
        CHECK_STATUS(csvf_sm2_z(zb, &pb, ID, i), CSVF_OK);
        CHECK_STATUS(csvf_sm2_agree(key_a, length, both_a, 1, &a, &ra, za, &pb, &prb, zb), CSVF_OK);
        CHECK_STATUS(csvf_sm2_agree(key_b, length, both_b, 0, &b, &rb, zb, &pa, &pra, za), CSVF_OK);
        CHECK_BYTES(key_a, key_b, length);
        CHECK_BYTES(both_a, both_b, 64);
        CHECK_STATUS(csvf_sm2_agree(key_b, length, both_b, 1, &b, &rb, zb, &pa, &pra, za), CSVF_OK);     /* both initiators: not the same */
        CHECK(memcmp(both_a, both_b, 64) != 0);

        /* P_B = -x2 R_B makes the sum infinite; d_A = -x1 r_A makes t zero */
        csvf_sm2_public_bytes(x_bytes, &prb);
        ref_number x = ref_from_bytes(x_bytes);
        x.v[1] |= UINT64_C(1) << 63;
        x.v[2] = x.v[3] = 0;
        const ref_number evil = ref_negate(ref_mul(x, ref_from_bytes((csvf_sm2_private_bytes(x_bytes, &rb), x_bytes)), REF_N), REF_N);
        const csvf_sm2_private evil_key = private_from(evil);
        const csvf_sm2_public evil_point = public_of(&evil_key);
        memset(key_a, 0x11, sizeof key_a);
        CHECK_STATUS(csvf_sm2_agree(key_a, length, both_a, 1, &a, &ra, za, &evil_point, &prb, zb), CSVF_ERR_POINT);
        CHECK_BYTES(key_a, zeros, length);
        CHECK_STATUS(csvf_sm2_agree(key_a, length, both_a, 0, &evil_key, &rb, zb, &pa, &pra, za), CSVF_ERR_POINT);
        CHECK_BYTES(key_a, zeros, length);
        if (i)
            continue;
        CHECK_STATUS(csvf_sm2_agree(key_a, 0, NULL, 1, &a, &ra, za, &pb, &prb, zb), CSVF_ERR_LENGTH);
        CHECK_STATUS(csvf_sm2_agree(key_a, (size_t)1 << 32, NULL, 1, &a, &ra, za, &pb, &prb, zb), CSVF_ERR_LENGTH);
        CHECK_STATUS(csvf_sm2_agree(key_a, 16, NULL, 2, &a, &ra, za, &pb, &prb, zb), CSVF_ERR_ARGUMENT);
        CHECK_STATUS(csvf_sm2_agree(NULL, 16, NULL, 1, &a, &ra, za, &pb, &prb, zb), CSVF_ERR_ARGUMENT);
        CHECK_STATUS(csvf_sm2_agree(key_a, 16, NULL, 1, &a, &ra, za, &pb, NULL, zb), CSVF_ERR_ARGUMENT);
    }
}

static void test_agreement(void) { with_kernels(agreement); }

static void test_arguments(void)
{
    uint64_t state = 111;
    const csvf_sm2_private key = private_from(random_private(&state));
    const csvf_sm2_public point = public_of(&key);
    static uint8_t id[CSVF_SM2_ID_MAX + 1];
    uint8_t out[64], digest[32] = {1}, want[32];
    csvf_sm2_table *table = NULL;
    CHECK_STATUS(csvf_sm2_z(out, &point, id, CSVF_SM2_ID_MAX), CSVF_OK);
    CHECK_STATUS(csvf_sm2_z(out, &point, id, CSVF_SM2_ID_MAX + 1), CSVF_ERR_LENGTH);
    CHECK_STATUS(csvf_sm2_z(out, &point, NULL, 1), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm2_z(out, &point, NULL, 0), CSVF_OK);
    CHECK_STATUS(csvf_sm2_z(want, &point, id, 0), CSVF_OK);
    CHECK_BYTES(out, want, 32);
    CHECK_STATUS(csvf_sm2_z(NULL, &point, id, 0), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm2_z(out, NULL, id, 0), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm2_digest(out, &point, id, 3, NULL, 1), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm2_digest(out, &point, id, CSVF_SM2_ID_MAX + 1, id, 1), CSVF_ERR_LENGTH);
    CHECK_STATUS(csvf_sm2_sign_digest(NULL, &key, digest), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm2_sign_digest(out, NULL, digest), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm2_sign_digest(out, &key, NULL), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm2_sign(out, &key, id, CSVF_SM2_ID_MAX + 1, id, 1), CSVF_ERR_LENGTH);
    CHECK_STATUS(csvf_sm2_sign(out, &key, id, 1, NULL, 1), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm2_sign_digest_with_nonce(out, &key, digest, NULL), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm2_verify_digest_var(NULL, NULL, out, digest), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm2_verify_digest_var(&point, NULL, NULL, digest), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm2_verify_digest_var(&point, NULL, out, NULL), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm2_verify_var(&point, NULL, out, id, CSVF_SM2_ID_MAX + 1, id, 1), CSVF_ERR_LENGTH);
    CHECK_STATUS(csvf_sm2_table_create(NULL, &point), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm2_table_create(&table, NULL), CSVF_ERR_ARGUMENT);
    CHECK(table == NULL);
    csvf_sm2_table_destroy(NULL);
    /* The table of -P has the same x: another key's table all the same. */
    uint8_t d[32], valid = 7;
    csvf_sm2_private_bytes(d, &key);
    const csvf_sm2_private opposite = private_from(ref_minus(REF_N, ref_from_bytes(d)));
    const csvf_sm2_public opposite_point = public_of(&opposite);
    CHECK_STATUS(csvf_sm2_table_create(&table, &opposite_point), CSVF_OK);
    CHECK_STATUS(csvf_sm2_sign_digest(out, &opposite, digest), CSVF_OK);
    CHECK_STATUS(csvf_sm2_verify_digest_var(&opposite_point, table, out, digest), CSVF_OK);
    CHECK_STATUS(csvf_sm2_verify_digest_var(&point, table, out, digest), CSVF_ERR_ARGUMENT);
    const csvf_sm2_check check = {&point, table, out, digest};
    CHECK_STATUS(csvf_sm2_verify_many_var(&valid, &check, 1), CSVF_ERR_ARGUMENT);
    CHECK(valid == 0);
    csvf_sm2_table_destroy(table);
    CHECK(csvf_sm2_table_bytes() >= CSVF_SM2_KEY_WINDOWS * CSVF_SM2_KEY_ENTRIES * 64u);
}

int main(void)
{
    RUN(test_signatures);
    RUN(test_nonce_derivation);
    RUN(test_fork);
    RUN(test_encryption);
    RUN(test_agreement);
    RUN(test_arguments);
    return test_report();
}
