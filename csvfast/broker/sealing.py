"""Keys at rest: content sealed by data keys, data keys by key-encryption keys, those by the master key.

    master key            outside the store: a token, a file, a passphrase (csvfast.broker.master)
      └ key-encryption key (KEK)    rows of the store, wrapped by the master key; the newest wraps, older ones still unwrap
          └ data key                one for each version of a resource, wrapped by a KEK
              └ content             sealed by its data key

Each level is AES-256-GCM (NIST SP 800-38D) with a random 96-bit nonce and names in its associated data what it belongs to: the
KEK its id, time and master key; the data key its KEK, resource path and version; the content its path and version. So a record
moved to another place, cut or altered fails as a forged one does, with AuthenticationError. What this cannot show: that a record
is missing, that a deleted one was put back while its KEK is still there, or that a retired version is marked as active again.

A sealed record: b"csvk", format 1 (1 byte), nonce (12), ciphertext (as long as the plaintext), tag (16).

No SQL here. Thread-safety: functions without state; a KeyRing is immutable.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from csvfast.crypto import Secret
from csvfast.errors import ArgumentError, AuthenticationError, KeyLengthError, LengthError, StateError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from csvfast.broker.master import MasterKey

__all__ = ["KEY_BYTES", "LARGEST", "OVERHEAD", "KeyRing", "KeyRow", "SealedVersion", "associate", "seal", "unseal"]

KEY_BYTES: Final = 32
"""Length of every key: AES-256."""
LARGEST: Final = 64 << 20
"""Most bytes of content in one record; far above any resource, far below AES-GCM's limit."""

_HEADER: Final = b"csvk\x01"
_NONCE: Final = 12
_TAG: Final = 16
_BODY: Final = len(_HEADER) + _NONCE
OVERHEAD: Final = _BODY + _TAG
"""How much longer a sealed record is than its plaintext."""


def associate(purpose: str, *fields: str | int | bytes) -> bytes:
    """Associated data: what the record is for and what it belongs to, each with its length before it (4 bytes), so that no two
    lists of fields give the same bytes.
    """
    parts = [purpose.encode()]
    for field in fields:
        parts.append(field if isinstance(field, bytes) else str(field).encode())
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def seal(key: Secret, plaintext: Buffer, associated: bytes) -> bytes:
    """A sealed record of `plaintext`, 1 .. LARGEST bytes.

    The cipher refers to `key` where it is and keeps a key schedule inside OpenSSL, which cleanses it when the call ends; no other
    copy is made. The random nonce allows 2**32 records under one key (SP 800-38D, 8.3).
    Raises: KeyLengthError, LengthError.
    """
    _check_key(key)
    with memoryview(plaintext).cast("B") as content:
        length = len(content)
        _check_length(length)
        nonce = os.urandom(_NONCE)
        sealed = bytearray(OVERHEAD + length)
        encryptor = Cipher(algorithms.AES(memoryview(key)), modes.GCM(nonce)).encryptor()
        encryptor.authenticate_additional_data(_HEADER + associated)
        with memoryview(sealed) as view:
            encryptor.update_into(content, view[_BODY:])  # the tag's place is the room of a block that update_into asks for
        encryptor.finalize()
    sealed[:_BODY] = _HEADER + nonce
    sealed[_BODY + length :] = encryptor.tag
    return bytes(sealed)


def unseal(key: Secret, sealed: Buffer, associated: bytes, *, what: str = "sealed record") -> Secret:
    """The plaintext of a record that `seal` made with the same key and associated data.

    In: what   names the record in the error's text
    Plaintext exists in one buffer besides the Secret, which is wiped whether the tag is right or not.
    Raises: AuthenticationError for every other input; KeyLengthError.
    """
    _check_key(key)
    with memoryview(sealed).cast("B") as record:
        length = check_record(record, what)
        mode = modes.GCM(bytes(record[len(_HEADER) : _BODY]), bytes(record[-_TAG:]))
        decryptor = Cipher(algorithms.AES(memoryview(key)), mode).decryptor()
        decryptor.authenticate_additional_data(_HEADER + associated)
        plain = bytearray(length + _TAG)
        try:
            decryptor.update_into(record[_BODY:-_TAG], plain)
            decryptor.finalize()
            with memoryview(plain) as view:
                return Secret(view[:length])
        except InvalidTag:
            raise AuthenticationError(
                f"{what}: does not authenticate: another key, another place than it was sealed for, or altered"
            ) from None
        finally:
            plain[:] = bytes(len(plain))


