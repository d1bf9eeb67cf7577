/* SM4-GCM and GHASH: RFC 8998's vector, every length, nonce and tag length, every GHASH kernel, refusals, wrong tags. */
#include "test.h"

#include "../include/csvfast.h"
#include "../sm4/ghash_kernel.h"
#include "reference_sm4.h"

static char names[200];   /* the kernels in use */

/* Every available SM4 kernel with every available GHASH kernel. */
static void with_each_pair(void (*function)(void))
{
    unsigned tried = 0;
    for (size_t i = 0; i < csvf_kernel_count(CSVF_PRIMITIVE_SM4); i++)
        for (size_t j = 0; j < csvf_kernel_count(CSVF_PRIMITIVE_GHASH); j++) {
            const char *sm4 = csvf_kernel_at(CSVF_PRIMITIVE_SM4, i), *ghash = csvf_kernel_at(CSVF_PRIMITIVE_GHASH, j);
            if (!csvf_kernel_available(CSVF_PRIMITIVE_SM4, sm4) || !csvf_kernel_available(CSVF_PRIMITIVE_GHASH, ghash))
                continue;
            snprintf(names, sizeof names, "%s with %s", sm4, ghash);
            CHECK_STATUS(csvf_force_kernel(CSVF_PRIMITIVE_SM4, sm4), CSVF_OK);
            CHECK_STATUS(csvf_force_kernel(CSVF_PRIMITIVE_GHASH, ghash), CSVF_OK);
            function();
            tried++;
        }
    CHECK(tried > 0);
    CHECK_STATUS(csvf_force_kernel(CSVF_PRIMITIVE_SM4, NULL), CSVF_OK);
    CHECK_STATUS(csvf_force_kernel(CSVF_PRIMITIVE_GHASH, NULL), CSVF_OK);
}

/* ---- GHASH -------------------------------------------------------------------------------------------------------- */

static void ghash_kernels(void)
{
    uint8_t h[16], data[16 * 70], start[16], y[16], want[16];
    unsigned tried = 0;
    test_fill(data, sizeof data, 2);
    test_fill(start, 16, 3);
    for (size_t j = 0; csvf__ghash_kernels[j]; j++) {
        const csvf_ghash_kernel *kernel = csvf__ghash_kernels[j];
        if (!csvf_kernel_available(CSVF_PRIMITIVE_GHASH, kernel->name))
            continue;
        tried++;
        for (size_t k = 0; k < 132; k++) {
            /* every single bit of H, all zeros, all ones, noise */
            csvf_ghash_key powers;
            memset(h, k == 129 ? 0xff : 0, 16);
            if (k < 128)
                h[k / 8] = (uint8_t)(0x80 >> k % 8);
            else if (k > 129)
                test_fill(h, 16, k);
            kernel->init(&powers, h);
            for (size_t n = 0; n <= 70; n += k < 128 ? 23 : 1) {
                test_case("%s, h %zu, %zu blocks", kernel->name, k, n);
                memcpy(y, start, 16);
                memcpy(want, start, 16);
                reference_ghash(want, data, 16 * n, h);
                kernel->update(&powers, y, data, n);
                CHECK_BYTES(y, want, 16);
            }
        }
    }
    CHECK(tried > 0);
}

/* ---- GCM ---------------------------------------------------------------------------------------------------------- */

