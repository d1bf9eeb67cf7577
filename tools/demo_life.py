"""The demo's main part: the life of a confidential container, from a program's source to its last line, by the `csvfast` command.

A chip is made, a broker and a registry start, an image is built, encrypted and pushed, the launch digest is predicted and told
to the broker, and the container runs: on a Linux guest where QEMU is installed, else on the emulated CPU. What the host could
see is looked at before every step.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import mmap
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

from demo_page import PAGE, Attack, Page, Picture, Step, entropies, hexdump
from rich.console import Console

from csvfast.image.descriptor import CONFIG_TYPE, MANIFEST_TYPE, Descriptor
from csvfast.image.layout import OciLayout
from csvfast.image.manifest import Manifest
from csvfast.image.server import EmbeddedRegistry
from csvfast.runtime.executor import choose_executor, executor_of

__all__ = ["LETTER", "Failed", "Life"]

SECONDS: Final = 120.0
LAYER: Final = "application/vnd.oci.image.layer.v1.tar+gzip"
LETTER: Final = b"""Dear Ada,
the vault on the seventh floor opens with 31-07-44. Whoever reads this in a memory dump
knows it now, too. So it had better not stand there.
Yours, Charles
"""
SECRET: Final = b"opens with 31-07-44"  # what is looked for everywhere
PICTURED: Final = 64 * 48  # pages of a picture, at most

# No library: a compiler is enough. Reads the letter, says so, keeps 256 copies of it in memory for a while, and looks again.
PROGRAM: Final = r"""
static long call(long number, long a, long b, long c) {
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}
static long length(const char *text) { long n = 0; while (text[n]) n++; return n; }
static void say(const char *text) { call(1, 1, (long)text, length(text)); }
static char letter[4096], copies[256 * 4096];
static unsigned long sum(void) {
    unsigned long total = 5381;
    for (long i = 0; i < (long)sizeof copies; i++) total = total * 33 + (unsigned char)copies[i];
    return total;
}
__attribute__((noreturn)) static void leave(long code) { for (;;) call(231, code, 0, 0); }
__attribute__((used)) static void run(void) {
    long file = call(2, (long)"/etc/letter", 0, 0), size = file < 0 ? -1 : call(0, file, (long)letter, sizeof letter);
    if (size < 1) { say("there is no letter\n"); leave(3); }
    for (long i = 0; i < (long)sizeof copies; i++) copies[i] = letter[(i % 4096) % size];
    unsigned long before = sum();
    say("The letter is here. It begins: ");
    call(1, 1, (long)letter, 9);
    say("\n");
    for (int turn = 0; turn < 12; turn++) {
        long pause[2] = {0, 150000000};
        call(35, (long)pause, 0, 0);
        if (sum() != before) { say("My memory is not what I wrote there.\n"); leave(9); }
    }
    say("It is still what it was.\n");
    leave(0);
}
__asm__(".globl _start\n_start:\n\tandq $-16, %rsp\n\tcall run\n");
"""


class Failed(Exception):  # noqa: N818  (what the demo says when something did not go as it should)
    """A step did not do what it should."""


class Ran:
    """How a command ended. Attributes: code, out, errors, seconds."""

    def __init__(self, code: int, out: str, errors: str, seconds: float) -> None:
        self.code, self.out, self.errors, self.seconds = code, out, errors, seconds

    @property
    def reason(self) -> str:
        """Its last line of complaint, without the program's name."""
        lines = [line for line in self.errors.splitlines() if line.startswith("csvfast: error: ")]
        return (lines or self.errors.splitlines() or ["it said nothing"])[-1].removeprefix("csvfast: error: ").strip()


