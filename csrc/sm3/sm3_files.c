/* SM3 of many small files: four system calls a file, no allocation, and all lanes busy.
 *
 * A file is whole and unchanged if one read gives its size and not a byte more, and the descriptor has the inode, size and times afterwards
 * that the caller had found before, perhaps on another machine. (Whoever unlinks or replaces a file changes its ctime, too.) */
#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* pread, O_CLOEXEC, st_mtim */
#endif
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../include/csvfast.h"
#include "sm3_files.h"

#define GROUP 256 /* files that are hashed in one call, at most */

#if defined(__APPLE__)
#define MTIME st_mtimespec
#define CTIME st_ctimespec
#else
#define MTIME st_mtim
#define CTIME st_ctim
#endif

static int64_t nanoseconds(struct timespec time)
{
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static int is_same(const csvf__file *file, const struct stat *status)
{
    return S_ISREG(status->st_mode) && (uint64_t)status->st_ino == file->inode
           && (uint64_t)status->st_size == file->size && nanoseconds(status->MTIME) == file->mtime_ns
           && nanoseconds(status->CTIME) == file->ctime_ns;
}

/* Reads a file of which `size` bytes are expected into room for one more. 0: it is not so long, not the one that was found, or cannot be
 * read. Never waits: a pipe or a device opens at once, and is refused. */
static int read_whole(const csvf__file *file, uint8_t *out)
{
    struct stat status;
    const int descriptor = open(file->path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    ssize_t count;
    if (descriptor < 0)
        return 0;
    do
        count = pread(descriptor, out, (size_t)file->size + 1, 0);
    while (count < 0 && errno == EINTR);
    const int whole = count >= 0 && (uint64_t)count == file->size && fstat(descriptor, &status) == 0 && is_same(file, &status);
    close(descriptor);
    return whole;
}

static void hash(csvf__file *const *group, const uint8_t *const *data, const size_t *lengths, size_t count)
{
    uint8_t digests[GROUP][32];
    csvf_sm3_many(digests[0], data, lengths, count);
    for (size_t i = 0; i < count; i++)
        memcpy(group[i]->digest, digests[i], 32);
}

void csvf__sm3_files(csvf__file *files, size_t count, uint8_t *room, size_t room_length, size_t limit)
{
    csvf__file *group[GROUP];
    const uint8_t *data[GROUP] = {0};
    size_t lengths[GROUP] = {0}, held = 0, used = 0;
    for (size_t i = 0; i < count; i++) {
        csvf__file *file = &files[i];
        file->done = 0;
        if (file->size > limit)
            continue;
        if (held == GROUP || room_length - used <= file->size) {
            hash(group, data, lengths, held);
            held = used = 0;
        }
        if (read_whole(file, room + used)) {
            file->done = 1;
            group[held] = file;
            data[held] = room + used;
            lengths[held++] = (size_t)file->size;
            used += ((size_t)file->size + 63) / 64 * 64;
            used = used < room_length ? used : room_length;
        }
    }
    if (held)
        hash(group, data, lengths, held);
}
