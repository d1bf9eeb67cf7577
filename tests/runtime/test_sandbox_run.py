"""From an encrypted image to a running container on the emulator and natively: output, exit code, signals, keys only to whom they
belong."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("unicorn")

from runtime.sandbox_rig import Demo, wait_for

from csvfast.errors import ContainerError, FirmwareError, VerificationError
from csvfast.report.policy import GuestPolicy
from csvfast.runtime.executor import choose_executor, executor_of
from csvfast.runtime.monitor import Monitor


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    with Demo(tmp_path_factory.mktemp("run")) as demo:
        yield demo


@pytest.fixture(autouse=True)
def clean(demo: Demo) -> Iterator[None]:
    yield
    demo.assert_clean()
    assert list(demo.root.iterdir()) == []


class Output:
    def __init__(self) -> None:
        self.out, self.err = bytearray(), bytearray()


def run(demo: Demo, options: object, **more: object) -> tuple[int | None, Output, Monitor]:
    """In this process."""
    output = Output()
    with Monitor(options, "c1", root=demo.root, transient=True, **more) as monitor:  # type: ignore[arg-type]
        container = monitor.create()
        container.attach(None, output.out.extend, output.err.extend)
        container.start()
        code = container.wait(60)
        monitor.sandbox.fetch_timings()
    return code, output, monitor


@pytest.mark.parametrize("executor", ["emulator", "native"])
@pytest.mark.parametrize("door", ["verdictd", "kbs"])
def test_hello(demo: Demo, executor: str, door: str) -> None:
    if (reason := executor_of(executor).unavailable()) is not None:
        pytest.skip(reason)
    said: list[str] = []
    options = demo.allowed(executor=executor, broker=getattr(demo.broker, door))
    code, output, monitor = run(demo, options, said=said.append)
    assert (code, bytes(output.out), bytes(output.err)) == (7, b"hello from the container\n", b"a complaint\n")
    assert said[0] == f"executor {executor}: {executor_of(executor).statement()}"
    steps = monitor.timings.record()
    assert {"pull", "start container"} <= {step["step"] for step in steps["steps"]}
    assert {"attest to the broker", "unwrap", "unpack"} <= {step["step"] for step in steps["agent"]}
    assert 0 < steps["marks"]["container started"] <= steps["marks"]["first output"] <= steps["marks"]["container ended"]
    released = [record for record in demo.broker.records() if record.action == "release"][-1]
    assert released.outcome == "allowed"
    assert released.subject["measure"] == demo.digest(options)


def test_command_line(demo: Demo) -> None:
    options = demo.allowed(args=["/bin/program", "env"], env=["WORD=of this run"])
    done = demo.run(options, "--timings", "--expect", demo.digest(options))
    assert (done.returncode, done.stdout) == (0, b"of this run\n"), done.stderr
    said = done.stderr.decode()
    assert said.startswith("csvfast: executor emulator: encrypted are")
    assert f"launch digest {demo.digest(options)}" in said
    assert "agent: unwrap" in said


def test_json_lines(demo: Demo) -> None:
    done = demo.run(demo.allowed(), "--json", "--timings")
    assert done.returncode == 7
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith(b"{")]
    assert lines[0]["said"].startswith("executor emulator")
    assert lines[-1]["container"]["csvfast"]["exitCode"] == 7
    assert lines[-1]["timings"]["marks"]["first output"] > 0


def test_standard_input(demo: Demo) -> None:
    given = b"".join(b"line %d\n" % number for number in range(40_000))  # more than the wire's window
    done = demo.run(demo.allowed(args=["/bin/program", "cat"], stdin=True), given=given)
    assert done.returncode == 0, done.stderr
    assert done.stdout == given


def test_much_output_to_a_slow_reader(demo: Demo) -> None:
    options = demo.allowed(args=["/bin/program", "big"])
    with subprocess.Popen(demo.command(options), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        threading.Event().wait(1.5)
        assert len(process.stdout.read()) == 3_000_000
        assert process.wait(30) == 0


def test_a_full_disk(demo: Demo) -> None:
    """The container's success without its output is none."""
    command = demo.command(demo.allowed(args=["/bin/program", "env"]))
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
    assert (done.returncode, b"output of the container was lost: [Errno 28]" in done.stderr) == (3, True)


