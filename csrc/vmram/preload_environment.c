/* The preload library's environment: read once the size of the memory is known. docs/encrypted-ram.md lists it. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "preload.h"

static uint8_t *key;

/* Out: *value, within least .. most. An unset variable gives 0. Returns: 1, or 0 after a line that says why. */
static int read_number(uint32_t *value, const char *name, uint32_t most)
{
    const char *text = getenv(name);
    *value = 0;
    if (!text || !*text)
        return 1;
    char *end;
    errno = 0;
    const unsigned long number = strtoul(text, &end, 10);
    if (errno || *end || *text < '0' || *text > '9' || number < 1 || number > most) {
        preload_say("%s is '%s': a whole number from 1 to %u is needed", name, text, most);
        return 0;
    }
    *value = (uint32_t)number;
    return 1;
}

/* "64M", "67108864", or a share of the memory: "1/8". Returns: 1, or 0 after a line. */
static int read_window(size_t *window, size_t size)
{
    const char *text = getenv("CSVFAST_VMRAM_WINDOW");
    if (!text || !*text)
        text = "1/4";
    char *end;
    errno = 0;
    unsigned long long number = strtoull(text, &end, 10);
    int is_good = errno == 0 && end != text && *text >= '0' && *text <= '9';
    if (is_good && *end == '/') {
        const char *divisor_text = end + 1;
        const unsigned long long divisor = strtoull(divisor_text, &end, 10);
        is_good = errno == 0 && end != divisor_text && *divisor_text >= '0' && *divisor_text <= '9' && *end == 0 && divisor > 0 && number <= divisor;
        if (is_good)
            number = (unsigned long long)((long double)size / (long double)divisor * (long double)number);
    } else if (is_good && *end) {
        const char *unit = strchr("KMGT", *end);
        is_good = unit && end[1] == 0 && number <= ULLONG_MAX >> 40;
        if (is_good)
            number <<= 10 * (unit - "KMGT" + 1);
    }
    if (!is_good) {
        preload_say("CSVFAST_VMRAM_WINDOW is '%s': bytes with K, M or G, or a share like 1/8, are needed", text);
        return 0;
    }
    number = number / CSVF_PAGE_BYTES * CSVF_PAGE_BYTES;
    if (number < CSVF_VMRAM_WINDOW_MIN) {
        preload_say("CSVFAST_VMRAM_WINDOW is '%s': a window of %llu bytes holds no machine, at least %zu are needed", text, number,
            CSVF_VMRAM_WINDOW_MIN);
        return 0;
    }
    *window = number > SIZE_MAX ? SIZE_MAX / CSVF_PAGE_BYTES * CSVF_PAGE_BYTES : (size_t)number;
    return 1;
}

int preload_read_bytes(uint64_t *value, const char *text, const char **end)
{
    const int is_hexadecimal = text[0] == '0' && (text[1] == 'x' || text[1] == 'X');
    const char *digits = is_hexadecimal ? text + 2 : text;
    const int is_digit = (*digits >= '0' && *digits <= '9') ||
                         (is_hexadecimal && ((*digits >= 'a' && *digits <= 'f') || (*digits >= 'A' && *digits <= 'F')));
    if (!is_digit)
        return 0;
    char *stop;
    errno = 0;
    *value = strtoull(digits, &stop, is_hexadecimal ? 16 : 10);
    *end = stop;
    return errno == 0;
}

static int read_offset(preload_settings *settings)
{
    const char *text = getenv("CSVFAST_VMRAM_OFFSET"), *end;
    if (!text || !*text)
        return 1;
    settings->is_placed = preload_read_bytes(&settings->offset, text, &end) && *end == 0 && settings->offset % CSVF_PAGE_BYTES == 0 &&
                          settings->offset <= INT64_MAX;
    if (settings->is_placed)
        return 1;
    preload_say("CSVFAST_VMRAM_OFFSET is '%s': bytes, a multiple of %u, are needed", text, CSVF_PAGE_BYTES);
    return 0;
}

/* "start+length,start+length" in bytes from the start of the memory. */
static int read_written(preload_settings *settings, size_t size)
{
    const char *text = getenv("CSVFAST_VMRAM_WRITTEN");
    if (!text || !*text)
        return 1;
    size_t count = 1;
    for (const char *c = text; *c; c++)
        count += *c == ',';
    settings->written = calloc(count, sizeof *settings->written);
    if (!settings->written) {
        preload_say("no memory for CSVFAST_VMRAM_WRITTEN");
        return 0;
    }
    const char *at = text;
    for (size_t i = 0; i < count; i++) {
        preload_range *range = &settings->written[i];
        const int is_good = preload_read_bytes(&range->start, at, &at) && *at++ == '+' && preload_read_bytes(&range->length, at, &at) &&
                            *at == (i + 1 < count ? ',' : 0) && range->start % CSVF_PAGE_BYTES == 0 && range->length % CSVF_PAGE_BYTES == 0;
        if (!is_good) {
            preload_say("CSVFAST_VMRAM_WRITTEN is wrong at part %zu: start+length,start+length in bytes, multiples of %u, are needed", i + 1,
                        CSVF_PAGE_BYTES);
            return 0;
        }
        if (range->start > size || range->length > size - range->start) {
            preload_say("CSVFAST_VMRAM_WRITTEN: part %zu reaches beyond the %zu bytes of the memory", i + 1, size);
            return 0;
        }
        at++;
    }
    settings->written_count = count;
    return 1;
}

