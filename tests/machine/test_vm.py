"""Virtual machines on the platform's DRAM: measured, launched, run by QEMU under the processor's key."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from machine import qemu_guest, vm_platform
from machine.vm_platform import MEMORY, POLICY, Platform, alive, descriptors, make, plan

from csvfast.certs.layout import CsvCertificate
from csvfast.crypto import sm3
from csvfast.errors import AllocationError, ArgumentError, FirmwareError, StateError, VerificationError
from csvfast.machine import vm_qemu
from csvfast.machine.vm import CsvVm
from csvfast.machine.vm_files import clean
from csvfast.measure import launch_digest
from csvfast.processor.core import C_BIT
from csvfast.processor.owner import OwnerKeys
from csvfast.processor.session import make_session
from csvfast.processor.vmm import Host

pytestmark = pytest.mark.skipif(
    shutil.which(qemu_guest.QEMU) is None or not (qemu_guest.boot_files() / "vmlinuz").exists(),
    reason="QEMU or the guests' kernel is missing (tools/install-test-tools.sh)",
)


@pytest.fixture(scope="module")
def initrd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qemu_guest.build_initrd(tmp_path_factory.mktemp("initrd"))


@pytest.fixture
def place() -> Iterator[Platform]:
    with vm_platform.platform() as made:
        yield made


def wait_for(machine: CsvVm, words: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while words not in machine.console():
        assert machine.running, machine.console() + machine.errors()
        assert time.monotonic() < end, machine.console()
        time.sleep(0.02)


def nothing_left(place: Platform, root: Path) -> None:
    assert place.machine.guests() == []
    assert list(root.iterdir()) == []


def test_launch_and_run(place: Platform, initrd: Path, tmp_path: Path) -> None:
    before = descriptors()
    shown = bytearray()
    root = tmp_path / "run"
    root.mkdir()
    with make(place, plan(initrd, "work=8 rounds=1000000"), root, window="1/8", output=shown.extend) as machine:
        machine.launch()
        record = json.loads((root / machine.name / "state.json").read_text(encoding="utf-8"))
        assert record["state"] == "running"
        assert record["digest"] == machine.launched.predicted.hexdigest
        pid = record["qemu"]
        assert alive(pid)
        key = bytes(place.processor.guest(machine.launched.handle).vek)
        for file in ("cmdline", "environ"):
            seen = Path(f"/proc/{pid}/{file}").read_bytes()
            assert key not in seen
            assert key.hex().encode() not in seen.lower()
        wait_for(machine, "guest: text written")
        assert place.count(qemu_guest.TEXT) == 0
        dump = tmp_path / "dump"
        machine.dump(dump)
        assert dump.stat().st_size == MEMORY
        assert qemu_guest.count(dump, qemu_guest.TEXT) == 0
        # Under the key that the processor made it is the guest's memory: the engine decrypts what QEMU's process encrypted.
        found = sum(
            place.machine.guest_read(machine.launched.handle, (machine.address + offset) | C_BIT, 1 << 20).count(qemu_guest.TEXT)
            for offset in range(0, MEMORY, 1 << 20)
        )
        assert found >= (8 << 20) // 32 - 64
        with pytest.raises(FileExistsError):
            machine.dump(dump)
        assert machine.status()["memory"]["evictions"] > 0
        machine.stop()
        assert not alive(pid)
        assert not machine.running
        assert place.count(qemu_guest.TEXT) == 0
        with pytest.raises(StateError, match="does not run"):
            machine.dump(tmp_path / "second")
    assert b"guest: text written" in shown
    nothing_left(place, root)
    assert descriptors() == before


def test_ends_by_itself_and_again_on_old_frames(place: Platform, initrd: Path, tmp_path: Path) -> None:
    """The second guest gets the frames that the first one left: it boots all the same, under another key."""
    sums = set()
    for _ in range(2):
        with make(place, plan(initrd), tmp_path) as machine:
            machine.launch()
            assert machine.wait(100) == 0, machine.console()
            sums.add(next(line.strip() for line in machine.console().splitlines() if line.startswith("guest: sum")))
            nothing_left(place, tmp_path)
    assert len(sums) == 1


def test_owner_session_and_secret(place: Platform, initrd: Path, tmp_path: Path) -> None:
    with Host(place.machine) as host:
        host.initialise()
    guest = plan(initrd, "work=1 rounds=1")
    with make(place, guest, tmp_path) as machine:
        machine.launch()
        digest = machine.launched.predicted.digest
    owner = owner_of(place, digest)
    secret = b"sixteen bytes ok" * 2
    with make(place, guest, tmp_path, owner=owner, expected=digest, secret=secret, secret_address=0x10000) as machine:
        machine.launch()
        assert machine.wait(100) == 0, machine.console()
    other = replace(guest, append="console=ttyS0 something else")
    # The owner's session demands a digest: the firmware refuses. Another TIK: the measurement does not verify.
    with make(place, other, tmp_path, owner=owner) as machine, pytest.raises((FirmwareError, VerificationError)):
        machine.launch()
    wrong = owner_of(place, None)._replace(tik=owner.tik)
    with (
        make(place, guest, tmp_path, owner=wrong) as machine,
        pytest.raises(VerificationError, match="launch measurement"),
    ):
        machine.launch()
    assert machine.status()["qemu"] is None
    nothing_left(place, tmp_path)


def owner_of(place: Platform, digest: bytes | None) -> OwnerKeys:
    made = make_session(CsvCertificate.parse(place.processor.pdh_cert_export()[0]), POLICY, vm_digest=digest or bytes(32))
    return OwnerKeys(made.certificate.encoded, made.blob, made.tek, made.tik, POLICY)


def test_another_digest(place: Platform, initrd: Path, tmp_path: Path) -> None:
    with (
        make(place, plan(initrd), tmp_path, expected=sm3(b"another").digest()) as machine,
        pytest.raises(VerificationError, match="launch digest"),
    ):
        machine.launch()
    assert machine.status()["qemu"] is None
    nothing_left(place, tmp_path)


@pytest.mark.parametrize("changed", ["firmware", "kernel", "initrd", "append"])
def test_no_instruction_of_anything_else(place: Platform, initrd: Path, tmp_path: Path, changed: str) -> None:
    """One bit of any input, and neither does the owner's digest hold nor does the firmware finish a session that demands it."""
    good = plan(initrd)
    digest = launch_digest(
        good.firmware, kernel=good.kernel, initrd=good.initrd, append=good.append, force_hash_table=True
    ).digest
    with Host(place.machine) as host:
        host.initialise()
    if changed == "append":
        bad = replace(good, append=f"{good.append} ")
    else:
        copy = tmp_path / "changed"
        content = bytearray(Path(getattr(good, changed)).read_bytes())
        content[-1] ^= 1
        copy.write_bytes(content)
        bad = replace(good, **{changed: copy})
    root = tmp_path / "run"
    root.mkdir()
    with make(place, bad, root, expected=digest) as machine, pytest.raises(VerificationError, match="launch digest"):
        machine.launch()
    assert machine.status()["qemu"] is None
    with (
        make(place, bad, root, owner=owner_of(place, digest)) as machine,
        pytest.raises((FirmwareError, VerificationError)),
    ):
        machine.launch()
    assert machine.status()["qemu"] is None
    nothing_left(place, root)


