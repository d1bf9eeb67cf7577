"""Python in README.md and four pages of docs runs as it is written, with the names it leaves open filled in.

A line whose comment begins with the name of an exception must raise it.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from broker.simulated_guest import SimulatedMachine
from reference import ovmf_images as ovmf

import csvfast
from csvfast.attest import AppraisalPolicy
from csvfast.certs import ManufacturingLine
from csvfast.processor import Processor
from csvfast.ratstls import BlockingServer, Identity, PolicyJudge, Requirement
from csvfast.report import GuestPolicy, ReportRequest, read_evidence

ROOT = Path(__file__).parents[2]
FIRMWARE = ovmf.good(size=65536)
NONCE = b"nonce of a verifier"

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the tests stand outside a source tree")


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def runnable(block: str) -> str:
    def raising(line: re.Match[str]) -> str:
        return f"{line[1]}with pytest.raises(csvfast.errors.{line[3]}): {line[2]}"

    return re.sub(r"^( *)(\S.*?) +# (\w+Error)\b.*$", raising, block, flags=re.MULTILINE)


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the pages leave open."""
    monkeypatch.chdir(tmp_path)
    for name in ("vmlinuz", "initrd.img"):
        Path(name).write_bytes(name.encode() * 1000)
    Path("OVMF.fd").write_bytes(FIRMWARE)
    Path("policy.toml").write_text(f'measurements = ["{csvfast.sm3(FIRMWARE).hexdigest()}"]\n', encoding="utf-8")
    return {
        "csvfast": csvfast,
        "pytest": pytest,
        "key": bytes(range(32)),
        "buffer": bytearray(16 << 12),
        "policy": GuestPolicy.of(nodbg=True),
        "firmware": FIRMWARE,
        "nonce": NONCE,
    }


def test_cache_model(names: dict[str, Any]) -> None:
    (block,) = blocks("docs/cache-model.md")
    exec(runnable(block), names)


def test_fleets(names: dict[str, Any]) -> None:
    Path("images").mkdir()
    for name in ("a.img", "b.img", "c.img"):
        Path("images", name).write_bytes(name[:1].encode() * 5000)
    for block in blocks("docs/fleets.md"):
        exec(runnable(block), names)
    assert len(names["frame"]) == 3


def test_readme(names: dict[str, Any]) -> None:
    first, second, third = blocks("README.md")
    exec(runnable(first), names)
    assert any(names["buffer"])
    # The page verifies a real report under Hygon's root; here it is a simulated one, under its own.
    assert "verify(evidence, " in second
    names |= simulated_evidence()
    exec(runnable(second.replace("verify(evidence, ", "verify(evidence, roots=roots, ")), names)
    assert names["verified"].complete
    assert names["handle"] == 1
    attested_tls(third, names)


def attested_tls(block: str, names: dict[str, Any]) -> None:
    """A server that is attested and demands it, on a simulated chip instead of a real one, at an address of its own."""
    Path("firmware").write_bytes(FIRMWARE)
    received: list[bytes] = []
    with SimulatedMachine() as machine:
        guest = machine.launch(Path("firmware"))
        names |= {"attester": guest, "hygon_root": lambda: machine.chip.root, "AppraisalPolicy": AppraisalPolicy}
        judge = PolicyJudge(machine.roots, AppraisalPolicy.load("policy.toml"))
        identity = Identity.create(guest)
        with BlockingServer(
            ("127.0.0.1", 0), identity, Requirement.attested(judge), lambda stream: received.append(stream.receive())
        ) as server:
            assert '("broker.example", 1234)' in block
            exec(block.replace('("broker.example", 1234)', repr(server.address)), names)
            until = time.monotonic() + 10
            while not received and time.monotonic() < until:
                time.sleep(0.01)
    assert received == [b"both sides have proved what they are before this byte"]


def simulated_evidence() -> dict[str, Any]:
    chip = ManufacturingLine.create().make_chip()
    with csvfast.EncryptedMemory(4 << 20) as memory, Processor(chip, memory) as processor:
        processor.init()
        handle = processor.launch_start(GuestPolicy.of())
        processor.activate(handle, 1)
        memory.write(0, FIRMWARE, asid=0)
        processor.launch_update_data(handle, 0, len(FIRMWARE))
        processor.launch_measure(handle)
        processor.launch_finish(handle)
        memory.write(1 << 20, ReportRequest.build(NONCE), asid=1)
        processor.attestation(handle, 1 << 20, 4096)
        page = memory.read(1 << 20, 4096, asid=1)
    return {"evidence": read_evidence(page).with_certificates(chip.hsk_cek), "roots": [chip.root]}


def test_processor(names: dict[str, Any]) -> None:
    exec(runnable(blocks("docs/processor.md")[0]), names)
    assert names["report"].measure == csvfast.sm3(FIRMWARE).digest()


def test_measure(names: dict[str, Any]) -> None:
    (block,) = [one for one in blocks("docs/measure.md") if "launch_digest" in one]
    exec(runnable(block), names)
    assert len(names["launch"].pieces) > 2


def test_images(names: dict[str, Any]) -> None:
    from image.crypt_images import make_image

    make_image(Path("app"), "1")
    (block,) = blocks("docs/images.md")
    exec(runnable(block), names)
    assert names["reader"].verified


def test_image_encryption(names: dict[str, Any]) -> None:
    from image.crypt_images import make_image, manifest_of

    from csvfast.certs.private import write_private_file
    from csvfast.image.layout import OciLayout

    write_private_file(Path("images.key"), bytes(range(32)))
    make_image(Path("app"), "1")
    (block,) = blocks("docs/image-encryption.md")
    exec(runnable(block), names)
    assert manifest_of(OciLayout("sealed"), "clear") == manifest_of(OciLayout("app"), "1")


def test_unpacking(names: dict[str, Any]) -> None:
    from image.archives import entry, tar, write_layout

    from csvfast.cli import main

    layers = [tar(entry("bin/sh", b"#!", mode=0o755)), tar(entry("etc/motd", b"hello"))]
    write_layout(Path("app"), layers, tag="1", Cmd=["/bin/sh"])
    assert main(["image", "new-key", "images.key"]) == 0
    assert main(["image", "encrypt", "oci:app:1", "oci:sealed:1", "--to", "kek:images.key"]) == 0
    (block,) = blocks("docs/unpacking.md")
    exec(runnable(block), names)
    assert Path("root/etc/motd").read_bytes() == b"hello"
    assert names["image"].encrypted == (True, True)