int preload_read_settings(preload_settings *settings, size_t size)
{
    *settings = (preload_settings){.control = getenv("CSVFAST_VMRAM_CONTROL")};
    if (settings->control && !*settings->control)
        settings->control = NULL;
    if (!read_window(&settings->window, size) || !read_number(&settings->threads, "CSVFAST_VMRAM_THREADS", CSVF_VMRAM_THREADS_MAX) ||
        !read_number(&settings->read_ahead, "CSVFAST_VMRAM_READ_AHEAD", CSVF_VMRAM_READ_AHEAD_MAX) || !read_offset(settings) ||
        !read_written(settings, size))
        return 0;
    settings->is_single = settings->is_placed || settings->written || settings->control;
    return 1;
}

/* Exactly 32 bytes and then the end, which is how a pipe or file of another length is noticed. */
static int read_key_from(int fd, const char *name)
{
    uint8_t bytes[CSVF_XTS_KEY_BYTES + 1];
    size_t got = 0;
    while (got < sizeof bytes) {
        const ssize_t more = read(fd, bytes + got, sizeof bytes - got);
        if (more < 0 && errno == EINTR)
            continue;
        if (more <= 0)
            break;
        got += (size_t)more;
    }
    const int is_good = got == CSVF_XTS_KEY_BYTES;
    if (is_good)
        memcpy(key, bytes, CSVF_XTS_KEY_BYTES);
    else
        preload_say("%s holds %s bytes: a key is exactly %u (K1, then K2)", name, got > CSVF_XTS_KEY_BYTES ? "more" : "fewer", CSVF_XTS_KEY_BYTES);
    csvf_wipe(bytes, sizeof bytes);
    return is_good;
}

static int fill_key(void)
{
    const char *path = getenv("CSVFAST_VMRAM_KEY_FILE"), *number = getenv("CSVFAST_VMRAM_KEY_FD");
    if (path && *path && number && *number) {
        preload_say("both CSVFAST_VMRAM_KEY_FILE and CSVFAST_VMRAM_KEY_FD are set: which is it?");
        return 0;
    }
    if (number && *number) {
        char *end;
        errno = 0;
        const long fd = strtol(number, &end, 10);
        if (errno || *end || fd < 0 || fd > INT_MAX || fcntl((int)fd, F_GETFD) < 0) {
            preload_say("CSVFAST_VMRAM_KEY_FD is '%s', which is no open file descriptor", number);
            return 0;
        }
        const int is_good = read_key_from((int)fd, "CSVFAST_VMRAM_KEY_FD");
        close((int)fd);
        return is_good;
    }
    if (path && *path) {
        const int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0) {
            preload_say("CSVFAST_VMRAM_KEY_FILE '%s' cannot be opened: %s", path, strerror(errno));
            return 0;
        }
        const int is_good = read_key_from(fd, "CSVFAST_VMRAM_KEY_FILE");
        close(fd);
        return is_good;
    }
    for (size_t got = 0; got < CSVF_XTS_KEY_BYTES;) {
        const ssize_t more = getrandom(key + got, CSVF_XTS_KEY_BYTES - got, 0);
        if (more < 0 && errno != EINTR) {
            preload_say("the system gives no random key: %s", strerror(errno));
            return 0;
        }
        got += more > 0 ? (size_t)more : 0;
    }
    return 1;
}

int preload_read_key(const uint8_t **result)
{
    if (key) {
        *result = key;
        return 1;
    }
    void *page = mmap(NULL, CSVF_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) {
        preload_say("no memory for the key");
        return 0;
    }
    (void)syscall(SYS_madvise, page, CSVF_PAGE_BYTES, MADV_DONTDUMP);
    (void)syscall(SYS_madvise, page, CSVF_PAGE_BYTES, MADV_WIPEONFORK);
    key = page;
    if (fill_key()) {
        *result = key;
        return 1;
    }
    csvf_wipe(page, CSVF_PAGE_BYTES);
    key = NULL;
    syscall(SYS_munmap, page, CSVF_PAGE_BYTES);
    return 0;
}

void preload_wipe_key(void)
{
    if (key)
        csvf_wipe(key, CSVF_XTS_KEY_BYTES);
}
