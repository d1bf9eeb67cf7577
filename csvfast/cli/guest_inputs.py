"""What `csvfast guest` reads from its options and files."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from csvfast.cli.common import CommandError

if TYPE_CHECKING:
    from csvfast.certs import CaCertificate, CertificateBundle
    from csvfast.processor.owner import OwnerKeys
    from csvfast.report.policy import GuestPolicy

__all__ = [
    "parse_api",
    "parse_bytes",
    "parse_number",
    "parse_policy",
    "read_bundle",
    "read_roots",
    "read_secret",
    "session_files",
]


def read_bundle(paths: Sequence[Path]) -> CertificateBundle:
    """All certificates in these files. Raises CommandError that names the file which holds none; OSError."""
    from csvfast.certs import CertificateBundle, parse_bundle
    from csvfast.errors import FormatError

    found = CertificateBundle()
    for path in paths:
        try:
            found = found.merged(parse_bundle(_read(path)))
        except FormatError as problem:
            raise CommandError(f"{path}: {problem}") from None
    return found


def read_roots(paths: Sequence[Path]) -> list[CaCertificate]:
    """A trusted root from each file. Raises as read_bundle."""
    from csvfast.certs import CaCertificate
    from csvfast.errors import FormatError

    roots = []
    for path in paths:
        try:
            roots.append(CaCertificate.parse(_read(path)))
        except FormatError as problem:
            raise CommandError(f"--root: {path}: {problem}") from None
    return roots


def session_files(session: Path | None, dh: Path | None) -> tuple[OwnerKeys | None, bytes, bytes]:
    """--session and --dh: the owner's keys if it is the owner's directory, DH certificate, session blob."""
    from csvfast.processor.owner import load_owner_session, read_base64

    if session is None:
        if dh is not None:
            raise CommandError("--dh: given without --session; expected both or neither")
        return None, b"", b""
    if session.is_dir():
        keys = load_owner_session(session)
        return keys, keys.dh if dh is None else read_base64(dh), keys.session
    if dh is None:
        raise CommandError("--session: a file needs --dh with the owner's certificate")
    return None, read_base64(dh), read_base64(session)


def read_secret(path: Path) -> bytearray:
    """A file's bytes in a buffer that can be wiped; 16 KiB is more than any secret may have."""
    data = bytearray(16385)
    done = 0
    source = sys.stdin.fileno() if str(path) == "-" else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with memoryview(data) as view:
            while done < len(data) and (count := os.readv(source, [view[done:]])):
                done += count
    finally:
        if str(path) != "-":
            os.close(source)
    del data[done:]
    return data


def parse_bytes(option: str, text: str, size: int, *, exactly: bool = False) -> bytes:
    """Hexadecimal digits or the bytes of @FILE, zero-padded on the right to `size` unless they must have it."""
    if text.startswith("@"):
        data = _read(Path(text[1:]))
    else:
        try:
            data = bytes.fromhex(text)
        except ValueError:
            raise CommandError(f"{option}: {text[:80]!r} is not an even number of hexadecimal digits") from None
    if len(data) > size or (exactly and len(data) != size):
        raise CommandError(f"{option}: {len(data)} bytes; expected {'' if exactly else 'at most '}{size}")
    return data.ljust(size, b"\0")


def parse_number(option: str, text: str) -> int:
    """Decimal, or with 0x."""
    try:
        return int(text, 0)
    except ValueError:
        raise CommandError(f"{option}: {text!r} is no number; expected one such as 0x80d000") from None


def parse_policy(text: str) -> GuestPolicy:
    """--policy."""
    from csvfast.report.policy import GuestPolicy

    return GuestPolicy(parse_number("--policy", text))


def parse_api(text: str) -> tuple[int, int, int]:
    """--api: major, minor, build."""
    try:
        version, build = text.split("/")
        major, minor, number = *map(int, version.split(".")), int(build)
        if not (0 <= major <= 255 and 0 <= minor <= 255 and 0 <= number < 1 << 31):
            raise ValueError
        return major, minor, number
    except ValueError:
        raise CommandError(f"--api: {text!r}; expected such as 1.4/2337") from None


def _read(path: Path) -> bytes:
    if str(path) == "-":
        return sys.stdin.buffer.read(1 << 20)
    with path.open("rb") as file:
        return file.read(1 << 20)
