/* Many threads on one engine. Checks inside threads are counted in an atomic: the harness's own counters are not for threads. */
#define _GNU_SOURCE
#include "engine_fixture.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

enum { PAGE = 4096, THREADS = 6 };

typedef struct shared {
    csvf_engine *engine;
    pthread_barrier_t start;
    atomic_int wrong, ending;
    atomic_uint seen_first, seen_second, refused;
} shared;

typedef struct worker {
    shared *shared;
    uint32_t number;
    csvf_stats expected;
} worker;

static void run_threads(shared *all, worker *workers, int count, void *(*main)(void *))
{
    pthread_t threads[16];
    pthread_barrier_init(&all->start, NULL, (unsigned)count);
    for (int i = 0; i < count; i++) {
        workers[i] = (worker){.shared = all, .number = (uint32_t)i};
        CHECK(pthread_create(&threads[i], NULL, main, &workers[i]) == 0);
    }
    for (int i = 0; i < count; i++)
        pthread_join(threads[i], NULL);
    pthread_barrier_destroy(&all->start);
}

/* ---- Own regions, shared ASIDs ---- */

enum { REGION = 300 * PAGE + 37, ROUNDS = 1500 };   /* regions end inside a block that the next thread's begins in */

/* What a guest access of this span counts: whole blocks through SM4, and per edge of a write one block each way. */
static void expect_counts(csvf_stats *expected, uint64_t address, size_t length, int is_write)
{
    const uint64_t from = address / 16 * 16, to = (address + length + 15) / 16 * 16;
    uint64_t edges = 0;
    if (length && is_write) {
        const int one_block = to - from == 16;
        edges = one_block ? length < 16 : (uint64_t)(address % 16 != 0) + ((address + length) % 16 != 0);
    }
    if (length && is_write)
        expected->bytes_encrypted += to - from;
    if (length && !is_write)
        expected->bytes_decrypted += to - from;
    /* Short unaligned writes decrypt all their blocks in one call, long ones the edges alone. */
    if (edges)
        expected->bytes_decrypted += length <= 224 ? to - from : 16 * edges;
    expected->read_modify_writes += edges;
}

static void *own_region(void *argument)
{
    worker *w = argument;
    shared *all = w->shared;
    const uint64_t base = csvf_engine_base(all->engine) + 5 + (uint64_t)w->number * REGION;
    uint8_t *shadow = calloc(1, REGION), *data = malloc(REGION);
    uint64_t random = w->number + 1;
    pthread_barrier_wait(&all->start);
    int ok = csvf_write(all->engine, 1, base, shadow, REGION) == CSVF_OK;
    expect_counts(&w->expected, base, REGION, 1);
    for (int i = 0; i < ROUNDS && ok; i++) {
        const int is_long = i % 100 == 0;
        const size_t at = is_long ? 0 : test_random(&random) % REGION;
        size_t length = is_long ? REGION : test_random(&random) % 700;
        length = length < REGION - at ? length : REGION - at;
        if (test_random(&random) & 1) {
            test_fill(data, length, test_random(&random));
            memcpy(shadow + at, data, length);
            ok &= csvf_write(all->engine, 1, base + at, data, length) == CSVF_OK;
            expect_counts(&w->expected, base + at, length, 1);
        } else {
            memset(data, 0xCC, length);
            ok &= csvf_read(all->engine, data, length, 1, base + at) == CSVF_OK && !memcmp(data, shadow + at, length);
            expect_counts(&w->expected, base + at, length, 0);
        }
    }
    pthread_barrier_wait(&all->start);
    ok &= csvf_read(all->engine, data, REGION, 1, base) == CSVF_OK && !memcmp(data, shadow, REGION);
    expect_counts(&w->expected, base, REGION, 0);
    if (!ok)
        atomic_fetch_add(&all->wrong, 1);
    free(shadow);
    free(data);
    return NULL;
}

