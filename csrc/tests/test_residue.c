/* Nothing secret stays on the stack: every operation runs in a thread whose stack belongs to the test, which then looks through that
 * stack for pieces of eight bytes of the key, the expanded key, the data, tweaks and keystream. Everything of the operation itself
 * lives in static memory. Finds a forgotten wipe, and what the compiler spilled; transformed values (slices of bits) it cannot know.
 *
 * What is spilled is the compiler's choice, and no C code can forbid it. So nothing at all is tolerated in the build this was checked
 * with (gcc 12, the project's own flags); in others single registers are, but no whole buffer. */
#include "test.h"

#include <pthread.h>

#include "../include/csvfast.h"
#include "../sha256/sha256_layer.h"
#include "../sm2/sm2_kernel.h"
#include "../sm2/sm2_objects.h"
#include "../sm4/ghash_kernel.h"
#include "../sm4/sm4_xts.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#  define STACK_IS_NOT_OURS 1
#elif defined(__has_feature)
#  if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#    define STACK_IS_NOT_OURS 1
#  endif
#endif

#if defined(CSVF_PLAIN_BUILD) && defined(__GNUC__) && __GNUC__ == 12 && !defined(__clang__)
enum { TOLERATED = 0 };
#else
enum { TOLERATED = 1000 };
#endif

enum { STACK = 512 << 10, DATA = 12288, WINDOW = 8 };

static uint8_t stack[STACK] __attribute__((aligned(4096)));
static uint8_t key[32], data[DATA], sealed[DATA], out[DATA], tag[16], digests[64 * 32];
static const uint8_t nonce[16] = {9, 8, 7}, counter[16] = {1, 2, 3, 4, 5};
static csvf_xts xts;
static csvf_sm4_ctr ctr;
static csvf_sm4_gcm gcm;
static csvf_sm3 sm3;
static csvf_hmac_sm3 hmac;
static csvf_engine *engine;
static size_t length, unit_size;
static int standard, status;

/* ---- What is looked for ------------------------------------------------------------------------------------------- */

static uint64_t windows[1 << 17];
static size_t window_count;

/* Every eight bytes of it, but for those with so little in them that chance would find them: fewer than six different bytes. */
static void secret(const void *bytes, size_t count)
{
    const uint8_t *p = bytes;
    for (size_t i = 0; i + WINDOW <= count; i++) {
        unsigned different = 0;
        for (int a = 0; a < WINDOW; a++) {
            int is_new = 1;
            for (int b = 0; b < a; b++)
                is_new &= p[i + a] != p[i + b];
            different += is_new;
        }
        if (different < 6)
            continue;
        if (window_count == sizeof windows / sizeof *windows)
            abort();
        memcpy(&windows[window_count++], p + i, WINDOW);
    }
}

