"""The way from a guest to its processor: a virtio serial port that carries addresses of pages, never their content.

Both directions, 32 bytes, little-endian:

    off size  request                              answer
      0    4  magic "CSVG"                         the same
      4    2  version 1                            the same
      6    2  operation                            the same
      8    4  tag, chosen by the guest             the same
     12    4  length of what is asked for          firmware status; 0x10001: the host takes the request for malformed
     16    8  guest physical address of the page   the same
     24    8  0                                    value

    1 ATTESTATION   the request page at the address is answered in place
    2 SECURE_CALL   a CSV3 guest has reached the page of its pair at the address, and finds it hidden
    3 INFO          address: the guest's policy word, value: 1 CSV, 2 CSV2, 3 CSV3. The host's word: nothing is proved by it
    4 FLUSH         the page at the address is written to the DRAM and leaves the window, as CLFLUSH does to a line of a cache

What the host sees of a page is its ciphertext; that it has the right page answered is proved by the answer (MAC and mnonce).

Thread-safety: one request at a time; other threads, and other programs that want the port, wait.
"""

from __future__ import annotations

import errno
import os
import secrets
import select
import threading
import time
from enum import IntEnum
from pathlib import Path
from struct import Struct
from typing import Final, Self

from csvfast.errors import ClosedError, FirmwareError, FirmwareStatus, FormatError

__all__ = ["BAD_REQUEST", "CHANNEL", "ChannelOperation", "ProcessorChannel", "find_port"]

CHANNEL: Final = "org.csvfast.guest.0"
BAD_REQUEST: Final = 0x10001
MAGIC: Final = b"CSVG"
VERSION: Final = 1
MESSAGE: Final = Struct("<4sHHIIQQ")

_PORTS: Final = Path("/sys/class/virtio-ports")


class ChannelOperation(IntEnum):
    """What is asked for."""

    ATTESTATION = 1
    SECURE_CALL = 2
    INFO = 3
    FLUSH = 4


def find_port(name: str = CHANNEL) -> str:
    """The device of the port of this name: /dev/virtio-ports/NAME, or by the kernel's list where nothing made that link.

    FileNotFoundError: the guest has no such port.
    """
    link = f"/dev/virtio-ports/{name}"
    if Path(link).exists():
        return link
    for folder in sorted(_PORTS.glob("vport*")):
        try:
            found = (folder / "name").read_text(encoding="utf-8").strip()
        except OSError:
            continue
        if found == name:
            return f"/dev/{folder.name}"
    raise FileNotFoundError(errno.ENOENT, "the guest has no port of this name to its processor", link)


class ProcessorChannel:
    """The guest's end.

    In: path     of the port; None = find_port()
        timeout  seconds to wait for the port and for each answer
    Raises: FileNotFoundError, PermissionError; TimeoutError: another program kept the port all that time.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, timeout: float = 30.0) -> None:
        self.path = os.fspath(path) if path is not None else find_port()
        self.timeout = timeout
        self._lock = threading.Lock()
        self._rest = b""
        self._tag = secrets.randbits(32)
        end = time.monotonic() + timeout
        while True:
            try:
                self._descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
                return
            except OSError as problem:  # a port has one user at a time
                if problem.errno != errno.EBUSY:
                    raise
                if time.monotonic() >= end:
                    raise TimeoutError(errno.ETIMEDOUT, "another program uses the port", self.path) from None
                time.sleep(0.02)

    @classmethod
    def over(cls, descriptor: int, *, timeout: float = 30.0) -> Self:
        """Over an open descriptor, e.g. one end of a socket pair; it is closed with the channel."""
        self = cls.__new__(cls)
        self.path = f"descriptor {descriptor}"
        self.timeout = timeout
        self._lock = threading.Lock()
        self._rest = b""
        self._tag = secrets.randbits(32)
        self._descriptor = descriptor
        os.set_blocking(descriptor, False)
        return self

    def call(self, operation: ChannelOperation, address: int, length: int) -> int:
        """One request about a page. Out: the answer's value.

        Raises: FirmwareError: refused; FormatError: the host answers something else, or takes the request for malformed;
            TimeoutError: no answer; ConnectionError: nobody is at the other end; ClosedError.
        """
        place, value = self._exchange(operation, address, length)
        if place != address:
            raise FormatError("processor channel", "address", 16, f"{place:#x}", f"{address:#x}, as asked for")
        return value

    def info(self) -> tuple[int, int]:
        """INFO: the guest's policy word and its generation (1 CSV, 2 CSV2, 3 CSV3), as the host says. Errors as call()."""
        return self._exchange(ChannelOperation.INFO, 0, 0)

    def _exchange(self, operation: ChannelOperation, address: int, length: int) -> tuple[int, int]:
        with self._lock:
            if self._descriptor < 0:
                raise ClosedError(f"{self.path}: the channel is closed")
            self._tag = (self._tag + 1) & 0xFFFFFFFF
            end = time.monotonic() + self.timeout
            self._send(MESSAGE.pack(MAGIC, VERSION, operation, self._tag, length, address, 0), end)
            while True:
                magic, version, answered, tag, status, place, value = MESSAGE.unpack(self._receive(end))
                if magic != MAGIC or version != VERSION:
                    self._close()  # where the next message begins is not known
                    found = f"{magic.hex()} version {version}"
                    raise FormatError("processor channel", "magic", 0, found, f"{MAGIC.hex()} version {VERSION}")
                # An answer for a program that had the port before, and did not wait for it.
                if tag == self._tag:
                    break
        if answered != operation:
            raise FormatError("processor channel", "operation", 6, f"{answered}", f"{int(operation)}, as asked for")
        _check(status, operation)
        return place, value

    def close(self) -> None:
        """Gives the port back. Idempotent."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _send(self, message: bytes, end: float) -> None:
        while message:
            self._wait(select.POLLOUT, end)
            try:
                message = message[os.write(self._descriptor, message) :]
            except BlockingIOError:
                continue

    def _receive(self, end: float) -> bytes:
        while len(self._rest) < MESSAGE.size:
            self._wait(select.POLLIN, end)
            try:
                more = os.read(self._descriptor, MESSAGE.size - len(self._rest))
            except BlockingIOError:
                continue
            if not more:
                raise ConnectionResetError(errno.ECONNRESET, "the host has closed its end", self.path)
            self._rest += more
        message, self._rest = self._rest[: MESSAGE.size], self._rest[MESSAGE.size :]
        return message

    def _wait(self, event: int, end: float) -> None:
        poll = select.poll()
        poll.register(self._descriptor, event)
        while True:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError(errno.ETIMEDOUT, f"no answer within {self.timeout:g} s", self.path)
            for _, events in poll.poll(left * 1000):
                if events & event:
                    return
                raise ConnectionResetError(errno.ECONNRESET, "nobody is at the host's end", self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self._close()

    def __repr__(self) -> str:
        return f"<ProcessorChannel {self.path}>"


def _check(status: int, operation: ChannelOperation) -> None:
    if status == 0:
        return
    if status == BAD_REQUEST:
        raise FormatError("processor channel", "request", None, f"{operation.name} is malformed to the host", "an answer")
    try:
        known = FirmwareStatus(status)
    except ValueError:
        raise FormatError("processor channel", "status", 12, f"{status:#x}", "a status of the firmware") from None
    raise FirmwareError(known, f"the processor refuses {operation.name}")
