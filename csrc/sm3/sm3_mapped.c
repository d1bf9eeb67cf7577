/* Hashing of mapped files, see sm3_mapped.h. */
#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* MAP_ANONYMOUS, MAP_POPULATE, sigaction */
#endif
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>

#include "sm3_mapped.h"

#if !defined(MAP_POPULATE)
#define MAP_POPULATE 0
#endif

/* What this thread is hashing. The model makes the handler's access a plain load: it must not allocate. */
static __thread __attribute__((tls_model("initial-exec"))) csvf__window *volatile watched;
static __thread __attribute__((tls_model("initial-exec"))) volatile size_t watched_count;

static pthread_once_t once = PTHREAD_ONCE_INIT;
static struct sigaction earlier;

static int replace_pages(const siginfo_t *info)
{
    const uintptr_t address = (uintptr_t)info->si_addr;
    for (size_t i = 0; i < watched_count; i++) {
        csvf__window *w = &watched[i];
        if (w->pages && address >= (uintptr_t)w->pages && address - (uintptr_t)w->pages < w->pages_length) {
            w->lost = 1;
            return mmap(w->pages, w->pages_length, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED;
        }
    }
    return 0;
}

static void on_fault(int number, siginfo_t *info, void *context)
{
    const int error = errno;
    if (!(info->si_code > 0 && replace_pages(info))) {
        if (earlier.sa_flags & SA_SIGINFO) {
            earlier.sa_sigaction(number, info, context);
        } else if (earlier.sa_handler != SIG_DFL && earlier.sa_handler != SIG_IGN) {
            earlier.sa_handler(number);
        } else if (info->si_code > 0 || earlier.sa_handler == SIG_DFL) {
            signal(number, SIG_DFL); /* the instruction is repeated; a signal that was sent is sent again */
            if (info->si_code <= 0)
                raise(number);
        }
    }
    errno = error;
}

static void take_signal(void)
{
    struct sigaction ours = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigemptyset(&ours.sa_mask);
    sigaction(SIGBUS, &ours, &earlier);
}

static int is_guarded(void)
{
    struct sigaction now;
    pthread_once(&once, take_signal);
    return sigaction(SIGBUS, NULL, &now) == 0 && (now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_fault;
}

/* Where the window's bytes are, or NULL. */
static const uint8_t *map(csvf__window *w, int guarded)
{
    const uint64_t within = w->offset % (uint64_t)sysconf(_SC_PAGESIZE);
    w->done = w->lost = 0;
    w->pages = NULL;
    if (!guarded || w->length == 0 || w->length > SIZE_MAX - within || w->offset - within > INT64_MAX)
        return NULL;
    w->pages_length = w->length + (size_t)within;
    void *pages = mmap(NULL, w->pages_length, PROT_READ, MAP_SHARED | MAP_POPULATE, w->descriptor, (off_t)(w->offset - within));
    if (pages == MAP_FAILED)
        return NULL;
    w->pages = pages;
    return w->pages + within;
}

static void watch(csvf__window *windows, size_t count)
{
    watched = windows;
    watched_count = count;
    atomic_signal_fence(memory_order_seq_cst);
}

static void unwatch(void)
{
    atomic_signal_fence(memory_order_seq_cst);
    watched_count = 0;
    watched = NULL;
}

static void unmap(csvf__window *w)
{
    if (w->pages) {
        munmap(w->pages, w->pages_length);
        w->done = !w->lost;
    }
}

void csvf__sm3_update_mapped(csvf_sm3 *const *streams, csvf__window *windows, size_t count, csvf_sm3 *before, const uint8_t **data, size_t *lengths)
{
    const int guarded = is_guarded();
    for (size_t i = 0; i < count; i++) {
        before[i] = *streams[i];
        data[i] = map(&windows[i], guarded);
        lengths[i] = data[i] ? windows[i].length : 0;
        data[i] = data[i] ? data[i] : (const uint8_t *)streams[i]; /* of which no byte is used */
    }
    watch(windows, count);
    csvf_sm3_update_many(streams, data, lengths, count);
    unwatch();
    for (size_t i = 0; i < count; i++) {
        unmap(&windows[i]);
        if (windows[i].lost)
            *streams[i] = before[i];
    }
}

int csvf__sm3_blocks_mapped(uint8_t *digests, const uint8_t *prefix, size_t prefix_length, csvf__window *window, size_t block_length)
{
    const uint8_t *data = map(window, is_guarded());
    if (!data)
        return CSVF_OK;
    watch(window, 1);
    const int status = csvf_sm3_blocks(digests, prefix, prefix_length, data, block_length, window->length / block_length);
    unwatch();
    unmap(window);
    return status;
}
