#include "secret_operations.h"

#include <string.h>

#include "../sha256/sha256_layer.h"
#include "checkmem.h"

static csvf_engine *engine, *line_engine;   /* the two tweak models */

/* Public by design: whether K1 = K2, whether a tag matched, the final status. The library declassifies the first two in the checkers'
 * builds (declassify.h) and nothing else. */

static int xts_key_schedule(uint8_t *out, const uint8_t *secret)
{
    csvf_xts xts;
    (void)out;
    int status = csvf_xts_init(&xts, secret, CSVF_STANDARD_GB);
    csvf_wipe(&xts, sizeof xts);
    return status;
}

static int xts_with(uint8_t *out, const uint8_t *secret, int standard, size_t length, size_t unit)
{
    csvf_xts xts;
    int status = csvf_xts_init(&xts, secret, standard);
    if (status == CSVF_OK)
        status = csvf_xts_encrypt(&xts, out, secret + 32, length, unit, 5);
    if (status == CSVF_OK)
        status = csvf_xts_decrypt(&xts, out, out, length, unit, 5);
    csvf_wipe(&xts, sizeof xts);
    return status;
}

static int xts_pages_gb(uint8_t *out, const uint8_t *secret) { return xts_with(out, secret, CSVF_STANDARD_GB, 4096 + 1040, 4096); }
static int xts_pages_ieee(uint8_t *out, const uint8_t *secret) { return xts_with(out, secret, CSVF_STANDARD_IEEE, 4096 + 1040, 4096); }
static int xts_sectors(uint8_t *out, const uint8_t *secret) { return xts_with(out, secret, CSVF_STANDARD_GB, 2048, 512); }
static int xts_stealing(uint8_t *out, const uint8_t *secret) { return xts_with(out, secret, CSVF_STANDARD_GB, 1003, 1003); }
static int xts_stealing_short(uint8_t *out, const uint8_t *secret) { return xts_with(out, secret, CSVF_STANDARD_IEEE, 17, 17); }

static int xts_lines_of(uint8_t *out, const uint8_t *secret, int standard)
{
    uint64_t addresses[70];     /* more than one page's worth of lines, and a rest: kernels treat them apart */
    csvf_xts xts;
    for (size_t i = 0; i < 70; i++)
        addresses[i] = 64 * (i * 37 % 400 + (i % 3 << 20));
    int status = csvf_xts_init(&xts, secret, standard);
    if (status == CSVF_OK)
        status = csvf_xts_encrypt_lines(&xts, out, secret + 32, addresses, 70);
    if (status == CSVF_OK)
        status = csvf_xts_decrypt_lines(&xts, out, out, addresses, 70);
    if (status == CSVF_OK)
        status = csvf_xts_encrypt_span(&xts, out, secret + 32, 64, 3, 64 * 13);
    csvf_wipe(&xts, sizeof xts);
    return status;
}

static int xts_lines_gb(uint8_t *out, const uint8_t *secret) { return xts_lines_of(out, secret, CSVF_STANDARD_GB); }
static int xts_lines_ieee(uint8_t *out, const uint8_t *secret) { return xts_lines_of(out, secret, CSVF_STANDARD_IEEE); }

static int ctr_stream(uint8_t *out, const uint8_t *secret)
{
    csvf_sm4_ctr ctr;
    static const uint8_t counter[16] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe};
    int status = csvf_sm4_ctr_init(&ctr, secret, counter);
    if (status == CSVF_OK)
        status = csvf_sm4_ctr_crypt(&ctr, out, secret + 16, 37);
    if (status == CSVF_OK)
        status = csvf_sm4_ctr_crypt(&ctr, out + 37, secret + 53, 4200);
    csvf_wipe(&ctr, sizeof ctr);
    return status;
}

static int gcm_both_ways(uint8_t *out, const uint8_t *secret)
{
    csvf_sm4_gcm gcm;
    static const uint8_t nonce[13] = {1, 2, 3};
    int status = csvf_sm4_gcm_init(&gcm, secret);
    if (status == CSVF_OK)
        status = csvf_sm4_gcm_encrypt(&gcm, out, out + 8192, 16, nonce, 12, secret + 16, 20, secret + 64, 1000);
    if (status == CSVF_OK)
        status = csvf_sm4_gcm_encrypt(&gcm, out, out + 8192, 16, nonce, 13, NULL, 0, secret + 64, 40);
    if (status == CSVF_OK) {
        /* The ciphertext and its tag travel in public; whether they match is public too. */
        PUBLIC(out, 40);
        PUBLIC(out + 8192, 16);
        status = csvf_sm4_gcm_decrypt(&gcm, out + 4096, out + 8192, 16, nonce, 13, NULL, 0, out, 40);
        out[8192] ^= 1;
        if (status == CSVF_OK && csvf_sm4_gcm_decrypt(&gcm, out + 4096, out + 8192, 16, nonce, 13, NULL, 0, out, 40) != CSVF_ERR_AUTHENTICATION)
            status = CSVF_ERR_STATE;
    }
    csvf_wipe(&gcm, sizeof gcm);
    return status;
}

