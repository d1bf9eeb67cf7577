/* libgcrypt as a peer, found at run time: the benchmark neither needs it nor links it. Prototypes and constants are those of
 * gcrypt.h (https://github.com/gpg/libgcrypt, src/gcrypt.h.in); SM4 and SM3 exist from 1.9 on. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"

enum { GCRY_CIPHER_SM4 = 318, GCRY_MODE_CTR = 6, GCRY_MODE_XTS = 13, GCRY_MD_SM3 = 326 };

typedef struct gcry_handle *gcry_cipher;

static struct {
    const char *(*check_version)(const char *);
    unsigned (*open)(gcry_cipher *, int, int, unsigned);
    void (*close)(gcry_cipher);
    unsigned (*setkey)(gcry_cipher, const void *, size_t);
    unsigned (*setiv)(gcry_cipher, const void *, size_t);
    unsigned (*setctr)(gcry_cipher, const void *, size_t);
    unsigned (*encrypt)(gcry_cipher, void *, size_t, const void *, size_t);
    unsigned (*decrypt)(gcry_cipher, void *, size_t, const void *, size_t);
    void (*hash_buffer)(int, void *, const void *, size_t);
} gcry;

static uint8_t *memory;

typedef struct work {
    gcry_cipher cipher;
    size_t length;
} work;

static void run_xts(const work *w, unsigned (*crypt)(gcry_cipher, void *, size_t, const void *, size_t))
{
    for (size_t at = 0; at < w->length; at += 4096) {
        uint8_t unit[16] = {0};
        const uint64_t number = at / 4096;
        memcpy(unit, &number, sizeof number);
        bench_require(!gcry.setiv(w->cipher, unit, 16) && !crypt(w->cipher, memory + at, 4096, NULL, 0), "libgcrypt SM4-XTS");
    }
}

static void run_encrypt(void *context) { run_xts(context, gcry.encrypt); }
static void run_decrypt(void *context) { run_xts(context, gcry.decrypt); }

static void run_ctr(void *context)
{
    const work *w = context;
    static const uint8_t counter[16];
    for (size_t at = 0; at < w->length; at += 65536)
        bench_require(!gcry.setctr(w->cipher, counter, 16) && !gcry.encrypt(w->cipher, memory + at, 65536, NULL, 0),
                      "libgcrypt SM4-CTR");
}

static void run_sm3(void *context)
{
    uint8_t digest[32];
    for (size_t at = 0; at < ((work *)context)->length; at += 1 << 20)
        gcry.hash_buffer(GCRY_MD_SM3, digest, memory + at, 1 << 20);
}

static int load(void)
{
    void *library = dlopen("libgcrypt.so.20", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return 0;
    /* dlsym returns an object pointer; POSIX, not C, lets it be a function. */
    const struct { const char *name; void *slot; } symbols[] = {
        {"gcry_check_version", &gcry.check_version}, {"gcry_cipher_open", &gcry.open}, {"gcry_cipher_close", &gcry.close},
        {"gcry_cipher_setkey", &gcry.setkey}, {"gcry_cipher_setiv", &gcry.setiv}, {"gcry_cipher_setctr", &gcry.setctr},
        {"gcry_cipher_encrypt", &gcry.encrypt}, {"gcry_cipher_decrypt", &gcry.decrypt},
        {"gcry_md_hash_buffer", &gcry.hash_buffer},
    };
    for (size_t i = 0; i < sizeof symbols / sizeof symbols[0]; i++) {
        void *symbol = dlsym(library, symbols[i].name);
        if (!symbol)
            return 0;
        memcpy(symbols[i].slot, &symbol, sizeof symbol);
    }
    return 1;
}

void bench_peer_cases(void)
{
    if (bench_settings.kernel || !load())
        return;
    char peer[64];
    snprintf(peer, sizeof peer, "libgcrypt %s", gcry.check_version(NULL));
    uint8_t key[32];
    for (size_t i = 0; i < sizeof key; i++)
        key[i] = (uint8_t)(3 * i + 1);
    const size_t length = 512 << 10;
    memory = bench_memory((size_t)1 << 20);
    work w = {NULL, length};
    bench_case c = {.variant = "", .kernel = "-", .peer = peer, .buffer = length, .threads = 1, .context = &w};
    if (!gcry.open(&w.cipher, GCRY_CIPHER_SM4, GCRY_MODE_XTS, 0) && !gcry.setkey(w.cipher, key, 32)) {
        c.name = "sm4-xts-encrypt/4096", c.run = run_encrypt;
        bench_measure(&c);
        c.name = "sm4-xts-decrypt/4096", c.run = run_decrypt;
        bench_measure(&c);
        gcry.close(w.cipher);
    }
    if (!gcry.open(&w.cipher, GCRY_CIPHER_SM4, GCRY_MODE_CTR, 0) && !gcry.setkey(w.cipher, key, 16)) {
        c.name = "sm4-ctr/65536", c.run = run_ctr;
        bench_measure(&c);
        gcry.close(w.cipher);
    }
    w.length = c.buffer = (size_t)1 << 20;
    c.name = "sm3/1048576", c.run = run_sm3;
    bench_measure(&c);
    free(memory);
}
