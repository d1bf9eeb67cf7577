"""While a container holds secrets and after it: neither the layers' plaintext nor a key is in any file that the run touched, in
the DRAM, or in the memory of the host's own process."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("unicorn")

from runtime.sandbox_rig import (
    HELD,
    KEK,
    MARK,
    Demo,
    drams_of,
    family,
    found_in,
    found_in_memory,
    search,
    secrets,
)

from csvfast.processor.core import C_BIT
from csvfast.runtime.monitor import Monitor


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    with Demo(tmp_path_factory.mktemp("search")) as demo:
        yield demo


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(bytes(70_000) + MARK)
    assert search([tmp_path], secrets()) == [(tmp_path / "deep" / "file", MARK)]
    assert found_in_memory(os.getpid(), [MARK, KEK]) == sorted([MARK, KEK])


def test_the_guests_key_opens_the_dram(demo: Demo) -> None:
    """The program's memory is in the platform's DRAM, at the guest's addresses, under the guest's key: that opens it."""
    options = demo.allowed(args=["/bin/program", "hold"])
    with Monitor(options, "opened", root=demo.root, transient=True) as monitor:
        container = monitor.create()
        out, theirs = os.pipe()
        container.attach(None, theirs, theirs)
        container.start()
        with os.fdopen(out, "rb") as stream:
            assert stream.readline() == b"holding\n"
        launched = monitor.sandbox.launch_record
        assert launched is not None
        host, handle = monitor.sandbox.host, launched.handle
        ram = next(one for one in host.machine.guest_ranges(handle) if one.guest_physical == 0)
        ciphertext = os.pread(host.descriptor, ram.size, ram.address)
        pieces = range(ram.address, ram.address + ram.size, 1 << 20)
        assert any(HELD in host.machine.guest_read(handle, place | C_BIT, 1 << 20) for place in pieces)
        assert HELD not in ciphertext
        container.signal(signal.SIGKILL)
        assert container.wait(30) == 137
        os.close(theirs)


def test_nothing_is_found_outside_of_the_guest(demo: Demo, tmp_path: Path) -> None:
    options = demo.allowed(args=["/bin/program", "hold"])
    dram = tmp_path / "dram"
    command = demo.command(options, "--dram", str(dram))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            assert process.stdout.readline() == b"holding\n", process.stderr.read()
            files = [demo.root, demo.cache, demo.layout, tmp_path]
            assert search(files, secrets()) == []
            # The files of the container are there, as ciphertext: the image's and what the program has written.
            big = [path for path in demo.root.rglob("*") if path.is_file() and path.stat().st_size >= 1 << 20]
            assert big
            # All of their machines: this one's DRAM is a file.
            assert drams_of(family(process.pid)) == []
            assert dram.stat().st_size > options.memory
            assert found_in(dram, secrets()) == []
            assert found_in_memory(process.pid, [MARK, HELD, KEK]) == []
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 42
    assert search([demo.root, demo.cache, demo.layout, tmp_path], secrets()) == []
    demo.assert_clean()