static int compare(const void *a, const void *b)
{
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* Number of places of the stack that hold a window. */
static unsigned found_on_stack(void)
{
    unsigned found = 0;
    qsort(windows, window_count, sizeof *windows, compare);
    for (size_t i = 0; i + WINDOW <= STACK; i++) {
        uint64_t here;
        memcpy(&here, stack + i, WINDOW);
        found += here && bsearch(&here, windows, window_count, sizeof here, compare) != NULL;
    }
    return found;
}

/* Words with their bytes turned round, as SM3 reads them. */
static void secret_words(const uint8_t *bytes, size_t count)
{
    static uint8_t turned[DATA];
    for (size_t i = 0; i < count / 4 * 4; i++)
        turned[i] = bytes[i ^ 3];
    secret(turned, count / 4 * 4);
}

/* ---- Running ------------------------------------------------------------------------------------------------------ */

static void *enter(void *function)
{
    (*(void (**)(void))function)();
    return NULL;
}

static void on_own_stack(void (*function)(void))
{
    pthread_attr_t attributes;
    pthread_t thread;
    pthread_attr_init(&attributes);
    memset(stack, 0, sizeof stack);
    if (pthread_attr_setstack(&attributes, stack, STACK) || pthread_create(&thread, &attributes, enter, &function))
        abort();
    pthread_join(thread, NULL);
    pthread_attr_destroy(&attributes);
}

/* Runs twice: the first time settles lazy binding, which saves vector registers on the stack. */
static void leaves_nothing(void (*function)(void))
{
    on_own_stack(function);
    on_own_stack(function);
    CHECK_STATUS(status, CSVF_OK);
    CHECK(found_on_stack() <= TOLERATED);
    window_count = 0;
}

static void fresh(void)
{
    test_fill(key, sizeof key, 1);
    test_fill(data, sizeof data, 2);
    secret(key, sizeof key);
    secret(data, sizeof data);
}

/* ---- Operations --------------------------------------------------------------------------------------------------- */

static void leak(void)
{
    volatile uint8_t copy[64];
    for (size_t i = 0; i < sizeof copy; i++)
        copy[i] = data[i];
    status = CSVF_OK;
}

static void do_schedule(void) { status = csvf_xts_init(&xts, key, standard); }
static void do_encrypt(void) { status = csvf_xts_encrypt(&xts, out, data, length, unit_size, 77); }
static void do_decrypt(void) { status = csvf_xts_decrypt(&xts, out, sealed, length, unit_size, 77); }
static void do_unit(void) { status = csvf_xts_encrypt_unit(&xts, out, data, length, nonce); }
static void do_span(void) { status = csvf_xts_decrypt_span(&xts, out, sealed, length, 77, 64); }

static void do_lines(void)
{
    static const uint64_t addresses[5] = {77 * 4096, 77 * 4096 + 64, 78 * 4096 + 640, 77 * 4096 + 4032, 80 * 4096};
    status = csvf_xts_encrypt_lines(&xts, out, data, addresses, 5);
}

/* The kernel by itself: short runs, which XTS makes otherwise. */
static uint8_t bases[4 * 16];
static void do_runs(void)
{
    const csvf__xts *x = csvf__xts_of(&xts);
    x->kernel->xts(&x->encrypt, standard, out, data, bases, length, 4);
    status = CSVF_OK;
}

static void xts_secrets(void)
{
    static uint8_t tweaks[4 * 64 * 16];
    static const uint64_t units[4] = {77, 78, 79, 80};
    fresh();
    secret((const uint8_t *)&xts + offsetof(csvf__xts, encrypt), sizeof(csvf__xts) - offsetof(csvf__xts, encrypt));
    csvf__xts_unit_tweaks(&xts, bases, units, 4);
    csvf__sm4_tweaks_portable(standard, tweaks, bases, NULL, 64, 4);
    secret(tweaks, sizeof tweaks);
    csvf__xts_of(&xts)->kernel->ecb(&csvf__xts_of(&xts)->tweak, tweaks, nonce, 1);   /* of the call that is given a raw tweak */
    secret(tweaks, 16);
}

static void test_xts(void)
{
    static const struct { size_t length, unit_size; } shapes[] = {
        {16, 16}, {16 * 5, 16}, {17, 17}, {64, 64}, {512 * 5, 512}, {1003, 1003}, {520 * 9, 520}, {4096, 4096},
        {2 * 4096 + 1040, 4096}, {4097 * 2, 4097}, {96 * 20, 96}};
    for (size_t k = 0; k < csvf_kernel_count(CSVF_PRIMITIVE_SM4); k++) {
        const char *name = csvf_kernel_at(CSVF_PRIMITIVE_SM4, k);
        if (csvf_force_kernel(CSVF_PRIMITIVE_SM4, name) != CSVF_OK)
            continue;
        for (standard = 0; standard < 2; standard++) {
            test_case("%s, key schedule", name);
            fresh();
            do_schedule();
            xts_secrets();
            leaves_nothing(do_schedule);
            for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
                length = shapes[i].length, unit_size = shapes[i].unit_size;
                CHECK_STATUS(csvf_xts_encrypt(&xts, sealed, data, length, unit_size, 77), CSVF_OK);
                test_case("%s, standard %d, encrypt %zu in %zu", name, standard, length, unit_size);
                xts_secrets();
                leaves_nothing(do_encrypt);
                test_case("%s, standard %d, decrypt %zu in %zu", name, standard, length, unit_size);
                xts_secrets();
                leaves_nothing(do_decrypt);
            }
            test_case("%s, standard %d, lines, spans, unit", name, standard);
            xts_secrets();
            leaves_nothing(do_lines);
            length = 1003;
            xts_secrets();
            leaves_nothing(do_unit);
            for (length = 1; length <= 100; length += 9) {
                xts_secrets();
                leaves_nothing(do_runs);
            }
            for (length = 16; length <= 2048; length *= 2) {
                CHECK_STATUS(csvf_xts_encrypt_span(&xts, sealed, data, length, 77, 64), CSVF_OK);
                xts_secrets();
                leaves_nothing(do_span);
            }
        }
    }
    (void)csvf_force_kernel(CSVF_PRIMITIVE_SM4, NULL);
}

