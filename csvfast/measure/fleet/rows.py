"""What a job measures (items), and what comes of it (rows).

An item names one thing to measure and how; a row is the outcome: a digest, or the kind of error and its message. Both can be
pickled, and rows have a JSON form, so that they travel between processes and machines as they are. Nobody changes them once they
are made; they are not frozen because making one would take three times as long, and there are thousands.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, Self, get_args

from csvfast.measure.errors import RecipeError

__all__ = [
    "CONTENTS",
    "ERROR_KINDS",
    "MODES",
    "Content",
    "Identity",
    "Item",
    "Key",
    "Mode",
    "Options",
    "Row",
]

Mode = Literal["linear", "tree", "verity", "launch"]
Content = Literal["file", "disk"]
Key = tuple[str, str, str, str]
"""(name, mode, content, options as text): what makes two rows speak of the same thing."""

MODES: Final = get_args(Mode)
CONTENTS: Final = get_args(Content)

ERROR_KINDS: Final = {
    "not-found": "it does not exist, or vanished meanwhile",
    "unreadable": "no permission, an input/output error",
    "kind": "a directory, a socket, a pipe or a device without an end",
    "loop": "symbolic links that go in circles",
    "changed": "it changed while it was measured",
    "truncated": "it ended before its size",
    "empty": "there is no whole block to build a tree over",
    "format": "a disk image, recipe or firmware that cannot be read",
    "option": "a mode or an option that does not suit the source",
    "credentials": "refused, or credentials are missing or expired",
    "connection": "a server that does not answer, or stops in the middle",
    "lost": "workers were lost each time it was tried",
    "extra": "an optional package is not installed",
    "internal": "a defect: please report it",
}
"""What a row's `error` may be."""


@dataclass(frozen=True, slots=True)
class Options:
    """How an item is measured, beyond its mode. Only mode "verity" has any so far.

    salt: 0 to 256 bytes, hexadecimal; block_bytes: of data and hash blocks.
    """

    salt: str = ""
    block_bytes: int = 4096

    def text(self) -> str:
        """"" when everything has its default, otherwise a short form that a row's key holds."""
        if not self.salt and self.block_bytes == 4096:
            return ""
        return f"salt={self.salt or '-'} block_bytes={self.block_bytes}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of `text`. Raises RecipeError."""
        if not text:
            return cls()
        try:
            values = dict(part.split("=", 1) for part in text.split(" "))
            salt = values.pop("salt")
            options = cls("" if salt == "-" else bytes.fromhex(salt).hex(), int(values.pop("block_bytes")))
        except (ValueError, KeyError):
            values = {"": ""}
        if values:
            raise RecipeError(f"options are {text!r}; expected 'salt=HEX block_bytes=NUMBER'")
        return options


_DEFAULTS: Final = Options()


