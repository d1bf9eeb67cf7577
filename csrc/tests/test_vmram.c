/* Encrypted memory, alone in one process: content, window, DRAM, attacks on it, failures, fork and death. */
#include "test.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>

#include "../include/csvfast_vmram.h"

enum { PAGE = 4096 };

static const size_t mib = (size_t)1 << 20;

/* Found nowhere by chance. */
static const char pattern[17] = "KNOWN-PLAINTEXT!";

static int make_file(size_t size)
{
    const int fd = memfd_create("test-vmram", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)size)) {
        perror("memfd");
        abort();
    }
    return fd;
}

static void make_key(uint8_t key[32], unsigned seed) { test_fill(key, 32, 77 + seed); }

typedef struct told {
    _Atomic int count;
    int status;
    char text[300];
} told;

static void remember(void *context, int status, const char *text)
{
    told *t = context;
    t->status = status;
    snprintf(t->text, sizeof t->text, "%s", text);
    atomic_fetch_add(&t->count, 1);
}

static csvf_vmram *make_keyed(int fd, size_t size, size_t window, unsigned seed, told *t)
{
    uint8_t key[32];
    make_key(key, seed);
    const csvf_vmram_config config = {.struct_size = sizeof config, .window_size = window, .report = t ? remember : NULL, .report_context = t};
    csvf_vmram *vmram = NULL;
    CHECK_STATUS(csvf_vmram_create_with_key(&vmram, key, sizeof key, fd, 0, 0, size, &config), CSVF_OK);
    if (!vmram)
        abort();
    return vmram;
}

static csvf_vmram *make(int fd, size_t size, size_t window) { return make_keyed(fd, size, window, 0, NULL); }

static csvf_vmram_stats stats_of(csvf_vmram *vmram)
{
    csvf_vmram_stats stats = {.struct_size = sizeof stats};
    CHECK_STATUS(csvf_vmram_get_stats(vmram, &stats), CSVF_OK);
    return stats;
}

static void read_file(void *out, int fd, size_t length, size_t at)
{
    CHECK(pread(fd, out, length, (off_t)at) == (ssize_t)length);
}

static int holds_pattern(int fd, size_t size)
{
    static uint8_t buffer[1 << 20];
    for (size_t at = 0; at < size; at += sizeof buffer) {
        const ssize_t got = pread(fd, buffer, sizeof buffer, (off_t)at);
        if (got > 0 && memmem(buffer, (size_t)got, pattern, 16))
            return 1;
    }
    return 0;
}

/* ---- Refusals ---- */

static void refusals(void)
{
    const int fd = make_file(mib);
    uint8_t key[32];
    make_key(key, 0);
    csvf_vmram *vmram = (void *)key;
    csvf_vmram_config config = {.struct_size = sizeof config, .window_size = 0};
    CHECK_STATUS(csvf_vmram_create_with_key(&vmram, key, 32, fd, 0, 0, mib, &config), CSVF_ERR_LENGTH);  /* a window of nothing */
    CHECK(vmram == NULL);
    config.window_size = CSVF_VMRAM_WINDOW_MIN - PAGE;
    CHECK_STATUS(csvf_vmram_create_with_key(&vmram, key, 32, fd, 0, 0, mib, &config), CSVF_ERR_LENGTH);
    config.window_size = CSVF_VMRAM_WINDOW_MIN + 1;
    CHECK_STATUS(csvf_vmram_create_with_key(&vmram, key, 32, fd, 0, 0, mib, &config), CSVF_ERR_LENGTH);
    config.window_size = CSVF_VMRAM_WINDOW_MIN;
    CHECK_STATUS(csvf_vmram_create_with_key(&vmram, key, 32, fd, 0, 0, mib, NULL), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_vmram_create_with_key(NULL, key, 32, fd, 0, 0, mib, &config), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_vmram_create_with_key(&vmram, key, 31, fd, 0, 0, mib, &config), CSVF_ERR_LENGTH);
    CHECK_STATUS(csvf_vmram_create_with_key(&vmram, key, 32, fd, 0, 0, mib - 1, &config), CSVF_ERR_LENGTH);
    CHECK_STATUS(csvf_vmram_create_with_key(&vmram, key, 32, fd, 0, 0, mib + PAGE, &config), CSVF_ERR_LENGTH);  /* file too short */
    CHECK_STATUS(csvf_vmram_create_with_key(&vmram, key, 32, fd, PAGE, 0, mib, &config), CSVF_ERR_LENGTH);
    CHECK_STATUS(csvf_vmram_create_with_key(&vmram, key, 32, fd, 5, 0, mib, &config), CSVF_ERR_ALIGNMENT);
    CHECK_STATUS(csvf_vmram_create_with_key(&vmram, key, 32, -1, 0, 0, mib, &config), CSVF_ERR_SYSTEM);
    memcpy(key + 16, key, 16);
    CHECK_STATUS(csvf_vmram_create_with_key(&vmram, key, 32, fd, 0, 0, mib, &config), CSVF_ERR_KEY);
    config.threads = CSVF_VMRAM_THREADS_MAX + 1;
    make_key(key, 0);
    CHECK_STATUS(csvf_vmram_create_with_key(&vmram, key, 32, fd, 0, 0, mib, &config), CSVF_ERR_ARGUMENT);
    config.threads = 0;
    config.read_ahead = CSVF_VMRAM_READ_AHEAD_MAX + 1;
    CHECK_STATUS(csvf_vmram_create_with_key(&vmram, key, 32, fd, 0, 0, mib, &config), CSVF_ERR_ARGUMENT);
    config.read_ahead = 0;

    csvf_engine *engine;
    CHECK_STATUS(csvf_engine_create_file(&engine, fd, 0, mib, NULL), CSVF_OK);
    CHECK_STATUS(csvf_vmram_create(&vmram, engine, 3, fd, 0, 0, mib, &config), CSVF_ERR_ASID);
    CHECK_STATUS(csvf_vmram_create(&vmram, engine, 0, fd, 0, 0, mib, &config), CSVF_ERR_ASID);
    CHECK_STATUS(csvf_vmram_create(&vmram, engine, 3, fd, 0, PAGE, mib, &config), CSVF_ERR_RANGE);
    csvf_engine_destroy(engine);
    CHECK_STATUS(csvf_vmram_flush(NULL), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_vmram_discard(NULL, 0, 0), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_vmram_adopt(NULL, 0, 0), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_vmram_evict(NULL, 0, 0), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_vmram_snapshot(NULL, 0), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_vmram_restore(NULL, 0), CSVF_ERR_ARGUMENT);
    csvf_vmram_destroy(NULL);
    close(fd);
}