@pytest.mark.parametrize("executor", ["emulator", "native"])
def test_signals_go_to_the_container(demo: Demo, executor: str) -> None:
    if (reason := executor_of(executor).unavailable()) is not None:
        pytest.skip(reason)
    options = demo.allowed(executor=executor, args=["/bin/program", "hold"])
    with subprocess.Popen(demo.command(options), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"holding\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == b"stopped\n"
        assert process.wait(30) == 42


def test_interrupted_while_it_is_made(demo: Demo) -> None:
    options = demo.allowed(args=["/bin/program", "hold"])
    with subprocess.Popen(demo.command(options), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert b"executor" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 130
        process.stderr.read()


# ---- Refusals: no container, nothing visible, and the broker's audit log says why


def denied(demo: Demo, options: object, **more: object) -> ContainerError:
    before = len(demo.broker.records())
    with pytest.raises(ContainerError) as refusal:
        run(demo, options, **more)
    released = [record for record in demo.broker.records()[before:] if record.action in ("release", "unwrap")]
    assert not any(record.outcome == "allowed" for record in released)
    return refusal.value


@pytest.mark.parametrize("door", ["verdictd", "kbs"])
def test_another_launch_digest_gets_no_key(demo: Demo, door: str) -> None:
    demo.broker.allow("11" * 32)
    refusal = denied(demo, demo.options(broker=getattr(demo.broker, door)))
    assert refusal.kind == "broker"
    wait_for(lambda: any(record.outcome == "denied" and "measure" in record.reason for record in demo.broker.records()[-3:]))


def test_the_command_line_tells_of_a_denial(demo: Demo) -> None:
    demo.broker.allow("11" * 32)
    done = demo.run(demo.options())
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"csvfast: error: broker:" in done.stderr


def test_a_guest_that_can_be_debugged_gets_no_key(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    import csvfast.runtime.options as options_module
    from csvfast.runtime.sandbox import SandboxPlan

    options = demo.allowed()
    weak = GuestPolicy.of(es=True, csv=True, api_major=1, api_minor=3)
    monkeypatch.setattr(options_module, "SandboxPlan", lambda **fields: SandboxPlan(**fields, policy=weak))
    refusal = denied(demo, options)
    assert refusal.kind == "broker"
    wait_for(lambda: any(record.outcome == "denied" and "nodbg" in record.reason for record in demo.broker.records()[-3:]))


def test_another_digest_than_the_owner_expects_is_not_launched(demo: Demo) -> None:
    options = demo.allowed()
    with pytest.raises((VerificationError, FirmwareError)):
        run(demo, demo.options(expected="22" * 32))
    done = demo.run(options, "--expect", "22" * 32)
    assert done.returncode == 1
    assert b"launch digest" in done.stderr


def test_a_broker_that_is_away(demo: Demo) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"verdictd://127.0.0.1:{free.getsockname()[1]}"
    assert denied(demo, demo.options(broker=address)).kind == "broker"


def test_without_a_broker(demo: Demo) -> None:
    assert denied(demo, demo.options(broker="")).kind == "broker"


@pytest.mark.parametrize("what", ["layer", "truncated", "swapped"])
def test_a_tampered_layer_never_runs(demo: Demo, tmp_path: Path, what: str) -> None:
    import shutil

    from csvfast.image.layout import OciLayout
    from csvfast.image.manifest import Manifest

    options = demo.allowed()
    layout = tmp_path / "demo"
    shutil.copytree(demo.layout, layout)
    manifest = Manifest.parse(OciLayout(layout).resolve("1")[1])
    first, second = (OciLayout(layout).blob_path(layer.digest) for layer in manifest.layers)
    data = bytearray(first.read_bytes())
    if what == "layer":
        data[len(data) // 2] ^= 1
    elif what == "truncated":
        del data[-1]
    else:
        data = bytearray(second.read_bytes())
    first.write_bytes(data)
    before = list(demo.folder.rglob("*"))
    with pytest.raises(ContainerError) as refusal:
        run(demo, demo.options(image=f"oci:{layout}:1", chip=options.chip))
    assert refusal.value.kind == "image"
    assert manifest.layers[0].digest in refusal.value.problem or "1" in refusal.value.problem
    assert set(demo.folder.rglob("*")) - set(before) == set()


def test_the_agents_policy_binds_the_host(demo: Demo) -> None:
    """The measured policy allows the image's own command; the host asks for another one."""
    options = demo.allowed()
    with Monitor(options, "c1", root=demo.root, transient=True) as monitor:
        container = monitor.create()
        with pytest.raises(ContainerError, match="policy") as refusal:
            monitor.sandbox.create("c2", next(iter([monitor.image["image"]])), {"args": ["/bin/program", "hold"]})
        assert refusal.value.kind == "policy"
        with pytest.raises(ContainerError) as refusal:
            monitor.sandbox.pull("localhost/another:1", "docker://127.0.0.1:1/another:1")
        assert refusal.value.kind == "policy"
        container.start()
        assert container.wait(30) == 7


def test_auto_never_takes_native(monkeypatch: pytest.MonkeyPatch) -> None:
    from csvfast.runtime.executor_emulator import EmulatorExecutor
    from csvfast.runtime.executor_vm import VmExecutor

    monkeypatch.setattr(VmExecutor, "unavailable", lambda _self: "no QEMU")
    assert choose_executor("auto").name == "emulator"
    monkeypatch.setattr(EmulatorExecutor, "unavailable", lambda _self: "no Unicorn")
    with pytest.raises(ContainerError, match=r"vm: no QEMU; emulator: no Unicorn"):
        choose_executor("auto")