def test_two_machines_on_one_platform(initrd: Path, tmp_path: Path) -> None:
    """Two guests, two ASIDs, one DRAM: both work, and neither key opens the other's frames."""
    with vm_platform.platform(2 * MEMORY + (32 << 20)) as place:
        guests = [make(place, plan(initrd, "work=8 rounds=1000000"), tmp_path, window="1/8") for _ in range(2)]
        try:
            for machine in guests:
                machine.launch()
            for machine in guests:
                wait_for(machine, "guest: text written")
            assert len({machine.status()["asid"] for machine in guests}) == 2
            for machine in guests:
                machine.dump(tmp_path / f"{machine.name}.ram")
            for own in guests:
                for reader in guests:
                    found = sum(
                        place.machine.guest_read(reader.launched.handle, (own.address + offset) | C_BIT, 1 << 20).count(
                            qemu_guest.TEXT
                        )
                        for offset in range(0, MEMORY, 1 << 20)
                    )
                    assert (found > 100_000) if own is reader else (found == 0)
            assert place.count(qemu_guest.TEXT) == 0
        finally:
            for machine in guests:
                machine.close()


def test_open_firmware(initrd: Path, tmp_path: Path) -> None:
    """Debian's OVMF boots the same kernel; its digest is another."""
    firmware = qemu_guest.boot_files() / "OVMF.fd"
    size = 256 << 20
    with vm_platform.platform(size + (32 << 20)) as place:
        guest = plan(initrd, "work=1 rounds=1", firmware=firmware, memory_size=size)
        with make(place, guest, tmp_path) as machine:
            machine.launch()
            assert machine.wait(100) == 0
            assert "guest: sum" in machine.console(), machine.console()