static int sm3_stream(uint8_t *out, const uint8_t *secret)
{
    csvf_sm3 sm3;
    csvf_sm3_init(&sm3);
    csvf_sm3_update(&sm3, secret, 100);
    csvf_sm3_update(&sm3, secret + 100, 1000);
    csvf_sm3_final(&sm3, out);
    return CSVF_OK;
}

static int hmac_and_kdf(uint8_t *out, const uint8_t *secret)
{
    csvf_hmac_sm3 hmac;
    csvf_hmac_sm3_init(&hmac, secret, 32);
    csvf_hmac_sm3_update(&hmac, secret + 32, 333);
    csvf_hmac_sm3_final(&hmac, out);
    csvf_hmac_sm3_init(&hmac, secret, 100);
    csvf_hmac_sm3_update(&hmac, secret + 32, 10);
    csvf_hmac_sm3_final(&hmac, out + 32);
    csvf_wipe(&hmac, sizeof hmac);
    return csvf_sm3_kdf(out + 64, 100, secret, 48);
}

static int sm3_many_mixed(uint8_t *out, const uint8_t *secret)
{
    const uint8_t *data[37];
    size_t lengths[37];
    for (size_t i = 0; i < 37; i++) {
        data[i] = secret + 100 * i;
        lengths[i] = (i * 53) % 400;
    }
    csvf_sm3_many(out, data, lengths, 37);
    static const uint8_t salt[32] = {1};
    return csvf_sm3_blocks(out, salt, 32, secret, 256, 40);
}

static int memory_of(csvf_engine *memory, uint8_t *out, const uint8_t *secret)
{
    int status = csvf_asid_install(memory, 1, secret, 32);
    if (status == CSVF_OK)
        status = csvf_write(memory, 1, 4096 + 5, secret + 32, 9000);
    if (status == CSVF_OK)
        status = csvf_read(memory, out, 9000, 1, 4096 + 5);
    if (status == CSVF_OK)
        status = csvf_write_line(memory, 1, 640, secret + 32);
    if (status == CSVF_OK)
        status = csvf_read_line(memory, out, 1, 640);
    if (status == CSVF_OK)
        status = csvf_write_pages(memory, 1, 4, secret + 32, 2);
    if (status == CSVF_OK)
        status = csvf_launch_update(memory, NULL, out, 1, 8 * 4096, 2 * 4096);
    if (status == CSVF_OK)
        status = csvf_read_pages(memory, out, 2, 1, 4);
    if (status == CSVF_OK)
        status = csvf_write(memory, 1, 5 * 4096 - 3, secret + 32, 7);
    if (status == CSVF_OK)
        status = csvf_encrypt_in_place(memory, 1, 12 * 4096 + 48, 160);
    int removed = csvf_asid_remove(memory, 1);
    return status == CSVF_OK ? removed : status;
}

static int memory_access(uint8_t *out, const uint8_t *secret) { return memory_of(engine, out, secret); }
static int memory_access_lines(uint8_t *out, const uint8_t *secret) { return memory_of(line_engine, out, secret); }

/* ---- SM2: the private key, the nonce and the plaintext are secret; nonces 1 and 2^255 - 1 come with the secrets of zeros and ones. */

static const uint8_t sm2_digest[32] = {0xf0, 0xb4, 0x3e, 0x94, 0xba};
static const uint8_t sm2_base[64] = {     /* a public point that every run has: G */
    0x32, 0xc4, 0xae, 0x2c, 0x1f, 0x19, 0x81, 0x19, 0x5f, 0x99, 0x04, 0x46, 0x6a, 0x39, 0xc9, 0x94,
    0x8f, 0xe3, 0x0b, 0xbf, 0xf2, 0x66, 0x0b, 0xe1, 0x71, 0x5a, 0x45, 0x89, 0x33, 0x4c, 0x74, 0xc7,
    0xbc, 0x37, 0x36, 0xa2, 0xf4, 0xf6, 0x77, 0x9c, 0x59, 0xbd, 0xce, 0xe3, 0x6b, 0x69, 0x21, 0x53,
    0xd0, 0xa9, 0x87, 0x7c, 0xc6, 0x2a, 0x47, 0x40, 0x02, 0xdf, 0x32, 0xe5, 0x21, 0x39, 0xf0, 0xa0};

