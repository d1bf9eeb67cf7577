"""The initrd of a guest with the agent: what is in it, what is not, the same bytes again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csvfast.machine.initrd import boot_files
from csvfast.runtime.guest_initrd import CONFIGURATION_PLACE, base_initrd, configuration_archive, write_guest_initrd

NEEDS_FILES = pytest.mark.skipif(
    not (boot_files() / "modules" / "virtio_net.ko").is_file(), reason="no guest files: run tools/install-test-tools.sh"
)


def entries(archive: bytes) -> dict[str, bytes]:
    """Files of archives in the "newc" format, one behind another."""
    found, place = {}, 0
    while place < len(archive):
        if archive[place : place + 6] != b"070701":
            place += 4
            continue
        fields = [int(archive[place + 6 + 8 * number : place + 14 + 8 * number], 16) for number in range(13)]
        name = archive[place + 110 : place + 109 + fields[11]].decode()
        place += (110 + fields[11] + 3) // 4 * 4
        found[name] = archive[place : place + fields[6]]
        place += (fields[6] + 3) // 4 * 4
    return found


@given(st.binary(max_size=300))
def test_configuration_archive(configuration: bytes) -> None:
    archive = configuration_archive(configuration)
    assert entries(archive)[CONFIGURATION_PLACE[1:]] == configuration
    assert len(archive) % 512 == 0
    assert configuration_archive(configuration) == archive


GUEST = """
import sys
from csvfast.runtime import guest_initrd as place

class Missing:
    def __init__(self):
        self.out = place._STANDARD | place._LEAVES_OUT | set(place._broker_leaves_out())
        self.there = set(sys.stdlib_module_names) | set(place._PACKAGES)
    def find_spec(self, name, path=None, target=None):
        if name in self.out or name.partition(".")[0] not in self.there:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

missing = Missing()
for name in list(sys.modules):
    if name.startswith("csvfast") or name in missing.out:
        del sys.modules[name]
sys.meta_path.insert(0, missing)
import csvfast.runtime.agent.__main__, csvfast.runtime.agent.server, csvfast.runtime.agent.spawner, csvfast.runtime.protocol
import csvfast.runtime.agent.containers_namespaces, csvfast.runtime.agent.configuration, csvfast.runtime.agent.doors
started = set(sys.modules)
import csvfast.machine.guest, csvfast.image.assemble, csvfast.image.bundle, csvfast.image.registry, csvfast.image.wrappers
import csvfast.broker.clients.verdictd, csvfast.broker.clients.kbs, csvfast.broker.keyprovider.messages
import gzip, zlib
print(sorted(started & {"cryptography", "OpenSSL", "ssl", "http.client", "csvfast.image", "csvfast.memory", "csvfast.processor"}))
print(sorted(set(sys.modules) & {"asyncio", "numpy", "sqlalchemy", "grpc", "starlette", "typer", "csvfast.memory"}))
"""


def test_the_agent_needs_nothing_else() -> None:
    """Everything it imports is in the initrd, and little of it at its start."""
    done = subprocess.run([sys.executable, "-c", GUEST], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]


@NEEDS_FILES
def test_what_is_in_it(tmp_path: Path) -> None:
    one = base_initrd()
    assert base_initrd() == one, "it is built once"
    whole = one.read_bytes()
    assert base_initrd(tmp_path).read_bytes() == whole, "the same bytes from the same files"
    files = entries(whole)
    modules = {name.partition("site-packages/")[2] for name in files if "site-packages/" in name}
    for name in (
        "csvfast/runtime/agent/__main__.pyc", "csvfast/broker/clients/verdictd.pyc", "csvfast/broker/kbs/jwe.pyc",
        "csvfast/image/assemble.pyc", "csvfast/ratstls/blocking.pyc", "cryptography/__init__.pyc", "OpenSSL/SSL.pyc",
    ):  # fmt: skip
        assert name in modules
    for name in ("broker/store", "broker/service", "cli", "machine/emulator", "benchmark"):
        assert not any(module.startswith(f"csvfast/{name}") for module in modules), name
    assert b"csvfast.runtime.agent" in files["etc/csvfast/run"]
    assert "lib/modules/virtio_net.ko" in files
    assert CONFIGURATION_PLACE[1:] not in files, "the base is the same for everybody"
    assert len(whole) < 64 << 20


@NEEDS_FILES
def test_initrd_with_configuration(tmp_path: Path) -> None:
    path = write_guest_initrd(b'{"version":1}', tmp_path / "initrd")
    whole = path.read_bytes()
    base = base_initrd().read_bytes()
    assert whole == base + configuration_archive(b'{"version":1}')
    assert write_guest_initrd(b'{"version":2}', tmp_path / "other").read_bytes() != whole
