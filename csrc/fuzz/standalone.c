/* Runs a fuzz target over files, or over generated inputs, with any compiler: for sanitizers under gcc and for reproducing findings.
 *   TARGET FILE...          each file once          TARGET --random COUNT [SEED]   generated inputs */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int main(int argc, char **argv)
{
    static uint8_t data[1 << 16];
    if (argc >= 3 && strcmp(argv[1], "--random") == 0) {
        unsigned long count = strtoul(argv[2], NULL, 10);
        uint64_t x = argc > 3 ? strtoull(argv[3], NULL, 10) * 2 + 1 : 88172645463325252u;
        for (unsigned long n = 0; n < count; n++) {
            size_t size = 0;
            x ^= x << 13; x ^= x >> 7; x ^= x << 17;
            size_t wanted = x % 600;
            while (size < wanted) {
                x ^= x << 13; x ^= x >> 7; x ^= x << 17;
                data[size++] = (uint8_t)(x >> 24);
            }
            LLVMFuzzerTestOneInput(data, size);
        }
        printf("%lu passed, 0 failed\n", count);
        return 0;
    }
    for (int i = 1; i < argc; i++) {
        FILE *file = fopen(argv[i], "rb");
        if (!file) {
            perror(argv[i]);
            return 3;
        }
        size_t size = fread(data, 1, sizeof data, file);
        fclose(file);
        LLVMFuzzerTestOneInput(data, size);
    }
    printf("%d passed, 0 failed\n", argc - 1);
    return 0;
}
