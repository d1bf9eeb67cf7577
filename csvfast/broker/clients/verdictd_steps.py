"""What a guest says to Verdictd's door and how it reads the answers, without the connection: see csvfast.broker.clients.verdictd.

Each command is a generator. It yields what has to be done (`Ask`: send a request and read its reply; `Work`: something that may
take long) and is sent the outcome, so that a client with threads and one with an event loop are the same client.

Requests are at most `request_bytes` long, since Verdictd's own server reads 4096 bytes at once and takes them for a request.
Lists that are longer are asked for in several requests.

Source: csvfast.broker.verdictd.protocol. Thread-safety: one client's steps belong to one thread or task at a time.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, NoReturn, TypeVar

from csvfast.broker.json_input import loads, member
from csvfast.broker.model import for_kid
from csvfast.broker.verdictd.protocol import (
    BLOB_LIMIT,
    CLIENT_READ,
    FRESH_REQUIRED,
    KID_LIMIT,
    LIMITED,
    NAMED_RESOURCES,
    REQUEST_BYTES,
    UNAVAILABLE,
    Blob,
    JsonFrames,
    base64_size,
    check_blob,
    resource_path,
)
from csvfast.crypto import Secret
from csvfast.errors import ArgumentError, AttestedTlsError, DeniedError, LimitedError, RequestError, UnavailableError
from csvfast.ratstls.freshness import CHALLENGE, answer_challenge

if TYPE_CHECKING:
    from csvfast._core import BytesLike
    from csvfast.ratstls.attester import Attester
    from csvfast.ratstls.certificate import Layout
    from csvfast.ratstls.context import Identity
    from csvfast.ratstls.peer import Peer

__all__ = ["REPLY_BYTES", "Ask", "Prover", "Replies", "Step", "Steps", "Work"]

REPLY_BYTES: Final = 4 << 20
"""Bytes of one reply. Resources of the KBS have at most 2 MiB, in base64 a third more."""
TRIES: Final = 3
"""How often a resource is asked for whose size changes meanwhile."""

_WHAT: Final = "reply"
_DENIED: Final = re.compile(r"not allowed(?: \(([0-9A-Za-z_-]{1,32})\))?\Z")
_BLANKS: Final = b" \t\r\n"
_T = TypeVar("_T")


class Ask(NamedTuple):
    """Send `request`; read JSON (size None), base64 of `size` characters or a failure in base64, or everything (size -1)."""

    request: bytes
    size: int | None = None


class Work(NamedTuple):
    """Call `call`, away from an event loop."""

    call: Callable[[], Any]


Step = Generator[Ask | Work, Any, _T]


class _OutOfStepError(RequestError):
    """What came was no reply to what was asked."""


class _StaleError(RequestError):
    """The broker wants evidence of now."""


class _ResizedError(RequestError):
    """The resource is not as long as it was announced to be."""


# ---- Reading


class Replies:
    """Collects one reply. In: ask   what was asked"""

    def __init__(self, ask: Ask) -> None:
        self._size = ask.size
        self._frames = JsonFrames(REPLY_BYTES, _WHAT)
        self._text = bytearray()

    def feed(self, data: bytes) -> bytes | None:
        """The reply, once `data` has completed it; b"": the connection has ended. RequestError; AttestedTlsError: too soon."""
        if self._size is None:
            return self._json(data)
        if len(self._text) + len(data) > REPLY_BYTES:
            raise _OutOfStepError(f"{_WHAT}: more than {REPLY_BYTES} bytes; expected at most that")
        # A blank there is padding behind the reply before.
        self._text += data if self._text or self._size < 0 else data.lstrip(_BLANKS)
        text = self._text
        if self._size < 0:
            return None if data else bytes(text)
        if len(text) >= self._size or (text and len(data) < CLIENT_READ and _failure_in(text) is not None):
            return bytes(text)
        if not data:
            raise _ended()
        return None

    def _json(self, data: bytes) -> bytes | None:
        if not data:
            raise _ended()
        self._frames.feed(data)
        reply = self._frames.take()
        if reply is not None and (self._frames.take() is not None or not self._frames.is_empty):
            raise _OutOfStepError(f"{_WHAT}: more than one; expected one")
        return reply


def _ended() -> AttestedTlsError:
    return AttestedTlsError("closed", "the broker has closed the connection; expected a reply")


def _failure_in(text: bytes | bytearray) -> str | None:
    """The error of a failure in base64; None: it is none. A resource that looks like one cannot be told from it."""
    try:
        document = json.loads(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError, RecursionError):
        return None
    if type(document) is dict and document.get("status") == "Fail" and type(document.get("error")) is str:
        return str(document["error"])
    return None


def _refuse(text: str) -> NoReturn:
    """Raises what a broker's error text means."""
    text = text[:500]
    if text == FRESH_REQUIRED:
        raise _StaleError(text)
    if (denied := _DENIED.match(text)) is not None:
        raise DeniedError(f"the broker says: {text}", denied[1] or "")
    if text.startswith(LIMITED):
        raise LimitedError(text, 1.0)
    if text.startswith(UNAVAILABLE):
        raise UnavailableError(text)
    raise RequestError(f"the broker refuses: {text}")