def check_record(record: memoryview, what: str) -> int:
    """Length of the plaintext in a sealed record. Raises AuthenticationError when its form is none of ours."""
    length = len(record) - OVERHEAD
    if not 1 <= length <= LARGEST:
        raise AuthenticationError(f"{what}: {len(record)} bytes; expected {OVERHEAD + 1} .. {OVERHEAD + LARGEST}: cut or altered")
    if bytes(record[: len(_HEADER)]) != _HEADER:
        raise AuthenticationError(f"{what}: is no sealed record of format {_HEADER[-1]}: another format, or altered")
    return length


def split_record(sealed: Buffer, what: str) -> tuple[bytes, bytes]:
    """Nonce, and ciphertext with tag, of a sealed record, for a token that does the cipher itself. Raises AuthenticationError."""
    with memoryview(sealed).cast("B") as record:
        check_record(record, what)
        return bytes(record[len(_HEADER) : _BODY]), bytes(record[_BODY:])


def join_record(nonce: bytes, ciphertext: bytes) -> bytes:
    """The sealed record of a nonce, and ciphertext with tag, that a token made."""
    return _HEADER + nonce + ciphertext


def record_data(associated: bytes) -> bytes:
    """What is authenticated beside the content: the record's header and the caller's associated data."""
    return _HEADER + associated


class KeyRow(NamedTuple):
    """A key-encryption key as the store keeps it; nothing in it is secret.

    id        16 hexadecimal digits, random
    master    identity of the master key that wraps it
    created   seconds since the epoch; microseconds count
    wrapped   the key, wrapped
    """

    id: str
    master: str
    created: float
    wrapped: bytes


class SealedVersion(NamedTuple):
    """One version of a resource as the store keeps it; nothing in it is secret.

    kek           id of the key-encryption key
    wrapped_key   the version's data key, wrapped by it
    content       the version's content, sealed by the data key
    """

    kek: str
    wrapped_key: bytes
    content: bytes


