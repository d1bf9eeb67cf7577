"""`csvfast runtime`: an OCI runtime's life cycle, its state, its refusals; kills of its monitor."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("unicorn")

from runtime.sandbox_rig import Demo, alive, family, search, secrets, wait_for

from csvfast.cli import main
from csvfast.runtime.state import read_state

TEXT = b"hello from the container\n"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    with Demo(tmp_path_factory.mktemp("oci")) as demo:
        yield demo
        assert list(demo.root.iterdir()) == []
        demo.assert_clean()


def runtime(demo: Demo, *arguments: str, code: int = 0, **streams: Any) -> subprocess.CompletedProcess[bytes]:
    line = ["runtime", "--root", str(demo.root), "--log", str(demo.folder / "log"), *arguments]
    if arguments[0] == "create":  # whose standard streams become the container's
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
        done = subprocess.run([sys.executable, "-m", "csvfast", *line], timeout=60, check=False, **streams)
    else:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            returned = main(line)
        done = subprocess.CompletedProcess(line, returned, out.getvalue().encode(), err.getvalue().encode())
    assert done.returncode == code, done.stderr
    return done


def state(demo: Demo, identifier: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(runtime(demo, "state", identifier).stdout)
    return found


def bundle(demo: Demo, folder: Path, args: list[str], **annotations: str) -> Path:
    folder.mkdir(exist_ok=True)
    options = demo.allowed(args=args, memory=128 << 20)
    config = {
        "ociVersion": "1.0.2",
        "process": {"args": args, "env": [], "cwd": "/", "terminal": False},
        "root": {"path": "rootfs"},
        "annotations": {
            "org.csvfast.image": demo.image, "org.csvfast.executor": "emulator", "org.csvfast.broker": options.broker,
            "org.csvfast.chip": options.chip, "org.csvfast.memory": "128MiB", **annotations,
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def create(demo: Demo, identifier: str, folder: Path, out: Path) -> int:
    """With the container's output in a file. Out: what the pid file says."""
    pid_file = folder / "pid"
    with out.open("wb") as stdout:
        runtime(demo, "create", "--bundle", str(folder), "--pid-file", str(pid_file), identifier,
                stdout=stdout, stderr=subprocess.DEVNULL)  # fmt: skip
    return int(pid_file.read_text())


def test_life_cycle(demo: Demo, tmp_path: Path) -> None:
    folder = bundle(demo, tmp_path / "bundle", ["/bin/program", "hello"])
    pid = create(demo, "one", folder, tmp_path / "out")
    found = state(demo, "one")
    assert (found["ociVersion"], found["id"], found["status"], found["pid"]) == ("1.0.2", "one", "created", pid)
    assert found["bundle"] == str(folder)
    assert found["annotations"]["org.csvfast.image"] == demo.image
    assert found["csvfast"]["executor"] == "emulator"
    assert found["csvfast"]["digest"] == demo.digest(demo.options(args=["/bin/program", "hello"], memory=128 << 20))
    assert found["csvfast"]["statement"].startswith("encrypted are")
    assert alive(pid)
    assert (tmp_path / "out").read_bytes() == b""  # it was not started
    rows = json.loads(runtime(demo, "list", "--json").stdout)
    assert [(row["id"], row["status"]) for row in rows] == [("one", "created")]
    assert b"one" in runtime(demo, "list").stdout
    runtime(demo, "start", "one")
    wait_for(lambda: read_state(demo.root, "one")[0]["status"] == "stopped")
    wait_for(lambda: not alive(pid))
    assert (tmp_path / "out").read_bytes() == TEXT
    found = state(demo, "one")
    assert found["csvfast"]["exitCode"] == 7
    assert "pid" not in found
    assert b"stopped" in runtime(demo, "start", "one", code=3).stderr
    assert b"stopped" in runtime(demo, "kill", "one", "TERM", code=3).stderr
    runtime(demo, "delete", "one")
    assert b"there is no container one" in runtime(demo, "state", "one", code=3).stderr
    assert b"there is no container one" in runtime(demo, "delete", "one", code=3).stderr
    runtime(demo, "delete", "--force", "one")


