"""The master key: the one secret a broker cannot keep in its store.

    FileMaster         32 random bytes in a file of its own
    PassphraseMaster   argon2id (RFC 9106) of a passphrase
    Pkcs11Master       AES-256 key inside a PKCS#11 token, which it never leaves (csvfast.broker.master_pkcs11)

It wraps key-encryption keys (csvfast.broker.sealing) and nothing else. `open_master` and `create_master` take a configuration as
it stands in a TOML file:

    kind = "file"         path = "/etc/csvfast/master.key"
    kind = "passphrase"   record = "/etc/csvfast/master.json"   passphrase = {file = ...}
    kind = "pkcs11"       module = "/usr/lib/softhsm/libsofthsm2.so"   token = "label"   key = "label"   pin = {file = ...}

Passphrases and PINs come from {file = "path"}, {descriptor = 3} or {environment = "NAME"}, never from a command line, which every
user of the machine can read.

Thread-safety: objects may be used from any thread.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from csvfast._files import temporary_beside
from csvfast.broker.sealing import KEY_BYTES, seal, unseal
from csvfast.certs.private import read_description, read_private_file, write_private_file
from csvfast.crypto import Secret, hmac_sm3
from csvfast.errors import (
    AllocationError,
    ArgumentError,
    AuthenticationError,
    LengthError,
    MissingExtraError,
    StateError,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "LEAST_PASSPHRASE",
    "LEAST_PIN",
    "Argon2Parameters",
    "FileMaster",
    "MasterKey",
    "PassphraseMaster",
    "create_master",
    "open_master",
    "read_secret",
]

LEAST_PASSPHRASE: Final = 16
"""Bytes of the shortest passphrase: argon2id makes guesses dear, not few."""
LEAST_PIN: Final = 4
"""Bytes of the shortest PIN; a token locks after a few wrong ones."""
_MOST: Final = 1024
_FORM: Final = "csvfast-master-passphrase-1"
_SALT: Final = 16


class MasterKey(Protocol):
    """What wraps key-encryption keys. Implementations are thread-safe."""

    @property
    def identity(self) -> str:
        """Public name of this very key, e.g. "file:3f0c...", the same wherever the key is."""

    def wrap(self, key: Secret, associated: bytes) -> bytes:
        """`key` as a sealed record bound to `associated`. Raises UnavailableError when the key is out of reach."""

    def unwrap(self, data: Buffer, associated: bytes) -> Secret:
        """The key in a record that `wrap` made with the same `associated`.

        Raises: AuthenticationError for every other record; UnavailableError when the key is out of reach.
        """

    def close(self) -> None:
        """Wipes or leaves the key; any later use raises ClosedError. Closing again does nothing."""


class _SoftwareMaster:
    """A master key in this process's memory, in a Secret, until `close`."""

    def __init__(self, kind: str, key: Secret) -> None:
        self._key: Final = key
        self.identity: Final = f"{kind}:{_check_value(key)}"

    def wrap(self, key: Secret, associated: bytes) -> bytes:
        """See MasterKey. Raises: ClosedError."""
        return seal(self._key, key, associated)

    def unwrap(self, data: Buffer, associated: bytes) -> Secret:
        """See MasterKey. Raises: AuthenticationError, ClosedError."""
        return unseal(self._key, data, associated, what=f"key wrapped by master key {self.identity}")

    def close(self) -> None:
        """Wipes the key."""
        self._key.wipe()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.identity}>"


class FileMaster(_SoftwareMaster):
    """A master key in a file: 32 random bytes and nothing else, the broker's own (0600), in a backup apart from the store's.

    Raises: StateError: missing, a link, open to other users, of another length, all bytes equal.
    """

    def __init__(self, path: Path) -> None:
        content = read_private_file(path.parent, path.name, _MOST)
        try:
            if len(content) != KEY_BYTES:
                raise StateError(f"{path}: {len(content)} bytes; expected {KEY_BYTES} random ones, as `create` writes")
            if content == content[:1] * KEY_BYTES:
                raise StateError(f"{path}: all bytes are equal; expected {KEY_BYTES} random ones, as `create` writes")
            super().__init__("file", Secret(content))
        finally:
            content[:] = bytes(len(content))

    @classmethod
    def create(cls, path: Path) -> FileMaster:
        """Writes a new key; a file that is there is left alone. Raises: StateError, OSError."""
        _write_new(path, Secret.random(KEY_BYTES))
        return cls(path)


