/* Worker threads: same bytes as without them, refusals before anything is written, shared use, fork. */
#define _GNU_SOURCE
#include "engine_fixture.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include "../pool.h"

enum { MIB = 1 << 20, LENGTH = 3 * MIB + 4096 + 48 };

static uint8_t plain[LENGTH], expected[LENGTH], got[LENGTH];

static csvf_xts make_key(void)
{
    csvf_xts xts;
    uint8_t key[32];
    fixture_key(key, 1);
    CHECK_STATUS(csvf_xts_init(&xts, key, CSVF_STANDARD_GB), CSVF_OK);
    return xts;
}

static csvf_pool *make_pool(uint32_t threads)
{
    csvf_pool *pool = NULL;
    CHECK_STATUS(csvf_pool_create(&pool, threads), CSVF_OK);
    return pool;
}

static void test_xts(void)
{
    const csvf_xts xts = make_key();
    static const size_t units[] = {16, 17, 512, 520, 4096, 4100, 65536, MIB, MIB + 1, 16 * MIB};
    static const size_t lengths[] = {0, 16, 4096, 2 * MIB, 3 * MIB + 16, LENGTH - 17, LENGTH};
    test_fill(plain, LENGTH, 1);
    for (uint32_t threads = 1; threads <= 4; threads++) {
        csvf_pool *pool = make_pool(threads);
        for (size_t u = 0; u < sizeof units / sizeof units[0]; u++)
            for (size_t l = 0; l < sizeof lengths / sizeof lengths[0]; l++) {
                const size_t length = lengths[l];
                test_case("threads %u unit %zu length %zu", threads, units[u], length);
                const int status = csvf_xts_encrypt(&xts, expected, plain, length, units[u], 5);
                memset(got, 0xAA, LENGTH);
                CHECK_STATUS(csvf_pool_xts_encrypt(pool, &xts, got, plain, length, units[u], 5), status);
                if (status != CSVF_OK)
                    continue;
                CHECK_BYTES(got, expected, length);
                CHECK(length == LENGTH || got[length] == 0xAA);
                CHECK_STATUS(csvf_pool_xts_decrypt(pool, &xts, got, got, length, units[u], 5), CSVF_OK);
                CHECK_BYTES(got, plain, length);
            }
        csvf_pool_destroy(pool);
    }
    CHECK_STATUS(csvf_pool_xts_encrypt(NULL, &xts, got, plain, LENGTH, 4096, 5), CSVF_OK);
    CHECK_STATUS(csvf_xts_encrypt(&xts, expected, plain, LENGTH, 4096, 5), CSVF_OK);
    CHECK_BYTES(got, expected, LENGTH);
}

static void test_blocks(void)
{
    static uint8_t many[32 * (LENGTH / 64)], few[32 * (LENGTH / 64)];
    static const size_t blocks[] = {64, 512, 4096, 5000, MIB};
    uint8_t salt[256];
    test_fill(salt, sizeof salt, 3);
    test_fill(plain, LENGTH, 2);
    csvf_pool *pool = make_pool(3);
    for (size_t b = 0; b < sizeof blocks / sizeof blocks[0]; b++)
        for (size_t prefix = 0; prefix <= 256; prefix += 64) {
            const size_t count = LENGTH / blocks[b];
            test_case("block %zu prefix %zu", blocks[b], prefix);
            CHECK_STATUS(csvf_sm3_blocks(few, salt, prefix, plain, blocks[b], count), CSVF_OK);
            memset(many, 0, sizeof many);
            CHECK_STATUS(csvf_pool_sm3_blocks(pool, many, salt, prefix, plain, blocks[b], count), CSVF_OK);
            CHECK_BYTES(many, few, 32 * count);
        }
    CHECK_STATUS(csvf_pool_sm3_blocks(pool, NULL, salt, 0, plain, 4096, 700), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_pool_sm3_blocks(pool, many, NULL, 8, plain, 4096, 700), CSVF_ERR_ARGUMENT);
    CHECK(csvf_pool_sm3_blocks(pool, many, salt, 257, plain, 4096, 700) != CSVF_OK);
    CHECK(csvf_pool_sm3_blocks(pool, many, salt, 0, plain, 0, 700) != CSVF_OK);
    csvf_pool_destroy(pool);
}

