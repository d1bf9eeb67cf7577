"""The host's end of a guest's line to the processor: what the kernel's CSV driver has VMEXIT for, over a virtio serial port.

Request and answer are 32 bytes, little-endian:

    request   magic "CSVG", u16 version 1, u16 operation, u32 tag, u32 length, u64 gpa, u64 0
    answer    magic "CSVG", u16 version 1, u16 operation, u32 tag, u32 status, u64 gpa, u64 value

    operation 1   ATTESTATION: a request page at gpa is answered by the firmware, under the guest's key
              2   SECURE_CALL: a CSV3 guest has reached the page at gpa of its pair and found it hidden: UPDATE_NPT
              3   INFO: gpa = guest policy, value = 1 CSV, 2 CSV2, 3 CSV3
              4   FLUSH: the page at gpa leaves the window
    status        of the firmware; 0 done; 0x10001 bad request

The host passes an address on. It never sees what stands there: the page is ciphertext in the DRAM before and after.

Thread-safety: one thread per channel; stop() from any.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from typing import Final

from csvfast.errors import FirmwareError, FirmwareStatus

__all__ = ["BAD_REQUEST", "FRAME_BYTES", "MAGIC", "PORT_NAME", "VERSION", "GuestChannel", "GuestOperation"]

MAGIC: Final = b"CSVG"
VERSION: Final = 1
PORT_NAME: Final = "org.csvfast.guest.0"
BAD_REQUEST: Final = 0x10001
REQUEST: Final = struct.Struct("<4sHHIIQQ")
ANSWER: Final = struct.Struct("<4sHHIIQQ")
FRAME_BYTES: Final = REQUEST.size
PAGE: Final = 4096
ANSWER_SECONDS: Final = 10.0


class GuestOperation(IntEnum):
    """What a guest may ask for."""

    ATTESTATION = 1
    SECURE_CALL = 2
    INFO = 3
    FLUSH = 4


class GuestChannel:
    """Answers one guest's requests until stop() or the other end closes.

    Args:
        connection: to the guest's port; the channel's from now on. attest: has the page at a guest physical address answered;
            raises FirmwareError. info: policy word and generation. secure_call, flush: as attest; None: the guest has none.
    Attributes: requests, refused: counters. problem: why the channel ended early, or None.
    """

    def __init__(
        self,
        connection: socket.socket,
        attest: Callable[[int], None],
        info: Callable[[], tuple[int, int]],
        secure_call: Callable[[int], None] | None = None,
        flush: Callable[[int], None] | None = None,
    ) -> None:
        self.requests = 0
        self.refused = 0
        self.problem: str | None = None
        self._connection = connection
        self._info = info
        self._pages = {
            GuestOperation.ATTESTATION: attest,
            GuestOperation.SECURE_CALL: secure_call,
            GuestOperation.FLUSH: flush,
        }
        self._thread = threading.Thread(target=self._serve, name="csvfast-channel", daemon=True)

    def start(self) -> None:
        """Starts its thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends it. Idempotent."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        if self._thread.ident is not None:
            self._thread.join(30)
        self._connection.close()

    def _serve(self) -> None:
        waiting = bytearray()
        try:
            while True:
                self._connection.settimeout(None)
                chunk = self._connection.recv(65536)
                if not chunk:
                    return
                waiting += chunk
                while (frame := self._next(waiting)) is not None:
                    answer = self.answer(frame)
                    self._connection.settimeout(ANSWER_SECONDS)
                    self._connection.sendall(answer)
        except OSError as problem:  # the guest is gone, or does not read
            self.problem = str(problem)
        except Exception as defect:  # the guest's line is lost, the guest is not
            self.problem = f"{type(defect).__name__}: {defect}"
        finally:
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)

    def _next(self, waiting: bytearray) -> bytes | None:
        """The next frame. What does not begin one is dropped up to where one may begin, and answered once."""
        begin = waiting.find(MAGIC)
        if begin > 0 or (begin < 0 and len(waiting) >= FRAME_BYTES):
            dropped = bytes(waiting[:FRAME_BYTES])
            # Its first bytes may stand at the end.
            del waiting[: begin if begin > 0 else len(waiting) - len(MAGIC) + 1]
            return dropped.ljust(FRAME_BYTES, b"\0")
        if len(waiting) < FRAME_BYTES:
            return None
        frame = bytes(waiting[:FRAME_BYTES])
        del waiting[:FRAME_BYTES]
        return frame

    def answer(self, frame: bytes) -> bytes:
        """The answer to one request of 32 bytes. Never raises for what a guest may send."""
        magic, version, code, tag, length, gpa, reserved = REQUEST.unpack(frame)
        self.requests += 1
        if magic != MAGIC:
            return self._refuse(0, 0, 0, BAD_REQUEST)
        if version != VERSION or reserved:
            return self._refuse(code, tag, gpa, BAD_REQUEST)
        if code == GuestOperation.INFO:
            policy, generation = self._info()
            return ANSWER.pack(MAGIC, VERSION, code, tag, 0, policy, generation)
        if code not in self._pages:
            return self._refuse(code, tag, gpa, BAD_REQUEST)
        work = self._pages[GuestOperation(code)]
        if work is None:
            return self._refuse(code, tag, gpa, int(FirmwareStatus.UNSUPPORTED))
        if length != PAGE or gpa % PAGE:
            return self._refuse(code, tag, gpa, BAD_REQUEST)
        try:
            work(gpa)
        except FirmwareError as refusal:
            return self._refuse(code, tag, gpa, int(refusal.status))
        return ANSWER.pack(MAGIC, VERSION, code, tag, 0, gpa, 0)

    def _refuse(self, code: int, tag: int, gpa: int, status: int) -> bytes:
        self.refused += 1
        return ANSWER.pack(MAGIC, VERSION, code, tag, status, gpa, 0)
