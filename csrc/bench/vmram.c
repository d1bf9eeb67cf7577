/* What encrypted memory costs: service of a fault beside SM4's own time, and the start.
 *
 *     csvfast-vmram-bench [MEBIBYTES]      of the memory; 64
 *
 * Every figure is the mean over one thread's 20,000 touches, evictions included, in the best of five rounds: the window is full all the
 * time. "beside SM4" is what is left when the time of SM4 over the bytes that were really encrypted and decrypted is taken away; SM4 is timed
 * alone, page by page, in the same run. The bare fault is the least that userfaultfd can cost on this machine: a handler that maps a page of
 * zeros and does nothing else. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "../include/csvfast_vmram.h"

enum { ROUNDS = 5 };

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* CPU seconds of all threads, kernel included: beside other programs, the wall clock measures them too. */
static double cpu_time(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) + 1e-6 * (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
}

static void require(int status, const char *what)
{
    if (status == CSVF_OK)
        return;
    const char *reason = NULL;
    (void)!csvf_vmram_probe(&reason);
    fprintf(stderr, "csvfast-vmram-bench: %s: %s\n", what, reason ? reason : csvf_status_text(status));
    exit(3);
}

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static csvf_vmram *make(int fd, size_t size, size_t window)
{
    const csvf_vmram_config config = {.struct_size = sizeof config, .window_size = window};
    uint8_t key[32];
    for (int i = 0; i < 32; i++)
        key[i] = (uint8_t)(3 * i + 1);
    csvf_vmram *vmram;
    require(csvf_vmram_create_with_key(&vmram, key, sizeof key, fd, 0, 0, size, &config), "create");
    return vmram;
}

static int make_file(size_t size)
{
    const int fd = memfd_create("csvfast-vmram-bench", MFD_CLOEXEC);
    require(fd < 0 || ftruncate(fd, (off_t)size) ? CSVF_ERR_SYSTEM : CSVF_OK, "memfd");
    return fd;
}

/* Seconds of SM4 for one byte, page by page. */
static double sm4_time(int decrypt)
{
    static uint8_t page[CSVF_PAGE_BYTES];
    csvf_xts xts;
    uint8_t key[32];
    for (int i = 0; i < 32; i++)
        key[i] = (uint8_t)i;
    require(csvf_xts_init(&xts, key, CSVF_STANDARD_GB), "key");
    double best = 1;
    for (int round = 0; round < 5; round++) {
        const double start = now();
        for (uint64_t unit = 0; unit < 5000; unit++)
            require((decrypt ? csvf_xts_decrypt : csvf_xts_encrypt)(&xts, page, page, sizeof page, sizeof page, unit), "SM4");
        const double time = (now() - start) / 5000 / sizeof page;
        best = time < best ? time : best;
    }
    csvf_wipe(&xts, sizeof xts);
    return best;
}

static void *serve_zeros(void *context)
{
    static uint8_t zeros[CSVF_PAGE_BYTES];
    const int fd = *(const int *)context;
    for (int patience = 0;;) {
        struct uffd_msg message;
        if (read(fd, &message, sizeof message) == sizeof message) {
            struct uffdio_copy copy = {.dst = message.arg.pagefault.address & ~(uint64_t)(CSVF_PAGE_BYTES - 1),
                                       .src = (uintptr_t)zeros, .len = CSVF_PAGE_BYTES};
            (void)ioctl(fd, UFFDIO_COPY, &copy);
            patience = 20;      /* as the library's threads */
        } else if (patience-- > 0) {
            sched_yield();
        } else {
            struct pollfd wait = {.fd = fd, .events = POLLIN};
            (void)poll(&wait, 1, -1);
        }
    }
    return NULL;
}

