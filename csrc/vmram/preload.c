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

#include "../include/csvfast_vmram.h"

#define EXPORT __attribute__((visibility("default")))

enum { MAPPINGS_MAX = 16, EXIT_ENVIRONMENT = 3, MADVISE_COLLAPSE = 25 /* MADV_COLLAPSE, Linux 6.1 */ };

typedef struct mapping {
    csvf_vmram *vmram;
    uintptr_t start;
    size_t size;
    dev_t device;
    ino_t inode;
    char path[PATH_MAX];
} mapping;

static pthread_mutex_t table_lock = PTHREAD_MUTEX_INITIALIZER;
static mapping mappings[MAPPINGS_MAX];
static _Atomic int mapping_count;       /* slots in use: 0 lets every munmap and madvise pass at once */
static uint64_t next_address;           /* two memories under one key must not share data units */
static uint8_t *key;                    /* a page of its own: not in core dumps, zeros in children */
static int is_statistics_running, was_used;
static _Atomic int is_ended;
static __thread int is_inside;         /* this thread is in one of the calls below: what the library calls in turn is its own */
static pid_t owner;

/* ---- Words to the user: one line, by one write ---- */

static __attribute__((format(printf, 1, 2))) void say(const char *format, ...)
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

/* ---- The environment ---- */

/* Out: *value, within least .. most. An unset variable gives 0. Returns: 1, or 0 after a line that says why. */
static int read_number(uint32_t *value, const char *name, uint32_t most)
{
    const char *text = getenv(name);
    *value = 0;
    if (!text || !*text)
        return 1;
    char *end;
    errno = 0;
    const unsigned long number = strtoul(text, &end, 10);
    if (errno || *end || *text < '0' || *text > '9' || number < 1 || number > most) {
        say("%s is '%s': a whole number from 1 to %u is needed", name, text, most);
        return 0;
    }
    *value = (uint32_t)number;
    return 1;
}

/* "64M", "67108864", or a share of the memory: "1/8". Returns: 1, or 0 after a line. */
static int read_window(size_t *window, size_t size)
{
    const char *text = getenv("CSVFAST_VMRAM_WINDOW");
    if (!text || !*text)
        text = "1/4";
    char *end;
    errno = 0;
    unsigned long long number = strtoull(text, &end, 10);
    int is_good = errno == 0 && end != text && *text >= '0' && *text <= '9';
    if (is_good && *end == '/') {
        const char *divisor_text = end + 1;
        const unsigned long long divisor = strtoull(divisor_text, &end, 10);
        is_good = errno == 0 && end != divisor_text && *divisor_text >= '0' && *divisor_text <= '9' && *end == 0 && divisor > 0 && number <= divisor;
        if (is_good)
            number = (unsigned long long)((long double)size / (long double)divisor * (long double)number);
    } else if (is_good && *end) {
        const char *unit = strchr("KMGT", *end);
        is_good = unit && end[1] == 0 && number <= ULLONG_MAX >> 40;
        if (is_good)
            number <<= 10 * (unit - "KMGT" + 1);
    }
    if (!is_good) {
        say("CSVFAST_VMRAM_WINDOW is '%s': bytes with K, M or G, or a share like 1/8, are needed", text);
        return 0;
    }
    number = number / CSVF_PAGE_BYTES * CSVF_PAGE_BYTES;
    if (number < CSVF_VMRAM_WINDOW_MIN) {
        say("CSVFAST_VMRAM_WINDOW is '%s': a window of %llu bytes holds no machine, at least %zu are needed", text, number,
            CSVF_VMRAM_WINDOW_MIN);
        return 0;
    }
    *window = number > SIZE_MAX ? SIZE_MAX / CSVF_PAGE_BYTES * CSVF_PAGE_BYTES : (size_t)number;
    return 1;
}

