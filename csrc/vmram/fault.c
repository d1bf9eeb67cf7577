/* Fault threads: they bring pages into the window, and make room before it is needed. */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "vmram.h"

enum {
    FAULTS_AT_ONCE = 4,     /* few: what one thread has read, no other can serve */
    PATIENCE = 20,          /* looks for the next fault before the thread sleeps: where faults come close together, waking it is half of
                             * the service. It yields in between, and so takes the CPU from nobody. */
    CHECK_MILLISECONDS = 500
};

/* Which pages to fetch for a fault of `page`: more each time a fault continues a run of faults before, upwards or downwards.
 * Returns: how many, from *first on; `page` is among them. */
static uint32_t choose_fetch(csvf_vmram *vmram, uint32_t page, uint32_t room, uint32_t *first)
{
    csvf__stream *stream = vmram->streams;
    while (stream < vmram->streams + CSVF__STREAMS && ((stream->next != page && stream->before != page) || page == 0))
        stream++;
    const int is_known = stream < vmram->streams + CSVF__STREAMS, is_downward = is_known && stream->before == page;
    const csvf__page *pages = vmram->pages;
    const uint32_t most = pages[page].is_written ? vmram->read_ahead : vmram->zero_ahead;
    if (!is_known) {
        stream = &vmram->streams[vmram->oldest_stream++ % CSVF__STREAMS];
        stream->length = 1;
    } else {
        stream->length = stream->length * 2 < most ? stream->length * 2 : most;
    }
    const uint32_t wanted = stream->length < room ? stream->length : room;
    const uint32_t limit = is_downward ? page + 1 : vmram->page_count - page;   /* pages there are on that side */
    const uint32_t step = is_downward ? UINT32_MAX : 1;                        /* -1 or 1, modulo 2^32 */
    uint32_t count = 1;
    while (count < wanted && count < limit && pages[page + step * count].state == CSVF__ABSENT &&
           pages[page + step * count].is_written == pages[page].is_written)
        count++;
    *first = is_downward ? page - count + 1 : page;
    stream->next = *first + count;
    stream->before = *first - 1;    /* no page's number if *first is 0 */
    return count;
}

/* Returns: pages that fit into the window now; 0 if none did, and the lock was given away to make room. */
static uint32_t find_room(csvf_vmram *vmram, csvf__hands *hands)
{
    if (vmram->resident < vmram->window)
        return vmram->window - vmram->resident;
    if (csvf__window_evict(vmram, hands, vmram->batch) == 0 && !csvf__failure(vmram) && vmram->resident == vmram->window && vmram->busy)
        pthread_cond_wait(&vmram->changed, &vmram->lock);   /* all of the window is on its way in or out, in other hands */
    return 0;
}

/* Fetches pages first .. first + count, which are ABSENT, into room that is there. `page` is the one that was asked for; those around
 * it are open to a writer as it is, and count as changed. */
static void fetch(csvf_vmram *vmram, csvf__hands *hands, uint32_t page, uint32_t first, uint32_t count, int is_write)
{
    csvf__page *pages = vmram->pages + first;
    const int is_written = pages->is_written;
    const size_t length = (size_t)count * CSVF_PAGE_BYTES;
    for (uint32_t i = 0; i < count; i++)
        pages[i].state = CSVF__LOADING;
    vmram->resident += count;
    if (vmram->resident > vmram->stats.resident_peak)
        vmram->stats.resident_peak = vmram->resident;
    vmram->busy += count;
    pthread_mutex_unlock(&vmram->lock);

    int status = CSVF_OK;
    if (is_written)
        status = csvf__dram_load(vmram, hands->plain, hands->cipher, first, count);
    /* Else the staging is zeros already: it is wiped after every use. */
    if (status == CSVF_OK && csvf__userfault_copy(vmram, NULL, first, hands->plain, count, !is_write) != CSVF_OK && errno != ESRCH)
        status = csvf__fail(vmram, CSVF_ERR_SYSTEM, "a page cannot be given to the memory: %s", strerror(errno));
    if (is_written)
        csvf_wipe(hands->plain, length);

    pthread_mutex_lock(&vmram->lock);
    for (uint32_t i = 0; i < count; i++) {
        csvf__window_enter(vmram, first + i, is_write ? CSVF__DIRTY : CSVF__CLEAN);
        pages[i].is_ahead = is_write && !is_written && first + i != page;
        if (pages[i].is_awaited) {
            pages[i].is_awaited = 0;
            csvf__userfault_wake(vmram, first + i, 1);
        }
    }
    vmram->stats.pages_ahead += count - 1;
    if (is_written)
        vmram->stats.bytes_decrypted += length;
    else
        vmram->stats.pages_zero += count;
    csvf__no_longer_busy(vmram, count);
}

/* A page that should be there was touched and missing. Either the message is old, or somebody has dropped the page behind our back
 * (madvise(MADV_DONTNEED) of a balloon): then it is zeros now, as it would be in ordinary memory. */
