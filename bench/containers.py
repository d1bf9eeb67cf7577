"""`csvfast run` to the first line, the guest with and without encrypted memory, attestation, and large images.

    python bench/containers.py [--rounds N] [--mib N] [--only start,guest,image]

start   a small cached image on `emulator` and `native`, in turns, from the command to its first line; what attestation takes in
        the agent once its libraries are loaded
guest   the same in the executor `vm`, in turns with the same QEMU without the preload library: its RAM is a plain memory file,
        everything else is equal. QEMU's CPU time stands beside the wall clock, since a busy machine moves only that one
image   a layered image, half of it incompressible, encrypted: fetched, decrypted and unpacked by the agent; its memory at most,
        and the rate beside the limit: AES-256-CTR, HMAC-SHA-256 and gunzip of the same bytes in one thread

Goals: 1.5 s on the emulator; 1.5 times the guest in the clear; attestation 100 ms; 128 MiB of memory; 0.8 of the limit. The
broker runs in this process. Needs the tests' folder beside it, `native` runc, crun or bwrap, `vm` QEMU and the guests' files.
"""

from __future__ import annotations

import argparse
import hmac
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

PLAIN = "--in-the-clear"
MIB = 1 << 20
BLOCK = 1 << 20
ATTESTATION = ("TLS key", "report and certificate", "handshake")


# ---- The guest without encryption


def run_in_the_clear(arguments: Sequence[str]) -> int:
    """`csvfast run` whose QEMU has a plain memory file and no preload library. Never part of csvfast itself.

    The processor still answers: the page of a request is put into the guest's encrypted memory, which QEMU has nothing of, and
    the answer into QEMU's.
    """
    from csvfast.cli import main
    from csvfast.machine import vm, vm_qemu, vm_requests
    from csvfast.processor.commands import Command
    from csvfast.processor.core import C_BIT, PAGE
    from csvfast.processor.machine import LocalMachine
    from csvfast.processor.mailbox_guest import VM_ATTESTATION

    shared_memory = Path("/dev/shm")
    file = tempfile.NamedTemporaryFile(dir=shared_memory if shared_memory.is_dir() else None)  # noqa: SIM115 - for the process
    command = vm.CsvVm._command

    def plain_command(self: vm.CsvVm, sealed: dict[str, int], channel: int) -> list[str]:
        encrypted = f"mem-path=/proc/self/fd/{self._dram},"
        return [word.replace(encrypted, f"mem-path={file.name},") for word in command(self, sealed, channel)]

    class Control(vm.MemoryControl):
        def ready(self) -> bool:
            return True

        def evict(self, offset: int, length: int) -> None:
            pass

        def flush(self) -> None:
            pass

        def stats(self) -> dict[str, Any]:
            return {}

    def started(self: vm.CsvVm) -> None:
        assert self._process is not None

    def attest(self: vm_requests.GuestRequests, gpa: int) -> None:
        offset, launched = self._offset(gpa), self._launched
        place = launched.ram + offset
        assert isinstance(self._host.machine, LocalMachine)
        memory = self._host.machine.processor.memory
        with self._lock:
            memory.write(place, os.pread(file.fileno(), PAGE, offset), launched.asid)
            self._host.run(
                Command.ATTESTATION, handle=launched.handle, address=place | C_BIT, mnonce=VM_ATTESTATION, length=PAGE
            )
            os.pwrite(file.fileno(), memory.read(place, PAGE, launched.asid), offset)

    vm.MemoryControl = Control  # type: ignore[misc]
    vm.CsvVm._wait_for_memory = started  # type: ignore[method-assign]
    vm_requests.GuestRequests.attest = attest  # type: ignore[method-assign]
    vm.CsvVm._command = plain_command  # type: ignore[method-assign]
    vm_qemu._environment = lambda _added, _preload: {**os.environ, "CSVFAST_VM_PRELOAD": ""}
    return main(arguments)


# ---- One run


