"""What an agent does for the host, which is not trusted: everything that the policy does not allow is refused.

    policy = AgentPolicy(images=["registry.example/shop/*"], commands=["image"], stdin=True)
    policy = AgentPolicy.parse({"images": ["*"], "commands": ["image", ["/bin/sh", "-c", "*"]], "users": ["image"]})

The policy is part of the agent's configuration, and that is measured: a host that changes it has another guest, which gets no
key. Members, all of them lists or booleans, absent = nothing is allowed:

    images         patterns for references ("*" stands for anything)
    manifests      digests of manifests, e.g. "sha256:..."; given: an image must be one of them whatever its name. The surest rule
    unencrypted    true: images with layers that anybody can have made may be run
    commands       "image": the image's own; lists of patterns, one for each argument, "**" at the end for any more
    environment    patterns for NAME=value that a request sets; the image's own is always there
    users          "image": the image's own; patterns for what a request names
    directories    patterns for the working directory that a request names
    capabilities   names, e.g. "CAP_CHOWN", of what containers may have; "default": the usual set
    volumes        patterns for "name:/path" of directories that containers of the sandbox share
    executions     as `commands`: what ExecProcess may run
    signals        true: SignalProcess
    stdin          true: containers may be given standard input
    network        true: containers may use the guest's network; their own has nothing but a loopback
    containers     how many at a time (default 1)

Without `manifests` the host decides what image a name stands for. With `unencrypted` absent it can still choose among images
that the owner encrypted, their layers' order, and their configuration: commands and environment.

Source: kata-containers src/agent/policy (default deny; a rule for each request). Thread-safety: immutable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final, Self

from csvfast.errors import ContainerError

__all__ = ["CAPABILITIES", "DEFAULT_CAPABILITIES", "AgentPolicy", "Command"]

Command = str | Sequence[str]
"""A rule for a command: "image", or patterns."""

CAPABILITIES: Final = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID", "CAP_SETUID",
    "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN", "CAP_NET_RAW",
    "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE", "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE", "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD",
    "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL", "CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG",
    "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
)  # fmt: skip
"""By number. Source: torvalds/linux include/uapi/linux/capability.h"""

DEFAULT_CAPABILITIES: Final = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_SETFCAP", "CAP_SETGID",
    "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
)  # fmt: skip
"""What containers usually have, without raw sockets, device nodes and the audit log."""

_LISTS: Final = ("images", "manifests", "environment", "users", "directories", "capabilities", "volumes")
_COMMANDS: Final = ("commands", "executions")
_FLAGS: Final = ("unencrypted", "signals", "stdin", "network")
_CONTAINERS_MAX: Final = 64


class AgentPolicy:
    """See the module. Attributes are the members; `document` is what it was parsed from."""

    def __init__(
        self,
        *,
        images: Sequence[str] = (),
        manifests: Sequence[str] = (),
        unencrypted: bool = False,
        commands: Sequence[Command] = (),
        environment: Sequence[str] = (),
        users: Sequence[str] = (),
        directories: Sequence[str] = (),
        capabilities: Sequence[str] = (),
        volumes: Sequence[str] = (),
        executions: Sequence[Command] = (),
        signals: bool = False,
        stdin: bool = False,
        network: bool = False,
        containers: int = 1,
    ) -> None:
        self.images, self.manifests, self.unencrypted = tuple(images), tuple(manifests), unencrypted
        self.commands, self.executions = tuple(commands), tuple(executions)
        self.environment, self.users, self.directories = tuple(environment), tuple(users), tuple(directories)
        self.volumes, self.signals, self.stdin, self.network = tuple(volumes), signals, stdin, network
        if not 1 <= containers <= _CONTAINERS_MAX:
            raise ContainerError("policy", f"containers is {containers}; expected 1 to {_CONTAINERS_MAX}")
        self.containers = containers
        names = [name for one in capabilities for name in (DEFAULT_CAPABILITIES if one == "default" else (one,))]
        if unknown := sorted(set(names) - set(CAPABILITIES)):
            raise ContainerError("policy", f"capability {unknown[0][:40]!r} is unknown")
        self.capabilities = tuple(dict.fromkeys(names))

    @classmethod
    def parse(cls, document: object) -> Self:
        """From JSON. ContainerError "policy": a member is unknown or of another type: half understood is not understood."""
        if not isinstance(document, Mapping):
            raise ContainerError("policy", "the policy is no object")
        for name, value in document.items():
            if name in _LISTS:
                good = isinstance(value, list) and all(isinstance(one, str) for one in value)
            elif name in _COMMANDS:
                good = isinstance(value, list) and all(one == "image" or _is_command(one) for one in value)
            elif name in _FLAGS:
                good = isinstance(value, bool)
            else:
                good = name == "containers" and isinstance(value, int) and not isinstance(value, bool)
            if not good:
                known = name in (*_LISTS, *_COMMANDS, *_FLAGS, "containers")
                raise ContainerError("policy", f"member {str(name)[:40]!r} is {'of another type' if known else 'unknown'}")
        return cls(**document)

    def document(self) -> dict[str, Any]:
        """As JSON, what is allowed only: the same policy gives the same document."""
        found: dict[str, Any] = {name: list(getattr(self, name)) for name in _LISTS if getattr(self, name)}
        for name in _COMMANDS:
            if rules := getattr(self, name):
                found[name] = [rule if isinstance(rule, str) else list(rule) for rule in rules]
        found |= {name: True for name in _FLAGS if getattr(self, name)}
        if self.containers != 1:
            found["containers"] = self.containers
        return found

    @classmethod
    def for_one_image(cls, *images: str, manifests: Sequence[str] = (), **more: Any) -> Self:
        """An image with its own command and user, the usual capabilities, and signals; `more` as for AgentPolicy."""
        usual: dict[str, Any] = {"commands": ["image"], "users": ["image"], "capabilities": ["default"], "signals": True}
        return cls(images=images, manifests=manifests, **(usual | more))

    # ---- Questions; each raises ContainerError("policy", reason)

    def check_image(self, reference: str) -> None:
        """May this image be fetched at all?"""
        if not any(fnmatchcase(reference, pattern) for pattern in self.images):
            _refuse(f"image {reference[:200]!r}", "images")

    def check_manifest(self, digest: str, clear_layers: int) -> None:
        """In: digest   of the manifest. clear_layers: how many of its layers are not encrypted"""
        if self.manifests and digest not in self.manifests:
            _refuse(f"manifest {digest[:100]!r}", "manifests")
        if clear_layers and not self.unencrypted and not self.manifests:
            raise ContainerError(
                "policy", f"{clear_layers} layers are not encrypted: anybody can have made them, and the policy names no manifest"
            )

    def check_command(self, arguments: Sequence[str], own: Sequence[str], *, executions: bool = False) -> None:
        """In: own   the image's own command"""
        rules = self.executions if executions else self.commands
        for rule in rules:
            if isinstance(rule, str):
                if rule == "image" and list(arguments) == list(own):
                    return
            elif _matches(rule, arguments):
                return
        _refuse(f"command {' '.join(arguments)[:200]!r}", "executions" if executions else "commands")

    def check_environment(self, settings: Sequence[str]) -> None:
        """In: settings   "NAME=value" of a request"""
        for setting in settings:
            if not any(fnmatchcase(setting, pattern) for pattern in self.environment):
                _refuse(f"environment variable {setting.partition('=')[0][:80]!r}", "environment")

    def check_user(self, user: str | None) -> None:
        """In: user   of a request; None = the image's own"""
        if not any(rule == "image" if user is None else rule != "image" and fnmatchcase(user, rule) for rule in self.users):
            _refuse("the image's own user" if user is None else f"user {user[:80]!r}", "users")

    def check_directory(self, directory: str) -> None:
        """The working directory of a request."""
        if not any(fnmatchcase(directory, pattern) for pattern in self.directories):
            _refuse(f"working directory {directory[:200]!r}", "directories")

    def check_volume(self, name: str, path: str) -> None:
        """A directory that containers share."""
        if not any(fnmatchcase(f"{name}:{path}", pattern) for pattern in self.volumes):
            _refuse(f"volume {name[:80]!r} at {path[:200]!r}", "volumes")

    def check_flag(self, name: str) -> None:
        """signals, stdin, network."""
        if not getattr(self, name):
            _refuse(name, name)


def _is_command(rule: object) -> bool:
    return isinstance(rule, list) and bool(rule) and all(isinstance(one, str) for one in rule)


def _matches(rule: Sequence[str], arguments: Sequence[str]) -> bool:
    if rule and rule[-1] == "**":
        rule = rule[:-1]
        if len(arguments) < len(rule):
            return False
        arguments = arguments[: len(rule)]
    return len(rule) == len(arguments) and all(map(fnmatchcase, arguments, rule))


def _refuse(what: str, member: str) -> None:
    raise ContainerError("policy", f"{what} is not allowed (member {member} of the agent's policy)")
