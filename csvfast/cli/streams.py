"""Standard input, output and error as a command needs them, whatever state they were handed over in.

    closed at the start   their descriptors are filled with /dev/null, or the next file opened would get number 0, 1 or 2
    a reader that left    (head, less) the rest is thrown away and the command goes on to its end, so that its exit code is true
    a disk that is full   one error that names standard output
    odd file names        bytes that are no text come out as they are; what the terminal's encoding lacks as \\uXXXX
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["standard_streams"]

_ERRORS = "csvfast.bytes-or-escapes"


@contextmanager
def standard_streams() -> Iterator[None]:
    """Puts the streams in order for one command and back afterwards. A standard output somebody replaced is left alone.

    Raises OSError when standard output is closed. Thread-safety: the main thread's.
    """
    streams = (sys.stdin, sys.stdout, sys.stderr)
    if any(stream is None for stream in (sys.__stdin__, sys.__stdout__, sys.__stderr__)):
        while (filler := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(filler, True)
        os.close(filler)
    if sys.stderr is None:
        sys.stderr = io.StringIO()  # print(file=None) would write to standard output
    try:
        stdout: TextIO | None = sys.stdout
        if stdout is None:
            raise OSError(errno.EBADF, "standard output is closed")
        is_own = stdout is sys.__stdout__
        if is_own:
            stdout.flush()
            sys.stdout = _wrapped(stdout)
        yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = streams


def _wrapped(stream: TextIO) -> io.TextIOWrapper:
    codecs.register_error(_ERRORS, _encode_anyway)
    raw = _Output(stream.fileno(), "wb", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), stream.encoding or "utf-8", _ERRORS, line_buffering=raw.isatty()
    )


class _Output(io.FileIO):
    """Standard output whose reader may leave."""

    def write(self, data: Buffer, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            self._discard()
            return memoryview(data).nbytes
        except OSError as error:
            self._discard()  # so that the flush at the end does not complain a second time
            raise OSError(error.errno, f"standard output: {error.strerror}") from error

    def _discard(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def _encode_anyway(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    if all("\udc80" <= character <= "\udcff" for character in text):
        return bytes(ord(character) - 0xDC00 for character in text), error.end
    return text.encode("ascii", "backslashreplace"), error.end
