/* Life of an encrypted memory. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "vmram.h"

enum {
    THREADS_DEFAULT = 2,
    READ_AHEAD_DEFAULT = 8,
    ZEROS_AHEAD = 4     /* zeros need no SM4: so many times as many pages at once */
};

void csvf__quiesce(csvf_vmram *vmram)
{
    pthread_mutex_lock(&vmram->lock);
    while (vmram->is_quiesced)
        pthread_cond_wait(&vmram->changed, &vmram->lock);
    vmram->is_quiesced = 1;
    while (vmram->busy)
        pthread_cond_wait(&vmram->changed, &vmram->lock);
}

void csvf__resume(csvf_vmram *vmram)
{
    vmram->is_quiesced = 0;
    csvf__no_longer_busy(vmram, 0);     /* closes the memory after a failure, and calls the waiting threads */
    pthread_mutex_unlock(&vmram->lock);
}

static int read_config(csvf_vmram_config *settings, const csvf_vmram_config *config, size_t size)
{
    if (!config || config->struct_size < sizeof *config)
        return CSVF_ERR_ARGUMENT;
    for (size_t i = sizeof *config; i < config->struct_size; i++)
        if (((const uint8_t *)config)[i])
            return CSVF_ERR_ARGUMENT;
    *settings = *config;
    if (settings->threads == 0)
        settings->threads = THREADS_DEFAULT;
    if (settings->read_ahead == 0)
        settings->read_ahead = READ_AHEAD_DEFAULT;
    if (settings->threads > CSVF_VMRAM_THREADS_MAX || settings->read_ahead > CSVF_VMRAM_READ_AHEAD_MAX)
        return CSVF_ERR_ARGUMENT;
    if (size == 0 || size % CSVF_PAGE_BYTES || size / CSVF_PAGE_BYTES >= UINT32_MAX ||
        settings->window_size < CSVF_VMRAM_WINDOW_MIN || settings->window_size % CSVF_PAGE_BYTES)
        return CSVF_ERR_LENGTH;
    if ((uintptr_t)settings->at % CSVF_PAGE_BYTES)
        return CSVF_ERR_ALIGNMENT;
    return CSVF_OK;
}

/* Zeroed, cheap however long, not in core dumps. */
static void *reserve(size_t length)
{
    void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return NULL;
    (void)madvise(memory, length, MADV_DONTDUMP);
    return memory;
}

static size_t clock_length(const csvf_vmram *vmram) { return (size_t)vmram->window * sizeof(uint32_t); }
static size_t pages_length(const csvf_vmram *vmram) { return (size_t)vmram->page_count * sizeof(csvf__page); }

/* With room for a batch; without one, pages are evicted the slower way. */
static void make_pipe(int ends[2])
{
    if (pipe2(ends, O_CLOEXEC | O_NONBLOCK)) {
        ends[0] = ends[1] = -1;
    } else if (fcntl(ends[1], F_SETPIPE_SZ, CSVF__BATCH_MAX * CSVF_PAGE_BYTES) < (int)(CSVF__BATCH_MAX * CSVF_PAGE_BYTES)) {
        close(ends[0]);
        close(ends[1]);
        ends[0] = ends[1] = -1;
    }
}

static int make_tables(csvf_vmram *vmram, uint32_t threads)
{
    enum { SHARE = (CSVF_VMRAM_READ_AHEAD_MAX + CSVF_VMRAM_READ_AHEAD_MAX) * CSVF_PAGE_BYTES };
    _Static_assert((int)CSVF__BATCH_MAX <= (int)CSVF_VMRAM_READ_AHEAD_MAX, "the staging of ciphertext holds a fetch and a batch");
    vmram->pages = reserve(pages_length(vmram));
    vmram->clock = reserve(clock_length(vmram));
    vmram->free_slots = reserve(clock_length(vmram));
    vmram->staging_length = (size_t)(threads + 1) * SHARE;
    vmram->staging = reserve(vmram->staging_length);
    if (vmram->staging)
        (void)madvise(vmram->staging, vmram->staging_length, MADV_WIPEONFORK);
    if (!vmram->pages || !vmram->clock || !vmram->free_slots || !vmram->staging)
        return CSVF_ERR_MEMORY;
    for (uint32_t i = 0; i <= threads; i++) {
        csvf__hands *hands = &vmram->hands[i == threads ? CSVF_VMRAM_THREADS_MAX : i];
        hands->vmram = vmram;
        hands->plain = (uint8_t *)vmram->staging + (size_t)i * SHARE;
        hands->cipher = hands->plain + SHARE / 2;
        if (i < threads)
            make_pipe(hands->taken);
    }
    return CSVF_OK;
}

