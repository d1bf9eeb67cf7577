"""A bundle: config.json of the OCI runtime specification for an unpacked image, as runc and crun run it.

image-spec conversion.md; runtime-spec config.md and config-linux.md.
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from csvfast._files import write_atomically
from csvfast.errors import ImageError
from csvfast.image.image_config import ImageConfiguration
from csvfast.image.seccomp import default_profile
from csvfast.image.tree import RootDirectory
from csvfast.image.users import ReadFile, User, lookup_user

__all__ = ["CAPABILITIES", "DEFAULT_PATH", "read_in_root", "runtime_specification", "write_bundle"]

DEFAULT_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CAPABILITIES: Final = tuple(
    f"CAP_{name}"
    for name in (
        "CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP",
        "NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE",
    )
)  # fmt: skip
_SAFE: Final = ["nosuid", "noexec", "nodev"]
_MASKED: Final = [
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
    "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
]  # fmt: skip
_READ_ONLY: Final = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
_KERNEL_PLACES: Final = ("proc", "sys", "dev")
# Names that runtimes take orders from: crun(1) (another seccomp filter, the host's groups, plug-ins), systemd's units, CRIU's
# configuration, Kata, gVisor, CRI. An image has none to give; whoever runs it may, by `annotations`.
_ORDERS: Final = (
    "run.oci.", "module.wasm.image/", "org.systemd.property.", "org.criu.", "io.katacontainers.", "io.kubernetes.", "dev.gvisor.",
)  # fmt: skip


def read_in_root(rootfs: Path | str) -> ReadFile:
    """Reads files of a tree whose contents are plain; links are followed within the tree and never out of it."""

    def read(path: str, limit: int) -> bytes | None:
        root = RootDirectory(rootfs)
        try:
            return root.read_file(path, limit)
        finally:
            root.close()

    return read


def write_bundle(
    config: ImageConfiguration, rootfs: Path, bundle: Path, *, read: ReadFile | None = None, **options: Any
) -> Path:
    """Writes config.json into a bundle's directory; gives its path.

    In: config    of the image
        rootfs    the unpacked tree, in the bundle or elsewhere
        bundle    an existing directory
        read      reads files of the container (see ReadFile) where their contents are not plain on disk
        options   of `runtime_specification`
    Raises ImageError for a configuration that cannot be run, OSError.
    """
    user = lookup_user(options.pop("user", None) or config.user, read or read_in_root(rootfs))
    place = rootfs.name if rootfs.parent.resolve() == bundle.resolve() else str(rootfs.resolve())
    specification = runtime_specification(config, user, root_path=place, **options)
    file = bundle / "config.json"
    write_atomically(file, json.dumps(specification, indent=2) + "\n")
    return file


def runtime_specification(
    config: ImageConfiguration,
    user: User,
    *,
    root_path: str = "rootfs",
    command: Sequence[str] | None = None,
    entrypoint: Sequence[str] | None = None,
    environment: Sequence[str] = (),
    working_directory: str | None = None,
    hostname: str = "csvfast",
    read_only: bool = False,
    terminal: bool = False,
    rootless: bool = False,
    network: bool = True,
    cgroup: bool = False,
    memory_bytes: int | None = None,
    pids: int | None = None,
    mounts: Sequence[Mapping[str, Any]] = (),
    annotations: Mapping[str, str] | None = None,
    seccomp: bool = True,
) -> dict[str, Any]:
    """The object in config.json.

    In: config              of the image
        user                of `lookup_user`
        root_path           absolute, or relative to the bundle
        command             in the place of the image's command; its entrypoint stays
        entrypoint          in the place of the image's entrypoint, whose command is then dropped, too
        environment         "NAME=value", over the image's
        working_directory   in the place of the image's
        rootless            for a runtime that an ordinary user starts: a user namespace in which only root exists
        network             a network namespace of its own, without any device but lo; False: the caller's network
        cgroup              mount the control groups, read-only, in a namespace of their own
        memory_bytes, pids  limits
        mounts              further ones, of the runtime specification
        annotations         over those that the image gives
        seccomp             the default profile, where this machine's calls are known
    Volumes become tmpfs mounts that begin with what the image has there ("tmpcopyup").
    Raises ImageError for a configuration that cannot be run.
    """
    if entrypoint is not None:
        arguments = [*entrypoint, *(command or ())]
    else:
        arguments = [*config.entrypoint, *(config.command if command is None else command)]
    if not arguments or not arguments[0]:
        raise ImageError("image configuration", "no command to run: neither Entrypoint nor Cmd, and none was given")
    variables = _environment(config, user, environment, terminal)
    directory = working_directory or config.working_directory or "/"
    if not directory.startswith("/"):
        raise ImageError("working directory", f"{directory[:80]!r}; expected an absolute path")
    directory = f"/{posixpath.normpath(directory).lstrip('/')}"
    if directory.startswith("/proc/"):  # where a runtime's own open files are (CVE-2024-21626)
        raise ImageError("working directory", f"{directory[:80]!r}; expected a place outside /proc")
    if rootless and (user.uid, user.gid) != (0, 0):
        raise ImageError("user", f"{user.uid}:{user.gid} does not exist in a container of an ordinary user, where only root does")
    # As container engines do it: a program that does not run as root begins without capabilities.
    own = list(CAPABILITIES) if user.uid == 0 else []
    groups = [] if rootless else list(user.groups)
    namespaces = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]
    namespaces += [{"type": "network"}] if network else []
    namespaces += [{"type": "cgroup"}] if cgroup else []
    linux: dict[str, Any] = {
        "namespaces": namespaces,
        "maskedPaths": _MASKED,
        "readonlyPaths": _READ_ONLY,
        "resources": _resources(memory_bytes, pids, rootless=rootless),
    }
    if rootless:
        namespaces.append({"type": "user"})
        linux["uidMappings"] = [{"containerID": 0, "hostID": os.geteuid(), "size": 1}]
        linux["gidMappings"] = [{"containerID": 0, "hostID": os.getegid(), "size": 1}]
    profile = default_profile() if seccomp else None
    if profile is not None:
        linux["seccomp"] = profile
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": terminal,
            "user": {"uid": user.uid, "gid": user.gid, **({"additionalGids": groups} if groups else {})},
            "args": arguments,
            "env": variables,
            "cwd": directory,
            "capabilities": {"bounding": list(CAPABILITIES), "effective": own, "permitted": own},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
        },
        "root": {"path": root_path, "readonly": read_only},
        "hostname": hostname,
        "mounts": [*_default_mounts(rootless=rootless, network=network, cgroup=cgroup), *_volumes(config), *map(dict, mounts)],
        "annotations": {**_annotations(config), **(annotations or {})},
        "linux": linux,
    }


def _environment(config: ImageConfiguration, user: User, given: Sequence[str], terminal: bool) -> list[str]:
    variables = {"PATH": DEFAULT_PATH}
    if terminal:
        variables["TERM"] = "xterm"
    variables["HOME"] = user.home or ("/root" if user.uid == 0 else "/")
    for one in (*config.environment, *given):
        name, equals, value = one.partition("=")
        if not name or not equals or "\0" in one:
            raise ImageError("environment", f"{one[:80]!r}; expected NAME=value")
        variables[name] = value
    return [f"{name}={value}" for name, value in variables.items()]


def _resources(memory_bytes: int | None, pids: int | None, *, rootless: bool) -> dict[str, Any]:
    resources: dict[str, Any] = {}
    if not rootless:
        resources["devices"] = [{"allow": False, "access": "rwm"}]
    if memory_bytes is not None:
        resources["memory"] = {"limit": memory_bytes}
    if pids is not None:
        resources["pids"] = {"limit": pids}
    return resources


def _mount(destination: str, kind: str, source: str, *options: str) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": source, "options": list(options)}


def _default_mounts(*, rootless: bool, network: bool, cgroup: bool) -> list[dict[str, Any]]:
    terminals = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]
    mounts = [
        _mount("/proc", "proc", "proc", *_SAFE),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        # The group "tty" does not exist where only root does.
        _mount("/dev/pts", "devpts", "devpts", *terminals, *([] if rootless else ["gid=5"])),
        _mount("/dev/shm", "tmpfs", "shm", *_SAFE, "mode=1777", "size=65536k"),  # noqa: S108 -- a mount within the container
        _mount("/dev/mqueue", "mqueue", "mqueue", *_SAFE),
    ]
    if rootless and not network:  # the kernel gives sysfs only to whom the network belongs
        mounts.append(_mount("/sys", "none", "/sys", "rbind", *_SAFE, "ro"))
    else:
        mounts.append(_mount("/sys", "sysfs", "sysfs", *_SAFE, "ro"))
    if cgroup:
        mounts.append(_mount("/sys/fs/cgroup", "cgroup", "cgroup", *_SAFE, "relatime", "ro"))
    return mounts


def _volumes(config: ImageConfiguration) -> list[dict[str, Any]]:
    mounts = []
    for volume in sorted(config.volumes):
        path = posixpath.normpath(f"/{volume}").replace("//", "/")
        if path == "/" or ".." in volume.split("/") or path.split("/")[1] in _KERNEL_PLACES:
            raise ImageError("image configuration", f"a volume at {volume[:80]!r}, where none can be")
        mounts.append(_mount(path, "tmpfs", "tmpfs", "nosuid", "nodev", "mode=755", "tmpcopyup"))
    return mounts


def _annotations(config: ImageConfiguration) -> dict[str, str]:
    """What image-spec conversion.md turns into annotations; labels win. Labels that would give a runtime orders are left out."""
    prefix = "org.opencontainers.image"
    found = {
        f"{prefix}.os": config.os,
        f"{prefix}.architecture": config.architecture,
        f"{prefix}.author": config.author,
        f"{prefix}.created": config.created,
        f"{prefix}.stopSignal": config.stop_signal,
        f"{prefix}.exposedPorts": ",".join(config.exposed_ports),
    }
    labels = {key: value for key, value in config.labels.items() if not key.startswith(_ORDERS)}
    return {key: value for key, value in found.items() if value} | labels