/* A number in 1 .. 2^255 - 1 out of 32 secret bytes. */
static void sm2_number(uint8_t out[32], const uint8_t *secret)
{
    memcpy(out, secret, 32);
    out[0] &= 0x7f;
    out[31] |= 1;
}

static int sm2_private(csvf_sm2_private *key, const uint8_t *secret)
{
    uint8_t d[32];
    sm2_number(d, secret);
    return csvf_sm2_private_init(key, d);
}

/* One key for both, since making it costs as much as using it. The ciphertext is one that no key of the test opens, so that one multiplication is
 * enough: everything but the release of the plaintext runs. */
static int sm2_sign_decrypt(uint8_t *out, const uint8_t *secret)
{
    csvf_sm2_private key;
    uint8_t nonce[32], sealed[97 + 50] = {4};
    memcpy(sealed + 1, sm2_base, 64);
    sm2_number(nonce, secret + 32);
    int status = sm2_private(&key, secret);
    if (status == CSVF_OK)
        status = csvf_sm2_sign_digest_with_nonce(out, &key, sm2_digest, nonce);
    if (status == CSVF_OK)
        status = csvf_sm2_decrypt(out + 64, &key, sealed, sizeof sealed) == CSVF_ERR_AUTHENTICATION ? CSVF_OK : CSVF_ERR_STATE;
    csvf_sm2_private_bytes(out + 128, &key);
    csvf_wipe(&key, sizeof key);
    return status;
}

/* The arithmetic of csvf_sm2_private_generate, whose random bytes are the system's, and a signature with a nonce of the library's own. */
static int sm2_generate(uint8_t *out, const uint8_t *secret)
{
    csvf_sm2_private key;
    int status = csvf_sm2_private_generate(&key);
    csvf_sm2_private_bytes(out, &key);
    out[0] ^= secret[0];
    if (status == CSVF_OK)
        status = sm2_private(&key, secret);
    if (status == CSVF_OK)
        status = csvf_sm2_sign_digest(out + 64, &key, sm2_digest);
    csvf_wipe(&key, sizeof key);
    return status;
}

static int sm2_encrypt(uint8_t *out, const uint8_t *secret)
{
    csvf_sm2_private key;
    csvf_sm2_public point;
    uint8_t nonce[32];
    sm2_number(nonce, secret + 32);
    int status = sm2_private(&key, secret);
    csvf_sm2_private_public(&point, &key);
    if (status == CSVF_OK)
        status = csvf_sm2_encrypt_with_nonce(out, &point, secret + 64, 100, nonce);
    if (status == CSVF_OK)
        status = csvf_sm2_encrypt(out, &point, secret + 64, 77);
    if (status == CSVF_OK)
        status = csvf_sm2_decrypt(out + 1000, &key, out, 77 + 97);
    csvf_wipe(&key, sizeof key);
    return status;
}

static int sm2_agreement(uint8_t *out, const uint8_t *secret)
{
    csvf_sm2_private key, ephemeral;
    csvf_sm2_public peer;
    int status = sm2_private(&key, secret);
    if (status == CSVF_OK)
        status = sm2_private(&ephemeral, secret + 32);
    if (status == CSVF_OK)
        status = csvf_sm2_public_init(&peer, sm2_base, 64);
    if (status == CSVF_OK)
        status = csvf_sm2_agree(out, 48, out + 64, 1, &key, &ephemeral, sm2_digest, &peer, &peer, sm2_digest);
    csvf_wipe(&key, sizeof key);
    csvf_wipe(&ephemeral, sizeof ephemeral);
    return status;
}

static int equality(uint8_t *out, const uint8_t *secret)
{
    int same = csvf_equal(secret, secret + 1024, 1024);
    memcpy(out, &same, sizeof same);
    return CSVF_OK;
}

static int control_branch(uint8_t *out, const uint8_t *secret)
{
    volatile uint8_t odd = 0;
    for (size_t i = 0; i < 64; i++)
        if (secret[i] & 1)
            odd++;
    out[0] = odd;
    return CSVF_OK;
}

