/* libcsvfast-vmram-preload.so: gives an unmodified VMM encrypted guest memory.
 *
 *     LD_PRELOAD=libcsvfast-vmram-preload.so CSVFAST_VMRAM_PATH=/dev/shm/guest.dram CSVFAST_VMRAM_WINDOW=1/8 \
 *         qemu-system-x86_64 -object memory-backend-file,id=ram,size=1G,mem-path=/dev/shm/guest.dram,share=on -machine memory-backend=ram ...
 *
 * Where the program maps a file whose path begins with CSVFAST_VMRAM_PATH, it gets a csvf_vmram with that file as DRAM instead. mmap, munmap
 * and madvise are the only calls taken over, and of these only what concerns such a mapping. If it cannot be had, the mmap fails: the
 * program never runs on unencrypted memory instead. docs/encrypted-ram.md lists the environment.
 *
 * The calls go to the kernel directly: no dlsym, which may allocate and so map. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "preload.h"

#define EXPORT __attribute__((visibility("default")))

enum { MADVISE_COLLAPSE = 25 /* MADV_COLLAPSE, Linux 6.1 */ };

pthread_mutex_t preload_lock = PTHREAD_MUTEX_INITIALIZER;
preload_mapping preload_mappings[PRELOAD_MAPPINGS_MAX];
__thread int preload_is_inside;
static _Atomic int mapping_count;       /* slots in use: 0 lets every munmap and madvise pass at once */
static uint64_t next_address;           /* two memories under one key must not share data units */
static int was_used;
static _Atomic int is_ended;
static pid_t owner;

/* ---- Words to the user: one line, by one write ---- */

void preload_say(const char *format, ...)
{
    char line[PATH_MAX + 400] = "csvfast-vmram: ";
    const size_t prefix = strlen(line);
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line + prefix, sizeof line - prefix - 1, format, arguments);
    va_end(arguments);
    if (length < 0)
        return;
    size_t end = prefix + (size_t)length < sizeof line - 1 ? prefix + (size_t)length : sizeof line - 2;
    line[end++] = '\n';
    if (write(STDERR_FILENO, line, end) < 0)
        return;
}

int preload_start_thread(void *(*body)(void *), void *context)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    const int error = pthread_create(&thread, NULL, body, context);
    if (error == 0)
        pthread_detach(thread);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

/* ---- Mappings ---- */

static void report(void *context, int status, const char *text)
{
    const preload_mapping *about = context;
    preload_say("%s: %s", about->path, text);
    if (status == CSVF_OK)
        return;
    preload_remove_control();
    _exit(PRELOAD_EXIT);    /* a machine without a part of its memory has nothing left to do */
}

/* Out: path of an open file as the kernel names it. Returns: 1 if it begins with CSVFAST_VMRAM_PATH. */
static int is_dram(char path[PATH_MAX], int fd)
{
    const char *wanted = getenv("CSVFAST_VMRAM_PATH");
    char link[64];
    if (fd < 0 || !wanted || !*wanted)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length <= 0)
        return 0;
    path[length] = 0;
    return strncmp(path, wanted, strlen(wanted)) == 0;
}

static const char *why(int status, const char *reason)
{
    if (reason)
        return reason;
    return status == CSVF_ERR_SYSTEM ? strerror(errno) : csvf_status_text(status);
}

