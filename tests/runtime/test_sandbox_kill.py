"""Whatever is killed, whenever: no process, no mount, no plaintext is left, and the next run works."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("unicorn")

from runtime.sandbox_rig import Demo, Relay, alive, family, search, secrets, wait_for

from csvfast.errors import ContainerError
from csvfast.image.layout import OciLayout
from csvfast.image.manifest import Manifest
from csvfast.runtime.executor import executor_of
from csvfast.runtime.mirror import MirrorServer
from csvfast.runtime.monitor import Monitor

KILLS = int(os.environ.get("CSVFAST_KILLS", "3"))  # at how many moments of a run
EXECUTORS = ("emulator", "native")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    with Demo(tmp_path_factory.mktemp("kill")) as demo:
        yield demo


def needs(executor: str) -> None:
    if (reason := executor_of(executor).unavailable()) is not None:
        pytest.skip(reason)


def mounts() -> str:
    return Path("/proc/self/mountinfo").read_text(encoding="ascii")


def agent_of(pid: int) -> int:
    """The agent's process."""
    for one in family(pid):
        try:
            if Path(f"/proc/{one}/comm").read_text(encoding="ascii").strip() == "csvfast-agent":
                return one
        except OSError:
            continue
    return 0


def all_gone(pids: list[int]) -> None:
    wait_for(lambda: not any(alive(pid) for pid in pids), what=f"end of {[pid for pid in pids if alive(pid)]}")


def next_run_works(demo: Demo, executor: str) -> None:
    done = demo.run(demo.allowed(executor=executor))
    assert (done.returncode, done.stdout) == (7, b"hello from the container\n"), done.stderr
    assert list(demo.root.iterdir()) == []
    demo.assert_clean()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_monitor_is_killed(demo: Demo, executor: str) -> None:
    needs(executor)
    options = demo.allowed(executor=executor, args=["/bin/program", "hold"])
    before = mounts()
    for number in range(KILLS):
        seen: set[int] = set()
        with subprocess.Popen(demo.command(options), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            if number == KILLS - 1:  # the last one: while it runs
                assert process.stdout.readline() == b"holding\n"
            end = time.monotonic() + 0.3 + number * 1.2 / KILLS
            while time.monotonic() < end:
                seen |= set(family(process.pid))
                time.sleep(0.02)
            seen |= set(family(process.pid))
            process.kill()
            process.wait(30)
        all_gone(sorted(seen))
        assert search([demo.root], secrets()) == []
    assert mounts() == before
    next_run_works(demo, executor)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_agent_is_killed(demo: Demo, executor: str) -> None:
    needs(executor)
    options = demo.allowed(executor=executor, args=["/bin/program", "hold"])
    with subprocess.Popen(demo.command(options), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"holding\n"
        seen = family(process.pid)
        agent = agent_of(process.pid)
        assert agent
        os.kill(agent, signal.SIGKILL)
        assert process.wait(30) == 137
        said = process.stderr.read()
        assert b"the container was lost: the guest ended during WaitProcess: the agent was killed by signal 9" in said
    all_gone(seen)
    next_run_works(demo, executor)


def test_agent_and_spawner_are_killed_together(demo: Demo) -> None:
    """A runtime's container is then nobody's child: the monitor ends it."""
    needs("native")
    options = demo.allowed(executor="native", args=["/bin/program", "hold"])
    with subprocess.Popen(demo.command(options), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"holding\n"
        agent = agent_of(process.pid)
        seen = family(process.pid)
        for pid in (agent, *map(int, Path(f"/proc/{agent}/task/{agent}/children").read_text(encoding="ascii").split())):
            os.kill(pid, signal.SIGSTOP)
        for pid in (agent, *map(int, Path(f"/proc/{agent}/task/{agent}/children").read_text(encoding="ascii").split())):
            os.kill(pid, signal.SIGKILL)
        assert process.wait(30) == 137
    all_gone(seen)
    assert list(Path("/sys/fs/cgroup").glob(f"**/csvfast-{agent}-*")) == []
    assert list(demo.root.iterdir()) == []
    demo.assert_clean()


def test_the_agent_is_killed_before_it_can_answer(demo: Demo) -> None:
    options = demo.allowed()
    with subprocess.Popen(demo.command(options), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for(lambda: agent_of(process.pid) or process.poll() is not None)
        agent = agent_of(process.pid)
        assert agent, process.communicate(timeout=30)
        os.kill(agent, signal.SIGKILL)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (3, b"")
    assert b"csvfast: error: executor: the guest ended during" in err
    next_run_works(demo, "emulator")


@pytest.mark.parametrize("door", ["verdictd", "kbs"])
@pytest.mark.parametrize("after", [0, 900, 1500])
def test_the_broker_dies(demo: Demo, door: str, after: int) -> None:
    """After so many bytes of its answers."""
    with Relay(demo.broker.doors[door], after) as relay:
        scheme = {"verdictd": "verdictd", "kbs": "kbs+http"}[door]
        options = demo.allowed(broker=f"{scheme}://{relay.address}")
        with (
            pytest.raises(ContainerError) as refusal,
            Monitor(options, "c1", root=demo.root, transient=True) as monitor,
        ):
            monitor.create()
    assert refusal.value.kind in ("broker", "image"), refusal.value
    demo.assert_clean()


@pytest.mark.parametrize("after", [0, 400, 5_000])
def test_the_registry_dies(demo: Demo, after: int) -> None:
    """In the agent's hands: the host has asked it for the manifest before."""
    layout = OciLayout(demo.layout)
    descriptor, data = layout.resolve("1")
    with (
        MirrorServer(layout, "team/app", descriptor, data, Manifest.parse(data)) as registry,
        Relay(registry.address, 1 << 40) as relay,
    ):
        options = demo.options(image=f"docker://{relay.address}/team/app:1", direct=True)
        demo.broker.allow(demo.digest(options))

        def said(line: str) -> None:
            if line.startswith("launch digest"):
                relay.limit(after)

        with (
            Monitor(options, "c1", root=demo.root, transient=True, said=said) as monitor,
            pytest.raises(ContainerError) as refusal,
        ):
            monitor.create()
    assert refusal.value.kind == "image", refusal.value
    demo.assert_clean()
