"""`csvfast measure ...` as a script sees it: stdout, stderr and the exit code of a real process."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from reference import ovmf_images as ovmf
from reference.merkle import merkle

from csvfast.measure import launch_digest, measure_image

OK, CHECK_FAILED, USAGE, ENVIRONMENT = range(4)


def run(*arguments: object, data: bytes | None = None) -> subprocess.CompletedProcess[str]:
    answer = subprocess.run(
        [sys.executable, "-P", "-m", "csvfast", "measure", *map(str, arguments)],
        input=data,
        stdin=None if data is not None else subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=120,
    )
    return subprocess.CompletedProcess(answer.args, answer.returncode, answer.stdout.decode(), answer.stderr.decode())


def good(*arguments: object, data: bytes | None = None) -> Any:
    answer = run(*arguments, "--json", data=data)
    assert answer.returncode == OK, answer
    return json.loads(answer.stdout)


def bad(code: int, message: str, *arguments: object) -> None:
    answer = run(*arguments)
    assert answer.returncode == code, answer
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr
    assert answer.stderr.startswith(("csvfast: error: ", "Usage: ")), answer.stderr


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "image").write_bytes((bytes(range(251)) * 5000)[: 300 * 4096])
    return tmp_path / "image"


@pytest.fixture
def launch(tmp_path: Path) -> dict[str, Path]:
    content = {"firmware": ovmf.good(), "kernel": b"kernel", "initrd": b"initrd"}
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    return {name: tmp_path / name for name in content}


def options(launch: dict[str, Path]) -> list[object]:
    return [part for name, path in launch.items() for part in (f"--{name}", path)]


# ---- image -----------------------------------------------------------------------------------------------------------


def test_image(image: Path) -> None:
    record = good("image", image)
    assert record["digest"] == hashlib.new("sm3", image.read_bytes()).hexdigest()
    assert record["bytes"] == 300 * 4096
    assert record["mode"] == "linear"
    assert record["path"] == str(image)
    plain = run("image", image)
    assert plain.stdout == f"{record['digest']}  {image}\n"
    assert plain.stderr == ""


def test_image_tree(image: Path) -> None:
    for access in ("read", "mmap"):
        record = good("image", image, "--mode", "tree", "--threads", 2, "--access", access)
        assert record["digest"] == merkle(image.read_bytes())[0].hex()


def test_image_standard_input(image: Path) -> None:
    data = image.read_bytes()
    for mode in ("linear", "tree"):
        assert good("image", "-", "--mode", mode, data=data)["digest"] == measure_image(image, mode).hexdigest  # type: ignore[arg-type]


def test_several_images(image: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"abc")
    records = good("image", image, tmp_path / "other")["images"]
    assert [record["path"] for record in records] == [str(image), str(tmp_path / "other")]
    assert records[1]["digest"] == "66c7f0f462eeedd9d1f2d46bdc10e4e24167c4875cf2f7a2297da02b8f4ba8e0"
    assert run("image", image, tmp_path / "other").stdout.count("\n") == 2


def test_image_expect(image: Path) -> None:
    digest = hashlib.new("sm3", image.read_bytes()).hexdigest()
    assert good("image", image, "--expect", digest.upper())["match"] is True
    wrong = digest[:-1] + ("0" if digest[-1] != "0" else "1")
    answer = run("image", image, "--expect", wrong, "--json")
    assert answer.returncode == CHECK_FAILED
    assert json.loads(answer.stdout)["match"] is False
    assert answer.stderr == "csvfast: error: the digest is not the expected one\n"


def test_image_usage(image: Path) -> None:
    bad(USAGE, "--expect is 'zz", "image", image, "--expect", "zz" * 32)
    bad(USAGE, "--expect has 4 characters; expected 64", "image", image, "--expect", "abcd")
    bad(USAGE, "given with 2 files", "image", image, image, "--expect", "00" * 32)
    bad(USAGE, "--mode", "image", image, "--mode", "square")
    bad(USAGE, "--threads", "image", image, "--threads", "0")
    bad(USAGE, "", "image")
    bad(USAGE, "--nonsense", "image", image, "--nonsense")


def test_image_environment(tmp_path: Path) -> None:
    bad(ENVIRONMENT, "nothing: no such file", "image", tmp_path / "nothing")
    bad(ENVIRONMENT, "is a directory", "image", tmp_path)
    bad(ENVIRONMENT, "no such file", "image", tmp_path / "nothing", "--mode", "tree")


def test_empty_tree_is_usage(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    bad(USAGE, "a tree needs at least one", "image", tmp_path / "empty", "--mode", "tree")


def test_file_changed_meanwhile(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(3 << 30)
    program = [sys.executable, "-P", "-m", "csvfast", "measure", "image", str(tmp_path / "large")]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_until_open(process, tmp_path / "large")
        os.truncate(tmp_path / "large", 4096)
        output, error = process.communicate(timeout=60)
    assert process.returncode == ENVIRONMENT
    assert output == ""
    assert "it shrank while it was measured" in error


def wait_until_open(process: subprocess.Popen[str], path: Path) -> None:
    folder = Path(f"/proc/{process.pid}/fd")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if any(link.exists() and link.resolve() == path for link in folder.iterdir()):
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} was not opened")


def test_interrupt(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "silent")
    keep = os.open(tmp_path / "silent", os.O_RDWR)
    program = [sys.executable, "-P", "-m", "csvfast", "measure", "image", str(tmp_path / "silent")]
    try:
        with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            wait_until_open(process, tmp_path / "silent")
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            output, error = process.communicate(timeout=30)
    finally:
        os.close(keep)
    assert (process.returncode, output) == (130, "")
    assert "Traceback" not in error


def in_a_terminal(*arguments: object) -> tuple[str, str]:
    """stdout through a pipe, stderr on a terminal of 100 columns."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    program = [sys.executable, "-P", "-m", "csvfast", "measure", *map(str, arguments)]
    environment = os.environ | {"TERM": "xterm"}  # a caller's TERM=dumb would ask for plain text
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=follower, stdin=subprocess.DEVNULL, env=environment
    ) as process:
        os.close(follower)
        shown = b""
        while True:
            try:
                part = os.read(leader, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            shown += part
        assert process.stdout is not None
        output = process.stdout.read()
    os.close(leader)
    return output.decode(), shown.decode()


def test_progress_bar_on_a_terminal_only(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(96 << 20)
    output, shown = in_a_terminal("image", tmp_path / "large")
    assert "measuring" in shown
    assert "/s" in shown
    assert output.endswith("large\n")
    _, shown = in_a_terminal("image", tmp_path / "large", "--json")
    assert shown == ""


# ---- verity ----------------------------------------------------------------------------------------------------------


def test_verity(image: Path, tmp_path: Path) -> None:
    record = good("verity", image, "--salt", "00ff", "--hash-file", tmp_path / "area")
    root = merkle(image.read_bytes(), salt=b"\x00\xff")[0].hex()
    assert record["root_hash"] == root
    assert record["salt"] == "00ff"
    assert (record["data_blocks"], record["hash_blocks"]) == (300, 4)
    assert (tmp_path / "area").stat().st_size == 5 * 4096
    assert good("verity", "--salt", "00ff", "--json", image)["root_hash"] == root
    assert good("verity", "-", "--salt", "00ff", data=image.read_bytes())["root_hash"] == root
    plain = run("verity", image, "--salt", "00ff")
    assert f"Root hash:       {root}\n" in plain.stdout
    check = good("verity", image, "--verify", "--hash-file", tmp_path / "area", "--expect", root)
    assert check["ok"] is True


@pytest.mark.parametrize("salt", ["-", ""])
def test_verity_without_salt(image: Path, salt: str) -> None:
    assert good("verity", image, f"--salt={salt}")["root_hash"] == merkle(image.read_bytes())[0].hex()


def test_verity_settings(image: Path, tmp_path: Path) -> None:
    settings: list[object] = [
        "--salt", "ab", "--data-block-size", 1024, "--hash-block-size", 512, "--format", 0, "--no-superblock",
    ]  # fmt: skip
    record = good("verity", image, *settings, "--hash-file", tmp_path / "area", "--data-blocks", 1000)
    root, area = merkle(image.read_bytes()[: 1000 * 1024], 1024, 512, b"\xab", 0)
    assert record["root_hash"] == root.hex()
    assert record["uuid"] is None
    assert (tmp_path / "area").read_bytes() == area
    verify = ["--verify", "--hash-file", tmp_path / "area", "--expect", root.hex(), "--data-blocks", 1000]
    assert good("verity", image, *settings, *verify)["ok"] is True


def test_verity_finds_damage(image: Path, tmp_path: Path) -> None:
    root = good("verity", image, "--hash-file", tmp_path / "area")["root_hash"]
    content = bytearray(image.read_bytes())
    content[4096 * 7] ^= 1
    image.write_bytes(content)
    verify = ["verity", image, "--verify", "--hash-file", tmp_path / "area", "--expect", root]
    bad(CHECK_FAILED, "1 of 300 data blocks do not match their hashes, the first is block 7 at byte 28672", *verify)
    answer = run(*verify, "--json")
    assert answer.returncode == CHECK_FAILED
    assert json.loads(answer.stdout)["ok"] is False


def test_verity_warns_of_a_partial_block(image: Path) -> None:
    image.write_bytes(image.read_bytes() + b"tail")
    answer = run("verity", image, "--salt", "00", "--json")
    assert answer.returncode == OK
    assert json.loads(answer.stdout)["uncovered_bytes"] == 4
    assert "warning" in answer.stderr
    assert "the last 4 bytes are no whole block" in answer.stderr


def test_verity_expect(image: Path) -> None:
    root = merkle(image.read_bytes(), salt=b"\x01")[0].hex()
    assert good("verity", image, "--salt", "01", "--expect", root)["match"] is True
    bad(CHECK_FAILED, "the digest is not the expected one", "verity", image, "--salt", "02", "--expect", root)


def test_verity_usage(image: Path, tmp_path: Path) -> None:
    area = tmp_path / "area"
    bad(USAGE, "--salt: 'xyz' is not an even number of hexadecimal digits", "verity", image, "--salt", "xyz")
    bad(USAGE, "--salt: 'abc'", "verity", image, "--salt", "abc")
    bad(USAGE, "salt has 257 bytes; expected at most 256", "verity", image, "--salt", "00" * 257)
    bad(USAGE, "data block size is 1000", "verity", image, "--data-block-size", 1000)
    bad(USAGE, "hash type is 3", "verity", image, "--format", 3)
    bad(USAGE, "--uuid: 'x' is no UUID", "verity", image, "--uuid", "x")
    bad(USAGE, "--verify: expected --hash-file", "verity", image, "--verify")
    bad(
        USAGE,
        "expected --salt",
        "verity",
        image,
        "--verify",
        "--no-superblock",
        "--hash-file",
        area,
        "--expect",
        "00" * 32,
    )
    area.write_bytes(bytes(8192))
    bad(USAGE, "superblock begins with", "verity", image, "--verify", "--hash-file", area, "--expect", "00" * 32)


def test_verity_environment(image: Path, tmp_path: Path) -> None:
    bad(ENVIRONMENT, "no such file", "verity", tmp_path / "nothing", "--salt", "00")
    bad(ENVIRONMENT, "cannot be written", "verity", image, "--hash-file", tmp_path / "nowhere" / "area")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image"]


# ---- launch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vmsa", ["none", "amd"])
def test_launch(launch: dict[str, Path], vmsa: str) -> None:
    expected = launch_digest(**launch, append="quiet", vmsa=vmsa).hexdigest  # type: ignore[arg-type]
    record = good("launch", *options(launch), "--append", "quiet", "--vmsa", vmsa)
    assert record["digest"] == expected
    assert run("launch", *options(launch), "--append", "quiet", "--vmsa", vmsa).stdout == expected + "\n"


def test_launch_vcpus(launch: dict[str, Path]) -> None:
    record = good("launch", *options(launch), "--vmsa", "amd", "--vcpus", 4, "--cpu-signature", "0x900f01")
    expected = launch_digest(**launch, vmsa="amd", vcpus=4, cpu_signature=0x900F01)
    assert record["digest"] == expected.hexdigest


def test_launch_initrd_from_standard_input(launch: dict[str, Path]) -> None:
    expected = launch_digest(**launch).hexdigest
    arguments = ["--firmware", launch["firmware"], "--kernel", launch["kernel"], "--initrd", "-"]
    assert good("launch", *arguments, data=b"initrd")["digest"] == expected


def test_launch_explain(launch: dict[str, Path]) -> None:
    outcome = launch_digest(**launch, append="quiet", vmsa="amd")
    text = run("launch", *options(launch), "--append", "quiet", "--vmsa", "amd", "--explain").stdout
    for piece in outcome.pieces:
        assert f"{piece.name}: {piece.size} bytes" in text
        assert f"sm3      {piece.sm3.hex()}" in text
        assert f"running  {piece.running.hex()}" in text
    for item in outcome.inputs:
        assert f"sha256   {item.sha256.hex()}" in text
    assert text.endswith(f"launch digest: {outcome.hexdigest}\n")
    record = good("launch", *options(launch), "--append", "quiet", "--vmsa", "amd", "--explain")
    assert [piece["sm3"] for piece in record["pieces"]] == [piece.sm3.hex() for piece in outcome.pieces]


def test_launch_recipe_and_diff(launch: dict[str, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    text = 'firmware = "firmware"\nkernel = "kernel"\ninitrd = "initrd"\nappend = "quiet"\n'
    recipe.write_text(text)
    digest = launch_digest(**launch, append="quiet").hexdigest
    assert good("launch", "--recipe", recipe)["digest"] == digest
    assert good("launch", *options(launch), "--append", "quiet", "--diff", recipe)["equal"] is True
    answer = run("launch", *options(launch), "--append", "quick", "--diff", recipe)
    assert answer.returncode == CHECK_FAILED
    assert "command line: text from character 3\n    left   'ck'\n    right  'et'" in answer.stdout
    assert "first in: command line" in answer.stderr
    saved = tmp_path / "saved.json"
    saved.write_text(run("launch", "--recipe", recipe, "--explain", "--json").stdout)
    assert good("launch", "--recipe", recipe, "--diff", saved)["equal"] is True
    recipe.write_text(text + f'expect = "{"00" * 32}"\n')
    bad(CHECK_FAILED, "the digest is not the expected one", "launch", "--recipe", recipe)
    assert run("launch", "--recipe", recipe, "--expect", digest).returncode == OK


def test_launch_usage(launch: dict[str, Path], tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(bytes(4096))
    empty = tmp_path / "no-area"
    empty.write_bytes(ovmf.good(area=(0, 0)))
    bad(USAGE, "--firmware is missing", "launch")
    bad(USAGE, "no GUID table", "launch", "--firmware", plain, "--kernel", launch["kernel"])
    bad(
        USAGE,
        "hash table area is empty (base 0x0, size 0)",
        "launch",
        "--firmware",
        empty,
        "--kernel",
        launch["kernel"],
    )
    bad(USAGE, "initrd is given without a kernel", "launch", "--firmware", plain, "--initrd", launch["initrd"])
    bad(USAGE, "--vmsa", "launch", "--firmware", plain, "--vmsa", "intel")
    bad(USAGE, "vcpus is 0", "launch", "--firmware", plain, "--vmsa", "amd", "--vcpus", 0)
    bad(USAGE, "--cpu-signature: 'x' is no number", "launch", "--firmware", plain, "--cpu-signature", "x")
    bad(USAGE, "--recipe: given together", "launch", "--firmware", plain, "--recipe", plain)
    bad(USAGE, "neither JSON nor TOML", "launch", "--recipe", plain)


def test_launch_forced_table_warns(launch: dict[str, Path], tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(bytes(4096))
    answer = run("launch", "--firmware", plain, "--kernel", launch["kernel"], "--force-hash-table")
    assert answer.returncode == OK
    assert "warning: hash table added" in answer.stderr


def test_launch_environment(launch: dict[str, Path], tmp_path: Path) -> None:
    bad(ENVIRONMENT, "nothing: no such file", "launch", "--firmware", tmp_path / "nothing")
    bad(ENVIRONMENT, "is a directory", "launch", "--firmware", launch["firmware"], "--kernel", tmp_path)
    bad(ENVIRONMENT, "no such file", "launch", "--recipe", tmp_path / "nothing")