/* Mean seconds of a fault served by the least handler there can be, in the best of the rounds. Its thread lives on, asleep. */
static double bare_fault(void)
{
    enum { PAGES = 20000 };
    static int fd;
    const size_t size = (size_t)PAGES * CSVF_PAGE_BYTES;
    fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    struct uffdio_api api = {.api = UFFD_API};
    volatile uint8_t *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    struct uffdio_register range = {.range = {(uintptr_t)memory, size}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    pthread_t thread;
    if (fd < 0 || memory == MAP_FAILED || madvise((void *)memory, size, MADV_NOHUGEPAGE) || ioctl(fd, UFFDIO_API, &api) ||
        ioctl(fd, UFFDIO_REGISTER, &range) || pthread_create(&thread, NULL, serve_zeros, &fd))
        require(CSVF_ERR_SYSTEM, "a bare userfaultfd");
    double best = 1;
    for (int round = 0; round < ROUNDS; round++) {
        const double start = now();
        for (size_t page = 0; page < PAGES; page++)
            memory[page * CSVF_PAGE_BYTES] = 1;
        const double time = (now() - start) / PAGES;
        best = time < best ? time : best;
        (void)madvise((void *)memory, size, MADV_DONTNEED);
    }
    return best;
}

static void run(const char *name, size_t size, unsigned share, int is_random, int is_write, double encrypt, double decrypt)
{
    const int fd = make_file(size);
    csvf_vmram *vmram = make(fd, size, size / share);
    volatile uint8_t *ram = csvf_vmram_memory(vmram);
    const size_t pages = size / CSVF_PAGE_BYTES;
    for (size_t page = 0; page < pages; page++)
        ram[page * CSVF_PAGE_BYTES] = (uint8_t)page;
    csvf_vmram_stats before = {.struct_size = sizeof before}, after = before;
    uint64_t state = 88172645463325252u, sum = 0, faults = 1;
    const size_t touches = 20000;
    size_t next = 0;
    double time = 1e9, cpu = 0, sm4 = 0;
    for (int round = 0; round < ROUNDS; round++) {
        require(csvf_vmram_get_stats(vmram, &before), "statistics");
        const double start = now(), cpu_start = cpu_time();
        for (size_t i = 0; i < touches; i++) {
            const size_t at = (is_random ? next_random(&state) % pages : next++ % pages) * CSVF_PAGE_BYTES;
            if (is_write)
                ram[at] = (uint8_t)i;
            else
                sum += ram[at];
        }
        const double taken = now() - start;
        if (taken >= time)
            continue;
        time = taken;
        cpu = cpu_time() - cpu_start;
        require(csvf_vmram_get_stats(vmram, &after), "statistics");
        faults = after.faults - before.faults;
        sm4 = (double)(after.bytes_encrypted - before.bytes_encrypted) * encrypt +
              (double)(after.bytes_decrypted - before.bytes_decrypted) * decrypt;
    }
    const double each = 1e6 / (double)faults;
    printf("%-18s window 1/%-3u %7.2f us a fault (CPU %6.2f), SM4 %5.2f, beside SM4 %6.2f (CPU %6.2f); %5.1f %% of touches fault, %.2f us a touch%s\n",
           name, share, time * each, cpu * each, sm4 * each, (time - sm4) * each, (cpu - sm4) * each,
           100.0 * (double)faults / (double)touches, 1e6 * time / (double)touches, sum == 1 ? " " : "");
    fflush(stdout);
    csvf_vmram_destroy(vmram);
    close(fd);
}

int main(int argc, char **argv)
{
    const size_t size = (size_t)(argc > 1 ? strtoul(argv[1], NULL, 10) : 64) << 20;
    if (size < (size_t)8 << 20) {
        fprintf(stderr, "usage: csvfast-vmram-bench [MEBIBYTES]   (at least 8)\n");
        return 2;
    }
    const double encrypt = sm4_time(0), decrypt = sm4_time(1);
    printf("SM4 kernel %s: a page encrypted in %.2f us, decrypted in %.2f us\n", csvf_kernel_name(CSVF_PRIMITIVE_SM4),
           1e6 * encrypt * CSVF_PAGE_BYTES, 1e6 * decrypt * CSVF_PAGE_BYTES);
    printf("a bare userfaultfd fault: %.2f us\n", 1e6 * bare_fault());
    for (unsigned share = 4; share <= 64; share *= 4) {
        run("random writes", size, share, 1, 1, encrypt, decrypt);
        run("random reads", size, share, 1, 0, encrypt, decrypt);
        run("sequential writes", size, share, 0, 1, encrypt, decrypt);
        run("sequential reads", size, share, 0, 0, encrypt, decrypt);
    }
    for (size_t memory = (size_t)64 << 20; memory <= (size_t)4 << 30; memory *= 8) {
        const int fd = make_file(memory);
        const double start = now();
        csvf_vmram *vmram = make(fd, memory, memory / 16);
        const double time = now() - start;
        printf("start of %4zu MiB: %.0f us\n", memory >> 20, 1e6 * time);
        csvf_vmram_destroy(vmram);
        close(fd);
    }
    return 0;
}