@dataclass
class Run:
    """One `csvfast run`: seconds to the first line, CPU seconds and peak memory of QEMU or the agent, the steps of --timings."""

    first: float
    cpu: float
    peak: int
    timings: dict[str, Any]

    def agent(self, *names: str) -> float:
        return sum(step["seconds"] for step in self.timings["agent"] if step["step"] in names)


def start(demo: Any, options: Any, *, plain: bool = False) -> Run:
    """Runs it. SystemExit when it does not what it should."""
    from runtime.large_image import Watch

    line = demo.command(options, "--timings", "--json")
    if plain:
        line = [sys.executable, str(Path(__file__).resolve()), PLAIN, *line[line.index("csvfast") + 1 :]]
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(line, stdout=subprocess.PIPE, stderr=errors) as process:
        watch = Watch(process.pid)
        assert process.stdout is not None
        process.stdout.readline()
        first = time.perf_counter() - begun
        process.wait()
        watch.stop()
        errors.seek(0)
        said = errors.read()
    if process.returncode != 7:
        raise SystemExit(f"{' '.join(line)}\nexit code {process.returncode}\n{said[-3000:]}")
    return Run(first, watch.cpu, watch.peak, json.loads(said.splitlines()[-1])["timings"])


def median(runs: Sequence[Run], value: Any) -> float:
    return statistics.median(value(run) for run in runs)


def say(text: str) -> None:
    print(text, flush=True)


# ---- What is measured


def measure_start(demo: Any, rounds: int) -> None:
    ways = {name: demo.allowed(executor=name) for name in ("emulator", "native") if available(name)}
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    digests = {name: demo.digest(options) for name, options in ways.items()}
    for number in range(rounds + 1):  # the first fills caches
        for name, options in ways.items():
            demo.broker.allow(digests[name])
            run = start(demo, options)
            if number:
                runs[name].append(run)
    say("from the command to the first line, ms: median, best; then in the agent: load libraries, " + ", ".join(ATTESTATION))
    for name, found in runs.items():
        first = [run.first * 1e3 for run in found]
        parts = [median(found, lambda run, part=part: run.agent(part)) * 1e3 for part in ("load libraries", *ATTESTATION)]
        whole = median(found, lambda run: run.agent(*ATTESTATION)) * 1e3
        say(
            f"  {name:<9} {statistics.median(first):6.0f} {min(first):6.0f}   "
            f"{' '.join(f'{part:6.1f}' for part in parts)}   without libraries {whole:.1f}"
        )


def measure_guest(demo: Any, rounds: int) -> None:
    options = demo.allowed(executor="vm", memory=256 << 20, settings={"accel": "tcg"})
    runs: dict[bool, list[Run]] = {True: [], False: []}
    digest = demo.digest(options)  # makes the initrd, too
    for number in range(rounds):
        for plain in (True, False) if number % 2 else (False, True):
            runs[plain].append(start(demo, options, plain=plain))
    say(f"real guest, TCG, the same launch digest {digest[:16]}: seconds to the first line, median and best; QEMU's CPU seconds")
    values: dict[bool, tuple[float, float, float]] = {}
    for plain, name in ((True, "in the clear"), (False, "encrypted")):
        first = [run.first for run in runs[plain]]
        values[plain] = (statistics.median(first), min(first), median(runs[plain], lambda run: run.cpu))
        say(f"  {name:<13}" + "".join(f"{value:7.2f}" for value in values[plain]))
    ratios = (one / other for one, other in zip(values[False], values[True], strict=True))
    say(f"  {'ratio':<13}" + "".join(f"{ratio:7.2f}" for ratio in ratios) + "   (goal: 1.5)")
    for plain, name in ((True, "in the clear"), (False, "encrypted")):
        parts = {part: median(runs[plain], lambda run, part=part: run.agent(part)) for part in ("load libraries", *ATTESTATION)}
        say(f"  {name}, s: " + ", ".join(f"{part} {seconds:.2f}" for part, seconds in parts.items()))