/* Makes the memory in the slot. Returns: its first byte, or MAP_FAILED after a line and with errno. */
static void *make_memory(preload_mapping *slot, const preload_settings *settings, const char *path, void *address, size_t size, int fd,
                         uint64_t place)
{
    const uint8_t *key;
    const char *reason = NULL;
    if (csvf_vmram_probe(&reason) != CSVF_OK) {
        const int saved = errno;
        preload_say("%s cannot be encrypted: %s", path, why(CSVF_ERR_SYSTEM, reason));
        errno = saved;
        return MAP_FAILED;
    }
    errno = EINVAL;
    if (csvf_init() != CSVF_OK) {
        preload_say("CSVFAST_KERNEL names a kernel that is unknown or that this CPU cannot run");
        return MAP_FAILED;
    }
    /* Who connects already is answered when the mapping is complete. */
    if ((settings->control && !preload_start_control(settings->control)) || !preload_read_key(&key)) {
        errno = EINVAL;
        return MAP_FAILED;
    }
    const csvf_vmram_config config = {
        .struct_size = sizeof config, .window_size = settings->window, .at = address,
        .threads = settings->threads, .read_ahead = settings->read_ahead, .report = report, .report_context = slot,
    };
    snprintf(slot->path, sizeof slot->path, "%s", path);
    /* With an offset, the engine's addresses are the file's, as the platform's are; without one, they count from 0 on. */
    const uint64_t first = settings->is_placed ? place : next_address;
    csvf_vmram *vmram;
    int status = csvf_vmram_create_with_key(&vmram, key, CSVF_XTS_KEY_BYTES, fd, place, first, size, &config);
    for (size_t i = 0; status == CSVF_OK && i < settings->written_count; i++)
        status = csvf_vmram_adopt(vmram, settings->written[i].start, (size_t)settings->written[i].length);
    if (status != CSVF_OK) {
        const int saved = errno;
        csvf_vmram_destroy(vmram);
        preload_say("%s cannot be encrypted memory of %zu bytes at byte %llu: %s", path, size, (unsigned long long)place, why(status, NULL));
        errno = status == CSVF_ERR_SYSTEM ? saved : status == CSVF_ERR_MEMORY ? ENOMEM : EINVAL;
        return MAP_FAILED;
    }
    slot->vmram = vmram;
    slot->start = (uintptr_t)csvf_vmram_memory(vmram);
    slot->size = size;
    return (void *)slot->start;
}

/* Needs the lock. Returns: the memory, or MAP_FAILED after a line and with errno. */
static void *map_dram(const char *path, void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
    preload_settings settings;
    struct stat about;
    const size_t size = (length + CSVF_PAGE_BYTES - 1) / CSVF_PAGE_BYTES * CSVF_PAGE_BYTES;
    errno = EINVAL;
    if (size < length || size == 0 || is_ended)
        return MAP_FAILED;
    if (!(protection & PROT_WRITE) || (protection & PROT_EXEC)) {
        preload_say("%s is mapped read-only or executable: guest memory is readable and writable", path);
        return MAP_FAILED;
    }
    if (fstat(fd, &about))
        return MAP_FAILED;
    preload_mapping *slot = NULL;
    for (int i = PRELOAD_MAPPINGS_MAX; i--;)
        if (!preload_mappings[i].vmram) {
            slot = &preload_mappings[i];
        } else if (preload_mappings[i].device == about.st_dev && preload_mappings[i].inode == about.st_ino) {
            preload_say("%s is mapped a second time: two memories cannot share one DRAM file", path);
            errno = EBUSY;
            return MAP_FAILED;
        }
    if (!slot) {
        preload_say("%s is more than the %d mappings there is room for", path, PRELOAD_MAPPINGS_MAX);
        errno = ENOMEM;
        return MAP_FAILED;
    }
    if (!preload_read_settings(&settings, size)) {
        free(settings.written);
        errno = EINVAL;
        return MAP_FAILED;
    }
    void *memory = MAP_FAILED;
    const uint64_t place = settings.offset + (uint64_t)offset;
    errno = EINVAL;
    if ((uint64_t)about.st_size < place || (uint64_t)about.st_size - place < size) {
        preload_say("%s has %llu bytes: memory of %zu bytes at byte %llu does not fit", path, (unsigned long long)about.st_size, size,
                    (unsigned long long)place);
    } else if (settings.is_single && atomic_load(&mapping_count)) {
        preload_say("%s would be the second memory, but CSVFAST_VMRAM_OFFSET, _WRITTEN and _CONTROL speak of one", path);
        errno = EBUSY;
    } else {
        memory = make_memory(slot, &settings, path, flags & MAP_FIXED ? address : NULL, size, fd, place);
    }
    const int saved = errno;
    free(settings.written);
    if (memory == MAP_FAILED) {
        errno = saved;
        return MAP_FAILED;
    }
    next_address += size;
    slot->device = about.st_dev;
    slot->inode = about.st_ino;
    atomic_fetch_add(&mapping_count, 1);
    was_used = 1;
    owner = getpid();
    preload_start_statistics();
    return memory;
}

static void *real_mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
    return (void *)syscall(SYS_mmap, address, length, protection, flags, fd, offset);
}

