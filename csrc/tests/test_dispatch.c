/* Kernel choice: environment, forcing, features, first use by many threads. The choice is made once per process, so every
 * case that needs an environment of its own runs in a forked child; the parent stays uninitialised until the last one is done. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../cpu.h"
#include "../include/csvfast.h"
#include "../sm3/sm3_kernel.h"
#include "../sm4/sm4_xts.h"
#include "test.h"

static int all_portable(void)
{
    for (int i = 0; i < CSVF_PRIMITIVE_COUNT; i++)
        if (strcmp(csvf_kernel_name(i), "portable"))
            return 0;
    return 1;
}

/* The most preferred kernel that is available. */
static const char *expected_default(int primitive)
{
    for (size_t i = 0; i < csvf_kernel_count(primitive); i++)
        if (csvf_kernel_available(primitive, csvf_kernel_at(primitive, i)))
            return csvf_kernel_at(primitive, i);
    return NULL;
}

/* Runs `question` in a child under this environment and returns its answer. */
static int ask(const char *kernel, const char *disable, int (*question)(void))
{
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        if (kernel) setenv("CSVFAST_KERNEL", kernel, 1); else unsetenv("CSVFAST_KERNEL");
        if (disable) setenv("CSVFAST_DISABLE", disable, 1); else unsetenv("CSVFAST_DISABLE");
        _exit(question());
    }
    int status = 0;
    return child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static int answers_default(void)
{
    if (csvf_init() != CSVF_OK)
        return 0;
    for (int i = 0; i < CSVF_PRIMITIVE_COUNT; i++)
        if (strcmp(csvf_kernel_name(i), expected_default(i)))
            return 0;
    return 1;
}

static int answers_default_without_init(void)
{
    for (int i = 0; i < CSVF_PRIMITIVE_COUNT; i++)
        if (strcmp(csvf_kernel_name(i), expected_default(i)))
            return 0;
    return csvf_init() == CSVF_OK;
}

/* Forcing as the very first call: the choice made by csvf_init must not come after it and undo it. */
static int answers_forced_first(void)
{
    return csvf_force_kernel(CSVF_PRIMITIVE_SM4, "portable") == CSVF_OK && csvf_init() == CSVF_OK &&
           !strcmp(csvf_kernel_name(CSVF_PRIMITIVE_SM4), "portable") &&
           !strcmp(csvf_kernel_name(CSVF_PRIMITIVE_SM3), expected_default(CSVF_PRIMITIVE_SM3));
}

static int answers_portable(void) { return csvf_init() == CSVF_OK && all_portable(); }
static int answers_error(void) { return csvf_init() == CSVF_ERR_KERNEL && all_portable() && csvf_init() == CSVF_ERR_KERNEL; }

static int answers_only_sm4_sm3(void)
{
    return csvf_init() == CSVF_OK && !strcmp(csvf_kernel_name(CSVF_PRIMITIVE_SM4), "portable") &&
           !strcmp(csvf_kernel_name(CSVF_PRIMITIVE_SM3), "portable") &&
           !strcmp(csvf_kernel_name(CSVF_PRIMITIVE_SM3_MANY), expected_default(CSVF_PRIMITIVE_SM3_MANY)) &&
           !strcmp(csvf_kernel_name(CSVF_PRIMITIVE_GHASH), expected_default(CSVF_PRIMITIVE_GHASH));
}

static int answers_no_features(void)
{
    if (csvf_init() != CSVF_OK || *csvf_cpu_features() || csvf__cpu() || !all_portable())
        return 0;
    for (int i = 0; i < CSVF_PRIMITIVE_COUNT; i++)
        for (size_t k = 0; k < csvf_kernel_count(i); k++) {
            const char *name = csvf_kernel_at(i, k);
            const int is_portable = !strcmp(name, "portable");
            if (csvf_kernel_available(i, name) != is_portable ||
                (csvf_force_kernel(i, name) == CSVF_OK) != is_portable || strcmp(csvf_kernel_name(i), "portable"))
                return 0;
        }
    return 1;
}

static int answers_no_avx512(void)
{
    if (csvf_init() != CSVF_OK || strstr(csvf_cpu_features(), "avx512") || strstr(csvf_cpu_features(), "ifma"))
        return 0;
    for (int i = 0; i < CSVF_PRIMITIVE_COUNT; i++)
        if (strstr(csvf_kernel_name(i), "avx512"))
            return 0;
    return 1;
}

