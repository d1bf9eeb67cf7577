/* Files hashed where the page cache has them, without a copy, and without the danger of mapping: a page that goes away (the file was
 * truncated, the disk cannot be read) makes the result void, where it would end the process. Internal: the binding's.
 *
 * The first call takes the signal SIGBUS for the whole process: pages of windows that are being hashed in the thread that faults are replaced by
 * zeros, and the window is noted as lost; every other fault goes to the handler that was there before. When somebody takes the signal
 * later, nothing is mapped any more. (The pattern of systemd's src/basic/sigbus.c and Wayland's src/wayland-shm.c.) */
#ifndef CSVF_SM3_MAPPED_H
#define CSVF_SM3_MAPPED_H

#include <stddef.h>
#include <stdint.h>

#include "../include/csvfast.h"

/* A part of a file. `done` = 1: what was asked for is done. 0: it could not be mapped, or was lost: nothing is done, to be read in another way,
 * which says what is wrong. */
typedef struct csvf__window {
    int descriptor;   /* In */
    uint64_t offset;  /* In: any */
    size_t length;    /* In */
    int done;
    uint8_t *pages;   /* what is mapped, and its bytes; NULL: nothing is */
    size_t pages_length;
    volatile int lost;
} csvf__window;

/* Continues `count` different streams, each with a window.
 *   InOut: streams, windows   count
 *   Work:  before, data, lengths   count of each
 * Thread-safety: any thread, with streams of its own. */
void csvf__sm3_update_mapped(csvf_sm3 *const *streams, csvf__window *windows, size_t count, csvf_sm3 *before, const uint8_t **data, size_t *lengths);

/* csvf_sm3_blocks of a window, whose length is a multiple of block_length. Returns csvf_sm3_blocks' status. */
int csvf__sm3_blocks_mapped(uint8_t *digests, const uint8_t *prefix, size_t prefix_length, csvf__window *window, size_t block_length);

#endif
