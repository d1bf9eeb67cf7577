/* Encrypted memory from the inside. Internal.
 *
 * One mutex guards all page states. It is not held while SM4, the file or the memory map work on a page: such a page is LOADING or
 * EVICTING meanwhile, and counted in `busy`. Whoever finds a page in one of these states leaves a mark on it (is_awaited), and the
 * thread that works on the page wakes those who wait in the kernel when it has finished: they fault again and find the new state. */
#ifndef CSVF_VMRAM_H
#define CSVF_VMRAM_H

#include <pthread.h>
#include <stdatomic.h>
#include <sys/types.h>

#include "../engine/engine.h"
#include "../include/csvfast_vmram.h"

enum {
    CSVF__BATCH_MAX = 32,           /* pages evicted at once: amortises the TLB flush, yet nobody waits long for it */
    CSVF__STREAMS = 8               /* sequential runs of faults told apart */
};

typedef enum csvf__page_state {
    CSVF__ABSENT = 0,   /* ciphertext in the DRAM, or never written */
    CSVF__LOADING,
    CSVF__CLEAN,        /* in the window, write-protected */
    CSVF__DIRTY,        /* in the window, changed or free to be */
    CSVF__EVICTING
} csvf__page_state;

typedef struct csvf__page {
    uint32_t memo;              /* in the window: its slot of the clock; absent: `departures` when it left */
    uint8_t state;
    uint8_t is_written;         /* its content is in the DRAM, or belongs there */
    uint8_t is_awaited : 1;
    uint8_t is_ahead : 1;       /* never written, and given before anybody asked, open to a writer: zeros, unless somebody wrote */
    uint8_t credit;             /* turns of the clock it is spared */
} csvf__page;

/* What one thread works with. The staging of plaintext is wiped after every use; that of ciphertext needs no wiping. */
typedef struct csvf__hands {
    csvf_vmram *vmram;
    int epoll;
    uint8_t *plain, *cipher;    /* READ_AHEAD_MAX pages and BATCH_MAX pages */
    int taken[2];               /* a pipe for the frames of pages on their way out, or -1 */
} csvf__hands;

typedef struct csvf__stream {
    uint32_t next, before, length;  /* pages that continue it upwards and downwards; pages fetched last */
} csvf__stream;

struct csvf_vmram {
    csvf_engine *engine;
    int owns_engine;
    uint32_t asid;
    uint64_t address;           /* of the memory's first byte, in the engine */
    int fd;
    uint64_t offset;
    int had_name;               /* a file somebody could open by name; a memfd has none */
    pid_t process;

    uint8_t *ram;
    size_t size;
    uint32_t page_count, window;    /* pages */
    int is_placed;              /* at the caller's address */
    int userfault, stop, self;  /* self: pidfd of this process, or -1 */
    _Atomic int is_vector_refused;  /* process_madvise does not drop pages here */
    uint32_t read_ahead, zero_ahead, batch;
    csvf_vmram_report *report;
    void *report_context;

    pthread_t threads[CSVF_VMRAM_THREADS_MAX];
    uint32_t thread_count;
    csvf__hands hands[CSVF_VMRAM_THREADS_MAX + 1];  /* the last one for calls, which quiesce the threads */
    void *staging;
    size_t staging_length;

    pthread_mutex_t lock;
    pthread_cond_t changed;
    csvf__page *pages;
    uint32_t *clock;            /* window slots: page number + 1, or 0 for a free slot */
    uint32_t *free_slots;       /* a stack; slots from clock_used on were never used */
    uint32_t free_count, clock_used, hand;
    uint32_t resident, busy;
    uint32_t departures;        /* pages that left so far; never 0 after the first */
    csvf__stream streams[CSVF__STREAMS];
    uint32_t oldest_stream;
    int is_evicting_ahead, is_quiesced, is_closed, was_deleted;
    csvf_vmram_stats stats;
    _Atomic int failure;
};

/* ---- userfault.c: the kernel's side ---- */

typedef struct csvf__fault {
    uint32_t page;
    int is_write, is_protection;
} csvf__fault;

