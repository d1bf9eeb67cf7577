"""Launch digests: the published vectors, the pieces, and every way in which inputs can be unfit."""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from reference import ovmf_images as ovmf

from csvfast.measure import (
    EmptySourceError,
    FirmwareTableError,
    HashTableAreaError,
    LaunchDigest,
    ParameterError,
    ResetBlockError,
    SourceChangedError,
    SourceKindError,
    SourceNotFoundError,
    hash_table,
    launch_digest,
    vmsa_page,
)
from csvfast.measure.launch import Vmsa


def sm3(data: bytes) -> str:
    return hashlib.new("sm3", data).hexdigest()


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


# ---- Specification, appendix A.9 -------------------------------------------------------------------------------------

A9_COMMAND_LINE = "console=ttyS0 root=/dev/vda"
A9_TABLE = bytes.fromhex(
    "06d63894224fc94cb479a793d411fd21a800"
    "d82dd09720bd944caa78e7714d36ab2a3200387d331f86d1de80d75783a10f0d6f55eb351f5727aab127213ddd6f2cfa3ddf"
    "31f7ba442f3ad74b9af141e29169781d3200e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    "3794e74dd2ab7f42b835d5b172d2045b3200c458d546bea3761e98f763fcc4cc5438e35fd7af74c501b34a3176651d971e40"
    "0000000000000000"
)


@pytest.fixture
def a9(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "OVMF").write_bytes(bytes(7 * index % 256 for index in range(4096)))
    (tmp_path / "kernel").write_bytes(b"kernel image bytes")
    return {"firmware": tmp_path / "OVMF", "kernel": tmp_path / "kernel"}


def test_a9_table() -> None:
    command_line = sha256(A9_COMMAND_LINE.encode() + b"\0")
    assert hash_table(command_line, sha256(b""), sha256(b"kernel image bytes")) == A9_TABLE
    assert len(A9_TABLE) == 176


@pytest.mark.parametrize(
    ("append", "expected"),
    [
        (A9_COMMAND_LINE, "88698862d12fa228f0bf8e51d6f3d9b9aae176e27fe8350b156d6787c135547b"),
        (None, "f5e5de4fd525e038f32609e556adc04bdaf641572031ccfdebf9aafea2ab46c7"),
        ("", "f5e5de4fd525e038f32609e556adc04bdaf641572031ccfdebf9aafea2ab46c7"),
    ],
)
def test_a9_with_table(a9: dict[str, Any], append: str | None, expected: str) -> None:
    outcome = launch_digest(**a9, append=append, force_hash_table=True)
    assert outcome.hexdigest == expected
    assert "hash table added" in outcome.warnings[0]


def test_a9_without_table(a9: dict[str, Any]) -> None:
    outcome = launch_digest(a9["firmware"])
    assert outcome.hexdigest == "8d972379a2b91f16840969a1bb4b71aeb35f87b5bfe66ec36d9df325cfa944d0"
    assert outcome.warnings == ()


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (0xFFFFFFF0, "3460add918b3989bbe17a88d029dce53781d12d680d5ad8d82f396172a686fee"),
        (0x0080B004, "af9950a7cdfb67189b17fa3846542f86ca06ef075f53dda214a7ec867e94a81c"),
    ],
)
def test_a9_vmsa(address: int, expected: str) -> None:
    assert sm3(vmsa_page(address, 0x900F00)) == expected


def test_a9_needs_the_override(a9: dict[str, Any]) -> None:
    with pytest.raises(FirmwareTableError, match="no GUID table"):
        launch_digest(**a9)


# ---- Pieces ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    content = {"firmware": ovmf.good(), "kernel": b"MZ" + bytes(3_000_000), "initrd": bytes(range(256)) * 9000}
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    return {name: tmp_path / name for name in content}


@pytest.mark.parametrize("vcpus", [1, 2, 5])
@pytest.mark.parametrize("vmsa", ["none", "amd"])
@pytest.mark.parametrize("with_kernel", [False, True])
def test_concatenation(files: dict[str, Any], vcpus: int, vmsa: Vmsa, with_kernel: bool) -> None:
    arguments: dict[str, Any] = dict(files) if with_kernel else {"firmware": files["firmware"]}
    if with_kernel:
        arguments["append"] = "quiet"
    outcome = launch_digest(**arguments, vmsa=vmsa, vcpus=vcpus, cpu_signature=0x900F01)
    pieces = [files["firmware"].read_bytes()]
    if with_kernel:
        hashes = [sha256(b"quiet\0"), *(sha256(files[name].read_bytes()) for name in ("initrd", "kernel"))]
        pieces.append(hash_table(*hashes))
        assert [item.sha256 for item in outcome.inputs] == hashes
        assert [item.name for item in outcome.inputs] == ["command line", "initrd", "kernel"]
        assert [item.size for item in outcome.inputs] == [6, 2_304_000, 3_000_002]
    if vmsa == "amd":
        pieces.append(vmsa_page(0xFFFFFFF0, 0x900F01))
        pieces += [vmsa_page(ovmf.RESET_ADDRESS, 0x900F01)] * (vcpus - 1)
    assert outcome.hexdigest == sm3(b"".join(pieces))
    assert [piece.sm3.hex() for piece in outcome.pieces] == [sm3(piece) for piece in pieces]
    assert [piece.size for piece in outcome.pieces] == [len(piece) for piece in pieces]
    for index, piece in enumerate(outcome.pieces):
        assert piece.running.hex() == sm3(b"".join(pieces[: index + 1]))