/* A process without privileges is told why, in words. */
static void forbidden(void)
{
    if (getuid() != 0) {
        const char *reason = "";
        const int status = csvf_vmram_probe(&reason);
        CHECK(status == CSVF_OK ? reason == NULL : reason && strlen(reason) > 20);
        return;
    }
    const pid_t child = fork();
    if (child == 0) {
        if (setgid(65534) || setuid(65534))
            _exit(9);
        const char *reason = NULL;
        const int status = csvf_vmram_probe(&reason);
        _exit(status == CSVF_OK ? reason != NULL : !(status == CSVF_ERR_SYSTEM && errno == EPERM && reason && strstr(reason, "vm.unprivileged_userfaultfd")));
    }
    int result;
    CHECK(waitpid(child, &result, 0) == child && WIFEXITED(result) && WEXITSTATUS(result) == 0);
}

/* ---- Content ---- */

/* Each thread owns every fourth page, so that neighbours in one batch belong to different threads. */
typedef struct worker {
    uint8_t *ram, *shadow;
    size_t pages;
    unsigned number, wrong;
} worker;

static void *work(void *context)
{
    worker *w = context;
    uint64_t state = 1000 + w->number;
    for (unsigned i = 0; i < 12000; i++) {
        const uint64_t random = test_random(&state);
        const size_t page = random % (w->pages / 4) * 4 + w->number, at = page * PAGE + (random >> 32) % (PAGE - 8);
        if (random >> 60 < 7) {
            memcpy(w->ram + at, &random, 8);
            memcpy(w->shadow + at, &random, 8);
        } else if (memcmp(w->ram + at, w->shadow + at, 8) != 0) {
            w->wrong++;
        }
    }
    return NULL;
}

static void shadow_copy(void)
{
    const size_t size = 8 * mib;
    for (unsigned share = 4; share <= 64; share *= 4) {
        test_case("window 1/%u", share);
        const int fd = make_file(size);
        csvf_vmram *vmram = make(fd, size, size / share);
        uint8_t *shadow = calloc(1, size), *ram = csvf_vmram_memory(vmram);
        worker workers[4];
        pthread_t threads[4];
        for (unsigned i = 0; i < 4; i++) {
            workers[i] = (worker){ram, shadow, size / PAGE, i, 0};
            CHECK(pthread_create(&threads[i], NULL, work, &workers[i]) == 0);
        }
        for (int i = 0; i < 20; i++) {
            CHECK_STATUS(csvf_vmram_flush(vmram), CSVF_OK);     /* beside them */
            CHECK(stats_of(vmram).resident <= size / share);
        }
        for (unsigned i = 0; i < 4; i++) {
            pthread_join(threads[i], NULL);
            CHECK(workers[i].wrong == 0);
        }
        CHECK_BYTES(ram, shadow, size);
        CHECK_STATUS(csvf_vmram_flush(vmram), CSVF_OK);
        const csvf_vmram_stats stats = stats_of(vmram);
        CHECK(stats.resident_peak <= size / share && stats.window_size == size / share && stats.evictions > 100 && stats.failure == CSVF_OK);

        /* What stands in the file is SM4-XTS of it, by the public calls; pages never written are holes. */
        uint8_t key[32], cipher[PAGE];
        csvf_xts xts;
        make_key(key, 0);
        CHECK_STATUS(csvf_xts_init(&xts, key, CSVF_STANDARD_GB), CSVF_OK);
        for (size_t page = 0; page < size / PAGE; page++) {
            uint8_t expected[PAGE] = {0};
            read_file(cipher, fd, PAGE, page * PAGE);
            int is_hole = 1;
            for (size_t i = 0; i < PAGE; i++)
                is_hole &= cipher[i] == 0;
            if (!is_hole)
                CHECK_STATUS(csvf_xts_encrypt(&xts, expected, shadow + page * PAGE, PAGE, PAGE, page), CSVF_OK);
            else
                memcpy(expected, shadow + page * PAGE, PAGE);   /* must be zeros */
            CHECK_BYTES(cipher, expected, PAGE);
        }
        csvf_vmram_destroy(vmram);
        free(shadow);
        close(fd);
    }
}

