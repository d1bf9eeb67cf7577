/* userfaultfd(2): opening it, reading faults, mapping and protecting pages. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "vmram.h"

#ifndef USERFAULTFD_IOC_NEW     /* Linux 6.1; older headers lack it */
#  define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

static const char forbidden[] =
    "userfaultfd is forbidden to this user: run as root (CAP_SYS_PTRACE), or let the administrator set vm.unprivileged_userfaultfd=1 "
    "or open /dev/userfaultfd to you";
static const char missing[] = "this kernel has no userfaultfd, or a sandbox blocks the system call";
static const char too_old[] = "this kernel's userfaultfd cannot write-protect memory (Linux 5.7 on x86-64 can)";
static const char exhausted[] = "userfaultfd could not be opened: too many open files, or no memory";

int csvf__userfault_open(int *result, const char **reason)
{
    const char *ignored;
    if (!reason)
        reason = &ignored;
    *reason = NULL;
    *result = -1;
    /* Not UFFD_USER_MODE_ONLY, which needs no privilege: the VMM's read(2) into guest memory faults inside the kernel. */
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    int error = errno;
    if (fd < 0 && (error == EPERM || error == ENOSYS)) {
        const int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
        if (device >= 0) {
            fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
            close(device);
        }
    }
    if (fd < 0) {
        *reason = error == EPERM ? forbidden : error == ENOSYS ? missing : exhausted;
        errno = error;
        return CSVF_ERR_SYSTEM;
    }
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP};
    if (ioctl(fd, UFFDIO_API, &api) || !(api.features & UFFD_FEATURE_PAGEFAULT_FLAG_WP)) {
        close(fd);
        *reason = too_old;
        errno = EOPNOTSUPP;
        return CSVF_ERR_SYSTEM;
    }
    *result = fd;
    return CSVF_OK;
}

int csvf__userfault_register(int fd, void *ram, size_t size)
{
    struct uffdio_register range = {.range = {(uintptr_t)ram, size},
                                    .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP};
    return ioctl(fd, UFFDIO_REGISTER, &range) ? CSVF_ERR_SYSTEM : CSVF_OK;
}

int csvf__userfault_read(csvf_vmram *vmram, csvf__fault *faults, int room)
{
    struct uffd_msg messages[16];
    if (room > 16)
        room = 16;
    const ssize_t got = read(vmram->userfault, messages, (size_t)room * sizeof messages[0]);
    if (got < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : -1;
    const int count = (int)((size_t)got / sizeof messages[0]);
    int used = 0;
    for (int i = 0; i < count; i++) {
        if (messages[i].event != UFFD_EVENT_PAGEFAULT)
            continue;
        const uint64_t flags = messages[i].arg.pagefault.flags;
        faults[used++] = (csvf__fault){
            .page = (uint32_t)((messages[i].arg.pagefault.address - (uintptr_t)vmram->ram) / CSVF_PAGE_BYTES),
            .is_write = (flags & UFFD_PAGEFAULT_FLAG_WRITE) != 0,
            .is_protection = (flags & UFFD_PAGEFAULT_FLAG_WP) != 0,
        };
    }
    return used;
}

static uint64_t place_of(const csvf_vmram *vmram, uint32_t page)
{
    return (uintptr_t)vmram->ram + (uint64_t)page * CSVF_PAGE_BYTES;
}

int csvf__userfault_copy(csvf_vmram *vmram, int *present, uint32_t first, const uint8_t *plain, uint32_t count, int is_protected)
{
    while (count) {
        struct uffdio_copy copy = {.dst = place_of(vmram, first), .src = (uintptr_t)plain,
                                   .len = (uint64_t)count * CSVF_PAGE_BYTES,
                                   .mode = is_protected ? UFFDIO_COPY_MODE_WP : 0};
        if (ioctl(vmram->userfault, UFFDIO_COPY, &copy) == 0)
            return CSVF_OK;
        uint32_t done = copy.copy > 0 ? (uint32_t)(copy.copy / CSVF_PAGE_BYTES) : 0;
        if (done == 0 && errno == EEXIST) {
            if (present)
                *present = 1;
            csvf__userfault_wake(vmram, first, 1);
            done = 1;
        } else if (done == 0 && errno != EAGAIN && errno != EINTR) {
            return CSVF_ERR_SYSTEM;
        }
        first += done;
        plain += (size_t)done * CSVF_PAGE_BYTES;
        count -= done;
    }
    return CSVF_OK;
}

static int set_protection(csvf_vmram *vmram, uint32_t first, uint32_t count, uint64_t mode)
{
    struct uffdio_writeprotect protection = {.range = {place_of(vmram, first), (uint64_t)count * CSVF_PAGE_BYTES}, .mode = mode};
    int result;
    do
        result = ioctl(vmram->userfault, UFFDIO_WRITEPROTECT, &protection);
    while (result && (errno == EAGAIN || errno == EINTR));
    return result ? CSVF_ERR_SYSTEM : CSVF_OK;
}

int csvf__userfault_protect(csvf_vmram *vmram, uint32_t first, uint32_t count)
{
    return set_protection(vmram, first, count, UFFDIO_WRITEPROTECT_MODE_WP);
}

int csvf__userfault_unprotect(csvf_vmram *vmram, uint32_t first, uint32_t count)
{
    return set_protection(vmram, first, count, 0);
}

void csvf__userfault_wake(csvf_vmram *vmram, uint32_t first, uint32_t count)
{
    struct uffdio_range range = {place_of(vmram, first), (uint64_t)count * CSVF_PAGE_BYTES};
    (void)ioctl(vmram->userfault, UFFDIO_WAKE, &range);
}

int csvf__userfault_complete(csvf_vmram *vmram, uint32_t first, uint32_t count, const uint8_t *zeros)
{
    unsigned char present[CSVF_VMRAM_READ_AHEAD_MAX];
    for (uint32_t done = 0, some; done < count; done += some) {
        some = count - done < CSVF_VMRAM_READ_AHEAD_MAX ? count - done : CSVF_VMRAM_READ_AHEAD_MAX;
        if (mincore((void *)(uintptr_t)place_of(vmram, first + done), (size_t)some * CSVF_PAGE_BYTES, present))
            return CSVF_ERR_SYSTEM;
        /* One in the swap counts as absent as well: the copy then finds it, and leaves it alone. */
        for (uint32_t i = 0; i < some; i++)
            if (!(present[i] & 1) && csvf__userfault_copy(vmram, NULL, first + done + i, zeros, 1, 1) != CSVF_OK)
                return CSVF_ERR_SYSTEM;
    }
    return CSVF_OK;
}

int csvf__userfault_drop(void *start, size_t length)
{
    return syscall(SYS_madvise, start, length, MADV_DONTNEED) ? CSVF_ERR_SYSTEM : CSVF_OK;
}

int csvf_vmram_probe(const char **reason)
{
    int fd;
    const int status = csvf__userfault_open(&fd, reason);
    if (status == CSVF_OK)
        close(fd);
    return status;
}
