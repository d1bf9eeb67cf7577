"""The two CBOR structures of an attested certificate: what the guest says about itself, and that beside the evidence.

    claims buffer     { "pubkey-hash": bytes( [hash id, hash of the SubjectPublicKeyInfo] ), any other name: bytes, ... }
    evidence buffer   tag([ raw evidence, claims buffer ])

The claims buffer is what the chip vouches for: the report's user data is SHA-256(claims buffer) || 32 zero bytes. Hence it is
hashed as it was received and never written anew.

Readers accept one encoding only: definite lengths, the shortest heads, each name once, nothing behind the end. cbor2 reads more
than that, so what it read is written again and must come out as it came in. Values are never looked into.

Sources: CCC-Attestation/interoperable-ra-tls docs/Interoperable-RA-TLS-cert-edvidence-formats.md; RFC 8949 section 4.2.1;
inclavare-containers/rats-tls src/core/{dice,claim}.c, src/include/internal/dice.h. Hash ids: IANA, Named Information.
Thread-safety: functions without state, immutable objects.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NoReturn

import cbor2

from csvfast.errors import ArgumentError, FormatError
from csvfast.report._input import as_bytes

if TYPE_CHECKING:
    from csvfast._core import BytesLike

__all__ = [
    "BUFFER_LIMIT",
    "CSV_TAG",
    "HASHES",
    "PUBKEY_HASH",
    "TAGS",
    "Claims",
    "EvidenceBuffer",
    "decode_claims",
    "decode_evidence_buffer",
    "encode_claims",
    "encode_evidence_buffer",
    "report_data_of",
    "spki_hash",
]

CSV_TAG: Final = 0x1A7506  # private, not registered
TAGS: Final[Mapping[int, str]] = MappingProxyType(
    {
        60000: "Intel TEE quote",
        60001: "Intel TEE report",
        60002: "Intel SGX legacy report",
        0x1A7504: "AMD SEV-SNP",
        0x1A7505: "AMD SEV",
        CSV_TAG: "Hygon CSV",
    }
)
HASHES: Final[Mapping[int, tuple[str, int]]] = MappingProxyType({1: ("sha256", 32), 7: ("sha384", 48), 8: ("sha512", 64)})
PUBKEY_HASH: Final = "pubkey-hash"
BUFFER_LIMIT: Final = 1 << 16  # bytes of either structure: a certificate of more than half of that is refused

_CLAIMS: Final = "claims buffer"
_BUFFER: Final = "evidence buffer"
_ZERO: Final = bytes(32)


@dataclass(frozen=True, slots=True)
class Claims:
    """What decode_claims() found.

    Attributes:
        hash_id: a key of HASHES. pubkey_hash: of that hash's length.
        custom: all other claims in the order in which they came, read-only.
        encoded: the bytes they were read from.
    """

    hash_id: int
    pubkey_hash: bytes
    custom: Mapping[str, bytes]
    encoded: bytes


@dataclass(frozen=True, slots=True)
class EvidenceBuffer:
    """What decode_evidence_buffer() found: tag (a key of TAGS), raw evidence and claims buffer, neither of them looked into."""

    tag: int
    raw: bytes
    claims: bytes

    def __repr__(self) -> str:
        return f"<EvidenceBuffer {TAGS[self.tag]}: {len(self.raw)} bytes of evidence, {len(self.claims)} of claims>"


_NO_CLAIMS: Final[Mapping[str, BytesLike]] = MappingProxyType({})


def spki_hash(spki: bytes, hash_id: int) -> bytes:
    """The hash of a SubjectPublicKeyInfo in DER that a pubkey-hash claim with this id holds. ArgumentError: unknown id."""
    if hash_id not in HASHES:
        raise ArgumentError(f"hash id {hash_id}: expected one of {', '.join(map(str, HASHES))}")
    return hashlib.new(HASHES[hash_id][0], spki).digest()


def encode_claims(spki: BytesLike, custom: Mapping[str, BytesLike] = _NO_CLAIMS, *, hash_id: int = 1) -> bytes:
    """A claims buffer: pubkey-hash, then `custom` in its order.

    In: spki     the key's SubjectPublicKeyInfo in DER
        custom   names and values; pubkey-hash is not one of them
        hash_id  a key of HASHES; the C libraries always write 1, SHA-256
    ArgumentError: a name that is no text or is pubkey-hash; an unknown hash id; more than BUFFER_LIMIT bytes. BufferTypeError.
    """
    value = cbor2.dumps([hash_id, spki_hash(as_bytes(spki, "spki"), hash_id)])
    claims = {PUBKEY_HASH: value}
    for name, content in custom.items():
        if name == PUBKEY_HASH or not _is_unicode(name):
            raise ArgumentError(f"claim {name!r}: expected Unicode text other than {PUBKEY_HASH!r}")
        claims[name] = as_bytes(content, f"claim {name!r}")
    return _within_limit(cbor2.dumps(claims), _CLAIMS)


def decode_claims(data: BytesLike) -> Claims:
    """Reads a claims buffer. FormatError for whatever breaks a rule of the module, and for a pubkey-hash that is none."""
    raw = as_bytes(data, "claims")
    claims = _read(raw, _CLAIMS)
    if type(claims) is not dict:
        raise FormatError(_CLAIMS, "map", 0, _kind(claims), "a map of names and bytes")
    for name, value in claims.items():
        if type(name) is not str:
            raise FormatError(_CLAIMS, "name", None, _kind(name), "text")
        if type(value) is not bytes:
            raise FormatError(_CLAIMS, _short(name), None, _kind(value), "bytes")
    _check_encoding(raw, claims, _CLAIMS)
    value = claims.pop(PUBKEY_HASH, None)
    if value is None:
        raise FormatError(_CLAIMS, PUBKEY_HASH, None, "none", "one")
    hash_id, digest = _read_pubkey_hash(value)
    return Claims(hash_id, digest, MappingProxyType(claims), raw)


def _read_pubkey_hash(raw: bytes) -> tuple[int, bytes]:
    structure = f"{_CLAIMS}, {PUBKEY_HASH}"
    pair = _read(raw, structure)
    if not isinstance(pair, list | tuple) or len(pair) != 2 or type(pair[0]) is not int or type(pair[1]) is not bytes:
        raise FormatError(structure, "array", 0, _kind(pair), "an array of a number and bytes")
    _check_encoding(raw, pair, structure)
    hash_id, digest = pair
    if hash_id not in HASHES:
        known = ", ".join(f"{number} ({name})" for number, (name, _) in HASHES.items())
        raise FormatError(structure, "hash id", 1, _number(hash_id), known)
    name, size = HASHES[hash_id]
    if len(digest) != size:
        raise FormatError(structure, "hash", 2, f"{len(digest)} bytes", f"{size}, for {name}")
    return hash_id, digest


def encode_evidence_buffer(raw: BytesLike, claims: BytesLike, tag: int = CSV_TAG) -> bytes:
    """The content of the evidence extension. ArgumentError: a tag that is no key of TAGS, more than BUFFER_LIMIT bytes."""
    if tag not in TAGS:
        raise ArgumentError(f"tag {tag}: expected one of {', '.join(map(str, TAGS))}")
    content = [as_bytes(raw, "raw evidence"), as_bytes(claims, "claims")]
    return _within_limit(cbor2.dumps(cbor2.CBORTag(tag, content)), _BUFFER)


def decode_evidence_buffer(data: BytesLike) -> EvidenceBuffer:
    """Reads an evidence buffer of any kind of evidence in TAGS. FormatError for whatever breaks a rule of the module."""
    raw = as_bytes(data, "evidence buffer")
    tagged = _read(raw, _BUFFER)
    if type(tagged) is not cbor2.CBORTag:
        raise FormatError(_BUFFER, "tag", 0, _kind(tagged), "a tag that names the kind of evidence")
    if tagged.tag not in TAGS:
        known = ", ".join(f"{tag} ({name})" for tag, name in TAGS.items())
        raise FormatError(_BUFFER, "tag", 0, _number(tagged.tag), known)
    pair = tagged.value
    if not isinstance(pair, list | tuple) or len(pair) != 2 or type(pair[0]) is not bytes or type(pair[1]) is not bytes:
        raise FormatError(_BUFFER, "array", None, _kind(pair), "an array of evidence (bytes) and claims buffer (bytes)")
    _check_encoding(raw, tagged, _BUFFER)
    return EvidenceBuffer(tagged.tag, pair[0], pair[1])


def report_data_of(claims: BytesLike) -> bytes:
    """What the report's user data must be for this claims buffer: SHA-256 || 32 zero bytes, 64 bytes."""
    return hashlib.sha256(as_bytes(claims, "claims")).digest() + _ZERO