static int control_index(uint8_t *out, const uint8_t *secret)
{
    static volatile uint8_t table[256];
    out[0] = 0;
    for (size_t i = 0; i < 64; i++)
        out[0] ^= table[secret[i]];
    return CSVF_OK;
}

/* A layer's three states: the key of the MAC and the plaintext are secret. Nothing, where the CPU (or valgrind's) has no SHA
 * instructions: traces cover them. */
static int layer_hashes(uint8_t *out, const uint8_t *secret)
{
    static const size_t lengths[] = {1, 62, 1, 64, 200, 4096, 55, 0};
    csvf_sha256_layer layer;
    size_t at = 64;
    if (!csvf__sha256_layer_usable())
        return CSVF_OK;
    csvf__sha256_layer_init(&layer, secret, 32);
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; at += lengths[i++])
        csvf__sha256_layer_update(&layer, secret + at, secret + at + 64, lengths[i]);
    csvf__sha256_layer_digests(&layer, out, out + 32, out + 64);
    csvf__sha256_layer_init(&layer, secret, 64);
    csvf__sha256_layer_update(&layer, secret + 64, NULL, 1000);
    csvf__sha256_layer_digests(&layer, out + 96, out + 128, out + 160);
    csvf_wipe(&layer, sizeof layer);
    return CSVF_OK;
}

const operation OPERATIONS[] = {
    {"xts key schedule", CSVF_PRIMITIVE_SM4, xts_key_schedule, 0},
    {"xts 4 KiB units, GB", CSVF_PRIMITIVE_SM4, xts_pages_gb, 0},
    {"xts 4 KiB units, IEEE", CSVF_PRIMITIVE_SM4, xts_pages_ieee, 0},
    {"xts 512-byte units", CSVF_PRIMITIVE_SM4, xts_sectors, 0},
    {"xts stealing, 1003 bytes", CSVF_PRIMITIVE_SM4, xts_stealing, 0},
    {"xts stealing, 17 bytes", CSVF_PRIMITIVE_SM4, xts_stealing_short, 0},
    {"xts lines, GB", CSVF_PRIMITIVE_SM4, xts_lines_gb, 0},
    {"xts lines, IEEE", CSVF_PRIMITIVE_SM4, xts_lines_ieee, 0},
    {"ctr", CSVF_PRIMITIVE_SM4, ctr_stream, 0},
    {"gcm", CSVF_PRIMITIVE_SM4, gcm_both_ways, 0},
    {"gcm, ghash kernels", CSVF_PRIMITIVE_GHASH, gcm_both_ways, 0},
    {"memory", CSVF_PRIMITIVE_SM4, memory_access, 0},
    {"memory, line tweaks", CSVF_PRIMITIVE_SM4, memory_access_lines, 0},
    {"sm3", CSVF_PRIMITIVE_SM3, sm3_stream, 0},
    {"hmac, kdf", CSVF_PRIMITIVE_SM3, hmac_and_kdf, 0},
    {"sm3 many", CSVF_PRIMITIVE_SM3_MANY, sm3_many_mixed, 0},
    {"sm2 sign, decrypt", CSVF_PRIMITIVE_SM2, sm2_sign_decrypt, 0},
    {"sm2 generate, sign", CSVF_PRIMITIVE_SM2, sm2_generate, 0},
    {"sm2 encrypt", CSVF_PRIMITIVE_SM2, sm2_encrypt, 0},
    {"sm2 agreement", CSVF_PRIMITIVE_SM2, sm2_agreement, 0},
    {"sha256 layer", CSVF_PRIMITIVE_SM3, layer_hashes, 0},
    {"equality", CSVF_PRIMITIVE_SM3, equality, 0},
    {"control: branch", CSVF_PRIMITIVE_SM3, control_branch, 1},
    {"control: index", CSVF_PRIMITIVE_SM3, control_index, 1},
};
const size_t OPERATION_COUNT = sizeof OPERATIONS / sizeof OPERATIONS[0];

int operations_prepare(void)
{
    const csvf_config lines = {.struct_size = sizeof lines, .standard = CSVF_STANDARD_IEEE, .tweak_model = CSVF_TWEAK_LINE};
    const int status = csvf_engine_create(&engine, 16 * 4096, NULL);
    return status == CSVF_OK ? csvf_engine_create(&line_engine, 16 * 4096, &lines) : status;
}

void operations_release(void)
{
    csvf_engine_destroy(engine);
    csvf_engine_destroy(line_engine);
    engine = line_engine = NULL;
}
