/* csvfast: memory that is ciphertext outside a bounded window, for virtual machines (Linux only).
 *
 * A csvf_vmram is a range of this process's memory, a guest's RAM, that is kept encrypted in a DRAM file. A page is decrypted under the
 * guest's ASID when something touches it (userfaultfd(2)), and encrypted and dropped again when the window of plaintext is full. The
 * DRAM is an ordinary file or memfd: anybody who may open it reads ciphertext, and what he changes reaches the guest as noise, without
 * an error, as on the hardware. The ciphertext is the engine's: csvf_read under the same ASID decrypts what stands in the file.
 *
 * The laws of csvfast.h hold here too. docs/encrypted-ram.md says what the window promises and what it does not.
 */
#ifndef CSVFAST_VMRAM_H
#define CSVFAST_VMRAM_H

#include "csvfast.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CSVF_VMRAM_WINDOW_MIN ((size_t)64 << 10) /* an instruction touches several pages at once, and all must fit */
#define CSVF_VMRAM_THREADS_MAX 16u
#define CSVF_VMRAM_READ_AHEAD_MAX 64u

/* What happened to the memory, told by a fault thread or by the thread inside a csvf_vmram call: one line of English without a line
 * end, valid during the call. status is CSVF_OK for a notice (the DRAM file was deleted, the memory works on) and otherwise the
 * failure after which the memory is gone: every access to it then raises SIGSEGV. The callee must not touch the memory nor
 * call csvf_vmram functions; it may end the process. */
typedef void csvf_vmram_report(void *context, int status, const char *text);

/* Zero in any field but struct_size and window_size asks for the default. */
typedef struct csvf_vmram_config {
    size_t struct_size;         /* sizeof(csvf_vmram_config) */
    size_t window_size;         /* bytes of plaintext at most, a multiple of 4096, at least CSVF_VMRAM_WINDOW_MIN; more than the memory = all of it */
    void *at;                   /* NULL = anywhere; otherwise this page-aligned range is replaced, as by MAP_FIXED */
    uint32_t threads;           /* fault threads, 1 .. CSVF_VMRAM_THREADS_MAX; default 2 */
    uint32_t read_ahead;        /* pages fetched at most by a fault that continues a run, upwards or downwards (four times as many if they
                                 * were never written); default 8, 1 = none, at most CSVF_VMRAM_READ_AHEAD_MAX */
    csvf_vmram_report *report;  /* NULL = nobody is told */
    void *report_context;
} csvf_vmram_config;

typedef struct csvf_vmram_stats {
    size_t struct_size;         /* in: sizeof(csvf_vmram_stats) */
    uint64_t size, window_size; /* bytes */
    uint64_t resident;          /* bytes of plaintext in the memory now; never more than window_size */
    uint64_t resident_peak;
    uint64_t faults;            /* pages that were touched while absent */
    uint64_t write_faults;      /* first writes to pages that were read before */
    uint64_t pages_ahead;       /* pages fetched before they were touched */
    uint64_t pages_zero;        /* of the fetched pages, those never written: zeros, without a look at the DRAM */
    uint64_t evictions;         /* pages dropped from the window */
    uint64_t evictions_clean;   /* of these, not changed since they were fetched: dropped without encryption */
    uint64_t pages_discarded;   /* by csvf_vmram_discard or by madvise of somebody else */
    uint64_t bytes_encrypted;   /* through SM4, by this memory */
    uint64_t bytes_decrypted;
    int failure;                /* CSVF_OK, or why the memory is gone */
} csvf_vmram_stats;

typedef struct csvf_vmram csvf_vmram;

/* May this process use userfaultfd for faults of the kernel too (read(2) into guest memory), with write protection?
 * Out: *reason, if reason is not NULL: NULL, or one sentence that says what the system forbids or lacks and who can change that
 * Returns: CSVF_OK, CSVF_ERR_SYSTEM (errno says how). PURE. */
CSVF_API CSVF_MUST_CHECK int csvf_vmram_probe(const char **reason);

/* Makes encrypted memory over a part of an engine's DRAM, under a guest's ASID, whose key must be installed and must stay.
 *   Out: vmram     *vmram is set on success, NULL on failure
 *   In:  engine    made by csvf_engine_create_file over the file of fd (or over a mapping of it); outlives the vmram
 *        fd        the DRAM file, open for reading and writing; duplicated, the caller's may be closed
 *        offset    where in the file the engine's address `address` lies; multiples of 4096
 *        size      bytes of memory, a multiple of 4096, inside the engine; the file must be offset + size long
 *        config    window_size is needed
 * The memory starts as zeros whatever the file holds: no page is read from or written to it before the guest has written that page, and
 * the cost does not grow with size. csvf_vmram_adopt and csvf_vmram_restore bring content.
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_LENGTH (size, window, file too short), CSVF_ERR_ALIGNMENT, CSVF_ERR_RANGE, CSVF_ERR_ASID,
 *          CSVF_ERR_MEMORY, CSVF_ERR_SYSTEM (userfaultfd: see csvf_vmram_probe). PURE. */