static void do_ctr(void)
{
    status = csvf_sm4_ctr_init(&ctr, key, counter);
    if (status == CSVF_OK)
        status = csvf_sm4_ctr_crypt(&ctr, out, data, length);
}
static void do_gcm_init(void) { status = csvf_sm4_gcm_init(&gcm, key); }
static void do_gcm_encrypt(void) { status = csvf_sm4_gcm_encrypt(&gcm, out, tag, 16, nonce, unit_size, data + 8192, 50, data, length); }
static void do_gcm_decrypt(void) { status = csvf_sm4_gcm_decrypt(&gcm, out, tag, 16, nonce, unit_size, data + 8192, 50, sealed, length); }

/* `skipped` bytes at the object's start are addresses of kernels. */
static void stream_secrets(const void *object, size_t skipped, size_t size)
{
    static uint8_t stream[DATA];
    fresh();
    secret((const uint8_t *)object + skipped, size);
    for (size_t i = 0; i < length; i++)
        stream[i] = data[i] ^ sealed[i];
    secret(stream, length);
}

static void test_ctr_gcm(void)
{
    static const size_t lengths[] = {1, 16, 100, 1000, 5000};
    for (size_t k = 0; k < csvf_kernel_count(CSVF_PRIMITIVE_SM4); k++)
        for (size_t g = 0; g < csvf_kernel_count(CSVF_PRIMITIVE_GHASH); g++) {
            const char *name = csvf_kernel_at(CSVF_PRIMITIVE_SM4, k), *ghash = csvf_kernel_at(CSVF_PRIMITIVE_GHASH, g);
            if (csvf_force_kernel(CSVF_PRIMITIVE_SM4, name) != CSVF_OK || csvf_force_kernel(CSVF_PRIMITIVE_GHASH, ghash) != CSVF_OK)
                continue;
            for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
                length = lengths[i];
                fresh();
                do_ctr();
                memcpy(sealed, out, length);
                test_case("%s, ctr %zu", name, length);
                stream_secrets(&ctr, 8, sizeof(csvf_sm4_schedule));
                leaves_nothing(do_ctr);
                for (unit_size = 12; unit_size <= 13; unit_size++) {
                    fresh();
                    do_gcm_init();
                    do_gcm_encrypt();
                    memcpy(sealed, out, length);
                    test_case("%s, %s, gcm %zu, nonce %zu", name, ghash, length, unit_size);
                    stream_secrets(&gcm, 16, sizeof(csvf_sm4_schedule) + sizeof(csvf_ghash_key));
                    leaves_nothing(do_gcm_init);
                    stream_secrets(&gcm, 16, sizeof(csvf_sm4_schedule) + sizeof(csvf_ghash_key));
                    leaves_nothing(do_gcm_encrypt);
                    stream_secrets(&gcm, 16, sizeof(csvf_sm4_schedule) + sizeof(csvf_ghash_key));
                    leaves_nothing(do_gcm_decrypt);
                }
            }
        }
    (void)csvf_force_kernel(CSVF_PRIMITIVE_SM4, NULL);
    (void)csvf_force_kernel(CSVF_PRIMITIVE_GHASH, NULL);
}

static void do_sm3(void)
{
    csvf_sm3_init(&sm3);
    csvf_sm3_update(&sm3, data, 100);
    csvf_sm3_update(&sm3, data + 100, length);
    csvf_sm3_final(&sm3, digests);
    csvf_sm3_digest(digests, data, length);
    status = CSVF_OK;
}

static void do_hmac(void)
{
    csvf_hmac_sm3_init(&hmac, key, 32);
    csvf_hmac_sm3_update(&hmac, data, length);
    csvf_hmac_sm3_final(&hmac, digests);
    status = csvf_sm3_kdf(digests, 100, key, 32);
}

static void do_many(void)
{
    static const uint8_t *messages[40];
    static size_t lengths[40];
    for (size_t i = 0; i < 40; i++)
        messages[i] = data + 200 * i, lengths[i] = i * 37 % 300;
    csvf_sm3_many(digests, messages, lengths, length);
    status = csvf_sm3_blocks(digests, nonce, unit_size, data, 250, length);
}

static void sm3_secrets(void)
{
    static uint8_t pads[2][64];
    fresh();
    secret_words(key, 32);
    secret_words(data, DATA);
    for (size_t i = 0; i < 64; i++)
        pads[0][i] = (uint8_t)((i < 32 ? key[i] : 0) ^ 0x36), pads[1][i] = (uint8_t)(pads[0][i] ^ 0x36 ^ 0x5c);
    for (size_t i = 0; i < 2; i++) {
        secret(pads[i], 32);
        secret_words(pads[i], 32);
    }
}