/* read(2) and write(2) fault inside the kernel. */
static void kernel_access(void)
{
    const size_t size = 2 * mib;
    const int fd = make_file(size), other = make_file(size);
    csvf_vmram *vmram = make(fd, size, CSVF_VMRAM_WINDOW_MIN);
    uint8_t *ram = csvf_vmram_memory(vmram), *content = malloc(size), *back = malloc(size);
    test_fill(content, size, 5);
    CHECK(pwrite(other, content, size, 0) == (ssize_t)size);
    CHECK(pread(other, ram, size, 0) == (ssize_t)size);
    CHECK_BYTES(ram, content, size);
    CHECK(pwrite(other, ram, size, 0) == (ssize_t)size);
    CHECK(pread(other, back, size, 0) == (ssize_t)size);
    CHECK_BYTES(back, content, size);
    CHECK(stats_of(vmram).resident_peak <= CSVF_VMRAM_WINDOW_MIN);
    csvf_vmram_destroy(vmram);
    free(content);
    free(back);
    close(fd);
    close(other);
}

/* ---- Window and DRAM ---- */

static void untouched(void)
{
    const size_t size = (size_t)4 << 30;
    const int fd = make_file(size);
    struct timespec start, end;
    clock_gettime(CLOCK_MONOTONIC, &start);
    csvf_vmram *vmram = make(fd, size, 16 * mib);
    clock_gettime(CLOCK_MONOTONIC, &end);
    /* Encrypting 4 GiB takes a second at best; making the memory, less than a millisecond where nothing else runs. */
    CHECK((end.tv_sec - start.tv_sec) + 1e-9 * (double)(end.tv_nsec - start.tv_nsec) < 0.25);
    const uint8_t *ram = csvf_vmram_memory(vmram);
    unsigned sum = 0;
    for (size_t at = 0; at < size; at += size / 8192)
        sum |= ram[at];
    CHECK(sum == 0);
    CHECK_STATUS(csvf_vmram_flush(vmram), CSVF_OK);
    struct stat about;
    CHECK(fstat(fd, &about) == 0 && about.st_blocks == 0);
    csvf_vmram_stats stats = stats_of(vmram);
    CHECK(stats.bytes_encrypted == 0 && stats.bytes_decrypted == 0 && stats.pages_zero >= 8192 && stats.evictions > 0);
    ((uint8_t *)csvf_vmram_memory(vmram))[size - 1] = 9;
    CHECK_STATUS(csvf_vmram_flush(vmram), CSVF_OK);
    CHECK(fstat(fd, &about) == 0 && about.st_blocks == 8);
    CHECK(ram[size - 1] == 9 && stats_of(vmram).bytes_encrypted == PAGE);
    csvf_vmram_destroy(vmram);
    close(fd);
}

/* First touches of memory that was never written, upwards and downwards: few faults; what nobody wrote to stays out of the DRAM. */
static void first_touches(void)
{
    const size_t size = 16 * mib, pages = size / PAGE, used = 601;
    const int fd = make_file(size);
    csvf_vmram *vmram = make(fd, size, mib);
    uint8_t *ram = csvf_vmram_memory(vmram);
    for (size_t i = 0; i < used; i++)
        ram[i * PAGE + i % PAGE] = (uint8_t)(i | 1);
    for (size_t i = 0; i < used; i++)
        ram[(pages - 1 - i) * PAGE + 7] = (uint8_t)(i | 1);
    CHECK(stats_of(vmram).faults < 2 * used / 16);
    CHECK(stats_of(vmram).resident_peak <= mib);
    /* Everything leaves the window. */
    unsigned sum = 0;
    for (size_t at = 4 * mib; at < 12 * mib; at += PAGE)
        sum |= ram[at];
    CHECK(sum == 0);
    CHECK(stats_of(vmram).bytes_encrypted == 2 * used * PAGE);
    struct stat about;
    CHECK(fstat(fd, &about) == 0 && (size_t)about.st_blocks * 512 == 2 * used * PAGE);
    for (size_t i = 0; i < used; i++) {
        CHECK(ram[i * PAGE + i % PAGE] == (uint8_t)(i | 1) && ram[(pages - 1 - i) * PAGE + 7] == (uint8_t)(i | 1));
        CHECK(ram[i * PAGE + (i + 1) % PAGE] == 0 && ram[(pages - 1 - i) * PAGE] == 0);
    }
    /* Beyond both ends, where pages were given ahead and left as zeros: they are zeros again, and can be written. */
    for (size_t i = used; i < used + 64; i++)
        CHECK(ram[i * PAGE] == 0 && ram[(pages - 1 - i) * PAGE] == 0);
    for (size_t i = used; i < used + 64; i++)
        ram[i * PAGE] = 77;
    for (size_t at = 4 * mib; at < 12 * mib; at += PAGE)
        sum |= ram[at];
    for (size_t i = used; i < used + 64; i++)
        CHECK(ram[i * PAGE] == 77);
    /* A page that is in the DRAM and becomes zeros is stored as such. */
    for (size_t i = 0; i < used; i++)
        ram[i * PAGE + i % PAGE] = 0;
    for (size_t at = 4 * mib; at < 12 * mib; at += PAGE)
        sum |= ram[at];
    for (size_t i = 0; i < used; i++)
        CHECK(ram[i * PAGE + i % PAGE] == 0);
    CHECK(sum == 0);
    csvf_vmram_destroy(vmram);
    close(fd);
}

