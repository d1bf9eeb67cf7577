"""Verdictd's commands: where one ends and the next begins, what they ask for, and what replies look like.

    {"command":"version"}                                    {"status":"OK","version":"v1"}
    {"command":"echo","data":"text"}                         text, then the connection ends
    {"command":"Get KEK","kids":[kid]}                       {"status":"OK","data":{kid:b64}}
    {"command":"Decrypt","blobs":[blob]}                     {"status":"OK","data":{encrypted_data:b64}}
    {"command":"Get Policy","optional":{}}, four others      b64 of the file
    {"command":"Get Resource","optional":{"resource_path":"r/t/t"}}     b64 of the resource
    {"command":"Get Resource Info","name":"Policy" or "r/t/t"}          {"status":"OK","data":{"base64size":"n"}}
    {"command":"Challenge"}, {"command":"Attest",...}        csvfast.ratstls.freshness

    failures: {"status":"Fail","data":{},"error":text} of Get KEK and Decrypt; {"status":"Fail","error":text} of the others, and
    base64 of that where success is base64

Nothing marks the end of a message: a request ends where its JSON object does, whatever reads and writes it came in. A reply goes
out in one write, and clients read until a read that is shorter than 16384 bytes, or until the size that Get Resource Info has
announced. A reply of k * 16384 bytes would leave the first kind waiting. JSON gets a space behind it then, which every reader of
JSON skips. Base64 does not: the clients' decoder (Rust's base64 crate) refuses blanks, and base64 has no other padding; see
`ends_unseen` for what is done instead. Both are inferred from the clients' source, not described anywhere.

Key ids are plain names or repository/type/tag; the algorithm of a blob is "AES" (Verdictd's release) or "A256GCM" (what later
clients copy out of an image's annotation). Members that are not known are ignored, as serde does.

Source: inclavare-containers/verdictd src/attestation_agent/{protocol,rats_tls}.rs; confidential-containers/attestation-agent
src/kbc_modules/eaa_kbc and guest-components' history of it.
Thread-safety: functions without state; a JsonFrames belongs to one task.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from csvfast.broker.json_input import loads, member
from csvfast.broker.model import ResourcePath, for_kid
from csvfast.errors import AuthenticationError, RequestError

if TYPE_CHECKING:
    from csvfast._core import BytesLike
    from csvfast.crypto import Secret

__all__ = [
    "BLOB_BYTES",
    "BLOB_LIMIT",
    "CLIENT_READ",
    "FRESH_REQUIRED",
    "KEK_BYTES",
    "KEY_BYTES",
    "KID_LIMIT",
    "LIMITED",
    "NAMED_RESOURCES",
    "REQUEST_BYTES",
    "UNAVAILABLE",
    "Attest",
    "Blob",
    "Challenge",
    "Decrypt",
    "Echo",
    "GetKek",
    "GetResource",
    "GetResourceInfo",
    "JsonFrames",
    "OpenedBlob",
    "Request",
    "Version",
    "base64_reply",
    "base64_size",
    "check_blob",
    "data_failure",
    "ends_unseen",
    "failure",
    "json_reply",
    "open_blob",
    "read_request",
    "resource_path",
]

REQUEST_BYTES: Final = 64 << 10
"""Bytes of a request, unless configured otherwise. The original's limit is 4096."""
CLIENT_READ: Final = 16384
"""Bytes that clients read at once; a shorter read is the end of a reply to them."""
KID_LIMIT: Final = 128
"""Key ids in one request."""
BLOB_LIMIT: Final = 64
"""Blobs in one request."""
BLOB_BYTES: Final = 32 << 10
"""Bytes of a blob's ciphertext."""
KEY_BYTES: Final = 4096
"""Bytes of a key that Get KEK hands out. Whatever is longer is no key."""
KEK_BYTES: Final = 32
"""Bytes of a key that Decrypt works with."""

FRESH_REQUIRED: Final = "fresh attestation required"
"""The error that asks for Challenge and Attest."""
LIMITED: Final = "too many requests"
"""Followed by the correlation id in brackets, as the next one is."""
UNAVAILABLE: Final = "temporarily unavailable"
"""Nothing is wrong with the request."""

NAMED_RESOURCES: Final[Mapping[str, ResourcePath]] = MappingProxyType(
    {
        "Policy": ResourcePath("verdictd", "image", "policy"),
        "Sigstore Config": ResourcePath("verdictd", "image", "sigstore"),
        "GPG Keyring": ResourcePath("verdictd", "image", "gpg-keyring"),
        "Cosign Key": ResourcePath("verdictd", "image", "cosign-key"),
        "Credential": ResourcePath("verdictd", "image", "credential"),
    }
)
"""What "Get <name>" gets."""

_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
_WHAT: Final = "request"


# ---- Where messages end

