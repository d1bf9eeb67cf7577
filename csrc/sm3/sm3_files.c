/* SM3 of many small files: five system calls a file, no allocation, and all lanes busy.
 *
 * A file is whole if one read gives its size and not a byte more, and unchanged if the path leads to the same device and inode with
 * the same size and times after the read as the descriptor had before. */
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

static void note(csvf__file *file, const struct stat *status)
{
    file->device = (uint64_t)status->st_dev;
    file->inode = (uint64_t)status->st_ino;
    file->size = (uint64_t)status->st_size;
    file->mtime_ns = nanoseconds(status->MTIME);
    file->ctime_ns = nanoseconds(status->CTIME);
}

static int is_same(const csvf__file *file, const struct stat *status)
{
    csvf__file now;
    note(&now, status);
    return now.device == file->device && now.inode == file->inode && now.size == file->size && now.mtime_ns == file->mtime_ns
           && now.ctime_ns == file->ctime_ns;
}

/* As many bytes as there are, at most `length`; -1 for an error. */
static int64_t read_all(int descriptor, uint8_t *out, size_t length)
{
    size_t done = 0;
    while (done < length) {
        const ssize_t count = pread(descriptor, out + done, length - done, (off_t)done);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0)
            return -1;
        if (count == 0)
            break;
        done += (size_t)count;
    }
    return (int64_t)done;
}

/* Opens a file for which there may be room: its descriptor, or -1. Never waits: a pipe or a device opens at once, and is refused. */
static int begin(csvf__file *file, size_t limit)
{
    struct stat status;
    const int descriptor = open(file->path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    if (descriptor < 0)
        return -1;
    if (fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode) && status.st_size >= 0 && (uint64_t)status.st_size <= limit) {
        note(file, &status);
        return descriptor;
    }
    close(descriptor);
    return -1;
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
        struct stat status;
        file->done = 0;
        const int descriptor = begin(file, limit);
        if (descriptor < 0)
            continue;
        if (held == GROUP || room_length - used <= file->size) {
            hash(group, data, lengths, held);
            held = used = 0;
        }
        if (read_all(descriptor, room + used, (size_t)file->size + 1) == (int64_t)file->size && stat(file->path, &status) == 0
            && is_same(file, &status)) {
            file->done = 1;
            group[held] = file;
            data[held] = room + used;
            lengths[held++] = (size_t)file->size;
            used += ((size_t)file->size + 63) / 64 * 64;
            used = used < room_length ? used : room_length;
        }
        close(descriptor);
    }
    if (held)
        hash(group, data, lengths, held);
}