static void dirty_pages_only_and_read_ahead(void)
{
    const size_t size = 4 * mib;
    const int fd = make_file(size);
    csvf_vmram *vmram = make(fd, size, mib);
    uint8_t *ram = csvf_vmram_memory(vmram);
    test_fill(ram, size, 1);
    CHECK_STATUS(csvf_vmram_flush(vmram), CSVF_OK);
    const csvf_vmram_stats before = stats_of(vmram);
    unsigned sum = 0;
    for (int round = 0; round < 2; round++)
        for (size_t at = 0; at < size; at += 64)
            sum += ram[at];
    const csvf_vmram_stats after = stats_of(vmram);
    CHECK(sum != 0);
    CHECK(after.bytes_encrypted == before.bytes_encrypted);
    CHECK(after.evictions - before.evictions >= size / PAGE && after.evictions_clean - before.evictions_clean == after.evictions - before.evictions);
    CHECK(after.faults - before.faults < 2 * size / PAGE / 4);
    CHECK(after.pages_ahead - before.pages_ahead > size / PAGE);
    /* A write to a page that was read reaches the DRAM. */
    uint8_t old[PAGE], new[PAGE];
    CHECK_STATUS(csvf_vmram_flush(vmram), CSVF_OK);
    read_file(old, fd, PAGE, size - PAGE);
    sum += ram[size - PAGE];
    ram[size - PAGE]++;
    CHECK_STATUS(csvf_vmram_flush(vmram), CSVF_OK);
    read_file(new, fd, PAGE, size - PAGE);
    CHECK(memcmp(old, new, 16) != 0);
    CHECK_BYTES(old + 16, new + 16, PAGE - 16);
    CHECK(stats_of(vmram).write_faults > 0);
    csvf_vmram_destroy(vmram);
    close(fd);
}

static void pattern_never_in_dram(void)
{
    const size_t size = 8 * mib;
    const int fd = make_file(size), plain = make_file(size);
    csvf_vmram *vmram = make(fd, size, size / 16);
    uint8_t *ram = csvf_vmram_memory(vmram);
    int found = 0;
    for (size_t at = 0; at < size; at += 16) {
        memcpy(ram + at, pattern, 16);
        if (at % (size / 50) < 16)
            found |= holds_pattern(fd, size);
    }
    CHECK(!found);
    CHECK_STATUS(csvf_vmram_flush(vmram), CSVF_OK);
    CHECK(!holds_pattern(fd, size));
    CHECK(pwrite(plain, pattern, 16, 4096 + 32) == 16 && holds_pattern(plain, size));   /* the scan finds what is there */
    CHECK_BYTES(ram + size - 16, pattern, 16);
    csvf_vmram_destroy(vmram);
    close(fd);
    close(plain);
}

/* Brings other pages into the window until none of the first ones is left. */
static void push_out(csvf_vmram *vmram, size_t from)
{
    volatile uint8_t *ram = csvf_vmram_memory(vmram);
    for (int round = 0; round < 4; round++)
        for (size_t at = from; at < csvf_vmram_size(vmram); at += PAGE)
            ram[at]++;
}

static void altered_dram(void)
{
    const size_t size = 2 * mib, part = mib / 4;
    const int fd = make_file(2 * size);
    csvf_engine *engine;
    CHECK_STATUS(csvf_engine_create_file(&engine, fd, 0, 2 * size, NULL), CSVF_OK);
    uint8_t key[32];
    csvf_vmram *guests[2];
    uint8_t *ram[2];
    const csvf_vmram_config config = {.struct_size = sizeof config, .window_size = mib / 4, .read_ahead = 1};
    for (unsigned i = 0; i < 2; i++) {
        make_key(key, i);
        CHECK_STATUS(csvf_asid_install(engine, 1 + i, key, 32), CSVF_OK);
        CHECK_STATUS(csvf_vmram_create(&guests[i], engine, 1 + i, fd, i * size, i * size, size, &config), CSVF_OK);
        ram[i] = csvf_vmram_memory(guests[i]);
        test_fill(ram[i], part, 10 + i);
        push_out(guests[i], part);
    }
    uint8_t *expected = malloc(part), *seen = malloc(part), page[PAGE], other[PAGE], old[PAGE];
    test_fill(expected, part, 10);

    /* The engine reads the same memory under the same ASID, and noise under the other's. */
    CHECK_STATUS(csvf_read(engine, seen, part, 1, 0), CSVF_OK);
    CHECK_BYTES(seen, expected, part);
    CHECK_STATUS(csvf_read(engine, seen, part, 2, 0), CSVF_OK);
    CHECK(memcmp(seen, expected, 16) != 0);

    /* A flipped bit: noise in its block, and only there. */
    read_file(page, fd, PAGE, 0);
    page[100] ^= 1;
    CHECK(pwrite(fd, page, PAGE, 0) == PAGE);
    CHECK(memcmp(ram[0] + 96, expected + 96, 16) != 0);
    CHECK_BYTES(ram[0], expected, 96);
    CHECK_BYTES(ram[0] + 112, expected + 112, PAGE - 112);

    /* Two pages swapped: noise, neither the one nor the other. */
    read_file(page, fd, PAGE, PAGE);
    read_file(other, fd, PAGE, 2 * PAGE);
    CHECK(pwrite(fd, other, PAGE, PAGE) == PAGE && pwrite(fd, page, PAGE, 2 * PAGE) == PAGE);
    for (int i = 1; i <= 2; i++)
        for (int block = 0; block < PAGE; block += 16)
            CHECK(memcmp(ram[0] + i * PAGE + block, expected + PAGE + block, 16) != 0 &&
                  memcmp(ram[0] + i * PAGE + block, expected + 2 * PAGE + block, 16) != 0);

    /* An old page replayed: the old content. The hardware does not notice either. */
    read_file(old, fd, PAGE, 3 * PAGE);
    memset(ram[0] + 3 * PAGE, 0x55, PAGE);
    push_out(guests[0], part);
    CHECK(pwrite(fd, old, PAGE, 3 * PAGE) == PAGE);
    CHECK_BYTES(ram[0] + 3 * PAGE, expected + 3 * PAGE, PAGE);

    /* Another guest's page: noise. And zeros are ciphertext like any other: the guest does not read zeros. */
    read_file(page, fd, PAGE, size);
    CHECK(pwrite(fd, page, PAGE, 4 * PAGE) == PAGE);
    test_fill(seen, part, 11);
    for (int block = 0; block < PAGE; block += 16)
        CHECK(memcmp(ram[0] + 4 * PAGE + block, seen + block, 16) != 0);
    memset(page, 0, PAGE);
    CHECK(pwrite(fd, page, PAGE, 5 * PAGE) == PAGE);
    CHECK(memcmp(ram[0] + 5 * PAGE, page, 16) != 0);

    /* The other guest has noticed nothing. */
    CHECK_BYTES(ram[1], seen, part);
    for (unsigned i = 0; i < 2; i++)
        csvf_vmram_destroy(guests[i]);
    csvf_engine_destroy(engine);
    free(expected);
    free(seen);
    close(fd);
}