/* Exactly 32 bytes and then the end, which is how a pipe or file of another length is noticed. */
static int read_key_from(int fd, const char *name)
{
    uint8_t bytes[CSVF_XTS_KEY_BYTES + 1];
    size_t got = 0;
    while (got < sizeof bytes) {
        const ssize_t more = read(fd, bytes + got, sizeof bytes - got);
        if (more < 0 && errno == EINTR)
            continue;
        if (more <= 0)
            break;
        got += (size_t)more;
    }
    const int is_good = got == CSVF_XTS_KEY_BYTES;
    if (is_good)
        memcpy(key, bytes, CSVF_XTS_KEY_BYTES);
    else
        say("%s holds %s bytes: a key is exactly %u (K1, then K2)", name, got > CSVF_XTS_KEY_BYTES ? "more" : "fewer", CSVF_XTS_KEY_BYTES);
    csvf_wipe(bytes, sizeof bytes);
    return is_good;
}

static int fill_key(void)
{
    const char *path = getenv("CSVFAST_VMRAM_KEY_FILE"), *number = getenv("CSVFAST_VMRAM_KEY_FD");
    if (path && *path && number && *number) {
        say("both CSVFAST_VMRAM_KEY_FILE and CSVFAST_VMRAM_KEY_FD are set: which is it?");
        return 0;
    }
    if (number && *number) {
        char *end;
        errno = 0;
        const long fd = strtol(number, &end, 10);
        if (errno || *end || fd < 0 || fd > INT_MAX || fcntl((int)fd, F_GETFD) < 0) {
            say("CSVFAST_VMRAM_KEY_FD is '%s', which is no open file descriptor", number);
            return 0;
        }
        const int is_good = read_key_from((int)fd, "CSVFAST_VMRAM_KEY_FD");
        close((int)fd);
        return is_good;
    }
    if (path && *path) {
        const int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0) {
            say("CSVFAST_VMRAM_KEY_FILE '%s' cannot be opened: %s", path, strerror(errno));
            return 0;
        }
        const int is_good = read_key_from(fd, "CSVFAST_VMRAM_KEY_FILE");
        close(fd);
        return is_good;
    }
    for (size_t got = 0; got < CSVF_XTS_KEY_BYTES;) {
        const ssize_t more = getrandom(key + got, CSVF_XTS_KEY_BYTES - got, 0);
        if (more < 0 && errno != EINTR) {
            say("the system gives no random key: %s", strerror(errno));
            return 0;
        }
        got += more > 0 ? (size_t)more : 0;
    }
    return 1;
}

static int read_key(void)
{
    if (key)
        return 1;
    void *page = mmap(NULL, CSVF_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) {
        say("no memory for the key");
        return 0;
    }
    (void)syscall(SYS_madvise, page, CSVF_PAGE_BYTES, MADV_DONTDUMP);
    (void)syscall(SYS_madvise, page, CSVF_PAGE_BYTES, MADV_WIPEONFORK);
    key = page;
    if (fill_key())
        return 1;
    csvf_wipe(page, CSVF_PAGE_BYTES);
    key = NULL;
    syscall(SYS_munmap, page, CSVF_PAGE_BYTES);
    return 0;
}

/* ---- Statistics: a file that is whole whenever it is read ---- */

static void write_json_text(FILE *file, const char *text)
{
    fputc('"', file);
    for (const unsigned char *c = (const unsigned char *)text; *c; c++)
        if (*c == '"' || *c == '\\')
            fprintf(file, "\\%c", *c);
        else if (*c < 0x20)
            fprintf(file, "\\u%04x", *c);
        else
            fputc(*c, file);
    fputc('"', file);
}

