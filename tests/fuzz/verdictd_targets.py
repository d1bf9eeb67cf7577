"""Fuzz targets of Verdictd's protocol: where its messages end, what they mean, and what its clients make of replies."""

from __future__ import annotations

import base64
import json
from collections.abc import Hashable

from csvfast.broker.clients.verdictd_steps import Ask, Replies, _document, _failure_in
from csvfast.broker.verdictd.protocol import (
    Decrypt,
    GetKek,
    GetResource,
    JsonFrames,
    base64_reply,
    check_blob,
    data_failure,
    failure,
    json_reply,
    read_request,
)
from csvfast.errors import AttestedTlsError, CsvfastError, RequestError
from fuzz.target import Target

__all__ = ["VerdictdReplyTarget", "VerdictdRequestTarget"]

_LIMIT = 4096


def _frames(pieces: list[bytes]) -> tuple[list[bytes], bool]:
    """The messages, and whether the stream was refused after them."""
    frames, found = JsonFrames(_LIMIT), []
    try:
        for piece in pieces:
            frames.feed(piece)
            while (message := frames.take()) is not None:
                found.append(message)
    except RequestError:
        return found, True
    return found, False


class VerdictdRequestTarget(Target):
    """Requests in a stream, read whole and in pieces."""

    text = True

    def __init__(self) -> None:
        super().__init__()
        blob = {"kid": "k", "encrypted_data": "A" * 28, "algorithm": "AES", "key_length": 256, "iv": "A" * 16}
        documents = [
            {"command": "version"},
            {"command": "echo", "data": 'a "quoted" \\ text }'},
            {"command": "Get KEK", "kids": ["1", "default/key/2", "kbs:///a/b/c"]},
            {"command": "Decrypt", "blobs": [blob, blob | {"kid": "a/b/c", "algorithm": "A256GCM"}]},
            {"command": "Get Policy", "optional": {}},
            {"command": "Get Resource", "optional": {"resource_path": "a/b/c"}},
            {"command": "Get Resource Info", "name": "GPG Keyring"},
            {"command": "Challenge"},
            {"command": "Attest", "evidence": "AAAA"},
        ]
        self.seeds = [json.dumps(document).encode() for document in documents]
        self.seeds += [b" \r\n".join(self.seeds[:3]), self.seeds[1] + self.seeds[0]]

    def handle(self, data: bytes) -> Hashable:
        found, refused = _frames([data])
        step = 1 + len(data) % 7
        assert _frames([data[at : at + step] for at in range(0, len(data), step)]) == (found, refused)
        rest = data
        for message in found:
            rest = rest.lstrip(b" \t\r\n")
            assert rest.startswith(message)
            rest = rest[len(message) :]
        answers: list[Hashable] = [refused]
        for message in found:
            answers.append(self._answer(message))
        return tuple(answers)

    def _answer(self, message: bytes) -> Hashable:
        try:
            text = message.decode()
            end = json.JSONDecoder().raw_decode(text)[1]
        except (ValueError, RecursionError):
            end = -1
        else:
            assert end == len(text), "the message does not end where its JSON does"
        try:
            request = read_request(message, limit=_LIMIT)
        except RequestError:
            return "refused"
        assert end != -1
        kind = type(request).__name__
        if isinstance(request, Decrypt):
            return kind, tuple(self._blob(blob) for blob in request.blobs)
        if isinstance(request, GetKek):
            return kind, len(request.kids)
        return kind, isinstance(request, GetResource) and request.path.startswith("verdictd/")

    @staticmethod
    def _blob(blob: object) -> Hashable:
        try:
            checked = check_blob(blob)  # type: ignore[arg-type]
        except RequestError as error:
            return str(error)[:20]
        assert len(checked.nonce) == 12
        assert len(checked.ciphertext) > 16
        return "blob"


class VerdictdReplyTarget(Target):
    """Replies of a broker that may be anybody; the first byte says which kind of reply is expected."""

    text = True

    def __init__(self) -> None:
        super().__init__()
        replies = [
            json_reply({"status": "OK", "version": "v1"}),
            json_reply({"status": "OK", "data": {"k": "AAAA"}, "error": None}),
            json_reply(data_failure("not allowed (0123456789abcdef)")),
            json_reply(data_failure("fresh attestation required")),
            json_reply(data_failure("too many requests (0123456789abcdef)")),
            base64_reply(json_reply(failure("not allowed (0123456789abcdef)"))),
            base64_reply(b"content of a file"),
        ]
        self.seeds = [kind + reply for kind in (b"j", b"b", b"e") for reply in replies]

    def handle(self, data: bytes) -> Hashable:
        kind, data = data[:1], data[1:]
        size = None if kind == b"j" else -1 if kind == b"e" else 24
        replies = Replies(Ask(b"", size))
        reply = None
        step = 1 + len(data) // 3
        try:
            for piece in [data[at : at + step] for at in range(0, len(data), step)] + [b""]:
                reply = replies.feed(piece)
                if reply is not None:
                    break
        except AttestedTlsError:
            return kind, "ended"
        assert reply is not None
        if size is None:
            try:
                return kind, tuple(sorted(_document(reply)))[:2]
            except CsvfastError as error:
                return kind, type(error).__name__
        if size == -1:
            assert reply == data
            return kind, "echo"
        error = _failure_in(reply)
        assert error is not None or len(reply) >= 24
        if error is not None:
            assert json.loads(base64.b64decode(reply))["status"] == "Fail"
        return kind, len(reply) == 24, error is None
