/* Constant time, second proof, for instructions no checker knows (GFNI, AVX-512): runs an operation natively, one instruction at a
 * time under ptrace, and writes the general registers before every instruction. ctrace.py compares the traces of different secrets:
 * the instruction sequence and every address must be equal.
 *
 *   ctrace list                          operations and kernels, tab separated
 *   ctrace OPERATION KERNEL SEED FILE    one trace; 18 little-endian 64-bit words a step (ctrace.py names them)
 *
 * Address space layout randomisation is switched off for the traced process, so that traces compare across runs. Linux, x86-64. */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/personality.h>
#include <sys/ptrace.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#include "secret_operations.h"

static uint8_t secret[OPERATION_SECRET_BYTES], out[OPERATION_OUT_BYTES];

static void die(const char *what)
{
    fprintf(stderr, "ctrace: %s: %s\n", what, strerror(errno));
    exit(3);
}

static void list(void)
{
    for (size_t i = 0; i < OPERATION_COUNT; i++)
        for (size_t k = 0; k < csvf_kernel_count(OPERATIONS[i].primitive); k++) {
            const char *kernel = csvf_kernel_at(OPERATIONS[i].primitive, k);
            if (csvf_kernel_available(OPERATIONS[i].primitive, kernel))
                printf("%s\t%s\n", OPERATIONS[i].name, kernel);
        }
}

static const operation *find(const char *name)
{
    for (size_t i = 0; i < OPERATION_COUNT; i++)
        if (strcmp(OPERATIONS[i].name, name) == 0)
            return &OPERATIONS[i];
    fprintf(stderr, "ctrace: no operation '%s'\n", name);
    exit(2);
}

static int traced(const operation *o, const char *kernel, uint64_t seed)
{
    if (csvf_init() != CSVF_OK || operations_prepare() != CSVF_OK || csvf_force_kernel(o->primitive, kernel) != CSVF_OK)
        return 3;
    uint64_t x = seed * 0x9E3779B97F4A7C15u + 1;
    for (size_t i = 0; i < sizeof secret; i++) {
        x ^= x << 13; x ^= x >> 7; x ^= x << 17;
        secret[i] = (uint8_t)(x >> 32);
    }
    /* Seeds 0 and 1 are the extremes that random bytes never meet: all zeros, all ones (halves of a key still differ). */
    if (seed < 2) {
        memset(secret, seed ? 0xff : 0, sizeof secret);
        secret[0] = 1;
    }
    o->run(out, secret);   /* once untraced: lazy binding, page faults and one-time set-up are not the operation */
    if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) != 0)
        return 3;
    raise(SIGSTOP);
    int status = o->run(out, secret);
    raise(SIGSTOP);
    operations_release();
    return status == CSVF_OK ? 0 : 1;
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "list") == 0) {
        list();
        return 0;
    }
    if (argc != 5) {
        fprintf(stderr, "usage: ctrace list | ctrace OPERATION KERNEL SEED FILE\n");
        return 2;
    }
    if (!(personality(0xffffffff) & ADDR_NO_RANDOMIZE)) {
        personality(ADDR_NO_RANDOMIZE);
        execv("/proc/self/exe", argv);
        die("execv");
    }
    /* Both processes on one CPU: every step is two switches between them, and switching is dear across CPUs. */
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu() < 0 ? 0 : sched_getcpu(), &one);
    (void)sched_setaffinity(0, sizeof one, &one);
    const operation *o = find(argv[1]);
    uint64_t seed = strtoull(argv[3], NULL, 10);
    FILE *file = fopen(argv[4], "wb");
    if (!file)
        die(argv[4]);
    fflush(NULL);
    pid_t child = fork();
    if (child < 0)
        die("fork");
    if (child == 0)
        _exit(traced(o, argv[2], seed));
    int status;
    if (waitpid(child, &status, 0) < 0)
        die("waitpid");
    if (!WIFSTOPPED(status) || WSTOPSIG(status) != SIGSTOP) {
        fprintf(stderr, "ctrace: the operation did not start (status %#x)\n", (unsigned)status);
        return 3;
    }
    unsigned long steps = 0;
    for (;;) {
        if (ptrace(PTRACE_SINGLESTEP, child, NULL, NULL) != 0)
            die("single step");
        if (waitpid(child, &status, 0) < 0)
            die("waitpid");
        if (!WIFSTOPPED(status)) {
            fprintf(stderr, "ctrace: the operation ended early (status %#x)\n", (unsigned)status);
            return 3;
        }
        if (WSTOPSIG(status) == SIGSTOP)
            break;
        struct user_regs_struct r;
        if (ptrace(PTRACE_GETREGS, child, NULL, &r) != 0)
            die("registers");
        uint64_t words[18] = {r.rip, r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.rsp,
                              r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, r.fs_base};
        if (fwrite(words, sizeof words, 1, file) != 1)
            die("write");
        if (++steps > 20000000) {
            fprintf(stderr, "ctrace: more than 20 million steps\n");
            return 3;
        }
    }
    if (fclose(file) != 0)
        die("write");
    ptrace(PTRACE_CONT, child, NULL, NULL);
    if (waitpid(child, &status, 0) < 0 || !WIFEXITED(status) || WEXITSTATUS(status) != 0) {
        fprintf(stderr, "ctrace: the operation failed (status %#x)\n", (unsigned)status);
        return 1;
    }
    printf("%lu\n", steps);
    return 0;
}
