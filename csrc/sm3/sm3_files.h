/* SM3 of many small files. Internal: the binding's. */
#ifndef CSVF_SM3_FILES_H
#define CSVF_SM3_FILES_H

#include <stddef.h>
#include <stdint.h>

/* One file. `done` = 1: it was the regular file that the members say, read whole, and unchanged afterwards; the digest holds. 0: anything
 * else, errors too: it is to be measured in another way, which says what is wrong. */
typedef struct csvf__file {
    const char *path; /* In: this member and those up to ctime_ns */
    uint64_t inode, size;
    int64_t mtime_ns, ctime_ns;
    int done;
    uint8_t digest[32];
} csvf__file;

/* Reads files one after the other into `room` and hashes them in lanes whenever it is full.
 *   InOut: files      count
 *          room       room_length bytes, more than the limit
 *   In:    limit      bytes of a file, at most
 * Thread-safety: any thread, with room of its own. */
void csvf__sm3_files(csvf__file *files, size_t count, uint8_t *room, size_t room_length, size_t limit);

#endif
