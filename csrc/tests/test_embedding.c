/* What an embedding program has beside memory accesses: the observer, keys of the engine's own making, checkpoints. */
#define _GNU_SOURCE
#include "engine_fixture.h"

#include <pthread.h>
#include <stdatomic.h>

enum { PAGE = 4096, SIZE = 64 * PAGE };

/* ---- Observer ---- */

typedef struct seen {
    csvf_event events[32];
    size_t count;
} seen;

static void note(void *context, const csvf_event *event)
{
    seen *all = context;
    if (all->count < 32)
        all->events[all->count++] = *event;
}

static void check_event(const csvf_event *event, int kind, uint32_t asid, uint64_t address, uint64_t length, uint64_t generation)
{
    CHECK(event->kind == kind && event->asid == asid && event->address == address && event->length == length);
    CHECK(event->generation == generation);
    CHECK(event->is_encrypted == (length != 0 && asid != 0));
}

static void observer_is_told_what_succeeded(void)
{
    seen all = {.count = 0};
    uint8_t data[2 * PAGE] = {1};
    const uint64_t base = 0x100000;
    csvf_engine *engine = fixture_engine(SIZE, base, CSVF_STANDARD_GB, CSVF_TWEAK_XTS, 1);
    CHECK_STATUS(csvf_engine_set_observer(NULL, note, &all), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_engine_set_observer(engine, note, &all), CSVF_OK);
    fixture_install(engine, 3);
    CHECK_STATUS(csvf_write(engine, 3, base + 5, data, 100), CSVF_OK);
    CHECK_STATUS(csvf_read(engine, data, 7, 0, base + 1), CSVF_OK);
    CHECK_STATUS(csvf_write_pages(engine, 0, base / PAGE + 4, data, 2), CSVF_OK);
    CHECK_STATUS(csvf_encrypt_in_place(engine, 3, base + 4 * PAGE, 2 * PAGE), CSVF_OK);
    CHECK_STATUS(csvf_read_line(engine, data, 3, base + 64), CSVF_OK);
    CHECK_STATUS(csvf_asid_remove(engine, 3), CSVF_OK);
    fixture_install(engine, 3);
    const size_t told = all.count;
    /* Refused, or of no bytes */
    CHECK_STATUS(csvf_write(engine, 4, base, data, 1), CSVF_ERR_ASID);
    CHECK_STATUS(csvf_read(engine, data, 1, 3, base + SIZE), CSVF_ERR_RANGE);
    CHECK_STATUS(csvf_read(engine, data, 0, 3, base), CSVF_OK);
    CHECK_STATUS(csvf_encrypt_in_place(engine, 3, base + 1, 16), CSVF_ERR_ALIGNMENT);
    CHECK_STATUS(csvf_asid_remove(engine, 4), CSVF_ERR_ASID);
    CHECK(told == 8 && all.count == told);
    CHECK_STATUS(csvf_engine_set_observer(engine, NULL, NULL), CSVF_OK);
    CHECK_STATUS(csvf_read(engine, data, 1, 3, base), CSVF_OK);
    CHECK(all.count == told);
    check_event(&all.events[0], CSVF_EVENT_INSTALL, 3, 0, 0, 1);
    check_event(&all.events[1], CSVF_EVENT_WRITE, 3, base + 5, 100, 0);
    check_event(&all.events[2], CSVF_EVENT_READ, 0, base + 1, 7, 0);
    check_event(&all.events[3], CSVF_EVENT_WRITE, 0, base + 4 * PAGE, 2 * PAGE, 0);
    check_event(&all.events[4], CSVF_EVENT_LAUNCH, 3, base + 4 * PAGE, 2 * PAGE, 0);
    check_event(&all.events[5], CSVF_EVENT_READ, 3, base + 64, 64, 0);
    check_event(&all.events[6], CSVF_EVENT_REMOVE, 3, 0, 0, 1);
    check_event(&all.events[7], CSVF_EVENT_INSTALL, 3, 0, 0, 2);
    csvf_engine_destroy(engine);
}