static void vector_here(void)
{
    uint8_t key[16], nonce[12], aad[20], plain[64], want[64], want_tag[16], out[64], tag[16];
    csvf_sm4_gcm gcm;
    test_case("%s", names);
    /* RFC 8998 A.1 */
    test_hex(key, 16, "0123456789ABCDEFFEDCBA9876543210");
    test_hex(nonce, 12, "00001234567800000000ABCD");
    test_hex(aad, 20, "FEEDFACEDEADBEEFFEEDFACEDEADBEEFABADDAD2");
    test_hex(plain, 64, "AAAAAAAAAAAAAAAABBBBBBBBBBBBBBBBCCCCCCCCCCCCCCCCDDDDDDDDDDDDDDDD"
                        "EEEEEEEEEEEEEEEEFFFFFFFFFFFFFFFFEEEEEEEEEEEEEEEEAAAAAAAAAAAAAAAA");
    test_hex(want, 64, "17F399F08C67D5EE19D0DC9969C4BB7D5FD46FD3756489069157B282BB200735"
                       "D82710CA5C22F0CCFA7CBF93D496AC15A56834CBCF98C397B4024A2691233B8D");
    test_hex(want_tag, 16, "83DE3541E4C2B58177E065A9BF7B62EC");
    CHECK_STATUS(csvf_sm4_gcm_init(&gcm, key), CSVF_OK);
    CHECK_STATUS(csvf_sm4_gcm_encrypt(&gcm, out, tag, 16, nonce, 12, aad, 20, plain, 64), CSVF_OK);
    CHECK_BYTES(out, want, 64);
    CHECK_BYTES(tag, want_tag, 16);
    CHECK_STATUS(csvf_sm4_gcm_decrypt(&gcm, out, tag, 16, nonce, 12, aad, 20, out, 64), CSVF_OK);
    CHECK_BYTES(out, plain, 64);
}
static void rfc8998_vector(void) { with_each_pair(vector_here); }

/* Encrypts and decrypts at guard pages, apart and in place, and compares with the reference. */
static void compare(test_guarded in, test_guarded out, size_t length, size_t aad_length, size_t nonce_length, size_t tag_length)
{
    static uint8_t data[40000], want[sizeof data], aad[2000], nonce[2000];
    uint8_t key[16], want_tag[16];
    csvf_sm4_gcm gcm;
    test_case("%s, %zu bytes, %zu associated, nonce %zu, tag %zu", names, length, aad_length, nonce_length, tag_length);
    if (length > sizeof data || aad_length > sizeof aad || nonce_length > sizeof nonce)
        abort();
    test_fill(key, 16, length + 1);
    test_fill(data, length, length + 2);
    test_fill(aad, aad_length, length + 3);
    test_fill(nonce, nonce_length, nonce_length);
    reference_gcm(want, want_tag, nonce, nonce_length, aad, aad_length, data, length, key);
    uint8_t *i = in.end - length, *o = out.end - tag_length - length, *tag = out.end - tag_length;
    memcpy(i, data, length);
    CHECK_STATUS(csvf_sm4_gcm_init(&gcm, key), CSVF_OK);
    CHECK_STATUS(csvf_sm4_gcm_encrypt(&gcm, o, tag, tag_length, nonce, nonce_length, aad, aad_length, i, length), CSVF_OK);
    CHECK_BYTES(o, want, length);
    CHECK_BYTES(tag, want_tag, tag_length);
    CHECK_BYTES(i, data, length);
    CHECK_STATUS(csvf_sm4_gcm_decrypt(&gcm, i, tag, tag_length, nonce, nonce_length, aad, aad_length, o, length), CSVF_OK);
    CHECK_BYTES(i, data, length);
    CHECK_STATUS(csvf_sm4_gcm_encrypt(&gcm, i, tag, tag_length, nonce, nonce_length, aad, aad_length, i, length), CSVF_OK);
    CHECK_BYTES(i, want, length);
    CHECK_BYTES(tag, want_tag, tag_length);
    CHECK_STATUS(csvf_sm4_gcm_decrypt(&gcm, i, tag, tag_length, nonce, nonce_length, aad, aad_length, i, length), CSVF_OK);
    CHECK_BYTES(i, data, length);
}

