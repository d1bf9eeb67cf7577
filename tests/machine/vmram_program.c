/* A program that maps a DRAM file as a VMM does, and does to its memory what it reads on its standard input, line by line:
 *
 *     w OFFSET BYTE       fills the page at OFFSET           r OFFSET        prints the first byte, and whether all of the page is alike
 *     t OFFSET            prints the page as text            q               ends, as a program that returns from main
 *
 * Arguments: PATH MEBIBYTES. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    const size_t size = strtoul(argv[2], NULL, 10) << 20;
    const int fd = open(argv[1], O_RDWR | O_CLOEXEC);
    unsigned char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED) {
        perror("mmap");
        return 1;
    }
    printf("mapped\n");
    fflush(stdout);
    char line[200];
    while (fgets(line, sizeof line, stdin)) {
        unsigned long offset = 0;
        unsigned byte = 0;
        const int fields = sscanf(line + 1, "%lu %u", &offset, &byte);
        unsigned char *page = memory + offset;
        if (line[0] == 'q')
            return 0;
        if (fields < 1 || offset + 4096 > size)
            return 2;
        if (line[0] == 'w') {
            memset(page, (int)byte, 4096);
            printf("ok\n");
        } else if (line[0] == 't') {
            printf("%.*s\n", 4096, (const char *)page);
        } else {
            int is_alike = 1;
            for (int i = 1; i < 4096; i++)
                is_alike &= page[i] == page[0];
            printf("%u %d\n", page[0], is_alike);
        }
        fflush(stdout);
    }
    return 0;
}
