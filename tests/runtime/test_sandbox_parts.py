"""State on disk, options, timings, the cache and its mirror, launch blobs: each by itself."""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from runtime.sandbox_rig import make_clear

from csvfast.crypto import sm3
from csvfast.errors import ArgumentError, ContainerError, ImageError, RegistryError, StateError
from csvfast.image.blobs import VerifiedReader
from csvfast.image.layout import OciLayout
from csvfast.image.manifest import Manifest
from csvfast.image.reference import parse_reference
from csvfast.image.registry import RegistryClient
from csvfast.runtime.control import ControlDoor, ask
from csvfast.runtime.executor import executor_of
from csvfast.runtime.executor_process import launch_blob
from csvfast.runtime.image_cache import image_identity, mirror_image
from csvfast.runtime.mirror import MirrorServer
from csvfast.runtime.options import RunOptions, broker_door, configuration_for, sandbox_plan_of
from csvfast.runtime.state import ContainerDirectory, clean, identifiers, read_state, remove, state_root
from csvfast.runtime.timings import Timings

# ---- State


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return state_root(tmp_path / "states")


def leave_dead(root: Path, identifier: str, *, transient: bool) -> None:
    """A container whose monitor was killed."""
    code = (
        "import os, sys; from pathlib import Path; from csvfast.runtime.state import ContainerDirectory as D\n"
        f"d = D(sys.argv[1], Path(sys.argv[2]), transient={transient}); (d.work / 'file').write_bytes(b'x')\n"
        "d.write({'ociVersion': '1.0.2', 'id': sys.argv[1], 'status': 'running', 'bundle': '', 'pid': 1})\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, identifier, str(root)], check=False, timeout=60)
    assert (root / identifier / "work" / "file").exists()


def test_a_state_while_its_monitor_lives(root: Path) -> None:
    directory = ContainerDirectory("one", root)
    assert read_state(root, "one") == (
        {"ociVersion": "1.0.2", "id": "one", "status": "creating", "bundle": "", "csvfast": {"transient": False}}, True,
    )  # fmt: skip
    with pytest.raises(ContainerError, match="is there already"):
        ContainerDirectory("one", root)
    with pytest.raises(ContainerError, match="has a monitor that lives"):
        remove(root, "one")
    assert directory.path.stat().st_mode & 0o777 == 0o700
    clean(root)
    assert directory.work.is_dir()
    directory.write({"id": "one", "status": "stopped"})
    directory.release()
    assert read_state(root, "one")[0]["status"] == "stopped"
    assert not directory.work.exists()
    remove(root, "one")
    assert list(root.iterdir()) == []


def test_what_a_killed_monitor_left(root: Path) -> None:
    leave_dead(root, "kept", transient=False)
    leave_dead(root, "gone", transient=True)
    state, alive = read_state(root, "kept")
    assert (state["status"], "pid" in state, alive) == ("stopped", False, False)
    clean(root)
    assert list(identifiers(root)) == ["kept"]
    assert not (root / "kept" / "work").exists()
    ContainerDirectory("other", root).remove()
    with pytest.raises(ContainerError, match="is there already"):
        ContainerDirectory("kept", root)
    remove(root, "kept")
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "a b", "x" * 129, "a\n"])
def test_names(root: Path, name: str) -> None:
    with pytest.raises(ArgumentError):
        ContainerDirectory(name, root)
    assert list(root.iterdir()) == []