static void observer_sees_fills_and_write_backs(void)
{
    seen all = {.count = 0};
    csvf_cache_config config;
    csvf_cache *cache;
    uint8_t byte = 7;
    csvf_engine *engine = fixture_engine(SIZE, 0, CSVF_STANDARD_GB, CSVF_TWEAK_XTS, 1);
    fixture_install(engine, 1);
    config.struct_size = sizeof config;
    CHECK_STATUS(csvf_cache_defaults(&config), CSVF_OK);
    CHECK_STATUS(csvf_cache_create(&cache, engine, &config), CSVF_OK);
    CHECK_STATUS(csvf_engine_set_observer(engine, note, &all), CSVF_OK);
    CHECK_STATUS(csvf_cache_write(cache, 1, 100, &byte, 1, 1), CSVF_OK);
    CHECK_STATUS(csvf_cache_read(cache, &byte, 1, 1, 101, 1), CSVF_OK);     /* a hit */
    CHECK(all.count == 1);
    check_event(&all.events[0], CSVF_EVENT_READ, 1, 64, 64, 0);
    csvf_cache_write_back(cache);
    csvf_cache_fabric_flush(cache);
    CHECK(all.count == 2);
    check_event(&all.events[1], CSVF_EVENT_WRITE, 1, 64, 64, 0);
    csvf_cache_destroy(cache);
    csvf_engine_destroy(engine);
}

/* Checks inside threads are counted in an atomic: the harness's own counters are not for threads. */
typedef struct crowd {
    csvf_engine *engine;
    atomic_uint next, wrong;
    atomic_uint told[CSVF_EVENT_LAUNCH + 1];
    atomic_ullong bytes;
} crowd;

enum { THREADS = 4, ROUNDS = 60 };

static void tally(void *context, const csvf_event *event)
{
    crowd *all = context;
    atomic_fetch_add(&all->told[event->kind], 1);
    atomic_fetch_add(&all->bytes, event->length);
    if (event->asid < 1 || event->asid > THREADS)
        atomic_fetch_add(&all->wrong, 1);
}

/* A guest after the other under one ASID, beside those of the other threads. */
static void *guests(void *context)
{
    crowd *all = context;
    const uint32_t asid = 1 + atomic_fetch_add(&all->next, 1);
    const uint64_t place = (uint64_t)asid * 8 * PAGE + 5;
    uint8_t data[300], back[300];
    test_fill(data, sizeof data, asid);
    for (int round = 0; round < ROUNDS; round++) {
        int bad = csvf_asid_generate(all->engine, asid) != CSVF_OK;
        bad |= csvf_write(all->engine, asid, place, data, sizeof data) != CSVF_OK;
        bad |= csvf_read(all->engine, back, sizeof back, asid, place) != CSVF_OK || memcmp(data, back, sizeof data) != 0;
        bad |= csvf_encrypt_in_place(all->engine, asid, (uint64_t)asid * 8 * PAGE + PAGE, PAGE) != CSVF_OK;
        bad |= csvf_asid_remove(all->engine, asid) != CSVF_OK;
        if (bad)
            atomic_fetch_add(&all->wrong, 1);
    }
    return NULL;
}

static void observer_of_many_threads(void)
{
    pthread_t threads[THREADS];
    crowd all = {.engine = fixture_engine(SIZE, 0, CSVF_STANDARD_GB, CSVF_TWEAK_XTS, 1)};
    CHECK_STATUS(csvf_engine_set_observer(all.engine, tally, &all), CSVF_OK);
    for (int i = 0; i < THREADS; i++)
        CHECK(pthread_create(&threads[i], NULL, guests, &all) == 0);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    CHECK(all.wrong == 0);
    for (int kind = CSVF_EVENT_INSTALL; kind <= CSVF_EVENT_LAUNCH; kind++)
        CHECK(all.told[kind] == THREADS * ROUNDS);
    CHECK(all.bytes == (unsigned long long)THREADS * ROUNDS * (300 + 300 + PAGE));
    csvf_engine_destroy(all.engine);
}

/* ---- Keys of the engine's making ---- */

static csvf_engine *seeded(const char *seed)
{
    csvf_engine *engine = fixture_engine(SIZE, 0, CSVF_STANDARD_GB, CSVF_TWEAK_XTS, 1);
    if (seed)
        CHECK_STATUS(csvf_engine_set_deterministic_insecure(engine, seed, strlen(seed)), CSVF_OK);
    CHECK(csvf_engine_is_deterministic(engine) == (seed != NULL));
    return engine;
}

