"""One static program on an emulated CPU whose memory is ciphertext: no QEMU, no privileges (pip install 'csvfast[unicorn]').

The program, some bytes of x86-64 made here, fills 128 KiB with copies of a text, says so, and waits for a byte. Meanwhile the
host reads the DRAM.
"""

from __future__ import annotations

import os
import struct
import tempfile
import threading
from pathlib import Path

from csvfast.machine.emulator import run_program

TEXT = b"attack at dawn!\n"
CODE, DATA = 0x400000, 0x600000


def program() -> bytes:
    """A static ELF64 file: one page of code and text, 192 KiB of zeros to work in."""
    start = CODE + 64 + 2 * 56  # behind the headers
    code = b"\xbf" + struct.pack("<I", DATA)  # mov edi, DATA
    code += b"\xba" + struct.pack("<I", 8192)  # mov edx, 8192
    loop = b"\xbe%s\xb9\x10\x00\x00\x00\xf3\xa4\xff\xca"  # mov esi, text; mov ecx, 16; rep movsb; dec edx
    rest = (
        b"\xb8\x01\x00\x00\x00\xbf\x01\x00\x00\x00\xbe%s\xba\x10\x00\x00\x00\x0f\x05"  # write(1, text, 16)
        b"\xb8\x00\x00\x00\x00\x31\xff\xbe\x00\x00\x62\x00\xba\x01\x00\x00\x00\x0f\x05"  # read(0, 0x620000, 1)
        b"\xb8\x3c\x00\x00\x00\xbf\x07\x00\x00\x00\x0f\x05"  # exit(7)
    )
    length = len(code) + len(loop) + 2 + len(rest) + 2 * 2  # each %s becomes four bytes
    place = struct.pack("<I", start + length)
    body = loop % place
    code += body + b"\x75" + struct.pack("<b", -len(body) - 2) + rest % place + TEXT
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, start, 64, 0, 0, 64, 56, 2, 64, 0, 0
    )
    size = 64 + 2 * 56 + len(code)
    segments = struct.pack("<IIQQQQQQ", 1, 5, 0, CODE, CODE, size, size, 4096)
    segments += struct.pack("<IIQQQQQQ", 1, 6, 0, DATA, DATA, 0, 0x30000, 4096)
    return header + segments + code


with tempfile.TemporaryDirectory() as name:
    root = Path(name)
    (root / "program").write_bytes(program())
    (root / "program").chmod(0o755)
    output, answer, said = os.pipe(), os.pipe(), os.dup(1)
    found: list[int] = []

    def host() -> None:
        """Waits until the program has written its text everywhere, looks for it in the DRAM, and lets it go on."""
        assert os.read(output[0], 64) == TEXT
        dram = (root / "dram").read_bytes()
        found.append(dram.count(TEXT.strip()))
        found.append(sum(any(dram[page : page + 4096]) for page in range(0, len(dram), 4096)))
        os.write(answer[1], b"\n")

    watcher = threading.Thread(target=host)
    watcher.start()
    os.dup2(answer[0], 0)
    os.dup2(output[1], 1)
    try:
        result = run_program("/program", root=root, memory=1 << 20, window=64 << 10, dram=root / "dram", seconds=20)
    finally:
        os.dup2(said, 1)
    watcher.join()

print(f"exit code {result.exit_code}; {found[1]} pages of ciphertext in the DRAM, the text in {found[0]} places")
assert result.exit_code == 7
assert found[0] == 0
assert found[1] >= 16
