/* Cores in threads of their own over one engine, each as a guest of its own. For ThreadSanitizer, and right without it. */
#include "cache_fixture.h"

#include <pthread.h>

enum { CORES = 4, PAGES = 32, ROUNDS = 4000 };

typedef struct core {
    csvf_engine *engine;
    uint32_t asid;
    int is_wrong;
    csvf_cache_config config;   /* made before the thread: the harness counts checks in one place */
} core;

static void *work(void *argument)
{
    core *c = argument;
    csvf_cache *cache;
    c->is_wrong = 1;
    if (csvf_cache_create(&cache, c->engine, &c->config) != CSVF_OK)
        return NULL;
    static const size_t span = PAGES * PAGE;
    uint8_t *shadow = calloc(1, span), seen[300];
    const uint64_t base = (uint64_t)(c->asid - 1) * span;
    uint64_t random = c->asid;
    int ok = shadow && csvf_write(c->engine, c->asid, base, shadow, span) == CSVF_OK;
    for (int i = 0; ok && i < ROUNDS; i++) {
        const size_t length = 1 + test_random(&random) % sizeof seen, at = test_random(&random) % (span - sizeof seen);
        const uint64_t kind = test_random(&random) % 64;
        if (kind == 0) {    /* other guests' keys come and go meanwhile; this one's write-backs must all arrive */
            csvf_cache_write_back(cache);
            csvf_cache_fabric_flush(cache);
        } else if (kind < 32) {
            test_fill(shadow + at, length, test_random(&random));
            ok &= csvf_cache_write(cache, c->asid, base + at, shadow + at, length, 1) == CSVF_OK;
        } else {
            ok &= csvf_cache_read(cache, seen, length, c->asid, base + at, 1) == CSVF_OK && !memcmp(seen, shadow + at, length);
        }
        if (kind == 1)
            ok &= csvf_cache_flush(cache, c->asid, base + at, length, 1) == CSVF_OK;
    }
    csvf_cache_write_back(cache);
    csvf_cache_fabric_flush(cache);
    csvf_cache_stats stats = {.struct_size = sizeof stats};
    ok &= csvf_cache_statistics(cache, &stats, c->asid) == CSVF_OK && stats.lines_lost == 0 && stats.bytes_encrypted > 0;
    uint8_t *after = malloc(span);
    ok &= after && csvf_read(c->engine, after, span, c->asid, base) == CSVF_OK && !memcmp(after, shadow, span);
    c->is_wrong = !ok;
    free(shadow);
    free(after);
    csvf_cache_destroy(cache);
    return NULL;
}

static void test_guests_side_by_side(void)
{
    csvf_engine *engine = fixture_engine((size_t)CORES * PAGES * PAGE, 0, CSVF_STANDARD_GB, CSVF_TWEAK_XTS, 1);
    core cores[CORES];
    pthread_t threads[CORES];
    for (uint32_t i = 0; i < CORES; i++) {
        fixture_install(engine, i + 1);
        cores[i] = (core){engine, i + 1, 0, fixture_small()};
        cores[i].config.fabric_lines = 4;
        cores[i].config.fill = i & 1 ? CSVF_FILL_PAGE : CSVF_FILL_LINE;
    }
    for (int i = 0; i < CORES; i++)
        CHECK(pthread_create(&threads[i], NULL, work, &cores[i]) == 0);
    for (int i = 0; i < 200; i++) {
        fixture_install(engine, CORES + 1);
        CHECK_STATUS(csvf_asid_remove(engine, CORES + 1), CSVF_OK);
    }
    for (int i = 0; i < CORES; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
        CHECK(!cores[i].is_wrong);
    }
    csvf_engine_destroy(engine);
}

int main(void)
{
    RUN(test_guests_side_by_side);
    return test_report();
}
