"""The state directory: what it keeps, who may use it, and what it refuses to believe."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import csvfast
from csvfast.certs.chip import ChipIdentity
from csvfast.certs.layout import CsvCertificate, KeyAlgorithm, KeyUsage
from csvfast.certs.manufacturing import ManufacturingLine
from csvfast.crypto import SM2PrivateKey
from csvfast.errors import FirmwareError, FirmwareStatus, StateError
from csvfast.processor import Processor, StateDirectory
from csvfast.processor.platform_state import STATE_BYTES
from csvfast.processor.state import STATE_FILE

S = FirmwareStatus


@pytest.fixture
def home(line: ManufacturingLine, tmp_path: Path) -> Path:
    directory = tmp_path / "chip"
    line.make_chip().save(directory)
    return directory


def exported(home: Path, memory: csvfast.EncryptedMemory, *, generate: bool = False) -> tuple[bytes, bytes]:
    with Processor.open(home, memory) as processor:
        processor.init()
        if generate:
            processor.pek_gen()
        return processor.pdh_cert_export()


def own(processor: Processor) -> CsvCertificate:
    key = SM2PrivateKey.generate()
    oca = CsvCertificate.build(
        usage=KeyUsage.OCA, algorithm=KeyAlgorithm.SM2_SA, point=key.public_key.point, user_id=b"HYGON-SSD-OCA"
    ).with_signature(1, key, KeyUsage.OCA, b"HYGON-SSD-OCA")
    csr = CsvCertificate.parse(processor.pek_csr())
    processor.pek_cert_import(csr.with_signature(2, key, KeyUsage.OCA, b"HYGON-SSD-OCA").encoded, oca.encoded)
    return oca


def test_keys_come_back(home: Path, memory: csvfast.EncryptedMemory) -> None:
    first = exported(home, memory)
    assert exported(home, memory) == first
    second = exported(home, memory, generate=True)
    assert second != first
    assert exported(home, memory) == second
    assert sorted(path.name for path in home.iterdir()) == [
        "cek.cert", "cek.key", "chip.json", "hsk.cert", "platform.lock", "platform.state", "root-secret.bin", "root.cert",
    ]  # fmt: skip
    for path in home.iterdir():
        assert path.stat().st_mode & 0o077 == 0, path


def test_the_keys_work_afterwards(home: Path, memory: csvfast.EncryptedMemory) -> None:
    """Not only the certificates: the private keys that are loaded sign and decrypt."""
    exported(home, memory)
    with Processor.open(home, memory) as processor:
        processor.init()
        identity = processor.identity
        assert identity is not None
        assert identity.oca_key is not None
        for key, certificate in (
            (identity.pek_key, identity.pek), (identity.pdh_key, identity.pdh), (identity.oca_key, identity.oca),
        ):  # fmt: skip
            certificate.public_key.verify(key.sign(b"message"), b"message")


def test_ownership_persists(home: Path, memory: csvfast.EncryptedMemory) -> None:
    with Processor.open(home, memory) as processor:
        processor.init()
        oca = own(processor)
    with Processor.open(home, memory) as processor:
        processor.init()
        assert processor.platform_status().owner
        assert processor.identity is not None
        assert processor.identity.oca == oca
        assert processor.identity.oca_key is None
        processor.pek_gen()
    with Processor.open(home, memory) as processor:
        processor.init()
        assert not processor.platform_status().owner


def test_factory_reset(home: Path, memory: csvfast.EncryptedMemory) -> None:
    before = exported(home, memory)
    with Processor.open(home, memory) as processor:
        processor.factory_reset()
        assert not (home / STATE_FILE).exists()
        processor.factory_reset()  # nothing to reset
        processor.init()
        assert processor.pdh_cert_export() != before
    assert not list(home.glob(".platform*"))


def test_one_processor_at_a_time(home: Path, memory: csvfast.EncryptedMemory) -> None:
    with Processor.open(home, memory):
        with pytest.raises(StateError, match="another processor is using"):
            StateDirectory(home)
        # From another process as well.
        script = f"from csvfast.processor import StateDirectory; StateDirectory({str(home)!r})"
        done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "another processor is using" in done.stderr
    StateDirectory(home).close()


def test_closed(home: Path, memory: csvfast.EncryptedMemory) -> None:
    storage = StateDirectory(home)
    storage.close()
    storage.close()
    for call in (storage.load, storage.erase):
        with pytest.raises(StateError, match="closed"):
            call()
    assert "closed" in repr(storage)


def test_every_damaged_byte_is_noticed(home: Path, memory: csvfast.EncryptedMemory) -> None:
    exported(home, memory)
    file = home / STATE_FILE
    good = file.read_bytes()
    assert len(good) == STATE_BYTES
    positions = {*range(120), *range(STATE_BYTES - 40, STATE_BYTES), *random.Random(7).sample(range(STATE_BYTES), 400)}
    with StateDirectory(home) as storage:
        for at in sorted(positions):
            wrong = bytearray(good)
            wrong[at] ^= 1 << at % 8
            file.write_bytes(wrong)
            with pytest.raises(StateError, match=r"platform\.state"):
                storage.load()
        for length in (0, 1, 100, STATE_BYTES - 1):
            file.write_bytes(good[:length])
            with pytest.raises(StateError, match="is no platform state"):
                storage.load()
        file.write_bytes(good + b"\0")
        with pytest.raises(StateError, match="is no platform state"):
            storage.load()
        file.write_bytes(good)
        assert storage.load() is not None


def test_a_damaged_state_stops_init(
    home: Path, memory: csvfast.EncryptedMemory, refused: Callable[..., FirmwareError]
) -> None:
    """INIT must not make new keys over it: the old ones may be restored from a backup."""
    exported(home, memory)
    file = home / STATE_FILE
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with Processor.open(home, memory) as processor:
        error = refused(S.HWERROR_PLATFORM, processor.init)
        assert str(file) in str(error)
        assert processor.identity is None
    assert file.read_bytes() == content[:-1]


def test_another_version_and_another_chip(
    home: Path, line: ManufacturingLine, memory: csvfast.EncryptedMemory, tmp_path: Path
) -> None:
    exported(home, memory)
    other = tmp_path / "other"
    line.make_chip().save(other)
    exported(other, memory)
    file = home / STATE_FILE
    good = bytearray(file.read_bytes())
    with StateDirectory(home) as storage:
        good[8] = 2
        file.write_bytes(good)
        with pytest.raises(StateError, match="format version 2; expected 1"):
            storage.load()
        file.write_bytes((other / STATE_FILE).read_bytes())
        with pytest.raises(StateError, match="damaged or belongs to another chip"):
            storage.load()


def test_privacy(home: Path, memory: csvfast.EncryptedMemory, tmp_path: Path) -> None:
    exported(home, memory)
    file = home / STATE_FILE
    file.chmod(0o640)
    with StateDirectory(home) as storage, pytest.raises(StateError, match="0640"):
        storage.load()
    file.chmod(0o600)
    home.chmod(0o750)
    with pytest.raises(StateError, match="0750"):
        StateDirectory(home)
    home.chmod(0o700)
    moved = tmp_path / "moved"
    file.rename(moved)
    file.symlink_to(moved)
    with StateDirectory(home) as storage, pytest.raises(StateError, match=r"platform\.state"):
        storage.load()
    file.unlink()
    os.mkfifo(file, 0o600)
    with StateDirectory(home) as storage, pytest.raises(StateError, match="no regular file"):
        storage.load()
    with pytest.raises(StateError, match="no such directory"):
        StateDirectory(tmp_path / "nothing")


def test_umask_does_not_matter(home: Path, memory: csvfast.EncryptedMemory) -> None:
    for mask in (0, 0o777):
        old = os.umask(mask)
        try:
            exported(home, memory, generate=True)
        finally:
            os.umask(old)
        assert (home / STATE_FILE).stat().st_mode & 0o777 == 0o600
        (home / "platform.lock").chmod(0o600)


@pytest.mark.parametrize("step", ["open", "write", "fsync", "replace"])
def test_a_failing_disk_changes_nothing(
    step: str,
    home: Path,
    memory: csvfast.EncryptedMemory,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., FirmwareError],
) -> None:
    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    with Processor.open(home, memory) as processor:
        processor.init()
        before, stored = processor.identity, (home / STATE_FILE).read_bytes()
        with monkeypatch.context() as patch:
            if step == "replace":
                patch.setattr(Path, "replace", full)
            elif step == "open":
                patch.setattr("csvfast.processor.state._write_private", full)
            else:
                patch.setattr(f"csvfast.processor.state.os.{step}", full)
            for command in (processor.pek_gen, processor.pdh_gen):
                refused(S.HWERROR_PLATFORM, command)
        assert processor.identity is before
        assert (home / STATE_FILE).read_bytes() == stored
        assert not list(home.glob(".platform*"))
        processor.pek_gen()
        assert processor.identity is not before


def test_leftovers_of_a_kill_are_removed(home: Path) -> None:
    (home / ".platform-state.part").write_bytes(b"half a key")
    StateDirectory(home).close()
    assert not list(home.glob(".platform*"))


def test_no_key_in_the_clear_elsewhere(home: Path, memory: csvfast.EncryptedMemory, chip: ChipIdentity) -> None:
    with Processor.open(home, memory) as processor:
        processor.init()
        assert processor.identity is not None
        key = bytes(memoryview(processor.identity.pek_key.secret()))
    holders = [path.name for path in home.iterdir() if key in path.read_bytes()]
    assert holders == [STATE_FILE]


def test_an_import_that_cannot_be_stored_changes_no_owner(
    home: Path, memory: csvfast.EncryptedMemory, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., FirmwareError]
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with Processor.open(home, memory) as processor:
        processor.init()
        before = processor.identity
        with monkeypatch.context() as patch:
            patch.setattr("csvfast.processor.state._write_private", full)
            refused(S.HWERROR_PLATFORM, own, processor)
        assert processor.identity is before
        assert not processor.platform_status().owner
        own(processor)
        assert processor.platform_status().owner


def test_pieces_that_do_not_belong_together(home: Path, memory: csvfast.EncryptedMemory) -> None:
    """Under a right MAC too: what is loaded is what was once made together."""
    exported(home, memory)
    stranger = SM2PrivateKey.generate()
    with StateDirectory(home) as storage:
        good = storage.load()
        assert good is not None
        for change, message in (
            ({"pdh": good.pdh.with_signature(1, stranger, KeyUsage.PEK, b"HYGON-SSD-PEK")}, "PDH is not signed"),
            ({"pek": good.pek.with_signature(2, stranger, KeyUsage.OCA, b"HYGON-SSD-OCA")}, "PEK is not signed"),
            ({"pek": good.pek.with_signature(1, stranger, KeyUsage.CEK, b"HYGON-SSD-CEK")}, "PEK is not signed"),
            ({"pek_key": stranger}, "PEK key is not"),
            ({"pdh_key": stranger}, "PDH key is not"),
            ({"oca_key": stranger}, "OCA key is not"),
        ):
            storage.save(dataclasses.replace(good, **change))
            with pytest.raises(StateError, match=message):
                storage.load()
        storage.save(good)
        assert storage.load() is not None


def test_the_file_is_on_the_disk_before_it_is_renamed(
    home: Path, memory: csvfast.EncryptedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    sync, replace = os.fsync, Path.replace

    def noted_sync(handle: int) -> None:
        steps.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        sync(handle)

    def noted_replace(path: Path, target: Path) -> Path:
        steps.append("rename")
        return replace(path, target)

    with Processor.open(home, memory) as processor:
        processor.init()
        with monkeypatch.context() as patch:
            patch.setattr("csvfast.processor.state.os.fsync", noted_sync)
            patch.setattr(Path, "replace", noted_replace)
            processor.pdh_gen()
    assert steps == [".platform-state.part", "rename", home.name]
