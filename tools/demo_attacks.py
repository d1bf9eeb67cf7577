"""The demo's attacks: what the owner of the machine tries, and what stops it, with the words that came back.

Attacks that end at the broker need no Linux guest: they run on the emulated CPU where that is installed, which takes a second
each; the broker cannot tell executors apart but by their digests.
"""

from __future__ import annotations

import json
import mmap
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

from demo_life import PAGE, SECRET, Drain, Failed, Life
from demo_page import Attack

from csvfast.broker.clients.verdictd import VerdictdClient
from csvfast.errors import AttestedTlsError, BrokerError
from csvfast.processor.vmm import GuestPlan, Host
from csvfast.ratstls.attester import Attester
from csvfast.ratstls.certificate import attest_certificate, make_certificate, read_certificate
from csvfast.ratstls.claims import encode_evidence_buffer
from csvfast.ratstls.context import Identity
from csvfast.ratstls.keys import TlsKey
from csvfast.ratstls.peer import Requirement
from csvfast.report import Evidence, GuestPolicy
from csvfast.runtime.executor import POLICY, executor_of
from csvfast.runtime.executor_process import launch_blob
from csvfast.runtime.host import HostMachine

__all__ = ["attack"]

KEY: Final = "default/key/images"
DEBUGGABLE: Final = GuestPolicy.of(noks=True, es=True, nosend=True, csv=True, api_major=1, api_minor=3)
GUEST_BYTES: Final = 4 << 20
PATIENCE: Final = 6.0  # for a guest whose memory was changed: it may hang


def attack(life: Life) -> None:
    """All of them."""
    quick = life.executor.name if executor_of("emulator").unavailable() else "emulator"
    with life.working("attacks"):
        swap_pages(life)
        tamper_launch(life)
        tamper_agent(life, quick)
        tamper_layer(life, quick)
        with Chip(life, quick) as chip:
            steal_certificate(life, chip)
            debug_guest(life, chip)


def told(life: Life, title: str, tried: str, stopped_by: str, words: str, held: bool, outcome: str = "refused") -> None:
    """One attack on the terminal and on the page."""
    words = " ".join(words.split())[:400]
    life.page.attacks.append(Attack(title, tried, stopped_by, words, outcome if held else "SUCCEEDED"))  # type: ignore[arg-type]
    life.held = life.held and held
    mark = f"[green]{outcome}[/]" if held else "[red]SUCCEEDED[/]"
    life.out.print(f" [bold]![/]  [bold]{title}[/]  {mark}\n    {tried}\n    [dim]{words[:120]}[/]")


def swap_pages(life: Life) -> None:
    """The host exchanges pages of the DRAM while the container runs."""
    dram = life.work / "dram-attacked"
    with subprocess.Popen(
        life.container("--expect", life.digest, dram=dram), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=life.work, env=life.environment(),
    ) as process:  # fmt: skip
        out: IO[str] = process.stdout  # type: ignore[assignment]
        errors = Drain(process.stderr)
        output = out.readline()
        changed = swap(dram, random.Random(1))
        rest = Drain(out)
        try:
            code: int | None = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            code = None
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        output += rest.text()
    dram.unlink(missing_ok=True)
    ended = "it hung and was ended" if code is None else f"exit code {code}"
    held = code != 0 and SECRET.decode() not in output
    said = output.strip().splitlines()
    lost = [line for line in errors.text().splitlines() if "lost" in line or "error" in line]
    words = " ".join([f"{ended}; its last line: {said[-1] if said else 'none'}", *lost[-1:]])
    told(
        life, "The host swaps pages", f"Exchanged {changed} pages of the DRAM, two by two, while the container ran.",
        "The tweak is the page's address: elsewhere it decrypts to noise, which helps nobody and harms this guest alone.",
        words, held, "noise",
    )  # fmt: skip


