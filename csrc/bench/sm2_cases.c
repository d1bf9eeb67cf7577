/* SM2, one operation at a time and many verifications at once, for every kernel, with ratios to OpenSSL in the same run. Ratios of many
 * verifications are to OpenSSL's verification of one: it has no other. */
#include <stdio.h>
#include <string.h>

#include "bench.h"

enum { KEYS = 64, SIGNATURES = 1024, MESSAGE = 32 };

static const char id[] = "1234567812345678";
static csvf_sm2_private private_keys[KEYS];
static csvf_sm2_public public_keys[KEYS];
static csvf_sm2_table *tables[KEYS];
static uint8_t digest[32], signature[64], message[MESSAGE], cipher[MESSAGE + CSVF_SM2_ENCRYPTION_OVERHEAD];
static uint8_t digests[SIGNATURES][32], of_one_key[SIGNATURES][64], of_many_keys[SIGNATURES][64];
static bench_sm2_rates reference;

static void must(int status) { bench_require(status == CSVF_OK, csvf_status_text(status)); }

static void run_private_init(void *context)
{
    csvf_sm2_private made;
    (void)context;
    must(csvf_sm2_private_init(&made, digest));
    csvf_wipe(&made, sizeof made);
}

static void run_sign_digest(void *context)
{
    (void)context;
    must(csvf_sm2_sign_digest(signature, &private_keys[0], digest));
}

static void run_sign(void *context)
{
    (void)context;
    must(csvf_sm2_sign(of_one_key[0], &private_keys[0], (const uint8_t *)id, sizeof id - 1, message, MESSAGE));
}

static void run_verify(void *context)
{
    must(csvf_sm2_verify_digest_var(&public_keys[0], context ? tables[0] : NULL, signature, digest));
}

static void run_verify_message(void *context)
{
    must(csvf_sm2_verify_var(&public_keys[0], context ? tables[0] : NULL, of_one_key[0], (const uint8_t *)id, sizeof id - 1, message, MESSAGE));
}

static void run_table(void *context)
{
    csvf_sm2_table *made;
    (void)context;
    must(csvf_sm2_table_create(&made, &public_keys[0]));
    csvf_sm2_table_destroy(made);
}

static void run_encrypt(void *context)
{
    (void)context;
    must(csvf_sm2_encrypt(cipher, &public_keys[0], message, MESSAGE));
}

static void run_decrypt(void *context)
{
    uint8_t out[MESSAGE];
    (void)context;
    must(csvf_sm2_decrypt(out, &private_keys[0], cipher, sizeof cipher));
}

typedef struct batch {
    size_t count;
    int many_keys, with_table;
} batch;

static void run_many(void *context)
{
    static csvf_sm2_check checks[SIGNATURES];
    static uint8_t valid[SIGNATURES];
    const batch *b = context;
    size_t good = 0;
    for (size_t i = 0; i < b->count; i++) {
        const size_t key = b->many_keys ? i % KEYS : 0;
        checks[i] = (csvf_sm2_check){&public_keys[key], b->with_table ? tables[key] : NULL, b->many_keys ? of_many_keys[i] : of_one_key[i],
                                     digests[i]};
    }
    must(csvf_sm2_verify_many_var(valid, checks, b->count));
    for (size_t i = 0; i < b->count; i++)
        good += valid[i];
    bench_require(good == b->count, "verifying good signatures");
}

static void measure(const char *name, const char *variant, const char *kernel, size_t operations, double reference_rate,
                    void (*run)(void *), void *context)
{
    (void)bench_measure(&(bench_case){.name = name, .variant = variant, .kernel = kernel, .operations = operations, .threads = 1,
                                      .reference_rate = reference_rate, .run = run, .context = context});
}

