"""Simulated chips: what the line makes, what is written to disk, and what loading refuses."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from csvfast.certs import (
    CaCertificate,
    CertificateChain,
    ChipIdentity,
    CsvCertificate,
    KeyUsage,
    ManufacturingLine,
    hygon_root,
    verify_chain,
)
from csvfast.certs.private import read_private_file, write_private_directory, write_private_file
from csvfast.crypto import SM2PrivateKey
from csvfast.crypto.sm2 import dump_private_key
from csvfast.errors import ArgumentError, FormatError, StateError, VerificationError

CHIP_FILES = {"chip.json", "root.cert", "hsk.cert", "cek.cert", "cek.key", "root-secret.bin"}


@pytest.fixture(scope="module")
def line() -> ManufacturingLine:
    return ManufacturingLine.create(name="test line")


def modes(directory: Path) -> set[int]:
    return {path.stat().st_mode & 0o777 for path in directory.iterdir()}


def test_a_chip_hangs_from_its_line_and_not_from_hygon(line: ManufacturingLine) -> None:
    chip = line.make_chip()
    chain = CertificateChain(hsk=chip.hsk, cek=chip.cek)
    assert verify_chain(chain, [line.root]) == line.root
    with pytest.raises(VerificationError, match="not a trusted root"):
        verify_chain(chain)
    with pytest.raises(VerificationError):
        verify_chain(chain, [ManufacturingLine.create().root])
    assert line.root != hygon_root()
    assert chip.chip_id.startswith("SIM")
    assert len(chip.chip_id) == 13
    assert (chip.cek.usage, chip.cek.version, chip.cek.api_major, chip.cek.api_minor) == (KeyUsage.CEK, 2, 1, 1)
    assert chip.cek.issuer_id == line.hsk.key_id
    assert chip.cek_key.public_key.point == chip.cek.point
    assert len(chip.root_secret) == 32
    assert chip.hsk_cek == chip.hsk.encoded + chip.cek.encoded


def test_chips_differ(line: ManufacturingLine) -> None:
    chips = [line.make_chip() for _ in range(20)]
    assert len({chip.chip_id for chip in chips}) == 20
    assert len({chip.cek.point for chip in chips}) == 20
    assert not chips[0].root_secret.equals(bytes(chips[1].root_secret))
    other = ManufacturingLine.create()
    assert len({line.root.key_id, line.hsk.key_id, other.root.key_id, other.hsk.key_id}) == 4


def test_a_given_root_key_is_used() -> None:
    key = SM2PrivateKey.generate()
    assert ManufacturingLine.create(key=key).root.point == key.public_key.point


@pytest.mark.parametrize("chip_id", ["KPA64911240507", "sim1", "", "SIM/1", "SIM\0", "SIM" + "1" * 62, "SIMé", "../SIM"])
def test_chip_ids_that_are_refused(line: ManufacturingLine, chip_id: str) -> None:
    with pytest.raises((ArgumentError, FormatError), match="chip id"):
        line.make_chip(chip_id)


def test_chosen_chip_id(line: ManufacturingLine) -> None:
    assert line.make_chip("SIM-rack.1_7").chip_id == "SIM-rack.1_7"


def test_secrets_do_not_show(line: ManufacturingLine) -> None:
    chip = line.make_chip()
    secrets = [bytes(chip.cek_key.secret()), bytes(chip.root_secret)]
    for text in (repr(chip), str(chip), repr(line), repr(vars(chip))):
        for secret in secrets:
            assert secret.hex() not in text
            assert repr(secret)[2:-1] not in text
    for spread in (pickle.dumps, copy.copy, copy.deepcopy):
        for one in (chip, line):
            if spread is copy.copy:
                continue  # shares the objects that hold the secrets, and copies none
            with pytest.raises(TypeError):
                spread(one)


# ---- Directories ----------------------------------------------------------------------------------------------------


def test_chip_round_trip(line: ManufacturingLine, tmp_path: Path) -> None:
    chip = line.make_chip()
    old = os.umask(0)
    try:
        chip.save(tmp_path / "deep" / "chip")
    finally:
        os.umask(old)
    directory = tmp_path / "deep" / "chip"
    assert {path.name for path in directory.iterdir()} == CHIP_FILES
    assert modes(directory) == {0o600}
    assert directory.stat().st_mode & 0o777 == 0o700
    (directory / "platform.json").write_text("a neighbour's file")
    again = ChipIdentity.load(directory)
    assert (again.chip_id, again.root, again.hsk, again.cek) == (chip.chip_id, chip.root, chip.hsk, chip.cek)
    assert again.root_secret.equals(bytes(chip.root_secret))
    assert again.cek_key.secret().equals(bytes(chip.cek_key.secret()))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["chip"]


def test_line_round_trip(line: ManufacturingLine, tmp_path: Path) -> None:
    line.save(tmp_path / "line")
    assert modes(tmp_path / "line") == {0o600}
    again = ManufacturingLine.load(tmp_path / "line")
    assert (again.name, again.root, again.hsk) == (line.name, line.root, line.hsk)
    chip = again.make_chip()
    verify_chain(CertificateChain(hsk=chip.hsk, cek=chip.cek), [line.root])


def test_nothing_is_overwritten(line: ManufacturingLine, tmp_path: Path) -> None:
    chip = line.make_chip()
    chip.save(tmp_path / "chip")
    before = {path.name: path.read_bytes() for path in (tmp_path / "chip").iterdir()}
    with pytest.raises(StateError, match="not empty"):
        line.make_chip().save(tmp_path / "chip")
    assert {path.name: path.read_bytes() for path in (tmp_path / "chip").iterdir()} == before
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("file", "link"):
        with pytest.raises(StateError):
            chip.save(tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"chip", "file", "link"}
    (tmp_path / "empty").mkdir(mode=0o755)
    chip.save(tmp_path / "empty")
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o700


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_private_directory(tmp_path / "new", {"a": b"content", "b": "text"})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError):
        write_private_file(tmp_path / "deep" / "file", "text")  # type: ignore[arg-type]
    assert list((tmp_path / "deep").iterdir()) == []


def test_killed_while_writing(tmp_path: Path) -> None:
    """A process that dies at any write leaves either the whole directory or none of that name."""
    program = (
        "import os, sys\n"
        "from csvfast.certs import ManufacturingLine, private\n"
        "left = int(sys.argv[1])\n"
        "real = private._write_new\n"
        "def dying(path, content):\n"
        "    global left\n"
        "    if left == 0: os._exit(9)\n"
        "    left -= 1\n"
        "    real(path, content)\n"
        "private._write_new = dying\n"
        "ManufacturingLine.create().make_chip().save(sys.argv[2])\n"
    )
    for count in (0, 3, 5, 6):
        target = tmp_path / f"chip{count}"
        done = subprocess.run([sys.executable, "-P", "-c", program, str(count), str(target)], check=False, timeout=60)
        assert done.returncode == (0 if count == 6 else 9)
        assert target.exists() == (count == 6)
    ChipIdentity.load(tmp_path / "chip6")


def damage(directory: Path, name: str) -> None:
    """What one test does to a chip's directory."""
    other = ManufacturingLine.create()
    if name == "missing directory":
        directory.rename(directory.with_name("gone"))
    elif name == "open directory":
        directory.chmod(0o750)
    elif name == "open key":
        (directory / "cek.key").chmod(0o640)
    elif name == "key is a link":
        (directory / "cek.key").rename(directory / "real.key")
        (directory / "cek.key").symlink_to("real.key")
    elif name == "key is a pipe":
        (directory / "cek.key").unlink()
        os.mkfifo(directory / "cek.key", 0o600)
    elif name == "key is a directory":
        (directory / "cek.key").unlink()
        (directory / "cek.key").mkdir(mode=0o700)
    elif name == "another key":
        (directory / "cek.key").write_bytes(dump_private_key(SM2PrivateKey.generate()))
    elif name == "no key":
        (directory / "cek.key").write_bytes(b"nothing")
    elif name == "huge key":
        (directory / "cek.key").write_bytes(bytes(5000))
    elif name == "short secret":
        (directory / "root-secret.bin").write_bytes(bytes(31))
    elif name == "missing secret":
        (directory / "root-secret.bin").unlink()
    elif name == "another root":
        (directory / "root.cert").write_bytes(other.root.encoded)
    elif name == "Hygon's root":
        (directory / "root.cert").write_bytes(hygon_root().encoded)
    elif name == "another CEK":
        (directory / "cek.cert").write_bytes(other.make_chip().cek.encoded)
    elif name == "short certificate":
        (directory / "hsk.cert").write_bytes(bytes(831))
    elif name == "flipped bit":
        data = bytearray((directory / "cek.cert").read_bytes())
        data[700] ^= 4
        (directory / "cek.cert").write_bytes(data)
    else:
        text = {
            "no JSON": "{",
            "list": "[]",
            "deep JSON": "[" * 4000,
            "other format": json.dumps({"format": "csvfast-chip-2", "chip_id": "SIM1"}),
            "no chip id": json.dumps({"format": "csvfast-chip-1"}),
            "real chip id": json.dumps({"format": "csvfast-chip-1", "chip_id": "KPA64911240507"}),
            "number": json.dumps({"format": "csvfast-chip-1", "chip_id": 5}),
            "path as id": json.dumps({"format": "csvfast-chip-1", "chip_id": "SIM/../../x"}),
        }[name]
        (directory / "chip.json").write_text(text)


