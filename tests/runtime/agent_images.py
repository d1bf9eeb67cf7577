"""Images for the agent's tests: busybox in two layers, encrypted or not, behind a small registry of the standard library."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from csvfast.crypto import Secret
from csvfast.image.encrypt import encrypt_image
from csvfast.image.keys import Recipient
from csvfast.image.layout import OciLayout
from csvfast.image.manifest import host_architecture
from csvfast.image.wrappers import LocalKek

KEK = b"a key of thirty-two bytes, wraps"
SECRET_LINE = "the plaintext that nobody but the guest may read\n"
APPLETS = (
    "sh", "cat", "echo", "env", "id", "ls", "ps", "sleep", "hostname", "mount", "true", "false", "kill", "head", "ip", "grep",
    "dd", "touch", "wc", "readlink", "unshare",
)  # fmt: skip


def _tar(files: Sequence[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, data in files:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _entry(
    name: str, mode: int, data: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.mode, info.type, info.linkname = mode, kind, target
    return info, data


def make_image(layout: OciLayout, busybox: Path, tag: str, **config: Any) -> None:
    """An image with busybox; `config` replaces members of the image's own."""
    first = [_entry(name, 0o755, kind=tarfile.DIRTYPE) for name in ("bin", "etc", "root", "work")]
    first += [_entry("tmp", 0o1777, kind=tarfile.DIRTYPE), _entry("bin/busybox", 0o755, busybox.read_bytes())]
    first += [_entry(f"bin/{name}", 0o777, kind=tarfile.SYMTYPE, target="busybox") for name in APPLETS]
    first += [_entry("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/work:/bin/sh\n")]
    first += [_entry("etc/group", 0o644, b"root:x:0:\nuser:x:1000:\nmore:x:2000:user\n")]
    second = [_entry("etc/secret", 0o644, SECRET_LINE.encode())]
    layers, diff_ids = [], []
    for files in (first, second):
        archive = _tar(files)
        packed = gzip.compress(archive, 1, mtime=0)
        diff_ids.append("sha256:" + hashlib.sha256(archive).hexdigest())
        layers.append(layout.put_blob(None, [packed]).replace(media_type="application/vnd.oci.image.layer.v1.tar+gzip"))
    document = {
        "architecture": host_architecture(), "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "config": {"Cmd": ["/bin/cat", "/etc/secret"], "Env": ["PATH=/bin", "FROM=image"], "WorkingDir": "/work"} | config,
    }  # fmt: skip
    blob = layout.put_blob(None, [json.dumps(document).encode()]).replace(media_type="application/vnd.oci.image.config.v1+json")
    manifest = {
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": blob.document(),
        "layers": [layer.document() for layer in layers],
    }  # fmt: skip
    layout.put_manifest(json.dumps(manifest).encode(), manifest["mediaType"], tag)


def encrypt(layout: OciLayout, tag: str, new_tag: str, kid: str = "default/key/images", style: str = "coco") -> str:
    """The same image, encrypted with KEK. Out: its manifest's digest"""
    recipient = Recipient(LocalKek(Secret(KEK), kid, style=style))  # type: ignore[arg-type]
    return encrypt_image(layout, layout, [recipient], wanted=tag, tag=new_tag).digest


class Registry:
    """Serves a layout as HOST:PORT/anything:TAG, read only. `asked`: paths that were asked for."""

    def __init__(self, layout: OciLayout, host: str = "127.0.0.1") -> None:
        self.asked: list[str] = []
        registry = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 20

            def do_GET(self) -> None:
                registry.asked.append(self.path)
                kind, wanted = self.path.split("/")[-2:]
                try:
                    if kind == "manifests":
                        descriptor, data = layout.resolve(wanted)
                        media_type = descriptor.media_type
                    else:
                        data, media_type = layout.blob_path(wanted).read_bytes(), "application/octet-stream"
                    status = 200
                except Exception:
                    status, data, media_type = 404, b'{"errors":[{"code":"MANIFEST_UNKNOWN"}]}', "application/json"
                self.send_response(status)
                self.send_header("Content-Type", media_type)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
                self.wfile.flush()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer((host, 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()