def test_a_root_of_others(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(StateError, match="0700"):
        state_root(tmp_path / "open")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(StateError):
        state_root(tmp_path / "link")


def test_a_damaged_state(root: Path) -> None:
    directory = ContainerDirectory("one", root)
    (directory.path / "state.json").write_text("{")
    with pytest.raises(ContainerError, match="no JSON"):
        read_state(root, "one")
    (directory.path / "state.json").write_text('{"id": "two"}')
    with pytest.raises(ContainerError, match="expected the state of container one"):
        read_state(root, "one")
    directory.remove()


# ---- Options


PIN = "ab" * 32


@pytest.mark.parametrize(
    ("broker", "expected"),
    [
        ("", {"door": "none"}),
        ("verdictd://broker.example:1234", {"door": "verdictd", "address": "broker.example:1234", "pin": PIN}),
        ("verdictd://127.0.0.1:1234", {"door": "verdictd", "address": "10.0.2.2:1234", "pin": PIN}),
        ("verdictd://[::2]:1234", {"door": "verdictd", "address": "[::2]:1234", "pin": PIN}),
        ("kbs+http://localhost:80", {"door": "kbs", "url": "http://10.0.2.2:80", "pin": PIN}),
        ("kbs+https://kbs.example/prefix/", {"door": "kbs", "url": "https://kbs.example/prefix", "pin": PIN}),
    ],
)
def test_brokers(broker: str, expected: dict[str, Any]) -> None:
    assert broker_door(RunOptions(broker=broker, broker_pin=PIN), "10.0.2.2") == expected


def test_a_broker_that_nobody_knows() -> None:
    assert broker_door(RunOptions(broker="verdictd://b:1"), "127.0.0.1")["unattested"] is True


@pytest.mark.parametrize("broker", ["b:1", "http://b", "verdictd://b", "verdictd://b:x", "verdictd://:1", "kbs+http://u@b", "kbs+http://b?x"])
def test_brokers_that_are_none(broker: str) -> None:
    with pytest.raises(ArgumentError, match="broker"):
        broker_door(RunOptions(broker=broker), "127.0.0.1")


def test_the_policy_that_is_made_allows_what_was_asked_for_alone() -> None:
    options = RunOptions(image="oci:x", args=["/bin/[a]*", "?"], env=["A=*"], user="1000", cwd="/w*", stdin=True)
    policy = configuration_for(options, "localhost/x:1", "sha256:" + "a" * 64, "127.0.0.1").policy
    policy.check_image("localhost/x:1")
    policy.check_command(["/bin/[a]*", "?"], [])
    policy.check_environment(["A=*"])
    policy.check_user("1000")
    policy.check_directory("/w*")
    policy.check_flag("stdin")
    policy.check_manifest("sha256:" + "a" * 64, 2)
    for forbidden in (
        lambda: policy.check_image("localhost/y:1"),
        lambda: policy.check_command(["/bin/ax", "?"], []),
        lambda: policy.check_command(["/bin/[a]*", "x"], []),
        lambda: policy.check_command(["own"], ["own"]),
        lambda: policy.check_environment(["A=b"]),
        lambda: policy.check_directory("/work"),
        lambda: policy.check_flag("network"),
        lambda: policy.check_manifest("sha256:" + "b" * 64, 0),
        lambda: policy.check_command(["/bin/sh"], [], executions=True),
    ):
        with pytest.raises(ContainerError) as refusal:
            forbidden()
        assert refusal.value.kind == "policy"


def test_files_instead(tmp_path: Path) -> None:
    (tmp_path / "policy.json").write_text('{"images": ["*"], "commands": ["image"]}')
    made = configuration_for(RunOptions(policy=str(tmp_path / "policy.json")), "x/y", "sha256:" + "0" * 64, "127.0.0.1")
    assert made.policy.images == ("*",)
    (tmp_path / "configuration.json").write_bytes(made.encode())
    again = configuration_for(RunOptions(configuration=str(tmp_path / "configuration.json")), "", "", "")
    assert again.encode() == made.encode()
    (tmp_path / "policy.json").write_text("{")
    with pytest.raises(ArgumentError, match="no JSON"):
        configuration_for(RunOptions(policy=str(tmp_path / "policy.json")), "x/y", "", "")


def test_options_travel() -> None:
    options = RunOptions(image="oci:x", args=["a"], settings={"accel": "tcg"}, memory=1 << 28, plain_http=["h:*"])
    assert RunOptions.from_json(json.loads(json.dumps(options.to_json()))).to_json() == options.to_json()
    with pytest.raises(ArgumentError, match="unknown"):
        RunOptions.from_json({"image": "x", "more": 1})
    with pytest.raises(ArgumentError, match="64 hexadecimal"):
        sandbox_plan_of(RunOptions(expected="abc"), "x", b"{}")


def test_executors_by_name() -> None:
    assert [executor_of(name).name for name in ("vm", "emulator", "native")] == ["vm", "emulator", "native"]
    with pytest.raises(ArgumentError):
        executor_of("docker")
    assert all("administrator" in executor_of(name).statement() for name in ("vm", "emulator", "native"))


def test_the_launch_blob_is_canonical() -> None:
    blob = launch_blob("native", b'{"version":1}')
    assert len(blob) % 4096 == 0
    document = json.loads(blob)
    assert (document["executor"], document["configuration"]) == ("native", '{"version":1}')
    assert blob.rstrip(b"\n") == json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    assert len(bytes.fromhex(document["code_sm3"])) == 32
    assert sm3(launch_blob("emulator", b'{"version":1}')).digest() != sm3(blob).digest()


# ---- Timings


def test_timings() -> None:
    times = Timings()
    with pytest.raises(ValueError, match="x"), times.step("one"):
        raise ValueError("x")
    assert times.mark("first output")
    assert not times.mark("first output")
    times.guest([{"step": "unwrap", "seconds": 0.5}, ["pull", 1], "nonsense", {"step": 1, "seconds": 2}, [1, 2, 3]])
    record = times.record()
    assert [step["step"] for step in record["steps"]] == ["one"]
    assert record["agent"] == [{"step": "unwrap", "seconds": 0.5}, {"step": "pull", "seconds": 1.0}]
    assert "agent: unwrap" in times.table()
    assert "first output" in times.table()


# ---- Cache and mirror


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> OciLayout:
    return make_clear(tmp_path_factory.mktemp("images") / "app", "1")


@pytest.fixture
def registry(layout: OciLayout) -> Iterator[MirrorServer]:
    """Stands for a registry: it is one, with one image."""
    descriptor, data = layout.resolve("1")
    with MirrorServer(layout, "team/app", descriptor, data, Manifest.parse(data)) as server:
        yield server


def test_the_mirror_is_a_registry(layout: OciLayout, registry: MirrorServer) -> None:
    descriptor, data = layout.resolve("1")
    manifest = Manifest.parse(data)
    with RegistryClient(parse_reference(f"docker://{registry.address}/team/app:1")) as client:
        assert client.resolve("1")[1] == data
        assert client.resolve(descriptor.digest)[1] == data
        for blob in (manifest.config, *manifest.layers):
            whole = layout.blob_path(blob.digest).read_bytes()
            with VerifiedReader(client.open_blob(blob), blob) as reader:
                assert b"".join(reader) == whole
            rest = client.open_blob(blob, 100)
            parts = iter(lambda rest=rest: rest.read(65536), b"")
            assert b"".join(parts) == whole[100:]
            rest.close()
    with RegistryClient(parse_reference(f"docker://{registry.address}/team/other:1")) as client, pytest.raises(RegistryError):
        client.resolve("1")


@pytest.mark.parametrize(
    ("path", "header", "status"),
    [
        ("/v2/", None, 200),
        ("/v2/team/app/blobs/sha256:" + "0" * 64, None, 404),
        ("/v2/team/app/manifests/sha256:" + "0" * 64, None, 404),
        ("/v2/team/app/tags/list", None, 404),
        ("/v2/team/app/blobs/../../etc/passwd", None, 404),
        ("/", None, 404),
        ("/v2/team/app/blobs/LAYER", "bytes=5-", 206),
        ("/v2/team/app/blobs/LAYER", "bytes=5-9", 206),
        ("/v2/team/app/blobs/LAYER", "bytes=999999999-", 416),
        ("/v2/team/app/blobs/LAYER", "bytes=-5", 200),
        ("/v2/team/app/blobs/LAYER", "items=1", 200),
    ],
)
def test_what_is_asked_of_the_mirror(
    layout: OciLayout, registry: MirrorServer, path: str, header: str | None, status: int
) -> None:
    layer = Manifest.parse(layout.resolve("1")[1]).layers[0]
    connection = http.client.HTTPConnection(registry.address, timeout=10)
    try:
        connection.request("GET", path.replace("LAYER", layer.digest), headers={"Range": header} if header else {})
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == status
        if header == "bytes=5-9":
            assert body == layout.blob_path(layer.digest).read_bytes()[5:10]
        for method in ("POST", "PUT", "DELETE"):
            connection.close()
            connection.request(method, "/v2/team/app/blobs/uploads/")
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 501
    finally:
        connection.close()


def test_the_cache(layout: OciLayout, registry: MirrorServer, tmp_path: Path) -> None:
    options = RunOptions(image=f"docker://{registry.address}/team/app:1", cache=str(tmp_path / "cache"))
    digest = layout.resolve("1")[0].digest
    name = f"{registry.address}/team/app:1"
    assert image_identity(options) == (name, digest)
    with mirror_image(options, "10.0.2.2", Timings()) as mirror:
        assert (mirror.name, mirror.digest, mirror.cached) == (name, digest, False)
        assert mirror.source is not None
        assert mirror.source.startswith("docker://10.0.2.2:")
        assert mirror.source.endswith(f"/team/app@{digest}")
    registry.close()
    with mirror_image(options, "127.0.0.1", Timings()) as mirror:
        assert mirror.cached
        assert mirror.source is not None
        with RegistryClient(parse_reference(mirror.source)) as client:
            assert client.resolve(digest)[0].digest == digest
    with pytest.raises(RegistryError), mirror_image(RunOptions(**options.to_json() | {"pull": "always"}), "127.0.0.1", Timings()):
        pass
    other = RunOptions(**options.to_json() | {"pull": "never", "image": f"docker://{registry.address}/team/app:2"})
    with pytest.raises(ContainerError, match="is not in"), mirror_image(other, "127.0.0.1", Timings()):
        pass
    with pytest.raises(ArgumentError, match="pull"), mirror_image(RunOptions(image="oci:x", pull="often"), "", Timings()):
        pass


def test_a_cache_that_lost_a_blob_is_filled_again(layout: OciLayout, registry: MirrorServer, tmp_path: Path) -> None:
    options = RunOptions(image=f"docker://{registry.address}/team/app:1", cache=str(tmp_path / "cache"))
    with mirror_image(options, "127.0.0.1", Timings()):
        pass
    layer = Manifest.parse(layout.resolve("1")[1]).layers[0]
    place = next((tmp_path / "cache").rglob(layer.digest.partition(":")[2]))
    os.truncate(place, 10)
    with mirror_image(options, "127.0.0.1", Timings()) as mirror:
        assert not mirror.cached
    assert place.stat().st_size == layer.size


def test_a_layouts_name_does_not_tell_where_it_is(layout: OciLayout) -> None:
    name, digest = image_identity(RunOptions(image=f"oci:{layout.path}:1"))
    assert (name, digest) == ("localhost/app:1", layout.resolve("1")[0].digest)
    with pytest.raises(ImageError):
        image_identity(RunOptions(image=f"oci:{layout.path}:2"))
    with pytest.raises(ArgumentError, match="registries only"), mirror_image(
        RunOptions(image=f"oci:{layout.path}:1", direct=True), "127.0.0.1", Timings()
    ):
        pass


# ---- Requests of other commands


@pytest.fixture
def door(root: Path) -> Iterator[Path]:
    directory = ContainerDirectory("one", root)

    def answer(request: Mapping[str, Any], descriptors: list[int]) -> dict[str, Any]:
        if request["request"] == "keep":
            os.write(descriptors[0], b"kept")
            return {"count": len(descriptors)}
        if request["request"] == "policy":
            raise ContainerError("policy", "not that")
        raise KeyError(request["request"])

    with ControlDoor(directory.path, answer):
        yield root
    directory.remove()


def test_descriptors_travel_and_are_closed(door: Path) -> None:
    read, write = os.pipe()
    assert ask(door, "one", "keep", descriptors=[write, write, write]) == {"count": 3}
    os.close(write)
    assert os.read(read, 10) == b"kept"
    assert os.read(read, 10) == b""  # nobody holds the other end any more
    os.close(read)


def test_an_answer_that_comes_early(door: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The monitor may have answered and closed before the request's sender has looked up."""

    def slow(*arguments: Any) -> int:
        sent = send_fds(*arguments)
        time.sleep(0.1)
        return sent

    send_fds = socket.send_fds
    monkeypatch.setattr(socket, "send_fds", slow)
    read, write = os.pipe()
    assert ask(door, "one", "keep", descriptors=[write]) == {"count": 1}
    os.close(read)
    os.close(write)


def test_who_asks_is_no_monitor(root: Path) -> None:
    ContainerDirectory("one", root).release()
    with (root / "one" / "lock").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert read_state(root, "one")[1] is False
        later = threading.Timer(0.1, fcntl.flock, (other, fcntl.LOCK_UN))
        later.start()
        remove(root, "one")
        later.join()
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("how", ["remove", "clean"])
def test_a_new_container_of_the_same_name_is_not_removed(root: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """It takes the place of the old one between the look at the lock and the removal."""
    ContainerDirectory("one", root, transient=True).release()
    old = ContainerDirectory("one", root, transient=True)
    os.close(old._lock)  # as when its monitor is killed
    old._lock = -1
    new: list[ContainerDirectory] = []
    flock = fcntl.flock

    def replaced(lock: int, operation: int) -> None:
        flock(lock, operation)
        if not new and operation & (fcntl.LOCK_EX if how == "remove" else fcntl.LOCK_SH):
            monkeypatch.undo()
            shutil.rmtree(root / "one")
            new.append(ContainerDirectory("one", root))

    monkeypatch.setattr(fcntl, "flock", replaced)
    with suppress(ContainerError):
        remove(root, "one") if how == "remove" else clean(root)
    assert new[0].work.is_dir()
    assert read_state(root, "one")[1] is True
    new[0].remove()


def test_errors_of_requests(door: Path) -> None:
    with pytest.raises(ContainerError) as refusal:
        ask(door, "one", "policy")
    assert (refusal.value.kind, refusal.value.problem) == ("policy", "not that")
    with pytest.raises(ContainerError, match="KeyError"):
        ask(door, "one", "nonsense")
    with pytest.raises(ContainerError, match="there is no container two"):
        ask(door, "two", "state")


@pytest.mark.parametrize("data", [b"\n", b"{}\n", b"[1]\n", b"\xff\xfe\n", b"{" * 5000 + b"\n", b"no end", b'{"request": 1}\n'])
def test_garbage_on_the_control_socket(door: Path, data: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(door / "one" / "control.sock"))
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer == b"" or "error" in json.loads(answer)
    with pytest.raises(ContainerError, match="not that"):
        ask(door, "one", "policy")
