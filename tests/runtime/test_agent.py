"""The agent as a child process: containers by each runner, its policy, what it leaves behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from runtime.agent_images import SECRET_LINE, Registry, encrypt, make_image
from runtime.agent_process import AgentProcess, busybox, leftovers

from csvfast.errors import ContainerError
from csvfast.image.layout import OciLayout
from csvfast.runtime.agent.attest import CertifiedAttester
from csvfast.runtime.agent.configuration import AgentConfiguration
from csvfast.runtime.agent.containers import Bundle, Runner
from csvfast.runtime.agent.processes import Process
from csvfast.runtime.agent.pull import PulledImage
from csvfast.runtime.agent.seccomp import FORBIDDEN, filter_program
from csvfast.runtime.agent.server import Agent, _Container
from csvfast.runtime.agent.spawner import SpawnedProcess, Spawner
from csvfast.runtime.agent_policy import AgentPolicy
from csvfast.runtime.protocol import Connection, Frame

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces without root"),
    pytest.mark.skipif(busybox() is None, reason="no guest files: run tools/install-test-tools.sh"),
]
SHELL = ["/bin/sh", "-c"]
NATIVE = ("runc", "crun", "bwrap")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    layout = OciLayout(tmp_path_factory.mktemp("images") / "layout", True)
    program = busybox()
    assert program is not None
    make_image(layout, program, "clear")
    make_image(layout, program, "user", User="user:user", Entrypoint=["/bin/sh", "-c"], Cmd=["id"])
    make_image(layout, program, "other", architecture="x")
    make_image(layout, program, "volume", Volumes={"/etc": {}, "/data/new": {}})
    encrypt(layout, "clear", "encrypted")
    with Registry(layout) as registry:
        yield registry


def policy(**more: object) -> AgentPolicy:
    usual = {
        "unencrypted": True, "commands": ["image", ["/bin/sh", "-c", "*"]], "executions": [["/bin/sh", "-c", "*"]], "stdin": True,
        "environment": ["WORD=*"], "containers": 4, "users": ["image", "1000:*"], "volumes": ["shared:/*"],
    }  # fmt: skip
    return AgentPolicy.for_one_image("127.0.0.1:*", **usual | more)


def configuration(allowed: AgentPolicy) -> AgentConfiguration:
    return AgentConfiguration(policy=allowed, registries=[{"host": "127.0.0.1:*", "plain_http": True}])


@pytest.fixture(params=["namespaces", "runc", "crun", "bwrap", "emulator"])
def runner(request: pytest.FixtureRequest) -> str:
    if request.param in NATIVE:
        if shutil.which(request.param) is None:
            pytest.skip(f"{request.param} is not installed")
    elif request.param == "emulator":
        pytest.importorskip("unicorn")
    return str(request.param)


def agent_of(runner: str, work: Path, allowed: AgentPolicy | None = None) -> AgentProcess:
    executor = "native" if runner in NATIVE else runner
    agent = AgentProcess(configuration(allowed or policy()), work, executor, runtime=runner if executor == "native" else None)
    assert agent.request("CreateSandbox", sandbox="pod-1")["runner"] == runner
    return agent


def test_container(runner: str, images: Registry, tmp_path: Path) -> None:
    name = f"127.0.0.1:{images.port}/team/app:clear"
    with agent_of(runner, tmp_path / "work") as agent:
        pulled = agent.request("PullImage", image=name)
        assert (pulled["layers"], pulled["encrypted"]) == (2, 0)
        assert agent.run("one", name) == (0, SECRET_LINE, "")
        agent.request("PullImage", image="127.0.0.1:1/any:name", source=name)
        script = "id -u; hostname; echo $WORD $FROM; pwd; cat; echo more >&2; echo x >/tmp/file; cat /tmp/file; exit 7"
        process = {"args": [*SHELL, script], "env": ["WORD=given"]}
        code, out, errors = agent.run("two", "127.0.0.1:1/any:name", b"over stdin\n", process=process)
        assert (code, errors) == (7, "more\n")
        assert out == "0\npod-1\ngiven image\n/work\nover stdin\nx\n"
        # The event may come behind the reply.
        end = time.monotonic() + 10
        while len(agent.events) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        assert [event["exit_code"] for event in agent.events] == [0, 7]
        steps = {step["step"] for step in agent.request("GetTimings")["steps"]}
        assert {"pull", "unpack", "download", "start container"} <= steps
        agent.request("DestroySandbox")
        agent.connection.wait_closed(20)
    assert leftovers(tmp_path / "work") == []


def test_signals_and_further_programs(runner: str, images: Registry, tmp_path: Path) -> None:
    name = f"127.0.0.1:{images.port}/team/app:clear"
    with agent_of(runner, tmp_path / "work") as agent:
        agent.request("PullImage", image=name)
        script = "trap 'echo stopped; exit 3' TERM; echo ready; while true; do sleep 0.05; done"
        made = agent.request("CreateContainer", container="one", image=name, process={"args": [*SHELL, script]})
        agent.request("StartContainer", container="one")
        with pytest.raises(ContainerError, match="started already"):
            agent.request("StartContainer", container="one")
        reader = agent.connection.reader(Frame.STDOUT, made["process"])
        assert reader.read(timeout=30) == b"ready\n"
        assert agent.request("WaitProcess", process=made["process"], seconds=0.01) == {"running": True}
        if runner != "bwrap":
            more = agent.request("ExecProcess", container="one", args=[*SHELL, "cat; exit 9"], stdin=True)
            assert agent.finish(more["process"], b"typed") == (9, "typed", "")
            assert isinstance(agent.request("StatsContainer", container="one"), dict)
            agent.request("SignalProcess", process=made["process"], signal=int(signal.SIGTERM))
            assert agent.finish(made["process"]) == (3, "stopped\n", "")
        else:
            with pytest.raises(ContainerError, match="executor: one: bwrap runs one program"):
                agent.request("ExecProcess", container="one", args=[*SHELL, "true"])
        agent.request("RemoveContainer", container="one")
        with pytest.raises(ContainerError, match="there is no container one"):
            agent.request("StatsContainer", container="one")
    assert leftovers(tmp_path / "work") == []


def test_an_ordinary_user(images: Registry, tmp_path: Path) -> None:
    """bwrap in a user namespace. What everybody can read of a process does not have the environment."""
    if shutil.which("bwrap") is None:
        pytest.skip("bwrap is not installed")
    name = f"127.0.0.1:{images.port}/team/app:clear"
    with AgentProcess(configuration(policy()), tmp_path / "work", "native", ordinary=True) as agent:
        assert agent.request("CreateSandbox", sandbox="pod-1")["runner"] == "bwrap"
        agent.request("PullImage", image=name)
        process = {"args": [*SHELL, "id -u; echo $WORD; cat /etc/secret; cat"], "env": ["WORD=between us"]}
        made = agent.request("CreateContainer", container="one", image=name, process=process, stdin=True)
        agent.request("StartContainer", container="one")
        reader = agent.connection.reader(Frame.STDOUT, made["process"])
        assert reader.read(timeout=20).startswith(b"0\n")
        assert running("/etc/secret")
        assert not running("between us")
        assert agent.finish(made["process"], b"end")[::2] == (0, "")
    assert leftovers(tmp_path / "work") == []


def test_namespaces_are_its_own(images: Registry, tmp_path: Path) -> None:
    """What a container of our own making sees and may do; a pod's containers share network and volumes, not processes."""
    name = f"127.0.0.1:{images.port}/team/app:user"
    with agent_of("namespaces", tmp_path / "work") as agent:
        agent.request("PullImage", image=name)
        script = (
            "id; echo /proc/[0-9]*; ls /sys/class/net; grep -c . /proc/self/mountinfo;"
            "grep -E '^(CapEff|NoNewPrivs)' /proc/self/status;"
            "cat /proc/kcore | wc -c; (echo x >/proc/sys/kernel/hostname) 2>&1; mount -t tmpfs x /tmp 2>&1;"
            "(echo y >/etc/passwd) 2>&1;"
            "ls /dev; readlink /proc/self/ns/net; ls -d /proc/1/root/.. ; echo 1 > /shared/file; cat /nowhere"
        )
        volumes = [{"name": "shared", "path": "/shared"}]
        process = {"args": [*SHELL, script]}
        code, out, errors = agent.run("one", name, process=process, volumes=volumes)
        lines = out.splitlines()
        assert lines[0].startswith("uid=1000(user) gid=1000(user)")
        assert (lines[1], lines[2]) == ("/proc/1", "lo")
        assert "CapEff:\t0000000000000000" in out
        assert "NoNewPrivs:\t1" in out
        assert int(lines[3]) < 40
        assert "Read-only file system" in out or "Permission denied" in out
        assert out.count("ermitted") + out.count("enied") >= 1
        assert {"null", "zero", "urandom", "pts", "shm"} <= set(lines)
        assert (code, "nowhere" in errors) == (1, True)
        network = next(line for line in lines if line.startswith("net:"))
        assert network != str(Path("/proc/self/ns/net").readlink())
        agent.request("PullImage", image=name)
        process = {"args": [*SHELL, "readlink /proc/self/ns/net; cat /shared/file"]}
        code, out, _ = agent.run("two", name, process=process, volumes=volumes)
        assert out.splitlines()[0] == network
        agent.request("PullImage", image=name)
        with pytest.raises(ContainerError, match=r"limit: memory\.max"):
            agent.request("CreateContainer", container="three", image=name, memory=64 << 20)
        made = agent.request("CreateContainer", container="four", image=name, process={"args": [*SHELL, "exec /nothing"]})
        agent.request("StartContainer", container="four")
        assert agent.finish(made["process"])[0] == 127
    assert leftovers(tmp_path / "work") == []