def test_time_limit(place: Platform, initrd: Path, tmp_path: Path) -> None:
    with make(place, plan(initrd, "work=8 rounds=1000000"), tmp_path, time_limit=2.0) as machine:
        machine.launch()
        assert machine.wait(60) == -signal.SIGKILL
        assert machine.timed_out
    nothing_left(place, tmp_path)


def test_qemu_killed(place: Platform, initrd: Path, tmp_path: Path) -> None:
    with make(place, plan(initrd, "work=8 rounds=1000000"), tmp_path) as machine:
        machine.launch()
        os.kill(machine.status()["qemu"], signal.SIGKILL)
        assert machine.wait(30) == -signal.SIGKILL
        nothing_left(place, tmp_path)
    assert place.count(qemu_guest.KERNEL_TEXT) == 0


OWNER = """
import sys, time
from pathlib import Path
from machine import vm_platform
with vm_platform.platform() as place:
    machine = vm_platform.make(place, vm_platform.plan(Path(sys.argv[1]), "work=8 rounds=1000000"), Path(sys.argv[2]))
    machine.launch()
    print(machine.status()["qemu"], flush=True)
    time.sleep(60)
"""


def test_owner_killed(initrd: Path, tmp_path: Path) -> None:
    """QEMU ends with us, even by kill -9; the next machine removes the directory that stayed."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, initrd, tmp_path], env=environment, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert alive(pid)
        owner.kill()
    end = time.monotonic() + 20
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not alive(pid)
    assert len(list(tmp_path.iterdir())) == 1
    clean(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": "0"}, "expected at least 65536"),
        ({"window": "1/0"}, "expected a share"),
        ({"window": "2/1"}, "expected a share"),
        ({"window": "-1"}, "expected a share"),
        ({"window": ""}, "expected a share"),
        ({"window": "1/100000"}, "expected at least 65536"),
        ({"time_limit": 0.0}, "more than 0 seconds"),
        ({"time_limit": float("nan")}, "more than 0 seconds"),
        ({"expected": b"short"}, "a launch digest of 32"),
        ({"secret": b"sixteen bytes ok"}, "without the owner's keys"),
        ({"accel": "hvf"}, "'tcg', 'kvm' or 'auto'"),
        ({"name": "../x"}, "1 to 32 letters"),
    ],
)
def test_refused_options(place: Platform, tmp_path: Path, options: dict[str, object], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        make(place, plan(None), tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_refused_files(place: Platform, initrd: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    with make(place, plan(initrd, kernel=initrd), root) as machine, pytest.raises(ArgumentError, match="no Linux kernel"):
        machine.launch()
    with pytest.raises(StateError, match="is not there or not executable"):
        make(place, plan(initrd), root, qemu=tmp_path / "qemu")
    with pytest.raises(ArgumentError, match="whole MiB"):
        make(place, plan(initrd, memory_size=MEMORY + 4096), root)
    with make(place, plan(initrd, memory_size=1 << 30), root) as machine, pytest.raises(AllocationError, match="free bytes"):
        machine.launch()
    strange = tmp_path / "dram"
    strange.write_bytes(bytes(MEMORY + (32 << 20)))
    with (
        make(place._replace(dram=str(strange)), plan(initrd), root) as machine,
        pytest.raises(StateError, match="not the file that this platform's memory stands on"),
    ):
        machine.launch()
    with make(place, plan(initrd), root, arguments=("-nonsense",)) as machine, pytest.raises(StateError, match="nonsense"):
        machine.launch()
    with make(place, plan(initrd), root, name="one"), pytest.raises(StateError, match="a machine of this name runs"):
        make(place, plan(initrd), root, name="one")
    nothing_left(place, root)


def test_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm_qemu, "kvm_works", lambda _program: False)
    assert vm_qemu.choose_accelerator("auto", "qemu") == "tcg"
    with pytest.raises(StateError, match="no vCPU runs under KVM"):
        vm_qemu.choose_accelerator("kvm", "qemu")
    monkeypatch.setattr(vm_qemu, "kvm_works", lambda _program: True)
    assert vm_qemu.choose_accelerator("auto", "qemu") == "kvm"


def test_kvm_probe_answers() -> None:
    assert vm_qemu.kvm_works(vm_qemu.find_qemu()) in (True, False)
    assert not vm_qemu.kvm_works("/nowhere/qemu")
