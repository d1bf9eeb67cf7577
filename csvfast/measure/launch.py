"""The launch digest a guest's attestation report will carry, computed before the guest exists.

    CSV, CSV2    digest = SM3(firmware ‖ hash table ‖ VMSAs)
    CSV3         digest = SM3(items); item = LE32 command ‖ LE32 vCPU ‖ LE64 guest address ‖ LE32 length ‖ data, for the firmware,
                 the page with the hash table, the page that names the secure call pages, and each VMSA

The firmware is the whole image. The hash table is there with direct boot (a kernel): 176 bytes with the SHA-256 of
the command line and a NUL, of the initrd (empty when there is none) and of the kernel. VMSAs (one page per vCPU)
enter only with vmsa="amd", see vmsa.py. Only bytes are hashed, no addresses: the pieces one after the other. For CSV3 everything
is in whole pages, and the VMSAs always enter; how CSV3's firmware serialises is not public, the items are csvfast's own
(inferred).

Files are streamed; a 2 GB initrd costs no more memory than a small one.

Source: specification sections 6.1 to 6.3; QEMU target/i386/sev.c (table layout only).
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

from csvfast import _core
from csvfast.measure.errors import EmptySourceError, ParameterError
from csvfast.measure.ovmf import END_BYTES, ENTRY_TAIL, FOOTER_GUID, SECURE_CALL_GUID, GuidTable
from csvfast.measure.source import STDIN, AnyPath, Progress, Source, total_size
from csvfast.measure.vmsa import BSP_ADDRESS, DEFAULT_CPU_SIGNATURE, vmsa_page

__all__ = [
    "FORCED_TABLE_ADDRESS",
    "HashedInput",
    "LaunchDigest",
    "LaunchPiece",
    "Vmsa",
    "hash_table",
    "hash_table_pages",
    "launch_digest",
    "secure_call_page",
]

Vmsa = Literal["none", "amd"]

TABLE_GUID = UUID("9438d606-4f22-4cc9-b479-a793d411fd21")
COMMAND_LINE_GUID = UUID("97d02dd8-bd20-4c94-aa78-e7714d36ab2a")
INITRD_GUID = UUID("44baf731-3a2f-4bd7-9af1-41e29169781d")
KERNEL_GUID = UUID("4de79437-abd2-427f-b835-d5b172d2045b")
TABLE_BYTES = 168
TABLE_PADDED_BYTES = 176
ENTRY_BYTES = 50
SHA256_BYTES = 32
PAGE_BYTES = 4096
FOUR_GIB = 1 << 32
VCPUS_MAX = 4096
# Where the AmdSev build of OVMF has its hash table: the place for a table that no firmware asked for.
FORCED_TABLE_ADDRESS = 0x80FC00
SECURE_CALL_BYTES = 2 * PAGE_BYTES
ENCRYPT_DATA = 0x201  # commands that CSV3's items name
ENCRYPT_VMCB = 0x202
_ITEM = struct.Struct("<IIQI")


@dataclass(frozen=True, slots=True)
class HashedInput:
    """A file or text whose SHA-256 stands in the hash table. `path` is None for text and for what is absent."""

    name: str
    path: str | None
    size: int
    sha256: bytes


@dataclass(frozen=True, slots=True)
class LaunchPiece:
    """One piece of the measured bytes: its own SM3, and the SM3 of everything up to its end. `address` is where it is
    put in guest memory, for information only, None when that is not known."""

    name: str
    size: int
    address: int | None
    sm3: bytes
    running: bytes


@dataclass(frozen=True, slots=True)
class LaunchDigest:
    """A launch digest and all it was made of. Thread-safety: immutable."""

    digest: bytes
    pieces: tuple[LaunchPiece, ...]
    inputs: tuple[HashedInput, ...]
    append: str | None
    vmsa: Vmsa
    vcpus: int
    cpu_signature: int
    warnings: tuple[str, ...]
    seconds: float
    csv3: bool = False

    @property
    def hexdigest(self) -> str:
        """The digest as 64 hexadecimal digits."""
        return self.digest.hex()

    def to_dict(self, *, explain: bool = False) -> dict[str, Any]:
        """For JSON; with explain also every input and piece."""
        record: dict[str, Any] = {"digest": self.hexdigest, "vmsa": self.vmsa}
        if self.csv3:
            record["csv3"] = True
        if self.vmsa == "amd":
            record |= {"vcpus": self.vcpus, "cpu_signature": f"{self.cpu_signature:#x}"}
        record |= {"bytes": sum(piece.size for piece in self.pieces), "seconds": round(self.seconds, 6)}
        if explain:
            record["append"] = self.append
            record["inputs"] = [
                {"name": item.name, "path": item.path, "bytes": item.size, "sha256": item.sha256.hex()}
                for item in self.inputs
            ]
            record["pieces"] = [
                {
                    "name": piece.name,
                    "bytes": piece.size,
                    "address": None if piece.address is None else f"{piece.address:#x}",
                    "sm3": piece.sm3.hex(),
                    "running": piece.running.hex(),
                }
                for piece in self.pieces
            ]
        record["warnings"] = list(self.warnings)
        return record


def launch_digest(
    firmware: AnyPath,
    *,
    kernel: AnyPath | None = None,
    initrd: AnyPath | None = None,
    append: str | None = None,
    vmsa: Vmsa = "none",
    vcpus: int = 1,
    cpu_signature: int = DEFAULT_CPU_SIGNATURE,
    force_hash_table: bool = False,
    csv3: bool = False,
    secure_calls: int | None = None,
    progress: Progress | None = None,
) -> LaunchDigest:
    """Computes the expected launch digest of a CSV, CSV2 or CSV3 guest.

    Args: firmware: the OVMF image given as pflash unit 0. kernel, initrd, append: direct boot, as given to QEMU's
        -kernel, -initrd and -append; initrd and append need a kernel. vmsa: "none", or "amd" to add save areas of
        vcpus processors with cpu_signature (CPUID leaf 1 EAX). force_hash_table: adds the hash table although the
        firmware publishes no area for it. Such a digest is for experiments: QEMU refuses that firmware with a kernel.
        csv3: as CSV3 measures, with a save area per vCPU whatever vmsa is. secure_calls: of a CSV3 guest whose firmware names no
        secure call pages: guest address of the page that names them, which are the two behind it.
        progress: over the bytes of all files.
    Raises: HashTableAreaError, ResetBlockError, FirmwareTableError, EmptySourceError, ParameterError, SourceError.
    Thread-safety: safe from any thread. The GIL is released while bytes are read and hashed.
    """
    start = time.perf_counter()
    _check_parameters(firmware, kernel, initrd, append, vmsa, vcpus)
    _check_secure_calls(csv3, secure_calls)
    vmsa = "amd" if csv3 else vmsa
    step = _progress_over([path for path in (firmware, kernel, initrd) if path is not None], progress)
    chain = _Chain(csv3)
    warnings: list[str] = []
    inputs: tuple[HashedInput, ...] = ()
    with Source(firmware) as source:
        # The tables are read first: an unfit firmware is refused before a large initrd is hashed.
        other_address = BSP_ADDRESS
        table_address: int | None = None
        if kernel is not None and not force_hash_table:
            table_address = GuidTable.read(source).hash_table_area().base
        if vmsa == "amd" and vcpus > 1:
            other_address = GuidTable.read(source).reset_address()
        _add_firmware(chain, source, step, warnings)
    if kernel is not None:
        if force_hash_table:
            warnings.append("hash table added although the firmware may publish no area for it")
        inputs = (
            _hash_command_line(append),
            _hash_file("initrd", initrd, step),
            _hash_file("kernel", kernel, step),
        )
        table = hash_table(*(item.sha256 for item in inputs))
        if csv3:
            page, pages = hash_table_pages(FORCED_TABLE_ADDRESS if table_address is None else table_address, table)
            chain.add("hash table", pages, page)
        else:
            chain.add("hash table", table, table_address)
    if secure_calls is not None:
        chain.add("secure call pages", secure_call_page(secure_calls + PAGE_BYTES), secure_calls)
    if vmsa == "amd":
        for index in range(vcpus):
            address = BSP_ADDRESS if index == 0 else other_address
            chain.add(f"VMSA {index}", vmsa_page(address, cpu_signature), None, vcpu=index)
    return LaunchDigest(
        digest=chain.digest(),
        pieces=tuple(chain.pieces),
        inputs=inputs,
        append=append,
        vmsa=vmsa,
        vcpus=vcpus,
        cpu_signature=cpu_signature,
        warnings=tuple(warnings),
        seconds=time.perf_counter() - start,
        csv3=csv3,
    )


def hash_table(command_line: bytes, initrd: bytes, kernel: bytes) -> bytes:
    """The 176-byte kernel-hashes table of three SHA-256 digests.

    Raises: ParameterError for a digest that is not 32 bytes.
    Thread-safety: safe from any thread.
    """
    table = TABLE_GUID.bytes_le + TABLE_BYTES.to_bytes(2, "little")
    for guid, digest in ((COMMAND_LINE_GUID, command_line), (INITRD_GUID, initrd), (KERNEL_GUID, kernel)):
        if len(digest) != SHA256_BYTES:
            raise ParameterError(f"SHA-256 digest has {len(digest)} bytes; expected {SHA256_BYTES}")
        table += guid.bytes_le + ENTRY_BYTES.to_bytes(2, "little") + digest
    return table.ljust(TABLE_PADDED_BYTES, b"\0")


def hash_table_pages(address: int, table: bytes) -> tuple[int, bytes]:
    """The whole pages around a hash table at a guest address, zeros beside it: first page's address, and their bytes."""
    before = address % PAGE_BYTES
    return address - before, (bytes(before) + table).ljust(-(-(before + len(table)) // PAGE_BYTES) * PAGE_BYTES, b"\0")


def secure_call_page(pair: int) -> bytes:
    """A page that names a CSV3 guest's two secure call pages, the first of them at guest address `pair`, as a firmware image does
    at its end: for images that cannot. The firmware looks for it at the end of each LAUNCH_ENCRYPT_DATA."""
    entry = struct.pack("<II", SECURE_CALL_BYTES, pair)
    entry += struct.pack("<H", len(entry) + ENTRY_TAIL.size) + SECURE_CALL_GUID.bytes_le
    table = entry + struct.pack("<H", len(entry) + ENTRY_TAIL.size) + FOOTER_GUID.bytes_le
    return bytes(PAGE_BYTES - END_BYTES - len(table)) + table + bytes(END_BYTES)


class _Chain:
    """The measured bytes so far."""

    def __init__(self, csv3: bool) -> None:
        self._sm3 = _core.sm3()
        self.csv3 = csv3
        self.pieces: list[LaunchPiece] = []

    def digest(self) -> bytes:
        return self._sm3.digest()

    def update(self, data: memoryview) -> None:
        """Continues the piece that `close` ends."""
        self._sm3.update(data)

    def close(self, name: str, size: int, address: int | None, sm3: bytes) -> None:
        self.pieces.append(LaunchPiece(name, size, address, sm3, self.digest()))

    def open(self, size: int, address: int | None, vcpu: int | None = None) -> None:
        """Begins a piece: a CSV3 item has a header."""
        if self.csv3:
            command = ENCRYPT_DATA if vcpu is None else ENCRYPT_VMCB
            self._sm3.update(_ITEM.pack(command, vcpu or 0, address or 0, size))

    def add(self, name: str, data: bytes, address: int | None, *, vcpu: int | None = None) -> None:
        self.open(len(data), address, vcpu)
        with memoryview(data) as view:
            self.update(view)
        self.close(name, len(data), address, _core.sm3(data).digest())


def _check_parameters(
    firmware: AnyPath, kernel: AnyPath | None, initrd: AnyPath | None, append: str | None, vmsa: str, vcpus: int
) -> None:
    if vmsa not in ("none", "amd"):
        raise ParameterError(f"vmsa is {vmsa!r}; expected 'none' or 'amd'")
    if not 1 <= vcpus <= VCPUS_MAX:
        raise ParameterError(f"vcpus is {vcpus}; expected 1 to {VCPUS_MAX}")
    if kernel is None:
        for name, value in (("initrd", initrd), ("append", append)):
            if value is not None:
                raise ParameterError(f"{name} is given without a kernel; expected both or neither")
    if append is not None and "\0" in append:
        raise ParameterError(f"append has a NUL at character {append.index(chr(0))}; expected text without NUL")
    try:
        os.fsencode(append or "")
    except UnicodeEncodeError as error:
        raise ParameterError(f"append has a surrogate at character {error.start}; expected text that has bytes") from error
    streams = [name for name, path in (("firmware", firmware), ("kernel", kernel), ("initrd", initrd)) if path == STDIN]
    if len(streams) > 1:
        raise ParameterError(f"{' and '.join(streams)} are both '-'; expected standard input to be used once")


def _check_secure_calls(csv3: bool, secure_calls: int | None) -> None:
    if secure_calls is None:
        return
    if not csv3:
        raise ParameterError("secure_calls is given for a guest that is none of CSV3; expected csv3")
    if secure_calls <= 0 or secure_calls % PAGE_BYTES or secure_calls + PAGE_BYTES + SECURE_CALL_BYTES > FOUR_GIB:
        raise ParameterError(f"secure_calls is {secure_calls:#x}; expected the address of three pages below 4 GiB")


def _add_firmware(chain: _Chain, source: Source, step: Callable[[int], None], warnings: list[str]) -> None:
    if chain.csv3:
        if source.size is None or source.size % PAGE_BYTES or not 0 < source.size <= FOUR_GIB:
            raise ParameterError(f"{source.path}: expected a file of whole pages of {PAGE_BYTES} bytes, as CSV3 takes them")
        chain.open(source.size, FOUR_GIB - source.size)
    size = 0
    for chunk in source.chunks():
        chain.update(chunk)
        size += len(chunk)
        step(len(chunk))
    source.check_unchanged()
    if size == 0:
        raise EmptySourceError(f"{source.path}: is empty; expected a firmware image")
    if size % PAGE_BYTES:
        warnings.append(f"{source.path}: has {size} bytes, no multiple of {PAGE_BYTES}; QEMU refuses such a firmware")
    address = FOUR_GIB - size if size <= FOUR_GIB else None
    chain.close("firmware", size, address, chain.digest())


def _hash_command_line(append: str | None) -> HashedInput:
    # As the kernel received the argument: the shell's bytes, undecodable ones too.
    data = os.fsencode(append or "") + b"\0"
    return HashedInput("command line", None, len(data), hashlib.sha256(data).digest())


def _hash_file(name: str, path: AnyPath | None, step: Callable[[int], None]) -> HashedInput:
    sha256 = hashlib.sha256()
    if path is None:
        return HashedInput(name, None, 0, sha256.digest())
    size = 0
    with Source(path) as source:
        for chunk in source.chunks():
            sha256.update(chunk)
            size += len(chunk)
            step(len(chunk))
        source.check_unchanged()
    return HashedInput(name, source.path, size, sha256.digest())


def _progress_over(paths: list[AnyPath], progress: Progress | None) -> Callable[[int], None]:
    """One progress over several files. Their sizes only decide how far the bar is."""
    if progress is None:
        return lambda _count: None
    total = total_size(paths)
    done = 0
    report = progress

    def step(count: int) -> None:
        nonlocal done
        done += count
        report(done, total)

    return step