def limit_of(layers: Sequence[bytes]) -> float:
    """CPU seconds of the ciphers and the decompression alone."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    seconds = 0.0
    for data in layers:
        key, nonce = os.urandom(32), os.urandom(16)
        view = memoryview(Cipher(algorithms.AES(key), modes.CTR(nonce)).encryptor().update(data))
        clear = memoryview(bytearray(BLOCK))
        begun = time.thread_time()
        mac, cipher = hmac.new(key, digestmod="sha256"), Cipher(algorithms.AES(key), modes.CTR(nonce)).decryptor()
        machine = zlib.decompressobj(31)
        for at in range(0, len(view), BLOCK):
            block = view[at : at + BLOCK]
            mac.update(block)
            machine.decompress(clear[: cipher.update_into(block, clear)])
        mac.digest()
        seconds += time.thread_time() - begun
    return seconds


def measure_image(demo: Any, folder: Path, mib: int, rounds: int, *, guest: bool) -> None:
    from runtime.large_image import LargeImage

    image = LargeImage(folder, mib, keep=True)
    say(
        f"image of {image.clear_bytes / MIB:.0f} MiB in 4 layers, {image.cipher_bytes / MIB:.0f} MiB compressed: "
        "pull = fetch, decrypt, unpack (without attestation)"
    )
    ways = [name for name in ("native", "emulator") if available(name)]
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    small: dict[str, list[Run]] = {name: [] for name in ways}
    limits = []
    for _number in range(rounds):
        limits.append(limit_of(image.packed))
        for name in ways:
            runs[name].append(start(demo, demo.allowed(executor=name, image=image.reference)))
            small[name].append(start(demo, demo.allowed(executor=name)))
    limit = min(limits)
    say(f"  limit     {limit:6.2f} s of CPU, {image.cipher_bytes / limit / 1e6:.0f} MB/s of ciphertext")
    for name in ways:
        seconds = min(run.agent("pull") - run.agent("attest to the broker") for run in runs[name])
        parts = [min(run.agent(part) for run in runs[name]) for part in ("download", "unpack")]
        # What the agent works for an image of no size is no part of the rate.
        cpu = min(run.cpu for run in runs[name]) - min(run.cpu for run in small[name])
        peak = max(run.peak for run in runs[name])
        say(
            f"  {name:<9} {seconds:6.2f} s, {image.cipher_bytes / seconds / 1e6:.0f} MB/s; fetch and check {parts[0]:.2f} s,"
            f" beside it decrypt and unpack {parts[1]:.2f} s; {cpu:.2f} s of CPU, {limit / cpu:.2f} of the limit; "
            f"the agent's memory at most {peak / MIB:.0f} MiB (goal: 128, and the image's own)"
        )
    if guest and available("vm"):
        memory = (256 + 2 * mib) << 20
        run = start(demo, demo.allowed(executor="vm", image=image.reference, memory=memory, settings={"accel": "tcg"}))
        say(f"  vm        {run.agent('pull') - run.agent('attest to the broker'):6.2f} s in {memory // MIB} MiB of RAM, TCG")


def available(name: str) -> bool:
    from csvfast.runtime.executor import executor_of

    reason = executor_of(name).unavailable()
    if reason is not None:
        say(f"{name}: left out: {reason}")
    return reason is None


def main() -> int:
    if sys.argv[1:2] == [PLAIN]:
        return run_in_the_clear(sys.argv[2:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=208, help="Size of the large image.")
    parser.add_argument("--only", default="start,guest,image")
    parser.add_argument("--no-large-guest", action="store_true", help="The large image not in the real guest.")
    options = parser.parse_args()
    from runtime.sandbox_rig import Demo

    parts = options.only.split(",")
    shared_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared_memory if shared_memory.is_dir() else None) as name:
        folder = Path(name)
        (folder / "demo").mkdir()
        with Demo(folder / "demo") as demo:
            if "start" in parts:
                measure_start(demo, options.rounds)
            if "guest" in parts and available("vm"):
                measure_guest(demo, options.rounds)
            if "image" in parts:
                measure_image(demo, folder, options.mib, options.rounds, guest=not options.no_large_guest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
