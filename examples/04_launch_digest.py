"""The launch digest that a guest's attestation report will carry, computed before the guest exists.

The inputs are made up on the spot; the shape of the firmware is real: an OVMF image that publishes, in the table at its
end, where QEMU puts the hashes of kernel, initrd and command line.
"""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from uuid import UUID

from csvfast.measure import launch_digest


def entry(guid: str, data: bytes) -> bytes:
    """One entry of OVMF's table, which is read backwards: data, length, GUID."""
    return data + struct.pack("<H", len(data) + 18) + UUID(guid).bytes_le


def small_firmware() -> bytes:
    """An image of 64 KiB with a hash table area at 0x80f000 and a reset address."""
    entries = entry("7255371f-3a3b-4b04-927b-1da6efa8d454", struct.pack("<II", 0x80F000, 0x400))
    entries += entry("00f771de-1a7e-4fcb-890e-68c77e2fb44e", struct.pack("<I", 0xFFFFFE00))
    footer = struct.pack("<H", len(entries) + 18) + UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
    tail = entries + footer + bytes(32)
    return b"\x90" * (65536 - len(tail)) + tail


with tempfile.TemporaryDirectory() as directory:
    firmware, kernel, initrd = (Path(directory, name) for name in ("OVMF.fd", "vmlinuz", "initrd.img"))
    firmware.write_bytes(small_firmware())
    kernel.write_bytes(b"a kernel" * 100_000)
    initrd.write_bytes(b"an initial RAM disk" * 100_000)

    launch = launch_digest(firmware, kernel=kernel, initrd=initrd, append="console=ttyS0")
    print("launch digest:", launch.hexdigest)
    for piece in launch.pieces:
        print(f"  {piece.name:<12} {piece.size:>8} bytes  SM3 {piece.sm3.hex()[:32]}...")

    # One character of the command line is another guest.
    other = launch_digest(firmware, kernel=kernel, initrd=initrd, append="console=ttyS1")
    assert other.digest != launch.digest
    assert other.pieces[0].sm3 == launch.pieces[0].sm3, "the firmware is the same"
    assert other.pieces[1].sm3 != launch.pieces[1].sm3, "the table of hashes is not"
    print("another command line:", other.hexdigest[:32], "...")