static void regions(int model, uint32_t pool_threads)
{
    shared all = {0};
    worker workers[THREADS];
    all.engine = fixture_engine(THREADS * (REGION + PAGE) / PAGE * PAGE, 1 << 20, CSVF_STANDARD_GB, model, pool_threads);
    fixture_install(all.engine, 1);
    run_threads(&all, workers, THREADS, own_region);
    CHECK(all.wrong == 0);
    csvf_stats stats = {.struct_size = sizeof stats}, sum = {0};
    for (int i = 0; i < THREADS; i++) {
        sum.bytes_encrypted += workers[i].expected.bytes_encrypted;
        sum.bytes_decrypted += workers[i].expected.bytes_decrypted;
        sum.read_modify_writes += workers[i].expected.read_modify_writes;
    }
    CHECK(csvf_engine_stats(all.engine, &stats) == CSVF_OK);
    CHECK(stats.bytes_encrypted == sum.bytes_encrypted && stats.bytes_decrypted == sum.bytes_decrypted);
    CHECK(stats.read_modify_writes == sum.read_modify_writes);
    csvf_engine_destroy(all.engine);
}

static void test_own_regions(void)
{
    regions(CSVF_TWEAK_XTS, 1);
    regions(CSVF_TWEAK_XTS, 3);
    regions(CSVF_TWEAK_LINE, 2);
}

/* ---- Different bytes of the same blocks ---- */

enum { SHARED_BYTES = 64, BYTE_THREADS = 4, BYTE_ROUNDS = 40000 };

/* Thread t owns bytes t, t + 4, t + 8, ...: every block is everybody's. A lost update or a torn read shows at once. */
static void *interleaved_bytes(void *argument)
{
    worker *w = argument;
    shared *all = w->shared;
    uint8_t mine[SHARED_BYTES] = {0};
    uint64_t random = w->number + 77;
    int ok = 1;
    pthread_barrier_wait(&all->start);
    for (int i = 0; i < BYTE_ROUNDS && ok; i++) {
        const size_t at = test_random(&random) % (SHARED_BYTES / BYTE_THREADS) * BYTE_THREADS + w->number;
        uint8_t byte = 0;
        ok &= csvf_read(all->engine, &byte, 1, 1, 4000 + at) == CSVF_OK && byte == mine[at];
        mine[at] = (uint8_t)test_random(&random);
        ok &= csvf_write(all->engine, 1, 4000 + at, &mine[at], 1) == CSVF_OK;
    }
    pthread_barrier_wait(&all->start);
    for (size_t at = w->number; at < SHARED_BYTES; at += BYTE_THREADS) {
        uint8_t byte = 0;
        ok &= csvf_read(all->engine, &byte, 1, 1, 4000 + at) == CSVF_OK && byte == mine[at];
    }
    if (!ok)
        atomic_fetch_add(&all->wrong, 1);
    return NULL;
}

static void test_interleaved_bytes(void)
{
    for (int model = 0; model < 2; model++) {
        shared all = {0};
        worker workers[BYTE_THREADS];
        const uint8_t zero[SHARED_BYTES] = {0};
        all.engine = fixture_engine(2 * PAGE, 0, CSVF_STANDARD_GB, model, 1);
        fixture_install(all.engine, 1);
        CHECK(csvf_write(all.engine, 1, 4000, zero, sizeof zero) == CSVF_OK);
        run_threads(&all, workers, BYTE_THREADS, interleaved_bytes);
        CHECK(all.wrong == 0);
        csvf_stats stats = {.struct_size = sizeof stats};
        CHECK(csvf_engine_stats(all.engine, &stats) == CSVF_OK && stats.read_modify_writes == BYTE_THREADS * BYTE_ROUNDS);
        csvf_engine_destroy(all.engine);
    }
}

/* Writes that end and begin inside shared blocks: thread t owns bytes [24 t, 24 t + 24), so that every one of its writes shares both edge
 * blocks with a neighbour, and the locks of two blocks must both be held. */