static void test_environment(void)
{
    CHECK(ask(NULL, NULL, answers_default) == 1);
    CHECK(ask("", "", answers_default) == 1);
    CHECK(ask(NULL, NULL, answers_default_without_init) == 1);
    CHECK(ask(NULL, NULL, answers_forced_first) == 1);
    CHECK(ask("portable", NULL, answers_portable) == 1);
    CHECK(ask("sm4=portable,sm3=portable,sm3-many=portable,ghash=portable,sm2=portable,sm2-many=portable", NULL, answers_portable) == 1);
    CHECK(ask("sm4=portable,sm3=portable", NULL, answers_only_sm4_sm3) == 1);
    static const char *const bad[] = {"nosuch", "portabl", "portable ", "Portable", "portable,", "sm4", "sm4=", "=portable",
                                      "sm9=portable", "sm4=portable,bogus", "sm4=portable,sm3=nosuch", "sm4=portable=",
                                      "sm4 =portable", "sm4=portable;sm3=portable"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        CHECK(ask(bad[i], NULL, answers_error) == 1);
}

static void test_disable(void)
{
    CHECK(ask(NULL, "avx512,ifma,gfni,vaes,aes,avx2,bmi2,adx,pclmul,sha", answers_no_features) == 1);
    CHECK(ask(NULL, "avx512", answers_no_avx512) == 1);
    CHECK(ask(NULL, "avx2", answers_no_avx512) == 1);     /* nothing wider without AVX2 */
    CHECK(ask(NULL, "nosuch", answers_error) == 1);
    CHECK(ask(NULL, "avx512,avx", answers_error) == 1);
    CHECK(ask("portable", "avx5", answers_error) == 1);
    /* A kernel that exists but that this CPU (here: the disabled one) cannot run is refused, never replaced. */
    for (size_t i = 0; i < csvf_kernel_count(CSVF_PRIMITIVE_SM4); i++)
        if (strcmp(csvf_kernel_at(CSVF_PRIMITIVE_SM4, i), "portable"))
            CHECK(ask(csvf_kernel_at(CSVF_PRIMITIVE_SM4, i), "avx2", answers_error) == 1);
}

/* ---- In one process ---- */

enum { THREADS = 8 };
static pthread_barrier_t barrier;
static const void *first_seen[THREADS];

static void *first_use(void *argument)
{
    pthread_barrier_wait(&barrier);
    *(const void **)argument = csvf__sm4();
    return NULL;
}

static int first_use_race(void)
{
    pthread_t threads[THREADS];
    pthread_barrier_init(&barrier, NULL, THREADS);
    for (int i = 0; i < THREADS; i++)
        pthread_create(&threads[i], NULL, first_use, &first_seen[i]);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < THREADS; i++)
        if (!first_seen[i] || first_seen[i] != first_seen[0])
            return 0;
    return 1;
}

static void test_first_use(void)
{
    for (int i = 0; i < 20; i++)
        CHECK(ask(NULL, NULL, first_use_race) == 1);
}

static int has_word(const char *words, const char *word)
{
    const size_t length = strlen(word);
    for (const char *at = words; (at = strstr(at, word)); at += length)
        if ((at == words || at[-1] == ' ' || at[-1] == '\t') && (at[length] == ' ' || at[length] == 0 || at[length] == '\n'))
            return 1;
    return 0;
}

/* The kernel's own list of CPU flags is an independent witness. */
static void test_features(void)
{
    CHECK(csvf_cpu_features() != NULL && !has_word(csvf_cpu_features(), "nosuch"));
    static char line[16384];
    FILE *file = fopen("/proc/cpuinfo", "r");
    int found = 0;
    while (file && !found && fgets(line, sizeof line, file))
        found = !strncmp(line, "flags", 5);
    if (file)
        fclose(file);
#if !defined(__x86_64__)
    CHECK(csvf_cpu_features()[0] == 0);     /* no feature here matters to a kernel; under user-mode emulation the file shows the host's */
    return;
#endif
    if (!found || getenv("CSVFAST_DISABLE"))
        return;
    const char *ours = csvf_cpu_features();
    const int avx2 = has_word(line, "avx2");
    CHECK(has_word(ours, "aes") == has_word(line, "aes"));
    CHECK(has_word(ours, "pclmul") == has_word(line, "pclmulqdq"));
    CHECK(has_word(ours, "avx2") == avx2);
    CHECK(has_word(ours, "bmi2") == has_word(line, "bmi2"));
    CHECK(has_word(ours, "adx") == has_word(line, "adx"));
    CHECK(has_word(ours, "sha") == has_word(line, "sha_ni"));
    CHECK(has_word(ours, "ifma") == (has_word(ours, "avx512") && has_word(line, "avx512ifma")));
    CHECK(has_word(ours, "gfni") == (avx2 && has_word(line, "gfni")));
    CHECK(has_word(ours, "vaes") == (avx2 && has_word(line, "vaes")));
    CHECK(has_word(ours, "avx512") == (avx2 && has_word(line, "avx512f") && has_word(line, "avx512bw") &&
                                       has_word(line, "avx512dq") && has_word(line, "avx512vl") && has_word(line, "avx512vbmi")));
}

