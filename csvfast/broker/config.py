"""The broker's configuration: one TOML file; relative paths in it start at its directory. Unknown members are refused.

    [store]            url = "sqlite:///broker.db", or postgresql://user@host/database (password in ~/.pgpass or the service file)
    [master]           kind = "file" | "passphrase" | "pkcs11" and its members, see csvfast.broker.master
    [trust]            roots = ["hygon"], or files of root certificates; certificates = directories of HSK and CEK files;
                       default_directories = true: also where Hygon's tools keep them; key_server = true: also Hygon's server
    [limits]           members of csvfast.broker.limits.LimitsConfig
    [administration]   [[administration.certificate]] sha256, name, roles, scope;  [[administration.jwt_key]] file, roles, ...
    [log]              level = "info"

    [verdictd]         listen = "127.0.0.1:1234"; freshness = "certificate" | "challenge"; suites = "default" | "sm"; tls12 = true
                       key = "tls.key" (its certificate is made anew at each start; guests pin its SPKI); attester = "device": the
                       broker runs in a CSV guest and shows evidence of its own
    [kbs]              listen = "127.0.0.1:8080"; certificate, key, client_ca = files; insecure_http = true away from loopback
    [keyprovider]      listen = "unix:keyprovider.sock" or an address; local_trust = true: who reaches it is the owner;
                       certificate, key, client_ca; create_keys; packets = "coco" | "verdictd"
    [clientapi]        likewise

A door without its table is closed. Thread-safety: immutable objects.
"""

from __future__ import annotations

import ipaddress
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn, Self, TypeVar

from csvfast.errors import FormatError, VerificationError

if TYPE_CHECKING:
    from csvfast.certs import CaCertificate

__all__ = ["Address", "BrokerConfig", "GrpcConfig", "KbsConfig", "TrustConfig", "VerdictdConfig"]

_LIMIT: Final = 1 << 20
_Table = TypeVar("_Table")
_NAME: Final = "broker configuration"


@dataclass(frozen=True, slots=True)
class Address:
    """host and port, or the path of a UNIX socket."""

    host: str = ""
    port: int = 0
    path: Path | None = None

    @classmethod
    def parse(cls, text: str, base: Path = Path()) -> Self:
        """From "host:port", "[IPv6]:port" or "unix:PATH". FormatError."""
        if text.startswith("unix:"):
            path = text.removeprefix("unix:").removeprefix("//")
            if not path or "\0" in path or len(str(base / path).encode()) > 107:
                _refuse("listen", ascii(text)[:140], "unix:PATH of at most 107 bytes")
            return cls(path=base / path)
        host, colon, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not colon or not host or not (port.isascii() and port.isdigit() and int(port) <= 65535):
            _refuse("listen", ascii(text)[:80], 'text "host:port", "[IPv6]:port" or "unix:PATH"')
        return cls(host, int(port))

    @property
    def is_local(self) -> bool:
        """A UNIX socket or a loopback address."""
        if self.path is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class TrustConfig:
    """[trust]"""

    roots: tuple[str, ...] = ("hygon",)
    certificates: tuple[Path, ...] = ()
    default_directories: bool = False
    key_server: bool = False

    def load_roots(self, base: Path) -> tuple[CaCertificate, ...]:
        """The root certificates. OSError, FormatError."""
        from csvfast.certs import CaCertificate, hygon_root
        from csvfast.certs.chain import verify_root

        found = []
        for name in self.roots:
            if name == "hygon":
                found.append(hygon_root())
                continue
            root = CaCertificate.parse((base / name).read_bytes())
            try:
                verify_root(root)
            except VerificationError as error:  # found out now and not when no guest is believed
                _refuse("trust.roots", f"{ascii(name)[:80]}: {error}", "a root certificate, which signs itself")
            found.append(root)
        if not found:
            _refuse("trust.roots", "an empty list", '"hygon", or files of root certificates')
        return tuple(found)


@dataclass(frozen=True, slots=True)
class VerdictdConfig:
    """[verdictd]"""

    listen: Address = Address("127.0.0.1", 1234)
    key: Path | None = None
    freshness: Literal["certificate", "challenge"] = "certificate"
    suites: Literal["default", "sm"] = "default"
    tls12: bool = False
    attester: Literal["none", "device"] = "none"


@dataclass(frozen=True, slots=True)
class KbsConfig:
    """[kbs]"""

    listen: Address = Address("127.0.0.1", 8080)
    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None
    insecure_http: bool = False
    versions: tuple[str, ...] = ("0.4.0",)
    token_key: Path | None = None
    token_seconds: int = 300
    session_seconds: int = 300


@dataclass(frozen=True, slots=True)
class GrpcConfig:
    """[keyprovider] and [clientapi]"""

    listen: Address = Address("127.0.0.1", 50000)
    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None
    local_trust: bool = False
    create_keys: bool = True
    packets: Literal["coco", "verdictd"] = "coco"