@dataclass(frozen=True, slots=True)
class Argon2Parameters:
    """Cost of argon2id. Raises StateError outside the bounds: what is cheaper is guessed, what is dearer stops the broker.

    memory_kib   19,456 .. 2,097,152 KiB (2 GiB), and with `iterations` at most 16 GiB written in all
    iterations   2 .. 64
    lanes        1 .. 16 threads

    The lower bounds are OWASP's (Password Storage Cheat Sheet); the default is twice the memory of RFC 9106's second choice.
    """

    memory_kib: int = 131_072
    iterations: int = 3
    lanes: int = 4

    def __post_init__(self) -> None:
        for name, least, most in (("memory_kib", 19_456, 1 << 21), ("iterations", 2, 64), ("lanes", 1, 16)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise StateError(f"argon2id {name} {_short(value)}; expected {least} .. {most}")
        written = self.memory_kib * self.iterations
        if written > 1 << 24:
            raise StateError(f"argon2id memory_kib times iterations {written}; expected at most {1 << 24}")


class PassphraseMaster(_SoftwareMaster):
    """A master key that argon2id makes of a passphrase, and the public record (salt, cost, check) needed to make it again.

    The passphrase itself is not kept. argon2id's working memory is freed by OpenSSL, which cleanses it.

    Attributes:
        record: JSON values to keep in a file of the broker's own; whoever has it can try passphrases at argon2id's cost.
    """

    def __init__(self, passphrase: Secret, salt: bytes, parameters: Argon2Parameters) -> None:
        super().__init__("passphrase", _argon2id(passphrase, salt, parameters))
        self.record: Final[Mapping[str, Any]] = {
            "format": _FORM,
            "algorithm": "argon2id",
            "salt": salt.hex(),
            **asdict(parameters),
            "identity": self.identity,
        }

    @classmethod
    def create(cls, passphrase: Secret, parameters: Argon2Parameters | None = None) -> PassphraseMaster:
        """A new master key; keep its `record`. Raises: LengthError (passphrase shorter than 16 bytes), MissingExtraError."""
        return cls(passphrase, os.urandom(_SALT), parameters or Argon2Parameters())

    @classmethod
    def open(cls, passphrase: Secret, record: Mapping[str, Any]) -> PassphraseMaster:
        """The same master key again.

        Raises: StateError (a record that is none, or asks for more memory or time than allowed: before any is used);
            AuthenticationError (wrong passphrase, or altered record); LengthError; MissingExtraError.
        """
        expected = {"format", "algorithm", "salt", "memory_kib", "iterations", "lanes", "identity"}
        if set(record) != expected:
            raise StateError(f"master key record has members {_short(sorted(record))}; expected {sorted(expected)}")
        if record["format"] != _FORM or record["algorithm"] != "argon2id":
            found = f"{_short(record['format'])}, {_short(record['algorithm'])}"
            raise StateError(f"master key record is of format {found}; expected {_FORM!r}, 'argon2id'")
        salt = b""
        with suppress(ValueError, TypeError):
            salt = bytes.fromhex(record["salt"])
        if len(salt) != _SALT:
            raise StateError(f"master key record: salt {_short(record['salt'])}; expected {2 * _SALT} hexadecimal digits")
        parameters = Argon2Parameters(record["memory_kib"], record["iterations"], record["lanes"])
        master = cls(passphrase, salt, parameters)
        if master.identity != record["identity"]:
            master.close()
            raise AuthenticationError("wrong passphrase for the master key, or its record is damaged")
        return master


def open_master(config: Mapping[str, Any], *, base: Path | str = "") -> MasterKey:
    """The master key of a configuration (see the module); relative paths of files start at `base`.

    Raises: ArgumentError (configuration); StateError (file, record or token's key not fit); AuthenticationError (wrong passphrase
        or PIN); UnavailableError (token out of reach); MissingExtraError.
    """
    return _make(config, Path(base), create=False)


def create_master(config: Mapping[str, Any], *, base: Path | str = "") -> MasterKey:
    """Makes the key that a configuration describes: the key file, the passphrase's record, or the key in the token.

    What is there already is left alone: StateError. Raises also what `open_master` raises, and OSError.
    """
    return _make(config, Path(base), create=True)


def _make(config: Mapping[str, Any], base: Path, *, create: bool) -> MasterKey:
    kind = config.get("kind")
    if kind == "file":
        path = base / _texts(config, "path")[0]
        return FileMaster.create(path) if create else FileMaster(path)
    if kind == "passphrase":
        path = base / _texts(config, "record", source="passphrase")[0]
        passphrase = read_secret(config["passphrase"], what="passphrase", least=LEAST_PASSPHRASE, base=base)
        if create:
            master = PassphraseMaster.create(passphrase)
            _write_new(path, json.dumps(dict(master.record), indent=2).encode() + b"\n")
        else:
            master = PassphraseMaster.open(passphrase, read_description(path.parent, path.name, _FORM))
        passphrase.wipe()
        return master
    if kind == "pkcs11":
        from csvfast.broker.master_pkcs11 import Pkcs11Master

        module, token, key = _texts(config, "module", "token", "key", source="pin")
        pin = read_secret(config["pin"], what="PIN", least=LEAST_PIN, base=base)
        return (Pkcs11Master.create if create else Pkcs11Master)(module, token, pin, key)
    raise ArgumentError(f"master key: kind {_short(kind)}; expected 'file', 'passphrase' or 'pkcs11'")


def read_secret(source: Mapping[str, Any], *, what: str, least: int, base: Path | str = "") -> Secret:
    """A passphrase or PIN from where `source` says; one line feed at the end does not belong to it.

    In: source   {"file": path}: private, as master key files must be
                 {"descriptor": number}: read to its end, then closed (0 is left open)
                 {"environment": name}: removed from this process's environment, so that programs it starts do not inherit it;
                 the system still shows it in /proc to the same user, and Python keeps its text until it is collected: the weakest
                 of the three
        what     names it in errors
        least    bytes of the shortest that is allowed; the longest is 1,024
        base     directory where a relative path starts
    Raises: ArgumentError (source), StateError (cannot be read, not private), LengthError.
    """
    given: object = source  # it comes from a file
    if not isinstance(given, Mapping) or len(given) != 1:
        raise ArgumentError(f"{what}: expected a table with one of file, descriptor, environment")
    ((kind, where),) = source.items()
    if kind == "file" and isinstance(where, (str, os.PathLike)) and where:
        path = Path(base, where)
        content = read_private_file(path.parent, path.name, _MOST + 2)
    elif kind == "descriptor" and type(where) is int and where >= 0 and where not in (1, 2):
        content = _read_descriptor(where, what)
    elif kind == "environment" and isinstance(where, str) and where:
        if where not in os.environ:
            raise StateError(f"{what}: the environment has no {where}")
        content = bytearray(os.fsencode(os.environ.pop(where)))
    else:
        raise ArgumentError(f"{what}: expected file = \"path\", descriptor = number (not 1 or 2) or environment = \"NAME\"")
    try:
        end = len(content)
        if end and content[end - 1] == 0x0A:
            end -= 2 if end > 1 and content[end - 2] == 0x0D else 1
        if not least <= end <= _MOST:
            raise LengthError(f"{what}: {end} bytes; expected {least} .. {_MOST}")
        with memoryview(content) as view:
            return Secret(view[:end])
    finally:
        content[:] = bytes(len(content))


def _read_descriptor(descriptor: int, what: str) -> bytearray:
    content = bytearray(_MOST + 2)
    count = 0
    try:
        with memoryview(content) as view:
            while count < len(content) and (more := os.readv(descriptor, [view[count:]])):
                count += more
    except OSError as error:
        raise StateError(f"{what}: descriptor {descriptor}: {error.strerror}") from None
    finally:
        if descriptor:
            with suppress(OSError):
                os.close(descriptor)
    # A bytearray that shrinks may move: what is cut off must not stay behind.
    result = content[:count]
    content[:] = bytes(len(content))
    return result


def _argon2id(passphrase: Secret, salt: bytes, parameters: Argon2Parameters) -> Secret:
    from cryptography.exceptions import InternalError, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

    if not LEAST_PASSPHRASE <= len(passphrase) <= _MOST:
        raise LengthError(f"passphrase: {len(passphrase)} bytes; expected {LEAST_PASSPHRASE} .. {_MOST}")
    try:
        derivation = Argon2id(
            salt=salt,
            length=KEY_BYTES,
            iterations=parameters.iterations,
            lanes=parameters.lanes,
            memory_cost=parameters.memory_kib,
        )
    except UnsupportedAlgorithm:
        raise MissingExtraError(
            "argon2id needs the cryptography package with OpenSSL 3.2 or later; pip install --upgrade cryptography"
        ) from None
    # Takes any buffer, though it says bytes. What it returns is bytes, freed but not wiped after the Secret has its copy.
    try:
        return Secret(derivation.derive(cast("bytes", passphrase)))
    except (MemoryError, InternalError):  # what older releases make of it; the parameters have been checked
        raise AllocationError(f"argon2id: no memory for {parameters.memory_kib} KiB") from None


def _check_value(key: Secret) -> str:
    """Public check of a key: 16 bytes of HMAC-SM3, which say nothing of the key and nothing of what it wraps."""
    return hmac_sm3(key, b"csvfast master key identity").digest()[:16].hex()


def _write_new(path: Path, content: Buffer) -> None:
    """A private file that appears whole, in the place of nothing. Raises: StateError, OSError."""
    temporary = temporary_beside(path)
    write_private_file(temporary, content)
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise StateError(f"{path}: exists; nothing was overwritten") from None
    finally:
        temporary.unlink()
    handle = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _texts(config: Mapping[str, Any], *names: str, source: str | None = None) -> list[str]:
    """Members of a configuration that must be texts; any other member than these, `kind` and `source` is refused."""
    allowed = {"kind", *names} | ({source} if source else set())
    if set(config) != allowed:
        raise ArgumentError(f"master key {config['kind']!r} has {_short(sorted(config))}; expected {sorted(allowed)}")
    for name in names:
        if not isinstance(config[name], str) or not config[name]:
            raise ArgumentError(f"master key {config['kind']!r}: {name} {_short(config[name])}; expected a text")
    return [config[name] for name in names]


def _short(value: object) -> str:
    """A value in an error's text: hostile ones may be huge, integers even too long for Python to write."""
    try:
        return repr(value)[:160]
    except ValueError:
        return f"{type(value).__name__} too long to show"
