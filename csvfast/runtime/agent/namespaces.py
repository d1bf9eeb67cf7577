"""From a forked process to a container's program: namespaces, root file system, mounts, devices, capabilities, execve.

Runs between fork and exec, in a process with one thread. The specification is the runtime-spec's; what of it is done here:
process.{args,env,cwd,user,capabilities,noNewPrivileges,rlimits}, root.readonly, hostname, mounts, linux.{namespaces,maskedPaths,
readonlyPaths}. The root is left behind before anything in the image is looked at: its links lead nowhere else.

Sources: opencontainers/runtime-spec config.md, config-linux.md; opencontainers/runc libcontainer/rootfs_linux.go (order);
pivot_root(2) (pivot_root(".", ".")).
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from csvfast.runtime.agent import seccomp
from csvfast.runtime.agent import syscalls as system
from csvfast.runtime.agent_policy import CAPABILITIES

__all__ = ["FLAGS", "execute", "hold", "loopback_up", "run"]

FLAGS: Final = {
    "ipc": system.CLONE_NEWIPC, "uts": system.CLONE_NEWUTS, "network": system.CLONE_NEWNET, "mount": system.CLONE_NEWNS,
    "pid": system.CLONE_NEWPID, "cgroup": system.CLONE_NEWCGROUP,
}  # fmt: skip
NAMES: Final = {"network": "net", "mount": "mnt"}  # below /proc/PID/ns, where it is not the runtime-spec's

_OPTIONS: Final = {
    "ro": system.MS_RDONLY, "nosuid": system.MS_NOSUID, "nodev": system.MS_NODEV, "noexec": system.MS_NOEXEC,
    "bind": system.MS_BIND, "rbind": system.MS_BIND | system.MS_REC, "strictatime": 1 << 24, "relatime": 1 << 21, "noatime": 1024,
}  # fmt: skip
_IGNORED: Final = frozenset({"rw", "suid", "dev", "exec", "rprivate", "private", "defaults"})
_KINDS: Final = frozenset({"proc", "tmpfs", "devpts", "mqueue", "sysfs"})
_DEVICES: Final = {
    "null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0),
}  # fmt: skip
_LINKS: Final = {
    "fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}  # fmt: skip


def run(spec: Mapping[str, Any], rootfs: str, volumes: Sequence[tuple[str, str]] = ()) -> None:
    """Becomes the container's first program; the caller has made the PID namespace. Returns never but by OSError.

    In: rootfs   the tree that becomes /
        volumes  (directory here, path in the container): shared with other containers
    """
    last = _last_capability()
    system.not_dumpable()
    _namespaces(spec)
    if hostname := spec.get("hostname"):
        _sethostname(hostname)
    system.mount(None, "/", None, system.MS_REC | system.MS_PRIVATE)
    system.mount(rootfs, rootfs, None, system.MS_BIND | system.MS_REC)
    # No device of an image's is one here; a bind mount takes this only when it is mounted anew.
    system.mount(None, rootfs, None, system.MS_BIND | system.MS_REMOUNT | system.MS_NODEV)
    trees = [(system.open_tree(source), target) for source, target in volumes]
    os.chdir(rootfs)
    system.pivot_root(".", ".")
    system.umount(".", system.MNT_DETACH)
    os.chdir("/")
    for entry in spec.get("mounts", ()):
        _mount(entry)
    for tree, target in trees:
        Path(target).mkdir(0o755, parents=True, exist_ok=True)
        system.move_tree(tree, target)
        os.close(tree)
    _devices()
    linux = spec.get("linux", {})
    for path in linux.get("readonlyPaths", ()):
        _readonly(path)
    for path in linux.get("maskedPaths", ()):
        _mask(path)
    if spec.get("root", {}).get("readonly"):
        system.mount(None, "/", None, system.MS_BIND | system.MS_REMOUNT | system.MS_RDONLY | system.MS_NODEV)
    _become(spec["process"], last)


def execute(process: Mapping[str, Any], pidfd: int) -> None:
    """Becomes one more program of a container; the caller has entered its PID namespace. Returns never but by OSError.

    In: process  as the specification's   pidfd   of the container's first program
    """
    last = _last_capability()
    system.not_dumpable()  # before the container can see this process, whose program is the agent's
    system.setns(pidfd, sum(flag for name, flag in FLAGS.items() if name != "pid"))
    os.close(pidfd)
    _become(process, last)


def hold(hostname: str, network: bool) -> None:
    """Keeps a sandbox's namespaces: IPC, UTS, network. Returns never but by OSError."""
    system.unshare(system.CLONE_NEWIPC | system.CLONE_NEWUTS | (system.CLONE_NEWNET if network else 0))
    _sethostname(hostname)
    if network:
        loopback_up()
    with suppress(OSError):
        os.write(3, b"ready")
    os.close(3)
    while True:
        signal.pause()


