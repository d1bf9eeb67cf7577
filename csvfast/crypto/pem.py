"""PEM, the textual form of DER (RFC 7468, strict base64; text before and after the block is allowed).

Thread-safety: functions are pure.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Container
from typing import Final

from csvfast.errors import FormatError

__all__ = ["is_pem", "read_pem", "write_pem"]

LARGEST: Final = 1 << 16  # bytes of a file; a key takes a few hundred
_BLOCK: Final = re.compile(
    rb"-----BEGIN ([A-Z0-9 ]{1,40})-----[ \t]*\r?\n((?:[^-]|-(?!----))*)-----END ([A-Z0-9 ]{1,40})-----"
)
_BLANKS: Final = b" \t\r\n"


def is_pem(data: bytes) -> bool:
    """Whether the bytes hold the beginning of a PEM block."""
    return b"-----BEGIN " in data


def read_pem(data: bytes, structure: str, labels: Container[str], skipped: Container[str] = ()) -> tuple[str, bytes]:
    """The one block that bears one of the labels: (label, DER).

    Args:
        data: the file, at most 64 KiB.
        structure: its name in error messages.
        labels: what the block may be called.
        skipped: labels of blocks that may stand beside it, e.g. curve parameters.
    Raises: FormatError.
    """
    if len(data) > LARGEST:
        raise FormatError(structure, "PEM", None, f"{len(data)} bytes", f"at most {LARGEST}")
    found: tuple[str, bytes] | None = None
    for block in _BLOCK.finditer(data):
        label, last, offset = block[1].decode(), block[3].decode(), block.start()
        if label != last:
            raise FormatError(structure, "PEM", block.start(3), f"END {last}", f"END {label}")
        if label in skipped:
            continue
        if label not in labels:
            raise FormatError(structure, "PEM label", offset, repr(label), str(labels))
        if found is not None:
            raise FormatError(structure, "PEM", offset, "a second key", "one key a file")
        if b":" in block[2]:
            expected = "no encryption, or PKCS#8's: openssl pkcs8 -topk8 -v2 aes-256-cbc"
            raise FormatError(
                structure, "PEM", block.start(2), "header lines (the old encryption of OpenSSL)", expected
            )
        try:
            found = label, binascii.a2b_base64(block[2].translate(None, _BLANKS), strict_mode=True)
        except binascii.Error as problem:
            raise FormatError(structure, "PEM", block.start(2), f"no base64 ({problem})", "base64") from None
    if found is None:
        raise FormatError(structure, "PEM", None, "no complete block", "BEGIN, base64, END")
    return found


def write_pem(label: str, data: bytes | bytearray) -> bytes:
    """One block with lines of 64 characters."""
    text = binascii.b2a_base64(data, newline=False)
    lines = (text[at : at + 64] for at in range(0, len(text), 64))
    return b"\n".join((f"-----BEGIN {label}-----".encode(), *lines, f"-----END {label}-----".encode(), b""))
