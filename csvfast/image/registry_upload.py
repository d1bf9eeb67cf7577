"""Writing a blob to a registry: POST, PATCH by pieces, PUT. Memory: one piece.

Source: opencontainers/distribution-spec spec.md, "Pushing a blob in chunks".
Thread-safety: an upload belongs to one thread.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from csvfast.errors import IntegrityError, RegistryError
from csvfast.image.blobs import chunk_hash
from csvfast.image.descriptor import Descriptor

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from csvfast.image.registry import RegistryClient
    from csvfast.image.registry_http import Answer, Url

__all__ = ["PIECE_BYTES", "upload"]

PIECE_BYTES: Final = 8 << 20
_RANGE: Final = re.compile(r"(?:bytes=)?0-(\d{1,18})\Z", re.ASCII)


def upload(client: RegistryClient, descriptor: Descriptor | None, chunks: Iterable[Buffer]) -> Descriptor:
    """See BlobTarget.put_blob. RegistryError."""
    subject = "blob" if descriptor is None else f"blob {descriptor.digest}"
    algorithm = "sha256" if descriptor is None else descriptor.digest.partition(":")[0]
    check, size = chunk_hash(chunks, f"{algorithm}:"), 0
    going = _Upload(client, subject)
    try:
        piece = bytearray()
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            size += len(view)
            if descriptor is not None and size > descriptor.size:
                raise IntegrityError(subject, f"more than {descriptor.size} bytes; expected exactly these")
            check.update(view)
            while view:
                room = PIECE_BYTES - len(piece)
                piece += view[:room]
                view = view[room:]
                if len(piece) == PIECE_BYTES:
                    going.send(piece)
                    piece = bytearray()
        digest = f"{algorithm}:{check.hexdigest()}"
        if descriptor is None:
            descriptor = Descriptor("application/octet-stream", digest, size)
        if size != descriptor.size:
            raise IntegrityError(subject, f"{size} bytes; expected {descriptor.size}")
        if digest != descriptor.digest:
            raise IntegrityError(subject, f"the bytes have the digest {digest}")
        if piece:
            going.send(piece)
        going.finish(descriptor)
    except BaseException:
        going.cancel()
        raise
    return descriptor


class _Upload:
    """A session that the registry keeps."""

    def __init__(self, client: RegistryClient, subject: str) -> None:
        self._client = client
        self._subject = subject
        self._sent = 0
        with client.request("POST", client.path("blobs/uploads/"), client.push, body=b"") as answer:
            if answer.status != 202:
                raise client.error(answer, f"upload of {subject}")
            self._url: Url = self._location(answer)

    def send(self, piece: bytearray) -> None:
        """The next piece, as often as it takes."""
        client, done, attempt = self._client, 0, 0
        while done < len(piece):
            view = memoryview(piece)[done:]
            headers = {
                "Content-Type": "application/octet-stream",
                "Content-Length": str(len(view)),
                "Content-Range": f"{self._sent + done}-{self._sent + len(piece) - 1}",
            }
            try:
                with client.request("PATCH", self._url, client.push, headers, view, repeatable=False) as answer:
                    if answer.status in (202, 204):
                        self._url = self._location(answer)
                        arrived = self._arrived(answer, self._sent + len(piece))
                    elif answer.status in (408, 416, 429, 500, 502, 503, 504):
                        raise RegistryError(client.subject, f"upload of {self._subject}: status {answer.status}", status=0)
                    else:
                        raise client.error(answer, f"upload of {self._subject}")
            except RegistryError as error:
                if error.status:
                    raise
                client.pause(attempt, error)
                arrived = self._ask()
            attempt += 1
            if not self._sent + done <= arrived <= self._sent + len(piece):
                expected = f"{self._sent + done} to {self._sent + len(piece)}"
                raise RegistryError(client.subject, f"upload of {self._subject}: {arrived} bytes are there; expected {expected}")
            if arrived == self._sent + done and attempt > client.retries:
                raise RegistryError(client.subject, f"upload of {self._subject}: the registry takes no bytes")
            done = arrived - self._sent
        self._sent += len(piece)

    def finish(self, descriptor: Descriptor) -> None:
        """Names the digest, and the upload becomes a blob."""
        client = self._client
        url = self._url.with_query(f"digest={quote(descriptor.digest, safe='')}")
        headers = {"Content-Length": "0", "Content-Type": "application/octet-stream"}
        try:
            with client.request("PUT", url, client.push, headers, b"", repeatable=False) as answer:
                if answer.status != 201:
                    raise client.error(answer, f"upload of {self._subject}")
        except RegistryError as error:
            # No answer: it may have been done all the same.
            if error.status or not client.has_blob(descriptor):
                raise

    def cancel(self) -> None:
        """The registry may forget it; if it does not hear that, it does so later."""
        with suppress(RegistryError, OSError):
            self._client.request("DELETE", self._url, self._client.push, repeatable=False).close()

    def _ask(self) -> int:
        """How many bytes are there."""
        client = self._client
        with client.request("GET", self._url, client.push) as answer:
            if answer.status not in (202, 204):
                raise client.error(answer, f"upload of {self._subject}")
            self._url = self._location(answer)
            return self._arrived(answer, 0)

    def _arrived(self, answer: Answer, otherwise: int) -> int:
        text = answer.header("Range")
        if text is None:
            return otherwise
        found = _RANGE.match(text)
        if found is None:
            problem = f"upload of {self._subject}: range {ascii(text)[:40]}; expected 0-N"
            raise RegistryError(self._client.subject, problem, status=202)
        # Nothing and one byte are both 0-0; whole pieces are sent, so that it is nothing.
        return 0 if found[1] == "0" and otherwise != 1 else int(found[1]) + 1

    def _location(self, answer: Answer) -> Url:
        location = answer.header("Location")
        if location is None:
            if hasattr(self, "_url"):
                return self._url
            raise RegistryError(self._client.subject, f"upload of {self._subject}: no Location", status=answer.status)
        url = answer.url.join(location, self._client.subject)
        if answer.url.scheme == "https" and url.scheme == "http":
            raise RegistryError(self._client.subject, f"the registry leads from https to http ({url.host}); that is not followed")
        return url