_BLANKS: Final = re.compile(rb"[ \t\r\n]*+")
# To the next bracket, over whole strings; or to the quote of a string whose end has not come.
_OVER: Final = re.compile(rb'[^][{}"]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^][{}"]*+)*+', re.DOTALL)
# Within a string: to its quote, or to the end, or to a backslash that is the last byte.
_WITHIN: Final = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_QUOTE, _OPEN, _OBJECT = ord('"'), b"[{", ord("{")


class JsonFrames:
    """Cuts a stream of bytes into JSON objects. Every byte is looked at once, or twice where a string is cut in two.

    In: limit   bytes of one object
        what    how errors call it
    Only strings and brackets are looked at; whether it is JSON is found out by whoever reads the object.
    """

    __slots__ = ("_buffer", "_depth", "_limit", "_position", "_what", "_within")

    def __init__(self, limit: int = REQUEST_BYTES, what: str = _WHAT) -> None:
        self._buffer = bytearray()
        self._limit = limit
        self._what = what
        self._position = 0  # looked at so far
        self._depth = 0
        self._within = False  # a string

    @property
    def is_empty(self) -> bool:
        """True when no part of an object waits for its rest."""
        return not self._buffer

    def feed(self, data: bytes) -> None:
        """What has come."""
        self._buffer += data

    def take(self) -> bytes | None:
        """The next object, when all of it has come. HOT. RequestError: something else begins here, or it is too long."""
        buffer, position, depth, within = self._buffer, self._position, self._depth, self._within
        if not depth:
            blanks = _BLANKS.match(buffer)
            if blanks is not None and (end := blanks.end()):
                del buffer[:end]
            if not buffer:
                return None
            if buffer[0] != _OBJECT:
                raise RequestError(f"{self._what}: does not begin with {{; expected a JSON object")
        size = len(buffer)
        while True:
            found = (_WITHIN if within else _OVER).match(buffer, position)
            assert found is not None  # both match nothing, too
            position = found.end()
            if position == size or (within and buffer[position] != _QUOTE):
                break
            byte = buffer[position]
            position += 1
            if byte == _QUOTE:
                within = not within
            elif byte in _OPEN:
                depth += 1
            else:
                depth -= 1
                if not depth:
                    return self._cut(position)
        if size > self._limit:
            self._too_long()
        self._position, self._depth, self._within = position, depth, within
        return None

    def _cut(self, end: int) -> bytes:
        if end > self._limit:
            self._too_long()
        taken = bytes(memoryview(self._buffer)[:end])
        del self._buffer[:end]
        self._position, self._depth, self._within = 0, 0, False
        return taken

    def _too_long(self) -> None:
        raise RequestError(f"{self._what}: more than {self._limit} bytes; expected at most that")


# ---- Requests


class Version(NamedTuple):
    """Which version of the protocol is spoken."""


class Echo(NamedTuple):
    """Send this back."""

    data: str


class GetKek(NamedTuple):
    """Keys by their ids."""

    kids: tuple[str, ...]


class Blob(NamedTuple):
    """What Decrypt decrypts, as it came."""

    kid: str
    encrypted_data: str
    algorithm: str
    key_length: int
    iv: str


class Decrypt(NamedTuple):
    """Blobs, each with the id of the key it is encrypted with."""

    blobs: tuple[Blob, ...]


class GetResource(NamedTuple):
    """A resource by its path; a named one has its path here, too."""

    path: str


class GetResourceInfo(NamedTuple):
    """The size of a resource's base64 text."""

    path: str


class Challenge(NamedTuple):
    """A nonce for fresh evidence."""


class Attest(NamedTuple):
    """Fresh evidence; `document` is the request."""

    document: dict[str, Any]


Request = Version | Echo | GetKek | Decrypt | GetResource | GetResourceInfo | Challenge | Attest


def read_request(data: bytes, *, limit: int = REQUEST_BYTES) -> Request:
    """A request from its JSON. RequestError: malformed, no such command, or members missing or of other types. HOT.

    The original closes the connection where this raises. What the members say (key ids, algorithms, paths) is not judged here.
    """
    document = loads(data, _WHAT, limit=limit)
    if type(document) is not dict:
        raise RequestError(f"{_WHAT}: no object; expected one with a command")
    reader = _READERS.get(member(document, "command", str, _WHAT))
    if reader is None:
        raise RequestError(f"{_WHAT}: no such command")
    return reader(document)


def _echo(document: dict[str, Any]) -> Request:
    return Echo(member(document, "data", str, _WHAT))


def _get_kek(document: dict[str, Any]) -> Request:
    kids = member(document, "kids", list, _WHAT)
    for kid in kids:
        if type(kid) is not str:
            raise RequestError(f"{_WHAT}: kids; expected a list of strings")
    return GetKek(tuple(kids))


def _decrypt(document: dict[str, Any]) -> Request:
    blobs = []
    for blob in member(document, "blobs", list, _WHAT):
        if type(blob) is not dict:
            raise RequestError(f"{_WHAT}: blobs; expected a list of objects")
        texts = [member(blob, name, str, "blob") for name in ("kid", "encrypted_data", "algorithm", "iv")]
        length = member(blob, "key_length", int, "blob")
        blobs.append(Blob(texts[0], texts[1], texts[2], length, texts[3]))
    return Decrypt(tuple(blobs))


