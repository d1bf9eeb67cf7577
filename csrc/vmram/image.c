/* Snapshot and restore of the encrypted image.
 *
 *     0   8  "CSVFVMR1"
 *     8   8  size of the memory, bytes, little-endian like all that follows
 *     16  8  its address in the engine: the tweaks depend on it
 *     24  4  standard (csvf_standard), 28  4  tweak model
 *     32  8  number of pages that were written
 *     40  24 zeros
 *     64     one bit per page, least significant first: was it written? padded with zeros to a multiple of 4096 bytes from the start
 *     then   the ciphertext of those pages, in order
 *
 * Nothing authenticates it, as nothing authenticates the DRAM. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "vmram.h"

enum { HEADER_BYTES = 64, RUN_PAGES = CSVF_VMRAM_READ_AHEAD_MAX };

static const char magic[8] = "CSVFVMR1";

typedef struct header {
    char magic[8];
    uint64_t size, address;
    uint32_t standard, tweak_model;
    uint64_t written;
    uint8_t zeros[24];
} header;

_Static_assert(sizeof(header) == HEADER_BYTES, "the header has no holes");

static header header_of(const csvf_vmram *vmram, uint64_t written)
{
    header head = {.size = vmram->size, .address = vmram->address, .standard = (uint32_t)vmram->engine->standard,
                   .tweak_model = (uint32_t)vmram->engine->tweak_model, .written = written};
    memcpy(head.magic, magic, sizeof magic);
    return head;
}

static int write_all(int fd, const void *data, size_t length, uint64_t at)
{
    for (size_t done = 0; done < length;) {
        const ssize_t put = pwrite(fd, (const uint8_t *)data + done, length - done, (off_t)(at + done));
        if (put < 0 && errno == EINTR)
            continue;
        if (put == 0)
            errno = ENOSPC;
        if (put <= 0)
            return CSVF_ERR_SYSTEM;
        done += (size_t)put;
    }
    return CSVF_OK;
}

static int read_all(int fd, void *data, size_t length, uint64_t at)
{
    for (size_t done = 0; done < length;) {
        const ssize_t got = pread(fd, (uint8_t *)data + done, length - done, (off_t)(at + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got == 0)
            errno = EIO;
        if (got <= 0)
            return CSVF_ERR_SYSTEM;
        done += (size_t)got;
    }
    return CSVF_OK;
}

static size_t front_length(const csvf_vmram *vmram)
{
    return (HEADER_BYTES + ((size_t)vmram->page_count + 7) / 8 + CSVF_PAGE_BYTES - 1) / CSVF_PAGE_BYTES * CSVF_PAGE_BYTES;
}

/* Copies all pages whose bit is set between DRAM and image, in runs. Returns: CSVF_OK, CSVF_ERR_SYSTEM. */
static int copy_pages(csvf_vmram *vmram, const uint8_t *bits, int image, uint64_t at, int to_image)
{
    uint8_t *buffer = vmram->hands[CSVF_VMRAM_THREADS_MAX].cipher;
    for (uint32_t page = 0; page < vmram->page_count;) {
        uint32_t run = 0;
        while (run < RUN_PAGES && page + run < vmram->page_count && bits[(page + run) / 8] >> (page + run) % 8 & 1)
            run++;
        if (run == 0) {
            page++;
            continue;
        }
        const size_t length = (size_t)run * CSVF_PAGE_BYTES;
        const uint64_t place = vmram->offset + (uint64_t)page * CSVF_PAGE_BYTES;
        int status = to_image ? read_all(vmram->fd, buffer, length, place) : read_all(image, buffer, length, at);
        if (status == CSVF_OK)
            status = to_image ? write_all(image, buffer, length, at) : write_all(vmram->fd, buffer, length, place);
        if (status != CSVF_OK)
            return status;
        page += run;
        at += length;
    }
    return CSVF_OK;
}

int csvf_vmram_snapshot(csvf_vmram *vmram, int fd)
{
    if (!vmram)
        return CSVF_ERR_ARGUMENT;
    const size_t front = front_length(vmram);
    uint8_t *start = calloc(1, front);
    if (!start)
        return CSVF_ERR_MEMORY;
    csvf__quiesce(vmram);
    int status = csvf__window_flush(vmram, &vmram->hands[CSVF_VMRAM_THREADS_MAX]);
    uint64_t written = 0;
    for (uint32_t page = 0; page < vmram->page_count; page++)
        if (vmram->pages[page].is_written) {
            start[HEADER_BYTES + page / 8] |= (uint8_t)(1u << page % 8);
            written++;
        }
    const header head = header_of(vmram, written);
    memcpy(start, &head, sizeof head);
    /* The header last: an image that was not finished is none. */
    if (status == CSVF_OK)
        status = ftruncate(fd, 0) || ftruncate(fd, (off_t)(front + written * CSVF_PAGE_BYTES)) ? CSVF_ERR_SYSTEM : CSVF_OK;
    if (status == CSVF_OK)
        status = copy_pages(vmram, start + HEADER_BYTES, fd, front, 1);
    if (status == CSVF_OK)
        status = write_all(fd, start, front, 0);
    csvf__resume(vmram);
    free(start);
    return status;
}

/* Out: *start, allocated, the image's front. Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_LENGTH, CSVF_ERR_MEMORY, CSVF_ERR_SYSTEM. */
static int read_front(uint8_t **start, const csvf_vmram *vmram, int fd)
{
    const size_t front = front_length(vmram);
    struct stat about;
    *start = NULL;
    if (fstat(fd, &about))
        return CSVF_ERR_SYSTEM;
    if (!S_ISREG(about.st_mode))
        return CSVF_ERR_ARGUMENT;
    if ((uint64_t)about.st_size < front)
        return CSVF_ERR_LENGTH;
    uint8_t *bytes = malloc(front);
    if (!bytes)
        return CSVF_ERR_MEMORY;
    int status = read_all(fd, bytes, front, 0);
    if (status == CSVF_OK) {
        uint64_t written = 0;
        for (uint32_t page = 0; page < vmram->page_count; page++)
            written += bytes[HEADER_BYTES + page / 8] >> page % 8 & 1;
        const header expected = header_of(vmram, written);
        if (memcmp(&expected, bytes, sizeof expected) != 0)
            status = CSVF_ERR_ARGUMENT;
        else if ((uint64_t)about.st_size != front + written * CSVF_PAGE_BYTES)
            status = CSVF_ERR_LENGTH;
    }
    if (status != CSVF_OK) {
        free(bytes);
        return status;
    }
    *start = bytes;
    return CSVF_OK;
}

int csvf_vmram_restore(csvf_vmram *vmram, int fd)
{
    if (!vmram)
        return CSVF_ERR_ARGUMENT;
    uint8_t *start;
    int status = read_front(&start, vmram, fd);
    if (status != CSVF_OK)
        return status;
    csvf__quiesce(vmram);
    status = csvf__failure(vmram);
    if (status == CSVF_OK) {
        csvf__window_forget(vmram, 0, vmram->page_count);
        if (copy_pages(vmram, start + HEADER_BYTES, fd, front_length(vmram), 0) != CSVF_OK)
            status = csvf__fail(vmram, CSVF_ERR_SYSTEM, "the image could not be restored into the DRAM file: %s", strerror(errno));
        for (uint32_t page = 0; page < vmram->page_count; page++)
            vmram->pages[page].is_written = start[HEADER_BYTES + page / 8] >> page % 8 & 1;
    }
    csvf__resume(vmram);
    free(start);
    return status;
}
