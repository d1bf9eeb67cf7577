/* OpenSSL's SM2 through EVP as a peer, found at run time: the benchmark neither needs it nor links it. Prototypes are those of
 * include/openssl/evp.h of OpenSSL 3 (https://github.com/openssl/openssl). It signs and verifies e itself, without hashing a message. */
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "bench.h"

enum { OPENSSL_VERSION_STRING = 6 };   /* of OpenSSL_version: "3.0.0" */

typedef struct evp_pkey_ctx *evp_context;
typedef struct evp_pkey *evp_key;
typedef int (*evp_cipher)(evp_context, uint8_t *, size_t *, const uint8_t *, size_t);

static struct {
    const char *(*version)(int);
    evp_context (*from_name)(void *, const char *, const char *);
    evp_context (*from_key)(void *, evp_key, const char *);
    void (*free_context)(evp_context);
    void (*free_key)(evp_key);
    int (*keygen_init)(evp_context);
    int (*generate)(evp_context, evp_key *);
    int (*sign_init)(evp_context), (*verify_init)(evp_context), (*encrypt_init)(evp_context), (*decrypt_init)(evp_context);
    evp_cipher sign, encrypt, decrypt;
    int (*verify)(evp_context, const uint8_t *, size_t, const uint8_t *, size_t);
} evp;

static struct {
    evp_context sign, verify, encrypt, decrypt;
    uint8_t digest[32], signature[128], plain[256], cipher[512];
    size_t signature_length, plain_length, cipher_length;
} work;

static void run_sign(void *context)
{
    (void)context;
    work.signature_length = sizeof work.signature;
    bench_require(evp.sign(work.sign, work.signature, &work.signature_length, work.digest, 32) == 1, "OpenSSL SM2 sign");
}

static void run_verify(void *context)
{
    (void)context;
    bench_require(evp.verify(work.verify, work.signature, work.signature_length, work.digest, 32) == 1, "OpenSSL SM2 verify");
}

static void run_encrypt(void *context)
{
    (void)context;
    work.cipher_length = sizeof work.cipher;
    bench_require(evp.encrypt(work.encrypt, work.cipher, &work.cipher_length, work.plain, work.plain_length) == 1, "OpenSSL SM2 encrypt");
}

static void run_decrypt(void *context)
{
    uint8_t out[sizeof work.plain];
    size_t length = sizeof out;
    (void)context;
    bench_require(evp.decrypt(work.decrypt, out, &length, work.cipher, work.cipher_length) == 1 && length == work.plain_length,
                  "OpenSSL SM2 decrypt");
}

static int load(void)
{
    void *library = dlopen("libcrypto.so.3", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return 0;
    const struct { const char *name; void *slot; } symbols[] = {
        {"OpenSSL_version", &evp.version}, {"EVP_PKEY_CTX_new_from_name", &evp.from_name},
        {"EVP_PKEY_CTX_new_from_pkey", &evp.from_key}, {"EVP_PKEY_CTX_free", &evp.free_context}, {"EVP_PKEY_free", &evp.free_key},
        {"EVP_PKEY_keygen_init", &evp.keygen_init}, {"EVP_PKEY_generate", &evp.generate}, {"EVP_PKEY_sign_init", &evp.sign_init},
        {"EVP_PKEY_verify_init", &evp.verify_init}, {"EVP_PKEY_encrypt_init", &evp.encrypt_init},
        {"EVP_PKEY_decrypt_init", &evp.decrypt_init}, {"EVP_PKEY_sign", &evp.sign}, {"EVP_PKEY_verify", &evp.verify},
        {"EVP_PKEY_encrypt", &evp.encrypt}, {"EVP_PKEY_decrypt", &evp.decrypt},
    };
    for (size_t i = 0; i < sizeof symbols / sizeof symbols[0]; i++) {
        void *symbol = dlsym(library, symbols[i].name);
        if (!symbol)
            return 0;
        memcpy(symbols[i].slot, &symbol, sizeof symbol);
    }
    return 1;
}

bench_sm2_rates bench_sm2_peer(size_t message_length)
{
    bench_sm2_rates rates = {0};
    evp_key key = NULL;
    char peer[64];
    if (message_length > sizeof work.plain || !load())
        return rates;
    evp_context maker = evp.from_name(NULL, "SM2", NULL);
    if (!maker || evp.keygen_init(maker) != 1 || evp.generate(maker, &key) != 1)
        return rates;      /* built without SM2 */
    snprintf(peer, sizeof peer, "OpenSSL %s", evp.version(OPENSSL_VERSION_STRING));
    evp_context *const contexts[] = {&work.sign, &work.verify, &work.encrypt, &work.decrypt};
    int (*const inits[])(evp_context) = {evp.sign_init, evp.verify_init, evp.encrypt_init, evp.decrypt_init};
    for (size_t i = 0; i < 4; i++) {
        *contexts[i] = evp.from_key(NULL, key, NULL);
        bench_require(*contexts[i] && inits[i](*contexts[i]) == 1, "OpenSSL SM2 context");
    }
    for (size_t i = 0; i < 32; i++)
        work.digest[i] = (uint8_t)(7 * i + 3);
    work.plain_length = message_length;
    run_sign(NULL);
    run_encrypt(NULL);
    bench_case c = {.variant = "", .kernel = "-", .peer = peer, .operations = 1, .threads = 1};
    c.name = "sm2-sign", c.run = run_sign, rates.sign = bench_measure(&c);
    c.name = "sm2-verify", c.run = run_verify, rates.verify = bench_measure(&c);
    c.name = "sm2-encrypt", c.run = run_encrypt, rates.encrypt = bench_measure(&c);
    c.name = "sm2-decrypt", c.run = run_decrypt, rates.decrypt = bench_measure(&c);
    for (size_t i = 0; i < 4; i++)
        evp.free_context(*contexts[i]);
    evp.free_context(maker);
    evp.free_key(key);
    return rates;
}
