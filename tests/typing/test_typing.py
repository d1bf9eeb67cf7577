"""The stubs say what the code does: mypy accepts what must be accepted and refuses what must be refused."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import csvfast
from csvfast import _core

pytest.importorskip("mypy", reason="mypy is not installed")

HERE = Path(__file__).parent
STUBBED = ["sm3", "hmac_sm3", "SM4XTS", "SM4CTR", "SM4GCM", "SM2PublicKey", "SM2PrivateKey", "Secret", "WorkerPool"]


def mypy(tmp_path: Path, name: str) -> str:
    """mypy's output for one file, checked against the installed package and not the checkout."""
    source = tmp_path / name
    source.write_bytes((HERE / name).read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--config-file=", "--no-error-summary", name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout


def test_accepted(tmp_path):
    assert mypy(tmp_path, "accepted.py") == ""


def test_refused(tmp_path):
    wanted = {i for i, line in enumerate((HERE / "refused.py").read_text().splitlines(), 1) if line.endswith("# error")}
    found = {int(number) for number in re.findall(r"^refused\.py:(\d+): error", mypy(tmp_path, "refused.py"), re.M)}
    assert found == wanted


def test_stub_names_exactly_what_the_extension_has():
    stub = Path(_core.__file__).parent / "_core.pyi"
    assert stub.is_file(), "the stub is installed beside the extension"
    declared = set(re.findall(r"^(?:def|class) (\w+)", stub.read_text(encoding="utf-8"), re.M))
    present = {name for name, value in vars(_core).items() if callable(value) and not name.startswith("__")}
    assert declared - present == set()
    # _Output is plumbing; _start runs at import.
    assert present - declared == {"_Output", "_start"}


@pytest.mark.parametrize("name", [*STUBBED, "Engine"])
def test_stub_methods_match(name):
    stub = (Path(_core.__file__).parent / "_core.pyi").read_text(encoding="utf-8")
    body = re.search(rf"^class {name}\b.*?(?=^\S|\Z)", stub, re.M | re.S)
    assert body is not None
    declared = set(re.findall(r"    def (\w+)", body.group())) - {"__init__", "__buffer__", "__len__"}
    present = {member for member in vars(getattr(_core, name)) if not member.startswith("_")}
    assert declared == present


def test_everything_public_is_documented():
    for module in (csvfast, csvfast.crypto, csvfast.memory):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) or callable(value):
                assert value.__doc__, name
    for name in (*STUBBED, "EncryptedMemory"):
        assert "Thread-safety" in getattr(csvfast, name).__doc__
        for member, value in vars(getattr(csvfast, name)).items():
            if not member.startswith("_") and callable(value):
                assert value.__doc__, (name, member)


def test_signatures_can_be_inspected():
    assert str(inspect.signature(csvfast.SM4XTS.encrypt)) == "(self, /, data, unit=0, out=None)"
    assert str(inspect.signature(csvfast.SM4XTS)) == "(key, *, standard='gb', unit_size=4096, pool=None)"
    assert str(inspect.signature(csvfast.SM2PrivateKey.sign)) == "(self, /, message, *, user_id=b'1234567812345678')"
    for name in (*STUBBED, "EncryptedMemory"):
        assert inspect.signature(getattr(csvfast, name)).parameters
    assert list(inspect.signature(csvfast.EncryptedMemory.write).parameters) == ["self", "address", "data", "asid"]
