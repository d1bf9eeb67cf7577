/* csvfast-bench: cycles per byte of everything the C library does, for every kernel this CPU can run.
 *
 *   csvfast-bench [--json] [--filter NAME] [--kernel NAME] [--threads N] [--time S] [--runs N] [--quick] [--ieee]
 *
 * One thread is timed by thread CPU time, so that a neighbour on the core does not distort the result; several by the wall clock. The
 * clock frequency is measured before and after each run by a chain of dependent additions; cycles are time x their mean. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "bench.h"

bench_options bench_settings = {.seconds = 0.05, .runs = 5, .threads = 1, .big = (size_t)64 << 20};
static int results_printed;

static double now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

double bench_clock(void)
{
#if defined(__x86_64__)
    enum { LOOPS = 20000, PER_LOOP = 100 };
    uint64_t count = LOOPS, sum = 0;
    const double start = now(CLOCK_THREAD_CPUTIME_ID);
    /* add and lea alternate: some CPUs fuse or eliminate runs of equal immediate additions. */
    __asm__ volatile("1:\n\t.rept 50\n\tadd $1, %0\n\tlea 1(%0), %0\n\t.endr\n\tdec %1\n\tjnz 1b" : "+r"(sum), "+r"(count) : : "cc");
    return (double)LOOPS * PER_LOOP / (now(CLOCK_THREAD_CPUTIME_ID) - start);
#else
    return 0;
#endif
}

void bench_require(int ok, const char *what)
{
    if (ok)
        return;
    fprintf(stderr, "csvfast-bench: %s failed\n", what);
    exit(3);
}

uint8_t *bench_memory(size_t length)
{
    uint8_t *memory = NULL;
    bench_require(posix_memalign((void **)&memory, (size_t)2 << 20, length) == 0, "allocating memory");
    (void)madvise(memory, length, MADV_HUGEPAGE);
    uint64_t x = UINT64_C(88172645463325252);
    for (size_t i = 0; i < length; i++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        memory[i] = (uint8_t)x;
    }
    return memory;
}

int bench_wanted(const char *name) { return !bench_settings.filter || strstr(name, bench_settings.filter); }