def test_system_calls_that_are_forbidden(images: Registry, tmp_path: Path) -> None:
    name = f"127.0.0.1:{images.port}/team/app:clear"
    with agent_of("namespaces", tmp_path / "work") as agent:
        agent.request("PullImage", image=name)
        script = "grep -E '^Seccomp:' /proc/self/status; unshare -U true; unshare -m true; (true & wait); hostname x; echo on"
        code, out, errors = agent.run("one", name, process={"args": [*SHELL, script]})
        assert (code, out) == (0, "Seccomp:\t2\non\n")
        assert errors.count("Operation not permitted") == 3


def test_numbers_of_system_calls() -> None:
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if os.uname().machine == "x86_64" and header.is_file():  # with the compiler that builds csvfast
        numbers = dict(re.findall(r"^#define __NR_(\w+) (\d+)$", header.read_text(), re.MULTILINE))
        assert {name: str(number) for name, number in FORBIDDEN.items()} == {name: numbers[name] for name in FORBIDDEN}
    assert len(filter_program()) // 8 < 256


def test_volumes_of_the_image(images: Registry, tmp_path: Path) -> None:
    """They begin with what the image has there."""
    name = f"127.0.0.1:{images.port}/team/app:volume"
    with agent_of("namespaces", tmp_path / "work") as agent:
        agent.request("PullImage", image=name)
        script = "mount | grep -c -E ' on /(etc|data/new) type'; cat /etc/secret; ls -l /etc/passwd | head -c 10; id -u user"
        assert agent.run("one", name, process={"args": [*SHELL, script]}) == (0, f"2\n{SECRET_LINE}-rw-r--r--1000\n", "")


