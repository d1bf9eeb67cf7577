/* The first and only program of the guest in test_vmram_qemu.py, linked statically: fills memory with known text, works on it, and says on the
 * serial console what it has done. Its arguments come from the kernel's command line: work=MEBIBYTES rounds=N stay=0 or 1: after the sum it
 * goes on working until somebody types a line. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <unistd.h>

static unsigned long option(char **environment, const char *name, unsigned long fallback)
{
    for (; *environment; environment++)
        if (!strncmp(*environment, name, strlen(name)) && (*environment)[strlen(name)] == '=')
            return strtoul(*environment + strlen(name) + 1, NULL, 10);
    return fallback;
}

static void stop(void)
{
    fflush(stdout);
    sync();
    usleep(100000);     /* the serial line drains */
    reboot(RB_AUTOBOOT);
    for (;;)
        pause();
}

int main(int argc, char **argv, char **environment)
{
    (void)argc;
    (void)argv;
    const size_t size = option(environment, "work", 16) << 20;
    const unsigned long rounds = option(environment, "rounds", 2), stay = option(environment, "stay", 0);
    uint64_t *words = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    printf("\nguest: started\n");
    if (words == MAP_FAILED) {
        printf("guest: no memory\n");
        stop();
    }
    /* 16 bytes that the test looks for, then a counter and its complement. */
    const char *text = "KNOWN-GUEST-TEXT";
    for (size_t i = 0; i < size / 8; i += 4) {
        memcpy(&words[i], text, 16);
        words[i + 2] = i;
        words[i + 3] = ~i;
    }
    printf("guest: text written\n");
    fflush(stdout);
    uint64_t sum = 0;
    char typed;
    fcntl(0, F_SETFL, O_NONBLOCK);
    for (unsigned long round = 0; round < rounds || (stay && read(0, &typed, 1) < 1); round++) {
        for (size_t i = 0; i < size / 8; i += 4) {
            if (memcmp(&words[i], text, 16) || words[i + 2] != i + round || words[i + 3] != ~i) {
                printf("guest: memory is wrong at word %zu in round %lu\n", i, round);
                stop();
            }
            words[i + 2]++;
            sum = (sum ^ words[i + 2]) * UINT64_C(0x100000001b3);
        }
        if (round + 1 == rounds) {
            printf("guest: sum %016llx\n", (unsigned long long)sum);
            fflush(stdout);
        }
    }
    printf("guest: goodbye\n");
    stop();
}