static void test_lists(void)
{
    static const char *const names[] = {"sm4", "sm3", "sm3-many", "ghash", "sm2", "sm2-many"};
    for (int i = 0; i < CSVF_PRIMITIVE_COUNT; i++) {
        CHECK(!strcmp(csvf_primitive_name(i), names[i]));
        const size_t count = csvf_kernel_count(i);
        CHECK(count >= 1);
        CHECK(!strcmp(csvf_kernel_at(i, count - 1), "portable"));     /* always there, last */
        CHECK(csvf_kernel_at(i, count) == NULL && csvf_kernel_at(i, (size_t)-1) == NULL);
        for (size_t a = 0; a < count; a++)
            for (size_t b = 0; b < a; b++)
                CHECK(strcmp(csvf_kernel_at(i, a), csvf_kernel_at(i, b)));
        CHECK(!csvf_kernel_available(i, "nosuch") && !csvf_kernel_available(i, "") && !csvf_kernel_available(i, NULL));
    }
    const int bad[] = {-1, CSVF_PRIMITIVE_COUNT, 1 << 30};
    for (int i = 0; i < 3; i++)
        CHECK(!csvf_primitive_name(bad[i]) && !csvf_kernel_count(bad[i]) && !csvf_kernel_at(bad[i], 0) &&
              !csvf_kernel_name(bad[i]) && !csvf_kernel_available(bad[i], "portable") &&
              csvf_force_kernel(bad[i], "portable") == CSVF_ERR_ARGUMENT);
}

static void test_force(void)
{
    for (int i = 0; i < CSVF_PRIMITIVE_COUNT; i++) {
        const char *before = csvf_kernel_name(i);
        CHECK(csvf_force_kernel(i, "nosuch") == CSVF_ERR_KERNEL && !strcmp(csvf_kernel_name(i), before));
        for (size_t k = 0; k < csvf_kernel_count(i); k++)
            if (csvf_kernel_available(i, csvf_kernel_at(i, k))) {
                CHECK(csvf_force_kernel(i, csvf_kernel_at(i, k)) == CSVF_OK);
                CHECK(!strcmp(csvf_kernel_name(i), csvf_kernel_at(i, k)));
            }
        CHECK(csvf_force_kernel(i, NULL) == CSVF_OK && !strcmp(csvf_kernel_name(i), before));
    }
    /* A live object keeps its kernel. */
    csvf_xts xts;
    uint8_t key[32], data[64] = {0}, other[64] = {0};
    for (int i = 0; i < 32; i++)
        key[i] = (uint8_t)i;
    CHECK(csvf_force_kernel(CSVF_PRIMITIVE_SM4, "portable") == CSVF_OK);
    CHECK(csvf_xts_init(&xts, key, CSVF_STANDARD_GB) == CSVF_OK);
    CHECK(csvf_force_kernel(CSVF_PRIMITIVE_SM4, NULL) == CSVF_OK);
    CHECK(!strcmp(csvf__xts_of(&xts)->kernel->name, "portable"));
    CHECK(csvf_xts_encrypt(&xts, data, data, 64, 64, 9) == CSVF_OK);
    CHECK(csvf_xts_init(&xts, key, CSVF_STANDARD_GB) == CSVF_OK);
    CHECK(csvf_xts_encrypt(&xts, other, other, 64, 64, 9) == CSVF_OK);
    CHECK(!memcmp(data, other, 64));
}

static void test_utilities(void)
{
    CHECK(!strcmp(csvf_version(), CSVF_VERSION_STRING));
    for (int status = CSVF_OK; status >= CSVF_ERR_POINT; status--)
        for (int other = CSVF_OK; other > status; other--)
            CHECK(strcmp(csvf_status_text(status), csvf_status_text(other)));
    CHECK(csvf_status_text(1) && csvf_status_text(-1000) && !strcmp(csvf_status_text(1), csvf_status_text(-1000)));

    uint8_t a[67], b[67];
    for (size_t length = 0; length <= sizeof a; length++) {
        memset(a, 0x5A, sizeof a);
        memset(b, 0x5A, sizeof b);
        CHECK(csvf_equal(a, b, length));
        for (size_t i = 0; i < length; i++) {
            b[i] ^= (uint8_t)(1 << i % 8);
            CHECK(!csvf_equal(a, b, length));
            b[i] ^= (uint8_t)(1 << i % 8);
        }
        csvf_wipe(a, length);
        int is_right = 1;
        for (size_t i = 0; i < sizeof a; i++)
            is_right &= a[i] == (i < length ? 0 : 0x5A);
        CHECK(is_right);
    }
    csvf_wipe(NULL, 0);
}

int main(void)
{
    RUN(test_first_use);
    RUN(test_environment);
    RUN(test_disable);
    RUN(test_features);
    RUN(test_lists);
    RUN(test_force);
    RUN(test_utilities);
    return test_report();
}
