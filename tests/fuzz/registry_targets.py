"""Fuzz targets of images' places: manifests and indexes, names, what registries ask for, and a registry's very bytes."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Hashable
from typing import Any

from csvfast.errors import ArgumentError, ImageError
from csvfast.image import registry as registry_module
from csvfast.image import registry_http
from csvfast.image.blobs import read_blob
from csvfast.image.descriptor import CONFIG_TYPE, MANIFEST_TYPE, Descriptor, Platform, digest_of
from csvfast.image.manifest import Index, Manifest, choose, media_type_of
from csvfast.image.reference import parse_reference
from csvfast.image.registry import RegistryClient
from csvfast.image.registry_auth import parse_challenges
from fuzz.target import Target

__all__ = ["ManifestTarget", "NamesTarget", "RegistryTarget"]

_LAYER = "application/vnd.oci.image.layer.v1.tar"
_BLOB = b"a layer of a few bytes"


def kind_of(error: Exception) -> str:
    """An error's words without names and numbers."""
    return re.sub(r"\d+|'.*?'|[^ a-z]", "", str(getattr(error, "problem", error))[:60])


def manifest() -> Manifest:
    layer = Descriptor.of(_BLOB, f"{_LAYER}+gzip+encrypted", annotations={"org.opencontainers.image.enc.pubopts": "e30="})
    layers = (layer, Descriptor.of(b"", _LAYER))
    return Manifest(Descriptor.of(b"{}", CONFIG_TYPE), layers, annotations={"a": "b"}, other={"x": [1]})


class ManifestTarget(Target):
    """Manifests and indexes: what is taken encodes to itself, and an index's choice is one of its manifests."""

    text = True

    def __init__(self) -> None:
        super().__init__()
        platforms = (Platform("linux", "amd64"), Platform("linux", "arm64", "v8"), None)
        index = Index(tuple(Descriptor(MANIFEST_TYPE, digest_of(b""), 0, platform=one) for one in platforms))
        docker = manifest().encode().replace(b"vnd.oci.image.manifest.v1", b"vnd.docker.distribution.manifest.v2")
        self.seeds = [manifest().encode(), index.encode(), docker, b'{"schemaVersion":2,"manifests":[]}']

    def handle(self, data: bytes) -> Hashable:
        try:
            kind = media_type_of(data)
            if kind.endswith(("manifest.v1+json", "manifest.v2+json")):
                found = Manifest.parse(data)
                assert found.encode() == data
                assert Manifest.parse(found.replace().encode()) == found
                return kind, len(found.layers), [layer.is_encrypted for layer in found.layers].count(True)
            index = Index.parse(data)
            assert Index.parse(index.replace().encode()) == index
            return kind, index.manifests.index(choose(index, architecture="arm64"))
        except ImageError as error:
            return kind_of(error)


class NamesTarget(Target):
    """A line with a reference, then lines with challenges of a registry."""

    text = True

    def __init__(self) -> None:
        super().__init__()
        by_digest = b"docker://[::1]:5/a@" + digest_of(b"").encode()
        names = [b"oci:a/b:tag", b"docker://r.example:5000/a/b_c:1.0", by_digest, b"localhost/a"]
        asked = b'\nBearer realm="https://a/t",service="s",scope="repository:a:pull,push"\nBasic realm="q\\"x", Bearer realm=y'
        self.seeds = [name + asked for name in names]

    def handle(self, data: bytes) -> Hashable:
        name, *headers = data.decode("utf-8", "replace").split("\n")
        schemes = tuple(scheme for scheme, _ in parse_challenges(headers))[:3]
        try:
            found = parse_reference(name)
        except ArgumentError as error:
            return kind_of(error)[-20:], len(schemes)
        assert parse_reference(str(found)) == found
        if found.host is not None:
            with RegistryClient(found, credentials=None) as client:
                assert str(client.base).isascii()
        return found.host is None, found.tag is None, found.digest is None, len(schemes)


class _Wire:
    """A socket with a registry's bytes in it."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def makefile(self, *_: Any, **__: Any) -> io.BytesIO:
        return io.BytesIO(self.data)

    def settimeout(self, _seconds: float) -> None:
        pass

    setsockopt = sendall = close = lambda *_: None


class RegistryTarget(Target):
    """Whatever a registry answers, the client says no or returns the blob that was promised, soon."""

    def __init__(self) -> None:
        super().__init__()
        size, digest = len(_BLOB), digest_of(_BLOB)
        self.wanted = Descriptor(_LAYER, digest, size)
        data = manifest().encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: " + MANIFEST_TYPE.encode()
        self.seeds = [
            b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (size, _BLOB),
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (size, _BLOB),
            b"HTTP/1.0 200 OK\r\n\r\n" + _BLOB,
            head + b"\r\nContent-Length: %d\r\nDocker-Content-Digest: %s\r\n\r\n%s" % (len(data), digest_of(data).encode(), data),
            b'HTTP/1.1 401 X\r\nWWW-Authenticate: Bearer realm="http://127.0.0.1/t",service="s"\r\nContent-Length: 0\r\n\r\n',
            b"HTTP/1.1 307 X\r\nLocation: /elsewhere?a=b\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 206 X\r\nContent-Range: bytes 0-%d/%d\r\nContent-Length: %d\r\n\r\n%s" % (size - 1, size, size, _BLOB),
            b'HTTP/1.1 404 X\r\nContent-Length: 44\r\n\r\n{"errors":[{"code":"A","message":"not here"}]}',
        ]
        self.reference = parse_reference("docker://127.0.0.1:5000/app")

    def handle(self, data: bytes) -> Hashable:
        create, sleep = registry_http.socket.create_connection, registry_module.time.sleep
        registry_http.socket.create_connection = lambda *_: _Wire(data)  # type: ignore[assignment]
        registry_module.time.sleep = lambda _seconds: None
        before = time.monotonic()
        try:
            with RegistryClient(self.reference, credentials=None, retries=1, timeout=5) as client:
                answers = [self._ask(client, "blob"), self._ask(client, "manifest")]
        finally:
            registry_http.socket.create_connection, registry_module.time.sleep = create, sleep
        assert time.monotonic() - before < 5
        return tuple(answers)

    def _ask(self, client: RegistryClient, what: str) -> Hashable:
        try:
            if what == "manifest":
                descriptor, data = client.resolve("1")
                assert descriptor.digest == digest_of(data)
                return what
            assert read_blob(client, self.wanted, 1 << 20) == _BLOB
            return what
        except ImageError as error:
            return kind_of(error)
