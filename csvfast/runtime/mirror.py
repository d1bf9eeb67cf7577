"""A registry on loopback that has one image and takes none: where an agent fetches what the cache has.

It serves the manifest and the blobs that the manifest names, nothing else; ranges, so that a cut download goes on. It needs
nothing but Python: csvfast.image.server is the whole registry.

Source: opencontainers/distribution-spec spec.md, "Pulling".
Thread-safety: a thread for each connection; close() from any.
"""

from __future__ import annotations

import re
import socket
import threading
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Final, Self

from csvfast.errors import ImageError

if TYPE_CHECKING:
    from types import TracebackType

    from csvfast.image.descriptor import Descriptor
    from csvfast.image.layout import OciLayout
    from csvfast.image.manifest import Manifest

__all__ = ["MirrorServer"]

CHUNK: Final = 1 << 20
IDLE_SECONDS: Final = 60.0
_RANGE: Final = re.compile(r"bytes=(\d{1,18})-(\d{1,18})?\Z")


class MirrorServer:
    """Serves one image of a layout. Out: host and port are in `address`.

    In: name   of the repository. descriptor, data, manifest: of the image
    Raises: OSError. A context manager.
    """

    def __init__(self, layout: OciLayout, name: str, descriptor: Descriptor, data: bytes, manifest: Manifest) -> None:
        blobs = {one.digest: one for one in (manifest.config, *manifest.layers)}
        handler = type("Handler", (_Handler,), {
            "layout": layout, "prefix": f"/v2/{name}/", "manifest": (descriptor, data), "blobs": blobs, "timeout": IDLE_SECONDS,
        })  # fmt: skip
        self._server = _Server(("127.0.0.1", 0), handler)
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="csvfast-mirror", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends it and its connections. Idempotent."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join(10)
            self._server.end_connections()
            self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._open: set[socket.socket] = set()
        self._guard = threading.Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._guard:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._guard:
            self._open.discard(request)
        super().shutdown_request(request)

    def end_connections(self) -> None:
        with self._guard:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    layout: OciLayout
    prefix: str
    manifest: tuple[Descriptor, bytes]
    blobs: dict[str, Descriptor]
    protocol_version = "HTTP/1.1"
    server_version = "csvfast"
    sys_version = ""
    # Head and body are two writes: with Nagle's algorithm the second waits for the first one's acknowledgement, 40 ms and more.
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._serve(True)

    def do_HEAD(self) -> None:
        self._serve(False)

    def log_message(self, *_arguments: Any) -> None:
        pass

    def _serve(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path in ("/v2", "/v2/"):
            self._small(HTTPStatus.OK, b"{}", "application/json", body)
            return
        kind, _, wanted = path.removeprefix(self.prefix).partition("/") if path.startswith(self.prefix) else ("", "", "")
        descriptor, data = self.manifest
        # Whatever tag is asked for: there is one image, and who asks verifies what it gets.
        if kind == "manifests" and (wanted == descriptor.digest or (wanted and ":" not in wanted and "/" not in wanted)):
            self._small(HTTPStatus.OK, data, descriptor.media_type, body, {"Docker-Content-Digest": descriptor.digest})
        elif kind == "blobs" and wanted in self.blobs:
            self._blob(self.blobs[wanted], body)
        else:
            code = "BLOB_UNKNOWN" if kind == "blobs" else "MANIFEST_UNKNOWN" if kind == "manifests" else "NAME_UNKNOWN"
            error = f'{{"errors":[{{"code":"{code}","message":"this mirror has one image"}}]}}'.encode()
            self._small(HTTPStatus.NOT_FOUND, error, "application/json", body)

    def _small(self, status: HTTPStatus, data: bytes, kind: str, body: bool, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _blob(self, descriptor: Descriptor, body: bool) -> None:
        found = _RANGE.match(self.headers.get("Range", ""))
        begin = int(found[1]) if found else 0
        end = min(int(found[2]) + 1, descriptor.size) if found and found[2] else descriptor.size
        if found and not begin < end:
            self._small(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, b"", "application/octet-stream", body)
            return
        try:
            blob = self.layout.open_blob(descriptor, begin)
        except (ImageError, OSError):
            self._small(HTTPStatus.NOT_FOUND, b'{"errors":[{"code":"BLOB_UNKNOWN"}]}', "application/json", body)
            return
        with blob:
            self.send_response(HTTPStatus.PARTIAL_CONTENT if found else HTTPStatus.OK)
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Length", str(end - begin))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Docker-Content-Digest", descriptor.digest)
            if found:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{descriptor.size}")
            self.end_headers()
            self.wfile.flush()
            if body:
                try:
                    sent = self.connection.sendfile(blob, begin, end - begin)
                except ValueError:
                    sent = 0
                if sent != end - begin:  # the file became shorter: the connection's end tells
                    self.close_connection = True
