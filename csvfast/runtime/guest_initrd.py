"""The initrd of a confidential container's guest: csvfast's agent as its main program, and behind it a small archive with the
agent's configuration. Both are measured at launch.

    path = write_guest_initrd(configuration, work / "initrd")

The base (Python, csvfast, what it needs, kernel modules, busybox) is the same for every container. It is kept in the user's
cache, under a name made of what went into it: paths, sizes and times of its files. The bytes come from the files alone, so that
the launch digest can be told in advance, and on another machine with the same packages.

Sources: torvalds/linux Documentation/driver-api/early-userspace/buffer-format.rst (archives one behind another); QEMU
docs/system/devices/net.rst (user network: 10.0.2.0/24, the host is 10.0.2.2).
Thread-safety: functions without state; processes may share the cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from csvfast._files import write_atomically
from csvfast.machine.initrd import GUEST_MODULES, INIT, InitrdBuilder, boot_files
from csvfast.machine.initrd_cpio import CpioArchive
from csvfast.machine.initrd_python import GUEST_LEAVES_OUT, STANDARD_LEAVES_OUT, library_files, package_files
from csvfast.runtime.protocol import PORT_NAME

__all__ = ["CONFIGURATION_PLACE", "base_initrd", "configuration_archive", "write_guest_initrd"]

CONFIGURATION_PLACE: Final = "/etc/csvfast/agent.json"
_MODULES: Final = (*(name for name in GUEST_MODULES if name != "cuse"), "virtio_net")
_PACKAGES: Final = ("csvfast", "cryptography", "_cffi_backend", "OpenSSL", "cbor2", "rfc8785", "typing_extensions")
_OPTIONAL: Final = ("zstandard",)  # layers in that format

# OpenSSL's plain code for SHA-256 runs twice as fast on an emulated processor as its vector code (87 and 40 MB/s); AES keeps its
# instructions. The mask takes SSSE3 and AVX away, and everything newer. Source: OpenSSL's OPENSSL_ia32cap(3).
RUN: Final = f"""\
grep -q -m 1 'QEMU TCG' /proc/cpuinfo && export OPENSSL_ia32cap=~0x1000020000000000:0
ip addr add 10.0.2.15/24 dev eth0 2>/dev/null
ip link set eth0 up 2>/dev/null
ip route add default via 10.0.2.2 2>/dev/null
mount -o remount,size=95% /run
exec python3 -I -m csvfast.runtime.agent --link /dev/virtio-ports/{PORT_NAME} --configuration {CONFIGURATION_PLACE} \\
    --executor vm --work /run/csvfast
"""

# What the agent speaks HTTPS with, which other guests do without.
_STANDARD: Final = (STANDARD_LEAVES_OUT - {"_hashlib", "_ssl", "ssl"}) | {
    "_codecs_cn", "_codecs_hk", "_codecs_iso2022", "_codecs_jp", "_codecs_kr", "_codecs_tw", "_decimal", "_multibytecodec",
    "_pydecimal", "_pyio", "asyncio", "audioop", "cProfile", "cgi", "cgitb", "ftplib", "imaplib", "mailbox",
    "multiprocessing", "nntplib", "optparse", "pdb", "pickletools", "poplib", "profile", "pstats", "pyexpat", "smtplib",
    "sqlite3", "symtable", "tarfile", "telnetlib", "timeit", "trace", "tracemalloc", "uu", "venv", "webbrowser", "xdrlib",
    "xml", "zipapp", "zipfile",
}  # fmt: skip
# Of csvfast.broker, what its guests use.
_BROKER: Final = frozenset({
    "__init__", "clients", "clients.__init__", "clients.http", "clients.kbs", "clients.verdictd", "clients.verdictd_steps",
    "json_input", "kbs", "kbs.__init__", "kbs.jwe", "kbs.jwk", "kbs.report_data", "keyprovider", "keyprovider.__init__",
    "keyprovider.messages", "model", "verdictd", "verdictd.__init__", "verdictd.protocol",
})  # fmt: skip
_LEAVES_OUT: Final = (GUEST_LEAVES_OUT - {"csvfast.broker", "csvfast.ratstls"}) | {
    "csvfast.fleet", "csvfast.image.server", "csvfast.machine.trace", "csvfast.measure.batch", "csvfast.measure.fleet",
    "csvfast.ratstls.asynchronous", "csvfast.ratstls.stream", "zstandard._cffi", "zstandard.backend_cffi",
}  # fmt: skip


def write_guest_initrd(configuration: bytes, path: str | os.PathLike[str]) -> Path:
    """Writes the initrd of a guest with this configuration of its agent.

    Raises: ArgumentError (a module, program or package is not there), FormatError, OSError.
    """
    out = Path(path)
    base = base_initrd()
    with base.open("rb") as source, out.open("wb") as target:
        size = os.fstat(source.fileno()).st_size
        sent = 0
        while sent < size and (count := os.sendfile(target.fileno(), source.fileno(), sent, size - sent)):
            sent += count
        target.seek(0, os.SEEK_END)
        target.write(configuration_archive(configuration))
    return out


def configuration_archive(configuration: bytes) -> bytes:
    """The second archive: /etc/csvfast/agent.json."""
    archive = CpioArchive()
    archive.file(CONFIGURATION_PLACE, configuration)
    return archive.encode()


def base_initrd(cache: Path | None = None) -> Path:
    """The first archive, built unless the cache has it. Errors as write_guest_initrd()."""
    folder = _cache() if cache is None else cache
    leaves_out = _LEAVES_OUT | set(_broker_leaves_out())
    packages = [name for name in (*_PACKAGES, *_OPTIONAL) if name in _PACKAGES or importlib.util.find_spec(name)]
    path = folder / f"{_signature(leaves_out, packages)}.initrd"
    if not path.is_file():
        builder = InitrdBuilder()
        builder.init(INIT)
        builder.run(RUN)
        builder.busybox(boot_files() / "busybox")
        builder.modules(boot_files() / "modules", _MODULES)
        builder.python(packages, leaves_out=frozenset(_STANDARD | leaves_out))
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        data = builder.encode()
        _remove_old(folder)
        write_atomically(path, data)
    return path


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "csvfast" / "guest"


def _remove_old(folder: Path) -> None:
    """Two are kept: of this version and of the one before."""
    for path in sorted(folder.glob("*.initrd"), key=lambda path: path.stat().st_mtime)[:-1]:
        path.unlink(missing_ok=True)


def _broker_leaves_out() -> Iterator[str]:
    for place, _ in package_files("csvfast.broker", frozenset()):
        module = place.removeprefix("csvfast/broker/").rpartition(".")[0].replace("/", ".")
        if module not in _BROKER:
            yield f"csvfast.broker.{module.removesuffix('.__init__')}"


def _signature(leaves_out: frozenset[str], packages: list[str]) -> str:
    """Of the files that go in. A file's time of change cannot be set, so that a changed one is seen."""
    found = hashlib.sha256(f"{sys.version} {sorted(leaves_out)} {packages} {RUN} {INIT}".encode())
    files = [file for _, file in library_files(frozenset(_STANDARD))]
    for package in packages:
        files += [file for _, file in package_files(package, leaves_out)]
    files += [boot_files() / "busybox", *sorted((boot_files() / "modules").glob("*.ko*")), Path(sys.executable).resolve()]
    for file in files:
        status = file.stat()
        found.update(f"{file} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n".encode())
    return found.hexdigest()[:32]
