"""`csvfast image unpack`."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import pytest
import typer
from image.archives import entry, tar, write_layout

from csvfast.cli import main

# Making the tree of all commands takes longer than most of these.
_command = functools.cache(typer.main.get_command)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: a clear image "one", the same encrypted in another layout, and its key."""
    monkeypatch.setattr(typer.main, "get_command", _command)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OCICRYPT_KEYPROVIDER_CONFIG", raising=False)
    base = tar(entry("bin/sh", b"#!", mode=0o755), entry("etc/passwd", b"ann:x:7:8::/home/ann:\n"))
    write_layout(tmp_path / "app", [base, tar(entry("etc/motd", b"hello"))], Cmd=["/bin/sh"], User="ann", Env=["A=1"])
    assert main(["image", "new-key", "images.key"]) == 0
    assert main(["image", "encrypt", "oci:app:one", "oci:sealed:one", "--to", "kek:images.key"]) == 0
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    capsys.readouterr()
    assert main(["image", "unpack", *arguments]) == code
    shown = capsys.readouterr()
    return shown.err if code else shown.out


@pytest.mark.skipif(os.geteuid() != 0, reason="only root sets owners")
def test_a_bundle(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, "oci:sealed:one", "bundle", "--key", "kek:images.key", "--encrypted-only", "--owners")
    assert "2 layers (2 encrypted), 3 entries" in shown
    specification = json.loads((folder / "bundle/config.json").read_text())
    assert specification["root"]["path"] == "rootfs"
    assert specification["process"]["args"] == ["/bin/sh"]
    assert (specification["process"]["user"]["uid"], specification["process"]["user"]["gid"]) == (7, 8)
    assert (folder / "bundle/rootfs/etc/motd").read_bytes() == b"hello"
    assert (folder / "bundle").stat().st_mode & 0o777 == 0o700
    run(capsys, "oci:app:one", "other", "--command", "/x", "--command", "y", "--owners")
    assert json.loads((folder / "other/config.json").read_text())["process"]["args"] == ["/x", "y"]


def test_only_the_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = json.loads(run(capsys, "oci:sealed:one", "tree", "--key", "kek:images.key", "--rootfs-only", "--json"))
    assert (shown["directory"], shown["entries"], [one["encrypted"] for one in shown["layers"]]) == ("tree", 3, [True, True])
    assert sorted(path.name for path in (folder / "tree").iterdir()) == ["bin", "etc"]


def test_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["image", "new-key", "wrong.key"]) == 0
    before = sorted(path.name for path in folder.iterdir())
    assert "no key was given" in run(capsys, "oci:sealed:one", "x", code=2)
    assert run(capsys, "oci:sealed:one", "x", "--key", "kek:wrong.key", code=1)
    assert "expected an encrypted layer" in run(capsys, "oci:app:one", "x", "--encrypted-only", code=2)
    assert "the limit is" in run(capsys, "oci:app:one", "x", "--size-limit", "10B", code=2)
    assert "more than 2 entries" in run(capsys, "oci:app:one", "x", "--entry-limit", "2", code=2)
    assert "only root does" in run(capsys, "oci:app:one", "x", "--rootless", code=2)
    assert "exists" in run(capsys, "oci:app:one", "app", code=2)
    assert "--rootfs-only" in run(capsys, "oci:app:one", "x", "--rootfs-only", "--command", "y", code=2)
    assert "--size-limit" in run(capsys, "oci:app:one", "x", "--size-limit", "0B", code=2)
    assert "expected linux/mips" in run(capsys, "oci:app:one", "x", "--platform", "linux/mips", code=2)
    assert sorted(path.name for path in folder.iterdir()) == before