@dataclass(frozen=True)
class BrokerConfig:
    """A whole configuration file; `base` is the directory its relative paths start at."""

    base: Path
    store_url: str = field(repr=False)  # may hold a password
    master: Mapping[str, Any] = field(repr=False)
    trust: TrustConfig
    limits: Mapping[str, Any]
    administration: Mapping[str, Any]
    log_level: str = "info"
    verdictd: VerdictdConfig | None = None
    kbs: KbsConfig | None = None
    keyprovider: GrpcConfig | None = None
    clientapi: GrpcConfig | None = None

    @classmethod
    def load(cls, path: Path | str) -> BrokerConfig:
        """Reads a file; for a directory its broker.toml. OSError, FormatError."""
        path = Path(path)
        if path.is_dir():
            path = path / "broker.toml"
        with path.open("rb") as file:
            data = file.read(_LIMIT + 1)
        return cls.parse(data, path.parent.absolute())

    @classmethod
    def parse(cls, data: bytes, base: Path) -> BrokerConfig:
        """From the bytes of a file. FormatError names the member at fault."""
        if len(data) > _LIMIT:
            _refuse("length", f"more than {_LIMIT} bytes", f"at most {_LIMIT}")
        try:
            document = tomllib.loads(data.decode())
        except (UnicodeDecodeError, tomllib.TOMLDecodeError, ValueError, RecursionError) as error:
            _refuse("syntax", str(error)[:200], "TOML")
        known = ("store", "master", "trust", "limits", "administration", "log", "verdictd", "kbs", "keyprovider", "clientapi")
        for name, value in document.items():
            if name not in known:
                _refuse(ascii(name)[1:-1][:64], "an unknown table", f"one of {', '.join(known)}")
            if not isinstance(value, dict):
                _refuse(name, type(value).__name__, "a table")
        store, log = document.get("store", {}), document.get("log", {})
        _only("store", store, ("url",))
        _only("log", log, ("level",))
        level = log.get("level", "info")
        if level not in ("debug", "info", "warning", "error"):
            _refuse("log.level", ascii(level)[:40], "debug, info, warning or error")
        if not isinstance(store.get("url"), str):
            _refuse("store.url", ascii(store.get("url"))[:40], "a database URL such as sqlite:///broker.db")
        if "master" not in document:
            _refuse("master", "no such table", "where the master key is: kind = file, passphrase or pkcs11")
        return cls(
            base,
            _absolute_url(store["url"], base),
            document["master"],
            _read(TrustConfig, "trust", document.get("trust", {}), base),
            document.get("limits", {}),
            document.get("administration", {}),
            level,
            _read(VerdictdConfig, "verdictd", document["verdictd"], base) if "verdictd" in document else None,
            _read(KbsConfig, "kbs", document["kbs"], base) if "kbs" in document else None,
            _read(GrpcConfig, "keyprovider", document["keyprovider"], base) if "keyprovider" in document else None,
            _read(GrpcConfig, "clientapi", document["clientapi"], base) if "clientapi" in document else None,
        )


def _absolute_url(url: str, base: Path) -> str:
    """SQLite's relative paths start at the configuration's directory, not wherever the broker was started."""
    start = "sqlite:///"
    if url.startswith(start) and not url.startswith(start + "/"):
        return f"{start}{base / url.removeprefix(start)}"
    return url


def _only(table: str, found: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name in found:
        if name not in known:
            _refuse(f"{table}.{ascii(name)[1:-1][:64]}", "an unknown member", f"one of {', '.join(known)}")


def _read(cls: type[_Table], table: str, found: Mapping[str, Any], base: Path) -> _Table:
    members = {one.name: str(one.type) for one in fields(cls)}  # type: ignore[arg-type]
    _only(table, found, tuple(members))
    return cls(**{name: _value(f"{table}.{name}", members[name], value, base) for name, value in found.items()})


def _value(path: str, kind: str, value: Any, base: Path) -> Any:
    """`kind` is the annotation's text: few are in use, and each has one reader."""
    if kind == "bool":
        return _typed(path, value, bool, "true or false")
    if kind == "int":
        number = _typed(path, value, int, "an integer")
        if not 0 < number <= 1 << 31:
            _refuse(path, str(number)[:40], "an integer above 0")
        return number
    if kind == "Address":
        return Address.parse(_typed(path, value, str, "text"), base)
    if kind == "Path | None":
        return base / _typed(path, value, str, "a path")
    if kind.startswith("tuple["):
        items = _typed(path, value, list, "a list")
        texts = [_typed(f"{path}[{index}]", item, str, "text") for index, item in enumerate(items)]
        return tuple(base / text for text in texts) if "Path" in kind else tuple(texts)
    choices = re.findall(r"'([^']+)'", kind)  # Literal['...', ...]
    if value not in choices:
        _refuse(path, ascii(value)[:40], f"one of {', '.join(choices)}")
    return value


def _typed(path: str, value: Any, kind: type, words: str) -> Any:
    if type(value) is not kind:
        _refuse(path, ascii(value)[:60], words)
    return value


def _refuse(member: str, found: str, expected: str) -> NoReturn:
    raise FormatError(_NAME, member, None, found, expected)