def _refuse_tag(*_: object) -> NoReturn:
    raise ValueError("a tag")


# cbor2 makes fractions, dates, patterns and mails of these, which can cost a stranger's certificate a tenth of a second.
_EXPENSIVE_TAGS: Final = dict.fromkeys((*range(38), 100, 256, 258, 260, 261, 1004, 43000, 55799), _refuse_tag)
_DEPTH: Final = 8  # the structures here need 2
_ITEMS: Final = 1024  # a stranger's map whose thousands of keys all have one hash costs a tenth of a second, too


def _read(raw: bytes, structure: str) -> object:
    if len(raw) > BUFFER_LIMIT:
        raise FormatError(structure, "length", None, f"{len(raw)} bytes", f"at most {BUFFER_LIMIT}")
    _check_items(raw, structure)
    try:
        value: object = cbor2.loads(raw, semantic_decoders=_EXPENSIVE_TAGS, max_depth=_DEPTH)
    except Exception:  # its own class, and what Python objects to in between
        raise FormatError(structure, "encoding", None, "bytes that are none of it", "CBOR (RFC 8949), few levels deep") from None
    return value


def _check_items(raw: bytes, structure: str) -> None:
    """Counts data items by their heads; whether they are well-formed is for cbor2 to say."""
    position = items = 0
    while position < len(raw):
        items += 1
        if items > _ITEMS:
            raise FormatError(structure, "encoding", position, f"more than {_ITEMS} data items", f"at most {_ITEMS}")
        major, value = raw[position] >> 5, raw[position] & 31
        position += 1
        if 24 <= value <= 27:
            size = 1 << (value - 24)
            value = int.from_bytes(raw[position : position + size], "big")
            position += size
        elif value > 27:
            value = 0  # of indefinite length: its pieces are items of their own
        if major in (2, 3):  # bytes, text
            position += value