static void discarded(void)
{
    const size_t size = 2 * mib;
    const int fd = make_file(size);
    csvf_vmram *vmram = make(fd, size, mib / 4);
    uint8_t *ram = csvf_vmram_memory(vmram), zeros[PAGE] = {0};
    memset(ram, 0x77, size);
    CHECK_STATUS(csvf_vmram_discard(vmram, PAGE, 3 * PAGE), CSVF_OK);           /* in the DRAM */
    CHECK_STATUS(csvf_vmram_discard(vmram, size - 2 * PAGE, PAGE), CSVF_OK);    /* in the window */
    CHECK_BYTES(ram + PAGE, zeros, PAGE);
    CHECK_BYTES(ram + 3 * PAGE, zeros, PAGE);
    CHECK_BYTES(ram + size - 2 * PAGE, zeros, PAGE);
    CHECK(ram[0] == 0x77 && ram[4 * PAGE] == 0x77 && ram[size - PAGE] == 0x77);
    /* Behind our back, as a balloon without the preload library would: zeros too, and no hang. */
    CHECK(madvise(ram + size - PAGE, PAGE, MADV_DONTNEED) == 0);
    CHECK_BYTES(ram + size - PAGE, zeros, PAGE);
    /* Nor when the library is the next to read them: it flushes, evicts on demand, or evicts for want of room. */
    memset(ram + size - 8 * PAGE, 0x78, 8 * PAGE);
    CHECK(madvise(ram + size - 4 * PAGE, 2 * PAGE, MADV_DONTNEED) == 0);
    CHECK_STATUS(csvf_vmram_flush(vmram), CSVF_OK);
    CHECK_BYTES(ram + size - 3 * PAGE, zeros, PAGE);
    memset(ram + size - 8 * PAGE, 0x79, 8 * PAGE);
    CHECK(madvise(ram + size - 4 * PAGE, 2 * PAGE, MADV_DONTNEED) == 0);
    CHECK_STATUS(csvf_vmram_evict(vmram, size - 8 * PAGE, 8 * PAGE), CSVF_OK);
    CHECK_BYTES(ram + size - 3 * PAGE, zeros, PAGE);
    CHECK(ram[size - 5 * PAGE] == 0x79 && ram[size - 2 * PAGE] == 0x79);
    memset(ram + size - 8 * PAGE, 0x7a, 8 * PAGE);
    CHECK(madvise(ram + size - 4 * PAGE, 2 * PAGE, MADV_DONTNEED) == 0);
    memset(ram, 0x77, size / 2);
    CHECK_BYTES(ram + size - 3 * PAGE, zeros, PAGE);
    CHECK(ram[size - 5 * PAGE] == 0x7a && ram[size - 2 * PAGE] == 0x7a);
    CHECK_STATUS(csvf_vmram_discard(vmram, 0, size), CSVF_OK);
    CHECK(stats_of(vmram).resident == 0);
    for (size_t page = 0; page < size; page += PAGE)
        CHECK_BYTES(ram + page, zeros, PAGE);
    CHECK_STATUS(csvf_vmram_discard(vmram, size, PAGE), CSVF_ERR_RANGE);
    CHECK_STATUS(csvf_vmram_discard(vmram, 1, PAGE), CSVF_ERR_ALIGNMENT);
    csvf_vmram_destroy(vmram);
    close(fd);
}