def _document(reply: bytes) -> dict[str, Any]:
    """A JSON reply that says OK. Raises what the others say."""
    document = loads(reply, _WHAT, limit=REPLY_BYTES)
    if type(document) is not dict:
        raise _OutOfStepError(f"{_WHAT}: expected an object")
    status = member(document, "status", str, _WHAT)
    if status != "OK":
        error = document.get("error")
        _refuse(error if type(error) is str else status)
    return document


def _secret(text: Any, what: str) -> Secret:
    try:
        return Secret(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError, TypeError):
        raise _OutOfStepError(f"{_WHAT}: {what} is no base64") from None


# ---- Commands


@dataclass(frozen=True, slots=True)
class Prover:
    """How fresh evidence is made.

    attester          asked for it; None: a broker that wants it is refused
    identity          of the connection
    custom, layout    as in its certificate
    """

    attester: Attester | None
    identity: Identity
    custom: Mapping[str, BytesLike] | None
    layout: Layout


class Steps:
    """Every command as steps. In: prover; peer   gives the connection's other end; request_bytes   of one request"""

    def __init__(self, prover: Prover, peer: Callable[[], Peer], request_bytes: int) -> None:
        if not 256 <= request_bytes <= REQUEST_BYTES:
            raise ArgumentError(f"request_bytes {request_bytes}: expected 256 .. {REQUEST_BYTES}")
        self._prover: Final = prover
        self._peer: Final = peer
        self._request_bytes: Final = request_bytes

    def version(self) -> Step[str]:
        """See VerdictdClient, here and below."""
        document = yield from self._json({"command": "version"})
        return str(member(document, "version", str, _WHAT))

    def echo(self, data: str) -> Step[str]:
        """Ends the connection."""
        reply: bytes = yield Ask(self._request({"command": "echo", "data": data}), -1)
        try:
            return reply.decode()
        except UnicodeDecodeError:
            raise _OutOfStepError(f"{_WHAT}: no UTF-8; expected an echo") from None

    def challenge(self) -> Step[float]:
        """Out: for how many seconds the answer counts."""
        prover = self._prover
        attester = prover.attester
        if attester is None:
            raise DeniedError(f"{FRESH_REQUIRED}, and there is no attester")
        challenge = yield from self._json(CHALLENGE)

        def answer() -> dict[str, Any]:
            return answer_challenge(
                challenge, self._peer(), prover.identity, attester, custom=prover.custom, layout=prover.layout
            )

        request: dict[str, Any] = yield Work(answer)
        # Only csvfast's door sends challenges, and it reads more than 4096 bytes.
        reply: bytes = yield Ask(self._request(request, REQUEST_BYTES))
        return float(member(_document(reply), "valid_for", int, _WHAT))

    def get_keks(self, kids: Iterable[str]) -> Step[dict[str, Secret]]:
        """Asked for in as many requests as needed."""
        wanted = list(dict.fromkeys(kids))
        for kid in wanted:
            for_kid(kid)
        found: dict[str, Secret] = {}
        for batch in self._batches("Get KEK", "kids", wanted, KID_LIMIT):
            found |= yield from self._data({"command": "Get KEK", "kids": batch}, batch)
        return found

    def decrypt(self, blobs: Sequence[Blob]) -> Step[list[Secret]]:
        """In the order of `blobs`."""
        for blob in blobs:
            check_blob(blob)
        wanted = list(dict.fromkeys(blobs))
        opened: dict[Blob, Secret] = {}
        documents = [blob._asdict() for blob in wanted]
        # The reply names a blob by its encrypted data: two that share it are asked for apart.
        for batch in self._batches("Decrypt", "blobs", documents, BLOB_LIMIT, lambda one: str(one["encrypted_data"])):
            names = [one["encrypted_data"] for one in batch]
            data = yield from self._data({"command": "Decrypt", "blobs": batch}, names)
            opened |= {Blob(**one): data[one["encrypted_data"]] for one in batch}
        return [opened[blob] for blob in blobs]

    def get_resource(self, path: str) -> Step[Secret]:
        """By path."""
        name = str(resource_path(path))
        return (yield from self._content({"command": "Get Resource", "optional": {"resource_path": name}}, name))

    def get_named(self, name: Literal["Policy", "Sigstore Config", "GPG Keyring", "Cosign Key", "Credential"]) -> Step[Secret]:
        """One of NAMED_RESOURCES."""
        if name not in NAMED_RESOURCES:
            raise ArgumentError(f"resource {name!r}: expected one of {', '.join(NAMED_RESOURCES)}")
        return (yield from self._content({"command": f"Get {name}", "optional": {}}, name))

    # ---- Parts of commands

    def _content(self, document: Mapping[str, Any], name: str) -> Step[Secret]:
        for left in reversed(range(TRIES)):
            try:
                return (yield from self._content_once(document, name))
            except _ResizedError:
                if not left:
                    raise
        raise AssertionError

    def _content_once(self, document: Mapping[str, Any], name: str) -> Step[Secret]:
        data = member((yield from self._json({"command": "Get Resource Info", "name": name})), "data", dict, _WHAT)
        text = member(data, "base64size", str, f"{_WHAT}: data")
        if not (text.isascii() and text.isdigit() and len(text) <= 9) or not 0 < (size := int(text)) <= REPLY_BYTES:
            raise _OutOfStepError(f"{_WHAT}: base64size; expected 1 .. {REPLY_BYTES}")
        reply: bytes = yield Ask(self._request(document), size)
        error = _failure_in(reply)
        if error is not None:
            _refuse(error)
        if len(reply) != size or size != base64_size(size // 4 * 3):
            raise _ResizedError(f"{_WHAT}: {len(reply)} characters; expected the {size} that were announced")
        if size % CLIENT_READ == 0:
            # Had it grown, its rest would be on its way; then this fails.
            yield from self.version()
        return _secret(reply, name)

    def _data(self, document: Mapping[str, Any], names: Sequence[str]) -> Step[dict[str, Secret]]:
        reply = yield from self._json(document)
        data = member(reply, "data", dict, _WHAT)
        if data.keys() != set(names):
            raise _OutOfStepError(f"{_WHAT}: data has {len(data)} members; expected the {len(names)} that were asked for")
        return {name: _secret(data[name], "a member of data") for name in names}

    def _json(self, document: Mapping[str, Any]) -> Step[dict[str, Any]]:
        request = self._request(document)
        try:
            return _document((yield Ask(request)))
        except _StaleError as error:
            if self._prover.attester is None:
                raise DeniedError(f"the broker says: {error}; there is no attester") from None
        yield from self.challenge()
        return _document((yield Ask(request)))

    def _request(self, document: Mapping[str, Any], limit: int = 0) -> bytes:
        request = json.dumps(document, separators=(",", ":")).encode()
        limit = limit or self._request_bytes
        if len(request) > limit:
            raise RequestError(f"request: {len(request)} bytes; expected at most {limit}, which is what the broker reads")
        return request

    def _batches(
        self, command: str, what: str, items: Sequence[_T], count: int, name: Callable[[_T], str] | None = None
    ) -> Iterator[list[_T]]:
        """Pieces of a list that fit into one request, in which no two have one name. What fits into none is left to fail."""
        head = len(self._request({"command": command, what: []}))
        batch: list[_T] = []
        names: set[str] = set()
        size = head
        for item in items:
            length = len(json.dumps(item, separators=(",", ":"))) + 1
            label = "" if name is None else name(item)
            if batch and (size + length > self._request_bytes or len(batch) >= count or label in names):
                yield batch
                batch, names, size = [], set(), head
            batch.append(item)
            if label:
                names.add(label)
            size += length
        if batch:
            yield batch