@pytest.mark.parametrize(
    ("runner", "victim"),
    [("namespaces", "agent"), ("namespaces", "spawner"), ("namespaces", "both"), ("runc", "agent"), ("runc", "spawner"),
     ("bwrap", "agent"), ("bwrap", "both"), ("emulator", "agent")],
)  # fmt: skip
def test_killed_agent_leaves_nothing(runner: str, victim: str, images: Registry, tmp_path: Path) -> None:
    if runner in NATIVE and shutil.which(runner) is None:
        pytest.skip(f"{runner} is not installed")
    if runner == "emulator":
        pytest.importorskip("unicorn")
    name = f"127.0.0.1:{images.port}/team/app:clear"
    work = tmp_path / "work"
    agent = agent_of(runner, work)
    agent.request("PullImage", image=name)
    mark = f"sleep 10{os.getpid()}"
    made = agent.request("CreateContainer", container="one", image=name, process={"args": [*SHELL, f"echo on; {mark}"]})
    agent.request("StartContainer", container="one")
    agent.connection.reader(Frame.STDOUT, made["process"]).read(timeout=20)
    children = Path(f"/proc/{agent.process.pid}/task/{agent.process.pid}/children").read_text().split()
    assert len(children) == (2 if runner == "emulator" else 1)
    if victim != "agent":
        os.kill(int(children[0]), signal.SIGKILL)
    if victim != "spawner":
        agent.process.kill()
    agent.close()
    end = time.monotonic() + 20
    while time.monotonic() < end and (running(mark) or (victim == "agent" and leftovers(work))):
        time.sleep(0.02)
    assert not running(mark)
    # When the spawner, too, is gone, files are removed by whoever started the agent.
    assert victim == "both" or leftovers(work) == []
    assert victim == "both" or list(Path("/sys/fs/cgroup").glob(f"**/csvfast-{agent.process.pid}-*")) == []


