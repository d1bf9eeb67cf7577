/* A C test harness in one header: named tests, checks that print what differed, buffers between guard pages, hex.
 *
 *     static void adds(void) { CHECK(1 + 1 == 2); }
 *     int main(void) { RUN(adds); return test_report(); }
 *
 * A failed check prints the place and goes on; the test counts as failed. The last line is "N passed, N failed" and the exit code is 1 when any
 * failed. test_case(...) names what a loop is at, so that a failure inside says for which kernel and length. */
#ifndef CSVF_TESTS_TEST_H
#define CSVF_TESTS_TEST_H

#if !defined(_GNU_SOURCE)
#  define _GNU_SOURCE 1   /* MAP_ANONYMOUS under -std=c11 */
#endif

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define TEST_UNUSED __attribute__((unused))

static unsigned test_passed_, test_failed_, test_errors_, test_checks_;
static char test_case_[200];

/* Says what the checks that follow are about. */
static TEST_UNUSED __attribute__((format(printf, 1, 2))) void test_case(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(test_case_, sizeof test_case_, format, arguments);
    va_end(arguments);
}

static TEST_UNUSED void test_fail_(const char *file, int line, const char *what)
{
    /* a broken kernel fails thousands of checks; the first ones tell enough */
    if (test_errors_++ < 10)
        printf("    %s:%d: %s%s%s\n", file, line, what, test_case_[0] ? "   in case: " : "", test_case_);
}

#define CHECK(condition) (test_checks_++, (condition) ? (void)0 : test_fail_(__FILE__, __LINE__, #condition))

static TEST_UNUSED void test_bytes_(const char *file, int line, const char *what, const void *got, const void *want, size_t length)
{
    const uint8_t *a = got, *b = want;
    char text[400];
    test_checks_++;
    for (size_t i = 0; i < length; i++)
        if (a[i] != b[i]) {
            snprintf(text, sizeof text, "%s: byte %zu of %zu is %02x, expected %02x", what, i, length, a[i], b[i]);
            test_fail_(file, line, text);
            return;
        }
}

/* length bytes of `got` and `want` are the same. */
#define CHECK_BYTES(got, want, length) test_bytes_(__FILE__, __LINE__, #got " == " #want, got, want, length)

static TEST_UNUSED void test_status_(const char *file, int line, const char *what, int got, int want)
{
    char text[400];
    test_checks_++;
    if (got != want) {
        snprintf(text, sizeof text, "%s returned %d, expected %d", what, got, want);
        test_fail_(file, line, text);
    }
}

/* A call returns this status. */
#define CHECK_STATUS(call, status) test_status_(__FILE__, __LINE__, #call, call, status)

static TEST_UNUSED void test_run_(const char *name, void (*test)(void))
{
    const unsigned checks = test_checks_;
    test_errors_ = 0;
    test_case_[0] = 0;
    test();
    if (test_checks_ == checks) {
        test_case_[0] = 0;
        test_fail_(name, 0, "the test checked nothing");
    }
    if (test_errors_ > 10)
        printf("    ... %u failed checks in all\n", test_errors_);
    printf("%s %s (%u checks)\n", test_errors_ ? "FAILED" : "ok    ", name, test_checks_ - checks);
    fflush(stdout);
    if (test_errors_)
        test_failed_++;
    else
        test_passed_++;
}

#define RUN(test) test_run_(#test, test)

/* Prints the last line; the value is main's. */
static TEST_UNUSED int test_report(void)
{
    printf("%u passed, %u failed\n", test_passed_, test_failed_);
    return test_failed_ != 0 || test_passed_ == 0;
}

/* ---- Buffers between guard pages ---------------------------------------------------------------------------------- */

/* Memory with an unreadable page on either side. `first` is its first byte, `end` one past its last. */
typedef struct test_guarded {
    uint8_t *map, *first, *end;
    size_t map_size;
} test_guarded;

/* At least `size` bytes; aborts when the system refuses. */
static TEST_UNUSED test_guarded test_guard(size_t size)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), inner = (size + page) / page * page;
    test_guarded g;
    g.map_size = inner + 2 * page;
    g.map = mmap(NULL, g.map_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (g.map == MAP_FAILED || mprotect(g.map + page, inner, PROT_READ | PROT_WRITE)) {
        perror("guard pages");
        abort();
    }
    g.first = g.map + page;
    g.end = g.first + inner;
    return g;
}

static TEST_UNUSED void test_unguard(test_guarded g) { munmap(g.map, g.map_size); }

/* ---- Data --------------------------------------------------------------------------------------------------------- */

/* Bytes of a hex string, spaces ignored; returns their number. Aborts on bad hex: a wrong vector must not pass for a short one. */
static TEST_UNUSED size_t test_hex(uint8_t *out, size_t room, const char *hex)
{
    size_t digits = 0;
    for (; *hex; hex++) {
        unsigned value;
        if (*hex == ' ')
            continue;
        if (*hex >= '0' && *hex <= '9')
            value = (unsigned)(*hex - '0');
        else if (*hex >= 'a' && *hex <= 'f')
            value = (unsigned)(*hex - 'a') + 10;
        else if (*hex >= 'A' && *hex <= 'F')
            value = (unsigned)(*hex - 'A') + 10;
        else
            value = 16;
        if (value == 16 || digits / 2 == room) {
            fprintf(stderr, "bad hex or too long: %s\n", hex);
            abort();
        }
        if (digits % 2 == 0)
            out[digits / 2] = (uint8_t)(value << 4);
        else
            out[digits / 2] |= (uint8_t)value;
        digits++;
    }
    if (digits % 2) {
        fprintf(stderr, "odd number of hex digits\n");
        abort();
    }
    return digits / 2;
}

/* Reproducible noise (splitmix64). */
static TEST_UNUSED uint64_t test_random(uint64_t *state)
{
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

static TEST_UNUSED void test_fill(void *out, size_t length, uint64_t seed)
{
    uint8_t *p = out;
    for (size_t i = 0; i < length; i++)
        p[i] = (uint8_t)(test_random(&seed) >> 24);
}

#endif