@pytest.mark.parametrize(
    "name",
    [
        "missing directory", "open directory", "open key", "key is a link", "key is a pipe", "key is a directory",
        "another key", "no key", "huge key", "short secret", "missing secret", "another root", "Hygon's root", "another CEK",
        "short certificate", "flipped bit", "no JSON", "list", "deep JSON", "other format", "no chip id", "real chip id",
        "number", "path as id",
    ],
)  # fmt: skip
def test_damaged_chips_are_refused(line: ManufacturingLine, tmp_path: Path, name: str) -> None:
    chip = line.make_chip()
    chip.save(tmp_path / "chip")
    damage(tmp_path / "chip", name)
    with pytest.raises(StateError) as caught:
        ChipIdentity.load(tmp_path / "chip")
    assert str(tmp_path / "chip") in str(caught.value)
    assert bytes(chip.root_secret).hex() not in str(caught.value)


def test_damaged_lines_are_refused(line: ManufacturingLine, tmp_path: Path) -> None:
    line.save(tmp_path / "line")
    other = ManufacturingLine.create()
    (tmp_path / "line" / "hsk.cert").write_bytes(other.hsk.encoded)
    with pytest.raises(StateError, match="damaged"):
        ManufacturingLine.load(tmp_path / "line")
    (tmp_path / "line" / "line.json").write_text('{"format": "csvfast-line-1"}')
    with pytest.raises(StateError, match="name is missing"):
        ManufacturingLine.load(tmp_path / "line")
    with pytest.raises(ArgumentError, match="not the key"):
        ManufacturingLine("x", line.root, line.hsk, SM2PrivateKey.generate(), SM2PrivateKey.generate())


