"""An encrypted image of a small static program, a broker that has its key, and ways to look for plaintext."""

from __future__ import annotations

import asyncio
import functools
import gzip
import hashlib
import io
import json
import mmap
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from csvfast.broker.administration import LOCAL, Administration
from csvfast.broker.config import BrokerConfig
from csvfast.broker.master import FileMaster
from csvfast.broker.model import ResourcePath
from csvfast.broker.service import Service
from csvfast.broker.store import AuditRecord, Store
from csvfast.certs import ManufacturingLine
from csvfast.crypto import Secret
from csvfast.image.descriptor import CONFIG_TYPE, MANIFEST_TYPE, Descriptor
from csvfast.image.encrypt import encrypt_image
from csvfast.image.keys import Recipient
from csvfast.image.layout import OciLayout
from csvfast.image.manifest import Manifest
from csvfast.image.wrappers import LocalKek

LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
KEK = hashlib.sha256(b"the key-encryption key of these tests").digest()
PATH = ResourcePath("default", "key", "images")
# What is searched for: in a file of the image, and made by the program in its memory.
MARK = b"a line that only the container may know 7c1f"
HELD = b"what the program holds in its memory d0e2"

PROGRAM = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static char held[1 << 20];
static void stopped(int number) { (void)number; if (write(1, "stopped\n", 8) == 8) _exit(42); _exit(1); }
int main(int count, char **words) {
    const char *what = count > 1 ? words[1] : "hello";
    if (!strcmp(what, "hello")) { puts("hello from the container"); fputs("a complaint\n", stderr); return 7; }
    if (!strcmp(what, "env")) { puts(getenv("WORD") ? getenv("WORD") : "none"); return 0; }
    if (!strcmp(what, "cat")) {
        char buffer[4096]; ssize_t got;
        while ((got = read(0, buffer, sizeof buffer)) > 0) if (write(1, buffer, got) != got) return 1;
        return got ? 2 : 0;
    }
    if (!strcmp(what, "hold")) { /* the mark of the file and one of its own, everywhere in memory, until a signal comes */
        char line[256] = {0}; int file = open("/etc/mark", O_RDONLY); ssize_t got = read(file, line, 200), place;
        const char first[] = "what the program holds", second[] = " in its memory d0e2";
        if (got < 1) return 3;
        signal(SIGTERM, stopped);
        for (place = 0; place + 300 < (ssize_t)sizeof held; place += 300) {
            memcpy(held + place, line, got);
            memcpy(held + place + got, first, sizeof first - 1);
            memcpy(held + place + got + sizeof first - 1, second, sizeof second);
        }
        file = open("/tmp-file", O_CREAT | O_WRONLY | O_TRUNC, 0600);
        for (place = 0; place < (ssize_t)sizeof held; place += got)
            if ((got = write(file, held + place, sizeof held - place)) < 1) return 4;
        puts("holding"); fflush(stdout);
        for (;;) pause();
    }
    if (!strcmp(what, "big")) { /* more output than any buffer on the way */
        char buffer[1000]; int number;
        memset(buffer, 'x', sizeof buffer); buffer[999] = '\n';
        for (number = 0; number < 3000; number++) if (fwrite(buffer, 1, sizeof buffer, stdout) != sizeof buffer) return 5;
        return 0;
    }
    return 99;
}
"""


@functools.cache
def program() -> bytes:
    """The static program."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "program.c", Path(folder) / "program"
        source.write_text(PROGRAM)
        compiler = shutil.which("musl-gcc") or "gcc"
        subprocess.run([compiler, "-static", "-Os", "-s", "-o", str(out), str(source)], check=True, timeout=60)
        return out.read_bytes()