static int make_memory(csvf_vmram *vmram, void *at)
{
    const char *reason;
    const int status = csvf__userfault_open(&vmram->userfault, &reason);
    if (status != CSVF_OK)
        return status;
    vmram->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (vmram->stop < 0)
        return CSVF_ERR_SYSTEM;
#ifdef SYS_pidfd_open
    vmram->self = (int)syscall(SYS_pidfd_open, getpid(), 0);
#endif
    void *ram = mmap(at, vmram->size, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (at ? MAP_FIXED : 0), -1, 0);
    if (ram == MAP_FAILED)
        return errno == ENOMEM ? CSVF_ERR_MEMORY : CSVF_ERR_SYSTEM;
    vmram->ram = ram;
    vmram->is_placed = at != NULL;
    /* One page at a time may come and go; a child has no use for a copy of the window, and a core dump must not hold it. */
    (void)madvise(ram, vmram->size, MADV_NOHUGEPAGE);
    (void)madvise(ram, vmram->size, MADV_UNMERGEABLE);
    if (madvise(ram, vmram->size, MADV_DONTFORK) || madvise(ram, vmram->size, MADV_DONTDUMP))
        return CSVF_ERR_SYSTEM;
    return csvf__userfault_register(vmram->userfault, ram, vmram->size);
}

static int start_threads(csvf_vmram *vmram, uint32_t threads)
{
    /* The program's signal handlers may touch the memory: they must not run on a thread that serves it. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = 0;
    while (vmram->thread_count < threads && !error) {
        csvf__hands *hands = &vmram->hands[vmram->thread_count];
        hands->epoll = csvf__fault_epoll(vmram);
        if (hands->epoll < 0) {
            error = errno;
            break;
        }
        error = pthread_create(&vmram->threads[vmram->thread_count], NULL, csvf__fault_thread, hands);
        vmram->thread_count += !error;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    errno = error;
    return error ? CSVF_ERR_SYSTEM : CSVF_OK;
}

static int check_file(csvf_vmram *vmram, int fd)
{
    struct stat about;
    if (fstat(fd, &about))
        return CSVF_ERR_SYSTEM;
    if (!S_ISREG(about.st_mode) || (fcntl(fd, F_GETFL) & O_ACCMODE) != O_RDWR)
        return CSVF_ERR_ARGUMENT;
    if (vmram->offset > (uint64_t)INT64_MAX - vmram->size || (uint64_t)about.st_size < vmram->offset + vmram->size)
        return CSVF_ERR_LENGTH;
    vmram->had_name = about.st_nlink > 0;
    vmram->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    return vmram->fd < 0 ? CSVF_ERR_SYSTEM : CSVF_OK;
}

static int create_parts(csvf_vmram *vmram, int fd, const csvf_vmram_config *settings)
{
    int installed = 0;
    if (csvf__check_range(vmram->engine, vmram->address, vmram->size) != CSVF_OK)
        return CSVF_ERR_RANGE;
    int status = csvf_asid_state(vmram->engine, NULL, &installed, vmram->asid);
    if (status == CSVF_OK && !installed)
        status = CSVF_ERR_ASID;
    if (status == CSVF_OK)
        status = check_file(vmram, fd);
    if (status == CSVF_OK)
        status = make_tables(vmram, settings->threads);
    if (status == CSVF_OK)
        status = make_memory(vmram, settings->at);
    if (status == CSVF_OK)
        status = start_threads(vmram, settings->threads);
    return status;
}

int csvf_vmram_create(csvf_vmram **result, csvf_engine *engine, uint32_t asid, int fd, uint64_t offset, uint64_t address,
                      size_t size, const csvf_vmram_config *config)
{
    if (!result)
        return CSVF_ERR_ARGUMENT;
    *result = NULL;
    csvf_vmram_config settings;
    if (!engine)
        return CSVF_ERR_ARGUMENT;
    int status = read_config(&settings, config, size);
    if (status != CSVF_OK)
        return status;
    if (offset % CSVF_PAGE_BYTES || address % CSVF_PAGE_BYTES)
        return CSVF_ERR_ALIGNMENT;
    csvf_vmram *vmram = calloc(1, sizeof *vmram);
    if (!vmram)
        return CSVF_ERR_MEMORY;
    vmram->engine = engine;
    vmram->asid = asid;
    vmram->offset = offset;
    vmram->address = address;
    vmram->size = size;
    vmram->page_count = (uint32_t)(size / CSVF_PAGE_BYTES);
    vmram->window = (uint32_t)((settings.window_size < size ? settings.window_size : size) / CSVF_PAGE_BYTES);
    /* Neither read-ahead nor eviction may turn over much of a small window at once. */
    const uint32_t share = vmram->window / 8 ? vmram->window / 8 : 1;
    vmram->read_ahead = settings.read_ahead < share ? settings.read_ahead : share;
    const uint32_t zeros = settings.read_ahead == 1 ? 1 : settings.read_ahead * ZEROS_AHEAD;
    vmram->zero_ahead = zeros < CSVF_VMRAM_READ_AHEAD_MAX ? zeros : CSVF_VMRAM_READ_AHEAD_MAX;
    if (vmram->zero_ahead > share)
        vmram->zero_ahead = share;
    vmram->batch = CSVF__BATCH_MAX < share ? CSVF__BATCH_MAX : share;
    vmram->report = settings.report;
    vmram->report_context = settings.report_context;
    vmram->fd = vmram->userfault = vmram->stop = vmram->self = -1;
    for (int i = 0; i <= (int)CSVF_VMRAM_THREADS_MAX; i++)
        vmram->hands[i].epoll = vmram->hands[i].taken[0] = vmram->hands[i].taken[1] = -1;
    vmram->process = getpid();
    pthread_mutex_init(&vmram->lock, NULL);
    pthread_cond_init(&vmram->changed, NULL);
    status = create_parts(vmram, fd, &settings);
    if (status != CSVF_OK) {
        const int saved = errno;
        csvf_vmram_destroy(vmram);
        errno = saved;
        return status;
    }
    *result = vmram;
    return CSVF_OK;
}

