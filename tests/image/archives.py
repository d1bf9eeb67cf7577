"""Archives and images for tests: entries as tarfile writes them, raw headers as only an attacker would, layouts by hand."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import stat
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["config_of", "describe", "digest", "entry", "header", "pax", "raw", "tar", "write_layout"]

LAYER = "application/vnd.oci.image.layer.v1.tar"
Item = tuple[tarfile.TarInfo, bytes]


def entry(
    name: str, content: bytes = b"", *, kind: bytes = tarfile.REGTYPE, mode: int = 0o644, link: str = "",
    mtime: float = 1_600_000_000, uid: int = 0, gid: int = 0, xattrs: Mapping[str, str] | None = None,
    device: tuple[int, int] = (0, 0),
) -> Item:  # fmt: skip
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.linkname, info.mtime, info.uid, info.gid = kind, mode, link, mtime, uid, gid
    info.size = len(content)
    info.devmajor, info.devminor = device
    info.pax_headers = {f"SCHILY.xattr.{key}": value for key, value in (xattrs or {}).items()}
    return info, content


def directory(name: str, mode: int = 0o755, **options: Any) -> Item:
    return entry(name, kind=tarfile.DIRTYPE, mode=mode, **options)


def symlink(name: str, target: str, **options: Any) -> Item:
    return entry(name, kind=tarfile.SYMTYPE, link=target, mode=0o777, **options)


def hard_link(name: str, target: str) -> Item:
    return entry(name, kind=tarfile.LNKTYPE, link=target)


def tar(*items: Item, format: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for info, content in items:
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def header(
    name: bytes = b"file", *, size: int | bytes = 0, kind: bytes = b"0", mode: int | bytes = 0o644, uid: int | bytes = 0,
    gid: int | bytes = 0, mtime: int | bytes = 1_600_000_000, link: bytes = b"", magic: bytes = b"ustar\x0000",
    device: tuple[int, int] = (0, 0), prefix: bytes = b"", check: bytes | None = None, tail: bytes = b"",
) -> bytes:  # fmt: skip
    """A header whose fields are what is asked for, sensible or not. In: tail   from byte 345 on, in the place of the prefix."""

    def field(value: int | bytes, length: int) -> bytes:
        return (value if isinstance(value, bytes) else b"%0*o\0" % (length - 1, value)).ljust(length, b"\0")

    parts = [
        name.ljust(100, b"\0"), field(mode, 8), field(uid, 8), field(gid, 8), field(size, 12), field(mtime, 12), b" " * 8, kind,
        link.ljust(100, b"\0"), magic, bytes(64), field(device[0], 8), field(device[1], 8), (tail or prefix).ljust(167, b"\0"),
    ]  # fmt: skip
    block = b"".join(parts)
    assert len(block) == 512
    return block[:148] + (b"%06o\0 " % sum(block) if check is None else check) + block[156:]


def raw(*parts: bytes, end: bool = True) -> bytes:
    """Headers and contents, each filled up to whole blocks."""
    return b"".join(part + bytes(-len(part) % 512) for part in parts) + (bytes(1024) if end else b"")


def pax(**records: str | bytes) -> tuple[bytes, bytes]:
    """(header, content) of a PAX header. Underscores twice in a keyword stand for a dot."""
    return pax_records([(key.replace("__", "."), value) for key, value in records.items()])


def pax_records(records: Iterable[tuple[str, str | bytes]], kind: bytes = b"x") -> tuple[bytes, bytes]:
    content = b""
    for key, value in records:
        body = b" " + key.encode() + b"=" + (value if isinstance(value, bytes) else value.encode()) + b"\n"
        length = len(body) + 1
        while len(str(length)) + len(body) != length:
            length += 1
        content += str(length).encode() + body
    return header(b"pax", kind=kind, size=len(content)), content


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def config_of(archives: Iterable[bytes], **config: Any) -> bytes:
    top = {
        "architecture": "amd64",
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [digest(one) for one in archives]},
    }
    if os.uname().machine == "aarch64":
        top["architecture"] = "arm64"
    return json.dumps(top).encode()


def write_blob(layout: Path, data: bytes) -> str:
    place = layout / "blobs" / "sha256"
    place.mkdir(parents=True, exist_ok=True)
    name = digest(data)
    (place / name[7:]).write_bytes(data)
    return name


def write_layout(
    layout: Path, archives: list[bytes], *, tag: str = "one", compress: bool = True, **config: Any
) -> Path:
    """An OCI layout with one image, base first."""
    blob = config_of(archives, **config)
    layers = []
    for one in archives:
        data = gzip.compress(one, mtime=0) if compress else one
        layers.append(
            {"mediaType": LAYER + ("+gzip" if compress else ""), "digest": write_blob(layout, data), "size": len(data)}
        )
    write_manifest(layout, blob, layers, tag)
    return layout


def write_manifest(layout: Path, config: bytes, layers: list[dict[str, Any]], tag: str = "one") -> None:
    manifest = json.dumps({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json", "digest": write_blob(layout, config), "size": len(config),
        },
        "layers": layers,
    }).encode()  # fmt: skip
    descriptor = {
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": write_blob(layout, manifest), "size": len(manifest),
        "annotations": {"org.opencontainers.image.ref.name": tag},
    }  # fmt: skip
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [descriptor]}))


def describe(root: Path, *, owners: bool = True, skip: tuple[str, ...] = ()) -> dict[str, tuple[Any, ...]]:
    """What an image decides about a tree, by path: kind, mode, owner, times, content, link, device, attributes, hard links."""
    found: dict[str, tuple[Any, ...]] = {}
    groups: dict[int, list[str]] = {}

    def look(path: Path, name: str) -> None:
        status = path.lstat()
        mode = status.st_mode
        content: Any = None
        if stat.S_ISREG(mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        elif stat.S_ISLNK(mode):
            content = str(path.readlink())
        elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            content = status.st_rdev
        attributes = {
            key: os.getxattr(path, key, follow_symlinks=False)
            for key in os.listxattr(path, follow_symlinks=False)
            if key not in skip
        }
        owner = (status.st_uid, status.st_gid) if owners else None
        found[name] = (
            oct(mode),
            owner,
            status.st_mtime_ns,
            status.st_size if stat.S_ISREG(mode) else None,
            content,
            attributes,
        )
        if not stat.S_ISDIR(mode) and status.st_nlink > 1:
            groups.setdefault(status.st_ino, []).append(name)
        if stat.S_ISDIR(mode):
            for child in sorted(path.iterdir()):
                look(child, f"{name}/{child.name}")

    look(root, ".")
    for names in groups.values():
        for name in names:
            found[name] += (tuple(sorted(names)),)
    return found