static int compare(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static void print_text(const bench_case *c, double seconds, double cycles)
{
    char label[64], size[24];
    snprintf(label, sizeof label, "%s%s%s", c->name, *c->variant ? " " : "", c->variant);
    if (c->buffer >= (size_t)1 << 20)
        snprintf(size, sizeof size, "%zu MiB", c->buffer >> 20);
    else if (c->buffer >= 1024)
        snprintf(size, sizeof size, "%zu KiB", c->buffer >> 10);
    else if (c->buffer)
        snprintf(size, sizeof size, "%zu B", c->buffer);
    else
        snprintf(size, sizeof size, "-");
    printf("%-38s %-14s %8s t=%u ", label, c->peer ? c->peer : c->kernel, size, c->threads);
    if (c->operations && c->buffer)
        printf("%10.0f ns/op   %9.1f cycles/op %7.3f c/B\n", 1e9 * seconds / (double)c->operations,
               cycles / (double)c->operations, cycles / (double)c->buffer);
    else if (c->operations && c->reference_rate > 0)
        printf("%10.0f op/s    %9.0f cycles/op %7.2f x\n", (double)c->operations / seconds, cycles / (double)c->operations,
               (double)c->operations / seconds / c->reference_rate);
    else if (c->operations)
        printf("%10.0f op/s    %9.0f cycles/op\n", (double)c->operations / seconds, cycles / (double)c->operations);
    else
        printf("%10.3f GB/s    %9.3f c/B\n", (double)c->buffer / seconds / 1e9, cycles / (double)c->buffer);
}

static void print_json(const bench_case *c, double seconds, double cycles)
{
    printf("%s\n    {\"name\": \"%s\", \"variant\": \"%s\", \"kernel\": \"%s\", \"peer\": ", results_printed ? "," : "",
           c->name, c->variant, c->kernel);
    printf(c->peer ? "\"%s\"" : "null", c->peer);
    printf(", \"buffer\": %zu, \"threads\": %u", c->buffer, c->threads);
    if (c->buffer)
        printf(", \"bytes_per_second\": %.0f, \"cycles_per_byte\": %.4f", (double)c->buffer / seconds, cycles / (double)c->buffer);
    if (c->operations)
        printf(", \"ops_per_second\": %.0f, \"cycles_per_op\": %.1f", (double)c->operations / seconds,
               cycles / (double)c->operations);
    if (c->operations && c->reference_rate > 0)
        printf(", \"ratio_to_peer\": %.3f", (double)c->operations / seconds / c->reference_rate);
    printf("}");
}

double bench_measure(const bench_case *c)
{
    enum { RUNS_MAX = 101 };
    if (!bench_wanted(c->name))
        return 0;
    if (bench_settings.kernel && strcmp(c->kernel, "-") && strcmp(c->kernel, bench_settings.kernel))
        return 0;
    const clockid_t clock = c->threads > 1 ? CLOCK_MONOTONIC : CLOCK_THREAD_CPUTIME_ID;
    double seconds[RUNS_MAX], cycles[RUNS_MAX];
    const unsigned runs = bench_settings.runs < RUNS_MAX ? bench_settings.runs : RUNS_MAX;

    c->run(c->context);     /* warm: caches, page tables, first-use dispatch */
    double start = now(clock);
    c->run(c->context);
    double once = now(clock) - start;
    const size_t repeats = once > 0 ? (size_t)(bench_settings.seconds / once) + 1 : 1000;
    for (unsigned r = 0; r < runs; r++) {
        const double before = bench_clock();
        start = now(clock);
        for (size_t i = 0; i < repeats; i++)
            c->run(c->context);
        seconds[r] = (now(clock) - start) / (double)repeats;
        cycles[r] = seconds[r] * (before + bench_clock()) / 2;
    }
    qsort(seconds, runs, sizeof *seconds, compare);
    qsort(cycles, runs, sizeof *cycles, compare);
    (bench_settings.json ? print_json : print_text)(c, seconds[runs / 2], cycles[runs / 2]);
    results_printed++;
    fflush(stdout);
    return (double)(c->operations ? c->operations : c->buffer) / seconds[runs / 2];
}

/* ---- Program ---- */

static void print_cpu_model(void)
{
    char line[256];
    FILE *file = fopen("/proc/cpuinfo", "r");
    while (file && fgets(line, sizeof line, file))
        if (!strncmp(line, "model name", 10) && strchr(line, ':')) {
            line[strcspn(line, "\n")] = 0;
            for (const char *c = strchr(line, ':') + 2; *c; c++)
                if (*c != '"' && *c != '\\' && (unsigned char)*c >= 32)
                    putchar(*c);
            break;
        }
    if (file)
        fclose(file);
}

static void print_machine(void)
{
    const int json = bench_settings.json;
    printf(json ? "{\"machine\": {\"cpu\": \"" : "cpu: ");
    print_cpu_model();
    printf(json ? "\", \"features\": \"%s\", \"clock_hz\": %.0f, \"csvfast\": \"%s\", \"compiler\": \"%s\"},\n \"results\": ["
                : "\nfeatures: %s\nclock: %.0f Hz (measured)\ncsvfast %s, compiled by %s\n",
           csvf_cpu_features(), bench_clock(), csvf_version(), __VERSION__);
}

static int usage(void)
{
    fputs("usage: csvfast-bench [--json] [--filter NAME] [--kernel NAME] [--threads N] [--time SECONDS] [--runs N] [--quick] "
          "[--ieee]\n", stderr);
    return 2;
}

static int read_number(const char *text, double low, double high, double *value)
{
    char *end;
    errno = 0;
    *value = strtod(text, &end);
    return !errno && end != text && !*end && *value >= low && *value <= high;
}

int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        const char *option = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        double number;
        if (!strcmp(option, "--json"))
            bench_settings.json = 1;
        else if (!strcmp(option, "--ieee"))
            bench_settings.ieee = 1;
        else if (!strcmp(option, "--quick"))
            bench_settings.seconds = 0.01, bench_settings.runs = 3;
        else if (!value)
            return usage();
        else if (i++, !strcmp(option, "--filter"))
            bench_settings.filter = value;
        else if (!strcmp(option, "--kernel"))
            bench_settings.kernel = value;
        else if (!strcmp(option, "--threads") && read_number(value, 1, 64, &number))
            bench_settings.threads = (unsigned)number;
        else if (!strcmp(option, "--time") && read_number(value, 0.0001, 60, &number))
            bench_settings.seconds = number;
        else if (!strcmp(option, "--runs") && read_number(value, 1, 101, &number))
            bench_settings.runs = (unsigned)number;
        else
            return usage();
    }
    if (csvf_init() != CSVF_OK) {
        fprintf(stderr, "csvfast-bench: CSVFAST_KERNEL or CSVFAST_DISABLE: %s\n", csvf_status_text(CSVF_ERR_KERNEL));
        return 3;
    }
    print_machine();
    bench_own_cases();
    bench_peer_cases();
    bench_sm2_cases();
    bench_cache_cases();
    if (bench_settings.json)
        printf("\n]}\n");
    if (!results_printed) {
        fputs("csvfast-bench: nothing matches\n", stderr);
        return 2;
    }
    return 0;
}