/* What stands in the DRAM at a guest's start, as the processor's launch commands leave it: in the middle of a file, under its address there. */
static void adopted(void)
{
    const size_t size = 2 * mib, start = 3 * mib;
    const int fd = make_file(start + size);
    uint8_t key[32], *content = malloc(4 * PAGE), zeros[PAGE] = {0};
    make_key(key, 0);
    test_fill(content, 4 * PAGE, 9);
    csvf_engine *engine;
    CHECK_STATUS(csvf_engine_create_file(&engine, fd, 0, start + size, NULL), CSVF_OK);
    CHECK_STATUS(csvf_asid_install(engine, 7, key, 32), CSVF_OK);
    CHECK_STATUS(csvf_write(engine, 7, start + 5 * PAGE, content, 4 * PAGE), CSVF_OK);
    const csvf_vmram_config config = {.struct_size = sizeof config, .window_size = CSVF_VMRAM_WINDOW_MIN};
    csvf_vmram *vmram = NULL;
    CHECK_STATUS(csvf_vmram_create_with_key(&vmram, key, 32, fd, start, start, size, &config), CSVF_OK);
    uint8_t *ram = csvf_vmram_memory(vmram);
    CHECK_STATUS(csvf_vmram_adopt(vmram, 5 * PAGE, 3 * PAGE), CSVF_OK);
    CHECK_BYTES(ram + 5 * PAGE, content, 3 * PAGE);
    CHECK_BYTES(ram + 4 * PAGE, zeros, PAGE);
    CHECK_BYTES(ram + 8 * PAGE, zeros, PAGE);       /* not adopted: zeros, whatever the DRAM holds */
    memset(ram + 8 * PAGE, 0x11, PAGE);             /* changed in the window, and lost there */
    CHECK_STATUS(csvf_vmram_adopt(vmram, 8 * PAGE, PAGE), CSVF_OK);
    CHECK_BYTES(ram + 8 * PAGE, content + 3 * PAGE, PAGE);
    CHECK_STATUS(csvf_vmram_adopt(vmram, size, 0), CSVF_OK);
    CHECK_STATUS(csvf_vmram_adopt(vmram, size, PAGE), CSVF_ERR_RANGE);
    CHECK_STATUS(csvf_vmram_adopt(vmram, UINT64_MAX - PAGE + 1, 2 * PAGE), CSVF_ERR_RANGE);
    CHECK_STATUS(csvf_vmram_adopt(vmram, 1, PAGE), CSVF_ERR_ALIGNMENT);
    CHECK_STATUS(csvf_vmram_adopt(vmram, PAGE, 1), CSVF_ERR_ALIGNMENT);
    csvf_vmram_destroy(vmram);
    csvf_engine_destroy(engine);
    free(content);
    close(fd);
}

typedef struct toucher {
    volatile uint8_t *page;
    _Atomic int stop;
    unsigned long touches;
} toucher;

static void *touch(void *context)
{
    toucher *t = context;
    for (; !atomic_load(&t->stop); t->touches++)
        *t->page = (uint8_t)t->touches;
    return NULL;
}

/* Somebody else works on a page in the DRAM: the guest's request out, the processor's answer in. */
static void evicted_on_demand(void)
{
    const size_t size = 2 * mib;
    const int fd = make_file(size);
    csvf_engine *engine;
    uint8_t key[32], page[PAGE], seen[PAGE], zeros[PAGE] = {0};
    make_key(key, 0);
    CHECK_STATUS(csvf_engine_create_file(&engine, fd, 0, size, NULL), CSVF_OK);
    CHECK_STATUS(csvf_asid_install(engine, 1, key, 32), CSVF_OK);
    const csvf_vmram_config config = {.struct_size = sizeof config, .window_size = mib};
    csvf_vmram *vmram = NULL;
    CHECK_STATUS(csvf_vmram_create(&vmram, engine, 1, fd, 0, 0, size, &config), CSVF_OK);
    uint8_t *ram = csvf_vmram_memory(vmram);
    toucher beside = {.page = ram + 40 * PAGE + 8};
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, touch, &beside) == 0);
    for (unsigned round = 0; round < 200; round++) {
        test_fill(page, PAGE, round);
        memcpy(ram + 3 * PAGE, page, PAGE);
        CHECK_STATUS(csvf_vmram_evict(vmram, 3 * PAGE, PAGE), CSVF_OK);
        CHECK_STATUS(csvf_read(engine, seen, PAGE, 1, 3 * PAGE), CSVF_OK);
        CHECK_BYTES(seen, page, PAGE);
        page[7] ^= 0xff;
        CHECK_STATUS(csvf_write(engine, 1, 3 * PAGE, page, PAGE), CSVF_OK);
        CHECK_BYTES(ram + 3 * PAGE, page, PAGE);
        /* The neighbour's page leaves as well, while he writes to it. */
        CHECK_STATUS(csvf_vmram_evict(vmram, 39 * PAGE, 3 * PAGE), CSVF_OK);
    }
    atomic_store(&beside.stop, 1);
    pthread_join(thread, NULL);
    CHECK(beside.touches > 0 && *beside.page == (uint8_t)(beside.touches - 1));

    /* Never written, and only read: zeros there, and what another writes there is seen here. */
    CHECK(ram[100 * PAGE] == 0);
    CHECK_STATUS(csvf_vmram_evict(vmram, 100 * PAGE, 2 * PAGE), CSVF_OK);
    for (unsigned i = 100; i < 102; i++) {
        CHECK_STATUS(csvf_read(engine, seen, PAGE, 1, i * PAGE), CSVF_OK);
        CHECK_BYTES(seen, zeros, PAGE);
        CHECK_STATUS(csvf_write(engine, 1, i * PAGE, page, PAGE), CSVF_OK);
        CHECK_BYTES(ram + i * PAGE, page, PAGE);
    }
    /* All of it: runs longer than a batch, changed and unchanged ones mixed. */
    for (size_t at = 0; at < size; at += at % (3 * PAGE) ? PAGE : 2 * PAGE)
        ram[at] = 0x5a;
    CHECK_STATUS(csvf_vmram_evict(vmram, 0, size), CSVF_OK);
    CHECK(stats_of(vmram).resident == 0);
    uint8_t *whole = malloc(size);
    CHECK_STATUS(csvf_read(engine, whole, size, 1, 0), CSVF_OK);
    CHECK_BYTES(ram, whole, size);
    free(whole);
    CHECK_STATUS(csvf_vmram_evict(vmram, 0, 0), CSVF_OK);
    CHECK_STATUS(csvf_vmram_evict(vmram, size, PAGE), CSVF_ERR_RANGE);
    CHECK_STATUS(csvf_vmram_evict(vmram, 0, size + PAGE), CSVF_ERR_RANGE);
    CHECK_STATUS(csvf_vmram_evict(vmram, 7, PAGE), CSVF_ERR_ALIGNMENT);
    CHECK_STATUS(csvf_vmram_evict(vmram, 0, 7), CSVF_ERR_ALIGNMENT);
    csvf_vmram_destroy(vmram);
    csvf_engine_destroy(engine);
    close(fd);
}

