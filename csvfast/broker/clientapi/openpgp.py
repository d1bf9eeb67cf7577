"""OpenPGP keyrings, as far as a keyring is managed: which public keys are in it, by fingerprint and user id.

A keyring is a sequence of transferable public keys, binary or armored; this module takes it apart and puts it together again,
byte for byte. It does not check self-signatures, expiry or revocation, as importing into a keyring never does: whoever verifies
an image's signature with the keyring must. Secret keys are refused: the keyring is handed to guests.

Source: RFC 9580 (4.2 packet headers, 5.5.2 public keys, 5.5.4 fingerprints, 6.2 armor, 10.1 transferable public keys).
Thread-safety: immutable objects, functions without state.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, NoReturn

from csvfast.errors import FormatError

__all__ = ["KEYRING_LIMIT", "PublicKey", "find_keys", "merge_keys", "read_keyring", "write_keyring"]

KEYRING_LIMIT: Final = 2 << 20
"""Bytes of a keyring."""

_NAME: Final = "OpenPGP keyring"
_SIGNATURE, _SECRET_KEY, _PUBLIC_KEY, _SECRET_SUBKEY, _MARKER, _TRUST, _USER_ID, _SUBKEY = 2, 5, 6, 7, 10, 12, 13, 14
_ATTRIBUTE, _PADDING = 17, 21
_KEPT: Final = {_SIGNATURE, _USER_ID, _SUBKEY, _ATTRIBUTE}
_DROPPED: Final = {_MARKER, _TRUST, _PADDING}
_ARMOR: Final = re.compile(
    rb"-----BEGIN PGP PUBLIC KEY BLOCK-----[ \t]*\r?\n(?:[^\r\n:]{1,80}: ?[^\r\n]{0,200}\r?\n)*[ \t]*\r?\n"
    rb"([A-Za-z0-9+/=\r\n \t]+?)(?:\r?\n=([A-Za-z0-9+/]{4}))?[ \t]*\r?\n-----END PGP PUBLIC KEY BLOCK-----"
)
_ALGORITHMS: Final = {
    1: "rsa", 2: "rsa", 3: "rsa", 16: "elgamal", 17: "dsa", 18: "ecdh", 19: "ecdsa", 22: "eddsa", 25: "x25519", 26: "x448",
    27: "ed25519", 28: "ed448",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A public key with everything that belongs to it.

    fingerprint   hexadecimal, upper case: 40 digits for version 4, 64 for later ones
    created       seconds since the epoch
    encoded       its packets
    """

    fingerprint: str
    version: int
    algorithm: str
    created: int
    user_ids: tuple[str, ...]
    encoded: bytes = field(repr=False)

    @property
    def key_id(self) -> str:
        """16 hexadecimal digits."""
        return self.fingerprint[-16:] if self.version == 4 else self.fingerprint[:16]

    def lines(self) -> str:
        """As gpg --list-keys prints a key, as far as this module knows it."""
        day = datetime.fromtimestamp(self.created, UTC).date().isoformat()
        users = "".join(f"uid           {name}\n" for name in self.user_ids)
        return f"pub   {self.algorithm} {day}\n      {self.fingerprint}\n{users}"


def read_keyring(data: bytes) -> list[PublicKey]:
    """The keys of a binary or armored keyring. FormatError."""
    if len(data) > KEYRING_LIMIT:
        _refuse("length", f"{len(data)} bytes", f"at most {KEYRING_LIMIT}")
    blocks = [_dearmored(match) for match in _ARMOR.finditer(data)] if b"-----BEGIN" in data else [data]
    keys = [key for block in blocks for key in _keys(block)]
    if not keys:
        _refuse("keys", "none", "one public key or more, binary or armored")
    return keys


def write_keyring(keys: Sequence[PublicKey]) -> bytes:
    """The binary keyring."""
    return b"".join(key.encoded for key in keys)


def merge_keys(old: Sequence[PublicKey], new: Sequence[PublicKey]) -> list[PublicKey]:
    """Both; of keys with the same fingerprint the new one stays."""
    result = {key.fingerprint: key for key in old}
    result.update((key.fingerprint, key) for key in new)
    return list(result.values())


def find_keys(keys: Sequence[PublicKey], name: str) -> list[PublicKey]:
    """Those of a fingerprint or a long key id; short ids are anybody's, and find nothing."""
    wanted = name.replace(" ", "").removeprefix("0x").upper()
    return [key for key in keys if wanted in (key.fingerprint, key.key_id)]


