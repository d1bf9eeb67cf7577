"""An initrd for a guest, the same bytes from the same inputs: its digest, and with it the launch digest, can be told in advance.

    initrd = build_initrd("guest.initrd", run="python3 -m csvfast.machine.guest report")
    initrd.sha256                                   # what the firmware's hash table will hold

In it: busybox and its applets, the kernel modules asked for, the running Python with its standard library (compiled ahead,
without what no guest needs), packages, files of the caller's, and /init: it mounts /proc, /sys and /dev, loads the modules, names
the virtio ports, runs the command and switches the machine off. The command is the first of: `csvfast.run="..."` on the kernel's
command line, /etc/csvfast/run in the initrd; without either it is a shell on the console. Then /init prints `guest: exit N`.

Nothing of the building machine's clock, users or paths gets in. What does: its interpreter, libraries and packages, as inputs.
Kept by the initrd for everybody to read: it is measured, not encrypted; keys and passwords do not belong in it.

Sources: torvalds/linux Documentation/filesystems/ramfs-rootfs-initramfs.rst, Documentation/admin-guide/devices.txt.
Thread-safety: functions without shared state; one builder, one thread.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from csvfast._files import write_atomically
from csvfast.errors import ArgumentError
from csvfast.machine.initrd_cpio import CpioArchive
from csvfast.machine.initrd_elf import is_elf, libraries, stripped
from csvfast.machine.initrd_modules import load_order
from csvfast.machine.initrd_python import (
    GUEST_LEAVES_OUT,
    STANDARD_LEAVES_OUT,
    compiled,
    library_files,
    package_files,
)

__all__ = ["GUEST_MODULES", "INIT", "Initrd", "InitrdBuilder", "boot_files", "build_initrd"]

GUEST_MODULES: Final = ("virtio_pci", "virtio_console", "virtio-rng", "cuse")
Compression = Literal["none", "gzip"]

_LIBRARIES: Final = "/lib"  # one of the loader's own places on every Linux
_APPLETS: Final = "/bin"

INIT: Final = """\
#!/bin/sh
# First program of the guest. What it runs: csvfast.run="..." on the kernel's command line, or else /etc/csvfast/run.
export PATH=/usr/bin:/bin HOME=/root TERM=linux LD_LIBRARY_PATH=/lib PYTHONDONTWRITEBYTECODE=1
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev || mount -t tmpfs tmpfs /dev
mkdir -p /dev/pts /dev/shm /dev/virtio-ports
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
ln -s /proc/self/fd /dev/fd 2>/dev/null
# Locked pages stay where they are: the processor is told physical addresses.
echo 0 >/proc/sys/vm/compact_unevictable_allowed
if [ -f /etc/csvfast/modules ]; then
    while read -r module; do
        insmod "/lib/modules/$module" || echo "guest: module $module could not be loaded"
    done </etc/csvfast/modules
fi
for port in /sys/class/virtio-ports/*; do
    [ -e "$port/name" ] && ln -s "../${port##*/}" "/dev/virtio-ports/$(cat "$port/name")"
done
ip link set lo up 2>/dev/null
command=$(sed -n -e 's/^.*csvfast\\.run="\\([^"]*\\)".*$/\\1/p' -e t -e 's/^.*csvfast\\.run=\\([^ "]*\\).*$/\\1/p' /proc/cmdline)
cd /root
if [ -n "$command" ]; then
    sh -c "$command" </dev/null
elif [ -f /etc/csvfast/run ]; then
    sh /etc/csvfast/run </dev/null
else
    setsid cttyhack sh
fi
code=$?
echo "guest: exit $code"
sync
sleep 0.2 # the console's last line leaves
poweroff -f
"""


def boot_files() -> Path:
    """Where guests' kernels, modules and busybox are looked for: $CSVFAST_BOOT_FILES, or csvfast/boot in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("CSVFAST_BOOT_FILES") or cache / "csvfast" / "boot")


@dataclass(frozen=True, slots=True)
class Initrd:
    """A built initrd: where it is, its size in bytes, and its SHA-256 as the hash table of the launch holds it."""

    path: Path
    size: int
    sha256: bytes


