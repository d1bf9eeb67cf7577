/* Constant time, first proof: every operation runs with its keys and data marked secret, under every kernel the checker can
 * execute. valgrind or MemorySanitizer reports any branch or address that depends on them. Run as
 *   valgrind --error-exitcode=42 ctime        or        a build with -fsanitize=memory (portable kernels: MSan has no rules for AES-NI, GFNI)
 * Run bare it fails: a check that watches nothing must not pass. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkmem.h"
#include "secret_operations.h"

static uint8_t secret[OPERATION_SECRET_BYTES], out[OPERATION_OUT_BYTES];

/* `ctime leak` runs only the controls that leak on purpose; the checker must end it with its error code. */
static int leak(void)
{
    for (size_t i = 0; i < OPERATION_COUNT; i++) {
        SECRET(secret, sizeof secret);
        if (OPERATIONS[i].leaks)
            OPERATIONS[i].run(out, secret);
    }
    return 0;
}

int main(int argc, char **argv)
{
    if (!CHECKMEM_RUNNING()) {
        fprintf(stderr, "ctime: run under valgrind or build with -fsanitize=memory\n");
        return 3;
    }
    if (argc > 1 && strcmp(argv[1], "leak") == 0)
        return leak();
    if (csvf_init() != CSVF_OK || operations_prepare() != CSVF_OK)
        return 3;
    unsigned passed = 0, failed = 0;
    for (size_t i = 0; i < OPERATION_COUNT; i++) {
        const operation *o = &OPERATIONS[i];
        if (o->leaks)
            continue;
        for (size_t k = 0; k < csvf_kernel_count(o->primitive); k++) {
            const char *kernel = csvf_kernel_at(o->primitive, k);
            if (!csvf_kernel_available(o->primitive, kernel) || csvf_force_kernel(o->primitive, kernel) != CSVF_OK)
                continue;
            for (size_t b = 0; b < sizeof secret; b++)
                secret[b] = (uint8_t)(b * 167 + b / 251 + 1);
            SECRET(secret, sizeof secret);
            int status = o->run(out, secret);
            PUBLIC(&status, sizeof status);
            PUBLIC(out, sizeof out);
            PUBLIC(secret, sizeof secret);
            printf("%s %-28s %s\n", status == CSVF_OK ? "ok  " : "FAIL", o->name, kernel);
            if (status == CSVF_OK) passed++; else failed++;
        }
        csvf_force_kernel(o->primitive, NULL);
    }
    operations_release();
    printf("constant time under %s: %u passed, %u failed\n", CHECKMEM_NAME, passed, failed);
    return failed ? 1 : 0;
}