def _keys(block: bytes) -> Iterator[PublicKey]:
    start: tuple[str, int, str, int] | None = None
    users: list[str] = []
    parts: list[bytes] = []
    for tag, body, whole in _packets(block):
        if tag == _PUBLIC_KEY:
            if start is not None:
                yield PublicKey(*start, tuple(users), b"".join(parts))
            start, users, parts = _read_key(body), [], [whole]
        elif tag in (_SECRET_KEY, _SECRET_SUBKEY):
            _refuse("packet", "a secret key", "public keys only")
        elif start is None:
            if tag not in _DROPPED:
                _refuse("packet", f"one of type {tag}", "a public key first")
        elif tag in _KEPT:
            parts.append(whole)
            if tag == _USER_ID:
                users.append(_printable(body))
        elif tag not in _DROPPED:
            _refuse("packet", f"one of type {tag}", "user ids, subkeys and signatures")
    if start is not None:
        yield PublicKey(*start, tuple(users), b"".join(parts))


def _packets(block: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    offset = 0
    while offset < len(block):
        first = block[offset]
        if not first & 0x80:
            _refuse("packet", f"byte {first:#04x}", "the first byte of a packet", offset)
        header = block[offset + 1 : offset + 6]
        if first & 0x40:
            tag = first & 0x3F
            size, length = _new_length(header, offset)
        else:
            tag = first >> 2 & 0x0F
            size = 1 << (first & 3)
            if size == 8:
                _refuse("length", "indeterminate", "a length", offset)
            length = int.from_bytes(header[:size], "big") if len(header) >= size else -1
        begin = offset + 1 + size
        if length < 0 or begin + length > len(block):
            _refuse("length", f"beyond the {len(block)} bytes there are", "a whole packet", offset)
        yield tag, block[begin : begin + length], block[offset : begin + length]
        offset = begin + length


def _new_length(header: bytes, offset: int) -> tuple[int, int]:
    """Octets of the length, and the length; -1 when it is cut off."""
    if not header or header[0] < 192:
        return 1, header[0] if header else -1
    if header[0] < 224:
        return 2, (header[0] - 192 << 8) + header[1] + 192 if len(header) > 1 else -1
    if header[0] < 255:
        _refuse("length", "partial", "a length", offset)
    return 5, int.from_bytes(header[1:5], "big") if len(header) == 5 else -1


def _read_key(body: bytes) -> tuple[str, int, str, int]:
    if len(body) < 6:
        _refuse("public key", f"{len(body)} bytes", "6 or more")
    version = body[0]
    if version == 4 and len(body) <= 0xFFFF:
        # RFC 9580, 5.5.4.2: a name for the key, which OpenPGP has decided about
        digest = hashlib.sha1(b"\x99" + len(body).to_bytes(2, "big") + body, usedforsecurity=False).hexdigest()
    elif version in (5, 6):
        digest = hashlib.sha256(bytes((0x95 + version,)) + len(body).to_bytes(4, "big") + body).hexdigest()
    else:
        _refuse("public key", f"version {version}", "4, 5 or 6")
    algorithm = _ALGORITHMS.get(body[5], f"algorithm-{body[5]}")
    return digest.upper(), version, algorithm, int.from_bytes(body[1:5], "big")


def _dearmored(match: re.Match[bytes]) -> bytes:
    try:
        data = base64.b64decode(b"".join(match[1].split()), validate=True)
    except binascii.Error:
        _refuse("armor", "a block", "base64")
    if match[2] is not None and _crc24(data) != int.from_bytes(base64.b64decode(match[2]), "big"):
        _refuse("armor", "another checksum", "that of the block")
    return data


def _crc24(data: bytes) -> int:
    crc = 0xB704CE
    for byte in data:
        crc ^= byte << 16
        for _ in range(8):
            crc = (crc << 1 ^ (0x1864CFB if crc & 0x800000 else 0)) & 0xFFFFFF
    return crc


def _printable(body: bytes) -> str:
    text = body[:256].decode("utf-8", "replace")
    return "".join(char if char.isprintable() else "?" for char in text)


def _refuse(what: str, found: str, expected: str, offset: int | None = None) -> NoReturn:
    raise FormatError(_NAME, what, offset, found, expected)
