"""A CSV3 guest's way to its processor: a pair of its own pages, one to write and one to read, and the host only sees which.

On the hardware the read of the hidden page faults, and the host answers the fault with UPDATE_NPT. Here the two are one page to
the guest (docs/virtual-machines.md): it writes a request, tells the host over the channel which page it would have read, and
reads the answer where the request stood. Which of the two is hidden changes with every call; the wrong one is just not answered.

The pages are where the kernel's command line, which is measured, says (csvfast.secure_calls=ADDRESS), or are found as CSV3's
kernels find them: by their GUID, which a firmware that used the page has overwritten. Either way in memory that the kernel keeps
off.

Sources: anolis-cloud-kernel arch/x86/kernel/csv.c, csv-shared.c, drivers/virt/coco/csv-guest/csv-guest.c;
csvfast.processor.secure_call has the layout. Thread-safety: one request at a time.
"""

from __future__ import annotations

import mmap
import os
import re
from pathlib import Path
from struct import Struct
from typing import Final, Self
from uuid import UUID

from csvfast.errors import FirmwareError, FirmwareStatus, FormatError, StateError
from csvfast.machine.guest.channel import ChannelOperation, ProcessorChannel
from csvfast.machine.guest.page import PAGE, RequestPage
from csvfast.report.request import EXTENDED_BYTES, LEGACY_BYTES, ReportRequest

__all__ = ["SecureCallPages", "SecureCallTransport"]

MEMORY: Final = "/dev/mem"
RANGES: Final = "/proc/iomem"
COMMAND_LINE: Final = "/proc/cmdline"
REQ_REPORT: Final = 7
RTMR: Final = 8
ACK: Final = 0x6B

_GUID: Final = UUID("9a5d926f-2fa5-ceba-ab21-6b275d5556a5").bytes_le
_WORDS: Final = Struct("<II")
_WORDS_AT: Final = 16
_BODY_AT: Final = 32
_ENTRY: Final = Struct("<QQ")
_BLOCK: Final = Struct("<IIQ16sIIQII")
_UNANSWERED: Final = 0xFFFFFFFF
_RESERVED: Final = re.compile(r"^\s*([0-9a-f]+)-([0-9a-f]+) : Reserved$", re.MULTILINE | re.IGNORECASE)
_TOLD: Final = re.compile(r"(?:^|\s)csvfast\.secure_calls=(0x[0-9a-fA-F]{1,12})(?=\s|$)")
_RANGE_MAX: Final = 4 << 20  # a machine's own reserved ranges (configuration space) are larger, and not memory
_MOVES: Final = 4
_REFUSALS: Final = {
    0x6C: FirmwareStatus.RESOURCE_LIMIT,
    0x6D: FirmwareStatus.INVALID_COMMAND,
    0x6E: FirmwareStatus.INVALID_PARAM,
    0x6F: FirmwareStatus.INVALID_ADDRESS,
    0x70: FirmwareStatus.INVALID_LENGTH,
}