EXPORT void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
    char path[PATH_MAX];
    const int saved = errno;
    if (fd < 0 || flags & MAP_ANONYMOUS || !is_dram(path, fd)) {
        errno = saved;
        return real_mmap(address, length, protection, flags, fd, offset);
    }
    if (preload_is_inside)
        return real_mmap(address, length, protection, flags, fd, offset);
    preload_is_inside = 1;
    pthread_mutex_lock(&preload_lock);
    void *memory = map_dram(path, address, length, protection, flags, fd, offset);
    pthread_mutex_unlock(&preload_lock);
    preload_is_inside = 0;
    if (memory != MAP_FAILED)
        errno = saved;
    return memory;
}

EXPORT void *mmap64(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
    return mmap(address, length, protection, flags, fd, offset);
}

/* In a child nothing is mapped here, whatever the inherited table says. */
static int is_watching(void) { return atomic_load(&mapping_count) && owner == getpid(); }

EXPORT int munmap(void *address, size_t length)
{
    const uintptr_t start = (uintptr_t)address;
    if (!preload_is_inside && is_watching()) {
        preload_is_inside = 1;
        pthread_mutex_lock(&preload_lock);
        for (int i = 0; i < PRELOAD_MAPPINGS_MAX; i++)
            if (preload_mappings[i].vmram && preload_mappings[i].start - start < length) {
                csvf_vmram *vmram = preload_mappings[i].vmram;
                if (csvf_vmram_flush(vmram) == CSVF_OK)
                    csvf_vmram_destroy(vmram);
                preload_mappings[i].vmram = NULL;
                atomic_fetch_sub(&mapping_count, 1);
            }
        pthread_mutex_unlock(&preload_lock);
        preload_is_inside = 0;
    }
    return (int)syscall(SYS_munmap, address, length);
}

/* What would give the guest's pages to huge pages, to the kernel's merging, to children or to core dumps is agreed to and left undone;
 * giving pages back makes them zeros, as the program expects. */
EXPORT int madvise(void *address, size_t length, int advice)
{
    const uintptr_t start = (uintptr_t)address;
    if (!preload_is_inside && is_watching()) {
        preload_is_inside = 1;
        int is_ours = 0, status = CSVF_OK;
        pthread_mutex_lock(&preload_lock);
        for (int i = 0; i < PRELOAD_MAPPINGS_MAX && !is_ours; i++) {
            preload_mapping *m = &preload_mappings[i];
            if (!m->vmram || start < m->start || start - m->start >= m->size)
                continue;
            switch (advice) {
            case MADV_DONTNEED:
            case MADV_REMOVE:
            case MADV_FREE: {
                is_ours = 1;
                const size_t rounded = (length + CSVF_PAGE_BYTES - 1) / CSVF_PAGE_BYTES * CSVF_PAGE_BYTES, room = m->size - (start - m->start);
                status = csvf_vmram_discard(m->vmram, start - m->start, rounded < room ? rounded : room);
                break;
            }
            case MADV_HUGEPAGE:
            case MADV_MERGEABLE:
            case MADV_DOFORK:
            case MADV_DODUMP:
            case MADVISE_COLLAPSE:
                is_ours = 1;
                break;
            default:
                break;
            }
        }
        pthread_mutex_unlock(&preload_lock);
        preload_is_inside = 0;
        if (is_ours) {
            if (status != CSVF_OK)
                errno = EINVAL;
            return status == CSVF_OK ? 0 : -1;
        }
    }
    return (int)syscall(SYS_madvise, address, length, advice);
}

__attribute__((constructor)) static void start(void)
{
    const char *path = getenv("CSVFAST_VMRAM_PATH");
    if (path && *path)
        return;
    preload_say("CSVFAST_VMRAM_PATH is not set: the path that the DRAM file begins with is needed");
    _exit(PRELOAD_EXIT);
}

/* At an ordinary exit the whole memory is in the DRAM, encrypted. */
__attribute__((destructor)) static void end(void)
{
    preload_remove_control();
    if (!was_used || owner != getpid())
        return;
    preload_is_inside = 1;
    pthread_mutex_lock(&preload_lock);
    for (int i = 0; i < PRELOAD_MAPPINGS_MAX; i++)
        if (preload_mappings[i].vmram && csvf_vmram_flush(preload_mappings[i].vmram) != CSVF_OK)
            preload_say("%s: the last changes could not be encrypted into it", preload_mappings[i].path);
    preload_write_statistics();
    preload_wipe_key();
    is_ended = 1;
    atomic_store(&mapping_count, 0);    /* nobody waits for the lock any more, whatever is unmapped from here on */
    pthread_mutex_unlock(&preload_lock);
}
