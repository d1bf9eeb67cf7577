"""Recipes, explanations, and where two of them part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import ovmf_images as ovmf

from csvfast.measure import (
    LaunchRecipe,
    RecipeError,
    SourceNotFoundError,
    compare_explanations,
    launch_digest,
    load_explanation,
    load_recipe,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "OVMF.fd").write_bytes(ovmf.good())
    (tmp_path / "vmlinuz").write_bytes(b"kernel")
    (tmp_path / "initrd.img").write_bytes(b"initrd")
    return tmp_path


TOML = """
firmware = "OVMF.fd"
kernel = "vmlinuz"
initrd = "initrd.img"
append = "console=ttyS0"
vmsa = "amd"
vcpus = 3
cpu_signature = 0x900f01
"""


def test_toml(folder: Path) -> None:
    (folder / "r.toml").write_text(TOML + f'expect = "{"AB" * 32}"\n')
    recipe = load_recipe(folder / "r.toml")
    assert recipe == LaunchRecipe(
        folder / "OVMF.fd",
        folder / "vmlinuz",
        folder / "initrd.img",
        "console=ttyS0",
        "amd",
        3,
        0x900F01,
        False,
        b"\xab" * 32,
    )
    direct = launch_digest(
        folder / "OVMF.fd",
        kernel=folder / "vmlinuz",
        initrd=folder / "initrd.img",
        append="console=ttyS0",
        vmsa="amd",
        vcpus=3,
        cpu_signature=0x900F01,
    )
    assert recipe.measure().digest == direct.digest


def test_json(folder: Path) -> None:
    (folder / "r.json").write_text(json.dumps({"firmware": "OVMF.fd", "cpu_signature": "0x900f01"}))
    recipe = load_recipe(folder / "r.json")
    assert recipe.cpu_signature == 0x900F01
    assert recipe.kernel is None
    assert recipe.measure().digest == launch_digest(folder / "OVMF.fd").digest


def test_csv3(folder: Path) -> None:
    (folder / "r.toml").write_text("firmware = 'OVMF.fd'\ncsv3 = true\nsecure_calls = '0xf80000'\n")
    found = load_recipe(folder / "r.toml").measure()
    assert found.digest == launch_digest(folder / "OVMF.fd", csv3=True, secure_calls=0xF80000).digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no firmware"),
        ("firmware = 1", "firmware is 1; expected str"),
        ("firmware = 'a'\nkernal = 'b'", "unknown key 'kernal'; expected one of firmware, kernel"),
        ("firmware = 'a'\nvcpus = true", "vcpus is True; expected int"),
        ("firmware = 'a'\nvcpus = '2'", "vcpus is '2'; expected int"),
        ("firmware = 'a'\nforce_hash_table = 1", "force_hash_table is 1; expected bool"),
        ("firmware = 'a'\ncpu_signature = 'x'", "cpu_signature is 'x'; expected a number"),
        ("firmware = 'a'\nsecure_calls = 'x'", "secure_calls is 'x'; expected a number"),
        ("firmware = 'a'\ncsv3 = 1", "csv3 is 1; expected bool"),
        ("firmware = 'a'\nexpect = 'abcd'", "expect has 4 characters; expected 64 hexadecimal digits"),
        ("firmware = 'a'\nexpect = '" + "g" * 64 + "'", "expect is 'ggg"),
        ("firmware = ", "is neither JSON nor TOML"),
        ("{", "is neither JSON nor TOML"),
        ("{" * 100_000, "is neither JSON nor TOML"),
        ("\udcff", "is neither JSON nor TOML"),
    ],
)
def test_bad_recipe(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "r")
    with pytest.raises(RecipeError, match=message):
        load_explanation(tmp_path / "r")


def test_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match="no such file"):
        load_recipe(tmp_path / "r")


@given(st.binary(max_size=200))
def test_never_crashes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("recipe") / "r"
    path.write_bytes(content)
    with pytest.raises(RecipeError):
        load_recipe(path)


def explanation(folder: Path, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "firmware": folder / "OVMF.fd", "kernel": folder / "vmlinuz", "initrd": folder / "initrd.img", "append": "a=1 b=2",
    }  # fmt: skip
    return launch_digest(**arguments | changes).to_dict(explain=True)


def test_equal(folder: Path) -> None:
    assert compare_explanations(explanation(folder), explanation(folder)) == []


def test_explanation_round_trip(folder: Path) -> None:
    (folder / "e.json").write_text(json.dumps(explanation(folder)))
    assert compare_explanations(explanation(folder), load_explanation(folder / "e.json")) == []
    (folder / "r.toml").write_text(TOML.replace("console=ttyS0", "a=1 b=2").replace('"amd"', '"none"'))
    assert compare_explanations(load_explanation(folder / "r.toml"), load_explanation(folder / "e.json")) == []


def test_first_difference_firmware(folder: Path) -> None:
    (folder / "other.fd").write_bytes(ovmf.good(size=4096))
    found = compare_explanations(explanation(folder), explanation(folder, firmware=folder / "other.fd", append="a=1"))
    assert (found[0].piece, found[0].field, found[0].left, found[0].right) == ("firmware", "bytes", "8192", "4096")
    assert [item.piece for item in found] == ["firmware", "firmware", *["command line"] * 3, "hash table"]


def test_difference_in_the_command_line(folder: Path) -> None:
    found = compare_explanations(explanation(folder), explanation(folder, append="a=1 c=2"))
    assert str(found[0]) == "command line: text from character 4 is 'b=2' on the left, 'c=2' on the right"
    found = compare_explanations(explanation(folder), explanation(folder, append="a=1 b=2 more"))
    assert (found[0].left, found[0].right) == ("the end", "' more'")
    found = compare_explanations(explanation(folder), explanation(folder, append=None))
    assert (found[0].left, found[0].right) == ("'a=1 b=2'", "absent")


def test_difference_in_the_initrd(folder: Path) -> None:
    (folder / "other").write_bytes(b"INITRD")
    found = compare_explanations(explanation(folder), explanation(folder, initrd=folder / "other"))
    assert (found[0].piece, found[0].field) == ("initrd", "sha256")
    assert [item.piece for item in found] == ["initrd", "hash table"]


def test_difference_in_the_number_of_pieces(folder: Path) -> None:
    found = compare_explanations(explanation(folder, vmsa="amd"), explanation(folder, vmsa="amd", vcpus=3))
    assert [(item.piece, item.left, item.right) for item in found] == [
        ("VMSA 1", "absent", "4096 bytes"),
        ("VMSA 2", "absent", "4096 bytes"),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digest": "00"}, "digest has 2 characters"),
        ({"digest": None}, "digest is None"),
        ({"pieces": "x"}, "pieces is str; expected a list"),
        ({"inputs": None}, "inputs is NoneType; expected a list"),
        ({"pieces": [7]}, r"pieces\[0\]: has no name"),
        ({"pieces": [{"name": "a", "bytes": "many"}]}, r"pieces\[0\].bytes is 'many'"),
        ({"pieces": [{"name": "a", "bytes": 1}]}, r"pieces\[0\].sm3 is None"),
        ({"append": 5}, "append is 5"),
    ],
)
def test_bad_explanation(folder: Path, change: dict[str, Any], message: str) -> None:
    (folder / "e.json").write_text(json.dumps(explanation(folder) | change))
    with pytest.raises(RecipeError, match=message):
        load_explanation(folder / "e.json")