def loopback_up() -> None:
    """Brings the interface lo up."""
    import fcntl
    import socket
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sH14x", b"lo", 0x41)  # IFF_UP, IFF_RUNNING
        fcntl.ioctl(control, 0x8914, request)  # SIOCSIFFLAGS


def _namespaces(spec: Mapping[str, Any]) -> None:
    new = 0
    for entry in spec.get("linux", {}).get("namespaces", ()):
        kind = entry["type"]
        if kind not in FLAGS:
            raise OSError(errno.EINVAL, f"namespace {kind[:20]!r} is not made here")
        if path := entry.get("path"):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                system.setns(descriptor, FLAGS[kind])
            finally:
                os.close(descriptor)
        elif kind != "pid":
            new |= FLAGS[kind]
    system.unshare(new | system.CLONE_NEWNS)
    if new & system.CLONE_NEWNET:
        loopback_up()


def _sethostname(name: str) -> None:
    import socket

    socket.sethostname(name)


def _mount(entry: Mapping[str, Any]) -> None:
    target, kind = entry["destination"], entry.get("type", "bind")
    flags, data = 0, []
    for option in entry.get("options", ()):
        if option in _OPTIONS:
            flags |= _OPTIONS[option]
        elif option not in _IGNORED:
            data.append(option)
    if kind in ("cgroup", "cgroup2"):
        if not Path("/sys/fs/cgroup").is_dir():
            return
        kind, data = "cgroup2", []
    elif kind not in _KINDS:
        raise OSError(errno.EINVAL, f"mount of type {str(kind)[:20]!r} is not made here", target)
    Path(target).mkdir(0o755, parents=True, exist_ok=True)
    if "tmpcopyup" in data:
        data.remove("tmpcopyup")
        tree = system.open_tree(target)
        system.mount(kind, target, kind, flags & ~system.MS_RDONLY, ",".join(data) or None)
        _copy(f"/proc/self/fd/{tree}", target)
        os.close(tree)
        return
    try:
        system.mount(entry.get("source", kind), target, kind, flags, ",".join(data) or None)
    except OSError:
        if kind not in ("cgroup2", "mqueue"):  # kernels without them
            raise


def _copy(source: str, target: str) -> None:
    """What lies in a directory, with owners and modes; links and files, no devices."""
    for name in os.listdir(source):  # noqa: PTH208 names alone
        here, there = f"{source}/{name}", f"{target}/{name}"
        status = os.lstat(here)
        if stat.S_ISLNK(status.st_mode):
            Path(there).symlink_to(Path(here).readlink())
        elif stat.S_ISDIR(status.st_mode):
            Path(there).mkdir()
            _copy(here, there)
        elif stat.S_ISREG(status.st_mode):
            with Path(here).open("rb") as old, Path(there).open("xb") as new:
                while chunk := old.read(1 << 20):
                    new.write(chunk)
        else:
            continue
        os.lchown(there, status.st_uid, status.st_gid)
        if not stat.S_ISLNK(status.st_mode):
            Path(there).chmod(stat.S_IMODE(status.st_mode))
    status = Path(source).stat()
    os.chown(target, status.st_uid, status.st_gid)
    Path(target).chmod(stat.S_IMODE(status.st_mode))