class KeyRing:
    """The key-encryption keys of a store, unwrapped. Made by `create` or `open`; every change gives a new ring.

    The keys stay in this process's memory (Secret) as long as the ring lives: the master key is asked when a ring is opened or
    changed, not for each resource.
    """

    __slots__ = ("_keys", "current", "rows")

    rows: Final[tuple[KeyRow, ...]]
    """What the store must keep, oldest first."""
    current: Final[KeyRow]
    """The key that wraps new data keys: the newest."""

    def __init__(self, rows: Iterable[KeyRow], keys: Mapping[str, Secret]) -> None:
        self.rows = tuple(sorted(rows, key=lambda row: (row.created, row.id)))
        self.current = self.rows[-1]
        self._keys: Final = dict(keys)

    @classmethod
    def create(cls, master: MasterKey) -> KeyRing:
        """A ring of one new key. Raises what `master.wrap` raises."""
        key = Secret.random(KEY_BYTES)
        row = _wrap(master, key, secrets.token_hex(8), time.time())
        return cls((row,), {row.id: key})

    @classmethod
    def open(cls, rows: Iterable[KeyRow], master: MasterKey) -> KeyRing:
        """Unwraps every key.

        Raises: StateError (no rows); AuthenticationError: another master key, an altered or exchanged row; what
            `master.unwrap` raises.
        """
        rows = tuple(rows)
        if not rows:
            raise StateError("the store has no key-encryption key; expected at least one")
        keys: dict[str, Secret] = {}
        for row in rows:
            _check_row(row)
            name = f"key-encryption key {row.id[:64]}"
            if row.id in keys:
                raise AuthenticationError(f"{name} is there twice")
            if row.master != master.identity:
                raise AuthenticationError(f"{name} was wrapped by master key {row.master[:80]}; this is {master.identity}")
            key = master.unwrap(row.wrapped, _kek_data(row.id, row.master, row.created))
            if len(key) != KEY_BYTES:
                raise AuthenticationError(f"{name}: {len(key)} bytes; expected {KEY_BYTES}")
            keys[row.id] = key
        return cls(rows, keys)

    def with_new_key(self, master: MasterKey) -> KeyRing:
        """This ring, all of it wrapped by `master`, and a new current key: what rotation begins with.

        When every data key has been wrapped anew (`rewrap`), `current_only` is what remains.
        """
        ring = self.under(master)
        key = Secret.random(KEY_BYTES)
        # A clock set back must not make an older key the current one.
        created = max(time.time(), self.current.created + 0.001)
        row = _wrap(master, key, secrets.token_hex(8), created)
        return KeyRing((*ring.rows, row), {**self._keys, row.id: key})

    def under(self, master: MasterKey) -> KeyRing:
        """The same keys, wrapped by another master key or anew by the same: data keys stay as they are."""
        return KeyRing((_wrap(master, self._keys[row.id], row.id, row.created) for row in self.rows), self._keys)

    def current_only(self) -> KeyRing:
        """A ring without the older keys. What they wrapped can be read no more, wherever a copy of it is."""
        return KeyRing((self.current,), {self.current.id: self._keys[self.current.id]})

    def seal(self, path: str, version: int, content: Buffer) -> SealedVersion:
        """Seals a version's content under a new data key. Raises LengthError, ArgumentError."""
        _check_place(path, version)
        data_key = Secret.random(KEY_BYTES)
        sealed = seal(data_key, content, associate("content", path, version))
        wrapped = seal(self._keys[self.current.id], data_key, _data_key_data(self.current.id, path, version))
        return SealedVersion(self.current.id, wrapped, sealed)

    def unseal(self, path: str, version: int, sealed: SealedVersion) -> Secret:
        """A version's content.

        Raises AuthenticationError: altered, cut, of another path or version, or wrapped by a key that this ring does not have.
        """
        data_key = self._data_key(path, version, sealed)
        return unseal(data_key, sealed.content, associate("content", path, version), what=f"{path} version {version}")

    def rewrap(self, path: str, version: int, sealed: SealedVersion) -> SealedVersion:
        """The same version with its data key wrapped by the current key; the content is not touched.

        Raises AuthenticationError.
        """
        data_key = self._data_key(path, version, sealed)
        wrapped = seal(self._keys[self.current.id], data_key, _data_key_data(self.current.id, path, version))
        return sealed._replace(kek=self.current.id, wrapped_key=wrapped)

    def _data_key(self, path: str, version: int, sealed: SealedVersion) -> Secret:
        _check_place(path, version)
        key = self._keys.get(sealed.kek)
        what = f"data key of {path} version {version}"
        if key is None:
            raise AuthenticationError(f"{what}: wrapped by key-encryption key {sealed.kek[:64]}, which is not there")
        data_key = unseal(key, sealed.wrapped_key, _data_key_data(sealed.kek, path, version), what=what)
        if len(data_key) != KEY_BYTES:
            raise AuthenticationError(f"{what}: {len(data_key)} bytes; expected {KEY_BYTES}")
        return data_key

    def __repr__(self) -> str:
        return f"<KeyRing of {len(self.rows)} keys, current {self.current.id}>"


def _check_row(row: KeyRow) -> None:
    """A database may give any type for any column."""
    texts = type(row.id) is str and type(row.master) is str and type(row.wrapped) is bytes
    if not (texts and type(row.created) in (int, float) and 0 <= row.created < 1 << 40):
        raise AuthenticationError("a key-encryption key's row has been altered: expected text, text, seconds, bytes")


def _wrap(master: MasterKey, key: Secret, name: str, created: float) -> KeyRow:
    created = round(created * 1_000_000) / 1_000_000  # what is bound below survives a database that keeps decimal text
    return KeyRow(name, master.identity, created, master.wrap(key, _kek_data(name, master.identity, created)))


def _kek_data(name: str, master: str, created: float) -> bytes:
    return associate("key-encryption key", name, master, round(created * 1_000_000))


def _data_key_data(kek: str, path: str, version: int) -> bytes:
    return associate("data key", kek, path, version)


def _check_key(key: Secret) -> None:
    if len(key) != KEY_BYTES:
        raise KeyLengthError(f"a key of {len(key)} bytes; expected {KEY_BYTES}")


def _check_length(length: int) -> None:
    if not 1 <= length <= LARGEST:
        raise LengthError(f"{length} bytes to seal; expected 1 .. {LARGEST}")


def _check_place(path: str, version: int) -> None:
    if not path or type(version) is not int or version < 1:
        raise ArgumentError(f"path {path!r}, version {version!r}; expected a path and a version from 1 on")
