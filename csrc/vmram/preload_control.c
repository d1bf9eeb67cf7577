/* The preload library's control socket: the processor asks for pages, which it works on in the DRAM, and the host for counters and images.
 *
 * One request a line, one answer a line: "ok", "error TEXT", or a JSON object. One thread serves everybody in turn and never waits for a
 * peer: who sends garbage is told so, who does not take his answers is closed. docs/encrypted-ram.md has the requests. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "preload.h"

enum { PEERS_MAX = 8, BACKLOG = 64, LINE_MAX_BYTES = PATH_MAX + 32 };

typedef struct peer {
    int fd;
    size_t used;
    uint64_t last;          /* turn of the loop in which it was heard last */
    char line[LINE_MAX_BYTES];
} peer;

static int listener = -1;
static char socket_path[sizeof((struct sockaddr_un *)0)->sun_path];
static pid_t maker;

/* ---- Requests ---- */

static char *answer_with(const char *format, const char *text)
{
    char *answer;
    return asprintf(&answer, format, text) < 0 ? NULL : answer;
}

static char *answer_status(int status)
{
    if (status == CSVF_OK)
        return strdup("ok\n");
    return answer_with("error %s\n", status == CSVF_ERR_SYSTEM ? strerror(errno) : csvf_status_text(status));
}

static char *evict(const preload_mapping *about, const char *arguments)
{
    uint64_t offset, length;
    const char *at = arguments;
    if (!preload_read_bytes(&offset, at, &at) || *at++ != ' ' || !preload_read_bytes(&length, at, &at) || *at)
        return strdup("error evict OFFSET LENGTH: two numbers, in bytes\n");
    return answer_status(length > SIZE_MAX ? CSVF_ERR_RANGE : csvf_vmram_evict(about->vmram, offset, (size_t)length));
}

static char *snapshot(const preload_mapping *about, const char *path)
{
    if (*path != '/')
        return strdup("error snapshot PATH: an absolute path\n");
    const int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0600);
    struct stat file;
    if (fd < 0)
        return answer_status(CSVF_ERR_SYSTEM);
    char *answer;
    if (fstat(fd, &file) || !S_ISREG(file.st_mode))
        answer = strdup("error that is no file\n");
    else if (file.st_dev == about->device && file.st_ino == about->inode)
        answer = strdup("error that is the DRAM file\n");
    else
        answer = answer_status(csvf_vmram_snapshot(about->vmram, fd));
    close(fd);
    return answer;
}

static char *counters(const preload_mapping *about)
{
    char *text = NULL;
    size_t length;
    FILE *file = open_memstream(&text, &length);
    if (!file)
        return NULL;
    preload_write_counters(file, about);
    fputc('\n', file);
    if (fclose(file) == 0)
        return text;
    free(text);
    return NULL;
}

/* Returns: the answer, allocated, or NULL without memory. */
static char *serve(const char *line)
{
    const preload_mapping *about = NULL;
    char *answer;
    pthread_mutex_lock(&preload_lock);
    for (int i = 0; i < PRELOAD_MAPPINGS_MAX && !about; i++)
        if (preload_mappings[i].vmram)
            about = &preload_mappings[i];
    if (!about)
        answer = strdup("error no memory is mapped\n");
    else if (strncmp(line, "evict ", 6) == 0)
        answer = evict(about, line + 6);
    else if (strcmp(line, "flush") == 0)
        answer = answer_status(csvf_vmram_flush(about->vmram));
    else if (strncmp(line, "snapshot ", 9) == 0)
        answer = snapshot(about, line + 9);
    else if (strcmp(line, "stats") == 0)
        answer = counters(about);
    else
        answer = strdup("error the requests are: evict OFFSET LENGTH, flush, snapshot PATH, stats\n");
    pthread_mutex_unlock(&preload_lock);
    return answer;
}

/* ---- Peers ---- */

static void forget(peer *p)
{
    close(p->fd);
    p->fd = -1;
}

/* Whole, or not at all: nobody waits for a peer. Returns: 1, or 0 if it is closed. */
static int tell(peer *p, const char *text)
{
    if (text && send(p->fd, text, strlen(text), MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)strlen(text))
        return 1;
    forget(p);
    return 0;
}

