"""A container in a real Linux guest on encrypted RAM, its key from a broker, its DRAM searched while it runs; QEMU killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import qemu_guest
from runtime.sandbox_rig import Demo, alive, drams_of, family, found_in, found_in_memory, search, secrets, wait_for

pytestmark = pytest.mark.skipif(
    shutil.which(qemu_guest.QEMU) is None or not (qemu_guest.boot_files() / "modules" / "virtio_net.ko").exists(),
    reason="QEMU or the guests' files are missing (tools/install-test-tools.sh)",
)

SETTINGS = {"accel": "tcg", "time_limit": "150"}


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CSVFAST_VMRAM_LIBRARY", str(qemu_guest.preload_library()))
        yield


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    with Demo(tmp_path_factory.mktemp("vm")) as demo:
        yield demo


def qemu_of(pid: int) -> int:
    for one in family(pid):
        try:
            if Path(f"/proc/{one}/comm").read_text(encoding="ascii").startswith("qemu-system"):
                return one
        except OSError:
            continue
    return 0


def test_a_container_in_a_real_guest(demo: Demo) -> None:
    options = demo.allowed(executor="vm", memory=224 << 20, args=["/bin/program", "hold"], settings=SETTINGS)
    digest = demo.digest(options)
    with subprocess.Popen(
        demo.command(options, "--expect", digest, "--timings"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"holding\n", process.stderr.read()
        assert qemu_of(process.pid)
        drams = drams_of([process.pid])
        assert len(drams) == 1
        assert found_in(drams[0], secrets()) == []
        assert found_in_memory(process.pid, secrets()) == []
        assert search([demo.root, demo.layout], secrets()) == []
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (42, b"stopped\n"), err
    said = err.decode()
    assert said.startswith("csvfast: executor vm: encrypted is all of the guest's RAM")
    assert f"launch digest {digest}" in said
    assert "agent: attest to the broker" in said
    released = [record for record in demo.broker.records() if record.action == "release"][-1]
    assert (released.outcome, released.subject["measure"]) == ("allowed", digest)
    demo.assert_clean()


def test_qemu_is_killed_while_it_boots(demo: Demo) -> None:
    options = demo.allowed(executor="vm", memory=224 << 20, settings=SETTINGS)
    with subprocess.Popen(demo.command(options), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for(lambda: qemu_of(process.pid) or process.poll() is not None)
        everything = family(process.pid)
        qemu = qemu_of(process.pid)
        assert qemu, process.communicate(timeout=60)
        os.kill(qemu, signal.SIGKILL)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (3, b"")
    assert b"csvfast: error: executor: " in err
    assert b"ended with -9" in err
    wait_for(lambda: not any(alive(pid) for pid in everything))
    demo.assert_clean()


def test_another_initrd_is_not_launched(demo: Demo) -> None:
    options = demo.options(executor="vm", memory=224 << 20, settings=SETTINGS)
    done = demo.run(options, "--expect", "44" * 32)
    assert done.returncode == 1
    assert b"launch digest" in done.stderr
    demo.assert_clean()


def test_the_monitor_is_killed_while_it_boots(demo: Demo) -> None:
    options = demo.allowed(executor="vm", memory=224 << 20, settings=SETTINGS)
    with subprocess.Popen(demo.command(options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: qemu_of(process.pid) or process.poll() is not None)
        everything = family(process.pid)
        process.kill()
        process.wait(30)
    wait_for(lambda: not any(alive(pid) for pid in everything))
    demo.assert_clean()
