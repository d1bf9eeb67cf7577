"""An initrd whose digest is known before it boots: the same content gives the same bytes, and one changed line another guest.

`csvfast vm initrd` builds one with busybox, kernel modules and Python; here the pieces are put together by hand, in memory.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path

from csvfast.machine.initrd import InitrdBuilder
from csvfast.measure import launch_digest


def build(command: str) -> bytes:
    builder = InitrdBuilder()
    builder.init()  # /init of csvfast: mounts, loads modules, runs the command, tells its exit code
    builder.program("/usr/bin/interpreter", Path(sys.executable).resolve())  # with the libraries that it needs
    builder.run(command)
    return builder.encode()


first, again, other = build("echo hello"), build("echo hello"), build("echo goodbye")
assert first == again
assert first != other
print(f"{len(first)} bytes, SHA-256 {hashlib.sha256(first).hexdigest()}")

# What the firmware measures is a table of hashes, and the initrd's is one of them.
with tempfile.TemporaryDirectory() as directory:
    firmware, kernel, initrd = (Path(directory, name) for name in ("firmware", "vmlinuz", "initrd"))
    firmware.write_bytes(b"\x90" * 65536)
    kernel.write_bytes(b"a kernel" * 1000)
    digests = []
    for content in (first, again, other):
        initrd.write_bytes(content)
        launch = launch_digest(firmware, kernel=kernel, initrd=initrd, append="console=ttyS0", force_hash_table=True)
        digests.append(launch.digest)
assert digests[0] == digests[1]
assert digests[0] != digests[2]
print("launch digest:", digests[0].hex())
print("with the other command:", digests[2].hex())