class Life:
    """The story, and what is left over for the attacks. A context manager: processes end, files stay in `work`.

    Attributes: page; held: whether everything held so far; image, digest, chip, broker, pin, verdictd, registry.
    """

    def __init__(self, work: Path, out: Console, executor: str = "auto") -> None:
        self.work, self.out = work, out
        self.executor = choose_executor(executor)
        self.page = Page(
            "The life of a confidential container",
            f"csvfast on {platform.node()}, {time.strftime('%Y-%m-%d %H:%M:%S %z')}, executor: {self.executor.name}",
            self.executor.statement(),
        )
        self.held = True
        self.chip, self.broker = work / "chip", work / "broker"
        self.image = self.digest = self.pin = self.verdictd = self.kbs = ""
        self.registry: EmbeddedRegistry | None = None
        self._began = time.monotonic()
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Life:
        return self

    def __exit__(self, *_problem: object) -> None:
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self.registry is not None:
            self.registry.stop()

    # ---- Telling

    @contextmanager
    def step(self, title: str, text: str) -> Iterator[dict[str, str]]:
        """One step: on the terminal while it runs, on the page with its time. The dictionary's "text" and "seen" may be set."""
        begin = time.monotonic()
        found = {"text": text, "seen": ""}
        with self.working(title):
            yield found
        seconds = time.monotonic() - begin
        self.page.steps.append(Step(title, found["text"], begin - self._began, seconds, found["seen"]))
        self.out.print(f"[bold]{len(self.page.steps):2}  {title}[/]  [dim]{seconds:.2f} s[/]\n    {found['text']}")
        for line in found["seen"].splitlines()[:3]:
            self.out.print(f"    [dim]host: {line[:100]}[/]", markup=True)

    @contextmanager
    def working(self, title: str) -> Iterator[None]:
        """Shows on a terminal that something is being done."""
        if self.out.is_terminal:
            with self.out.status(f"{title} ..."):
                yield
        else:
            yield

    def expect(self, holds: bool, what: str) -> None:
        """A check of the demo itself."""
        if not holds:
            self.held = False
            self.out.print(f"    [red]FAILED: {what}[/]")

    # ---- Commands

    def run(self, *arguments: str | Path, fail: bool = True, seconds: float = SECONDS) -> Ran:
        """Runs csvfast to its end. Failed: it did not succeed, and should have."""
        begin = time.monotonic()
        done = subprocess.run(
            self.command(*arguments), capture_output=True, text=True, check=False, timeout=seconds, cwd=self.work,
            env=self.environment(),
        )  # fmt: skip
        ran = Ran(done.returncode, done.stdout, done.stderr, time.monotonic() - begin)
        if fail and ran.code:
            raise Failed(f"csvfast {' '.join(map(str, arguments[:2]))}: {ran.reason}")
        return ran

    def command(self, *arguments: str | Path) -> list[str]:
        """csvfast by this interpreter."""
        return [sys.executable, "-m", "csvfast", *map(str, arguments)]

    def environment(self) -> dict[str, str]:
        """Everything that csvfast keeps for a user is kept in `work` here."""
        private = self.work / "private"
        private.mkdir(mode=0o700, exist_ok=True)
        return {**os.environ, "XDG_RUNTIME_DIR": str(private), "XDG_CACHE_HOME": self._cache()}

    def _cache(self) -> str:
        # The guest's kernel and base initrd stay where they are between runs; images do not.
        return os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")

    def container(self, *more: str | Path, image: str = "", dram: Path | None = None) -> list[str]:
        """The command line that runs the image."""
        options: list[str | Path] = [
            "run", image or self.image, "--executor", self.executor.name, "--state", self.chip, "--broker", self.verdictd,
            "--broker-pin", self.pin, "--cache", self.work / "cache", "--json", *self._size(),
        ]  # fmt: skip
        if dram is not None:
            options += ["--dram", dram]
        return self.command(*options, *more)

    def _size(self) -> list[str]:
        if self.executor.name == "vm":
            return ["--memory", "256MiB", "--window", "1/8"]
        return ["--memory", "32MiB", "--window", "256K"]

    # ---- The story

    def tell(self) -> None:
        """Everything up to the container's end."""
        self._make_chip()
        self._start_broker()
        self._make_image()
        self._encrypt()
        self._measure()
        self._run()

    def _make_chip(self) -> None:
        with self.step("A chip is made", "a simulated one: its root is not Hygon's, and nobody will mistake it for that") as told:
            made = json.loads(self.run("chip", "new", self.chip, "--json").out)
            told["seen"] = f"certificates of {made['chip_id']}, root SM3 {made['root']['sm3']}; its keys only in chip/, mode 0700"
        self.page.facts += [("chip", made["chip_id"]), ("root, SM3", made["root"]["sm3"])]

    def _start_broker(self) -> None:
        with self.step("The owner's broker starts", "SQLite; its key for images leaves it for measured guests alone") as told:
            made = json.loads(self.run(
                "broker", "init", self.broker, "--root", self.chip / "root.cert", "--verdictd", "127.0.0.1:0",
                "--kbs", "127.0.0.1:0", "--json",
            ).out)  # fmt: skip
            self.pin = made["pin"]
            self.run("broker", "key", "create", "images", "--config", self.broker)
            doors = self.serve("broker", "serve", self.broker, "--json")
            found = doors.get("doors", doors)
            self.verdictd = "verdictd://" + str(found["verdictd"]).removeprefix("verdictd://")
            told["seen"] = f"{self.verdictd}: attested TLS; who shows no report of an allowed guest gets nothing"
        self.page.facts.append(("broker's key, SHA-256", self.pin))

    def serve(self, *arguments: str | Path) -> dict[str, Any]:
        """Starts a server, ended with this object. Returns: its JSON document."""
        log = (self.work / f"{arguments[0]}.log").open("w")
        process = subprocess.Popen(
            self.command(*arguments), stdout=subprocess.PIPE, stderr=log, text=True, cwd=self.work, env=self.environment()
        )
        log.close()
        self._processes.append(process)
        out: IO[str] = process.stdout  # type: ignore[assignment]
        text = ""
        while True:
            line = out.readline()
            if not line:
                raise Failed(f"{arguments[0]} did not start: {(self.work / f'{arguments[0]}.log').read_text()[-300:]}")
            text += line
            try:
                document: dict[str, Any] = json.loads(text)
            except ValueError:
                continue
            return document

    def _make_image(self) -> None:
        with self.step("An image is built", "two layers: a static program, and a letter") as told:
            source, program = self.work / "program.c", self.work / "program"
            source.write_text(PROGRAM)
            subprocess.run(
                ["gcc", "-Os", "-static", "-nostdlib", "-ffreestanding", "-fno-stack-protector", "-fno-builtin", "-no-pie",
                 "-fcf-protection=none", "-Wl,--build-id=none,-z,noexecstack", "-s", "-o", str(program), str(source)],
                check=True, capture_output=True, text=True, timeout=60,
            )  # fmt: skip
            tars = [tar_of("bin/reader", program.read_bytes(), 0o755), tar_of("etc/letter", LETTER, 0o600)]
            layout = OciLayout(self.work / "clear", create=True)
            config = {
                "architecture": "amd64", "os": "linux", "config": {"Cmd": ["/bin/reader"], "Env": ["PATH=/bin"]},
                "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(one).hexdigest()}" for one in tars]},
            }  # fmt: skip
            manifest = Manifest(
                put(layout, json.dumps(config).encode(), CONFIG_TYPE),
                tuple(put(layout, gzip.compress(one, 1, mtime=0), LAYER) for one in tars),
            )
            layout.put_manifest(manifest.encode(), MANIFEST_TYPE, "1")
            told["seen"] = f"nothing: this is the owner's machine still. {program.stat().st_size} bytes of program"

    def _encrypt(self) -> None:
        with self.step("It is encrypted and pushed", "each layer under a key of its own, which the broker's key wraps") as told:
            self.registry = EmbeddedRegistry(self.work / "registry")
            self.registry.start()
            self.image = f"docker://{self.registry.address}/demo/reader:1"
            provider = f"attestation-agent=unix://{self.broker / 'keyprovider.sock'}"
            self.run(
                "image", "encrypt", f"oci:{self.work / 'clear'}:1", self.image, "--provider", provider,
                "--to", "provider:attestation-agent:default/key/images",
            )  # fmt: skip
            shutil.rmtree(self.work / "clear")
            (self.work / "program").unlink()
            hits = self.search(self.work / "registry")
            self.expect(hits == 0, "the registry has the letter in the clear")
            told["seen"] = f"all of the registry's files: the letter's words stand in {hits} of them"

    def search(self, folder: Path) -> int:
        """Files below a folder in which the secret stands, also packed."""
        found = 0
        for path in folder.rglob("*"):
            if path.is_file():
                data = path.read_bytes()
                if data[:2] == b"\x1f\x8b":
                    data += gzip.decompress(data)
                found += SECRET in data
        return found

    def _measure(self) -> None:
        with self.step("The guest is measured before there is one", "its agent, and what that may do") as told:
            line = [
                "runtime", "measure", self.image, "--executor", self.executor.name, "--broker", self.verdictd,
                "--broker-pin", self.pin, "--memory", self._size()[1], "--json",
            ]  # fmt: skip
            self.digest = json.loads(self.run(*line).out)["digest"]
            allowed = [self.digest]
            if self.executor.name != "emulator" and executor_of("emulator").unavailable() is None:  # for the attacks
                line[line.index("--executor") + 1] = "emulator"
                allowed.append(json.loads(self.run(*line).out)["digest"])
            self.run("broker", "reference", "set", "csv_measure", *allowed, "--config", self.broker)
            told["text"] = f"launch digest {self.digest[:16]}.. told to the broker"
            told["seen"] = f"the digest and all that is in it: it is no secret. {self.digest}"
        self.page.measurements.append(("launch digest, predicted", self.digest))

    def _run(self) -> None:
        dram = self.work / "dram"
        with self.step("The container runs", "launched, attested, the key released, layers decrypted inside") as told:
            watch = Watch(dram)
            begin = time.monotonic()
            with subprocess.Popen(
                self.container("--expect", self.digest, "--timings", dram=dram), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True, cwd=self.work, env=self.environment(),
            ) as process:  # fmt: skip
                out: IO[str] = process.stdout  # type: ignore[assignment]
                errors = Drain(process.stderr)
                first = out.readline()
                said = time.monotonic() - begin
                watch.scan_while(process, 1.5)
                output = first + out.read()
                code = process.wait(SECONDS)
            self.page.output = output
            self.expect(code == 0 and "still what it was" in output, f"the container ended with {code}: {errors.text()[-400:]}")
            self.expect(watch.hits == 0 and watch.scans > 0, f"the DRAM held the letter: {watch.hits} of {watch.scans} scans")
            told["text"] = f"first line after {said:.2f} s: {first.strip()}"
            told["seen"] = f"{watch.scans} scans of the DRAM while it ran: the letter found {watch.hits} times\n{watch.sample}"
        self._tell_timings(errors.text())
        self._tell_evidence()
        self.page.attacks.append(
            Attack(
                "The host reads the DRAM",
                f"Looked for the letter's words in all of it, {watch.scans} times, while the container ran.",
                "Every page is SM4-XTS ciphertext under a key that the processor made for this guest.",
                f"found {watch.hits} times", "SUCCEEDED" if watch.hits else "noise",
            )
        )  # fmt: skip
        self.page.pictures.append(
            Picture("What the host sees", "the DRAM, as the container ran: under the guest's SM4 key", watch.bits, watch.sample)
        )
        plain = (LETTER * 60)[:PAGE] * 256
        self.page.pictures.append(
            Picture("What is there", "the letter as the program holds it, 256 pages", entropies(plain), hexdump(plain, rows=8))
        )

    def _tell_evidence(self) -> None:
        """What the broker wrote down when it let the key go."""
        command = ("broker", "audit", "show", "--outcome", "allowed", "--config", self.broker, "--json")
        records = json.loads(self.run(*command).out)
        records = records["records"] if isinstance(records, dict) else records
        for name, value in (records[-1] if records else {}).items():
            if value not in (None, "", [], {}):
                self.page.facts.append((f"audit: {name}", value if isinstance(value, str) else json.dumps(value)))

    def _tell_timings(self, errors: str) -> None:
        for line in errors.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            timings = record.get("timings") if isinstance(record, dict) else None
            if timings:
                rows = [(one["step"], one["seconds"]) for one in timings["steps"]]
                rows += [(f"agent: {one['step']}", one["seconds"]) for one in timings["agent"]]
                self.page.timings += [(name, f"{seconds * 1000:.0f} ms") for name, seconds in rows]