@dataclass(slots=True, unsafe_hash=True)
class Identity:
    """What is compared to know whether a source changed since it was measured; None: the source has no such thing.

    size: bytes. mtime_ns, ctime_ns, inode, device: of a file. etag: what a server or a provider says about a version.
    """

    size: int | None = None
    mtime_ns: int | None = None
    ctime_ns: int | None = None
    inode: int | None = None
    device: int | None = None
    etag: str | None = None

    def proves(self, other: Identity) -> bool:
        """Whether a source that had this identity and now has the other holds the same bytes, as far as one can tell.

        A size alone proves nothing. A device's number may differ after a reboot, and is not compared.
        """
        if self.etag is None and self.mtime_ns is None:
            return False
        return replace(self, device=None) == replace(other, device=None)

    def to_json(self) -> dict[str, Any]:
        """Members that are not None."""
        return {name: value for name in _IDENTITY if (value := getattr(self, name)) is not None}

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Raises RecipeError."""
        if not isinstance(data, Mapping):
            raise RecipeError(f"identity is {type(data).__name__}; expected an object")
        for name, value in data.items():
            if name not in _IDENTITY or type(value) is not (str if name == "etag" else int):
                raise RecipeError(f"identity: {name!r} is {value!r}; expected numbers {', '.join(_IDENTITY)}")
        return cls(**data)


_IDENTITY: Final = tuple(Identity.__dataclass_fields__)


@dataclass(slots=True, unsafe_hash=True)
class Item:
    """One thing to measure.

    name: unique within a job; how people and lists call it. location: where its bytes are: a path, or a URL of the provider's.
    provider: "module:attribute" of the SourceProvider that opens it; "" is a local file (see providers.py). content: "file",
    or "disk": what a virtual machine would see on the virtual disk (qcow2; of others the file itself). identity: as it was
    found; None when that costs too much to know beforehand. expect: hexadecimal digest to compare with.
    """

    name: str
    location: str
    mode: Mode = "linear"
    content: Content = "file"
    options: Options = _DEFAULTS
    provider: str = ""
    identity: Identity | None = None
    expect: str | None = None

    @property
    def key(self) -> Key:
        """What rows of this item are found by."""
        return (self.name, self.mode, self.content, self.options.text())

    @property
    def row_location(self) -> str:
        """What a row says of it: "" when it is the name."""
        return "" if self.location == self.name else self.location

    @property
    def size(self) -> int | None:
        """Bytes, as far as they were found."""
        return None if self.identity is None else self.identity.size


@dataclass(slots=True, unsafe_hash=True)
class Row:
    """The outcome for one item.

    digest: 64 hexadecimal digits, None for an error. size: bytes measured. error: one of ERROR_KINDS, with a message.
    started: seconds since the epoch; seconds: of work (files that were measured side by side share the time by their bytes).
    worker: where it was done, for reports. uncovered: bytes at the end that mode "verity" does not cover. location: where the
    bytes were, when that is not the name.
    """

    name: str
    mode: Mode
    content: Content = "file"
    options: str = ""
    digest: str | None = None
    size: int | None = None
    identity: Identity = field(default_factory=Identity)
    error: str | None = None
    message: str | None = None
    expect: str | None = None
    uncovered: int = 0
    started: float = 0.0
    seconds: float = 0.0
    worker: str = ""
    location: str = ""

    @property
    def key(self) -> Key:
        """What rows of the same item share."""
        return (self.name, self.mode, self.content, self.options)

    @property
    def ok(self) -> bool:
        """Measured, and as expected if a digest was expected."""
        return self.digest is not None and self.expect in (None, self.digest)

    @property
    def facts(self) -> tuple[str | int | None, ...]:
        """Everything that two runs over the same sources must agree on: no times, no workers."""
        return (*self.key, self.digest, self.size, self.error, self.message, self.expect, self.uncovered)

    @classmethod
    def failed(cls, item: Item, error: str, message: str, *, started: float = 0.0, worker: str = "") -> Self:
        """A row without a digest."""
        return cls(
            item.name,
            item.mode,
            item.content,
            item.options.text(),
            None,
            None,
            item.identity or Identity(),
            error,
            message,
            item.expect,
            started=started,
            worker=worker,
            location=item.row_location,
        )

    def to_json(self) -> dict[str, Any]:
        """Members that differ from their defaults; times rounded to microseconds."""
        data: dict[str, Any] = {"name": self.name, "mode": self.mode}
        for name in _ROW[2:]:
            value = getattr(self, name)
            if name == "identity":
                value = value.to_json()
            elif isinstance(value, float):
                value = round(value, 6)
            if (value and (name, value) != ("content", "file")) or (value == 0 and name == "size"):
                data[name] = value
        return data

    def to_line(self) -> str:
        """One line of JSON with its line break: `to_json`, without its detours for rows that are nothing special."""
        one = self.identity
        if (
            self.error is not None
            or self.digest is None
            or self.expect is not None
            or self.size is None
            or self.options
            or self.location
            or self.uncovered
            or self.content != "file"
            or one.etag is not None
            or one.mtime_ns is None
            or not (one.size and one.ctime_ns and one.inode and one.device and self.seconds and self.worker)
        ):
            return _ENCODE(self.to_json()) + "\n"
        return (
            f'{{"name":{_TEXT(self.name)},"mode":"{self.mode}","digest":"{self.digest}","size":{self.size},"identity":{{'
            f'"size":{one.size},"mtime_ns":{one.mtime_ns},"ctime_ns":{one.ctime_ns},"inode":{one.inode},"device":{one.device}'
            f'}},"started":{self.started:.6f},"seconds":{self.seconds:.6f},"worker":{_TEXT(self.worker)}}}\n'
        )

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Raises RecipeError, naming the member that is wrong. Unknown members are refused."""
        if not isinstance(data, Mapping):
            raise RecipeError(f"a row is {type(data).__name__}; expected an object")
        values = dict(data)
        for name, value in values.items():
            kinds = _ROW_KINDS.get(name)
            if kinds is None:
                raise RecipeError(f"a row has a member {name!r}; expected {', '.join(_ROW)}")
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise RecipeError(f"a row's {name} is {value!r}; expected {kinds[0].__name__}")
            if isinstance(value, int | float) and not 0 <= value < 1 << 63:
                raise RecipeError(f"a row's {name} is {value!r}; expected a number from 0 on")
        for name, allowed in (("mode", MODES), ("content", CONTENTS), ("error", ERROR_KINDS)):
            if name in values and values[name] not in allowed:
                raise RecipeError(f"a row's {name} is {values[name]!r}; expected one of {', '.join(allowed)}")
        for name in ("digest", "expect"):
            if name in values and not is_digest(values[name]):
                raise RecipeError(f"a row's {name} is {values[name]!r}; expected 64 hexadecimal digits in lower case")
        if "name" not in values or "mode" not in values or ("digest" in values) == ("error" in values):
            raise RecipeError("a row needs a name, a mode and either a digest or an error")
        values["identity"] = Identity.from_json(values.get("identity", {}))
        return cls(**values)


_ROW: Final = tuple(Row.__dataclass_fields__)
_ROW_KINDS: Final[dict[str, tuple[type, ...]]] = dict.fromkeys(_ROW, (str,)) | {
    "size": (int,),
    "uncovered": (int,),
    "identity": (dict,),
    "started": (float, int),
    "seconds": (float, int),
}
_TEXT: Final = json.encoder.encode_basestring_ascii
_ENCODE: Final = json.JSONEncoder(separators=(",", ":")).encode


def is_digest(text: str) -> bool:
    """64 hexadecimal digits in lower case."""
    return len(text) == 64 and not set(text) - set("0123456789abcdef")