static void lengths_here(void)
{
    static const size_t tags[] = { 4, 8, 12, 13, 14, 15, 16 };
    test_guarded in = test_guard(40000), out = test_guard(40000);
    for (size_t length = 0; length <= 600; length += length < 300 ? 1 : 13)
        compare(in, out, length, length % 50, 12, 16);
    for (size_t aad = 0; aad <= 300; aad += 3)
        compare(in, out, 33, aad, 12, 16);
    for (size_t nonce = 1; nonce <= 80; nonce++)
        compare(in, out, 100, 5, nonce, 16);
    for (size_t t = 0; t < sizeof tags / sizeof *tags; t++)
        compare(in, out, 50, 20, 12, tags[t]);
    compare(in, out, 16384, 1500, 12, 16);
    compare(in, out, 16385, 0, 1600, 12);
    compare(in, out, 39999, 16, 16, 16);
    test_unguard(in);
    test_unguard(out);
}
static void lengths_and_nonces(void) { with_each_pair(lengths_here); }

/* With a nonce that is not 12 bytes the 32-bit counter starts anywhere; here it wraps inside the data, where no carry may pass into
 * the rest. J_0 is linear in the nonce, so Gaussian elimination gives nonces whose counter starts where wanted. */
static void wrap_here(void)
{
    uint8_t key[16] = { 0 }, h[16] = { 0 };
    static uint8_t data[16 * 4000], want[sizeof data], out[sizeof data];
    uint8_t nonce[16] = { 0 }, tag[16], want_tag[16];
    csvf_sm4_gcm gcm;
    reference_sm4(h, h, key, 0);
    test_fill(data, sizeof data, 8);
    CHECK_STATUS(csvf_sm4_gcm_init(&gcm, key), CSVF_OK);
    static const uint32_t targets[2] = { 0xfffffff0u, 0xfffff824u };
    uint8_t combination[32][16], j0[16];
    uint32_t pivots[32];
    unsigned rank = 0;
    memset(j0, 0, 16);
    reference_ghash(j0, nonce, 16, h);
    reference_ghash_lengths(j0, 0, 16, h);
    const uint32_t constant = (uint32_t)j0[12] << 24 | (uint32_t)j0[13] << 16 | (uint32_t)j0[14] << 8 | j0[15];
    for (unsigned bit = 0; bit < 128; bit++) {
        uint8_t n[16] = { 0 }, y[16] = { 0 };
        n[bit / 8] = (uint8_t)(1u << bit % 8);
        reference_ghash(y, n, 16, h);
        reference_ghash_lengths(y, 0, 16, h);
        uint32_t row = ((uint32_t)y[12] << 24 | (uint32_t)y[13] << 16 | (uint32_t)y[14] << 8 | y[15]) ^ constant;
        for (unsigned p = 0; p < rank; p++)
            if ((row ^ pivots[p]) < row) {
                row ^= pivots[p];
                for (int i = 0; i < 16; i++)
                    n[i] ^= combination[p][i];
            }
        if (row && rank < 32) {
            pivots[rank] = row;
            memcpy(combination[rank++], n, 16);
        }
    }
    CHECK(rank == 32);
    for (size_t t = 0; t < 2; t++) {
        const uint32_t target = targets[t];
        uint32_t rest = target ^ constant;
        memset(nonce, 0, 16);
        /* pivots are not sorted: reduce by leading bits until nothing is left */
        for (unsigned guard = 0; rest && guard < 64; guard++)
            for (unsigned p = 0; p < rank; p++)
                if ((rest ^ pivots[p]) < rest) {
                    rest ^= pivots[p];
                    for (int i = 0; i < 16; i++)
                        nonce[i] ^= combination[p][i];
                }
        test_case("%s, counter from %08x", names, target);
        CHECK(rest == 0);
        memset(j0, 0, 16);
        reference_ghash(j0, nonce, 16, h);
        reference_ghash_lengths(j0, 0, 16, h);
        CHECK(((uint32_t)j0[12] << 24 | (uint32_t)j0[13] << 16 | (uint32_t)j0[14] << 8 | j0[15]) == target);
        reference_gcm(want, want_tag, nonce, 16, NULL, 0, data, sizeof data, key);
        CHECK_STATUS(csvf_sm4_gcm_encrypt(&gcm, out, tag, 16, nonce, 16, NULL, 0, data, sizeof data), CSVF_OK);
        CHECK_BYTES(out, want, sizeof data);
        CHECK_BYTES(tag, want_tag, 16);
        CHECK_STATUS(csvf_sm4_gcm_decrypt(&gcm, out, tag, 16, nonce, 16, NULL, 0, out, sizeof data), CSVF_OK);
        CHECK_BYTES(out, data, sizeof data);
    }
}
static void counter_wraps_in_32_bits(void) { with_each_pair(wrap_here); }

