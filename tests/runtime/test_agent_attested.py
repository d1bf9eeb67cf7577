"""The agent with a guest of the simulated platform behind it: keys through both doors, and what must not get any."""

from __future__ import annotations

import os
import socket
import socketserver
import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest
from runtime.agent_broker import RunningBroker, make_certificate
from runtime.agent_images import SECRET_LINE, Registry, encrypt, make_image
from runtime.agent_process import busybox, leftovers

from csvfast.certs import ManufacturingLine
from csvfast.errors import ContainerError
from csvfast.image.layout import OciLayout
from csvfast.report import GuestPolicy
from csvfast.runtime.agent.configuration import AgentConfiguration
from csvfast.runtime.agent_policy import AgentPolicy
from csvfast.runtime.executor import POLICY, LaunchPlan
from csvfast.runtime.executor_native import NativeExecutor
from csvfast.runtime.sandbox import Sandbox, SandboxPlan

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces without root"),
    pytest.mark.skipif(busybox() is None, reason="no guest files: run tools/install-test-tools.sh"),
    pytest.mark.skipif(NativeExecutor().unavailable() is not None, reason="no container runtime is installed"),
]
DEBUGGABLE = GuestPolicy.of(noks=True, es=True, nosend=True, csv=True, api_major=1, api_minor=3)


@dataclass
class Place:
    """What all tests share."""

    chip: Path
    layout: OciLayout
    registry: Registry
    broker: RunningBroker

    def configuration(self, door: str, **more: object) -> AgentConfiguration:
        address = self.broker.doors[door.partition("-")[0]]
        if door == "kbs":
            broker = {"door": "kbs", "url": f"http://{address}", "unattested": True}
        elif door == "verdictd-pinned":
            broker = {"door": "verdictd", "address": address, "pin": self.broker.pin}
        else:
            broker = {"door": "verdictd", "address": address, "unattested": True, "decrypt": door.endswith("decrypt")}
        policy = AgentPolicy.for_one_image("127.0.0.1:*")
        registries = [{"host": "127.0.0.1:*", "plain_http": True}]
        return AgentConfiguration(**{"policy": policy, "broker": broker, "registries": registries} | more)  # type: ignore[arg-type]

    def sandbox(
        self, work: Path, configuration: AgentConfiguration, *, known: bool = True, policy: GuestPolicy = POLICY
    ) -> Sandbox:
        work.mkdir()
        executor = NativeExecutor()
        digest = executor.predict(LaunchPlan(configuration=configuration.encode(), work=work)).digest
        self.broker.measured(digest if known else bytes(32))
        plan = SandboxPlan(identifier="pod", configuration=configuration.encode(), chip=self.chip, policy=policy)
        sandbox = Sandbox(plan, executor, work)
        sandbox.launch()
        return sandbox

    def name(self, tag: str) -> str:
        return f"127.0.0.1:{self.registry.port}/team/app:{tag}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("attested")
    chip = ManufacturingLine.create().make_chip()
    chip.save(folder / "chip")
    layout = OciLayout(folder / "layout", True)
    program = busybox()
    assert program is not None
    make_image(layout, program, "clear")
    encrypt(layout, "clear", "1")
    encrypt(layout, "clear", "verdictd", style="verdictd")
    encrypt(layout, "clear", "moved", kid="old/key/name")
    with Registry(layout) as registry, RunningBroker(folder / "broker", chip.root.encoded) as broker:
        yield Place(folder / "chip", layout, registry, broker)


@pytest.mark.parametrize(
    ("door", "tag", "keys"),
    [
        ("verdictd", "1", {}),
        ("verdictd-pinned", "1", {}),
        ("verdictd-decrypt", "verdictd", {}),
        ("kbs", "1", {}),
        ("kbs", "moved", {"old/key/name": "default/key/images"}),
    ],
)
def test_encrypted_image(place: Place, tmp_path: Path, door: str, tag: str, keys: dict[str, str]) -> None:
    sandbox = place.sandbox(tmp_path / "work", place.configuration(door, keys=keys))
    with sandbox:
        assert sandbox.pull(place.name(tag))["encrypted"] == 2
        container = sandbox.create("one", place.name(tag))
        output: list[bytes] = []
        container.attach(None, output.append, None)
        container.start()
        assert container.wait(60) == 0
        assert b"".join(output).decode() == SECRET_LINE
        steps = {step["step"] for step in sandbox.request("GetTimings", {})["steps"]}
        assert {"report", "attest to the broker", "unwrap", "download", "unpack"} <= steps
    assert leftovers(tmp_path / "work") == []
    release = [record for record in place.broker.records() if record.action in ("release", "unwrap")][-1]
    assert (release.outcome, release.resource) == ("allowed", "default/key/images")


