"""Byte for byte the same as cryptsetup's veritysetup: root hash, hash area, and each accepts what the other made."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import uuid
from pathlib import Path

import pytest

from csvfast.measure import format_verity, read_superblock, verify_verity

VERITYSETUP = shutil.which("veritysetup", path="/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin")

pytestmark = pytest.mark.skipif(VERITYSETUP is None, reason="veritysetup is not installed (Debian: cryptsetup-bin)")

UUID = uuid.UUID("6ba7b810-9dad-11d1-80b4-00c04fd430c8")


def veritysetup(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    assert VERITYSETUP is not None
    return subprocess.run([VERITYSETUP, *arguments], capture_output=True, text=True, timeout=120, check=False)


def root_of(answer: subprocess.CompletedProcess[str]) -> bytes:
    found = re.search(r"Root hash:\s+([0-9a-f]{64})", answer.stdout)
    assert found, answer
    return bytes.fromhex(found[1])


def compare(
    folder: Path,
    data: bytes,
    *,
    salt: bytes,
    block: int = 4096,
    hash_block: int = 4096,
    hash_type: int = 1,
    hash_offset: int = 0,
    superblock: bool = True,
) -> None:
    (folder / "data").write_bytes(data)
    for name in ("theirs", "ours"):
        (folder / name).unlink(missing_ok=True)
    options = [
        f"--salt={salt.hex() or '-'}",
        f"--data-block-size={block}",
        f"--hash-block-size={hash_block}",
        f"--format={hash_type}",
        "--hash=sm3",
        f"--hash-offset={hash_offset}",
        *([f"--uuid={UUID}"] if superblock else ["--no-superblock"]),
    ]
    theirs = root_of(veritysetup("format", *options, folder / "data", folder / "theirs"))
    ours = format_verity(
        folder / "data",
        folder / "ours",
        salt=salt,
        uuid=UUID,
        data_block_bytes=block,
        hash_block_bytes=hash_block,
        hash_type=hash_type,
        hash_offset=hash_offset,
        superblock=superblock,
    )
    assert ours.root_hash == theirs
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()
    given = None if superblock else ours.parameters
    assert verify_verity(folder / "data", folder / "theirs", theirs, hash_offset=hash_offset, parameters=given).ok
    if superblock:
        accepted = veritysetup("verify", f"--hash-offset={hash_offset}", folder / "data", folder / "ours", theirs.hex())
        assert accepted.returncode == 0, accepted


@pytest.mark.parametrize("salt", [0, 1, 32, 255, 256])
@pytest.mark.parametrize("blocks", [1, 2, 128, 129, 1000])
def test_sizes_and_salts(tmp_path: Path, blocks: int, salt: int) -> None:
    source = random.Random(1000 * blocks + salt)
    compare(tmp_path, source.randbytes(4096 * blocks), salt=source.randbytes(salt))


@pytest.mark.parametrize("block", [512, 1024, 4096, 65536])
@pytest.mark.parametrize("hash_block", [512, 4096, 65536])
def test_block_sizes(tmp_path: Path, block: int, hash_block: int) -> None:
    source = random.Random(block + hash_block)
    compare(tmp_path, source.randbytes(600_000), salt=b"salt", block=block, hash_block=hash_block)


def test_three_levels(tmp_path: Path) -> None:
    compare(tmp_path, random.Random(3).randbytes(4096 * (128 * 128 + 1)), salt=bytes(range(32)))


@pytest.mark.parametrize("size", [4097, 8191, 50_001])
def test_partial_last_block(tmp_path: Path, size: int) -> None:
    compare(tmp_path, random.Random(size).randbytes(size), salt=b"\x01\x02")


def test_random_settings(tmp_path: Path) -> None:
    source = random.Random(20261123)
    for _ in range(25):
        block, hash_block = (512 << source.randrange(8) for _ in range(2))
        superblock = source.random() < 0.7
        compare(
            tmp_path,
            source.randbytes(source.randrange(2 * block, 1_500_000)),
            salt=source.randbytes(source.choice([0, 1, 32, 33, 256])),
            block=block,
            hash_block=hash_block,
            hash_type=source.randrange(2),
            hash_offset=source.choice([0, 1, 5]) * max(hash_block, 4096),
            superblock=superblock,
        )


def test_same_file(tmp_path: Path) -> None:
    data = random.Random(4).randbytes(4096 * 300)
    for name in ("theirs", "ours"):
        (tmp_path / name).write_bytes(data)
    offset = str(len(data))
    theirs = root_of(
        veritysetup(
            "format", "--hash=sm3", "--salt=0a0b", f"--uuid={UUID}", f"--hash-offset={offset}", "--data-blocks=300",
            tmp_path / "theirs", tmp_path / "theirs",
        )
    )  # fmt: skip
    ours = format_verity(tmp_path / "ours", tmp_path / "ours", salt=b"\x0a\x0b", uuid=UUID, hash_offset=len(data))
    assert ours.root_hash == theirs
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    accepted = veritysetup("verify", f"--hash-offset={offset}", tmp_path / "ours", tmp_path / "ours", theirs.hex())
    assert accepted.returncode == 0, accepted


def test_both_reject_the_same_damage(tmp_path: Path) -> None:
    data = bytearray(random.Random(5).randbytes(4096 * 200))
    (tmp_path / "data").write_bytes(data)
    root = format_verity(tmp_path / "data", tmp_path / "area", salt=b"x").root_hash
    data[4096 * 150 + 9] ^= 0x80
    (tmp_path / "data").write_bytes(data)
    theirs = veritysetup("verify", tmp_path / "data", tmp_path / "area", root.hex())
    assert theirs.returncode != 0
    assert f"position {4096 * 150}" in theirs.stderr
    ours = verify_verity(tmp_path / "data", tmp_path / "area", root)
    assert f"at byte {4096 * 150}" in ours.problems[0]


def test_we_read_their_superblock(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(8192))
    veritysetup("format", "--hash=sm3", f"--uuid={UUID}", tmp_path / "data", tmp_path / "area")
    parameters = read_superblock(tmp_path / "area")
    assert parameters.uuid == UUID
    assert parameters.data_blocks == 2
    assert len(parameters.salt) == 32


def test_they_read_our_superblock(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(4096 * 5))
    format_verity(tmp_path / "data", tmp_path / "area", salt=b"\xab\xcd", uuid=UUID)
    dump = veritysetup("dump", tmp_path / "area").stdout
    for words in (str(UUID), "sm3", "abcd", "Data blocks:     \t5"):
        assert words in dump
