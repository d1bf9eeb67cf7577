// A client of `csvfast platform serve` in plain C: docs/processor-socket.md has the protocol.
//
//     cc -o client client.c && ./client processor.sock

#define _GNU_SOURCE
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

// The protocol is little-endian, and so is every machine this is for.
struct header { uint32_t code, length; uint64_t tag; };
struct hello { uint32_t version, cores, asids, zero; uint64_t base, size; };
struct command { uint32_t id, zero; uint64_t address; };

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void receive(int server, void *data, size_t length, int *descriptor)
{
    union { struct cmsghdr header; char space[CMSG_SPACE(sizeof(int))]; } control;
    struct iovec part = {data, length};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    ssize_t count = recvmsg(server, &message, MSG_WAITALL | MSG_CMSG_CLOEXEC);
    if (count != (ssize_t)length)
        fail("recvmsg");
    struct cmsghdr *found = CMSG_FIRSTHDR(&message);
    if (descriptor != NULL && found != NULL && found->cmsg_type == SCM_RIGHTS)
        memcpy(descriptor, CMSG_DATA(found), sizeof *descriptor);
}

// Returns the status; the answer's body stands in `answer`, its length in `*got`.
static uint32_t ask(int server, uint32_t operation, const void *body, uint32_t length, void *answer, uint32_t *got, int *descriptor)
{
    struct header header = {operation, length, 42};
    if (write(server, &header, sizeof header) != (ssize_t)sizeof header || write(server, body, length) != (ssize_t)length)
        fail("write");
    receive(server, &header, sizeof header, descriptor);
    if (header.tag != 42 || header.length > 1024) {
        fprintf(stderr, "not an answer to this request\n");
        exit(1);
    }
    if (header.length > 0)
        receive(server, answer, header.length, NULL);
    *got = header.length;
    return header.code;
}

int main(int argc, char **argv)
{
    struct sockaddr_un place = {.sun_family = AF_UNIX};
    if (argc != 2 || strlen(argv[1]) >= sizeof place.sun_path) {
        fprintf(stderr, "usage: client SOCKET\n");
        return 2;
    }
    strcpy(place.sun_path, argv[1]);
    int server = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (server < 0 || connect(server, (struct sockaddr *)&place, sizeof place) != 0)
        fail(argv[1]);

    uint32_t version = 1, got = 0;
    int dram = -1;
    struct hello hello;
    if (ask(server, 1, &version, sizeof version, &hello, &got, &dram) != 0 || got != sizeof hello || dram < 0) {
        fprintf(stderr, "no HELLO\n");
        return 1;
    }
    printf("memory %" PRIu64 " bytes, %" PRIu32 " cores, %" PRIu32 " ASIDs\n", hello.size, hello.cores, hello.asids);
    uint8_t *memory = mmap(NULL, hello.size, PROT_READ | PROT_WRITE, MAP_SHARED, dram, 0);
    if (memory == MAP_FAILED)
        fail("mmap");

    uint64_t size_alignment[2] = {4096, 4096}, block = 0;
    if (ask(server, 7, size_alignment, sizeof size_alignment, &block, &got, NULL) != 0)
        return 1;
    struct command status = {0x04, 0, block};
    char text[1025];
    if (ask(server, 2, &status, sizeof status, text, &got, NULL) != 0)
        return 1;
    const uint8_t *answer = memory + (block - hello.base);
    uint32_t config;
    memcpy(&config, answer + 4, sizeof config);
    printf("API %d.%d, build %" PRIu32 ", state %d\n", answer[0], answer[1], config >> 1, answer[2]);

    struct command unknown = {0x7ff, 0, block};
    uint32_t refused = ask(server, 2, &unknown, sizeof unknown, text, &got, NULL);
    printf("command 0x7ff: status %#" PRIx32 ", %.*s\n", refused, (int)got, text);
    return 0;
}