class Watch:
    """Somebody with a hand on the DIMMs. Attributes: scans, hits; bits and sample of the last scan."""

    def __init__(self, dram: Path) -> None:
        self.dram = dram
        self.scans = self.hits = 0
        self.bits: list[float] = []
        self.sample = ""

    def scan_while(self, process: subprocess.Popen[str], seconds: float) -> None:
        """Scans again and again; the last time it makes a picture."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and process.poll() is None:
            self.scan()
            time.sleep(0.05)

    def scan(self) -> None:
        """All of the file, once."""
        with self.dram.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
            self.scans += 1
            self.hits += memory.find(SECRET) >= 0
            if not self.bits:
                self._picture(memory)

    def _picture(self, memory: mmap.mmap) -> None:
        pages = len(memory) // PAGE
        stride = max(1, pages // PICTURED)
        for page in range(0, min(pages, PICTURED * stride), stride):
            piece = memory[page * PAGE : (page + 1) * PAGE]
            self.bits += entropies(piece)
            if not self.sample and self.bits[-1] > 7.5:
                self.sample = hexdump(piece, page * PAGE, rows=8)


class Drain:
    """Reads a pipe in a thread, so that nobody waits for it."""

    def __init__(self, stream: IO[str] | None) -> None:
        self._parts: list[str] = []
        self._stream = stream
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for line in self._stream or ():
            self._parts.append(line)

    def text(self) -> str:
        """What came."""
        self._thread.join(10)
        return "".join(self._parts)


def tar_of(name: str, content: bytes, mode: int) -> bytes:
    """An archive of one file."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = len(content), mode
        archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def put(layout: OciLayout, data: bytes, media_type: str) -> Descriptor:
    """A blob into a layout."""
    descriptor = Descriptor.of(data, media_type)
    layout.put_blob(descriptor, [data])
    return descriptor

