"""The whole way with others' tools: skopeo encrypts an image by the broker's key provider into docker-registry, `csvfast run`
fetches it from there and runs it, in a real Linux guest, too."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from broker.services import skopeo
from interop.test_registries import docker_registry
from machine import qemu_guest
from runtime.sandbox_rig import PATH, Demo, make_clear

from csvfast.runtime.executor import executor_of

__all__ = ["docker_registry", "skopeo"]

SETTINGS = {"vm": {"accel": "tcg", "time_limit": "150"}}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    with Demo(tmp_path_factory.mktemp("run")) as demo:
        yield demo


@pytest.fixture
def image(demo: Demo, skopeo: list[str], docker_registry: str, tmp_path: Path) -> str:
    """In the registry; nothing of it on this machine."""
    make_clear(tmp_path / "clear", "1")
    (tmp_path / "ocicrypt.json").write_text(
        json.dumps({"key-providers": {"attestation-agent": {"grpc": demo.broker.doors["keyprovider"]}}})
    )
    name = f"docker://{docker_registry}/team/app:1"
    done = subprocess.run(
        [*skopeo, "copy", "--insecure-policy", "--dest-tls-verify=false", "--encryption-key",
         f"provider:attestation-agent:{PATH}", f"oci:{tmp_path}/clear:1", name],
        env={"OCICRYPT_KEYPROVIDER_CONFIG": str(tmp_path / "ocicrypt.json"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path),
             "TMPDIR": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return name


@pytest.mark.parametrize(("executor", "direct"), [("emulator", False), ("native", True), ("vm", False)])
def test_an_image_of_skopeos_runs(
    demo: Demo, image: str, executor: str, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if executor == "vm":
        monkeypatch.setenv("CSVFAST_VMRAM_LIBRARY", str(qemu_guest.preload_library()))
    if (reason := executor_of(executor).unavailable()) is not None:
        pytest.skip(reason)
    options = demo.allowed(executor=executor, image=image, direct=direct, settings=SETTINGS.get(executor, {}), memory=224 << 20)
    done = demo.run(options, *(["--direct"] if direct else []), seconds=170)
    assert (done.returncode, done.stdout) == (7, b"hello from the container\n"), done.stderr
    assert done.stderr.endswith(b"a complaint\n")
    demo.assert_clean()