/* What 32 zeros are in DRAM under a generated key. */
static void under_generated(uint8_t out[32], csvf_engine *engine, uint32_t asid)
{
    static const uint8_t zeros[32];
    CHECK_STATUS(csvf_asid_generate(engine, asid), CSVF_OK);
    CHECK_STATUS(csvf_write(engine, asid, 0, zeros, 32), CSVF_OK);
    memcpy(out, csvf_engine_dram(engine), 32);
}

static void deterministic_keys_are_as_documented(void)
{
    uint8_t got[32], key[32], want[32], again[32], other[32], digest[32], secret[32 + 34 + 12];
    csvf_engine *engine = seeded("a seed"), *reference = seeded(NULL);
    for (uint64_t generation = 1; generation <= 2; generation++) {
        under_generated(got, engine, 0x105);
        csvf_sm3_digest(digest, "a seed", 6);
        memcpy(secret, digest, 32);
        memcpy(secret + 32, "csvfast insecure deterministic key", 34);
        memcpy(secret + 66, (const uint8_t[12]){5, 1, 0, 0, (uint8_t)generation}, 12);
        CHECK_STATUS(csvf_sm3_kdf(key, 32, secret, sizeof secret), CSVF_OK);
        CHECK_STATUS(csvf_asid_install(reference, 1, key, 32), CSVF_OK);
        CHECK_STATUS(csvf_write(reference, 1, 0, (const uint8_t[32]){0}, 32), CSVF_OK);
        memcpy(want, csvf_engine_dram(reference), 32);
        CHECK_BYTES(got, want, 32);
        CHECK_STATUS(csvf_asid_remove(engine, 0x105), CSVF_OK);
        CHECK_STATUS(csvf_asid_remove(reference, 1), CSVF_OK);
    }
    csvf_engine_destroy(reference);
    csvf_engine_destroy(engine);

    engine = seeded("a seed");
    under_generated(again, engine, 0x105);
    under_generated(other, engine, 0x106);
    CHECK(memcmp(again, other, 32) != 0);
    CHECK(memcmp(again, got, 32) != 0);     /* generation 1 and 2 */
    csvf_engine_destroy(engine);
    engine = seeded("another seed");
    under_generated(other, engine, 0x105);
    CHECK(memcmp(again, other, 32) != 0);
    csvf_engine_destroy(engine);
}

static void generated_keys_differ(void)
{
    uint8_t first[32], second[32];
    csvf_engine *engine = seeded(NULL);
    under_generated(first, engine, 1);
    CHECK_STATUS(csvf_asid_generate(engine, 1), CSVF_ERR_BUSY);
    CHECK_STATUS(csvf_asid_generate(engine, 0), CSVF_ERR_ASID);
    CHECK_STATUS(csvf_asid_generate(NULL, 1), CSVF_ERR_ARGUMENT);
    under_generated(second, engine, 2);
    CHECK(memcmp(first, second, 32) != 0);
    csvf_engine_destroy(engine);
}

static void deterministic_mode_comes_before_keys(void)
{
    csvf_engine *engine = seeded(NULL);
    CHECK_STATUS(csvf_engine_set_deterministic_insecure(NULL, "s", 1), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_engine_set_deterministic_insecure(engine, NULL, 1), CSVF_ERR_ARGUMENT);
    fixture_install(engine, 1);
    CHECK_STATUS(csvf_asid_remove(engine, 1), CSVF_OK);
    CHECK_STATUS(csvf_engine_set_deterministic_insecure(engine, "s", 1), CSVF_ERR_STATE);
    CHECK(csvf_engine_is_deterministic(engine) == 0);
    csvf_engine_destroy(engine);
    engine = seeded("s");
    CHECK_STATUS(csvf_engine_set_deterministic_insecure(engine, "t", 1), CSVF_ERR_STATE);
    csvf_engine_destroy(engine);
    CHECK(csvf_engine_is_deterministic(NULL) == 0);
}

/* ---- Checkpoints ---- */

static const uint8_t seal[16] = "a caller's key!";

