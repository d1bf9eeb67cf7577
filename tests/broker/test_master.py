"""Master keys in files and from passphrases; where passphrases and PINs come from."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from csvfast.broker import master as module
from csvfast.broker.master import (
    Argon2Parameters,
    FileMaster,
    PassphraseMaster,
    create_master,
    open_master,
    read_secret,
)
from csvfast.broker.sealing import KeyRing
from csvfast.crypto import Secret
from csvfast.errors import (
    ArgumentError,
    AuthenticationError,
    ClosedError,
    CsvfastError,
    KeyExposureError,
    LengthError,
    StateError,
)

PASSPHRASE = b"correct horse battery staple"
CHEAP = Argon2Parameters(19_456, 2, 1)


def cheap(passphrase: bytes = PASSPHRASE) -> PassphraseMaster:
    return PassphraseMaster.create(Secret(passphrase), CHEAP)


def assert_round_trip(first: Any, second: Any) -> None:
    key = Secret.random(32)
    assert second.identity == first.identity
    assert second.unwrap(first.wrap(key, b"place"), b"place") == key


# -- files -----------------------------------------------------------------------------------------------------------


def test_file_is_made_private_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "master.key"
    made = FileMaster.create(path)
    assert path.stat().st_mode & 0o7777 == 0o600
    assert path.stat().st_size == 32
    assert [entry.name for entry in tmp_path.iterdir()] == ["master.key"]
    assert_round_trip(made, FileMaster(path))
    assert made.identity.startswith("file:")
    assert len(made.identity) == len("file:") + 32


def test_file_identity_is_known(tmp_path: Path) -> None:
    """HMAC-SM3 of the text, under the key; records of earlier programs name it."""
    path = tmp_path / "master.key"
    path.write_bytes(bytes(range(32)))
    path.chmod(0o600)
    import gmalg

    digest = gmalg.SM3

    def hmac(key: bytes, data: bytes) -> bytes:
        key = key.ljust(64, b"\0")

        def sm3(content: bytes) -> bytes:
            state = digest()
            state.update(content)
            return bytes(state.value())

        return sm3(bytes(b ^ 0x5C for b in key) + sm3(bytes(b ^ 0x36 for b in key) + data))

    assert FileMaster(path).identity == f"file:{hmac(bytes(range(32)), b'csvfast master key identity')[:16].hex()}"


def test_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "master.key"
    path.write_bytes(b"somebody's")
    with pytest.raises(StateError, match="exists; nothing was overwritten"):
        FileMaster.create(path)
    assert path.read_bytes() == b"somebody's"
    assert [entry.name for entry in tmp_path.iterdir()] == ["master.key"]


def test_two_files_are_two_keys(tmp_path: Path) -> None:
    first, second = FileMaster.create(tmp_path / "1"), FileMaster.create(tmp_path / "2")
    assert first.identity != second.identity
    with pytest.raises(AuthenticationError, match=f"wrapped by master key {second.identity}: does not authenticate"):
        second.unwrap(first.wrap(Secret.random(32), b""), b"")


@pytest.mark.parametrize("content", [b"", bytes(range(31)), bytes(range(33)), b"0123456789abcdef" * 4, bytes(range(32)) * 100])
def test_file_of_another_length_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "master.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(StateError, match=rf"{len(content)} bytes; expected"):
        FileMaster(path)


@pytest.mark.parametrize("byte", [0, 0xFF, 0x61])
def test_file_of_equal_bytes_is_refused(tmp_path: Path, byte: int) -> None:
    path = tmp_path / "master.key"
    path.write_bytes(bytes([byte]) * 32)
    path.chmod(0o600)
    with pytest.raises(StateError, match="all bytes are equal"):
        FileMaster(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o611, 0o660])
def test_file_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "master.key"
    FileMaster.create(path)
    path.chmod(mode)
    with pytest.raises(StateError, match="lets other users in"):
        FileMaster(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_file_of_another_user_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "master.key"
    FileMaster.create(path)
    os.chown(path, 65534, -1)
    with pytest.raises(StateError, match="belongs to user 65534"):
        FileMaster(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    FileMaster.create(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name in ("link", "pipe", "missing", "."):
        with pytest.raises(StateError):
            FileMaster(tmp_path / name)


# -- passphrases -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("salt", "parameters", "derived"),
    [
        # printf 'correct horse battery staple' | argon2 SALT -id -t T -k K -p P -l 32 -r, with the reference implementation
        (b"sixteen byte salt", Argon2Parameters(19456, 3, 4), "bd2640723d6898c6c1ed8d31fb2ab14a629a872fb9869dbfed9db7158603d860"),
        (b"0123456789abcdef", Argon2Parameters(19_456, 2, 1), "832e52b959b967b570ee4781f6c7bda7ced019ca266ac781fd2d94d4e853b0cd"),
    ],
)
def test_argon2id_known_answers(salt: bytes, parameters: Argon2Parameters, derived: str) -> None:
    assert module._argon2id(Secret(PASSPHRASE), salt, parameters) == bytes.fromhex(derived)


def test_passphrase_opens_its_record() -> None:
    made = cheap()
    record = json.loads(json.dumps(made.record))
    assert record["memory_kib"] == 19_456
    assert_round_trip(made, PassphraseMaster.open(Secret(PASSPHRASE), record))


def test_salt_is_new_each_time() -> None:
    assert cheap().identity != cheap().identity


@pytest.mark.parametrize("wrong", [b"Correct horse battery staple", PASSPHRASE + b" ", PASSPHRASE[:-1], b"x" * 1024])
def test_wrong_passphrase_is_refused(wrong: bytes) -> None:
    with pytest.raises(AuthenticationError, match=r"^wrong passphrase for the master key, or its record is damaged$"):
        PassphraseMaster.open(Secret(wrong), cheap().record)


@pytest.mark.parametrize("length", [1, 15, 1025])
def test_passphrase_has_a_length(length: int) -> None:
    with pytest.raises(LengthError, match=rf"passphrase: {length} bytes; expected 16 .. 1024"):
        PassphraseMaster.create(Secret(b"p" * length), CHEAP)
    with pytest.raises(LengthError):
        PassphraseMaster.open(Secret(b"p" * length), cheap().record)


HOSTILE: list[tuple[str, Any]] = [
    ("memory_kib", 100 << 20),  # 100 GiB
    ("memory_kib", (1 << 21) + 1),
    ("memory_kib", 19_455),
    ("memory_kib", 0),
    ("memory_kib", -1),
    ("memory_kib", 1 << 100_000),
    ("memory_kib", 65536.0),
    ("memory_kib", "65536"),
    ("memory_kib", True),
    ("memory_kib", None),
    ("iterations", 1),
    ("iterations", 65),
    ("iterations", 1 << 40),
    ("lanes", 0),
    ("lanes", 17),
    ("lanes", [4]),
    ("lanes", [1 << 100_000]),
    ("salt", ""),
    ("salt", "00" * 15),
    ("salt", "00" * 17),
    ("salt", "zz" * 16),
    ("salt", "\u0660\u0660" * 16),
    ("salt", 0),
    ("salt", None),
    ("algorithm", "argon2i"),
    ("algorithm", "scrypt"),
    ("format", "csvfast-master-passphrase-2"),
    ("format", {}),
]


@pytest.mark.parametrize(("member", "value"), HOSTILE, ids=[f"{name}-{number}" for number, (name, _) in enumerate(HOSTILE)])
def test_hostile_record_is_refused_before_anything_is_computed(
    member: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {**cheap().record, member: value}

    def fail(*_: object) -> None:
        raise AssertionError("argon2id must not run")

    monkeypatch.setattr(module, "_argon2id", fail)
    with pytest.raises(StateError) as caught:
        PassphraseMaster.open(Secret(PASSPHRASE), record)
    assert len(str(caught.value)) < 400


def test_cost_is_bounded_as_a_whole() -> None:
    Argon2Parameters(1 << 21, 8, 16)
    with pytest.raises(StateError, match=r"times iterations 18874368; expected at most 16777216"):
        Argon2Parameters(1 << 21, 9, 16)


@pytest.mark.parametrize("member", ["format", "algorithm", "salt", "memory_kib", "iterations", "lanes", "identity"])
def test_record_with_a_member_missing_or_too_many_is_refused(member: str) -> None:
    record = dict(cheap().record)
    value = record.pop(member)
    with pytest.raises(StateError, match="has members"):
        PassphraseMaster.open(Secret(PASSPHRASE), record)
    with pytest.raises(StateError, match="has members"):
        PassphraseMaster.open(Secret(PASSPHRASE), {**record, member: value, "more": 1})


@pytest.mark.parametrize(
    ("member", "value"),
    [("salt", "00" * 16), ("memory_kib", 19_457), ("iterations", 3), ("lanes", 2), ("identity", "file:00"), ("identity", 0)],
)
def test_altered_record_is_refused(member: str, value: Any) -> None:
    with pytest.raises(AuthenticationError):
        PassphraseMaster.open(Secret(PASSPHRASE), {**cheap().record, member: value})


def test_record_holds_no_key() -> None:
    made = cheap()
    key = bytes(made._key)
    text = json.dumps(made.record)
    assert key.hex() not in text
    assert PASSPHRASE.decode() not in text


def test_no_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process whose address space is too small for the record's cost."""
    program = (
        "import resource, sys\n"
        "from csvfast.broker.master import *\n"
        "from csvfast.crypto import Secret\n"
        "from csvfast.errors import AllocationError\n"
        "PassphraseMaster.create(Secret(b'p' * 16), Argon2Parameters(19456, 2, 1))\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "try: PassphraseMaster.create(Secret(b'p' * 16), Argon2Parameters(1 << 21, 2, 1))\n"
        "except AllocationError as error: print(error)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.stdout == "argon2id: no memory for 2097152 KiB\n", ended.stderr


# -- both ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["file", "passphrase"])
def master(request: pytest.FixtureRequest, tmp_path: Path) -> FileMaster | PassphraseMaster:
    return FileMaster.create(tmp_path / "key") if request.param == "file" else cheap()


def test_every_altered_byte_is_found(master: FileMaster | PassphraseMaster) -> None:
    key = Secret.random(32)
    wrapped = master.wrap(key, b"place")
    assert master.unwrap(bytearray(wrapped), b"place") == key
    for position in range(len(wrapped)):
        altered = bytearray(wrapped)
        altered[position] ^= 1
        with pytest.raises(AuthenticationError):
            master.unwrap(altered, b"place")
        with pytest.raises(AuthenticationError):
            master.unwrap(wrapped[:position], b"place")
    with pytest.raises(AuthenticationError):
        master.unwrap(wrapped, b"plaza")


def test_closed_master_is_refused(master: FileMaster | PassphraseMaster) -> None:
    wrapped = master.wrap(Secret.random(32), b"")
    master.close()
    master.close()
    with pytest.raises(ClosedError):
        master.wrap(Secret.random(32), b"")
    with pytest.raises(ClosedError):
        master.unwrap(wrapped, b"")


def test_master_shows_no_key_and_cannot_be_copied(master: FileMaster | PassphraseMaster) -> None:
    assert repr(master) == f"<{type(master).__name__} {master.identity}>"
    assert bytes(master._key).hex() not in repr(vars(master))
    with pytest.raises(KeyExposureError):
        pickle.dumps(master)


# -- sources of secrets ----------------------------------------------------------------------------------------------


def secret_file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    path.chmod(0o600)
    return path


def from_file(content: bytes, tmp_path: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"file": str(secret_file(tmp_path / "secret", content))}


def from_descriptor(content: bytes, *_: object) -> dict[str, Any]:
    reader, writer = os.pipe()
    os.write(writer, content)
    os.close(writer)
    return {"descriptor": reader}


def from_environment(content: bytes, _: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("CSVFAST_TEST_SECRET", os.fsdecode(content))
    return {"environment": "CSVFAST_TEST_SECRET"}


Source = Callable[[bytes, Path, pytest.MonkeyPatch], dict[str, Any]]
every_source = pytest.mark.parametrize("source", [from_file, from_descriptor, from_environment])


@every_source
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (PASSPHRASE, PASSPHRASE),
        (PASSPHRASE + b"\n", PASSPHRASE),
        (PASSPHRASE + b"\r\n", PASSPHRASE),
        (PASSPHRASE + b"\n\n", PASSPHRASE + b"\n"),
        (b" " + PASSPHRASE + b" ", b" " + PASSPHRASE + b" "),
        (b"\xff\xfe" * 8, b"\xff\xfe" * 8),
        (b"x" * 1024 + b"\n", b"x" * 1024),
        (b"x" * 1024 + b"\r\n", b"x" * 1024),
    ],
)
def test_secret_is_read(source: Source, content: bytes, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_secret(source(content, tmp_path, monkeypatch), what="passphrase", least=16) == expected


@every_source
@pytest.mark.parametrize("content", [b"", b"\n", b"\r\n", b"x" * 15, b"x" * 15 + b"\n", b"\r"])
def test_short_secret_is_refused(source: Source, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LengthError, match=r"^passphrase: \d+ bytes; expected 16 .. 1024$"):
        read_secret(source(content, tmp_path, monkeypatch), what="passphrase", least=16)


@every_source
@pytest.mark.parametrize("length", [1025, 5000, 60_000])
def test_long_secret_is_refused(source: Source, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CsvfastError, match=r"bytes; expected") as caught:
        read_secret(source(b"geheim" * (length // 6 + 1), tmp_path, monkeypatch), what="passphrase", least=16)
    assert "geheim" not in str(caught.value)


def test_environment_is_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    source = from_environment(PASSPHRASE, Path(), monkeypatch)
    read_secret(source, what="passphrase", least=16)
    assert "CSVFAST_TEST_SECRET" not in os.environ
    program = "import os; print(dict(os.environ))"
    seen = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert PASSPHRASE.decode() not in seen.stdout
    with pytest.raises(StateError, match="the environment has no CSVFAST_TEST_SECRET"):
        read_secret(source, what="passphrase", least=16)


def test_descriptor_is_closed() -> None:
    source = from_descriptor(PASSPHRASE)
    read_secret(source, what="passphrase", least=16)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(source["descriptor"])
    with pytest.raises(StateError, match=r"^PIN: descriptor \d+: Bad file descriptor"):
        read_secret(source, what="PIN", least=4)


def test_descriptor_is_read_to_its_end_in_pieces() -> None:
    program = (
        "import sys\nfrom csvfast.broker.master import read_secret\n"
        "print(read_secret({'descriptor': 0}, what='passphrase', least=16) == b'one two three four')\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        for part in (b"one ", b"two ", b"three ", b"four", b"\n"):
            process.stdin.write(part)
            process.stdin.flush()
        output, _ = process.communicate(timeout=60)
    assert output == b"True\n"


def test_secret_file_must_be_private(tmp_path: Path) -> None:
    path = secret_file(tmp_path / "secret", PASSPHRASE)
    path.chmod(0o644)
    with pytest.raises(StateError, match="lets other users in"):
        read_secret({"file": str(path)}, what="passphrase", least=16)
    path.chmod(0o600)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(StateError):
        read_secret({"file": str(tmp_path / "link")}, what="passphrase", least=16)


@pytest.mark.parametrize(
    "source",
    [
        {},
        {"file": "a", "descriptor": 3},
        {"value": "correct horse battery staple"},
        {"file": ""},
        {"file": 3},
        {"descriptor": "3"},
        {"descriptor": True},
        {"descriptor": -1},
        {"descriptor": 1},
        {"descriptor": 2},
        {"environment": ""},
        {"environment": 1},
        "correct horse battery staple",
        None,
    ],
)
def test_other_sources_are_refused(source: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^passphrase: expected") as caught:
        read_secret(source, what="passphrase", least=16)
    assert "horse" not in str(caught.value)


# -- configuration ---------------------------------------------------------------------------------------------------


def test_configured_file(tmp_path: Path) -> None:
    config = {"kind": "file", "path": "master.key"}
    made = create_master(config, base=tmp_path)
    assert (tmp_path / "master.key").exists()
    assert_round_trip(made, open_master(config, base=tmp_path))
    assert_round_trip(made, open_master({"kind": "file", "path": str(tmp_path / "master.key")}))
    with pytest.raises(StateError, match="nothing was overwritten"):
        create_master(config, base=tmp_path)


def test_configured_passphrase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Argon2Parameters", lambda *given: Argon2Parameters(*(given or (19_456, 2, 1))))
    secret_file(tmp_path / "passphrase", PASSPHRASE + b"\n")
    config = {"kind": "passphrase", "record": "master.json", "passphrase": {"file": "passphrase"}}
    made = create_master(config, base=tmp_path)
    record = tmp_path / "master.json"
    assert record.stat().st_mode & 0o777 == 0o600
    assert_round_trip(made, open_master(config, base=tmp_path))
    for source in (from_descriptor, from_environment):
        other = {**config, "passphrase": source(PASSPHRASE, tmp_path, monkeypatch)}
        assert_round_trip(made, open_master(other, base=tmp_path))
    with pytest.raises(StateError, match="nothing was overwritten"):
        create_master(config, base=tmp_path)
    with pytest.raises(AuthenticationError, match="wrong passphrase"):
        open_master({**config, "passphrase": from_descriptor(b"another passphrase")}, base=tmp_path)
    record.chmod(0o644)
    with pytest.raises(StateError, match="lets other users in"):
        open_master(config, base=tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"format": "csvfast-master-passphrase-1"}', b"{}" * 4000])
def test_damaged_record_file(tmp_path: Path, content: bytes) -> None:
    secret_file(tmp_path / "master.json", content)
    secret_file(tmp_path / "passphrase", PASSPHRASE)
    with pytest.raises(StateError):
        open_master({"kind": "passphrase", "record": "master.json", "passphrase": {"file": "passphrase"}}, base=tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "kind None; expected"),
        ({"kind": "kms"}, "kind 'kms'; expected"),
        ({"kind": ["file"]}, "expected 'file', 'passphrase' or 'pkcs11'"),
        ({"kind": "file"}, r"has \['kind'\]; expected \['kind', 'path'\]"),
        ({"kind": "file", "path": ""}, "path ''; expected a text"),
        ({"kind": "file", "path": 1}, "path 1; expected a text"),
        ({"kind": "file", "path": "x", "mode": 1}, "expected"),
        ({"kind": "passphrase", "record": "x"}, "expected"),
        ({"kind": "pkcs11", "module": "x", "token": "x", "key": "x"}, "expected"),
        ({"kind": "pkcs11", "module": "x", "token": "x", "key": 5, "pin": {}}, "key 5; expected a text"),
    ],
)
def test_configuration_is_checked(config: dict[str, Any], words: str) -> None:
    for action in (open_master, create_master):
        with pytest.raises(ArgumentError, match=words):
            action(config)


def test_secret_written_into_the_configuration_is_refused_and_not_repeated() -> None:
    config = {"kind": "passphrase", "record": "x", "passphrase": "correct horse battery staple"}
    with pytest.raises(ArgumentError) as caught:
        open_master(config)
    assert "horse" not in str(caught.value)


def test_ring_survives_a_change_of_passphrase(tmp_path: Path) -> None:
    old, new = cheap(), cheap(b"another horse, another battery")
    ring = KeyRing.create(old)
    sealed = ring.seal("default/key/1", 1, b"content")
    moved = KeyRing.open(ring.under(new).rows, PassphraseMaster.open(Secret(b"another horse, another battery"), new.record))
    assert moved.unseal("default/key/1", 1, sealed) == b"content"
    with pytest.raises(AuthenticationError):
        KeyRing.open(moved.rows, old)