def swap(dram: Path, chance: random.Random) -> int:
    """Exchanges written pages, until half of them stand elsewhere. Returns: how many."""
    with dram.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        pages = [page for page in range(len(memory) // PAGE) if memory[page * PAGE : page * PAGE + 64].strip(b"\0")]
        chance.shuffle(pages)
        pairs = list(zip(pages[::2], pages[1::2], strict=False))
        for one, other in pairs:
            first, second = slice(one * PAGE, (one + 1) * PAGE), slice(other * PAGE, (other + 1) * PAGE)
            memory[first], memory[second] = memory[second], memory[first]
    return 2 * len(pairs)


def tamper_launch(life: Life) -> None:
    """Another kernel, or another agent: the owner's digest does not come out."""
    if life.executor.name == "vm":
        from csvfast.machine.initrd import boot_files

        changed = bytearray((boot_files() / "vmlinuz").read_bytes())
        changed[-len(changed) // 3] ^= 1
        path = life.work / "kernel"
        path.write_bytes(changed)
        more: list[str | Path] = ["--set", f"kernel={path}"]
        tried = "Launched it with a kernel in which one bit is another."
    else:
        more = ["--env", "LD_PRELOAD=/evil.so"]
        tried = "Launched it with an agent that lets the host preload a library."
    begin = time.monotonic()
    done = subprocess.run(
        life.container("--expect", life.digest, *more), capture_output=True, text=True, check=False, timeout=60, cwd=life.work,
        env=life.environment(),
    )  # fmt: skip
    told(
        life, "Tampered guest", tried,
        f"The launch digest: not one instruction ran. ({time.monotonic() - begin:.1f} s)", last_error(done.stderr),
        done.returncode == 1 and "launch digest" in done.stderr and not done.stdout,
    )  # fmt: skip


def tamper_agent(life: Life, executor: str) -> None:
    """The same, without the owner's digest: then the broker has it, and no key comes."""
    command = life.container("--env", "LD_PRELOAD=/evil.so")
    command[command.index("--executor") + 1] = executor
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, cwd=life.work, env=life.environment()
    )
    told(
        life, "The host does not ask for a digest", "Launched the changed agent anyway, and let it ask the broker for the key.",
        f"The broker: {denied(life)}.", last_error(done.stderr), done.returncode == 1 and not done.stdout,
    )  # fmt: skip


def tamper_layer(life: Life, executor: str) -> None:
    """One bit of a layer in the registry."""
    manifest = json.loads(life.run("image", "inspect", life.image, "--raw").out)
    digest = manifest["layers"][0]["digest"].partition(":")[2]
    blob = life.work / "registry" / "blobs" / "sha256" / digest
    content = bytearray(blob.read_bytes())
    content[len(content) // 3] ^= 1
    blob.chmod(0o600)
    blob.write_bytes(content)
    command = life.container()
    command[command.index("--executor") + 1] = executor
    command[command.index("--cache") + 1] = str(life.work / "cache-of-tampered")
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, cwd=life.work, env=life.environment()
    )
    content[len(content) // 3] ^= 1
    blob.write_bytes(content)
    told(
        life, "Tampered layer", "Flipped one bit of the encrypted program in the registry.",
        "Its digest, before anything is decrypted. Behind it stand the HMAC, and the manifest's digest in the measured policy.",
        last_error(done.stderr), done.returncode != 0 and not done.stdout,
    )  # fmt: skip


class Chip:
    """The machine with the owner's chip, in this process, and the very blob that the broker allows."""

    def __init__(self, life: Life, executor: str) -> None:
        line = [
            "runtime", "measure", life.image, "--executor", executor, "--broker", life.verdictd, "--broker-pin", life.pin,
            "--show-configuration", "--json",
        ]  # fmt: skip
        found = json.loads(life.run(*line).out)
        self.blob = life.work / "launch-blob"
        self.host_machine = HostMachine(2 * GUEST_BYTES, chip=life.chip)
        self.host = Host(self.host_machine.machine)
        self.host.initialise(es=True)
        self.blob.write_bytes(launch_blob(executor, found_configuration(found)))

    def guest(self, policy: GuestPolicy) -> Attester:
        """A guest of that blob, launched under `policy`."""
        launched = self.host.launch(GuestPlan(firmware=self.blob, policy=policy, memory_size=GUEST_BYTES))
        self.host.finish(launched.handle)
        return Guest(self, launched.handle)

    def __enter__(self) -> Chip:
        return self

    def __exit__(self, *problem: object) -> None:
        self.host.close()
        self.host_machine.close()


class Guest:
    """Software in a guest, as far as it asks for evidence."""

    def __init__(self, chip: Chip, handle: int) -> None:
        self._chip, self._handle = chip, handle

    def evidence(self, report_data: bytes) -> Evidence:
        """A report of the processor."""
        report = self._chip.host.report(self._handle, report_data)
        return Evidence(report, hsk_cek=self._chip.host_machine.certificates, encoding="page")


def found_configuration(found: dict[str, object]) -> bytes:
    """The agent's configuration as it is measured."""
    from csvfast.runtime.agent.configuration import AgentConfiguration

    return AgentConfiguration.parse(json.dumps(found["configuration"]).encode()).encode()


def steal_certificate(life: Life, chip: Chip) -> None:
    """The certificate of an allowed guest, without its key."""
    guest = chip.guest(POLICY)
    life.expect(ask(life, lambda: Identity.create(guest)) == "", "an allowed guest gets no key")
    stolen = read_certificate(attest_certificate(TlsKey.generate(), guest))
    ours = TlsKey.generate()
    if stolen.buffer is None:
        raise Failed("the certificate holds no evidence")
    forged = make_certificate(ours, encode_evidence_buffer(stolen.buffer.raw, stolen.buffer.claims))
    answer = ask(life, lambda: Identity(ours, forged))
    told(
        life, "Stolen certificate", "Put the evidence of an allowed guest's certificate into one for a key of our own.",
        f"The report covers the key's digest. The broker: {denied(life)}.", answer, bool(answer),
    )  # fmt: skip


def debug_guest(life: Life, chip: Chip) -> None:
    """The allowed digest, in a guest that the host may debug."""
    guest = chip.guest(DEBUGGABLE)
    answer = ask(life, lambda: Identity.create(guest))
    told(
        life, "Debuggable VM", "Launched exactly the allowed guest, with a policy that lets the host read its memory.",
        f"The policy is in the report. The broker: {denied(life)}.", answer, bool(answer),
    )  # fmt: skip


def ask(life: Life, identity: Callable[[], Identity]) -> str:
    """Asks for the key. Returns: why there is none; "" = there is."""
    host, _, port = life.verdictd.removeprefix("verdictd://").rpartition(":")
    broker = Requirement.pinned({bytes.fromhex(life.pin)})
    client = VerdictdClient((host, int(port)), None, broker, identity=identity(), timeout=20.0)
    try:
        with client:
            client.get_kek(KEY)
    except (AttestedTlsError, BrokerError) as refusal:
        return str(refusal)
    return ""


def denied(life: Life) -> str:
    """What the broker wrote down about its last refusal."""
    found = json.loads(life.run("broker", "audit", "show", "--outcome", "denied", "--config", life.broker, "--json").out)
    records = found["records"] if isinstance(found, dict) else found
    if not records:
        return "it has written down nothing"
    return str(records[-1].get("reason", ""))[:200]


def last_error(errors: str) -> str:
    """The line that says why."""
    lines = [line for line in errors.splitlines() if "error" in line] or errors.splitlines() or ["nothing"]
    return lines[-1].removeprefix("csvfast: error: ")
