/* The window of plaintext: a clock over its pages, and their way out.
 *
 * Software sees no accessed bits of another's page tables, so the clock's evidence is what it does see: a page that comes back soon
 * after it was evicted, or that is written after it was read, is in use and is spared a turn or more. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "vmram.h"

enum { CREDIT_MAX = 2 };

void csvf__window_enter(csvf_vmram *vmram, uint32_t page, csvf__page_state state)
{
    csvf__page *about = &vmram->pages[page];
    const uint32_t slot = vmram->free_count ? vmram->free_slots[--vmram->free_count] : vmram->clock_used++;
    /* Back before a whole window has left: it should have stayed. memo is 0 for a page that never left. */
    const uint32_t absence = vmram->departures - about->memo;
    about->credit = about->memo == 0 || absence >= vmram->window ? 0 : absence >= vmram->window / 2 ? 1 : CREDIT_MAX;
    vmram->clock[slot] = page + 1;
    about->memo = slot;
    about->state = (uint8_t)state;
}

/* The page left the window; its slot is free. */
static void leave(csvf_vmram *vmram, uint32_t page)
{
    csvf__page *about = &vmram->pages[page];
    vmram->clock[about->memo] = 0;
    vmram->free_slots[vmram->free_count++] = about->memo;
    if (++vmram->departures == 0)
        vmram->departures = 1;
    about->memo = vmram->departures;
    about->state = CSVF__ABSENT;
    vmram->resident--;
}

typedef struct victim {
    uint32_t page;
    uint8_t is_dirty;       /* to be stored; once it is known, whether it was */
    uint8_t may_be_zeros;   /* given ahead: if nobody has written to it, it need not be stored */
} victim;

static int by_page(const void *a, const void *b)
{
    const uint32_t left = ((const victim *)a)->page, right = ((const victim *)b)->page;
    return left < right ? -1 : left > right;
}

static uint32_t choose(csvf_vmram *vmram, victim *victims, uint32_t most)
{
    uint32_t count = 0;
    /* After CREDIT_MAX turns every page has lost its credit. */
    for (uint64_t steps = (uint64_t)vmram->clock_used * (CREDIT_MAX + 1); steps && count < most; steps--) {
        if (vmram->hand >= vmram->clock_used)
            vmram->hand = 0;
        const uint32_t entry = vmram->clock[vmram->hand++];
        if (entry == 0)
            continue;
        csvf__page *about = &vmram->pages[entry - 1];
        if (about->state != CSVF__CLEAN && about->state != CSVF__DIRTY)
            continue;
        if (about->credit) {
            about->credit--;
            continue;
        }
        victims[count++] = (victim){entry - 1, about->state == CSVF__DIRTY, about->is_ahead && !about->is_written};
        about->state = CSVF__EVICTING;
    }
    qsort(victims, count, sizeof *victims, by_page);
    return count;
}

/* Number of victims from the first on that stand side by side and are alike. */
static uint32_t run_of(const victim *victims, uint32_t count, int mind_dirt)
{
    uint32_t run = 1;
    while (run < count && victims[run].page == victims[run - 1].page + 1 &&
           (!mind_dirt || victims[run].is_dirty == victims[0].is_dirty))
        run++;
    return run;
}

/* No changed page is missing when the library reads it. */
static int complete(csvf_vmram *vmram, csvf__hands *hands, const victim *victims, uint32_t count)
{
    int status = CSVF_OK;
    for (uint32_t i = 0; status == CSVF_OK && i < count;) {
        const uint32_t run = run_of(victims + i, count - i, 1);
        if (victims[i].is_dirty && csvf__userfault_complete(vmram, victims[i].page, run, hands->plain) != CSVF_OK)
            status = csvf__fail(vmram, CSVF_ERR_SYSTEM, "a page of the memory cannot be looked at: was it unmapped?");
        i += run;
    }
    return status;
}

/* Keeps the frames of the changed ones in a pipe: they can be dropped then, and read when nobody writes to them any more. Protecting them
 * instead would cost a TLB flush on all CPUs for each, where dropping all costs one. Returns: 1, or 0 if it cannot be done, with nothing changed. */