static void hear(peer *p)
{
    const ssize_t got = recv(p->fd, p->line + p->used, sizeof p->line - p->used, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got <= 0) {
        forget(p);
        return;
    }
    p->used += (size_t)got;
    size_t start = 0;
    for (char *end; (end = memchr(p->line + start, '\n', p->used - start)) != NULL; start = (size_t)(end - p->line) + 1) {
        *end = 0;
        char *answer = strlen(p->line + start) == (size_t)(end - p->line) - start ? serve(p->line + start)
                                                                                  : strdup("error a request is text\n");
        const int is_open = tell(p, answer);
        free(answer);
        if (!is_open)
            return;
    }
    p->used -= start;
    memmove(p->line, p->line + start, p->used);
    if (p->used == sizeof p->line && tell(p, "error a request is one line, and shorter\n"))
        forget(p);
}

/* The one that was silent longest makes room: nobody can keep the others out by holding connections. */
static void greet(peer *peers, uint64_t turn)
{
    const int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) {
        if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM)
            usleep(50000);
        return;
    }
    struct ucred who;
    socklen_t length = sizeof who;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &length) || who.uid != geteuid()) {
        close(fd);
        return;
    }
    peer *place = &peers[0];
    for (int i = 0; i < PEERS_MAX && place->fd >= 0; i++)
        if (peers[i].fd < 0 || peers[i].last < place->last)
            place = &peers[i];
    if (place->fd >= 0)
        forget(place);
    place->fd = fd;
    place->used = 0;
    place->last = turn;
}

static void *serve_peers(void *context)
{
    static peer peers[PEERS_MAX];
    preload_is_inside = 1;
    for (int i = 0; i < PEERS_MAX; i++)
        peers[i].fd = -1;
    for (uint64_t turn = 1;; turn++) {
        struct pollfd waits[PEERS_MAX + 1] = {{.fd = listener, .events = POLLIN}};
        for (int i = 0; i < PEERS_MAX; i++)
            waits[i + 1] = (struct pollfd){.fd = peers[i].fd, .events = POLLIN};
        if (poll(waits, PEERS_MAX + 1, -1) < 0)
            continue;
        for (int i = 0; i < PEERS_MAX; i++)
            if (waits[i + 1].revents) {
                peers[i].last = turn;
                hear(&peers[i]);
            }
        if (waits[0].revents)
            greet(peers, turn);
    }
    return context;
}

/* ---- The socket ---- */

/* A socket at which nobody listens: what a killed machine left. */
static int is_stale(const struct sockaddr_un *address)
{
    struct stat about;
    if (lstat(address->sun_path, &about) || !S_ISSOCK(about.st_mode))
        return 0;
    const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const int is_refused = fd >= 0 && connect(fd, (const struct sockaddr *)address, sizeof *address) && errno == ECONNREFUSED;
    if (fd >= 0)
        close(fd);
    return is_refused;
}

static int open_listener(const struct sockaddr_un *address)
{
    const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -1;
    /* Before bind, so that the name never has another mode: Linux takes the socket's. */
    int is_good = fchmod(fd, 0600) == 0;
    if (is_good && bind(fd, (const struct sockaddr *)address, sizeof *address)) {
        const int error = errno;
        is_good = error == EADDRINUSE && is_stale(address) && unlink(address->sun_path) == 0 &&
                  bind(fd, (const struct sockaddr *)address, sizeof *address) == 0;
        if (!is_good)
            errno = error;
    }
    if (is_good && listen(fd, BACKLOG) == 0)
        return fd;
    const int saved = errno;
    close(fd);
    errno = saved;
    return -1;
}

int preload_start_control(const char *path)
{
    if (listener >= 0 && maker == getpid())
        return 1;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (*path != '/' || strlen(path) >= sizeof address.sun_path) {
        preload_say("CSVFAST_VMRAM_CONTROL is '%s': an absolute path of at most %zu bytes is needed", path, sizeof address.sun_path - 1);
        return 0;
    }
    strcpy(address.sun_path, path);
    listener = open_listener(&address);
    if (listener < 0) {
        preload_say("CSVFAST_VMRAM_CONTROL '%s' cannot be listened at: %s", path, strerror(errno));
        return 0;
    }
    strcpy(socket_path, path);
    maker = getpid();
    const int error = preload_start_thread(serve_peers, NULL);
    if (error == 0)
        return 1;
    preload_say("CSVFAST_VMRAM_CONTROL: no thread: %s", strerror(error));
    preload_remove_control();
    close(listener);
    listener = -1;
    return 0;
}

void preload_remove_control(void)
{
    if (listener >= 0 && maker == getpid())
        unlink(socket_path);
}
