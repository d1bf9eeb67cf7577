"""Blobs that a registry is being sent: files without a name, which a kill or a client that never comes back leaves nothing of.

Thread-safety: begin, size, cancel and using from one event loop; write and finish of one upload from one thread at a time.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from csvfast.image.descriptor import new_hash
from csvfast.image.new_file import NewFile

if TYPE_CHECKING:
    from csvfast.image.layout import OciLayout

__all__ = ["UPLOAD_LIMIT", "Upload", "UploadError", "Uploads"]

UPLOAD_LIMIT: Final = 64
"""Uploads at a time."""
IDLE_SECONDS: Final = 600.0
"""After which an upload makes room for another."""

_CHUNK: Final = 1 << 20


class UploadError(Exception):
    """What the client is told. Attributes: code: of the distribution API."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Upload:
    """One upload."""

    def __init__(self, file: NewFile) -> None:
        self.file: Final = file
        self.size = 0
        self.busy = False
        self.used = time.monotonic()
        self._hash = hashlib.sha256()

    def write(self, data: bytearray) -> None:
        """More of it. OSError: no room; the upload is then of no use any more."""
        self.file.write(memoryview(data))
        self._hash.update(data)
        self.size += len(data)

    def matches(self, digest: str) -> bool:
        """Whether it is the blob of that digest."""
        algorithm, _, expected = digest.partition(":")
        if algorithm == "sha256":
            return self._hash.hexdigest() == expected
        check, at = new_hash(digest), 0
        while piece := self.file.read(_CHUNK, at):
            check.update(piece)
            at += len(piece)
        return check.hexdigest() == expected


class Uploads:
    """Those of a registry. In: layout   where they become blobs."""

    def __init__(self, layout: OciLayout) -> None:
        self._layout = layout
        self._uploads: dict[str, Upload] = {}

    def begin(self) -> str:
        """A new one's identifier. UploadError: too many. OSError."""
        now = time.monotonic()
        for identifier, one in list(self._uploads.items()):
            if not one.busy and now - one.used > IDLE_SECONDS:
                self.cancel(identifier)
        if len(self._uploads) >= UPLOAD_LIMIT:
            raise UploadError("TOOMANYREQUESTS", f"{UPLOAD_LIMIT} uploads are going on")
        directory = self._layout.path / "blobs" / "sha256"
        directory.mkdir(parents=True, exist_ok=True)
        identifier = secrets.token_hex(16)
        self._uploads[identifier] = Upload(NewFile(directory))
        return identifier

    def size(self, identifier: str) -> int:
        """Bytes that are here. UploadError: no such upload."""
        return self._find(identifier).size

    @contextmanager
    def using(self, identifier: str) -> Iterator[Upload]:
        """The upload, for one request at a time. OSError inside ends it. UploadError: no such upload, or in use."""
        upload = self._find(identifier)
        if upload.busy:
            raise UploadError("BLOB_UPLOAD_INVALID", "another request is writing to this upload")
        upload.busy = True
        try:
            yield upload
        except OSError:
            self._forget(identifier)
            raise
        finally:
            upload.busy = False
            upload.used = time.monotonic()

    def finish(self, identifier: str, digest: str) -> None:
        """Makes it the blob of that digest. UploadError: it has another one; it is gone then. OSError."""
        with self.using(identifier) as upload:
            try:
                if not upload.matches(digest):
                    raise UploadError("DIGEST_INVALID", "the bytes have another digest")
                place = self._layout.blob_path(digest)
                place.parent.mkdir(exist_ok=True)
                upload.file.publish(place)
            finally:
                self._forget(identifier)

    def cancel(self, identifier: str) -> None:
        """Forgets it. UploadError: no such upload, or in use."""
        if self._find(identifier).busy:
            raise UploadError("BLOB_UPLOAD_INVALID", "a request is writing to this upload")
        self._forget(identifier)

    def close(self) -> None:
        """Forgets all."""
        for identifier in list(self._uploads):
            self._forget(identifier)

    def _find(self, identifier: str) -> Upload:
        upload = self._uploads.get(identifier)
        if upload is None:
            raise UploadError("BLOB_UPLOAD_UNKNOWN", "upload unknown")
        return upload

    def _forget(self, identifier: str) -> None:
        upload = self._uploads.pop(identifier, None)
        if upload is not None:
            upload.file.close()