static int checkpoint_of(const csvf_engine *engine, const uint8_t *key)
{
    const int fd = memfd_create("checkpoint", 0);
    CHECK(fd >= 0);
    CHECK_STATUS(csvf_engine_checkpoint(engine, fd, key, key ? sizeof seal : 0), CSVF_OK);
    return fd;
}

static int restore_of(csvf_engine *engine, int fd, const uint8_t *key)
{
    CHECK(lseek(fd, 0, SEEK_SET) == 0);
    return csvf_engine_restore(engine, fd, key, key ? sizeof seal : 0);
}

static csvf_engine *worked(void)
{
    uint8_t data[3 * PAGE];
    csvf_engine *engine = seeded("seed");
    test_fill(data, sizeof data, 9);
    CHECK_STATUS(csvf_asid_generate(engine, 7), CSVF_OK);
    CHECK_STATUS(csvf_asid_remove(engine, 7), CSVF_OK);
    CHECK_STATUS(csvf_asid_generate(engine, 7), CSVF_OK);
    CHECK_STATUS(csvf_asid_generate(engine, 8), CSVF_OK);
    CHECK_STATUS(csvf_asid_remove(engine, 8), CSVF_OK);
    CHECK_STATUS(csvf_asid_generate(engine, 509), CSVF_OK);
    CHECK_STATUS(csvf_write(engine, 7, 2 * PAGE + 5, data, sizeof data - 5), CSVF_OK);
    CHECK_STATUS(csvf_write(engine, 509, SIZE - 100, data, 100), CSVF_OK);
    CHECK_STATUS(csvf_write(engine, 0, 10 * PAGE, data, 10), CSVF_OK);
    return engine;
}

static uint64_t generation_of(const csvf_engine *engine, uint32_t asid, int wanted_installed)
{
    uint64_t generation;
    int installed;
    CHECK_STATUS(csvf_asid_state(engine, &generation, &installed, asid), CSVF_OK);
    CHECK(installed == wanted_installed);
    return generation;
}

static void checkpoint_comes_back(const uint8_t *key)
{
    uint8_t data[3 * PAGE], back[3 * PAGE];
    csvf_engine *engine = worked(), *other = seeded("seed");
    const int fd = checkpoint_of(engine, key);
    CHECK(lseek(fd, 0, SEEK_END) == 48 + 2 * 16 + 16 * 4 + 5 * PAGE + 32);  /* ASIDs 7 and 8, three runs of 5 pages, the end */
    memset(csvf_engine_dram(other), 0xee, SIZE);    /* also pages that the checkpoint leaves out */
    CHECK_STATUS(restore_of(other, fd, key), CSVF_OK);
    CHECK_BYTES(csvf_engine_dram(other), csvf_engine_dram(engine), SIZE);
    CHECK(generation_of(other, 7, 0) == 1 && generation_of(other, 8, 0) == 1 && generation_of(other, 509, 0) == 0);
    CHECK_STATUS(csvf_read(other, back, 1, 7, 2 * PAGE), CSVF_ERR_ASID);    /* no key came with it */
    CHECK_STATUS(csvf_asid_generate(other, 7), CSVF_OK);
    CHECK(generation_of(other, 7, 1) == 2);
    test_fill(data, sizeof data, 9);
    CHECK_STATUS(csvf_read(other, back, sizeof back - 5, 7, 2 * PAGE + 5), CSVF_OK);
    CHECK_BYTES(back, data, sizeof back - 5);
    close(fd);
    csvf_engine_destroy(engine);
    csvf_engine_destroy(other);
}

static void checkpoint_round_trip(void) { checkpoint_comes_back(NULL); }
static void sealed_checkpoint_round_trip(void) { checkpoint_comes_back(seal); }