static void *neighbouring_spans(void *argument)
{
    worker *w = argument;
    shared *all = w->shared;
    uint8_t mine[24] = {0}, seen[24];
    uint64_t random = w->number + 5;
    int ok = 1;
    const uint64_t start = 4000 + 8 + 24 * w->number;
    pthread_barrier_wait(&all->start);
    for (int i = 0; i < BYTE_ROUNDS && ok; i++) {
        const size_t at = test_random(&random) % 4, length = 24 - at - test_random(&random) % 4;
        ok &= csvf_read(all->engine, seen, 24, 1, start) == CSVF_OK && !memcmp(seen, mine, 24);
        test_fill(mine + at, length, test_random(&random));
        ok &= csvf_write(all->engine, 1, start + at, mine + at, length) == CSVF_OK;
    }
    pthread_barrier_wait(&all->start);
    ok &= csvf_read(all->engine, seen, 24, 1, start) == CSVF_OK && !memcmp(seen, mine, 24);
    if (!ok)
        atomic_fetch_add(&all->wrong, 1);
    return NULL;
}

static void test_neighbouring_spans(void)
{
    shared all = {0};
    worker workers[BYTE_THREADS];
    const uint8_t zero[8 + 24 * BYTE_THREADS] = {0};
    all.engine = fixture_engine(2 * PAGE, 0, CSVF_STANDARD_GB, CSVF_TWEAK_XTS, 1);
    fixture_install(all.engine, 1);
    CHECK(csvf_write(all.engine, 1, 4000, zero, sizeof zero) == CSVF_OK);
    run_threads(&all, workers, BYTE_THREADS, neighbouring_spans);
    CHECK(all.wrong == 0);
    csvf_engine_destroy(all.engine);
}

/* ---- Install and remove under fire ---- */

enum { CHANGES = 60, LINES = 128 };

/* The fixed ciphertext of two pages, and what it decrypts to under the two keys that take turns. */
static uint8_t fixed[2 * PAGE], under_first[2 * PAGE], under_second[2 * PAGE];

static void *key_changer(worker *w)
{
    shared *all = w->shared;
    uint8_t key[32], line[64];
    int ok = 1;
    for (int i = 0; i < CHANGES && ok; i++) {
        uint64_t generation = 0;
        int installed = 0;
        fixture_key(key, 1 + (uint32_t)i % 2);
        ok &= csvf_asid_install(all->engine, 1, key, 32) == CSVF_OK;
        ok &= csvf_asid_state(all->engine, &generation, &installed, 1) == CSVF_OK && generation == (uint64_t)i + 1 && installed;
        const uint8_t *expected = i % 2 ? under_second : under_first;
        ok &= csvf_read_line(all->engine, line, 1, 64) == CSVF_OK && !memcmp(line, expected + 64, 64);
        /* Until the others have used this key too; bounded, should they be starved of a core. */
        const unsigned before = atomic_load(&all->seen_first) + atomic_load(&all->seen_second);
        for (int spin = 0; spin < 300 && atomic_load(&all->seen_first) + atomic_load(&all->seen_second) < before + 1; spin++) {
            ok &= csvf_read(all->engine, line, 50, 1, 33) == CSVF_OK && !memcmp(line, expected + 33, 50);
            sched_yield();
        }
        ok &= csvf_asid_remove(all->engine, 1) == CSVF_OK;
        ok &= csvf_read_line(all->engine, line, 1, 64) == CSVF_ERR_ASID && csvf_asid_remove(all->engine, 1) == CSVF_ERR_ASID;
    }
    if (!ok)
        atomic_fetch_add(&all->wrong, 1);
    atomic_store(&all->ending, 1);
    return NULL;
}