def tar_of(files: Iterable[tuple[str, bytes, int]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content, mode in files:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def put(layout: OciLayout, data: bytes, media_type: str) -> Descriptor:
    descriptor = Descriptor.of(data, media_type)
    layout.put_blob(descriptor, [data])
    return descriptor


def make_clear(path: Path, tag: str = "clear", *, command: Sequence[str] = ("/bin/program", "hello")) -> OciLayout:
    """An image of two layers: the program, and the file with the mark."""
    layout = OciLayout(path, create=True)
    tars = [
        tar_of([("bin/program", program(), 0o755)]),
        tar_of([("etc/mark", MARK + b"\n", 0o644), ("etc/passwd", b"root:x:0:0::/:/bin/sh\n", 0o644)]),
    ]
    config = {
        "architecture": "amd64", "os": "linux", "config": {"Cmd": list(command), "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(one).hexdigest()}" for one in tars]},
    }  # fmt: skip
    manifest = Manifest(
        put(layout, json.dumps(config).encode(), CONFIG_TYPE),
        tuple(put(layout, gzip.compress(one, 1, mtime=0), LAYER) for one in tars),
    )
    layout.put_manifest(manifest.encode(), MANIFEST_TYPE, tag)
    return layout


def make_image(folder: Path, name: str = "demo", *, command: Sequence[str] = ("/bin/program", "hello"), kek: bytes = KEK) -> Path:
    """A layout with the image, encrypted, as its only one: tag 1."""
    clear = make_clear(folder / f"{name}-clear", command=command)
    target = folder / name
    recipient = Recipient(LocalKek(Secret(kek), f"kbs:///{PATH}", style="coco"))
    encrypt_image(clear, OciLayout(target, create=True), [recipient], wanted="clear", tag="1")
    shutil.rmtree(folder / f"{name}-clear")
    return target


CONFIGURATION = """
[store]
url = "sqlite:///broker.db"
[master]
kind = "file"
path = "master.key"
[trust]
roots = ["root.cert"]
[limits]
exempt = ["127.0.0.1"]
[verdictd]
listen = "127.0.0.1:0"
[kbs]
listen = "127.0.0.1:0"
insecure_http = true
[keyprovider]
listen = "127.0.0.1:0"
local_trust = true
"""


class BrokerRig:
    """A broker in this process with both doors and the images' key. A context manager.

    Attributes: chip: directory of a chip that it trusts. doors: addresses by name. pin: of its key at Verdictd's door.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700)
        line = ManufacturingLine.create()
        chip = line.make_chip()
        self.chip = folder / "chip"
        chip.save(self.chip)
        (folder / "root.cert").write_bytes(chip.root.encoded)
        config = BrokerConfig.parse(CONFIGURATION.encode(), folder)
        self.store = Store.open(config.store_url, FileMaster.create(folder / "master.key"), create=True)
        self.administration = Administration(self.store)
        self.administration.put_resource(LOCAL, PATH, KEK)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._service = Service(config, self.store)
        self._run(self._service.__aenter__())
        self.doors: dict[str, Any] = dict(self._service.addresses)

    @property
    def verdictd(self) -> str:
        return f"verdictd://{self.doors['verdictd']}"

    @property
    def kbs(self) -> str:
        return f"kbs+http://{self.doors['kbs']}"

    def allow(self, digest: str) -> None:
        """The broker gives the key to guests of this launch digest."""
        self.administration.put_reference(LOCAL, "csv_measure", [digest], None)

    def records(self) -> list[AuditRecord]:
        return [entry.record for entry in self.store.iterate_audit()]

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def close(self) -> None:
        self._run(self._service.__aexit__())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()
        self.store.close()

    def __enter__(self) -> BrokerRig:
        return self

    def __exit__(self, *_problem: object) -> None:
        self.close()


# ---- Looking for what should not be there


def secrets() -> list[bytes]:
    """What nobody outside of the guest may ever find: plaintext of a layer, the program's memory, the KEK."""
    middle = program()[len(program()) // 2 :][:64]
    return [MARK, HELD, KEK, middle]


def found_in(path: Path, words: Sequence[bytes]) -> list[bytes]:
    """Which of the words stand in a file."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return []
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
                return [word for word in words if view.find(word) >= 0]
    except (OSError, ValueError):
        return []


def search(folders: Iterable[Path], words: Sequence[bytes]) -> list[tuple[Path, bytes]]:
    """Files below the folders that hold one of the words."""
    return [
        (path, word)
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
        for word in found_in(path, words)
    ]


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def processes_with(text: str) -> list[int]:
    """Processes, this one aside, whose command line or environment has the text."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                whole = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
            except OSError:
                continue
            if text.encode() in whole and alive(int(folder.name)):
                found.append(int(folder.name))
    return found


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(folder.name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def found_in_memory(pid: int, words: Sequence[bytes]) -> list[bytes]:
    """Which of the words stand in a process's memory."""
    found = set()
    maps = Path(f"/proc/{pid}/maps").read_text(encoding="ascii", errors="replace").splitlines()
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in maps:
            place, rights, *_ = line.split()
            if not rights.startswith("rw") or line.endswith(("[vvar]", "[vsyscall]")):
                continue
            begin, end = (int(one, 16) for one in place.split("-"))
            kept = b""
            while begin < end:
                try:
                    memory.seek(begin)
                    data = kept + memory.read(min(end - begin, 8 << 20))
                except (OSError, ValueError, OverflowError):
                    break
                if len(data) == len(kept):
                    break
                found |= {word for word in words if word in data}
                begin += len(data) - len(kept)
                kept = data[-64:]
    return sorted(found)


def drams_of(pids: Iterable[int]) -> list[Path]:
    """The memory files that are the DRAM of these processes' machines."""
    found: dict[int, Path] = {}
    for pid in pids:
        for path in Path(f"/proc/{pid}/fd").iterdir():
            try:
                if "csvfast-dram" in str(path.readlink()):
                    found.setdefault(path.stat().st_ino, path)
            except OSError:
                continue
    return list(found.values())


class Relay:
    """Stands before a server and is dead after some bytes of its answers: connections cut, nobody listens. A context manager."""

    def __init__(self, target: str, limit: int) -> None:
        self._host, _, port = target.rpartition(":")
        self._port, self._left = int(port), limit
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._guard = threading.Lock()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                ours, _ = self._listener.accept()
                theirs = socket.create_connection((self._host, self._port))
            except OSError:
                return
            with self._guard:
                self._open += [ours, theirs]
            for source, target, counted in ((ours, theirs, False), (theirs, ours, True)):
                thread = threading.Thread(target=self._carry, args=(source, target, counted), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _carry(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        try:
            while data := source.recv(65536):
                if counted:
                    data = data[: self._left]
                    self._left -= len(data)
                target.sendall(data)
                if counted and self._left <= 0:
                    self.die()
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def limit(self, bytes_left: int) -> None:
        """From now on so many bytes are left."""
        self._left = max(bytes_left, 1)

    def die(self) -> None:
        for one in (self._listener, *self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_problem: object) -> None:
        self.die()
        for thread in self._threads:
            thread.join(10)
        for one in (self._listener, *self._open):
            one.close()


def wait_for(condition: Any, seconds: float = 20.0, what: str = "") -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not in {seconds} s: {what or condition}"
        time.sleep(0.02)


# ---- All of it together


class Demo:
    """Broker, encrypted image, and a directory for states, in one folder. A context manager.

    Attributes: folder, image (reference), broker, root: of states.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "states"
        self.root.mkdir(mode=0o700)
        self.cache = folder / "cache"
        self.layout = make_image(folder)
        self.image = f"oci:{self.layout}:1"
        self.broker = BrokerRig(folder / "broker")

    def options(self, **more: Any) -> Any:
        """Of a sandbox on the emulator that asks at Verdictd's door."""
        from csvfast.runtime.options import RunOptions

        usual = {"image": self.image, "executor": "emulator", "broker": self.broker.verdictd, "chip": str(self.broker.chip),
                 "memory": 128 << 20, "cache": str(self.cache)}  # fmt: skip
        return RunOptions(**(usual | more))

    def digest(self, options: Any) -> str:
        """The launch digest that it will have."""
        import tempfile

        from csvfast.runtime.executor import executor_of
        from csvfast.runtime.image_cache import image_identity
        from csvfast.runtime.options import configuration_for, launch_plan_of, loopback_of

        executor = executor_of(options.executor)
        told = configuration_for(options, *image_identity(options), loopback_of(executor)).encode()
        with tempfile.TemporaryDirectory() as work:
            return executor.predict(launch_plan_of(options, told, Path(work))).hexdigest

    def allowed(self, **more: Any) -> Any:
        """Options whose sandbox gets the key."""
        options = self.options(**more)
        self.broker.allow(self.digest(options))
        return options

    def command(self, options: Any, *more: str) -> list[str]:
        """`csvfast run` with these options."""
        line = [sys.executable, "-m", "csvfast", "run", "--executor", options.executor, "--broker", options.broker, "--state",
                options.chip, "--memory", f"{options.memory}", "--root", str(self.root), "--cache", options.cache]  # fmt: skip
        for name in options.env:
            line += ["--env", name]
        if options.stdin:
            line.append("--interactive")
        for name, value in options.settings.items():
            line += ["--set", f"{name}={value}"]
        line += [*more, options.image]
        return [*line, "--", *options.args] if options.args else line

    def run(self, options: Any, *more: str, given: bytes = b"", seconds: float = 60) -> subprocess.CompletedProcess[bytes]:
        """`csvfast run`, to its end."""
        return subprocess.run(self.command(options, *more), input=given, capture_output=True, timeout=seconds, check=False)

    def assert_clean(self) -> None:
        """Nothing is left of any sandbox: no process, no mount, no file but what is ciphertext or public."""
        wait_for(lambda: not processes_with(str(self.root)), what=f"processes of {self.root} end")
        assert str(self.root) not in Path("/proc/self/mountinfo").read_text(encoding="ascii")
        assert search([self.root, self.cache, self.layout], secrets()) == []

    def __enter__(self) -> Demo:
        return self

    def __exit__(self, *_problem: object) -> None:
        self.broker.close()