static void changed_checkpoints_are_refused(void)
{
    csvf_engine *engine = worked();
    for (int is_keyed = 0; is_keyed < 2; is_keyed++) {
        const uint8_t *key = is_keyed ? seal : NULL;
        const int fd = checkpoint_of(engine, key);
        const off_t size = lseek(fd, 0, SEEK_END);
        for (off_t at = 0; at < size; at += at < 160 || at > size - 70 ? 1 : 997) {
            uint8_t byte, flipped;
            csvf_engine *other = seeded(NULL);
            test_case("keyed %d, byte %lld", is_keyed, (long long)at);
            csvf_engine_dram(other)[5 * PAGE] = 1;
            CHECK(pread(fd, &byte, 1, at) == 1);
            flipped = byte ^ 0x10;
            CHECK(pwrite(fd, &flipped, 1, at) == 1);
            const int status = restore_of(other, fd, key);
            CHECK(status == CSVF_ERR_ARGUMENT || status == CSVF_ERR_RANGE || status == CSVF_ERR_LENGTH ||
                  status == CSVF_ERR_AUTHENTICATION);
            CHECK(generation_of(other, 7, 0) == 0);
            for (size_t i = 0; i < SIZE; i++)
                if (csvf_engine_dram(other)[i] && i != 5 * PAGE) {
                    CHECK(0 && "something of a refused checkpoint stayed");
                    break;
                }
            CHECK(pwrite(fd, &byte, 1, at) == 1);
            csvf_engine_destroy(other);
        }
        for (off_t cut = 0; cut < size; cut += cut < 160 ? 7 : 1501) {
            csvf_engine *other = seeded(NULL);
            test_case("keyed %d, cut to %lld", is_keyed, (long long)cut);
            const int short_fd = checkpoint_of(engine, key);
            CHECK(ftruncate(short_fd, cut) == 0);
            CHECK_STATUS(restore_of(other, short_fd, key), CSVF_ERR_LENGTH);
            close(short_fd);
            csvf_engine_destroy(other);
        }
        test_case("keyed %d", is_keyed);
        csvf_engine *other = seeded(NULL);
        CHECK_STATUS(restore_of(other, fd, is_keyed ? NULL : seal), CSVF_ERR_ARGUMENT);
        if (is_keyed)
            CHECK_STATUS(restore_of(other, fd, (const uint8_t *)"a caller's kez!"), CSVF_ERR_AUTHENTICATION);
        CHECK_STATUS(restore_of(other, fd, key), CSVF_OK);
        csvf_engine_destroy(other);
        close(fd);
    }
    csvf_engine_destroy(engine);
}

static void other_engines_do_not_take_it(void)
{
    csvf_engine *engine = worked();
    const int fd = checkpoint_of(engine, NULL);
    csvf_engine *others[4] = {
        fixture_engine(SIZE + PAGE, 0, CSVF_STANDARD_GB, CSVF_TWEAK_XTS, 1),
        fixture_engine(SIZE, PAGE, CSVF_STANDARD_GB, CSVF_TWEAK_XTS, 1),
        fixture_engine(SIZE, 0, CSVF_STANDARD_IEEE, CSVF_TWEAK_XTS, 1),
        fixture_engine(SIZE, 0, CSVF_STANDARD_GB, CSVF_TWEAK_LINE, 1),
    };
    for (int i = 0; i < 4; i++) {
        CHECK_STATUS(restore_of(others[i], fd, NULL), CSVF_ERR_ARGUMENT);
        csvf_engine_destroy(others[i]);
    }
    CHECK_STATUS(restore_of(engine, fd, NULL), CSVF_ERR_STATE);
    const csvf_config few = {.struct_size = sizeof few, .asid_max = 7};
    csvf_engine *small = NULL;
    CHECK_STATUS(csvf_engine_create(&small, SIZE, &few), CSVF_OK);
    CHECK_STATUS(restore_of(small, fd, NULL), CSVF_ERR_RANGE);
    csvf_engine_destroy(small);
    CHECK_STATUS(csvf_engine_checkpoint(NULL, fd, NULL, 0), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_engine_checkpoint(engine, fd, seal, 0), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_engine_checkpoint(engine, -1, NULL, 0), CSVF_ERR_SYSTEM);
    close(fd);
    csvf_engine_destroy(engine);
}

int main(void)
{
    RUN(observer_is_told_what_succeeded);
    RUN(observer_sees_fills_and_write_backs);
    RUN(observer_of_many_threads);
    RUN(deterministic_keys_are_as_documented);
    RUN(generated_keys_differ);
    RUN(deterministic_mode_comes_before_keys);
    RUN(checkpoint_round_trip);
    RUN(sealed_checkpoint_round_trip);
    RUN(changed_checkpoints_are_refused);
    RUN(other_engines_do_not_take_it);
    return test_report();
}
