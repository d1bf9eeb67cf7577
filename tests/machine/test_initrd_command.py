"""`csvfast vm initrd`: options, output, and what it refuses."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest

from csvfast.cli import main
from csvfast.machine.initrd import boot_files

pytestmark = pytest.mark.skipif(
    not (boot_files() / "busybox").is_file(), reason="no guest files: run tools/install-test-tools.sh"
)


def test_small_initrd(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "script").write_text("echo one\necho two\n")
    (tmp_path / "data").write_bytes(b"content")
    out = tmp_path / "initrd"
    options = ["vm", "initrd", "--out", str(out), "--no-python", "--script", str(tmp_path / "script")]
    assert main([*options, "--module", "virtio_blk", "--file", f"/srv/data={tmp_path / 'data'}", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    data = out.read_bytes()
    assert record == {"path": str(out), "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for wanted in (b"etc/csvfast/run\0", b"echo one\necho two\n", b"srv/data\0", b"lib/modules/virtio_blk.ko\0", b"bin/sh\0"):
        assert wanted in data
    assert b"python" not in data
    assert main([*options, "--no-modules", "--compress", "gzip"]) == 0
    assert capsys.readouterr().out.startswith(hashlib.sha256(out.read_bytes()).hexdigest())
    assert b"virtio" not in gzip.decompress(out.read_bytes()).replace(b"/sys/class/virtio-ports", b"").replace(
        b"/dev/virtio-ports", b""
    )


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--run", "a", "--script", "b"], 2, "--run and --script"),
        (["--no-modules", "--module", "x"], 2, "--no-modules"),
        (["--file", "relative=x"], 2, "PLACE=FILE"),
        (["--file", "/place"], 2, "PLACE=FILE"),
        (["--file", "/place=/no/such/file"], 3, "/no/such/file"),
        (["--script", "/no/such/file"], 3, "/no/such/file"),
        (["--module", "no_such_module"], 2, "no_such_module"),
        (["--modules", "/no/such/folder"], 2, "virtio_pci is not in /no/such/folder"),
        (["--busybox", "/no/such/file"], 3, "/no/such/file"),
        (["--busybox", __file__], 2, "ELF"),
        (["--package", "no_such_package"], 2, "no_such_package"),
        (["--file", "/init=" + __file__], 2, "/init"),
        (["--file", "/../x=" + __file__], 2, "/../x"),
        (["--compress", "lzma"], 2, "lzma"),
    ],
)
def test_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, said: str
) -> None:
    python = [] if "--package" in options else ["--no-python"]
    assert main(["vm", "initrd", "--out", str(tmp_path / "initrd"), *python, *options]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "initrd").exists()