/* A piece that sees only its part must not hide what is wrong with the whole. */
static void test_refusals(void)
{
    const csvf_xts xts = make_key();
    csvf_pool *pool = make_pool(2), *none = pool;
    test_fill(got, LENGTH, 4);
    memcpy(expected, got, LENGTH);
    for (size_t shift = 1; shift < 2 * MIB; shift = shift * 3 + 1) {
        test_case("shift %zu", shift);
        CHECK_STATUS(csvf_pool_xts_encrypt(pool, &xts, got + shift, got, LENGTH - shift > 2 * MIB + 16 ? 2 * MIB + 16 : MIB, 4096, 0), CSVF_ERR_OVERLAP);
        CHECK_STATUS(csvf_pool_xts_decrypt(pool, &xts, got, got + shift, LENGTH - shift > 2 * MIB + 16 ? 2 * MIB + 16 : MIB, 4096, 0), CSVF_ERR_OVERLAP);
    }
    CHECK_STATUS(csvf_pool_xts_encrypt(pool, &xts, got, plain, 2 * MIB, 4096, UINT64_MAX - 100), CSVF_ERR_RANGE);
    CHECK_STATUS(csvf_pool_xts_encrypt(pool, &xts, got, plain, 2 * MIB + 15, 4096, 0), CSVF_ERR_LENGTH);
    CHECK_STATUS(csvf_pool_xts_encrypt(pool, &xts, got, plain, 2 * MIB, 15, 0), CSVF_ERR_LENGTH);
    CHECK_STATUS(csvf_pool_xts_encrypt(pool, &xts, got, plain, 2 * MIB, CSVF_XTS_UNIT_MAX + 1, 0), CSVF_ERR_LENGTH);
    CHECK_STATUS(csvf_pool_xts_encrypt(pool, NULL, got, plain, 2 * MIB, 4096, 0), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_pool_xts_encrypt(pool, &xts, NULL, plain, 2 * MIB, 4096, 0), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_pool_xts_encrypt(pool, &xts, got, NULL, 2 * MIB, 4096, 0), CSVF_ERR_ARGUMENT);
    CHECK_BYTES(got, expected, LENGTH);
    CHECK_STATUS(csvf_pool_create(&none, 0), CSVF_ERR_ARGUMENT);
    CHECK(none == NULL);
    CHECK_STATUS(csvf_pool_create(&none, 1u << 30), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_pool_create(NULL, 2), CSVF_ERR_ARGUMENT);
    csvf_pool_destroy(NULL);
    csvf_pool_destroy(pool);
}

/* ---- The pool itself ---- */

static atomic_uint touched[1000];
static atomic_int bad_ranges;

static int touch(void *context, size_t begin, size_t end)
{
    const size_t *grain = context;
    if (begin >= end || end - begin > *grain)
        atomic_fetch_add(&bad_ranges, 1);
    for (size_t i = begin; i < end; i++)
        atomic_fetch_add(&touched[i], 1);
    return begin <= 500 && 500 < end ? -77 : CSVF_OK;
}

static void test_every_item_once(void)
{
    csvf_pool *pool = make_pool(4);
    unsigned runs = 0;
    for (size_t count = 0; count <= 1000; count = count * 2 + 1)
        for (size_t grain = 1; grain < 70; grain = grain * 3) {
            test_case("count %zu grain %zu", count, grain);
            memset(touched, 0, sizeof touched);
            CHECK_STATUS(csvf__pool_run(pool, touch, &grain, count, grain), count > 500 ? -77 : CSVF_OK);
            int once = 1;
            for (size_t i = 0; i < 1000; i++)
                once &= touched[i] == (i < count);      /* a failed piece does not stop the others */
            CHECK(once);
            runs++;
        }
    CHECK(bad_ranges == 0 && runs > 20);
    csvf_pool_destroy(pool);
    for (int i = 0; i < 50; i++)    /* ends while workers are still starting */
        csvf_pool_destroy(make_pool(1 + (uint32_t)i % 4));
}

typedef struct caller {
    csvf_pool *pool;
    const csvf_xts *xts;
    uint8_t *data;
    int ok;
} caller;

static void *call_pool(void *argument)
{
    caller *c = argument;
    c->ok = 1;
    for (int i = 0; i < 6; i++) {
        c->ok &= csvf_pool_xts_encrypt(c->pool, c->xts, c->data, c->data, MIB, 4096, 5) == CSVF_OK;
        c->ok &= !memcmp(c->data, expected, MIB);
        c->ok &= csvf_pool_xts_decrypt(c->pool, c->xts, c->data, c->data, MIB, 4096, 5) == CSVF_OK;
        c->ok &= !memcmp(c->data, plain, MIB);
    }
    return NULL;
}

static void test_shared(void)
{
    const csvf_xts xts = make_key();
    csvf_pool *pool = make_pool(3);
    pthread_t threads[3];
    caller callers[3];
    test_fill(plain, MIB, 9);
    CHECK_STATUS(csvf_xts_encrypt(&xts, expected, plain, MIB, 4096, 5), CSVF_OK);
    for (int i = 0; i < 3; i++) {
        callers[i] = (caller){pool, &xts, malloc(MIB), 0};
        memcpy(callers[i].data, plain, MIB);
        CHECK(pthread_create(&threads[i], NULL, call_pool, &callers[i]) == 0);
    }
    for (int i = 0; i < 3; i++) {
        pthread_join(threads[i], NULL);
        CHECK(callers[i].ok);
        free(callers[i].data);
    }
    csvf_pool_destroy(pool);
}