def test_addresses(files: dict[str, Any]) -> None:
    outcome = launch_digest(**files, vmsa="amd")
    assert [piece.address for piece in outcome.pieces] == [(1 << 32) - 8192, ovmf.AREA[0], None]


def test_one_vcpu_needs_no_reset_block(tmp_path: Path) -> None:
    (tmp_path / "fw").write_bytes(ovmf.image())
    assert launch_digest(tmp_path / "fw", vmsa="amd").digest
    with pytest.raises(ResetBlockError, match="no SEV-ES reset block"):
        launch_digest(tmp_path / "fw", vmsa="amd", vcpus=2)


def test_vmsa_layout() -> None:
    page = vmsa_page(0x12345678, 0xABCDEF)
    assert page[0x10:0x20] == struct.pack("<HHIQ", 0xF000, 0x9B, 0xFFFF, 0x12340000)
    assert page[0x178:0x180] == struct.pack("<Q", 0x5678)
    assert page[0x310:0x318] == struct.pack("<Q", 0xABCDEF)
    assert len(page) == 4096


@pytest.mark.parametrize("value", [-1, 1 << 32])
def test_vmsa_numbers(value: int) -> None:
    with pytest.raises(ParameterError, match="address is"):
        vmsa_page(value)
    with pytest.raises(ParameterError, match="CPU signature is"):
        vmsa_page(0, value)


def test_command_line_that_is_no_unicode(files: dict[str, Any]) -> None:
    raw = b"quiet \xff\xfe"
    outcome = launch_digest(**files, append=os.fsdecode(raw))
    assert outcome.inputs[0].sha256 == sha256(raw + b"\0")


def test_odd_firmware_size_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "fw").write_bytes(ovmf.good() + b"x")
    outcome = launch_digest(tmp_path / "fw")
    assert "has 8193 bytes, no multiple of 4096" in outcome.warnings[0]


def test_record(files: dict[str, Any]) -> None:
    outcome = launch_digest(**files, append="quiet", vmsa="amd", vcpus=2)
    short = outcome.to_dict()
    assert short["digest"] == outcome.hexdigest
    assert (short["vmsa"], short["vcpus"], short["cpu_signature"]) == ("amd", 2, "0x900f00")
    assert "pieces" not in short
    long = outcome.to_dict(explain=True)
    assert long["pieces"][-1]["running"] == long["digest"]
    assert long["append"] == "quiet"


# ---- Unfit inputs ----------------------------------------------------------------------------------------------------


def refused(error: type[Exception], message: str, **arguments: Any) -> None:
    with pytest.raises(error, match=message):
        launch_digest(**arguments)


def test_unfit_parameters(files: dict[str, Any]) -> None:
    firmware = files["firmware"]
    refused(ParameterError, "vmsa is 'intel'; expected 'none' or 'amd'", firmware=firmware, vmsa="intel")
    refused(ParameterError, "vcpus is 0; expected 1 to 4096", firmware=firmware, vcpus=0)
    refused(ParameterError, "vcpus is 4097", firmware=firmware, vcpus=4097)
    refused(ParameterError, "initrd is given without a kernel", firmware=firmware, initrd=files["initrd"])
    refused(ParameterError, "append is given without a kernel", firmware=firmware, append="quiet")
    refused(ParameterError, "append has a NUL at character 1", **files, append="a\0b")
    refused(ParameterError, "kernel and initrd are both '-'", firmware=firmware, kernel="-", initrd="-")
    refused(ParameterError, "CPU signature", firmware=firmware, vmsa="amd", cpu_signature=1 << 32)
    with pytest.raises(ParameterError, match="SHA-256 digest has 31 bytes"):
        hash_table(bytes(32), bytes(31), bytes(32))


def test_unfit_firmware(tmp_path: Path, files: dict[str, Any]) -> None:
    firmware = tmp_path / "fw"
    for content, error, message in (
        (b"", EmptySourceError, "is empty"),
        (bytes(8192), FirmwareTableError, "no GUID table"),
        (ovmf.image(), HashTableAreaError, "has no hash table area"),
        (ovmf.good(area=(0, 0)), HashTableAreaError, "does not support kernel hashes"),
        (ovmf.good(area=(0x1000, 100)), HashTableAreaError, "has 100 bytes; expected at least 176"),
    ):
        firmware.write_bytes(content)
        refused(error, message, firmware=firmware, kernel=files["kernel"])
    firmware.write_bytes(b"")
    refused(EmptySourceError, "is empty", firmware=firmware)