static void snapshot_and_restore(void)
{
    const size_t size = 2 * mib;
    const int fd = make_file(size), image = make_file(0), second = make_file(size);
    csvf_vmram *vmram = make(fd, size, mib / 4);
    uint8_t *ram = csvf_vmram_memory(vmram), *expected = calloc(1, size);
    test_fill(expected, size / 2, 3);
    memcpy(expected, pattern, 16);
    memcpy(ram, expected, size / 2);
    CHECK_STATUS(csvf_vmram_snapshot(vmram, image), CSVF_OK);
    struct stat about;
    CHECK(fstat(image, &about) == 0 && about.st_size == (off_t)(PAGE + size / 2));  /* the other half was never written */
    CHECK(!holds_pattern(image, (size_t)about.st_size));
    memset(ram, 0xee, size);
    CHECK_STATUS(csvf_vmram_restore(vmram, image), CSVF_OK);
    CHECK_BYTES(ram, expected, size);
    csvf_vmram_destroy(vmram);

    vmram = make(second, size, size);       /* elsewhere, under the same key */
    CHECK_STATUS(csvf_vmram_restore(vmram, image), CSVF_OK);
    CHECK_BYTES(csvf_vmram_memory(vmram), expected, size);
    ((uint8_t *)csvf_vmram_memory(vmram))[5]++;

    /* Cut, foreign, or of another size: refused, and nothing has changed. */
    expected[5]++;
    CHECK(ftruncate(image, about.st_size - 1) == 0);
    CHECK_STATUS(csvf_vmram_restore(vmram, image), CSVF_ERR_LENGTH);
    CHECK(ftruncate(image, 100) == 0);
    CHECK_STATUS(csvf_vmram_restore(vmram, image), CSVF_ERR_LENGTH);
    CHECK_STATUS(csvf_vmram_restore(vmram, fd), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_vmram_restore(vmram, -1), CSVF_ERR_SYSTEM);
    CHECK_BYTES(csvf_vmram_memory(vmram), expected, size);
    CHECK_STATUS(csvf_vmram_snapshot(vmram, image), CSVF_OK);
    csvf_vmram_destroy(vmram);

    vmram = make_keyed(second, size, size, 1, NULL);    /* another key: noise */
    CHECK_STATUS(csvf_vmram_restore(vmram, image), CSVF_OK);
    CHECK(memcmp(csvf_vmram_memory(vmram), expected, 16) != 0);
    csvf_vmram_destroy(vmram);
    vmram = make(second, size / 2, mib / 4);
    CHECK_STATUS(csvf_vmram_restore(vmram, image), CSVF_ERR_ARGUMENT);
    csvf_vmram_destroy(vmram);
    free(expected);
    close(fd);
    close(image);
    close(second);
}

/* ---- Processes ---- */

static void forked(void)
{
    const size_t size = mib;
    const int fd = make_file(size);
    csvf_vmram *vmram = make(fd, size, mib / 4);
    uint8_t *ram = csvf_vmram_memory(vmram);
    memset(ram, 0x42, size);
    int result;
    pid_t child = fork();
    if (child == 0) {       /* the window is not inherited: its address is empty */
        signal(SIGSEGV, SIG_DFL);
        _exit(((volatile uint8_t *)ram)[size - 1] == 0x42);
    }
    CHECK(waitpid(child, &result, 0) == child);
    CHECK(WIFSIGNALED(result) ? WTERMSIG(result) == SIGSEGV : WEXITSTATUS(result) > 1);    /* AddressSanitizer exits */
    child = fork();
    if (child == 0) {       /* and what is inherited can be given back without harm to the parent */
        csvf_vmram_destroy(vmram);
        _exit(0);
    }
    CHECK(waitpid(child, &result, 0) == child && WIFEXITED(result) && WEXITSTATUS(result) == 0);
    for (size_t at = 0; at < size; at += PAGE)
        CHECK(ram[at] == 0x42);
    /* An exec takes nothing along. */
    child = fork();
    if (child == 0) {
        execl("/bin/sh", "sh", "-c", "for f in /proc/$$/fd/*; do case $(readlink $f) in *userfaultfd*|*test-vmram*) exit 1;; esac; done", (char *)NULL);
        _exit(9);
    }
    CHECK(waitpid(child, &result, 0) == child && WIFEXITED(result) && WEXITSTATUS(result) == 0);
    csvf_vmram_destroy(vmram);
    close(fd);
}

