"""The same bytes in every kind of buffer a caller may bring, and threads that start together."""

from __future__ import annotations

import array
import ctypes
import mmap
import threading
from collections.abc import Callable
from typing import Any

import numpy as np


def _mapped(data: bytes) -> mmap.mmap:
    mapping = mmap.mmap(-1, max(len(data), 1))
    mapping.write(data)
    return mapping


def _ctypes(data: bytes) -> Any:
    return (ctypes.c_ubyte * len(data)).from_buffer_copy(data)


# Each maker takes bytes whose length is a positive multiple of 8.
READABLE: dict[str, Callable[[bytes], Any]] = {
    "bytes": bytes,
    "bytearray": bytearray,
    "memoryview": memoryview,
    "readonly view of bytearray": lambda data: memoryview(bytearray(data)).toreadonly(),
    "offset view": lambda data: memoryview(b"x" + data)[1:],
    "array of doubles": lambda data: array.array("d", data),
    "numpy uint8": lambda data: np.frombuffer(data, np.uint8),
    "numpy 2-d int16": lambda data: np.frombuffer(data, np.int16).reshape(2, -1),
    "mmap": _mapped,
    "ctypes": _ctypes,
}
WRITABLE = {name: READABLE[name] for name in ("bytearray", "array of doubles", "mmap", "ctypes")} | {
    "view of bytearray": lambda data: memoryview(bytearray(data)),
    "numpy uint8": lambda data: np.frombuffer(bytearray(data), np.uint8),
    "numpy 2-d int16": lambda data: np.frombuffer(bytearray(data), np.int16).reshape(2, -1),
}


def content(buffer: Any) -> bytes:
    return memoryview(buffer).cast("B").tobytes() if memoryview(buffer).nbytes else b""


def together(count: int, work: Callable[[int], None]) -> None:
    """Runs work(0) .. work(count - 1) in threads that start at one barrier; raises the first exception of any."""
    barrier = threading.Barrier(count)
    problems: list[BaseException] = []

    def run(index: int) -> None:
        try:
            barrier.wait()
            work(index)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