static void refill(csvf_vmram *vmram, csvf__hands *hands, uint32_t page)
{
    csvf__page *about = &vmram->pages[page];
    const uint8_t before = about->state;
    int was_present = 0;
    about->state = CSVF__LOADING;
    vmram->busy++;
    pthread_mutex_unlock(&vmram->lock);
    int status = csvf__userfault_copy(vmram, &was_present, page, hands->plain, 1, 0);
    if (status != CSVF_OK && errno != ESRCH)
        status = csvf__fail(vmram, CSVF_ERR_SYSTEM, "a page cannot be given to the memory: %s", strerror(errno));
    pthread_mutex_lock(&vmram->lock);
    about->state = was_present ? before : CSVF__DIRTY;
    vmram->stats.pages_discarded += !was_present;
    about->is_awaited = 0;
    csvf__userfault_wake(vmram, page, 1);
    csvf__no_longer_busy(vmram, 1);
}

/* Needs the lock. */
static void serve_missing(csvf_vmram *vmram, csvf__hands *hands, uint32_t page, int is_write)
{
    csvf__page *about = &vmram->pages[page];
    while (!csvf__failure(vmram) && about->state == CSVF__ABSENT) {
        if (vmram->is_quiesced) {
            pthread_cond_wait(&vmram->changed, &vmram->lock);
            continue;
        }
        const uint32_t room = find_room(vmram, hands);
        if (room == 0)
            continue;
        vmram->stats.faults++;
        uint32_t first;
        const uint32_t count = choose_fetch(vmram, page, room, &first);
        fetch(vmram, hands, page, first, count, is_write);
        return;
    }
    if (csvf__failure(vmram))
        return;
    if (about->state == CSVF__LOADING || about->state == CSVF__EVICTING)
        about->is_awaited = 1;
    else if (vmram->is_quiesced)
        csvf__userfault_wake(vmram, page, 1);
    else
        refill(vmram, hands, page);
}

/* Needs the lock. A page that was read is written for the first time. */
static void serve_protection(csvf_vmram *vmram, uint32_t page)
{
    csvf__page *about = &vmram->pages[page];
    while (vmram->is_quiesced && !csvf__failure(vmram))
        pthread_cond_wait(&vmram->changed, &vmram->lock);
    if (csvf__failure(vmram))
        return;
    switch (about->state) {
    case CSVF__LOADING:
    case CSVF__EVICTING:
        about->is_awaited = 1;
        break;
    case CSVF__CLEAN:
        /* Under the lock, or an eviction that begins now would lose its protection. */
        about->state = CSVF__DIRTY;
        if (about->credit == 0)
            about->credit = 1;
        vmram->stats.write_faults++;
        (void)csvf__userfault_unprotect(vmram, page, 1);
        break;
    default:
        csvf__userfault_wake(vmram, page, 1);   /* an old message */
    }
}

/* Pages that must always be free, so that a fault seldom waits for an eviction. */
static uint32_t reserve(const csvf_vmram *vmram) { return vmram->batch / 2; }

static void serve(csvf_vmram *vmram, csvf__hands *hands, const csvf__fault *fault)
{
    if (fault->page >= vmram->page_count)
        return;
    pthread_mutex_lock(&vmram->lock);
    if (fault->is_protection)
        serve_protection(vmram, fault->page);
    else
        serve_missing(vmram, hands, fault->page, fault->is_write);
    if (csvf__failure(vmram)) {
        csvf__no_longer_busy(vmram, 0);
        csvf__userfault_wake(vmram, fault->page, 1);
    } else if (!vmram->is_quiesced && !vmram->is_evicting_ahead && vmram->window - vmram->resident < reserve(vmram)) {
        vmram->is_evicting_ahead = 1;
        (void)csvf__window_evict(vmram, hands, vmram->batch);
        vmram->is_evicting_ahead = 0;
    }
    pthread_mutex_unlock(&vmram->lock);
}


int csvf__fault_epoll(csvf_vmram *vmram)
{
    const int epoll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event fault = {.events = EPOLLIN | EPOLLEXCLUSIVE, .data.fd = vmram->userfault};
    struct epoll_event stop = {.events = EPOLLIN, .data.fd = vmram->stop};
    if (epoll < 0)
        return -1;
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, vmram->userfault, &fault) || epoll_ctl(epoll, EPOLL_CTL_ADD, vmram->stop, &stop)) {
        close(epoll);
        return -1;
    }
    return epoll;
}

void *csvf__fault_thread(void *argument)
{
    csvf__hands *hands = argument;
    csvf_vmram *vmram = hands->vmram;
    csvf__fault faults[FAULTS_AT_ONCE];
    int patience = 0;
    for (;;) {
        const int count = csvf__userfault_read(vmram, faults, FAULTS_AT_ONCE);
        if (count < 0)
            return NULL;
        for (int i = 0; i < count; i++)
            serve(vmram, hands, &faults[i]);
        if (count) {
            patience = PATIENCE;
            continue;
        }
        if (patience > 0) {
            patience--;
            sched_yield();
            continue;
        }
        struct epoll_event events[2];
        const int ready = epoll_wait(hands->epoll, events, 2, CHECK_MILLISECONDS);
        for (int i = 0; i < ready; i++)
            if (events[i].data.fd == vmram->stop)
                return NULL;
        if (ready == 0 && !csvf__failure(vmram) && csvf__dram_check(vmram) != CSVF_OK) {
            pthread_mutex_lock(&vmram->lock);
            csvf__no_longer_busy(vmram, 0);
            pthread_mutex_unlock(&vmram->lock);
        }
    }
}
