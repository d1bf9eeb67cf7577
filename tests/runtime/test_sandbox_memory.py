"""Images that are larger than the memory an agent may take for them.

An image of 208 MiB runs natively; with CSVFAST_LARGE_IMAGE=208 one of so many MiB runs on every executor there is, the real guest
included (a minute and more).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("unicorn")

from machine import qemu_guest
from runtime.large_image import MIB, LargeImage, watched
from runtime.sandbox_rig import Demo

from csvfast.runtime.executor import executor_of

SIZE = 32
LARGE = int(os.environ.get("CSVFAST_LARGE_IMAGE", "0"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    with Demo(tmp_path_factory.mktemp("memory")) as demo:
        yield demo


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> LargeImage:
    """One layer: who held it in memory, encrypted or not, would be seen."""
    return LargeImage(tmp_path_factory.mktemp("layer"), SIZE, 1)


def peak(demo: Demo, executor: str, image: str, **more: object) -> int:
    done, watch = watched(demo.command(demo.allowed(executor=executor, image=image, **more)), 300)
    assert (done.returncode, done.stdout) == (7, b"hello from the container\n"), done.stderr
    assert watch.peak > 16 * MIB, "a Python"
    demo.assert_clean()
    return watch.peak


@pytest.mark.parametrize("executor", ["native", "emulator"])
def test_a_layer_does_not_stand_in_the_agents_memory(demo: Demo, layer: LargeImage, executor: str) -> None:
    if (reason := executor_of(executor).unavailable()) is not None:
        pytest.skip(reason)
    assert layer.clear_bytes >= SIZE * MIB
    assert layer.cipher_bytes > SIZE * MIB // 2
    small = peak(demo, executor, demo.image)
    assert peak(demo, executor, layer.reference) < small + 10 * MIB


def test_a_large_image(demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = LargeImage(tmp_path, LARGE or 208)
    assert image.clear_bytes >= (LARGE or 208) * MIB
    ran = []
    for executor in ("native", "emulator") if LARGE else ("native",):
        if (reason := executor_of(executor).unavailable()) is not None and not LARGE:
            pytest.skip(reason)
        if reason is None:
            assert peak(demo, executor, image.reference) < 128 * MIB
            ran.append(executor)
    if not LARGE:
        return
    monkeypatch.setenv("CSVFAST_VMRAM_LIBRARY", str(qemu_guest.preload_library()))
    if executor_of("vm").unavailable() is None:
        # 128 MiB beside the image's own, and the kernel with the initrd.
        memory = (-(-image.clear_bytes // MIB) + 128 + 128) << 20
        settings = {"accel": "tcg", "time_limit": "280"}
        options = demo.allowed(executor="vm", image=image.reference, memory=memory, settings=settings)
        done, _watch = watched(demo.command(options), 300)
        assert (done.returncode, done.stdout) == (7, b"hello from the container\n"), done.stderr
        demo.assert_clean()
        ran.append("vm")
    assert ran