CSVF_API CSVF_MUST_CHECK int csvf_vmram_create(csvf_vmram **vmram, csvf_engine *engine, uint32_t asid, int fd, uint64_t offset,
                                               uint64_t address, size_t size, const csvf_vmram_config *config);

/* The same with an engine of its own under ASID 1, for one guest: data units count from address / 4096.
 *   In: key   CSVF_XTS_KEY_BYTES, K1 || K2
 * Returns: as csvf_vmram_create, and CSVF_ERR_KEY. PURE. */
CSVF_API CSVF_MUST_CHECK int csvf_vmram_create_with_key(csvf_vmram **vmram, const uint8_t *key, size_t key_length, int fd,
                                                        uint64_t offset, uint64_t address, size_t size,
                                                        const csvf_vmram_config *config);

/* Ends the fault threads and gives plaintext, key and memory back, what was not encrypted yet is lost: csvf_vmram_flush first to
 * keep it. A range that stood at config->at stays reserved and without access. NULL is allowed. No other thread may be touching the
 * memory or be inside a call. In the child of a fork, which inherits none of the memory, it frees what was inherited. */
CSVF_API void csvf_vmram_destroy(csvf_vmram *vmram);

/* The first byte of the memory; NULL and 0 for NULL. Valid until destroy. The memory is not inherited by fork, not in core dumps, not in
 * huge pages. Direct I/O (O_DIRECT, VFIO) into it may be lost: pages that the kernel holds pinned can be evicted. PURE. */
CSVF_API void *csvf_vmram_memory(csvf_vmram *vmram);
CSVF_API size_t csvf_vmram_size(const csvf_vmram *vmram);

/* Encrypts what was changed into the DRAM; the pages stay in the window. All of them are of one moment: threads that write meanwhile
 * wait. Returns: CSVF_OK, CSVF_ERR_ARGUMENT, or why the memory is gone. SHARED. */
CSVF_API CSVF_MUST_CHECK int csvf_vmram_flush(csvf_vmram *vmram);

/* Makes length bytes from offset on zeros that were never written: as madvise(MADV_DONTNEED) on ordinary memory. Both are multiples of 4096.
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_ALIGNMENT, CSVF_ERR_RANGE, or why the memory is gone. SHARED. */
CSVF_API CSVF_MUST_CHECK int csvf_vmram_discard(csvf_vmram *vmram, uint64_t offset, size_t length);

/* Takes over pages whose ciphertext stands in the DRAM, such as those that LAUNCH_UPDATE_DATA encrypted there: from now on they read as that,
 * decrypted, instead of as zeros. What the window held of them is lost. offset and length are multiples of 4096.
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_ALIGNMENT, CSVF_ERR_RANGE, or why the memory is gone. SHARED. */
CSVF_API CSVF_MUST_CHECK int csvf_vmram_adopt(csvf_vmram *vmram, uint64_t offset, size_t length);

/* Takes pages out of the window, so that somebody else can work on them in the DRAM: when it returns their ciphertext stands there, of
 * pages never written as well (zeros, encrypted), and the next touch decrypts the DRAM anew. Nothing keeps that touch from
 * coming at once: a page that is written meanwhile overwrites the other's work. offset and length are multiples of 4096.
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_ALIGNMENT, CSVF_ERR_RANGE, or why the memory is gone. SHARED. */
CSVF_API CSVF_MUST_CHECK int csvf_vmram_evict(csvf_vmram *vmram, uint64_t offset, size_t length);

/* Writes the encrypted image of one moment to a file, from its start: ciphertext and which pages were written, no key. Threads that touch
 * absent pages or write wait meanwhile. The file's length becomes the image's.
 * Returns: CSVF_OK, CSVF_ERR_ARGUMENT, CSVF_ERR_SYSTEM (errno; the file is then of no use), or why the memory is gone. SHARED. */
CSVF_API CSVF_MUST_CHECK int csvf_vmram_snapshot(csvf_vmram *vmram, int fd);

/* Replaces the memory and its DRAM by an image that csvf_vmram_snapshot wrote from memory of the same size and address. Under another key
 * the guest sees noise. Nothing authenticates an image, as nothing authenticates the DRAM. Stop the guest first.
 * Returns: CSVF_OK; CSVF_ERR_ARGUMENT (not an image, or of other memory) and CSVF_ERR_LENGTH (cut), with nothing changed; CSVF_ERR_SYSTEM
 *          while the image is read, which leaves the memory gone; or why the memory is gone. SHARED. */
CSVF_API CSVF_MUST_CHECK int csvf_vmram_restore(csvf_vmram *vmram, int fd);

/* Out: *stats of one moment. Returns: CSVF_OK, CSVF_ERR_ARGUMENT. SHARED. */
CSVF_API CSVF_MUST_CHECK int csvf_vmram_get_stats(csvf_vmram *vmram, csvf_vmram_stats *stats);

#ifdef __cplusplus
}
#endif
#endif /* CSVFAST_VMRAM_H */