static void forgery_here(void)
{
    uint8_t key[16], nonce[12], aad[20], data[100], sealed[100], tag[16], out[100], zero[100] = { 0 };
    csvf_sm4_gcm gcm;
    test_fill(key, 16, 1);
    test_fill(nonce, 12, 2);
    test_fill(aad, 20, 3);
    test_fill(data, 100, 4);
    CHECK_STATUS(csvf_sm4_gcm_init(&gcm, key), CSVF_OK);
    CHECK_STATUS(csvf_sm4_gcm_encrypt(&gcm, sealed, tag, 16, nonce, 12, aad, 20, data, 100), CSVF_OK);
    for (size_t bit = 0; bit < 128; bit++) {
        test_case("%s, tag bit %zu", names, bit);
        tag[bit / 8] ^= (uint8_t)(1u << bit % 8);
        memset(out, 0xaa, sizeof out);
        CHECK_STATUS(csvf_sm4_gcm_decrypt(&gcm, out, tag, 16, nonce, 12, aad, 20, sealed, 100), CSVF_ERR_AUTHENTICATION);
        CHECK_BYTES(out, zero, 100);
        tag[bit / 8] ^= (uint8_t)(1u << bit % 8);
    }
    for (size_t byte = 0; byte < 100; byte++) {
        test_case("%s, ciphertext byte %zu", names, byte);
        sealed[byte] ^= 0x10;
        CHECK_STATUS(csvf_sm4_gcm_decrypt(&gcm, out, tag, 16, nonce, 12, aad, 20, sealed, 100), CSVF_ERR_AUTHENTICATION);
        sealed[byte] ^= 0x10;
    }
    aad[19] ^= 1;
    CHECK_STATUS(csvf_sm4_gcm_decrypt(&gcm, out, tag, 16, nonce, 12, aad, 20, sealed, 100), CSVF_ERR_AUTHENTICATION);
    aad[19] ^= 1;
    nonce[0] ^= 1;
    CHECK_STATUS(csvf_sm4_gcm_decrypt(&gcm, out, tag, 16, nonce, 12, aad, 20, sealed, 100), CSVF_ERR_AUTHENTICATION);
    nonce[0] ^= 1;
    CHECK_STATUS(csvf_sm4_gcm_decrypt(&gcm, out, tag, 12, nonce, 12, aad, 20, sealed, 100), CSVF_OK);
    CHECK_STATUS(csvf_sm4_gcm_decrypt(&gcm, out, tag, 16, nonce, 12, aad, 20, sealed, 99), CSVF_ERR_AUTHENTICATION);
    /* in place, a failure leaves neither plaintext nor ciphertext */
    CHECK_STATUS(csvf_sm4_gcm_decrypt(&gcm, sealed, zero, 16, nonce, 12, aad, 20, sealed, 100), CSVF_ERR_AUTHENTICATION);
    CHECK_BYTES(sealed, zero, 100);
}
static void forgeries(void) { with_each_pair(forgery_here); }