/* Out: *fd, nonblocking, with write protection agreed on; *reason as csvf_vmram_probe. Returns: CSVF_OK, CSVF_ERR_SYSTEM. */
int csvf__userfault_open(int *fd, const char **reason);
int csvf__userfault_register(int fd, void *ram, size_t size);
/* Returns: number of faults, 0 if there are none now, -1 if the descriptor is of no more use. */
int csvf__userfault_read(csvf_vmram *vmram, csvf__fault *faults, int room);
/* Maps count pages of plaintext at page `first`, write-protected or not, and wakes who waits for them. A page that is already there
 * is left alone (and *present, if not NULL, set). Returns: CSVF_OK, CSVF_ERR_SYSTEM. */
int csvf__userfault_copy(csvf_vmram *vmram, int *present, uint32_t first, const uint8_t *plain, uint32_t count, int is_protected);
int csvf__userfault_protect(csvf_vmram *vmram, uint32_t first, uint32_t count);
int csvf__userfault_unprotect(csvf_vmram *vmram, uint32_t first, uint32_t count);
void csvf__userfault_wake(csvf_vmram *vmram, uint32_t first, uint32_t count);

/* Pages that somebody has dropped behind our back are zeros, and are put there (write-protected) before the library reads them: nobody could
 * serve its own fault. zeros is a page. Returns: CSVF_OK, CSVF_ERR_SYSTEM. */
int csvf__userfault_complete(csvf_vmram *vmram, uint32_t first, uint32_t count, const uint8_t *zeros);

/* madvise(MADV_DONTNEED), past a preloaded madvise: that one stands for the program's calls and waits until no page is under way. */
int csvf__userfault_drop(void *start, size_t length);

/* ---- dram_file.c: the file, the cipher, and what happens when one of them fails ---- */

/* Between the DRAM and `plain`, for pages first .. first + count. cipher is room for them. Returns: CSVF_OK or the failure, reported. */
int csvf__dram_load(csvf_vmram *vmram, uint8_t *plain, uint8_t *cipher, uint32_t first, uint32_t count);
int csvf__dram_store(csvf_vmram *vmram, uint8_t *cipher, const uint8_t *plain, uint32_t first, uint32_t count);
/* Is the file still there and long enough? Tells of a deletion once. Returns: CSVF_OK or the failure, reported. */
int csvf__dram_check(csvf_vmram *vmram);
/* The memory is gone: the owner is told, nothing new begins. First call only. Without the lock. Returns: the first failure. */
int csvf__fail(csvf_vmram *vmram, int status, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* So many pages are LOADING or EVICTING no more. The last one after a failure makes the memory inaccessible and wakes everybody who waits for
 * a page of it. Needs the lock. */
void csvf__no_longer_busy(csvf_vmram *vmram, uint32_t pages);

/* ---- window.c: who is in the window. All need the lock, and may give it away for a while. ---- */

/* A page is in the window now, in a slot of the clock. */
void csvf__window_enter(csvf_vmram *vmram, uint32_t page, csvf__page_state state);
/* Drops up to `batch` pages. Returns: pages dropped. */
uint32_t csvf__window_evict(csvf_vmram *vmram, csvf__hands *hands, uint32_t most);
/* Encrypts changed pages in place: the caller has quiesced. Returns: CSVF_OK or the failure. */
int csvf__window_flush(csvf_vmram *vmram, csvf__hands *hands);
/* Pages leave the window, and all of them are in the DRAM: the caller has quiesced. Returns: CSVF_OK or the failure. */
int csvf__window_expel(csvf_vmram *vmram, csvf__hands *hands, uint32_t first, uint32_t count);
/* Forgets pages of the window without writing them: the caller has quiesced. */
void csvf__window_forget(csvf_vmram *vmram, uint32_t first, uint32_t count);

/* ---- fault.c ---- */

/* A descriptor that wakes its thread only if no other that waits was woken. Returns: it, or -1. */
int csvf__fault_epoll(csvf_vmram *vmram);
void *csvf__fault_thread(void *hands);

/* ---- vmram.c ---- */

/* Takes the lock with no page under way; from then on nothing changes but by the caller, until csvf__resume gives the lock back. */
void csvf__quiesce(csvf_vmram *vmram);
void csvf__resume(csvf_vmram *vmram);

static inline int csvf__failure(csvf_vmram *vmram) { return atomic_load(&vmram->failure); }

#endif