static int take(csvf_vmram *vmram, csvf__hands *hands, const victim *victims, uint32_t count)
{
    struct iovec runs[CSVF__BATCH_MAX];
    size_t used = 0, length = 0;
    if (hands->taken[1] < 0)
        return 0;
    for (uint32_t i = 0; i < count;) {
        const uint32_t run = run_of(victims + i, count - i, 1);
        if (victims[i].is_dirty) {
            runs[used] = (struct iovec){vmram->ram + (size_t)victims[i].page * CSVF_PAGE_BYTES, (size_t)run * CSVF_PAGE_BYTES};
            length += runs[used++].iov_len;
        }
        i += run;
    }
    const ssize_t done = vmsplice(hands->taken[1], runs, used, SPLICE_F_NONBLOCK);
    if (done == (ssize_t)length)
        return 1;
    for (ssize_t left = done, got; left > 0; left -= got) {
        got = read(hands->taken[0], hands->cipher, (size_t)left);
        if (got <= 0)
            break;
    }
    csvf_wipe(hands->cipher, done > 0 ? (size_t)done : 0);
    close(hands->taken[0]);     /* a system that does not allow it never will */
    close(hands->taken[1]);
    hands->taken[0] = hands->taken[1] = -1;
    return 0;
}

/* All of the page is looked at, whatever is in it. What comes out is no secret: the DRAM's holes tell it. */
static int is_zeros(const uint8_t *page)
{
    uint64_t found = 0, word;
    for (size_t i = 0; i < CSVF_PAGE_BYTES; i += sizeof word) {
        memcpy(&word, page + i, sizeof word);
        found |= word;
    }
    return found == 0;
}

/* Ciphertext of a run of changed pages into the DRAM, from where nobody writes any more. Pages given ahead that still are zeros stay
 * as they were, never written. */
static int store_run(csvf_vmram *vmram, uint8_t *ciphertext, const uint8_t *plain, victim *victims, uint32_t run)
{
    int status = CSVF_OK;
    for (uint32_t i = 0; status == CSVF_OK && i < run;) {
        uint32_t some = 0;
        while (i + some < run && !(victims[i + some].may_be_zeros && is_zeros(plain + (size_t)(i + some) * CSVF_PAGE_BYTES)))
            some++;
        if (some)
            status = csvf__dram_store(vmram, ciphertext + (size_t)i * CSVF_PAGE_BYTES, plain + (size_t)i * CSVF_PAGE_BYTES,
                                      victims[i].page, some);
        i += some;
        if (i < run)
            victims[i++].is_dirty = 0;
    }
    return status;
}

/* Ciphertext of the taken ones into the DRAM. */
static int store_taken(csvf_vmram *vmram, csvf__hands *hands, victim *victims, uint32_t count, uint32_t dirty)
{
    int status = csvf__dram_check(vmram);
    const size_t length = (size_t)dirty * CSVF_PAGE_BYTES;
    for (size_t done = 0; done < length;) {
        const ssize_t got = read(hands->taken[0], hands->cipher + done, length - done);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return csvf__fail(vmram, CSVF_ERR_SYSTEM, "pages on their way out of the window are lost: %s", strerror(errno));
        done += (size_t)got;
    }
    uint8_t *plain = hands->cipher;     /* encrypted in its place */
    for (uint32_t i = 0; status == CSVF_OK && i < count;) {
        const uint32_t run = run_of(victims + i, count - i, 1);
        if (victims[i].is_dirty) {
            status = store_run(vmram, plain, plain, victims + i, run);
            plain += (size_t)run * CSVF_PAGE_BYTES;
        }
        i += run;
    }
    if (status != CSVF_OK)
        csvf_wipe(hands->cipher, length);
    return status;
}

/* Ciphertext of the changed ones into the DRAM, from the memory. Readers go on meanwhile; a writer faults on the protection, and waits. */
static int store(csvf_vmram *vmram, csvf__hands *hands, victim *victims, uint32_t count)
{
    int status = csvf__dram_check(vmram);
    for (uint32_t i = 0; status == CSVF_OK && i < count;) {
        const uint32_t run = run_of(victims + i, count - i, 1), page = victims[i].page;
        if (victims[i].is_dirty) {
            if (csvf__userfault_protect(vmram, page, run) != CSVF_OK)
                status = csvf__fail(vmram, CSVF_ERR_SYSTEM, "a page of the memory cannot be write-protected: was it unmapped?");
            else
                status = store_run(vmram, hands->cipher, vmram->ram + (size_t)page * CSVF_PAGE_BYTES, victims + i, run);
        }
        i += run;
    }
    return status;
}