def running(mark: str) -> list[str]:
    """Processes with this in their command line."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = place.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if mark in line and "pytest" not in line:
            found.append(line)
    return found


def test_policy(images: Registry, tmp_path: Path) -> None:
    """Whatever the policy does not name is refused, before anything is fetched or run."""
    name = f"127.0.0.1:{images.port}/team/app:clear"
    allowed = AgentPolicy(images=[name], unencrypted=True, commands=["image"], users=["image"])
    with agent_of("namespaces", tmp_path / "work", allowed) as agent:
        images.asked.clear()
        refusals = {"PullImage": {"image": name.replace("clear", "user")}}
        for method, parameters in refusals.items():
            with pytest.raises(ContainerError, match=r"policy: image .* is not allowed"):
                agent.request(method, **parameters)
        assert images.asked == []
        agent.request("PullImage", image=name)
        for parameters, words in (
            ({"process": {"args": ["/bin/sh"]}}, "command '/bin/sh'"),
            ({"process": {"command": ["-x"]}}, "command '-x'"),
            ({"process": {"env": ["LD_PRELOAD=x"]}}, "environment variable 'LD_PRELOAD'"),
            ({"process": {"user": "0"}}, "user '0'"),
            ({"process": {"cwd": "/etc"}}, "working directory"),
            ({"stdin": True}, "stdin"),
            ({"volumes": [{"name": "a", "path": "/b"}]}, "volume 'a'"),
        ):
            with pytest.raises(ContainerError, match=words) as refused:
                agent.request("CreateContainer", container="one", image=name, **parameters)
            assert refused.value.kind == "policy"
        made = agent.request("CreateContainer", container="one", image=name)
        with pytest.raises(ContainerError, match="policy: more than 1 containers"):
            agent.request("CreateContainer", container="two", image=name)
        agent.request("StartContainer", container="one")
        with pytest.raises(ContainerError, match=r"policy: (command|signals)"):
            agent.request("ExecProcess", container="one", args=["/bin/sh"])
        with pytest.raises(ContainerError, match="policy: signals"):
            agent.request("SignalProcess", process=made["process"], signal=9)
        assert agent.finish(made["process"])[0] == 0


class SlowRunner(Runner):
    """Its programs begin when they are told to."""

    name = "slow"

    def __init__(self) -> None:
        self.asked, self.go = threading.Event(), threading.Event()
        self.program: SpawnedProcess | None = None
        self.spawner = Spawner.fork()

    def start(self, bundle: Bundle, standard: Sequence[int]) -> SpawnedProcess:
        self.asked.set()
        assert self.go.wait(20)
        self.program = self.spawner.command(["/bin/sleep", "60"], {}, standard)
        return self.program

    def close(self) -> None:
        self.spawner.close()


def test_removed_while_it_starts(tmp_path: Path) -> None:
    """Whoever removes it waits, and ends it: nothing runs that the agent does not know."""
    runner = SlowRunner()
    agent = Agent(configuration(policy()), runner, CertifiedAttester(Any, lambda *_: None), tmp_path)
    left, right = socket.socketpair()
    with left, Connection(right.detach(), agent.handle) as connection:
        agent.attach(connection)
        agent.handle("CreateSandbox", {"sandbox": "pod"})
        image = PulledImage("x", tmp_path / "images" / "1", "", None, (), taken=True)  # type: ignore[arg-type]
        bundle = Bundle("one", tmp_path / "containers" / "one", image.rootfs, {})
        container = _Container(bundle, Process(connection, 1, "one", stdin=False), (), {}, image)
        agent._containers["one"] = container
        requests = [
            threading.Thread(target=agent.handle, args=(method, {"container": "one"}))
            for method in ("StartContainer", "RemoveContainer")
        ]
        requests[0].start()
        assert runner.asked.wait(20)
        requests[1].start()
        requests[1].join(0.2)
        runner.go.set()
        for request in requests:
            request.join(20)
        assert runner.program is not None
        assert container.first.exit_code == 137
        with pytest.raises(ContainerError, match="no container one"):
            agent.handle("StartContainer", {"container": "one"})
        agent.close()


def test_a_tree_that_is_removed_is_nobodys_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request for a container may hold an image that another PullImage replaces this moment: half of a tree is no image."""

    def pulled(name: str, _source: str, destination: Path, **_: object) -> PulledImage:
        destination.mkdir()
        return PulledImage(name, destination, "sha256:", None, ())  # type: ignore[arg-type]

    monkeypatch.setattr("csvfast.runtime.agent.pull.pull_image", pulled)
    agent = Agent(configuration(policy()), Runner(), CertifiedAttester(Any, lambda *_: None), tmp_path)
    agent.handle("CreateSandbox", {"sandbox": "pod"})
    agent.handle("PullImage", {"image": "x"})
    old = agent._images["x"]
    agent.handle("PullImage", {"image": "x"})
    assert not old.rootfs.exists()
    with pytest.raises(ContainerError, match="expected another PullImage"):
        agent._take_tree(old)
    assert agent._take_tree(agent._images["x"]).exists()
    agent.close()


