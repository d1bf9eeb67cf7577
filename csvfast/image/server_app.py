"""The registry's ASGI application: what each request of the distribution API does to a layout.

    GET /v2/                                     whether it is a registry, and lets the caller in
    GET, HEAD /v2/NAME/manifests/TAG|DIGEST      PUT, DELETE, too
    GET, HEAD /v2/NAME/blobs/DIGEST              with Range
    POST /v2/NAME/blobs/uploads/                 ?digest= (all at once), ?mount= (it is here already)
    PATCH, PUT, GET, DELETE /v2/NAME/blobs/uploads/ID
    GET /v2/NAME/tags/list, /v2/_catalog         with n and last

Source: opencontainers/distribution-spec spec.md; distribution/distribution docs/content/spec/api.md (_catalog, codes).
Thread-safety: one event loop; files are read and written in its worker threads.
"""

from __future__ import annotations

import base64
import binascii
import errno
import hmac
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from csvfast.errors import ImageError
from csvfast.image.descriptor import Descriptor, is_digest, is_index, is_manifest, new_hash
from csvfast.image.layout import TAG_ANNOTATION, UNKNOWN_TYPE, OciLayout
from csvfast.image.manifest import MANIFEST_LIMIT, Index, Manifest
from csvfast.image.reference import is_repository, is_tag
from csvfast.image.server_uploads import UploadError, Uploads

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from csvfast.crypto import Secret

__all__ = ["NAMELESS", "RegistryApplication"]

NAMELESS: Final = "image"
"""The repository of tags that have no name before them."""

_log: Final = logging.getLogger(__name__)
_CHUNK: Final = 1 << 20
_PAGE: Final = 1000
_PATH: Final = re.compile(r"/v2/(.+)/(manifests|blobs|tags)/(?:(uploads)/)?([^/]*)\Z", re.DOTALL)
_RANGE: Final = re.compile(r"bytes=(\d{1,18})-(\d{1,18})?\Z", re.ASCII)
_CONTENT_RANGE: Final = re.compile(r"(?:bytes )?(\d{1,18})-(\d{1,18})(?:/.*)?\Z", re.ASCII)
_STATUS: Final = {
    "BLOB_UNKNOWN": 404, "BLOB_UPLOAD_INVALID": 400, "BLOB_UPLOAD_UNKNOWN": 404, "DENIED": 403, "DIGEST_INVALID": 400,
    "MANIFEST_BLOB_UNKNOWN": 404, "MANIFEST_INVALID": 400, "MANIFEST_UNKNOWN": 404, "NAME_INVALID": 400, "NAME_UNKNOWN": 404,
    "SIZE_INVALID": 413, "TOOMANYREQUESTS": 429, "UNAUTHORIZED": 401, "UNSUPPORTED": 405,
}  # fmt: skip


