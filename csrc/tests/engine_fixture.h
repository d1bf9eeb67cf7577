/* Shared by the engine's tests: keys, patterns, and references that do not go through the engine. */
#ifndef CSVF_ENGINE_FIXTURE_H
#define CSVF_ENGINE_FIXTURE_H

#include "../include/csvfast.h"
#include "test.h"

static inline void fixture_key(uint8_t key[32], uint32_t asid) { test_fill(key, 32, 1000 + asid); }

static inline csvf_engine *fixture_engine(size_t size, uint64_t base, int standard, int model, uint32_t threads)
{
    const csvf_config config = {.struct_size = sizeof config, .base_address = base, .standard = standard,
                                .tweak_model = model, .threads = threads};
    csvf_engine *engine = NULL;
    CHECK(csvf_engine_create(&engine, size, &config) == CSVF_OK);
    if (!engine)
        abort();
    return engine;
}

static inline void fixture_install(csvf_engine *engine, uint32_t asid)
{
    uint8_t key[32];
    fixture_key(key, asid);
    CHECK(csvf_asid_install(engine, asid, key, sizeof key) == CSVF_OK);
}

/* What DRAM must hold at `address` (a multiple of 16) for this plaintext, by the public one-unit calls: every block on its own. */
static inline void fixture_cipher(uint8_t *out, const uint8_t *in, size_t length, uint32_t asid, uint64_t address, int standard,
                                  int model, int decrypt)
{
    uint8_t key[32];
    csvf_xts xts;
    fixture_key(key, asid);
    CHECK(csvf_xts_init(&xts, key, standard) == CSVF_OK);
    for (size_t i = 0; i < length; i += 16) {
        const uint64_t at = address + i;
        int status;
        if (model == CSVF_TWEAK_LINE) {
            uint8_t tweak[16] = {0};
            for (int b = 0; b < 8; b++)
                tweak[b] = (uint8_t)(at / 64 >> 8 * b);
            status = (decrypt ? csvf_xts_decrypt_unit : csvf_xts_encrypt_unit)(&xts, out + i, in + i, 16, tweak);
        } else {
            status = (decrypt ? csvf_xts_decrypt_span : csvf_xts_encrypt_span)(&xts, out + i, in + i, 16, at / 4096, at % 4096);
        }
        CHECK(status == CSVF_OK);
    }
}

#endif
