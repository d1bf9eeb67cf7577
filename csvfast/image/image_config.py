"""The OCI image configuration: what a program is started with, and the digests of the layers' archives.

image-spec config.md. The configuration is public and comes from strangers; here it becomes checked values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

from csvfast.errors import ImageError
from csvfast.image.limits import DEFAULT_LIMITS, Limits
from csvfast.image.manifest import host_architecture, parse_json

__all__ = ["ImageConfiguration", "check_platform"]

_SUBJECT: Final = "image configuration"
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}\Z")
_ITEMS: Final = 4096
_TEXT: Final = 128 << 10  # the kernel's limit for one argument


@dataclass(frozen=True, slots=True)
class ImageConfiguration:
    """An image's configuration. What an image leaves out is empty.

    user         "", "name", "1000", "name:group", "1000:1000"
    environment  "NAME=value"
    diff_ids     "sha256:..." of each layer's archive, base first
    """

    architecture: str
    os: str
    diff_ids: tuple[str, ...]
    variant: str = ""
    user: str = ""
    environment: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    working_directory: str = ""
    volumes: tuple[str, ...] = ()
    exposed_ports: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    stop_signal: str = ""
    created: str = ""
    author: str = ""

    @staticmethod
    def parse(data: bytes, limits: Limits = DEFAULT_LIMITS) -> ImageConfiguration:
        """Reads a configuration. Raises ImageError for whatever is not one, naming the member."""
        # Strictly: two readers that disagree on which of two members counts run two different containers.
        top = parse_json(data, _SUBJECT, limits.config_bytes)
        config = _mapping(top.get("config"), "config")
        rootfs = _mapping(top.get("rootfs"), "rootfs")
        if rootfs.get("type") != "layers":
            _bad("rootfs.type", rootfs.get("type"), "'layers'")
        diff_ids = _texts(rootfs.get("diff_ids"), "rootfs.diff_ids")
        for number, diff_id in enumerate(diff_ids):
            if not _DIGEST.match(diff_id):
                _bad(f"rootfs.diff_ids[{number}]", diff_id, "'sha256:' and 64 hexadecimal digits")
        if len(diff_ids) > limits.layers:
            raise ImageError(_SUBJECT, f"{len(diff_ids)} layers; the limit is {limits.layers}")
        environment = _texts(config.get("Env"), "config.Env")
        for one in environment:
            if one.find("=") < 1:
                _bad("config.Env", one, "'NAME=value'")
        directory = _text(config.get("WorkingDir"), "config.WorkingDir")
        if directory and not directory.startswith("/"):
            directory = f"/{directory}"
        return ImageConfiguration(
            architecture=_text(top.get("architecture"), "architecture"),
            os=_text(top.get("os"), "os"),
            diff_ids=diff_ids,
            variant=_text(top.get("variant"), "variant"),
            user=_text(config.get("User"), "config.User"),
            environment=environment,
            entrypoint=_texts(config.get("Entrypoint"), "config.Entrypoint"),
            command=_texts(config.get("Cmd"), "config.Cmd"),
            working_directory=directory,
            volumes=_texts(list(_mapping(config.get("Volumes"), "config.Volumes")), "config.Volumes"),
            exposed_ports=_texts(list(_mapping(config.get("ExposedPorts"), "config.ExposedPorts")), "config.ExposedPorts"),
            labels={
                key: _text(value, f"config.Labels[{key[:40]!r}]")
                for key, value in _mapping(config.get("Labels"), "config.Labels").items()
            },
            stop_signal=_text(config.get("StopSignal"), "config.StopSignal"),
            created=_text(top.get("created"), "created"),
            author=_text(top.get("author"), "author"),
        )

    @property
    def arguments(self) -> tuple[str, ...]:
        """Entrypoint and command, as a container without arguments of its own runs them."""
        return self.entrypoint + self.command


def check_platform(config: ImageConfiguration, architecture: str | None = None, system: str = "linux") -> None:
    """Raises ImageError for an image of another architecture (default: this machine's) or operating system."""
    wanted = host_architecture() if architecture is None else architecture
    if (config.os, config.architecture) != (system, wanted):
        found = f"{config.os or 'no system'}/{config.architecture or 'no architecture'}"
        raise ImageError(_SUBJECT, f"the image is for {found}; expected {system}/{wanted}")


def _bad(member: str, value: object, expected: str) -> NoReturn:
    shown = repr(value)
    raise ImageError(_SUBJECT, f"{member}: {shown if len(shown) <= 80 else shown[:80] + '...'}; expected {expected}")


def _mapping(value: object, member: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > _ITEMS:
        _bad(member, value, f"an object of at most {_ITEMS} members")
    return value


def _text(value: object, member: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or "\0" in value or len(value) > _TEXT:
        _bad(member, value, f"text without NUL, at most {_TEXT} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        _bad(member, value, "text that UTF-8 can hold")
    return value


def _texts(value: object, member: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > _ITEMS:
        _bad(member, value, f"a list of at most {_ITEMS} texts")
    found = tuple(_text(one, member) for one in value)
    if any(not isinstance(one, str) for one in value):
        _bad(member, value, "a list of texts")
    return found
