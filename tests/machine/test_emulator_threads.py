"""Threads, epoll, eventfd and sockets of emulated programs: what a program with threads prints is what it prints on the host."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("unicorn")

from csvfast.machine.emulator import EmulatedProcess

THREADS = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
static long counter, turns;
static __thread long own;
static volatile int spin_done;
static int ends[2];
static void *work(void *p) {
    for (int i = 0; i < 20000; i++) {
        pthread_mutex_lock(&lock);
        counter++, own++;
        pthread_mutex_unlock(&lock);
    }
    return (void *)(own + (long)p);
}
static void take_turns(long mine) {
    pthread_mutex_lock(&lock);
    while (turns < 200) {
        while (turns < 200 && turns % 2 != mine) pthread_cond_wait(&cond, &lock);
        turns++;
        pthread_cond_broadcast(&cond);
    }
    pthread_mutex_unlock(&lock);
}
static void *second(void *p) { take_turns(1); return p; }
static void *reader(void *p) {
    char text[6] = "";
    long n = 0;
    while (n < 5) n += read(ends[0], text + n, 5 - n);
    printf("read %s\n", text);
    return p;
}
static void *spinner(void *p) { while (!spin_done); return p; }
int main(void) {
    pthread_t t[4];
    void *r;
    for (long i = 0; i < 4; i++) pthread_create(&t[i], 0, work, (void *)i);
    for (int i = 0; i < 4; i++) { pthread_join(t[i], &r); printf("thread %ld\n", (long)r); }
    printf("counter %ld own %ld\n", counter, own);
    pthread_create(&t[0], 0, second, 0);
    take_turns(0);
    pthread_join(t[0], 0);
    if (pipe(ends)) return 1;
    pthread_create(&t[0], 0, reader, 0);
    usleep(20000);
    if (write(ends[1], "he", 2) != 2) return 2;
    usleep(20000);
    if (write(ends[1], "llo", 3) != 3) return 2;
    pthread_join(t[0], 0);
    pthread_create(&t[0], 0, spinner, 0);
    usleep(30000);
    spin_done = 1;
    pthread_join(t[0], 0);
    struct timespec when;
    clock_gettime(CLOCK_REALTIME, &when);
    when.tv_nsec += 30000000;
    if (when.tv_nsec >= 1000000000) when.tv_sec++, when.tv_nsec -= 1000000000;
    pthread_mutex_lock(&lock);
    printf("timed %d\n", pthread_cond_timedwait(&cond, &lock, &when) == ETIMEDOUT);
    pthread_mutex_unlock(&lock);
    int status, event = eventfd(0, 0), group = epoll_create1(0);
    struct epoll_event wanted = {EPOLLIN, {.u64 = 77}}, got;
    epoll_ctl(group, EPOLL_CTL_ADD, event, &wanted);
    printf("epoll %d\n", epoll_wait(group, &got, 1, 0));
    long one = 1;
    if (write(event, &one, 8) != 8) return 3;
    status = epoll_wait(group, &got, 1, 1000);
    printf("epoll %d %d\n", status, (int)got.data.u64);
    fflush(stdout);
    if (!fork()) {
        pthread_create(&t[0], 0, work, (void *)1);
        pthread_join(t[0], &r);
        printf("child %ld\n", (long)r);
        fflush(stdout);
        _exit(7);
    }
    wait(&status);
    printf("end %d\n", WEXITSTATUS(status));
    pthread_create(&t[0], 0, reader, 0);
    return 5;
}
"""
SIGNALS = r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
static volatile sig_atomic_t got, on_stack;
static char stack[65536];
static pthread_t other;
static void handler(int number, siginfo_t *info, void *context) {
    char here; (void)info; (void)context; (void)number;
    got++;
    on_stack = &here > stack && &here < stack + sizeof stack;
}
static void *spin(void *p) { while (!got); return p; }
static void *sleeper(void *p) { sleep(100); return p; }
int main(void) {
    struct sigaction action = {0};
    stack_t place = {.ss_sp = stack, .ss_size = sizeof stack};
    action.sa_sigaction = handler;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGUSR1, &action, 0);
    sigaltstack(&place, 0);
    raise(SIGUSR1);
    printf("%d %d\n", got, on_stack);
    got = 0;
    pthread_create(&other, 0, spin, 0);
    pthread_kill(other, SIGUSR1);
    pthread_join(other, 0);
    printf("%d\n", got);
    pthread_create(&other, 0, sleeper, 0);
    usleep(20000);
    pthread_kill(other, SIGUSR1);
    pthread_join(other, 0);
    printf("%d\n", got);
    fflush(stdout);
    pthread_create(&other, 0, sleeper, 0);
    abort();
}
"""


SOCKETS = r"""
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
static void *serve(void *p) {
    int one = accept(*(int *)p, 0, 0);
    char text[64];
    ssize_t got = recv(one, text, sizeof text, 0);
    struct iovec parts[2] = {{"back ", 5}, {text, (size_t)got}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    sendmsg(one, &message, 0);
    close(one);
    return p;
}
static int talk(struct sockaddr *address, socklen_t length) {
    int listener = socket(address->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0), client, on = 1;
    pthread_t thread;
    char text[64] = "";
    if (listener < 0) { printf("%s\n", strerror(errno)); return 1; }
    if (address->sa_family == AF_INET) setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, address, length) || listen(listener, 4)) { printf("bind %s\n", strerror(errno)); return 1; }
    if (address->sa_family == AF_INET) getsockname(listener, address, &length);
    pthread_create(&thread, 0, serve, &listener);
    client = socket(address->sa_family, SOCK_STREAM, 0);
    if (connect(client, address, length)) { printf("connect %s\n", strerror(errno)); return 1; }
    send(client, "hello", 5, MSG_NOSIGNAL);
    shutdown(client, SHUT_WR);
    pthread_join(thread, 0);
    printf("%zd ", recv(client, text, 63, MSG_WAITALL));
    printf("%s\n", text);
    return 0;
}
int main(void) {
    struct sockaddr_un local = {AF_UNIX, "/socket"}, outside = {AF_UNIX, "/../../../../run/none"};
    struct sockaddr_in net = {AF_INET, 0, {htonl(INADDR_LOOPBACK)}, {0}};
    int pair[2], status;
    char text[8] = "";
    status = talk((struct sockaddr *)&local, sizeof local);
    printf("again %d\n", talk((struct sockaddr *)&local, sizeof local));
    status += talk((struct sockaddr *)&net, sizeof net);
    socketpair(AF_UNIX, SOCK_DGRAM, 0, pair);
    if (write(pair[0], "pair", 4) != 4 || read(pair[1], text, 8) != 4) return 9;
    printf("%s %d\n", text, connect(socket(AF_UNIX, SOCK_STREAM, 0), (struct sockaddr *)&outside, sizeof outside));
    return status;
}
"""
OTHERS = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/select.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <sys/xattr.h>
#include <unistd.h>
int main(int count, char **words) {
    int ends[2], timer = timerfd_create(CLOCK_MONOTONIC, 0), file;
    fd_set set;
    struct timeval none = {0, 10000};
    struct itimerspec soon = {{0, 0}, {0, 5000000}};
    struct rlimit limit;
    struct stat status;
    uint64_t fired = 0;
    char text[4] = "";
    if (chdir(words[count - 1]) || pipe(ends)) return 1;
    FD_ZERO(&set);
    FD_SET(ends[0], &set);
    printf("%d %d\n", select(ends[0] + 1, &set, 0, 0, &none), FD_ISSET(ends[0], &set));
    if (write(ends[1], "x", 1) != 1) return 2;
    FD_SET(ends[0], &set);
    FD_SET(ends[1], &set);
    printf("%d\n", select(ends[1] + 1, &set, 0, 0, 0));
    timerfd_settime(timer, 0, &soon, 0);
    printf("%zd", read(timer, &fired, 8));
    printf(" %d\n", (int)fired);
    limit.rlim_cur = limit.rlim_max = 100;
    printf("%d", setrlimit(RLIMIT_NOFILE, &limit));
    limit.rlim_max = 200;
    getrlimit(RLIMIT_NOFILE, &limit);
    printf(" %d\n", (int)limit.rlim_max);
    printf("%d %d\n", mkfifo("pipe", 0600), mkfifo("pipe", 0600));
    stat("pipe", &status);
    printf("%d\n", S_ISFIFO(status.st_mode));
    file = open("file", O_CREAT | O_RDWR, 0644);
    printf("%d", posix_fallocate(file, 0, 5000));
    fstat(file, &status);
    printf(" %d %zd\n", (int)status.st_size, pread(file, text, 3, 4998));
    struct timeval times[2] = {{1000, 0}, {2000, 500000}};
    printf("%d", utimes("file", times));
    stat("file", &status);
    printf(" %d %d %d\n", (int)status.st_atime, (int)status.st_mtime, (int)(status.st_mtim.tv_nsec / 1000));
    printf("%d %d\n", sched_getcpu() >= 0, unlink("file") + unlink("pipe"));
    return 0;
}
"""


