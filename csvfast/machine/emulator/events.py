"""System calls that wait for several descriptors: poll, epoll, and descriptors that count events."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import time
from typing import TYPE_CHECKING, Any, Final

from csvfast.machine.emulator.syscalls_files import LIBC, number_of
from csvfast.machine.emulator.threads import Blocked

if TYPE_CHECKING:
    from collections.abc import Callable

    from csvfast.machine.emulator.process import Process

__all__ = ["CALLS", "wait_for"]

_CLOEXEC: Final = 0o2000000


def _until(milliseconds: int) -> float | None:
    return None if milliseconds < 0 else time.monotonic() + milliseconds / 1000


def _poll(process: Process, address: int, count: int, timeout: int, *_: int) -> int:
    return _poll_until(process, address, count, _until(number_of(timeout)))


def _ppoll(process: Process, address: int, count: int, timeout: int, *_: int) -> int:
    end = None
    if timeout:
        seconds, nanoseconds = struct.unpack("<qq", process.space.read(timeout, 16))
        end = time.monotonic() + seconds + nanoseconds / 1e9
    return _poll_until(process, address, count, end)


def _poll_until(process: Process, address: int, count: int, end: float | None) -> int:
    if not 0 <= count <= 1024:
        raise OSError(errno.EINVAL, "poll")
    entries = [list(entry) for entry in struct.iter_unpack("<ihh", process.space.read(address, 8 * count))]
    ready = 0
    hosts: dict[int, int] = {}
    for entry in entries:
        entry[2] = 0
        host = process.files.open_files.get(entry[0])
        if entry[0] >= 0 and host is None:
            entry[2] = select.POLLNVAL
            ready += 1
        elif host is not None:
            hosts[host] = hosts.get(host, 0) | entry[1]
    found = wait_for(process, hosts, time.monotonic() if ready else end, lambda: _poll_until(process, address, count, end))
    for entry in entries:
        events = found.get(process.files.open_files.get(entry[0], -1), 0)
        if events & (entry[1] | select.POLLERR | select.POLLHUP | select.POLLNVAL):
            entry[2] = events & (entry[1] | select.POLLERR | select.POLLHUP | select.POLLNVAL)
            ready += 1
    process.space.write(address, b"".join(struct.pack("<ihh", *entry) for entry in entries))
    return ready


def wait_for(process: Process, hosts: dict[int, int], end: float | None, again: Callable[[], int]) -> dict[int, int]:
    """What is ready of the host's descriptors; with other threads they run meanwhile."""
    poller = select.poll()
    for host, events in hosts.items():
        poller.register(host, events)
    while True:  # in slices: Python's poll goes on after a signal
        left = 0.02 if end is None else max(min(end - time.monotonic(), 0.02), 0.0)
        found = dict(poller.poll(0 if process.threads.several else left * 1000))
        if found or (end is not None and time.monotonic() >= end):
            return found
        if process.interrupted():
            raise OSError(errno.EINTR, "poll")
        process.check_deadline()
        if process.threads.several:
            raise Blocked(hosts, end, again, again)


def _epoll_create(process: Process, flags: int, *_: int) -> int:
    if flags & ~_CLOEXEC:
        raise OSError(errno.EINVAL, "epoll_create1")
    host = LIBC.epoll_create1(_CLOEXEC)
    if host < 0:
        raise OSError(ctypes.get_errno(), "epoll_create1")
    return process.files.add(host, close_on_exec=bool(flags & _CLOEXEC))


def _epoll_create_old(process: Process, *_: int) -> int:
    return _epoll_create(process, 0)


def _epoll_control(process: Process, number: int, operation: int, target: int, address: int, *_: int) -> int:
    event = process.space.read(address, 12) if address else bytes(12)
    host, what = process.files.host(number_of(number)), process.files.host(number_of(target))
    if LIBC.epoll_ctl(host, number_of(operation), what, ctypes.create_string_buffer(event, 12)) < 0:
        raise OSError(ctypes.get_errno(), "epoll_ctl")
    return 0


def _epoll_wait(process: Process, number: int, address: int, count: int, timeout: int, *_: int) -> int:
    return _epoll_until(process, number, address, number_of(count), _until(number_of(timeout)))


def _epoll_until(process: Process, number: int, address: int, count: int, end: float | None) -> int:
    if not 0 < count <= 4096:
        raise OSError(errno.EINVAL, "epoll_wait")
    host = process.files.host(number_of(number))
    wait_for(process, {host: select.POLLIN}, end, lambda: _epoll_until(process, number, address, count, end))
    events = ctypes.create_string_buffer(12 * count)
    found = process.waiting(LIBC.epoll_wait, host, events, count, 0)
    process.space.write(address, events.raw[: 12 * found])
    return found


def _eventfd(process: Process, start: int, flags: int, *_: int) -> int:
    host = os.eventfd(start & 0xFFFFFFFF, flags & (os.EFD_SEMAPHORE | os.EFD_NONBLOCK) | os.EFD_CLOEXEC)
    return process.files.add(host, close_on_exec=bool(flags & _CLOEXEC))


def _eventfd_old(process: Process, start: int, *_: int) -> int:
    return _eventfd(process, start, 0)


CALLS: Final[dict[int, Callable[..., Any]]] = {
    7: _poll, 213: _epoll_create_old, 232: _epoll_wait, 233: _epoll_control, 271: _ppoll, 281: _epoll_wait,
    284: _eventfd_old, 290: _eventfd, 291: _epoll_create,
}  # fmt: skip