def test_files_of_other_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_private_directory(tmp_path / "d", {"f": b"x"})
    assert read_private_file(tmp_path / "d", "f", 1) == b"x"
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(StateError, match="belongs to user"):
        read_private_file(tmp_path / "d", "f", 1)


def test_layouts_are_those_of_real_chips(line: ManufacturingLine, hygon_data: Path) -> None:
    """Simulator's root and Hygon's differ in identity, key and signature, and in nothing else."""
    ours, real = bytearray(line.root.encoded), bytearray((hygon_data / "hrk.cert").read_bytes())
    for start, stop in ((4, 36), (68, 100), (140, 172), (576, 608), (648, 680)):
        ours[start:stop] = real[start:stop] = bytes(stop - start)
    assert ours == real
    assert CaCertificate.parse((hygon_data / "hrk.cert").read_bytes()).user_id == line.root.user_id


def test_csv_layout_is_that_of_a_real_platform(line: ManufacturingLine, real_evidence: bytes) -> None:
    page = bytes(json.loads(real_evidence)["attestation_report"]["data"])
    real = bytearray(page[0x150 : 0x150 + 2084])
    point = SM2PrivateKey.generate().public_key.point
    cek = SM2PrivateKey.generate()
    ours = bytearray(
        CsvCertificate.build(usage=KeyUsage.PEK, algorithm=4, point=point, user_id=b"HYGON-SSD-PEK")
        .with_signature(1, cek, KeyUsage.CEK, b"HYGON-SSD-CEK")
        .with_signature(2, cek, KeyUsage.OCA, b"HYGON-SSD-OCA")
        .encoded
    )
    for start in (20, 92, 1052, 1124, 1572, 1644):
        ours[start : start + 32] = real[start : start + 32] = bytes(32)
    assert ours == real