static void test_sm3(void)
{
    for (size_t k = 0; k < csvf_kernel_count(CSVF_PRIMITIVE_SM3); k++)
        for (size_t m = 0; m < csvf_kernel_count(CSVF_PRIMITIVE_SM3_MANY); m++) {
            const char *one = csvf_kernel_at(CSVF_PRIMITIVE_SM3, k), *many = csvf_kernel_at(CSVF_PRIMITIVE_SM3_MANY, m);
            if (csvf_force_kernel(CSVF_PRIMITIVE_SM3, one) != CSVF_OK || csvf_force_kernel(CSVF_PRIMITIVE_SM3_MANY, many) != CSVF_OK)
                continue;
            for (length = 1; length <= 40; length += 13) {
                test_case("%s, sm3 %zu", one, length);
                sm3_secrets();
                leaves_nothing(do_sm3);
                test_case("%s, hmac %zu", one, length);
                sm3_secrets();
                leaves_nothing(do_hmac);
                for (unit_size = 0; unit_size <= 16; unit_size += 16) {
                    test_case("%s, %s, %zu messages, prefix %zu", one, many, length, unit_size);
                    sm3_secrets();
                    leaves_nothing(do_many);
                }
            }
        }
    (void)csvf_force_kernel(CSVF_PRIMITIVE_SM3, NULL);
    (void)csvf_force_kernel(CSVF_PRIMITIVE_SM3_MANY, NULL);
}

static csvf_sha256_layer layer;

static void do_layer(void)
{
    csvf__sha256_layer_init(&layer, key, 32);
    csvf__sha256_layer_update(&layer, sealed, unit_size ? data : NULL, 100);
    csvf__sha256_layer_update(&layer, sealed + 100, unit_size ? data + 100 : NULL, length);
    csvf__sha256_layer_digests(&layer, digests, digests + 32, digests + 64);
    status = CSVF_OK;
}

/* As the instructions have it, and as the digest does. */
static void secret_state(const uint32_t h[8])
{
    const uint32_t turned[8] = {h[3], h[2], h[7], h[6], h[1], h[0], h[5], h[4]};
    secret(h, 32);
    secret(turned, 32);
}

static void test_layer(void)
{
    if (!csvf__sha256_layer_usable())
        return;
    test_fill(sealed, sizeof sealed, 3);
    for (length = 0; length <= 1100; length += length < 130 ? 13 : 197)
        for (unit_size = 0; unit_size < 2; unit_size++) {
            test_case("sha256 of a layer, %zu bytes, plaintext %zu", length, unit_size);
            sm3_secrets();
            do_layer();
            secret_state(layer.mac);
            secret_state(layer.outer);
            secret_state(layer.clear);
            leaves_nothing(do_layer);
        }
}

static void do_memory(void)
{
    status = csvf_asid_install(engine, 1, key, 32);
    if (status == CSVF_OK)
        status = csvf_write(engine, 1, 77 * 4096 + unit_size, data, length);
    if (status == CSVF_OK)
        status = csvf_read(engine, out, length, 1, 77 * 4096 + unit_size);
    const int removed = csvf_asid_remove(engine, 1);
    status = status == CSVF_OK ? removed : status;
}

static void test_memory(void)
{
    static const size_t lengths[] = {1, 15, 16, 64, 200, 400, 4096, 9000};
    for (int model = 0; model < 2; model++) {
        const csvf_config config = {.struct_size = sizeof config, .tweak_model = model};
        CHECK_STATUS(csvf_engine_create(&engine, 96 * 4096, &config), CSVF_OK);
        standard = 0;
        fresh();
        do_schedule();
        for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
            for (unit_size = 0; unit_size < 16; unit_size += 5) {
                test_case("tweak model %d, %zu bytes at %zu", model, lengths[i], unit_size);
                length = lengths[i];
                xts_secrets();
                leaves_nothing(do_memory);
            }
        csvf_engine_destroy(engine);
    }
}

/* ---- SM2: private keys, nonces, shared points, key streams ---- */

static csvf_sm2_private sm2_key, sm2_ephemeral, sm2_made;
static csvf_sm2_public sm2_peer;
static uint8_t sm2_nonce[32], sm2_shared[64];
static const uint8_t sm2_digest[32] = {0xf0, 0xb4, 0x3e};