class SecureCallPages:
    """The pair.

    In: memory   the first page, mapped
        address  its guest physical address; the second page is behind it
    """

    def __init__(self, memory: mmap.mmap, address: int) -> None:
        self.address = address
        self._memory = memory
        self._hidden = 1

    @classmethod
    def find(cls) -> Self:
        """In the reserved ranges of /proc/iomem, through /dev/mem.

        Raises: StateError: no such pages, or the kernel uses them; OSError: no such device, or not for this user.
        """
        ranges = []
        for low, high in _RESERVED.findall(Path(RANGES).read_text(encoding="ascii")):
            start, stop = int(low, 16), int(high, 16) + 1
            if start >= 1 << 20 and start % PAGE == stop % PAGE == 0 and 2 * PAGE <= stop - start <= _RANGE_MAX:
                ranges.append((start, stop))
        told = _TOLD.search(Path(COMMAND_LINE).read_text(encoding="utf-8", errors="replace"))
        descriptor = os.open(MEMORY, os.O_RDWR | os.O_CLOEXEC)
        try:
            place = _by_guid(descriptor, ranges) if told is None else int(told[1], 16)
            if place is None:
                raise StateError("no secure call pages in reserved memory; expected csvfast.secure_calls= on the command line")
            if place % PAGE or not any(start <= place and place + 2 * PAGE <= stop for start, stop in ranges):
                raise StateError(f"the kernel uses the secure call pages at {place:#x}; expected memmap= on its command line")
            return cls(mmap.mmap(descriptor, PAGE, offset=place), place)
        finally:
            os.close(descriptor)

    def call(self, channel: ProcessorChannel, request: int, body: bytes, entries: int = 1) -> bytes:
        """One call. Out: as many bytes as `body` has, as the firmware leaves them.

        Raises: FirmwareError: refused; FormatError: not answered; those of ProcessorChannel.call().
        """
        self._memory[_BODY_AT : _BODY_AT + len(body)] = body
        self._memory[_WORDS_AT : _WORDS_AT + _WORDS.size] = _WORDS.pack(request, entries)
        for _ in range(2):
            channel.call(ChannelOperation.SECURE_CALL, self.address + self._hidden * PAGE, PAGE)
            self._hidden ^= 1
            answer, _ = _WORDS.unpack(self._memory[_WORDS_AT : _WORDS_AT + _WORDS.size])
            if answer != request:
                break
        if answer in _REFUSALS:
            raise FirmwareError(_REFUSALS[answer], f"the processor refuses secure call {request}")
        if answer != ACK:
            raise FormatError("secure call", "answer", _WORDS_AT, f"{answer:#x}", f"{ACK:#x}")
        return self._memory[_BODY_AT : _BODY_AT + len(body)]

    def close(self) -> None:
        """Unmaps the page. Idempotent."""
        if not self._memory.closed:
            self._memory.close()


class SecureCallTransport:
    """Requests of a CSV3 guest (csvfast.machine.guest.transport.Transport). Needs root: for /dev/mem, and for pages' addresses.

    Both are closed with it. What the processor reads and writes beside the pair leaves the memory controller's window first, as
    it would leave a cache, and again afterwards.
    """

    def __init__(self, channel: ProcessorChannel, pages: SecureCallPages) -> None:
        self.channel = channel
        self.pages = pages

    def attestation(self, page: RequestPage) -> None:
        """See Transport. StateError: not answered, or only in a page that the kernel had moved, each time."""
        request = page.memory[:]
        extended = ReportRequest.parse(request).extended
        length = EXTENDED_BYTES if extended else LEGACY_BYTES
        with RequestPage() as block:
            for _ in range(_MOVES):
                places = (page.address, block.address)
                block.write(_BLOCK.pack(0, int(extended), places[0], bytes(16), PAGE, 0, places[0], length, _UNANSWERED))
                self._flush(places)
                self.pages.call(self.channel, REQ_REPORT, _ENTRY.pack(places[1], _BLOCK.size))
                self._flush(places)
                if page.memory[:] != request:
                    return
                if (page.address, block.address) == places:  # else the firmware was shown another page
                    _check_block(block.memory[: _BLOCK.size])
        raise StateError("no answer in the request page; expected vm.compact_unevictable_allowed = 0")

    def rtmr(self, page: RequestPage, subcommand: int, length: int) -> None:
        """See Transport. The sub-command stands in the page."""
        del subcommand
        with memoryview(page.memory) as view:
            view[:length] = self.pages.call(self.channel, RTMR, bytes(view[:length]))

    def close(self) -> None:
        """See Transport."""
        self.pages.close()
        self.channel.close()

    def _flush(self, places: tuple[int, ...]) -> None:
        for place in places:
            self.channel.call(ChannelOperation.FLUSH, place, PAGE)


def _by_guid(descriptor: int, ranges: list[tuple[int, int]]) -> int | None:
    for start, stop in ranges:
        with mmap.mmap(descriptor, stop - start, prot=mmap.PROT_READ, offset=start) as found:
            for at in range(stop - start - 2 * PAGE, -1, -PAGE):
                if found[at : at + len(_GUID)] == _GUID:
                    return start + at
    return None


def _check_block(block: bytes) -> None:
    """Raises FirmwareError when the firmware has refused; FormatError."""
    error = _BLOCK.unpack(block)[-1]
    if error in (0, _UNANSWERED):
        return
    try:
        status = FirmwareStatus(error)
    except ValueError:
        raise FormatError("report block", "error", _BLOCK.size - 4, f"{error:#x}", "a status of the firmware") from None
    raise FirmwareError(status, "the processor refuses ATTESTATION")
