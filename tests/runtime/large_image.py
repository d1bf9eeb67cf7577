"""A large encrypted image, half of it incompressible, and how much memory the agent takes for it."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from runtime.sandbox_rig import KEK, LAYER, PATH, family, program, put, tar_of

from csvfast.crypto import Secret
from csvfast.image.descriptor import CONFIG_TYPE, MANIFEST_TYPE, Descriptor
from csvfast.image.encrypt import encrypt_image
from csvfast.image.keys import Recipient
from csvfast.image.layout import OciLayout
from csvfast.image.manifest import Manifest
from csvfast.image.wrappers import LocalKek

MIB = 1 << 20
_WORKERS = ("qemu-system", "csvfast-agent")


class LargeImage:
    """`mib` MiB of files in layers, as many of noise as of text, and the program. The same bytes each time, but for the keys.

    Attributes: reference; clear_bytes: of the archives; cipher_bytes: of the layers; packed: these before encryption, if kept.
    """

    def __init__(self, folder: Path, mib: int, layers: int = 4, *, keep: bool = False) -> None:
        chance = random.Random(6)
        clear = OciLayout(folder / "large-clear", create=True)
        words = [chance.randbytes(5).hex().encode() for _ in range(4000)]
        found: list[Descriptor] = []
        digests: list[str] = []
        self.packed: list[bytes] = []
        self.clear_bytes = self.cipher_bytes = 0
        for layer in range(layers):
            files = [("bin/program", program(), 0o755)] if layer == 0 else []
            for number in range(mib // layers // 2):
                text = b" ".join(chance.choices(words, k=MIB // 11)).ljust(MIB)
                files.append((f"data/{layer}/text{number}", text, 0o644))
                files.append((f"data/{layer}/noise{number}", chance.randbytes(MIB), 0o600))
            archive = tar_of(files)
            digests.append(f"sha256:{hashlib.sha256(archive).hexdigest()}")
            packed = gzip.compress(archive, 1, mtime=0)
            self.clear_bytes += len(archive)
            self.cipher_bytes += len(packed)
            if keep:
                self.packed.append(packed)
            found.append(put(clear, packed, LAYER))
        config = {
            "architecture": "amd64", "os": "linux", "config": {"Cmd": ["/bin/program", "hello"], "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": digests},
        }  # fmt: skip
        manifest = Manifest(put(clear, json.dumps(config).encode(), CONFIG_TYPE), tuple(found))
        clear.put_manifest(manifest.encode(), MANIFEST_TYPE, "clear")
        recipient = Recipient(LocalKek(Secret(KEK), f"kbs:///{PATH}", style="coco"))
        encrypt_image(clear, OciLayout(folder / "large", create=True), [recipient], wanted="clear", tag="1")
        shutil.rmtree(folder / "large-clear")
        self.reference = f"oci:{folder / 'large'}:1"


class Watch(threading.Thread):
    """Looks at the agent or QEMU below a process until it is told to stop.

    Attributes: cpu: seconds, user and system. peak: its greatest resident memory in bytes; without files that it has in a tmpfs.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.cpu, self.peak = 0.0, 0
        self._pid, self._done = pid, threading.Event()
        self.start()

    def run(self) -> None:
        worker = 0
        while not self._done.wait(0.02):
            with suppress(OSError, ValueError, IndexError):
                if not worker:
                    worker = next((one for one in family(self._pid) if _name(one).startswith(_WORKERS)), 0)
                    continue
                numbers = Path(f"/proc/{worker}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
                self.cpu = (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")
                for line in Path(f"/proc/{worker}/status").read_text(encoding="ascii").splitlines():
                    if line.startswith("VmHWM:"):
                        self.peak = max(self.peak, int(line.split()[1]) << 10)

    def stop(self) -> None:
        self._done.set()
        self.join(10)


def watched(command: Sequence[str], seconds: float = 60) -> tuple[subprocess.CompletedProcess[bytes], Watch]:
    """Runs it to its end."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        watch = Watch(process.pid)
        try:
            out, err = process.communicate(timeout=seconds)
        finally:
            process.kill()
            watch.stop()
    return subprocess.CompletedProcess(command, process.returncode, out, err), watch


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
    except OSError:
        return ""