int csvf_vmram_create_with_key(csvf_vmram **result, const uint8_t *key, size_t key_length, int fd, uint64_t offset,
                               uint64_t address, size_t size, const csvf_vmram_config *config)
{
    if (!result)
        return CSVF_ERR_ARGUMENT;
    *result = NULL;
    const csvf_config settings = {.struct_size = sizeof settings, .base_address = address, .asid_max = 1};
    csvf_engine *engine;
    int status = csvf_engine_create_file(&engine, fd, offset, size, &settings);
    if (status != CSVF_OK)
        return status;
    status = csvf_asid_install(engine, 1, key, key_length);
    if (status == CSVF_OK)
        status = csvf_vmram_create(result, engine, 1, fd, offset, address, size, config);
    if (status != CSVF_OK) {
        const int saved = errno;
        csvf_engine_destroy(engine);
        errno = saved;
        return status;
    }
    (*result)->owns_engine = 1;
    return CSVF_OK;
}

static void give_back(void *memory, size_t length)
{
    if (memory)
        munmap(memory, length);
}

void csvf_vmram_destroy(csvf_vmram *vmram)
{
    if (!vmram)
        return;
    /* The child of a fork has neither the memory nor the threads, and the address may belong to something else by now. */
    const int is_owner = vmram->process == getpid();
    if (is_owner) {
        const uint64_t one = 1;
        if (vmram->thread_count && write(vmram->stop, &one, sizeof one) != sizeof one)
            abort();    /* an eventfd that takes no count: somebody closed it, and the threads cannot be ended */
        for (uint32_t i = 0; i < vmram->thread_count; i++)
            pthread_join(vmram->threads[i], NULL);
        if (vmram->ram && vmram->is_placed)
            (void)mmap(vmram->ram, vmram->size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
        else
            give_back(vmram->ram, vmram->size);
        pthread_cond_destroy(&vmram->changed);
        pthread_mutex_destroy(&vmram->lock);
    }
    if (vmram->staging)
        csvf_wipe(vmram->staging, vmram->staging_length);
    give_back(vmram->staging, vmram->staging_length);
    give_back(vmram->pages, pages_length(vmram));
    give_back(vmram->clock, clock_length(vmram));
    give_back(vmram->free_slots, clock_length(vmram));
    const int descriptors[] = {vmram->userfault, vmram->stop, vmram->self, vmram->fd};
    for (size_t i = 0; i < sizeof descriptors / sizeof descriptors[0]; i++)
        if (descriptors[i] >= 0)
            close(descriptors[i]);
    for (size_t i = 0; i <= CSVF_VMRAM_THREADS_MAX; i++)
        for (int end = 0; end < 3; end++) {
            const int descriptor = end < 2 ? vmram->hands[i].taken[end] : vmram->hands[i].epoll;
            if (descriptor >= 0)
                close(descriptor);
        }
    if (vmram->owns_engine)
        csvf_engine_destroy(vmram->engine);
    free(vmram);
}

void *csvf_vmram_memory(csvf_vmram *vmram) { return vmram ? vmram->ram : NULL; }
size_t csvf_vmram_size(const csvf_vmram *vmram) { return vmram ? vmram->size : 0; }

int csvf_vmram_flush(csvf_vmram *vmram)
{
    if (!vmram)
        return CSVF_ERR_ARGUMENT;
    csvf__quiesce(vmram);
    const int status = csvf__window_flush(vmram, &vmram->hands[CSVF_VMRAM_THREADS_MAX]);
    csvf__resume(vmram);
    return status;
}

/* Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_ALIGNMENT, CSVF_ERR_RANGE. */
static int check_part(const csvf_vmram *vmram, uint64_t offset, size_t length)
{
    if (!vmram)
        return CSVF_ERR_ARGUMENT;
    if (offset % CSVF_PAGE_BYTES || length % CSVF_PAGE_BYTES)
        return CSVF_ERR_ALIGNMENT;
    return offset > vmram->size || length > vmram->size - offset ? CSVF_ERR_RANGE : CSVF_OK;
}

/* The pages leave the window without being written. From then on they are in the DRAM (is_written), or zeros. */
static int replace(csvf_vmram *vmram, uint64_t offset, size_t length, int is_written)
{
    int status = check_part(vmram, offset, length);
    if (status != CSVF_OK)
        return status;
    const uint32_t first = (uint32_t)(offset / CSVF_PAGE_BYTES), count = (uint32_t)(length / CSVF_PAGE_BYTES);
    csvf__quiesce(vmram);
    status = csvf__failure(vmram);
    if (status == CSVF_OK && count) {
        csvf__window_forget(vmram, first, count);
        for (uint32_t page = first; page < first + count; page++)
            vmram->pages[page].is_written = (uint8_t)is_written;
        vmram->stats.pages_discarded += is_written ? 0 : count;
    }
    csvf__resume(vmram);
    return status;
}

int csvf_vmram_discard(csvf_vmram *vmram, uint64_t offset, size_t length) { return replace(vmram, offset, length, 0); }
int csvf_vmram_adopt(csvf_vmram *vmram, uint64_t offset, size_t length) { return replace(vmram, offset, length, 1); }

int csvf_vmram_evict(csvf_vmram *vmram, uint64_t offset, size_t length)
{
    int status = check_part(vmram, offset, length);
    if (status != CSVF_OK)
        return status;
    csvf__quiesce(vmram);
    status = csvf__failure(vmram);
    if (status == CSVF_OK && length)
        status = csvf__window_expel(vmram, &vmram->hands[CSVF_VMRAM_THREADS_MAX], (uint32_t)(offset / CSVF_PAGE_BYTES),
                                    (uint32_t)(length / CSVF_PAGE_BYTES));
    csvf__resume(vmram);
    return status;
}

int csvf_vmram_get_stats(csvf_vmram *vmram, csvf_vmram_stats *stats)
{
    if (!vmram || !stats || stats->struct_size < sizeof *stats)
        return CSVF_ERR_ARGUMENT;
    const size_t struct_size = stats->struct_size;
    pthread_mutex_lock(&vmram->lock);
    *stats = vmram->stats;
    stats->struct_size = struct_size;
    stats->size = vmram->size;
    stats->window_size = (uint64_t)vmram->window * CSVF_PAGE_BYTES;
    stats->resident = (uint64_t)vmram->resident * CSVF_PAGE_BYTES;
    stats->resident_peak = (uint64_t)vmram->stats.resident_peak * CSVF_PAGE_BYTES;
    stats->failure = csvf__failure(vmram);
    pthread_mutex_unlock(&vmram->lock);
    return CSVF_OK;
}