def test_signals_and_force(demo: Demo, tmp_path: Path) -> None:
    folder = bundle(demo, tmp_path / "bundle", ["/bin/program", "hold"])
    pid = create(demo, "two", folder, tmp_path / "out")
    assert b"is there already" in runtime(demo, "create", "--bundle", str(folder), "two", code=3).stderr
    runtime(demo, "start", "two")
    wait_for(lambda: b"holding" in (tmp_path / "out").read_bytes())
    assert state(demo, "two")["status"] == "running"
    assert json.loads(runtime(demo, "timings", "two").stdout)["marks"]["first output"] > 0
    assert b"is running" in runtime(demo, "delete", "two", code=3).stderr
    assert b"expected a name" in runtime(demo, "kill", "two", "NONE", code=2).stderr
    everything = family(pid)
    runtime(demo, "kill", "two", "SIGTERM")
    wait_for(lambda: not alive(pid))
    assert (tmp_path / "out").read_bytes() == b"holding\nstopped\n"
    assert state(demo, "two")["csvfast"]["exitCode"] == 42
    runtime(demo, "delete", "two")
    wait_for(lambda: not any(alive(one) for one in everything))

    pid = create(demo, "two", folder, tmp_path / "out")
    everything = family(pid)
    runtime(demo, "start", "two")
    runtime(demo, "delete", "--force", "two")
    assert not alive(pid)
    wait_for(lambda: not any(alive(one) for one in everything))

    (demo.root / "damaged").mkdir()
    (demo.root / "damaged" / "state.json").write_text("{")
    assert b"no JSON" in runtime(demo, "delete", "damaged", code=3).stderr
    runtime(demo, "delete", "--force", "damaged")
    assert not (demo.root / "damaged").exists()


def test_kill_9_and_created_only(demo: Demo, tmp_path: Path) -> None:
    folder = bundle(demo, tmp_path / "bundle", ["/bin/program", "hold"])
    pid = create(demo, "three", folder, tmp_path / "out")
    runtime(demo, "kill", "three", "KILL")  # never started
    wait_for(lambda: not alive(pid))
    assert state(demo, "three")["status"] == "stopped"
    runtime(demo, "delete", "three")


def test_the_monitor_is_killed(demo: Demo, tmp_path: Path) -> None:
    folder = bundle(demo, tmp_path / "bundle", ["/bin/program", "hold"])
    pid = create(demo, "four", folder, tmp_path / "out")
    runtime(demo, "start", "four")
    wait_for(lambda: b"holding" in (tmp_path / "out").read_bytes())
    everything = family(pid)
    assert len(everything) > 2
    os.kill(pid, 9)
    wait_for(lambda: not any(alive(one) for one in everything))
    assert state(demo, "four")["status"] == "stopped"
    assert b"stopped" in runtime(demo, "kill", "four", "KILL", code=3).stderr
    assert search([demo.root], secrets()) == []
    runtime(demo, "list")
    assert not (demo.root / "four" / "work").exists()
    runtime(demo, "delete", "four")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"annotations": {}}, "org.csvfast.image"),
        ({"process": {"terminal": True}}, "terminal"),
        ({"process": {"args": "text"}}, "process.args"),
        ({"process": []}, None),
        ({"annotations": {"org.csvfast.image": "docker://"}}, "image"),
        ({"annotations": {"org.csvfast.image": "oci:/nowhere", "org.csvfast.executor": "magic"}}, "executor 'magic'"),
        ({"annotations": {"org.csvfast.image": "oci:/nowhere/at-all"}}, "/nowhere/at-all"),
    ],
)
def test_bundles_that_cannot_be(demo: Demo, tmp_path: Path, change: dict[str, Any], words: str | None) -> None:
    folder = bundle(demo, tmp_path / "bundle", ["/bin/program"])
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    line = [sys.executable, "-m", "csvfast", "runtime", "--root", str(demo.root), "--log", str(tmp_path / "log"), "create"]
    done = subprocess.run([*line, "-b", str(folder), "bad"], capture_output=True, timeout=60, check=False)
    assert done.returncode in (1, 2, 3)
    text = done.stderr.decode()
    assert text.startswith("csvfast: error: ")
    assert text.count("\n") == 1, text
    if words is not None:
        assert words in text
    assert json.loads((tmp_path / "log").read_text().splitlines()[-1])["level"] == "error"
    assert not (demo.root / "bad").exists()