def _devices() -> None:
    if not os.path.ismount("/dev"):
        system.mount("tmpfs", "/dev", "tmpfs", system.MS_NOSUID, "mode=755,size=65536k")
    for name, (major, minor) in _DEVICES.items():
        os.mknod(f"/dev/{name}", stat.S_IFCHR | 0o666, os.makedev(major, minor))
        os.chmod(f"/dev/{name}", 0o666)  # noqa: S103 as everywhere
    for name, target in _LINKS.items():
        with suppress(FileExistsError):
            Path("/dev", name).symlink_to(target)


def _readonly(path: str) -> None:
    with suppress(FileNotFoundError):
        system.mount(path, path, None, system.MS_BIND | system.MS_REC)
        flags = system.MS_NOSUID | system.MS_NODEV | system.MS_NOEXEC
        system.mount(None, path, None, flags | system.MS_BIND | system.MS_REMOUNT | system.MS_RDONLY)


def _mask(path: str) -> None:
    try:
        system.mount("/dev/null", path, None, system.MS_BIND)
    except NotADirectoryError:
        system.mount("tmpfs", path, "tmpfs", system.MS_RDONLY, "size=0")
    except FileNotFoundError:
        pass


def _become(process: Mapping[str, Any], last: int) -> None:
    """The program's identity, and the program."""
    user = process.get("user", {})
    environment = dict(setting.split("=", 1) for setting in process.get("env", ()) if "=" in setting)
    directory = process.get("cwd", "/")
    os.umask(0o022)
    Path(directory).mkdir(0o755, parents=True, exist_ok=True)
    for limit in process.get("rlimits", ()):
        resource.setrlimit(getattr(resource, limit["type"]), (limit["soft"], limit["hard"]))
    given = process.get("capabilities", {})
    names = ("bounding", "effective", "permitted", "inheritable", "ambient")
    sets = {name: _numbers(given.get(name, ()), last) for name in names}
    for number in range(last + 1):
        if number not in sets["bounding"]:
            system.drop_bounding(number)
    uid, gid = user.get("uid", 0), user.get("gid", 0)
    system.set_keep()
    os.setgroups(user.get("additionalGids", []))
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    system.set_capabilities(sets["effective"], sets["permitted"], sets["inheritable"])
    for number in sets["ambient"]:
        system.raise_ambient(number)
    if process.get("noNewPrivileges", True):
        system.no_new_privileges()
        seccomp.install()
    system.die_with_parent(signal.SIGKILL)
    os.umask(user.get("umask", 0o022))
    os.chdir(directory)
    _execute(list(process["args"]), environment)


def _execute(arguments: list[str], environment: dict[str, str]) -> None:
    name = arguments[0]
    folders = [""] if "/" in name else environment.get("PATH", "/usr/bin:/bin").split(":")
    problem: OSError | None = None
    for folder in folders:
        path = f"{folder.rstrip('/')}/{name}" if folder else name
        try:
            os.execve(path, arguments, environment)  # noqa: S606 no shell is wanted
        except OSError as found:
            if problem is None or found.errno not in (errno.ENOENT, errno.ENOTDIR):
                problem = found
    raise OSError(problem.errno if problem else errno.ENOENT, os.strerror(problem.errno or 0) if problem else "no PATH", name)


def _numbers(names: Iterable[str], last: int) -> set[int]:
    return {number for number, name in enumerate(CAPABILITIES) if name in names and number <= last}


def _last_capability() -> int:
    return int(Path("/proc/sys/kernel/cap_last_cap").read_text(encoding="ascii"))
