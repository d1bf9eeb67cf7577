// A client of `csvfast platform serve` in plain C, without csvfast's code: launches a guest, asks how it is, and ends it.
// docs/processor-socket.md has the protocol, docs/mailbox.md every parameter block.
//
//     cc -o processor_client processor_client.c && ./processor_client processor.sock

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

// Where everything is: the connection, the DRAM as it is mapped here, and a page for parameter blocks.
struct host { int server; uint8_t *memory; struct hello hello; uint64_t page; };

static uint8_t *at(struct host *host, uint64_t address) { return host->memory + (address - host->hello.base); }

static uint64_t allocate(struct host *host, uint64_t size)
{
    uint64_t size_alignment[2] = {size, 4096}, address = 0;
    uint32_t got;
    char text[1025];
    uint32_t status = ask(host->server, 7, size_alignment, sizeof size_alignment, text, &got, NULL);
    if (status != 0 || got != sizeof address) {
        fprintf(stderr, "ALLOCATE: status %#" PRIx32 "\n", status);
        exit(1);
    }
    memcpy(&address, text, sizeof address);
    return address;
}

// Copies the parameter block into the DRAM, has the command done, and copies back what the firmware has written.
static uint32_t run(struct host *host, const char *name, uint32_t id, void *block, size_t length)
{
    struct command command = {id, 0, host->page};
    char text[1025];
    uint32_t got;
    memcpy(at(host, host->page), block, length);
    uint32_t status = ask(host->server, 2, &command, sizeof command, text, &got, NULL);
    memcpy(block, at(host, host->page), length);
    printf("%-20s status %#" PRIx32 "%s%.*s\n", name, status, got ? ": " : "", (int)got, got ? text : "");
    return status;
}

static void need(uint32_t status)
{
    if (status != 0)
        exit(1);
}

int main(int argc, char **argv)
{
    struct sockaddr_un place = {.sun_family = AF_UNIX};
    if (argc != 2 || strlen(argv[1]) >= sizeof place.sun_path) {
        fprintf(stderr, "usage: processor_client SOCKET\n");
        return 2;
    }
    strcpy(place.sun_path, argv[1]);
    struct host host = {.server = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)};
    if (host.server < 0 || connect(host.server, (struct sockaddr *)&place, sizeof place) != 0)
        fail(argv[1]);

    uint32_t version = 1, got = 0;
    int dram = -1;
    if (ask(host.server, 1, &version, sizeof version, &host.hello, &got, &dram) != 0 || got != sizeof host.hello || dram < 0) {
        fprintf(stderr, "no HELLO\n");
        return 1;
    }
    host.memory = mmap(NULL, host.hello.size, PROT_READ | PROT_WRITE, MAP_SHARED, dram, 0);
    if (host.memory == MAP_FAILED)
        fail("mmap");
    host.page = allocate(&host, 4096);

    // Parameter blocks are packed; these have no holes.
    struct { uint32_t handle, policy; uint64_t dh; uint32_t dh_length, zero; uint64_t session; uint32_t session_length; }
        start = {.policy = 5};  // no owner's session
    need(run(&host, "LAUNCH_START", 0x30, &start, 36));
    struct { uint32_t handle, asid; } activate = {start.handle, 3};
    need(run(&host, "ACTIVATE", 0x21, &activate, sizeof activate));

    // The guest's first page: the host puts plaintext there, the firmware measures and encrypts it.
    const char words[] = "what the guest starts with";
    uint64_t image = allocate(&host, 4096), assign[3] = {start.handle, image, 0};
    memcpy(at(&host, image), words, sizeof words);
    char text[1025];
    if (ask(host.server, 9, assign, sizeof assign, text, &got, NULL) != 0)    // from now on the page is the guest's
        return 1;
    struct { uint32_t handle, zero; uint64_t address; uint32_t length; } update = {start.handle, 0, image, 4096};
    need(run(&host, "LAUNCH_UPDATE_DATA", 0x31, &update, 20));
    printf("the host still sees the words: %s\n", memcmp(at(&host, image), words, sizeof words) ? "no" : "yes");

    uint64_t buffer = allocate(&host, 4096);
    update.address = buffer;
    update.length = 48;
    need(run(&host, "LAUNCH_MEASURE", 0x33, &update, 20));
    printf("measurement ");
    for (int i = 0; i < 32; i++)
        printf("%02x", at(&host, buffer)[i]);
    printf("\n");
    need(run(&host, "LAUNCH_FINISH", 0x35, &start.handle, sizeof start.handle));

    struct { uint32_t handle, policy, asid; uint8_t state; } status = {.handle = start.handle};
    need(run(&host, "GUEST_STATUS", 0x23, &status, 13));
    printf("guest %" PRIu32 ": policy %" PRIu32 ", ASID %" PRIu32 ", state %d\n", status.handle, status.policy, status.asid, status.state);

    need(run(&host, "DEACTIVATE", 0x22, &start.handle, sizeof start.handle));
    need(run(&host, "DECOMMISSION", 0x20, &start.handle, sizeof start.handle));
    uint32_t refused = run(&host, "GUEST_STATUS", 0x23, &status, 13);   // there is no such guest any more
    return refused == 0;
}