static void killed(void)
{
    const size_t size = 4 * mib;
    const int fd = make_file(size);
    int ready[2];
    CHECK(pipe(ready) == 0);
    for (int round = 0; round < 5; round++) {
        const pid_t child = fork();
        if (child == 0) {
            csvf_vmram *vmram = make(fd, size, size / 16);
            uint8_t *ram = csvf_vmram_memory(vmram);
            for (unsigned turn = 0;; turn++)
                for (size_t at = 0; at < size; at += 16) {
                    memcpy(ram + at, pattern, 16);
                    if (turn == 0 && at == size / 2 && write(ready[1], "x", 1) != 1)
                        _exit(9);
                }
        }
        char c;
        CHECK(read(ready[0], &c, 1) == 1);
        usleep((useconds_t)(1000 + 3000 * round));
        kill(child, SIGKILL);
        int result;
        CHECK(waitpid(child, &result, 0) == child && WIFSIGNALED(result) && WTERMSIG(result) == SIGKILL);
        CHECK(!holds_pattern(fd, size));
        struct stat about;
        CHECK(fstat(fd, &about) == 0 && about.st_size == (off_t)size && about.st_blocks > 0);
    }
    close(ready[0]);
    close(ready[1]);
    close(fd);
}

/* Waits up to five seconds. */
static int was_told(told *t)
{
    for (int i = 0; i < 500 && atomic_load(&t->count) == 0; i++)
        usleep(10000);
    return atomic_load(&t->count);
}

static void end_of_guest(int signal_number)
{
    (void)signal_number;
    _exit(42);
}

/* In a child: makes memory over a file, lets `harm` do its work, and touches all of it. */
static void lost_memory(const char *words, int expected, void (*harm)(int fd, csvf_engine *engine))
{
    const pid_t child = fork();
    if (child == 0) {
        const size_t size = 2 * mib;
        const int fd = make_file(size);
        static told t;
        csvf_engine *engine;
        csvf_vmram *vmram;
        uint8_t key[32];
        make_key(key, 0);
        const csvf_vmram_config config = {.struct_size = sizeof config, .window_size = mib / 4, .report = remember, .report_context = &t};
        if (csvf_engine_create_file(&engine, fd, 0, size, NULL) || csvf_asid_install(engine, 1, key, 32) ||
            csvf_vmram_create(&vmram, engine, 1, fd, 0, 0, size, &config))
            _exit(1);
        volatile uint8_t *ram = csvf_vmram_memory(vmram);
        for (size_t at = 0; at < size; at += PAGE)
            ram[at] = 1;
        harm(fd, engine);
        struct sigaction action = {.sa_handler = end_of_guest};
        sigaction(SIGSEGV, &action, NULL);
        for (int round = 0; round < 2; round++)
            for (size_t at = 0; at < size; at += PAGE)
                if (atomic_load(&t.count) == 0)
                    ram[at]++;
        if (was_told(&t) != 1 || t.status != expected || !strstr(t.text, words) || strchr(t.text, '\n'))
            _exit(2);
        if (csvf_vmram_flush(vmram) != expected || stats_of(vmram).failure != expected)
            _exit(3);
        alarm(20);
        ram[0] = 2;
        _exit(4);
    }
    int result;
    CHECK(waitpid(child, &result, 0) == child);
    test_case("%s: status %x", words, result);
    /* 42 if told before the guest's next access; a guest that was waiting for a page ends there as well. */
    CHECK(WIFEXITED(result) && WEXITSTATUS(result) == 42);
}

static void cut(int fd, csvf_engine *engine)
{
    (void)engine;
    if (ftruncate(fd, 8192))
        abort();
}

static void remove_key(int fd, csvf_engine *engine)
{
    (void)fd;
    if (csvf_asid_remove(engine, 1) != CSVF_OK)
        abort();
}

static void truncated(void) { lost_memory("truncated", CSVF_ERR_LENGTH, cut); }
static void key_removed(void) { lost_memory("no key", CSVF_ERR_ASID, remove_key); }

static void deleted(void)
{
    char path[] = "/tmp/test-vmram-XXXXXX";
    const size_t size = mib;
    const int fd = mkstemp(path);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
    told t = {0};
    csvf_vmram *vmram = make_keyed(fd, size, mib / 4, 0, &t);
    uint8_t *ram = csvf_vmram_memory(vmram);
    memset(ram, 0x31, size);
    CHECK(atomic_load(&t.count) == 0);
    CHECK(unlink(path) == 0);
    CHECK(was_told(&t) == 1 && t.status == CSVF_OK && strstr(t.text, "deleted"));
    for (size_t at = 0; at < size; at += PAGE)
        CHECK(ram[at]++ == 0x31);
    CHECK_STATUS(csvf_vmram_flush(vmram), CSVF_OK);
    CHECK(atomic_load(&t.count) == 1);
    csvf_vmram_destroy(vmram);
    close(fd);
}

int main(void)
{
    const char *reason;
    if (csvf_vmram_probe(&reason) != CSVF_OK) {
        printf("only what needs no userfaultfd: %s\n", reason);
        RUN(forbidden);
        return test_report();
    }
    RUN(refusals);
    RUN(forbidden);
    RUN(shadow_copy);
    RUN(kernel_access);
    RUN(untouched);
    RUN(first_touches);
    RUN(dirty_pages_only_and_read_ahead);
    RUN(pattern_never_in_dram);
    RUN(altered_dram);
    RUN(discarded);
    RUN(adopted);
    RUN(evicted_on_demand);
    RUN(snapshot_and_restore);
    RUN(forked);
    RUN(killed);
    RUN(truncated);
    RUN(key_removed);
    RUN(deleted);
    return test_report();
}
