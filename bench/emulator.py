"""The emulated machine against plain Unicorn: one loop over a working set, in Unicorn's own memory and behind the window.

    python bench/emulator.py [rounds]

Prints the best of nine runs each, alternating. Plain is twice: Unicorn's own TLB, and a virtual one that changes no address.
"""

from __future__ import annotations

import os
import struct
import sys
import time

from unicorn import Uc
from unicorn import unicorn_const as constants
from unicorn import x86_const as x86

from csvfast.machine.emulator.files import Files
from csvfast.machine.emulator.frames import Frames
from csvfast.machine.emulator.window import AddressSpace, Area
from csvfast.memory import EncryptedMemory

CODE_AT, DATA_AT = 0x400000, 0x10000000


def loop(size: int, rounds: int) -> bytes:
    """rounds times: for each 8 bytes of the set: add, rotate, store."""
    return (
        b"\x48\xb9" + struct.pack("<Q", rounds)  # mov rcx, rounds
        + b"\x48\xbf" + struct.pack("<Q", DATA_AT)  # mov rdi, DATA_AT          <- again
        + b"\x48\xbe" + struct.pack("<Q", DATA_AT + size)  # mov rsi, end
        + b"\x48\x03\x07"  # add rax, [rdi]                                     <- inner
        + b"\x48\xc1\xc0\x07"  # rol rax, 7
        + b"\x48\x89\x07"  # mov [rdi], rax
        + b"\x48\x83\xc7\x08"  # add rdi, 8
        + b"\x48\x39\xf7"  # cmp rdi, rsi
        + b"\x75\xed"  # jne inner
        + b"\x48\xff\xc9"  # dec rcx
        + b"\x75\xd4"  # jne again
    )  # fmt: skip


def identity(_uc, address: int, _access: int, entry, _data) -> bool:
    entry.paddr = address & -4096
    # Stores are quick only into pages that cannot be executed: Unicorn's own TLB grants everything, and loses by it.
    code = address < DATA_AT
    entry.perms = constants.UC_PROT_READ | (constants.UC_PROT_EXEC if code else constants.UC_PROT_WRITE)
    return True


def plain(code: bytes, size: int, *, virtual: bool) -> tuple[float, int]:
    uc = Uc(constants.UC_ARCH_X86, constants.UC_MODE_64)
    if virtual:
        uc.ctl_set_tlb_mode(constants.UC_TLB_VIRTUAL)
        uc.hook_add(constants.UC_HOOK_TLB_FILL, identity)
    uc.mem_map(CODE_AT, 4096, constants.UC_PROT_READ | constants.UC_PROT_EXEC)
    uc.mem_map(DATA_AT, size, constants.UC_PROT_READ | constants.UC_PROT_WRITE)
    uc.mem_write(CODE_AT, code)
    start = time.perf_counter()
    uc.emu_start(CODE_AT, CODE_AT + len(code))
    return time.perf_counter() - start, uc.reg_read(x86.UC_X86_REG_RAX)


def windowed(code: bytes, size: int, window: int) -> tuple[float, int, AddressSpace]:
    descriptor = os.memfd_create("dram")
    os.ftruncate(descriptor, 64 << 20)
    memory = EncryptedMemory(64 << 20, path=f"/proc/self/fd/{descriptor}")
    os.close(descriptor)
    memory.install(1)
    space = AddressSpace(memory, 1, Frames(memory.pages), window, Files("/"))
    uc = Uc(constants.UC_ARCH_X86, constants.UC_MODE_64)
    space.attach(uc)
    space.map(Area(CODE_AT, CODE_AT + 4096, 7))
    space.map(Area(DATA_AT, DATA_AT + size, 3))
    space.write(CODE_AT, code)
    start = time.perf_counter()
    uc.emu_start(CODE_AT, CODE_AT + len(code))
    return time.perf_counter() - start, uc.reg_read(x86.UC_X86_REG_RAX), space


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    for size, window, count in ((192 << 10, 256 << 10, rounds), (1 << 20, 256 << 10, max(rounds // 30, 1))):
        code = loop(size, count)
        usual, bare, behind = [], [], []
        for _ in range(9):
            seconds, value = plain(code, size, virtual=False)
            usual.append(seconds)
            seconds, value = plain(code, size, virtual=True)
            bare.append(seconds)
            seconds, other, space = windowed(code, size, window)
            behind.append(seconds)
            assert other == value
        fastest = min(*usual, *bare)
        print(f"set {size >> 10} KiB, window {window >> 10} KiB, {count} rounds")
        print(f"  plain {min(usual):.3f} s, plain with a virtual TLB {min(bare):.3f} s, window {min(behind):.3f} s")
        print(f"  {min(behind) / min(usual):.3f} of plain, {min(behind) / min(bare):.3f} of plain with a virtual TLB")
        print(f"  {space.decrypted} pages decrypted, {space.encrypted} encrypted")
        if space.decrypted > 100:
            print(f"  {(min(behind) - fastest) / space.decrypted * 1e6:.1f} us for a page in and out")


if __name__ == "__main__":
    main()