@pytest.mark.parametrize("name", ["firmware", "kernel", "initrd"])
def test_missing_files(tmp_path: Path, files: dict[str, Any], name: str) -> None:
    refused(SourceNotFoundError, "nothing: no such file", **files | {name: tmp_path / "nothing"})
    refused(SourceKindError, "is a directory", **files | {name: tmp_path})


@pytest.mark.parametrize("name", ["firmware", "kernel", "initrd"])
def test_changing_files(files: dict[str, Any], name: str) -> None:
    files[name].write_bytes(
        files[name].read_bytes() + bytes(9 << 20) if name != "firmware" else ovmf.good(size=9 << 20)
    )

    def touch(done: int, total: int | None) -> None:
        with files[name].open("ab") as file:
            file.write(b"x")

    refused(SourceChangedError, "changed while it was measured", **files, progress=touch)


def test_progress(files: dict[str, Any]) -> None:
    seen: list[tuple[int, int | None]] = []
    launch_digest(**files, progress=lambda done, total: seen.append((done, total)))
    total = sum(path.stat().st_size for path in files.values())
    assert seen[-1] == (total, total)


def test_kernel_from_a_pipe(tmp_path: Path, files: dict[str, Any]) -> None:
    import threading

    os.mkfifo(tmp_path / "p")
    writer = threading.Thread(target=(tmp_path / "p").write_bytes, args=[files["kernel"].read_bytes()])
    writer.start()
    outcome = launch_digest(files["firmware"], kernel=tmp_path / "p", progress=lambda done, total: None)
    writer.join()
    expected: LaunchDigest = launch_digest(files["firmware"], kernel=files["kernel"])
    assert outcome.digest == expected.digest


# ---- CSV3


def test_csv3_items(a9: dict[str, Any]) -> None:
    """The serialisation of specification 6.4, written out."""
    firmware = a9["firmware"].read_bytes()
    secure_calls = bytearray(4096)
    secure_calls[-32 - 44 : -32] = (
        bytes.fromhex("00200000 00f08000 1a00 6f925d9aa52fbaceab216b275d5556a5 2c00 de82b596b21ff745baeaa366c55a082d")
    )  # fmt: skip
    table = bytes(0xC00) + A9_TABLE + bytes(4096 - 0xC00 - 176)
    items = struct.pack("<IIQI", 0x201, 0, 0xFFFFF000, 4096) + firmware
    items += struct.pack("<IIQI", 0x201, 0, 0x80F000, 4096) + table
    items += struct.pack("<IIQI", 0x201, 0, 0x80E000, 4096) + secure_calls
    items += struct.pack("<IIQI", 0x202, 0, 0, 4096) + vmsa_page(0xFFFFFFF0)
    found = launch_digest(**a9, append=A9_COMMAND_LINE, force_hash_table=True, csv3=True, secure_calls=0x80E000)
    assert found.hexdigest == sm3(items)
    assert [piece.name for piece in found.pieces] == ["firmware", "hash table", "secure call pages", "VMSA 0"]
    assert found.pieces[-1].running == found.digest
    record = found.to_dict()
    assert (record["csv3"], record["vmsa"], record["vcpus"]) == (True, "amd", 1)
    assert "csv3" not in launch_digest(**a9, force_hash_table=True).to_dict()


def test_csv3_two_vcpus_and_the_firmwares_own_table(tmp_path: Path) -> None:
    (tmp_path / "OVMF").write_bytes(ovmf.good(area=(0x80FFA0, 0x400)))
    (tmp_path / "kernel").write_bytes(b"kernel image bytes")
    found = launch_digest(tmp_path / "OVMF", kernel=tmp_path / "kernel", csv3=True, vcpus=2)
    assert [(piece.name, piece.size, piece.address) for piece in found.pieces] == [
        ("firmware", 8192, 0xFFFFE000), ("hash table", 8192, 0x80F000), ("VMSA 0", 4096, None), ("VMSA 1", 4096, None),
    ]  # fmt: skip
    vcpu = struct.pack("<IIQI", 0x202, 1, 0, 4096) + vmsa_page(ovmf.RESET_ADDRESS)
    assert found.pieces[-1].sm3.hex() == sm3(vcpu[20:])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"secure_calls": 0x80E000}, "none of CSV3"),
        ({"csv3": True, "secure_calls": 0}, "three pages below 4 GiB"),
        ({"csv3": True, "secure_calls": 0x80E001}, "three pages below 4 GiB"),
        ({"csv3": True, "secure_calls": (1 << 32) - 8192}, "three pages below 4 GiB"),
    ],
)
def test_csv3_refused(a9: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ParameterError, match=words):
        launch_digest(**a9, force_hash_table=True, **changes)


def test_csv3_takes_whole_pages(tmp_path: Path) -> None:
    for size in (1, 4095, 4097):
        (tmp_path / "OVMF").write_bytes(bytes(size))
        with pytest.raises(ParameterError, match="whole pages"):
            launch_digest(tmp_path / "OVMF", csv3=True)