def test_what_would_open_the_guest(images: Registry, tmp_path: Path) -> None:
    name = f"127.0.0.1:{images.port}/team/app:clear"
    allowed = policy(capabilities=["default", "CAP_MKNOD"], directories=["/tmp/*"])
    with agent_of("namespaces", tmp_path / "work", allowed) as agent:
        agent.request("PullImage", image=name)
        with pytest.raises(ContainerError, match="executor: CAP_MKNOD"):
            agent.request("CreateContainer", container="one", image=name)
        with pytest.raises(ContainerError, match=r"protocol: .*absolute path"):
            agent.request("CreateContainer", container="one", image=name, process={"cwd": "/tmp/../root"})
    with agent_of("namespaces", tmp_path / "nodev", policy()) as agent:
        agent.request("PullImage", image=name)
        out = agent.run("one", name, process={"args": [*SHELL, "cat /proc/mounts"]})[1]
        assert "nodev" in next(line for line in out.splitlines() if line.split()[1:2] == ["/"]).split()[3].split(",")


def test_images_that_are_refused(images: Registry, tmp_path: Path) -> None:
    place = f"127.0.0.1:{images.port}/team/app"
    with agent_of("namespaces", tmp_path / "work", policy(unencrypted=False)) as agent:
        with pytest.raises(ContainerError, match="policy: 2 layers are not encrypted"):
            agent.request("PullImage", image=f"{place}:clear")
        with pytest.raises(ContainerError, match=r"broker: .* names no broker"):
            agent.request("PullImage", image=f"{place}:encrypted")
        with pytest.raises(ContainerError, match=r"image: .*404|MANIFEST_UNKNOWN"):
            agent.request("PullImage", image=f"{place}:nowhere")
        with pytest.raises(ContainerError, match=r"image: .*expected an image in a registry"):
            agent.request("PullImage", image="127.0.0.1:1/x:y", source=f"oci:{tmp_path}")
        with pytest.raises(ContainerError, match="was not pulled"):
            agent.request("CreateContainer", container="one", image=f"{place}:clear")
    work = tmp_path / "pinned"
    with agent_of("namespaces", work, policy(manifests=["sha256:" + "0" * 64])) as agent, pytest.raises(
        ContainerError, match="policy: manifest"
    ):
        agent.request("PullImage", image=f"{place}:clear")
    assert leftovers(work) == []