def compiled(place: Path, text: str) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    (place / "program.c").write_text(text)
    subprocess.run(
        ["gcc", "-O2", "-static", "-pthread", "-o", place / "program", "program.c"], check=True, cwd=place, capture_output=True
    )
    return place / "program"


def emulate(root: Path, *words: str, window: int, network: bool = False) -> tuple[bytes, int | None]:
    read, write = os.pipe()
    with EmulatedProcess() as process:
        process.start("/program", words, root=root, stdout=write, stderr=2, window=window, network=network, seconds=60)
        os.close(write)
        with os.fdopen(read, "rb") as stream:
            output = stream.read()
        return output, process.wait(60)


@pytest.mark.parametrize("window", [64 << 10, 256 << 10])
def test_a_program_with_threads_is_native(tmp_path: Path, window: int) -> None:
    program = compiled(tmp_path, THREADS)
    real = subprocess.run([program], capture_output=True, check=False, timeout=60)
    assert emulate(tmp_path, window=window) == (real.stdout, real.returncode)
    assert real.returncode == 5


def test_signals_find_their_thread_and_its_stack(tmp_path: Path) -> None:
    compiled(tmp_path, SIGNALS)
    output, code = emulate(tmp_path, window=128 << 10)
    assert (output, code) == (b"1 1\n1\n2\n", 134)


def test_sockets(tmp_path: Path) -> None:
    compiled(tmp_path, SOCKETS)
    again = b"bind Address already in use\nagain 1\n"
    found = emulate(tmp_path, window=128 << 10)
    assert found == (b"10 back hello\n" + again + b"Address family not supported by protocol\npair -1\n", 1)
    assert (tmp_path / "socket").is_socket()
    (tmp_path / "socket").unlink()
    found = emulate(tmp_path, window=128 << 10, network=True)
    assert found == (b"10 back hello\n" + again + b"10 back hello\npair -1\n", 0)


def test_small_calls_are_native(tmp_path: Path) -> None:
    program = compiled(tmp_path, OTHERS)
    real = subprocess.run([program, tmp_path], capture_output=True, check=False, timeout=60)
    assert emulate(tmp_path, "/", window=256 << 10) == (real.stdout, real.returncode)
    assert real.returncode == 0