/* One call for all runs where the kernel takes it (6.13 on, for the own process): one TLB flush instead of many. */
static int drop(csvf_vmram *vmram, const victim *victims, uint32_t count)
{
    struct iovec runs[CSVF__BATCH_MAX];
    size_t used = 0, length = 0;
    for (uint32_t i = 0; i < count;) {
        const uint32_t run = run_of(victims + i, count - i, 0);
        runs[used++] = (struct iovec){vmram->ram + (size_t)victims[i].page * CSVF_PAGE_BYTES, (size_t)run * CSVF_PAGE_BYTES};
        i += run;
    }
    for (size_t i = 0; i < used; i++)
        length += runs[i].iov_len;
#ifdef SYS_process_madvise
    if (used > 1 && vmram->self >= 0 && !atomic_load(&vmram->is_vector_refused)) {
        const ssize_t done = (ssize_t)syscall(SYS_process_madvise, vmram->self, runs, used, MADV_DONTNEED, 0u);
        if (done == (ssize_t)length)
            return CSVF_OK;
        atomic_store(&vmram->is_vector_refused, 1);     /* an older kernel */
    }
#endif
    for (size_t i = 0; i < used; i++)
        if (csvf__userfault_drop(runs[i].iov_base, runs[i].iov_len) != CSVF_OK)
            return csvf__fail(vmram, CSVF_ERR_SYSTEM, "a page of the memory cannot be dropped: is it locked (mlock)?");
    return CSVF_OK;
}

uint32_t csvf__window_evict(csvf_vmram *vmram, csvf__hands *hands, uint32_t most)
{
    victim victims[CSVF__BATCH_MAX];
    const uint32_t count = csvf__failure(vmram) ? 0 : choose(vmram, victims, most < vmram->batch ? most : vmram->batch);
    if (count == 0)
        return 0;
    uint32_t dirty = 0;
    for (uint32_t i = 0; i < count; i++)
        dirty += (uint32_t)victims[i].is_dirty;
    vmram->busy += count;
    pthread_mutex_unlock(&vmram->lock);
    int status = dirty ? complete(vmram, hands, victims, count) : CSVF_OK;
    const int is_taken = status == CSVF_OK && dirty && take(vmram, hands, victims, count);
    if (status == CSVF_OK && dirty && !is_taken)
        status = store(vmram, hands, victims, count);
    if (status == CSVF_OK)
        status = drop(vmram, victims, count);
    if (status == CSVF_OK && is_taken)
        status = store_taken(vmram, hands, victims, count, dirty);
    uint32_t stored = 0;
    pthread_mutex_lock(&vmram->lock);
    for (uint32_t i = 0; i < count; i++) {
        csvf__page *about = &vmram->pages[victims[i].page];
        const int is_awaited = about->is_awaited;
        about->is_awaited = 0;
        if (status != CSVF_OK) {
            about->state = (uint8_t)(victims[i].is_dirty ? CSVF__DIRTY : CSVF__CLEAN);
            continue;
        }
        stored += victims[i].is_dirty;
        about->is_written |= victims[i].is_dirty;
        leave(vmram, victims[i].page);
        if (is_awaited)
            csvf__userfault_wake(vmram, victims[i].page, 1);
    }
    if (status == CSVF_OK) {
        vmram->stats.evictions += count;
        vmram->stats.evictions_clean += count - stored;
        vmram->stats.bytes_encrypted += (uint64_t)stored * CSVF_PAGE_BYTES;
    }
    csvf__no_longer_busy(vmram, count);
    pthread_cond_broadcast(&vmram->changed);
    return status == CSVF_OK ? count : 0;
}