def test_a_full_disk(line: ManufacturingLine, tmp_path: Path) -> None:
    """A write that is cut short in the middle of a file leaves nothing, neither of the name nor beside it."""
    line.make_chip("SIM1").save(tmp_path / "good")
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from csvfast.certs import CertificateStore, ChipIdentity, ManufacturingLine\n"
        "target = Path(sys.argv[1])\n"
        "chip = ChipIdentity.load(target / 'good')\n"
        "line = ManufacturingLine.create()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)\n"
        "store = CertificateStore([], cache=target / 'cache')\n"
        "calls = [lambda: chip.save(target / 'chip'), lambda: line.save(target / 'line')]\n"
        "calls.append(lambda: store.add('SIM1', chip.hsk, chip.cek))\n"
        "for call in calls:\n"
        "    try:\n"
        "        call()\n"
        "        print('done')\n"
        "    except OSError as error:\n"
        "        print(error.strerror)\n"
    )
    for limit, lines in ((100, "File too large\n" * 3), (1000, "File too large\ndone\nFile too large\n")):
        command = [sys.executable, "-P", "-c", program, str(tmp_path), str(limit)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout == lines
        left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
        assert {name for name in left if not name.startswith(("good", "line"))} == {"cache", "cache/SIM1"}
        assert ("line" in left) == (limit == 1000)


def test_permissions_do_not_depend_on_the_umask(line: ManufacturingLine, tmp_path: Path) -> None:
    usual = os.umask(0)
    try:
        line.make_chip().save(tmp_path / "chip")
        line.save(tmp_path / "line")
        write_private_file(tmp_path / "deep" / "file", b"content")
    finally:
        os.umask(usual)
    for name in ("chip", "line", "deep"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in (tmp_path / name).iterdir()} == {0o600}


def test_the_import_is_light() -> None:
    """HTTP, TLS and logging are loaded by who asks a key server, not by who verifies a chain."""
    program = (
        "import sys, csvfast\n"
        "before = set(sys.modules)\n"
        "import csvfast.certs as certs\n"
        "print(sorted((set(sys.modules) - before) & {'http.client', 'ssl', 'logging', 'shutil', 'concurrent.futures'}))\n"
        "print(certs.KeyServerClient.__module__, certs.KeyServerError.__module__, 'ssl' in sys.modules)\n"
        "from csvfast.certs import *\n"
        "print(KeyServerClient is certs.KeyServerClient, hasattr(certs, 'KeyServer'))\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == ["[]", "csvfast.certs.key_server csvfast.certs.key_server True", "True False"]