static void do_sm2_key(void) { status = csvf_sm2_private_init(&sm2_made, key); }
static void do_sm2_sign(void) { status = csvf_sm2_sign_digest(out, &sm2_key, sm2_digest); }
static void do_sm2_sign_with(void) { status = csvf_sm2_sign_digest_with_nonce(out, &sm2_key, sm2_digest, sm2_nonce); }
static void do_sm2_encrypt(void) { status = csvf_sm2_encrypt_with_nonce(out, &sm2_peer, data, length, sm2_nonce); }
static void do_sm2_decrypt(void) { status = csvf_sm2_decrypt(out, &sm2_key, sealed, length + 97); }
static void do_sm2_agree(void)
{
    status = csvf_sm2_agree(out, 48, out + 64, 1, &sm2_key, &sm2_ephemeral, sm2_digest, &sm2_peer, &sm2_peer, sm2_digest);
}

/* A number as bytes, as words of SM3, and as limbs. */
static void secret_number(const uint8_t *bytes, size_t count)
{
    uint8_t limbs[64];
    for (size_t i = 0; i < count; i++)
        limbs[i] = bytes[(i & ~(size_t)7) + 7 - i % 8];
    secret(bytes, count);
    secret(limbs, count);
    secret_words(bytes, count);
}

static void sm2_secrets(void)
{
    static uint8_t stream[DATA];
    fresh();
    key[0] &= 0x7f;
    window_count = 0;
    secret_number(key, 32);
    secret_number(sm2_nonce, 32);
    secret_number(sm2_shared, 64);
    secret(&sm2_key, 64);                   /* d and 1 / (1 + d) */
    secret(&sm2_ephemeral, 64);
    secret(data, length);
    secret_words(data, length);
    (void)!csvf_sm3_kdf(stream, length, sm2_shared, 64);
    secret(stream, length);
}

static void test_sm2(void)
{
    uint8_t d[32];
    test_fill(sm2_nonce, sizeof sm2_nonce, 41);
    test_fill(d, sizeof d, 42);
    sm2_nonce[0] &= 0x7f, d[0] &= 0x7f;
    length = 100;
    fresh();
    key[0] &= 0x7f;
    CHECK_STATUS(csvf_sm2_private_init(&sm2_key, key), CSVF_OK);
    CHECK_STATUS(csvf_sm2_private_init(&sm2_ephemeral, d), CSVF_OK);
    csvf_sm2_private_public(&sm2_peer, &sm2_key);
    CHECK_STATUS(csvf_sm2_encrypt_with_nonce(sealed, &sm2_peer, data, length, sm2_nonce), CSVF_OK);
    for (size_t k = 0; k < csvf_kernel_count(CSVF_PRIMITIVE_SM2); k++) {
        const char *name = csvf_kernel_at(CSVF_PRIMITIVE_SM2, k);
        if (csvf_force_kernel(CSVF_PRIMITIVE_SM2, name) != CSVF_OK)
            continue;
        csvf_sm2_affine shared, point = csvf__sm2_public_of(&sm2_peer)->point;
        uint64_t number[4];
        number_load(number, sm2_nonce);
        CHECK(csvf__sm2()->multiply(&shared, &point, number) == 1);
        csvf__sm2_point_bytes(sm2_shared, &shared);
        static const struct { const char *what; void (*run)(void); } operations[] = {
            {"private key", do_sm2_key}, {"sign", do_sm2_sign}, {"sign with nonce", do_sm2_sign_with},
            {"encrypt", do_sm2_encrypt}, {"decrypt", do_sm2_decrypt}, {"agree", do_sm2_agree}};
        for (size_t i = 0; i < sizeof operations / sizeof *operations; i++) {
            test_case("%s, sm2 %s", name, operations[i].what);
            sm2_secrets();
            leaves_nothing(operations[i].run);
        }
    }
    (void)csvf_force_kernel(CSVF_PRIMITIVE_SM2, NULL);
}

/* The search itself: a deliberate leak is found. */
static void test_control(void)
{
    fresh();
    on_own_stack(leak);
    CHECK(found_on_stack() > 0);
    window_count = 0;
}

int main(void)
{
#if defined(STACK_IS_NOT_OURS) || !defined(__OPTIMIZE__)
    printf("left out: a sanitizer, or a compiler told not to optimise, keeps copies of its own\n0 passed, 0 failed\n");
    return 0;
#endif
    RUN(test_control);
    RUN(test_xts);
    RUN(test_ctr_gcm);
    RUN(test_sm3);
    RUN(test_layer);
    RUN(test_memory);
    RUN(test_sm2);
    return test_report();
}
