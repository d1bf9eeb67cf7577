/* The DRAM file and the cipher between it and the window.
 *
 * pread and pwrite, not a mapping: somebody who cuts the file then costs an error code here, not a SIGBUS in the middle of the VMM. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "vmram.h"

int csvf__fail(csvf_vmram *vmram, int status, const char *format, ...)
{
    int expected = CSVF_OK;
    if (!atomic_compare_exchange_strong(&vmram->failure, &expected, status))
        return expected;
    const int saved = errno;
    char text[300];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (vmram->report)
        vmram->report(vmram->report_context, status, text);
    errno = saved;
    return status;
}

void csvf__no_longer_busy(csvf_vmram *vmram, uint32_t pages)
{
    vmram->busy -= pages;
    if (vmram->busy)
        return;
    /* Not while a thread encrypts from the memory: it would be the one to get the SIGSEGV. No plaintext survives this, and a guest that
     * would run on with a part of its memory is stopped at its next access. */
    if (csvf__failure(vmram) && !vmram->is_closed) {
        vmram->is_closed = 1;
        (void)mprotect(vmram->ram, vmram->size, PROT_NONE);
        (void)csvf__userfault_drop(vmram->ram, vmram->size);
        csvf__userfault_wake(vmram, 0, vmram->page_count);
    }
    pthread_cond_broadcast(&vmram->changed);
}

/* Returns: CSVF_OK or the failure, reported. */
static int cipher(csvf_vmram *vmram, uint8_t *out, const uint8_t *in, uint32_t first, uint32_t count, int decrypt)
{
    csvf__access access;
    if (csvf__access_begin(&access, vmram->engine, vmram->asid) != CSVF_OK)
        return csvf__fail(vmram, CSVF_ERR_ASID, "ASID %u has no key any more: its memory cannot be read or kept", vmram->asid);
    csvf__transform(&access, out, in, vmram->address + (uint64_t)first * CSVF_PAGE_BYTES, (size_t)count * CSVF_PAGE_BYTES, decrypt);
    csvf__access_end(&access);
    return CSVF_OK;
}

int csvf__dram_load(csvf_vmram *vmram, uint8_t *plain, uint8_t *ciphertext, uint32_t first, uint32_t count)
{
    const size_t length = (size_t)count * CSVF_PAGE_BYTES;
    const uint64_t start = vmram->offset + (uint64_t)first * CSVF_PAGE_BYTES;
    size_t done = 0;
    while (done < length) {
        const ssize_t got = pread(vmram->fd, ciphertext + done, length - done, (off_t)(start + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return csvf__fail(vmram, CSVF_ERR_SYSTEM, "the DRAM file cannot be read: %s", strerror(errno));
        if (got == 0)
            return csvf__fail(vmram, CSVF_ERR_LENGTH, "the DRAM file was truncated: it ends before byte %llu",
                              (unsigned long long)(start + length));
        done += (size_t)got;
    }
    return cipher(vmram, plain, ciphertext, first, count, 1);
}

int csvf__dram_store(csvf_vmram *vmram, uint8_t *ciphertext, const uint8_t *plain, uint32_t first, uint32_t count)
{
    const size_t length = (size_t)count * CSVF_PAGE_BYTES;
    const int status = cipher(vmram, ciphertext, plain, first, count, 0);
    if (status != CSVF_OK)
        return status;
    size_t done = 0;
    while (done < length) {
        const ssize_t put = pwrite(vmram->fd, ciphertext + done, length - done,
                                   (off_t)(vmram->offset + (uint64_t)first * CSVF_PAGE_BYTES + done));
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0)
            return csvf__fail(vmram, CSVF_ERR_SYSTEM, "the DRAM file cannot be written: %s",
                              put < 0 ? strerror(errno) : "nothing was taken");
        done += (size_t)put;
    }
    return CSVF_OK;
}

int csvf__dram_check(csvf_vmram *vmram)
{
    struct stat about;
    if (fstat(vmram->fd, &about))
        return csvf__fail(vmram, CSVF_ERR_SYSTEM, "the DRAM file cannot be examined: %s", strerror(errno));
    if ((uint64_t)about.st_size < vmram->offset + vmram->size)
        return csvf__fail(vmram, CSVF_ERR_LENGTH, "the DRAM file was truncated: %llu bytes are left of %llu",
                          (unsigned long long)about.st_size, (unsigned long long)(vmram->offset + vmram->size));
    if (vmram->had_name && about.st_nlink == 0) {
        pthread_mutex_lock(&vmram->lock);
        const int is_news = !vmram->was_deleted;
        vmram->was_deleted = 1;
        pthread_mutex_unlock(&vmram->lock);
        if (is_news && vmram->report)
            vmram->report(vmram->report_context, CSVF_OK,
                          "the DRAM file was deleted: the memory works on, but nobody can open its ciphertext any more");
    }
    return CSVF_OK;
}