def test_requests_that_are_none(tmp_path: Path) -> None:
    def made(**volume: str) -> dict[str, object]:
        return {"container": "x", "image": "x", "volumes": [{"name": "shared", **volume}]}

    with AgentProcess(configuration(policy()), tmp_path / "work") as agent:
        with pytest.raises(ContainerError, match="state: there is no sandbox"):
            agent.request("PullImage", image="x")
        agent.request("CreateSandbox", sandbox="one")
        with pytest.raises(ContainerError, match="there is a sandbox already"):
            agent.request("CreateSandbox", sandbox="two")
        for method, parameters, words in (
            ("Nothing", {}, "method 'Nothing' is unknown"),
            ("PullImage", {}, "image: expected a text"),
            ("PullImage", {"image": 1}, "image: expected str"),
            ("PullImage", {"image": "x", "more": 1}, "'more' is unknown"),
            ("CreateContainer", {"container": "../x", "image": "x"}, "container: expected a name"),
            ("CreateContainer", made(), "path: expected a directory"),
            ("CreateContainer", made(path="/"), "path: expected a directory"),
            ("CreateContainer", made(path="/a/../etc"), "absolute"),
            ("CreateContainer", made(path="a"), "absolute"),
            ("CreateContainer", made(path="//a"), "absolute"),
            ("WaitProcess", {"process": -1}, "a number from 1"),
            ("WaitProcess", {"process": True}, "a number from 1"),
        ):
            with pytest.raises(ContainerError, match=words) as refused:
                agent.request(method, **parameters)
            assert refused.value.kind == "protocol"
        with pytest.raises(ContainerError, match="there is no process 5"):
            agent.request("WaitProcess", process=5)


def test_the_agents_memory_is_its_own() -> None:
    """No core file, and nobody of the same user looks into it."""
    code = (
        "import ctypes, resource; from csvfast.runtime.agent.__main__ import _private_memory as private; private()\n"
        "print(ctypes.CDLL(None).prctl(3), resource.getrlimit(resource.RLIMIT_CORE))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout == b"0 (0, 0)\n"


def test_arguments_that_are_none(tmp_path: Path) -> None:
    agent = AgentProcess(configuration(policy()), tmp_path / "work", "namespaces", "--nothing", "x")
    assert "option --nothing is unknown" in agent.close()
    (tmp_path / "bad").mkdir()
    agent = AgentProcess(configuration(policy()), tmp_path / "work", "native", runtime="nothing")
    assert "agent: ContainerError: executor" in agent.close()