int csvf__window_flush(csvf_vmram *vmram, csvf__hands *hands)
{
    int status = csvf__failure(vmram);
    if (status == CSVF_OK && csvf__userfault_protect(vmram, 0, vmram->page_count) != CSVF_OK)
        status = csvf__fail(vmram, CSVF_ERR_SYSTEM, "the memory cannot be write-protected: was it unmapped?");
    /* From here on nobody writes. All pages are protected, so all of them must become clean, or go on as dirty and be opened again. */
    for (uint32_t slot = 0; status == CSVF_OK && slot < vmram->clock_used; slot++) {
        if (vmram->clock[slot] == 0)
            continue;
        uint32_t page = vmram->clock[slot] - 1, count = 0;
        while (count < CSVF__BATCH_MAX && page + count < vmram->page_count && vmram->pages[page + count].state == CSVF__DIRTY)
            count++;
        if (count == 0)
            continue;
        if (csvf__userfault_complete(vmram, page, count, hands->plain) != CSVF_OK)
            return csvf__fail(vmram, CSVF_ERR_SYSTEM, "a page of the memory cannot be looked at: was it unmapped?");
        victim run[CSVF__BATCH_MAX];
        for (uint32_t i = 0; i < count; i++) {
            const csvf__page *about = &vmram->pages[page + i];
            run[i] = (victim){page + i, 1, about->is_ahead && !about->is_written};
        }
        status = store_run(vmram, hands->cipher, vmram->ram + (size_t)page * CSVF_PAGE_BYTES, run, count);
        for (uint32_t i = 0; status == CSVF_OK && i < count; i++) {
            vmram->pages[page + i].state = CSVF__CLEAN;
            vmram->pages[page + i].is_written |= run[i].is_dirty;
            vmram->stats.bytes_encrypted += run[i].is_dirty ? CSVF_PAGE_BYTES : 0;
        }
    }
    return status;
}

int csvf__window_expel(csvf_vmram *vmram, csvf__hands *hands, uint32_t first, uint32_t count)
{
    int status = csvf__failure(vmram);
    if (status == CSVF_OK && csvf__userfault_protect(vmram, first, count) != CSVF_OK)
        status = csvf__fail(vmram, CSVF_ERR_SYSTEM, "the memory cannot be write-protected: was it unmapped?");
    const uint32_t end = first + count, before = vmram->resident;
    uint32_t dirty = 0;
    for (uint32_t page = first; status == CSVF_OK && page < end;) {
        const int is_dirty = vmram->pages[page].state == CSVF__DIRTY;
        if (!is_dirty && vmram->pages[page].is_written) {
            page++;
            continue;
        }
        uint32_t run = 1;
        while (run < CSVF__BATCH_MAX && page + run < end && (vmram->pages[page + run].state == CSVF__DIRTY) == is_dirty &&
               (is_dirty || !vmram->pages[page + run].is_written))
            run++;
        /* The staging of plaintext is zeros, as a page that was never written. */
        const uint8_t *plain = is_dirty ? vmram->ram + (size_t)page * CSVF_PAGE_BYTES : hands->plain;
        if (is_dirty && csvf__userfault_complete(vmram, page, run, hands->plain) != CSVF_OK)
            return csvf__fail(vmram, CSVF_ERR_SYSTEM, "a page of the memory cannot be looked at: was it unmapped?");
        status = csvf__dram_store(vmram, hands->cipher, plain, page, run);
        if (status == CSVF_OK)
            vmram->stats.bytes_encrypted += (uint64_t)run * CSVF_PAGE_BYTES;
        for (uint32_t i = 0; status == CSVF_OK && i < run; i++) {
            vmram->pages[page + i].is_written = 1;
            if (is_dirty)
                vmram->pages[page + i].state = CSVF__CLEAN;
        }
        dirty += is_dirty ? run : 0;
        page += run;
    }
    if (status == CSVF_OK) {
        csvf__window_forget(vmram, first, count);
        vmram->stats.evictions += before - vmram->resident;
        vmram->stats.evictions_clean += before - vmram->resident - dirty;
    }
    return status;
}

void csvf__window_forget(csvf_vmram *vmram, uint32_t first, uint32_t count)
{
    (void)csvf__userfault_drop(vmram->ram + (size_t)first * CSVF_PAGE_BYTES, (size_t)count * CSVF_PAGE_BYTES);
    /* The shorter way: through the window, or through the range. */
    if (count > vmram->clock_used) {
        for (uint32_t slot = 0; slot < vmram->clock_used; slot++) {
            const uint32_t entry = vmram->clock[slot];
            if (entry && entry - 1 - first < count)
                leave(vmram, entry - 1);
        }
    } else {
        for (uint32_t page = first; page < first + count; page++)
            if (vmram->pages[page].state != CSVF__ABSENT)
                leave(vmram, page);
    }
}