static void write_statistics(const char *path)
{
    char temporary[PATH_MAX + 16];
    snprintf(temporary, sizeof temporary, "%s.%d", path, (int)getpid());
    FILE *file = fopen(temporary, "we");
    if (!file)
        return;
    fputs("[", file);
    const char *separator = "";
    for (int i = 0; i < MAPPINGS_MAX; i++) {
        csvf_vmram_stats s = {.struct_size = sizeof s};
        if (!mappings[i].vmram || csvf_vmram_get_stats(mappings[i].vmram, &s) != CSVF_OK)
            continue;
        fprintf(file, "%s{\"dram\": ", separator);
        write_json_text(file, mappings[i].path);
        const struct { const char *name; uint64_t value; } fields[] = {
            {"size", s.size}, {"window_size", s.window_size}, {"resident", s.resident}, {"resident_peak", s.resident_peak},
            {"faults", s.faults}, {"write_faults", s.write_faults}, {"pages_ahead", s.pages_ahead}, {"pages_zero", s.pages_zero},
            {"evictions", s.evictions}, {"evictions_clean", s.evictions_clean}, {"pages_discarded", s.pages_discarded},
            {"bytes_encrypted", s.bytes_encrypted}, {"bytes_decrypted", s.bytes_decrypted},
        };
        for (size_t f = 0; f < sizeof fields / sizeof fields[0]; f++)
            fprintf(file, ", \"%s\": %llu", fields[f].name, (unsigned long long)fields[f].value);
        fprintf(file, ", \"failure\": %d}", s.failure);
        separator = ",\n ";
    }
    fputs("]\n", file);
    if (fclose(file) || rename(temporary, path))
        unlink(temporary);
}

static void *statistics_thread(void *path)
{
    for (;;) {
        pthread_mutex_lock(&table_lock);
        write_statistics(path);
        pthread_mutex_unlock(&table_lock);
        usleep(500000);
    }
    return NULL;
}

