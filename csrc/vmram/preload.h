/* The preload library from the inside. Internal to libcsvfast-vmram-preload.so; the library's archive knows nothing of it. */
#ifndef CSVF_VMRAM_PRELOAD_H
#define CSVF_VMRAM_PRELOAD_H

#include <limits.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/types.h>

#include "../include/csvfast_vmram.h"

enum { PRELOAD_MAPPINGS_MAX = 16, PRELOAD_EXIT = 3 };

typedef struct preload_mapping {
    csvf_vmram *vmram;      /* NULL: the slot is free */
    uintptr_t start;
    size_t size;
    dev_t device;
    ino_t inode;
    char path[PATH_MAX];
} preload_mapping;

extern preload_mapping preload_mappings[PRELOAD_MAPPINGS_MAX];
extern pthread_mutex_t preload_lock;        /* guards them, and is held as long as one of them is worked with */
extern __thread int preload_is_inside;      /* this thread does the library's work: what that maps in turn is its own */

/* One line to the user, by one write. */
void preload_say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* A thread that takes no signal: the program's handlers may touch the memory. Detached. Returns: 0, or an errno. */
int preload_start_thread(void *(*body)(void *), void *context);

/* ---- preload_environment.c. What is wrong gets a line; all return 1, or 0 after that line. ---- */

typedef struct preload_range {
    uint64_t start, length;
} preload_range;

typedef struct preload_settings {
    size_t window;
    uint32_t threads, read_ahead;
    uint64_t offset;                /* CSVFAST_VMRAM_OFFSET, or 0 */
    int is_placed;                  /* it was set */
    preload_range *written;         /* CSVFAST_VMRAM_WRITTEN: allocated, or NULL */
    size_t written_count;
    const char *control;            /* CSVFAST_VMRAM_CONTROL, or NULL */
    int is_single;                  /* something is said that only one memory can mean */
} preload_settings;

/* Decimal, or hexadecimal after 0x; no sign, no blank. Out: *end, behind it. Without a line. Returns: 1, or 0 for no number. */
int preload_read_bytes(uint64_t *value, const char *text, const char **end);
/* For memory of so many bytes. Free *settings->written. */
int preload_read_settings(preload_settings *settings, size_t size);
/* The first call reads or makes it. Out: *key, 32 bytes; a page of its own, not in core dumps, zeros in children. */
int preload_read_key(const uint8_t **key);
void preload_wipe_key(void);

/* ---- preload_statistics.c ---- */

/* One JSON object in one line, without its end. Needs the lock. */
void preload_write_counters(FILE *file, const preload_mapping *about);
/* CSVFAST_VMRAM_STATS: a thread writes it twice a second. First call only. */
void preload_start_statistics(void);
void preload_write_statistics(void);

/* ---- preload_control.c ---- */

/* Listens at the path, if it does not yet. Returns: 1, or 0 after a line. */
int preload_start_control(const char *path);
/* The socket's name goes: at the end, and before the process is ended. */
void preload_remove_control(void);

#endif