static void *key_user(void *argument)
{
    worker *w = argument;
    shared *all = w->shared;
    uint8_t got[2 * PAGE];
    uint64_t random = w->number;
    pthread_barrier_wait(&all->start);
    if (w->number == 0)
        return key_changer(w);
    while (!atomic_load(&all->ending)) {
        size_t at = test_random(&random) % LINES * 64, length = 64;
        if (w->number == 2)     /* one of them by unaligned reads, one by both pages */
            at = test_random(&random) % PAGE, length = 1 + test_random(&random) % 300;
        if (w->number == 3)
            at = 0, length = 2 * PAGE;
        memset(got, 0x3C, sizeof got);
        const int status = csvf_read(all->engine, got, length, 1, at);
        if (status == CSVF_OK) {
            if (!memcmp(got, under_first + at, length))
                atomic_fetch_add(&all->seen_first, 1);
            else if (!memcmp(got, under_second + at, length))
                atomic_fetch_add(&all->seen_second, 1);
            else
                atomic_fetch_add(&all->wrong, 1);
        } else if (status == CSVF_ERR_ASID && got[0] == 0x3C && got[length - 1] == 0x3C) {
            atomic_fetch_add(&all->refused, 1);
        } else {
            atomic_fetch_add(&all->wrong, 1);
        }
    }
    return NULL;
}

static void test_install_remove(void)
{
    for (int model = 0; model < 2; model++) {
        shared all = {0};
        worker workers[4];
        all.engine = fixture_engine(2 * PAGE, 0, CSVF_STANDARD_GB, model, 1);
        test_fill(fixed, sizeof fixed, 12);
        memcpy(csvf_engine_dram(all.engine), fixed, sizeof fixed);
        fixture_cipher(under_first, fixed, sizeof fixed, 1, 0, CSVF_STANDARD_GB, model, 1);
        fixture_cipher(under_second, fixed, sizeof fixed, 2, 0, CSVF_STANDARD_GB, model, 1);
        run_threads(&all, workers, 4, key_user);
        CHECK(all.wrong == 0);
        CHECK(all.seen_first > 0 && all.seen_second > 0);
        csvf_stats stats = {.struct_size = sizeof stats};
        CHECK(csvf_engine_stats(all.engine, &stats) == CSVF_OK && stats.keys_installed == CHANGES && stats.keys_removed == CHANGES &&
              stats.asids_active == 0);
        csvf_engine_destroy(all.engine);
    }
}

/* Threads that race to install: exactly one wins; to remove: exactly one wins. */
static void *racer(void *argument)
{
    worker *w = argument;
    shared *all = w->shared;
    uint8_t key[32];
    fixture_key(key, w->number);
    for (int i = 0; i < 200; i++) {
        pthread_barrier_wait(&all->start);
        const int installed = csvf_asid_install(all->engine, 7, key, 32);
        if (installed == CSVF_OK)
            atomic_fetch_add(&all->seen_first, 1);
        else if (installed != CSVF_ERR_BUSY)
            atomic_fetch_add(&all->wrong, 1);
        pthread_barrier_wait(&all->start);
        const int removed = csvf_asid_remove(all->engine, 7);
        if (removed == CSVF_OK)
            atomic_fetch_add(&all->seen_second, 1);
        else if (removed != CSVF_ERR_ASID)
            atomic_fetch_add(&all->wrong, 1);
    }
    return NULL;
}

static void test_races(void)
{
    shared all = {0};
    worker workers[4];
    all.engine = fixture_engine(PAGE, 0, CSVF_STANDARD_GB, CSVF_TWEAK_XTS, 1);
    run_threads(&all, workers, 4, racer);
    CHECK(all.wrong == 0 && all.seen_first == 200 && all.seen_second == 200);
    csvf_engine_destroy(all.engine);
}

int main(void)
{
    RUN(test_own_regions);
    RUN(test_interleaved_bytes);
    RUN(test_neighbouring_spans);
    RUN(test_install_remove);
    RUN(test_races);
    return test_report();
}