class _Refused(Exception):  # noqa: N818 - an answer, and no error of this process
    def __init__(self, code: str, message: str, status: int | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.code, self.status, self.headers = code, status or _STATUS[code], headers


class RegistryApplication:
    """ASGI. In: layout, read_only, token   see EmbeddedRegistry."""

    def __init__(self, layout: OciLayout, *, read_only: bool, token: Secret | None) -> None:
        self._layout = layout
        self._read_only = read_only
        self._token = token
        self._uploads = Uploads(layout)

    def close(self) -> None:
        """Forgets unfinished uploads."""
        self._uploads.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        try:
            response = await self._answer(request)
        except _Refused as error:
            response = _error(error)
        except ClientDisconnect:
            return
        except ImageError:
            _log.exception("the layout is damaged")
            response = _error(_Refused("UNKNOWN", "the layout is damaged", 500))
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            response = _error(_Refused("UNKNOWN", "no room" if full else "storage cannot be used", 507 if full else 500))
        response.headers["Docker-Distribution-Api-Version"] = "registry/2.0"
        await response(scope, receive, send)

    # ---- Which request it is

    async def _answer(self, request: Request) -> Response:
        self._check_token(request.headers.get("authorization", ""))
        method, path = request.method, request.scope["path"]
        if method not in ("GET", "HEAD") and self._read_only:
            raise _Refused("UNSUPPORTED", "this registry is read-only")
        if path in ("/v2", "/v2/") and method in ("GET", "HEAD"):
            return JSONResponse({})
        if path == "/v2/_catalog" and method == "GET":
            names = await run_in_threadpool(lambda: sorted({name for name, _, _ in self._entries()}))
            return self._page(request, "repositories", names, {})
        found = _PATH.match(path)
        if found is None:
            raise _Refused("UNSUPPORTED", "no such resource", 404)
        name, kind, uploads, rest = found.groups()
        if not is_repository(name):
            raise _Refused("NAME_INVALID", "no such name")
        handler: Callable[..., Any] | None
        if kind == "tags" and rest == "list" and not uploads:
            handler = {"GET": self._tags}.get(method)
        elif kind == "manifests" and not uploads:
            handler = {
                "GET": self._manifest, "HEAD": self._manifest, "PUT": self._put_manifest, "DELETE": self._delete_manifest,
            }.get(method)  # fmt: skip
        elif kind == "blobs" and uploads:
            begin, go_on = {"POST": self._begin}, {
                "PATCH": self._patch, "PUT": self._finish, "GET": self._progress, "DELETE": self._cancel,
            }  # fmt: skip
            handler = (go_on if rest else begin).get(method)
        elif kind == "blobs" and rest:
            handler = {"GET": self._blob, "HEAD": self._blob}.get(method)
        else:
            raise _Refused("UNSUPPORTED", "no such resource", 404)
        if handler is None:
            raise _Refused("UNSUPPORTED", f"no {method} here")
        response: Response = await handler(request, name, rest)
        return response

    def _check_token(self, given: str) -> None:
        if self._token is None:
            return
        scheme, _, text = given.partition(" ")
        shown = b""
        if scheme.lower() == "bearer":
            shown = text.strip().encode()
        elif scheme.lower() == "basic":
            try:
                shown = base64.b64decode(text.strip(), validate=True).partition(b":")[2]
            except (binascii.Error, ValueError):
                shown = b""
        if not hmac.compare_digest(shown, bytes(memoryview(self._token))):
            raise _Refused("UNAUTHORIZED", "a token is needed", headers={"WWW-Authenticate": 'Basic realm="csvfast"'})

    # ---- Manifests and tags

    def _entries(self) -> list[tuple[str, str, Descriptor]]:
        """(name, tag, descriptor) of whatever has a tag."""
        found = []
        for one in self._layout.index().manifests:
            if (full := one.annotations.get(TAG_ANNOTATION)) is not None:
                name, colon, tag = full.rpartition(":")
                found.append((name, tag, one) if colon else (NAMELESS, full, one))
        return found

    def _full_tag(self, name: str, tag: str) -> str:
        """How the layout calls it."""
        if name == NAMELESS and tag in self._layout.tags():
            return tag
        return f"{name}:{tag}"

    def _find(self, name: str, wanted: str) -> tuple[Descriptor, bytes]:
        try:
            return self._layout.resolve(wanted if is_digest(wanted) else self._full_tag(name, wanted))
        except ImageError:
            raise _Refused("MANIFEST_UNKNOWN", "manifest unknown") from None

    async def _manifest(self, _request: Request, name: str, wanted: str) -> Response:
        _check_wanted(wanted)
        descriptor, data = await run_in_threadpool(self._find, name, wanted)
        headers = {"Docker-Content-Digest": descriptor.digest}
        return Response(data, 200, headers, media_type=descriptor.media_type)

    async def _put_manifest(self, request: Request, name: str, wanted: str) -> Response:
        _check_wanted(wanted)
        data = await _small_body(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        made = await run_in_threadpool(self._store_manifest, name, wanted, kind, data)
        location = f"/v2/{name}/manifests/{made.digest}"
        return Response(status_code=201, headers={"Location": location, "Docker-Content-Digest": made.digest})

    def _store_manifest(self, name: str, wanted: str, kind: str, data: bytes) -> Descriptor:
        try:
            if is_index(kind):
                needed = Index.parse(data, kind).manifests
            elif is_manifest(kind):
                manifest = Manifest.parse(data, kind)
                # Layers with addresses of their own need not be here.
                needed = (manifest.config, *(one for one in manifest.layers if not one.other.get("urls")))
            else:
                raise _Refused("MANIFEST_INVALID", "Content-Type is no manifest's and no index's")
        except ImageError as error:
            raise _Refused("MANIFEST_INVALID", str(error)) from None
        for one in needed:
            if not self._layout.has_blob(one):
                raise _Refused("MANIFEST_BLOB_UNKNOWN", f"{one.digest} of {one.size} bytes is not here")
        if is_digest(wanted):
            check = new_hash(wanted)
            check.update(data)
            if check.hexdigest() != wanted.partition(":")[2]:
                raise _Refused("DIGEST_INVALID", "the bytes have another digest")
            made = Descriptor(kind, wanted, len(data))
            # By its digest it is found without standing in the index.
            return self._layout.put_blob(made, [data])
        try:
            return self._layout.put_manifest(data, kind, self._full_tag(name, wanted))
        except ImageError as error:
            raise _Refused("DENIED", error.problem) from None

    async def _delete_manifest(self, _request: Request, name: str, wanted: str) -> Response:
        _check_wanted(wanted)
        if not await run_in_threadpool(self._untag, name, wanted):
            raise _Refused("MANIFEST_UNKNOWN", "manifest unknown")
        return Response(status_code=202)

    def _untag(self, name: str, wanted: str) -> bool:
        tags = [tag for one, tag, found in self._entries() if one == name and wanted in (tag, found.digest)]
        return sum(self._layout.remove_tag(self._full_tag(name, tag)) for tag in tags) > 0

    async def _tags(self, request: Request, name: str, _rest: str) -> Response:
        tags = await run_in_threadpool(lambda: sorted(tag for one, tag, _ in self._entries() if one == name))
        if not tags:
            raise _Refused("NAME_UNKNOWN", "repository unknown")
        return self._page(request, "tags", tags, {"name": name})

    def _page(self, request: Request, member: str, names: list[str], more: dict[str, Any]) -> Response:
        text = request.query_params.get("n", str(_PAGE))
        count = min(int(text), _PAGE) if re.fullmatch("[0-9]{1,9}", text) else _PAGE
        last = request.query_params.get("last", "")
        rest = [one for one in names if one > last]
        headers = {}
        if count and len(rest) > count:
            headers["Link"] = f'<{request.url.path}?n={count}&last={quote(rest[count - 1], safe="")}>; rel="next"'
        return JSONResponse({**more, member: rest[:count]}, headers=headers)

    # ---- Blobs

    async def _blob(self, request: Request, _name: str, digest: str) -> Response:
        _check_digest(digest)
        try:
            size = (await run_in_threadpool(self._layout.blob_path(digest).stat)).st_size
        except (FileNotFoundError, NotADirectoryError):
            raise _Refused("BLOB_UNKNOWN", "blob unknown") from None
        first, last, status = 0, size - 1, 200
        headers = {"Docker-Content-Digest": digest, "Accept-Ranges": "bytes", "Content-Length": str(size)}
        wanted = _RANGE.match(request.headers.get("range", ""))
        if wanted is not None:
            first, last, status = int(wanted[1]), min(int(wanted[2] or last), last), 206
            if first > last:
                headers = {"Content-Range": f"bytes */{size}"}
                raise _Refused("SIZE_INVALID", "no such range", 416, headers)
            headers |= {"Content-Range": f"bytes {first}-{last}/{size}", "Content-Length": str(last - first + 1)}
        if request.method == "HEAD":
            return Response(status_code=status, headers=headers, media_type=UNKNOWN_TYPE)

        async def body() -> AsyncIterator[bytes]:
            # A file that somebody shortens leaves the answer incomplete, and the client sees that.
            with self._layout.open_blob(Descriptor(UNKNOWN_TYPE, digest, size), first) as file:
                left = last - first + 1
                while left and (piece := await run_in_threadpool(file.read, min(left, _CHUNK))):
                    left -= len(piece)
                    yield piece

        return StreamingResponse(body(), status, headers, UNKNOWN_TYPE)

    # ---- Uploads

    async def _begin(self, request: Request, name: str, _rest: str) -> Response:
        query = request.query_params
        mounted = query.get("mount", "")
        if is_digest(mounted) and await run_in_threadpool(lambda: self._layout.blob_path(mounted).is_file()):
            return _created(name, mounted)
        if "digest" in query:
            _check_digest(query["digest"])
        with _uploading():
            identifier = self._uploads.begin()
        if "digest" not in query:
            return _accepted(202, name, identifier, 0)
        try:
            return await self._finish(request, name, identifier)
        except BaseException:
            with suppress(UploadError):  # nobody knows it, so that nobody could go on with it or cancel it
                self._uploads.cancel(identifier)
            raise

    async def _patch(self, request: Request, name: str, identifier: str) -> Response:
        with _uploading():
            size = self._uploads.size(identifier)
        wanted = _CONTENT_RANGE.match(request.headers.get("content-range", ""))
        if wanted is not None and int(wanted[1]) != size:
            refused = _accepted(416, name, identifier, size)
            raise _Refused("BLOB_UPLOAD_INVALID", f"{size} bytes are here; expected the next", 416, dict(refused.headers))
        return _accepted(202, name, identifier, await self._append(request, identifier))

    async def _append(self, request: Request, identifier: str) -> int:
        """The request's body to the upload's end; how long it is then. What arrived of a body that is cut off stays."""
        with _uploading(), self._uploads.using(identifier) as upload:
            waiting = bytearray()
            try:
                async for chunk in request.stream():
                    waiting += chunk
                    if len(waiting) >= _CHUNK:
                        full, waiting = waiting, bytearray()
                        await run_in_threadpool(upload.write, full)
            finally:
                if waiting:
                    await run_in_threadpool(upload.write, waiting)
            return upload.size

    async def _finish(self, request: Request, name: str, identifier: str) -> Response:
        digest = request.query_params.get("digest", "")
        _check_digest(digest)
        await self._append(request, identifier)
        with _uploading():
            await run_in_threadpool(self._uploads.finish, identifier, digest)
        return _created(name, digest)

    async def _progress(self, _request: Request, name: str, identifier: str) -> Response:
        with _uploading():
            return _accepted(204, name, identifier, self._uploads.size(identifier))

    async def _cancel(self, _request: Request, _name: str, identifier: str) -> Response:
        with _uploading():
            self._uploads.cancel(identifier)
        return Response(status_code=204)


class _uploading:  # noqa: N801 - a context manager
    """Upload errors as answers."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, UploadError):
            raise _Refused(error.code, str(error)) from None


def _check_digest(digest: str) -> None:
    if not is_digest(digest):
        raise _Refused("DIGEST_INVALID", "no digest; expected sha256: and 64 hexadecimal digits")


def _check_wanted(wanted: str) -> None:
    if not (is_digest(wanted) or is_tag(wanted)):
        raise _Refused("MANIFEST_INVALID", "neither a tag nor a digest")


async def _small_body(request: Request) -> bytes:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MANIFEST_LIMIT:
            raise _Refused("SIZE_INVALID", f"more than {MANIFEST_LIMIT} bytes")
    return bytes(data)


def _accepted(status: int, name: str, identifier: str, size: int) -> Response:
    location = f"/v2/{name}/blobs/uploads/{identifier}"
    headers = {"Location": location, "Docker-Upload-UUID": identifier, "Range": f"0-{max(size - 1, 0)}", "Content-Length": "0"}
    return Response(status_code=status, headers=headers)


def _created(name: str, digest: str) -> Response:
    return Response(status_code=201, headers={"Location": f"/v2/{name}/blobs/{digest}", "Docker-Content-Digest": digest})


def _error(error: _Refused) -> Response:
    headers = {name: value for name, value in (error.headers or {}).items() if name.lower() != "content-length"}
    return JSONResponse({"errors": [{"code": error.code, "message": str(error), "detail": None}]}, error.status, headers)