static void single_cases(const char *kernel)
{
    run_sign_digest(NULL);
    measure("sm2-private-init", "", kernel, 1, 0, run_private_init, NULL);
    measure("sm2-sign", "", kernel, 1, reference.sign, run_sign_digest, NULL);
    measure("sm2-sign", "32 bytes, Z too", kernel, 1, reference.sign, run_sign, NULL);
    measure("sm2-verify", "", kernel, 1, reference.verify, run_verify, NULL);
    measure("sm2-verify", "table", kernel, 1, reference.verify, run_verify, tables);
    run_sign(NULL);
    measure("sm2-verify", "32 bytes, Z too", kernel, 1, reference.verify, run_verify_message, NULL);
    measure("sm2-verify", "32 bytes, Z too, table", kernel, 1, reference.verify, run_verify_message, tables);
    must(csvf_sm2_sign_digest(of_one_key[0], &private_keys[0], digests[0]));     /* as it was */
    measure("sm2-table-create", "", kernel, 1, 0, run_table, NULL);
    measure("sm2-encrypt", "32 bytes", kernel, 1, reference.encrypt, run_encrypt, NULL);
    run_encrypt(NULL);
    measure("sm2-decrypt", "32 bytes", kernel, 1, reference.decrypt, run_decrypt, NULL);
}

static void many_cases(const char *kernel)
{
    static const size_t counts[] = {8, 16, 64, 1024};
    static const struct { const char *text; int many_keys, with_table; } kinds[] = {
        {"%zu, one key", 0, 0}, {"%zu, 64 keys", 1, 0}, {"%zu, one key, table", 0, 1}, {"%zu, 64 keys, tables", 1, 1}};
    for (size_t kind = 0; kind < 4; kind++)
        for (size_t i = 0; i < 4; i++) {
            batch b = {counts[i], kinds[kind].many_keys, kinds[kind].with_table};
            char variant[48];
            snprintf(variant, sizeof variant, kinds[kind].text, counts[i]);
            measure("sm2-verify-many", variant, kernel, counts[i], reference.verify, run_many, &b);
        }
}

static void for_each_kernel(int primitive, void (*cases)(const char *kernel))
{
    for (size_t i = 0; i < csvf_kernel_count(primitive); i++) {
        const char *name = csvf_kernel_at(primitive, i);
        if (!csvf_kernel_available(primitive, name) || (bench_settings.kernel && strcmp(bench_settings.kernel, name)))
            continue;
        must(csvf_force_kernel(primitive, name));
        cases(name);
    }
    must(csvf_force_kernel(primitive, NULL));
}

void bench_sm2_cases(void)
{
    static const char *const names[] = {"sm2-private-init", "sm2-sign", "sm2-verify", "sm2-verify-many", "sm2-table-create", "sm2-encrypt",
                                        "sm2-decrypt"};
    int wanted = 0;
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        wanted |= bench_wanted(names[i]);
    if (!wanted)
        return;
    for (size_t i = 0; i < MESSAGE; i++)
        message[i] = (uint8_t)(5 * i), digest[i] = (uint8_t)(3 * i + 1);
    for (size_t i = 0; i < KEYS; i++) {
        must(csvf_sm2_private_generate(&private_keys[i]));
        csvf_sm2_private_public(&public_keys[i], &private_keys[i]);
        must(csvf_sm2_table_create(&tables[i], &public_keys[i]));
    }
    for (size_t i = 0; i < SIGNATURES; i++) {
        csvf_sm3_digest(digests[i], &i, sizeof i);
        must(csvf_sm2_sign_digest(of_one_key[i], &private_keys[0], digests[i]));
        must(csvf_sm2_sign_digest(of_many_keys[i], &private_keys[i % KEYS], digests[i]));
    }
    reference = bench_sm2_peer(MESSAGE);
    for_each_kernel(CSVF_PRIMITIVE_SM2, single_cases);
    for_each_kernel(CSVF_PRIMITIVE_SM2_MANY, many_cases);
    for (size_t i = 0; i < KEYS; i++)
        csvf_sm2_table_destroy(tables[i]);
    csvf_wipe(private_keys, sizeof private_keys);
}