static void refusals(void)
{
    uint8_t b[200] = { 0 }, key[16] = { 1 }, n[12] = { 0 }, tag[16] = { 0 }, zero[200] = { 0 };
    csvf_sm4_gcm gcm;
    CHECK_STATUS(csvf_sm4_gcm_init(NULL, key), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm4_gcm_init(&gcm, NULL), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm4_gcm_init(&gcm, key), CSVF_OK);
    CHECK_STATUS(csvf_sm4_gcm_encrypt(NULL, b, tag, 16, n, 12, NULL, 0, b, 16), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm4_gcm_encrypt(&gcm, NULL, tag, 16, n, 12, NULL, 0, b, 16), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm4_gcm_encrypt(&gcm, b, NULL, 16, n, 12, NULL, 0, b, 16), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm4_gcm_encrypt(&gcm, b, tag, 16, NULL, 12, NULL, 0, b, 16), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm4_gcm_encrypt(&gcm, b, tag, 16, n, 12, NULL, 5, b, 16), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm4_gcm_encrypt(&gcm, b, tag, 16, n, 12, NULL, 0, NULL, 16), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm4_gcm_encrypt(&gcm, b, tag, 16, n, 0, NULL, 0, b, 16), CSVF_ERR_LENGTH);
    for (size_t t = 0; t < 20; t++)
        if (t != 4 && t != 8 && (t < 12 || t > 16)) {
            CHECK_STATUS(csvf_sm4_gcm_encrypt(&gcm, b, tag, t, n, 12, NULL, 0, b, 16), CSVF_ERR_LENGTH);
            CHECK_STATUS(csvf_sm4_gcm_decrypt(&gcm, b, tag, t, n, 12, NULL, 0, b, 16), CSVF_ERR_LENGTH);
        }
    if (sizeof(size_t) > 4) {
        CHECK_STATUS(csvf_sm4_gcm_encrypt(&gcm, b, tag, 16, n, 12, NULL, 0, b, (size_t)((UINT64_C(1) << 36) - 31)), CSVF_ERR_LENGTH);
        CHECK_STATUS(csvf_sm4_gcm_encrypt(&gcm, b, tag, 16, n, 12, b, (size_t)(UINT64_C(1) << 61), b, 16), CSVF_ERR_LENGTH);
        CHECK_STATUS(csvf_sm4_gcm_encrypt(&gcm, b, tag, 16, n, (size_t)(UINT64_C(1) << 61), NULL, 0, b, 16), CSVF_ERR_LENGTH);
    }
    CHECK_STATUS(csvf_sm4_gcm_encrypt(&gcm, b + 1, tag, 16, n, 12, NULL, 0, b, 16), CSVF_ERR_OVERLAP);
    CHECK_STATUS(csvf_sm4_gcm_encrypt(&gcm, b, b + 8, 16, n, 12, NULL, 0, zero, 16), CSVF_ERR_OVERLAP);
    CHECK_STATUS(csvf_sm4_gcm_encrypt(&gcm, b, b + 100, 16, n, 12, NULL, 0, b + 90, 16), CSVF_ERR_OVERLAP);
    CHECK_STATUS(csvf_sm4_gcm_encrypt(&gcm, b, tag, 16, b + 10, 12, NULL, 0, zero, 16), CSVF_ERR_OVERLAP);
    CHECK_STATUS(csvf_sm4_gcm_encrypt(&gcm, b, tag, 16, n, 12, b + 15, 12, zero, 16), CSVF_ERR_OVERLAP);
    CHECK_STATUS(csvf_sm4_gcm_decrypt(&gcm, b, b + 8, 16, n, 12, NULL, 0, zero, 16), CSVF_ERR_OVERLAP);
    CHECK_BYTES(b, zero, sizeof b);
    CHECK_BYTES(tag, zero, sizeof tag);
    /* empty messages are allowed, without buffers too */
    CHECK_STATUS(csvf_sm4_gcm_encrypt(&gcm, NULL, tag, 16, n, 12, NULL, 0, NULL, 0), CSVF_OK);
    CHECK_STATUS(csvf_sm4_gcm_decrypt(&gcm, NULL, tag, 16, n, 12, NULL, 0, NULL, 0), CSVF_OK);
    tag[15] ^= 1;
    CHECK_STATUS(csvf_sm4_gcm_decrypt(&gcm, NULL, tag, 16, n, 12, NULL, 0, NULL, 0), CSVF_ERR_AUTHENTICATION);
}

int main(void)
{
    RUN(ghash_kernels);
    RUN(rfc8998_vector);
    RUN(lengths_and_nonces);
    RUN(counter_wraps_in_32_bits);
    RUN(forgeries);
    RUN(refusals);
    return test_report();
}