def _get_named(path: ResourcePath) -> Callable[[dict[str, Any]], Request]:
    request = GetResource(str(path))

    def read(document: dict[str, Any]) -> Request:
        _optional(document)
        return request

    return read


def _get_resource(document: dict[str, Any]) -> Request:
    return GetResource(member(_optional(document), "resource_path", str, f"{_WHAT}: optional"))


def _get_resource_info(document: dict[str, Any]) -> Request:
    name = member(document, "name", str, _WHAT)
    return GetResourceInfo(str(NAMED_RESOURCES.get(name, name)))


def _optional(document: dict[str, Any]) -> dict[str, Any]:
    optional = document.get("optional")
    if optional is None:
        return {}
    if type(optional) is not dict:
        raise RequestError(f"{_WHAT}: optional; expected an object")
    return optional


_READERS: Final[Mapping[str, Callable[[dict[str, Any]], Request]]] = {
    "version": lambda _document: Version(),
    "echo": _echo,
    "Get KEK": _get_kek,
    "Decrypt": _decrypt,
    "Get Resource": _get_resource,
    "Get Resource Info": _get_resource_info,
    "Challenge": lambda _document: Challenge(),
    "Attest": Attest,
    **{f"Get {name}": _get_named(path) for name, path in NAMED_RESOURCES.items()},
}


def resource_path(text: str) -> ResourcePath:
    """The path of Get Resource: r/t/t, the same with a slash before it, or kbs:///r/t/t. RequestError."""
    return ResourcePath.from_uri(text) if text.startswith("kbs://") else ResourcePath.parse(text.removeprefix("/"))


# ---- Blobs


class OpenedBlob(NamedTuple):
    """A blob whose members have been checked and decoded."""

    path: ResourcePath
    ciphertext: bytes
    nonce: bytes


def check_blob(blob: Blob) -> OpenedBlob:
    """RequestError: a key id that is none, another algorithm or length, no base64, too long."""
    path = for_kid(blob.kid)
    if blob.algorithm not in ("AES", "A256GCM") or blob.key_length != 256:
        raise RequestError("algorithm and key_length: expected AES or A256GCM, and 256")
    if len(blob.encrypted_data) > (BLOB_BYTES + 2) // 3 * 4:
        raise RequestError(f"encrypted_data: {len(blob.encrypted_data)} characters; expected at most {BLOB_BYTES} bytes")
    ciphertext, nonce = _decoded(blob.encrypted_data, "encrypted_data"), _decoded(blob.iv, "iv")
    if len(nonce) != _NONCE_BYTES:
        raise RequestError(f"iv: {len(nonce)} bytes; expected {_NONCE_BYTES}")
    if len(ciphertext) <= _TAG_BYTES:
        raise RequestError(f"encrypted_data: {len(ciphertext)} bytes; expected more than {_TAG_BYTES}: ciphertext, then a tag")
    return OpenedBlob(path, ciphertext, nonce)


def open_blob(blob: OpenedBlob, kek: Secret) -> bytes:
    """The plaintext: AES-256-GCM, no associated data. AuthenticationError: not its key, or altered. RequestError: not 256 bits.

    What Python's libraries return is freed without being wiped; it lives until the reply has been sent.
    """
    if len(kek) != KEK_BYTES:
        raise RequestError(f"key of {len(kek)} bytes; expected {KEK_BYTES}")
    try:
        return AESGCM(memoryview(kek)).decrypt(blob.nonce, blob.ciphertext, None)
    except InvalidTag:
        raise AuthenticationError("does not open with its key") from None


def _decoded(text: str, what: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(f"{what}: no base64") from None


# ---- Replies

_encode: Final = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


def json_reply(value: Mapping[str, Any], *, pad: bool = True) -> bytes:
    """A reply in JSON.

    In: pad   put a space behind it when a client would take its end for a pause, see the module. Inferred, hence an option
    """
    reply = _encode(value).encode("ascii")
    return reply + b" " if pad and ends_unseen(reply) else reply


def base64_reply(content: BytesLike) -> bytes:
    """A reply that is nothing but the content, in base64."""
    return base64.b64encode(memoryview(content))  # type: ignore[arg-type]  # any buffer


def base64_size(length: int) -> int:
    """Characters that so many bytes have in base64."""
    return (length + 2) // 3 * 4


def ends_unseen(reply: Sequence[int]) -> bool:
    """True for a reply after which a client that knows no size reads on. Closing the connection tells it then: its next read is
    shorter than any other. A client that has asked for the size stops by itself, and needs the connection."""
    return len(reply) > 0 and len(reply) % CLIENT_READ == 0


def data_failure(error: str) -> dict[str, Any]:
    """The failure of Get KEK and Decrypt."""
    return {"status": "Fail", "data": {}, "error": error}


def failure(error: str) -> dict[str, Any]:
    """The failure of other commands."""
    return {"status": "Fail", "error": error}