static void start_statistics(void)
{
    static char path[PATH_MAX];
    const char *wanted = getenv("CSVFAST_VMRAM_STATS");
    if (is_statistics_running || !wanted || !*wanted || strlen(wanted) >= sizeof path)
        return;
    strcpy(path, wanted);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    if (pthread_create(&thread, NULL, statistics_thread, path) == 0) {
        pthread_detach(thread);
        is_statistics_running = 1;
    } else {
        say("no thread for the statistics: %s is not written while the machine runs", path);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* ---- Mappings ---- */

static void report(void *context, int status, const char *text)
{
    const mapping *about = context;
    say("%s: %s", about->path, text);
    if (status != CSVF_OK)
        _exit(EXIT_ENVIRONMENT);    /* a machine without a part of its memory has nothing left to do */
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

/* Needs the lock. Returns: the memory, or MAP_FAILED after a line and with errno. */
static void *map_dram(const char *path, void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
    uint32_t threads, read_ahead;
    size_t window;
    struct stat about;
    const size_t size = (length + CSVF_PAGE_BYTES - 1) / CSVF_PAGE_BYTES * CSVF_PAGE_BYTES;
    errno = EINVAL;
    if (size < length || size == 0 || is_ended)
        return MAP_FAILED;
    if (!(protection & PROT_WRITE) || (protection & PROT_EXEC)) {
        say("%s is mapped read-only or executable: guest memory is readable and writable", path);
        return MAP_FAILED;
    }
    if (fstat(fd, &about))
        return MAP_FAILED;
    mapping *slot = NULL;
    for (int i = MAPPINGS_MAX; i--;)
        if (!mappings[i].vmram) {
            slot = &mappings[i];
        } else if (mappings[i].device == about.st_dev && mappings[i].inode == about.st_ino) {
            say("%s is mapped a second time: two memories cannot share one DRAM file", path);
            errno = EBUSY;
            return MAP_FAILED;
        }
    if (!slot) {
        say("%s is more than the %d mappings there is room for", path, MAPPINGS_MAX);
        errno = ENOMEM;
        return MAP_FAILED;
    }
    if (!read_window(&window, size) || !read_number(&threads, "CSVFAST_VMRAM_THREADS", CSVF_VMRAM_THREADS_MAX) ||
        !read_number(&read_ahead, "CSVFAST_VMRAM_READ_AHEAD", CSVF_VMRAM_READ_AHEAD_MAX)) {
        errno = EINVAL;
        return MAP_FAILED;
    }
    const char *reason = NULL;
    if (csvf_vmram_probe(&reason) != CSVF_OK) {
        const int saved = errno;
        say("%s cannot be encrypted: %s", path, why(CSVF_ERR_SYSTEM, reason));
        errno = saved;
        return MAP_FAILED;
    }
    if (csvf_init() != CSVF_OK) {
        say("CSVFAST_KERNEL names a kernel that is unknown or that this CPU cannot run");
        errno = EINVAL;
        return MAP_FAILED;
    }
    if (!read_key()) {
        errno = EINVAL;
        return MAP_FAILED;
    }
    const csvf_vmram_config config = {
        .struct_size = sizeof config, .window_size = window, .at = flags & MAP_FIXED ? address : NULL,
        .threads = threads, .read_ahead = read_ahead, .report = report, .report_context = slot,
    };
    snprintf(slot->path, sizeof slot->path, "%s", path);
    const int status = csvf_vmram_create_with_key(&slot->vmram, key, CSVF_XTS_KEY_BYTES, fd, (uint64_t)offset, next_address, size, &config);
    if (status != CSVF_OK) {
        const int saved = errno;
        say("%s cannot be encrypted memory of %zu bytes: %s", path, size, why(status, NULL));
        errno = status == CSVF_ERR_SYSTEM ? saved : status == CSVF_ERR_MEMORY ? ENOMEM : EINVAL;
        return MAP_FAILED;
    }
    next_address += size;
    slot->start = (uintptr_t)csvf_vmram_memory(slot->vmram);
    slot->size = size;
    slot->device = about.st_dev;
    slot->inode = about.st_ino;
    atomic_fetch_add(&mapping_count, 1);
    was_used = 1;
    owner = getpid();
    start_statistics();
    return (void *)slot->start;
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
    if (is_inside)
        return real_mmap(address, length, protection, flags, fd, offset);
    is_inside = 1;
    pthread_mutex_lock(&table_lock);
    void *memory = map_dram(path, address, length, protection, flags, fd, offset);
    pthread_mutex_unlock(&table_lock);
    is_inside = 0;
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
    if (!is_inside && is_watching()) {
        is_inside = 1;
        pthread_mutex_lock(&table_lock);
        for (int i = 0; i < MAPPINGS_MAX; i++)
            if (mappings[i].vmram && mappings[i].start - start < length) {
                csvf_vmram *vmram = mappings[i].vmram;
                if (csvf_vmram_flush(vmram) == CSVF_OK)
                    csvf_vmram_destroy(vmram);
                mappings[i].vmram = NULL;
                atomic_fetch_sub(&mapping_count, 1);
            }
        pthread_mutex_unlock(&table_lock);
        is_inside = 0;
    }
    return (int)syscall(SYS_munmap, address, length);
}

/* What would give the guest's pages to huge pages, to the kernel's merging, to children or to core dumps is agreed to and left undone;
 * giving pages back makes them zeros, as the program expects. */
EXPORT int madvise(void *address, size_t length, int advice)
{
    const uintptr_t start = (uintptr_t)address;
    if (!is_inside && is_watching()) {
        is_inside = 1;
        int is_ours = 0, status = CSVF_OK;
        pthread_mutex_lock(&table_lock);
        for (int i = 0; i < MAPPINGS_MAX && !is_ours; i++) {
            mapping *m = &mappings[i];
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
        pthread_mutex_unlock(&table_lock);
        is_inside = 0;
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
    say("CSVFAST_VMRAM_PATH is not set: the path that the DRAM file begins with is needed");
    _exit(EXIT_ENVIRONMENT);
}

/* At an ordinary exit the whole memory is in the DRAM, encrypted. */
__attribute__((destructor)) static void end(void)
{
    if (!was_used || owner != getpid())
        return;
    is_inside = 1;
    pthread_mutex_lock(&table_lock);
    for (int i = 0; i < MAPPINGS_MAX; i++)
        if (mappings[i].vmram && csvf_vmram_flush(mappings[i].vmram) != CSVF_OK)
            say("%s: the last changes could not be encrypted into it", mappings[i].path);
    const char *path = getenv("CSVFAST_VMRAM_STATS");
    if (path && *path)
        write_statistics(path);
    csvf_wipe(key, CSVF_XTS_KEY_BYTES);
    is_ended = 1;
    atomic_store(&mapping_count, 0);    /* nobody waits for the lock any more, whatever is unmapped from here on */
    pthread_mutex_unlock(&table_lock);
}