class InitrdBuilder:
    """Puts an initrd together piece by piece. `archive` is open to whatever else an initrd needs."""

    def __init__(self) -> None:
        self.archive = CpioArchive()
        for folder in ("/bin", "/dev", "/etc", "/lib", "/proc", "/root", "/run", "/sys", "/tmp", "/usr/bin"):  # noqa: S108 the guest's
            self.archive.folder(folder, 0o700 if folder == "/root" else 0o755)
        self.archive.character_device("/dev/console", 5, 1)
        self.archive.file("/etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
        self.archive.file("/etc/group", b"root:x:0:\n")

    def init(self, text: str = INIT) -> None:
        """/init, a shell script unless its first line says otherwise."""
        self.archive.file("/init", text.encode(), 0o755)

    def run(self, command: str) -> None:
        """What /init runs when the kernel's command line names nothing: lines of shell."""
        self.archive.file("/etc/csvfast/run", command.encode() + b"\n")

    def busybox(self, path: str | os.PathLike[str]) -> None:
        """busybox and a link for every applet.

        ArgumentError: it does not run here, or is not static. FormatError: no x86-64 program.
        """
        program = Path(path)
        loader, needed = libraries(program)
        if loader or needed:
            raise ArgumentError(f"{program} needs {', '.join(needed)}; expected a static busybox (package busybox-static)")
        # The file need not be executable: a copy may have lost that.
        done = subprocess.run(
            [os.fspath(program), "--list"], capture_output=True, text=True, check=False, timeout=30, env={}
        )
        applets = sorted(set(done.stdout.split()) - {"busybox"})
        if done.returncode or "sh" not in applets:
            raise ArgumentError(f"{program} --list names no shell; expected busybox")
        self.archive.file(f"{_APPLETS}/busybox", stripped(program.read_bytes(), os.fspath(program)), 0o755)
        for applet in applets:
            self.archive.link(f"{_APPLETS}/{applet}", "busybox")

    def modules(self, folder: str | os.PathLike[str], names: Iterable[str] = GUEST_MODULES) -> None:
        """Kernel modules with what they need; /init loads them in that order. Errors as load_order()."""
        order = load_order(folder, names)
        for name, data in order.items():
            self.archive.file(f"/lib/modules/{name}.ko", data)
        self.archive.file("/etc/csvfast/modules", "".join(f"{name}.ko\n" for name in order).encode())

    def program(self, place: str, path: str | os.PathLike[str]) -> None:
        """A program or a shared library with the libraries it needs; a script is copied as it is. Errors as libraries()."""
        source = Path(path)
        data = source.read_bytes()
        if not is_elf(data):
            self.archive.file(place, data, 0o755)
            return
        loader, needed = libraries(source)
        self.archive.file(place, stripped(data, os.fspath(source)), 0o755)
        if loader is not None and loader not in self.archive:
            self.archive.file(loader, stripped(Path(loader).read_bytes(), loader), 0o755)
        for name, library in needed.items():
            if f"{_LIBRARIES}/{name}" not in self.archive:
                self.archive.file(f"{_LIBRARIES}/{name}", stripped(library.read_bytes(), os.fspath(library)), 0o755)

    def python(
        self,
        packages: Iterable[str] = ("csvfast",),
        *,
        leaves_out: frozenset[str] = STANDARD_LEAVES_OUT | GUEST_LEAVES_OUT,
    ) -> None:
        """The running interpreter as /usr/bin/python3, its standard library, and packages installed for it.

        In: leaves_out  modules and packages (dotted) that do not go in
        Raises: ArgumentError: no such package; FormatError: a source that does not compile; OSError.
        """
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        self.program(f"/usr/bin/{version}", Path(getattr(sys, "_base_executable", "") or sys.executable).resolve())
        self.archive.link("/usr/bin/python3", version)
        root = f"/usr/lib/{version}"
        # An empty folder of this name is what the interpreter knows its prefix by.
        self.archive.folder(f"{root}/lib-dynload")
        for place, file in library_files(leaves_out):
            self._module(f"{root}/{place}", file)
        for package in packages:
            for place, file in package_files(package, leaves_out):
                self._module(f"{root}/site-packages/{place}", file)

    def files(self, content: Mapping[str, bytes]) -> None:
        """Files of the caller's by their path; one that begins with "#!" or is a program becomes executable."""
        for place, data in content.items():
            self.archive.file(place, data, 0o755 if data[:2] == b"#!" or is_elf(data) else 0o644)

    def encode(self, compress: Compression = "none") -> bytes:
        """The initrd. gzip's bytes depend on the version of zlib, too."""
        if "/init" not in self.archive:
            raise ArgumentError("an initrd without /init; expected init() or a file of that name")
        whole = self.archive.encode()
        if compress == "none":
            return whole
        if compress == "gzip":
            packer = zlib.compressobj(6, zlib.DEFLATED, 31)  # a gzip header without name and time
            return packer.compress(whole) + packer.flush()
        raise ArgumentError(f"compress is {compress!r}; expected 'none' or 'gzip'")

    def write(self, path: str | os.PathLike[str], compress: Compression = "none") -> Initrd:
        """Writes the initrd; a file of that name is replaced as a whole. Raises OSError."""
        data = self.encode(compress)
        write_atomically(Path(path), data)
        return Initrd(Path(path), len(data), hashlib.sha256(data).digest())

    def _module(self, place: str, file: Path) -> None:
        if file.suffix == ".so":
            self.program(place, file)
        else:
            self.archive.file(f"{place}c", compiled(file.read_bytes(), place))


def build_initrd(
    out: str | os.PathLike[str],
    *,
    modules: Iterable[str] = GUEST_MODULES,
    module_folder: str | os.PathLike[str] | None = None,
    busybox: str | os.PathLike[str] | None = None,
    python: bool = True,
    packages: Iterable[str] = ("csvfast",),
    files: Mapping[str, bytes] | None = None,
    run: str | None = None,
    init: str = INIT,
    compress: Compression = "none",
) -> Initrd:
    """Builds an initrd and writes it to `out`.

    In: modules        kernel modules, loaded with what they need; none of them = no module folder is needed
        module_folder  where they are; None = boot_files()/modules
        busybox        a static busybox; None = boot_files()/busybox, or the system's
        python         False = no Python and no packages
        files          more files by their path in the guest
        run            lines of shell for /etc/csvfast/run
    Raises: ArgumentError: a module, program or package that is not there; FormatError: a file of another kind; OSError.
    """
    builder = InitrdBuilder()
    builder.init(init)
    builder.busybox(_find_busybox() if busybox is None else busybox)
    wanted = tuple(modules)
    if wanted:
        builder.modules(boot_files() / "modules" if module_folder is None else module_folder, wanted)
    if python:
        builder.python(packages)
    if run is not None:
        builder.run(run)
    builder.files(files or {})
    return builder.write(out, compress)


def _find_busybox() -> Path:
    for path in (boot_files() / "busybox", Path("/bin/busybox"), Path("/usr/bin/busybox")):
        if path.is_file():
            return path
    raise ArgumentError(f"no busybox in {boot_files()} or the system; expected one (package busybox-static)")