def test_no_bundle(demo: Demo, tmp_path: Path) -> None:
    assert b"config.json" in runtime(demo, "create", "--bundle", str(tmp_path), "none", code=3).stderr


def test_a_denied_container_leaves_nothing(demo: Demo, tmp_path: Path) -> None:
    folder = bundle(demo, tmp_path / "bundle", ["/bin/program"])
    demo.broker.allow("33" * 32)
    done = runtime(demo, "create", "--bundle", str(folder), "denied", code=1)
    assert b"csvfast: error: broker: " in done.stderr
    assert not (demo.root / "denied").exists()


def test_measure_tells_the_digest_in_advance(demo: Demo, tmp_path: Path) -> None:
    folder = bundle(demo, tmp_path / "bundle", ["/bin/program", "hello"])
    options = demo.options(args=["/bin/program", "hello"], memory=128 << 20)
    told = json.loads(runtime(demo, "measure", "--bundle", str(folder), "--json", "--show-configuration").stdout)
    assert told["digest"] == demo.digest(options)
    assert told["configuration"]["policy"]["manifests"] == [told["manifest"]]
    line = runtime(demo, "measure", "--executor", "emulator", "--broker", options.broker, "--memory", "128MiB", demo.image, "--",
                   "/bin/program", "hello")  # fmt: skip
    assert line.stdout.decode().strip() == told["digest"]


def test_a_pod(demo: Demo, tmp_path: Path) -> None:
    """A second and a third container in the sandbox of the first one."""
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({
        "images": ["localhost/demo:1"], "commands": [["/bin/program", "*"]], "users": ["image"], "capabilities": ["default"],
        "signals": True, "containers": 3,
    }))  # fmt: skip
    pod = {"org.csvfast.policy": str(policy)}
    joined = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "pod"}
    ours = {"org.csvfast.sandbox": "pod"}
    first = bundle(demo, tmp_path / "first", ["/bin/program", "hold"], **pod)
    second = bundle(demo, tmp_path / "second", ["/bin/program", "hello"], **joined)
    other = bundle(demo, tmp_path / "other", ["/bin/other"], **joined)
    third = bundle(demo, tmp_path / "third", ["/bin/program", "hold"], **ours)
    demo.broker.allow(demo.digest(demo.options(policy=str(policy), args=["/bin/program", "hold"], memory=128 << 20)))
    pid = create(demo, "pod", first, tmp_path / "out")
    runtime(demo, "start", "pod")
    assert create(demo, "second", second, tmp_path / "out2") == pid
    found = state(demo, "second")
    assert (found["status"], found["csvfast"]["sandbox"], found["bundle"]) == ("created", "pod", str(second))
    runtime(demo, "start", "second")
    wait_for(lambda: read_state(demo.root, "second")[0]["status"] == "stopped")
    assert (tmp_path / "out2").read_bytes() == TEXT
    assert state(demo, "second")["csvfast"]["exitCode"] == 7
    assert state(demo, "pod")["status"] == "running"
    assert [row["id"] for row in json.loads(runtime(demo, "list", "--json").stdout)] == ["pod", "second"]
    assert b"is there already" in runtime(demo, "create", "-b", str(second), "second", code=3).stderr
    runtime(demo, "delete", "second")
    assert not (demo.root / "second").exists()
    assert b"policy: command" in runtime(demo, "create", "-b", str(other), "other", code=1).stderr
    assert not (demo.root / "other").exists()

    create(demo, "third", third, tmp_path / "out3")
    runtime(demo, "start", "third")
    wait_for(lambda: b"holding" in (tmp_path / "out3").read_bytes())
    everything = family(pid)
    os.kill(pid, 9)
    wait_for(lambda: not any(alive(one) for one in everything))
    assert [state(demo, one)["status"] for one in ("pod", "third")] == ["stopped", "stopped"]
    runtime(demo, "delete", "third")
    runtime(demo, "delete", "pod")
    assert b"there is no container pod" in runtime(demo, "create", "-b", str(third), "late", code=3).stderr
