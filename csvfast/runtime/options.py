"""What somebody wants to run, and how: options as the commands take them, the agent's configuration and the sandbox's plan from
them.

Thread-safety: immutable objects and functions without state.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import urlsplit

from csvfast.errors import ArgumentError
from csvfast.runtime.executor import Executor, LaunchPlan
from csvfast.runtime.sandbox import SandboxPlan

if TYPE_CHECKING:
    from csvfast.runtime.agent.configuration import AgentConfiguration

__all__ = ["ANNOTATIONS", "RunOptions", "broker_door", "configuration_for", "launch_plan_of", "loopback_of", "sandbox_plan_of"]

_FILE_MAX: Final = 1 << 20
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
GUEST_GATEWAY: Final = "10.0.2.2"
"""This machine's loopback, as a virtual machine's user network shows it."""

ANNOTATIONS: Final = {
    "org.csvfast.image": "image",
    "io.kubernetes.cri.image-name": "image",
    "org.csvfast.executor": "executor",
    "org.csvfast.broker": "broker",
    "org.csvfast.broker-pin": "broker_pin",
    "org.csvfast.broker-ca": "broker_ca",
    "org.csvfast.configuration": "configuration",
    "org.csvfast.policy": "policy",
    "org.csvfast.chip": "chip",
    "org.csvfast.memory": "memory",
    "org.csvfast.window": "window",
    "org.csvfast.expect": "expected",
    "org.csvfast.plain-http": "plain_http",
}
"""Annotations of a bundle and the options that they stand for."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of one container's sandbox, all of them JSON.

    image          reference, as csvfast.image.reference takes it
    executor       "auto", "vm", "emulator", "native"
    broker         verdictd://HOST:PORT, kbs+http://HOST:PORT, kbs+https://...; "" = none: only unencrypted images
    broker_pin     SHA-256 of the broker's public key (verdictd) or certificate (kbs), hexadecimal. broker_ca: file, PEM
    configuration  file with the agent's configuration, taken as it is; "" = made from the other options
    policy         file with the agent's policy for the configuration that is made; "" = this image with what is asked for here
    plain_http     hosts (patterns) of registries that are asked without TLS
    pull           "missing": what the cache lacks of the registry's image is fetched, and a registry that is away is no error
                   when the cache has an image of that tag; "always": it is one; "never": nobody is asked
    cache          directory; "" = the user's own
    direct         True: the agent asks the registry itself, nothing is cached
    chip, dram, memory, window, expected   as SandboxPlan; expected in hexadecimal
    settings       of one executor
    args, env, cwd, user   replace or add to the image's own; args: () = the image's own
    stdin          the container gets standard input
    """

    image: str = ""
    executor: str = "auto"
    broker: str = ""
    broker_pin: str = ""
    broker_ca: str = ""
    configuration: str = ""
    policy: str = ""
    plain_http: Sequence[str] = ()
    pull: str = "missing"
    cache: str = ""
    direct: bool = False
    chip: str = ""
    dram: str = ""
    memory: int = 256 << 20
    window: str = ""
    expected: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    args: Sequence[str] = ()
    env: Sequence[str] = ()
    cwd: str = ""
    user: str = ""
    stdin: bool = False

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Raises ArgumentError: an unknown option."""
        known = {one.name for one in fields(cls)}
        for name in document:
            if name not in known:
                raise ArgumentError(f"option {name[:40]!r} is unknown")
        return cls(**document)

    def to_json(self) -> dict[str, Any]:
        """As from_json takes it."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in found.items()}

    def process(self) -> dict[str, Any]:
        """What CreateContainer is told beside the image."""
        found: dict[str, Any] = {}
        if self.args:
            found["args"] = list(self.args)
        if self.env:
            found["env"] = list(self.env)
        if self.cwd:
            found["cwd"] = self.cwd
        if self.user:
            found["user"] = self.user
        return found


def broker_door(options: RunOptions, loopback: str) -> dict[str, Any]:
    """The broker as the agent's configuration has it. In: loopback   what the guest calls this machine's loopback

    Raises ArgumentError: no such scheme, no host, a pin that is none; OSError (broker_ca).
    """
    if not options.broker:
        return {"door": "none"}
    parts = urlsplit(options.broker)
    expected = "expected verdictd://HOST:PORT, kbs+http://HOST:PORT or kbs+https://HOST:PORT"
    try:
        port = parts.port
    except ValueError:
        raise ArgumentError(f"broker {options.broker[:80]!r}: no such port; {expected}") from None
    host = parts.hostname or ""
    if not host or parts.username is not None or parts.query or parts.fragment:
        raise ArgumentError(f"broker {options.broker[:80]!r}: {expected}")
    if host in _LOOPBACK:
        host = loopback
    place = f"[{host}]" if ":" in host else host
    if port is not None:
        place += f":{port}"
    pin = options.broker_pin.lower().removeprefix("sha256:")
    trust: dict[str, Any] = {"pin": pin} if pin else {}
    if options.broker_ca:
        trust["ca"] = _read(Path(options.broker_ca)).decode("ascii")
    if not trust:
        trust = {"unattested": True}
    if parts.scheme == "verdictd" and port is not None:
        return {"door": "verdictd", "address": place, **trust}
    if parts.scheme in ("kbs+http", "kbs+https"):
        return {"door": "kbs", "url": f"{parts.scheme.removeprefix('kbs+')}://{place}{parts.path.rstrip('/')}", **trust}
    raise ArgumentError(f"broker {options.broker[:80]!r}: {expected}")


def configuration_for(options: RunOptions, name: str, digest: str, loopback: str) -> AgentConfiguration:
    """The agent's configuration: the file, or one that allows what these options ask for and nothing else.

    In: name   of the image as the agent will be told. digest: of its manifest. loopback: as in broker_door
    Raises: ArgumentError, ContainerError (a file that is no configuration), OSError.
    """
    from csvfast.runtime.agent.configuration import AgentConfiguration
    from csvfast.runtime.agent_policy import AgentPolicy

    if options.configuration:
        return AgentConfiguration.parse(_read(Path(options.configuration)))
    if options.policy:
        try:
            document = json.loads(_read(Path(options.policy)))
        except ValueError as problem:
            raise ArgumentError(f"{options.policy}: no JSON ({problem})") from None
        policy = AgentPolicy.parse(document)
    else:
        more: dict[str, Any] = {"stdin": True} if options.stdin else {}
        if options.args:
            more["commands"] = [[_literal(one) for one in options.args]]
        if options.env:
            more["environment"] = [_literal(one) for one in options.env]
        if options.user:
            more["users"] = [_literal(options.user)]
        if options.cwd:
            more["directories"] = [_literal(options.cwd)]
        policy = AgentPolicy.for_one_image(_literal(name), manifests=[digest], **more)
    registries = [{"host": f"{loopback}:*", "plain_http": True}]
    registries += [{"host": host, "plain_http": True} for host in options.plain_http]
    return AgentConfiguration(broker=broker_door(options, loopback), policy=policy, registries=registries)


def sandbox_plan_of(options: RunOptions, identifier: str, configuration: bytes) -> SandboxPlan:
    """Raises ArgumentError (expected)."""
    return SandboxPlan(
        identifier=identifier,
        configuration=configuration,
        chip=Path(options.chip) if options.chip else None,
        dram=Path(options.dram) if options.dram else None,
        memory=options.memory,
        window=options.window,
        expected=_digest(options.expected),
        settings=options.settings,
    )


def launch_plan_of(options: RunOptions, configuration: bytes, work: Path) -> LaunchPlan:
    """For Executor.predict()."""
    return LaunchPlan(
        configuration=configuration, memory=options.memory, window=options.window, work=work, settings=options.settings
    )


def loopback_of(executor: Executor) -> str:
    """What a guest of this executor calls this machine's loopback."""
    return GUEST_GATEWAY if executor.name == "vm" else "127.0.0.1"


def _literal(text: str) -> str:
    """A pattern of fnmatch for this text alone."""
    return "".join(f"[{one}]" if one in "*?[" else one for one in text)


def _digest(text: str) -> bytes | None:
    if not text:
        return None
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise ArgumentError(f"launch digest {text[:80]!r}: expected 64 hexadecimal digits")
    return digest


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(_FILE_MAX + 1)
    if len(data) > _FILE_MAX:
        raise ArgumentError(f"{path}: more than {_FILE_MAX} bytes")
    return data