@pytest.fixture(scope="module")
def https(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The KBS behind TLS. Out: url; ca, other: certificates in PEM; pin: SHA-256 of its own."""
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = make_certificate()
    (folder / "both").write_bytes(key + certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "both")
    host, _, port = place.broker.doors["kbs"].rpartition(":")

    class Forward(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with (
                suppress(OSError), context.wrap_socket(self.request, server_side=True) as ours,
                socket.create_connection((host, int(port))) as theirs,
            ):  # fmt: skip
                answers = threading.Thread(target=_carry, args=(theirs, ours), daemon=True)
                answers.start()
                _carry(ours, theirs)
                answers.join(10)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Forward) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield {
            "url": f"https://127.0.0.1:{server.server_address[1]}", "ca": certificate.decode(),
            "other": make_certificate()[1].decode(), "pin": sha256(ssl.PEM_cert_to_DER_cert(certificate.decode())).hexdigest(),
        }  # fmt: skip
        server.shutdown()
        thread.join(10)


def _carry(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize(("trust", "allowed"), [("pin", True), ("ca", True), ("wrong pin", False), ("other", False)])
def test_kbs_over_https(place: Place, https: dict[str, str], tmp_path: Path, trust: str, allowed: bool) -> None:
    known = {
        "pin": {"pin": https["pin"]}, "ca": {"ca": https["ca"]}, "wrong pin": {"pin": "00" * 32}, "other": {"ca": https["other"]},
    }[trust]  # fmt: skip
    broker = {"door": "kbs", "url": https["url"], **known}
    with place.sandbox(tmp_path / "work", place.configuration("kbs", broker=broker)) as sandbox:
        if allowed:
            assert sandbox.pull(place.name("1"))["encrypted"] == 2
        else:
            with pytest.raises(ContainerError, match=r"broker: .*certificate"):
                sandbox.pull(place.name("1"))
        agent = sandbox.guest.pid
        assert not [fd for fd in Path(f"/proc/{agent}/fd").iterdir() if "csvfast-ca" in str(fd.readlink())]


@pytest.mark.parametrize("door", ["verdictd", "kbs"])
@pytest.mark.parametrize("wrong", ["measure", "debug"])
def test_denied(place: Place, tmp_path: Path, door: str, wrong: str) -> None:
    policy = DEBUGGABLE if wrong == "debug" else POLICY
    before = len(place.broker.records())
    with place.sandbox(tmp_path / "work", place.configuration(door), known=wrong != "measure", policy=policy) as sandbox:
        with pytest.raises(ContainerError) as refused:
            sandbox.pull(place.name("1"))
        assert refused.value.kind == "broker"
        with pytest.raises(ContainerError, match="was not pulled"):
            sandbox.create("one", place.name("1"))
    assert leftovers(tmp_path / "work") == []
    denied = [record for record in place.broker.records()[before:] if record.outcome == "denied"]
    assert any(("nodbg" if wrong == "debug" else "measure") in record.reason for record in denied)


@pytest.mark.parametrize("what", ["layer", "packet", "pin", "nobody"])
def test_what_was_changed(place: Place, tmp_path: Path, what: str) -> None:
    configuration = place.configuration("verdictd")
    tag = "1"
    if what == "pin":
        configuration = place.configuration("verdictd", broker={**configuration.broker, "pin": "00" * 32, "unattested": False})
    elif what == "nobody":
        configuration = place.configuration("verdictd", broker={**configuration.broker, "address": "127.0.0.1:1"})
    elif what == "packet":
        import base64
        import json

        _, data = place.layout.resolve("1")
        manifest = json.loads(data)
        key = "org.opencontainers.image.enc.keys.provider.attestation-agent"
        packet = json.loads(base64.b64decode(manifest["layers"][0]["annotations"][key]))
        sealed = bytearray(base64.b64decode(packet["wrapped_data"]))
        sealed[10] ^= 1
        packet["wrapped_data"] = base64.b64encode(sealed).decode()
        manifest["layers"][0]["annotations"][key] = base64.b64encode(json.dumps(packet).encode()).decode()
        place.layout.put_manifest(json.dumps(manifest).encode(), manifest["mediaType"], "packet")
        tag = "packet"
    with place.sandbox(tmp_path / "work", configuration) as sandbox:
        if what == "layer":
            _, data = place.layout.resolve("1")
            from csvfast.image.manifest import Manifest

            blob = place.layout.blob_path(Manifest.parse(data).layers[1].digest)
            whole = blob.read_bytes()
            blob.chmod(0o600)
            blob.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
        try:
            with pytest.raises(ContainerError) as refused:
                sandbox.pull(place.name(tag))
        finally:
            if what == "layer":
                blob.write_bytes(whole)
        assert refused.value.kind == {"layer": "image", "packet": "image"}.get(what, "broker")
    assert leftovers(tmp_path / "work") == []