/* A forked child has no workers: it must still do the work, and be able to destroy both. The alarm turns a hang into a failure. */
static void test_fork(void)
{
    const csvf_xts xts = make_key();
    csvf_pool *pool = make_pool(3);
    csvf_engine *engine = fixture_engine(2 * MIB, 0, CSVF_STANDARD_GB, CSVF_TWEAK_XTS, 3);
    fixture_install(engine, 1);
    test_fill(plain, 2 * MIB, 6);
    CHECK_STATUS(csvf_xts_encrypt(&xts, expected, plain, 2 * MIB, 4096, 0), CSVF_OK);
    CHECK_STATUS(csvf_pool_xts_encrypt(pool, &xts, got, plain, 2 * MIB, 4096, 0), CSVF_OK);
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        alarm(60);
        memset(got, 0, 2 * MIB);
        int ok = csvf_pool_xts_encrypt(pool, &xts, got, plain, 2 * MIB, 4096, 0) == CSVF_OK && !memcmp(got, expected, 2 * MIB);
        ok &= csvf_write(engine, 1, 0, plain, 2 * MIB) == CSVF_OK && !memcmp(csvf_engine_dram(engine), expected, 2 * MIB);
        ok &= csvf_asid_remove(engine, 1) == CSVF_OK;
        csvf_pool_destroy(pool);
        csvf_engine_destroy(engine);
        _exit(ok ? 0 : 1);
    }
    int status = -1;
    CHECK(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK_STATUS(csvf_write(engine, 1, 0, plain, 2 * MIB), CSVF_OK);    /* the parent is as before */
    CHECK_BYTES(csvf_engine_dram(engine), expected, 2 * MIB);
    csvf_pool_destroy(pool);
    csvf_engine_destroy(engine);
}

/* ---- Signals, failure ---- */

static atomic_int workers_seen, wrong_masks;
static pthread_t test_thread;

static int look_at_mask(void *context, size_t begin, size_t end)
{
    (void)context, (void)begin, (void)end;
    if (pthread_equal(pthread_self(), test_thread))
        return CSVF_OK;     /* leaves the workers time to come in */
    sigset_t mask;
    pthread_sigmask(SIG_SETMASK, NULL, &mask);
    if (sigismember(&mask, SIGBUS) || sigismember(&mask, SIGSEGV) || !sigismember(&mask, SIGINT) || !sigismember(&mask, SIGTERM) ||
        !sigismember(&mask, SIGALRM))
        atomic_fetch_add(&wrong_masks, 1);
    atomic_fetch_add(&workers_seen, 1);
    return CSVF_OK;
}

/* Signals of the process are for the program's own threads; a fault of a worker's own must reach the program's handler. */
static void test_signals(void)
{
    sigset_t before, after;
    pthread_sigmask(SIG_SETMASK, NULL, &before);
    csvf_pool *pool = make_pool(3);
    pthread_sigmask(SIG_SETMASK, NULL, &after);
    CHECK(sigismember(&before, SIGINT) == sigismember(&after, SIGINT) && !sigismember(&after, SIGBUS));
    test_thread = pthread_self();
    for (int i = 0; i < 2000 && workers_seen == 0; i++) {
        csvf__pool_begin_if_idle(pool, look_at_mask, NULL, 2, 1);
        usleep(1000);
        (void)csvf__pool_finish(pool);
    }
    CHECK(workers_seen > 0 && wrong_masks == 0);
    csvf_pool_destroy(pool);
}

/* Sanitizers need the address space; user-mode emulation of other CPUs does not keep the limit. */
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && !defined(__clang__)
/* Threads that cannot be had: nothing is left behind and errno tells. In a child, because the limit stays. */
static void test_no_threads(void)
{
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        alarm(60);
        const struct rlimit limit = {256 << 20, 256 << 20};     /* address space: for some stacks of 8 MiB, not for 1023 */
        csvf_pool *pool = (csvf_pool *)&limit;
        csvf_engine *engine = (csvf_engine *)&limit;
        const csvf_config config = {.struct_size = sizeof config, .threads = 1024};
        int ok = setrlimit(RLIMIT_AS, &limit) == 0;
        errno = 0;
        ok &= csvf_pool_create(&pool, 1024) == CSVF_ERR_SYSTEM && errno == EAGAIN && !pool;
        errno = 0;
        ok &= csvf_engine_create(&engine, 1 << 20, &config) == CSVF_ERR_SYSTEM && errno == EAGAIN && !engine;
        _exit(ok ? 0 : 1);
    }
    int status = -1;
    CHECK(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}
#define TEST_NO_THREADS 1
#endif

int main(void)
{
    RUN(test_xts);
    RUN(test_blocks);
    RUN(test_refusals);
    RUN(test_every_item_once);
    RUN(test_shared);
    RUN(test_fork);
    RUN(test_signals);
#if defined(TEST_NO_THREADS)
    RUN(test_no_threads);
#endif
    return test_report();
}