def _check_encoding(raw: bytes, value: object, structure: str) -> None:
    encoded = cbor2.dumps(value)
    if encoded == raw:
        return
    size = min(len(raw), len(encoded))
    offset = next((index for index in range(size) if raw[index] != encoded[index]), size)
    if offset == len(encoded):
        raise FormatError(structure, "encoding", offset, f"{len(raw) - offset} more bytes", "the end")
    expected = "definite lengths, the shortest heads, each name once"
    raise FormatError(structure, "encoding", offset, "another encoding of the same values", expected)


def _within_limit(encoded: bytes, structure: str) -> bytes:
    if len(encoded) > BUFFER_LIMIT:
        raise ArgumentError(f"{structure} of {len(encoded)} bytes: expected at most {BUFFER_LIMIT}")
    return encoded


def _is_unicode(name: object) -> bool:
    # A str may hold halves of surrogate pairs, which UTF-8 has no bytes for.
    return isinstance(name, str) and name.encode(errors="replace").decode() == name


def _kind(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"an array of {len(value)}: {', '.join(type(one).__name__ for one in value[:4])}"
    return {dict: "a map", bytes: "bytes", str: "text", int: "a number", cbor2.CBORTag: "a tag"}.get(type(value), "another type")


def _number(value: int) -> str:
    return str(value) if value.bit_length() <= 64 else f"a number of {value.bit_length()} bits"


def _short(name: str) -> str:
    return repr(name if len(name) <= 40 else name[:40] + "...")
