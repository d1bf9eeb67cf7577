"""The guest owner's desk: a session on disk, the check of a launch measurement, a secret packed for one guest.

Directory of a session (0700, files 0600), named as QEMU's options and Hygon's devkit want them, base64 on one line:

    dh-cert.b64     the owner's DH certificate         -object sev-guest,dh-cert-file=
    session.b64     the session blob                                     session-file=
    tek.bin, tik.bin   transport keys, 16 bytes each; they never leave the owner
    owner.key       the DH key, PKCS#8 PEM             session.json    policy, for people

Thread-safety: functions without state.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from csvfast.certs.private import check_private_directory, read_description, read_private_file, write_private_directory
from csvfast.crypto import Secret, hmac_sm3
from csvfast.crypto.sm2 import dump_private_key
from csvfast.errors import AuthenticationError, FormatError, LengthError, StateError, VerificationError
from csvfast.processor.buffers import size_of
from csvfast.processor.launch import MEASURE_BYTES, SECRET_BYTES_MAX, measurement_message
from csvfast.processor.packet import FLAG_NO_MEASURE, KIND_SECRET, seal_packet
from csvfast.report.policy import GuestPolicy

if TYPE_CHECKING:
    from csvfast._core import BytesLike
    from csvfast.processor.session import OwnerSession

__all__ = ["OwnerKeys", "check_measurement", "load_owner_session", "read_base64", "save_owner_session", "seal_secret"]

_FORMAT: Final = "csvfast-session-1"
_KEY_BYTES: Final = 16
_BASE64_MAX: Final = 64 << 10


class OwnerKeys(NamedTuple):
    """A session as read back: what travels, and the keys that do not."""

    dh: bytes
    session: bytes
    tek: Secret
    tik: Secret
    policy: GuestPolicy

    def __repr__(self) -> str:
        return f"OwnerKeys(session of {len(self.session)} bytes, {self.policy!r})"


def save_owner_session(directory: Path, session: OwnerSession, policy: GuestPolicy) -> None:
    """Writes the directory, whole or not at all. Raises StateError when it exists and is not empty, OSError."""
    description = {"format": _FORMAT, "policy": f"{policy.value:#010x}"}
    write_private_directory(
        directory,
        {
            "dh-cert.b64": base64.b64encode(session.certificate.encoded) + b"\n",
            "session.b64": base64.b64encode(session.blob) + b"\n",
            "tek.bin": memoryview(session.tek),
            "tik.bin": memoryview(session.tik),
            "owner.key": dump_private_key(session.key),
            "session.json": json.dumps(description, indent=2).encode() + b"\n",
        },
    )


def load_owner_session(directory: Path) -> OwnerKeys:
    """Reads it back. Raises StateError: missing, not private, damaged."""
    check_private_directory(directory)
    text = str(read_description(directory, "session.json", _FORMAT).get("policy"))
    try:
        policy = GuestPolicy(int(text, 16))
    except ValueError:
        raise StateError(f"{directory / 'session.json'}: policy {text[:40]!r}; expected a number of 32 bits") from None
    dh, session = (
        _decoded(bytes(read_private_file(directory, name, _BASE64_MAX)), name)
        for name in ("dh-cert.b64", "session.b64")
    )
    tek, tik = (_key(directory, name) for name in ("tek.bin", "tik.bin"))
    return OwnerKeys(dh, session, tek, tik, policy)


def read_base64(path: Path) -> bytes:
    """A certificate or blob as QEMU takes it: base64, line breaks allowed. Raises FormatError, OSError."""
    with path.open("rb") as file:
        text = file.read(_BASE64_MAX + 1)
    if len(text) > _BASE64_MAX:
        raise FormatError(str(path), "length", None, f"more than {_BASE64_MAX} bytes", f"at most {_BASE64_MAX}")
    return _decoded(text, str(path))


def check_measurement(
    tik: BytesLike, blob: bytes, policy: GuestPolicy, digest: bytes, api: tuple[int, int], build: int
) -> None:
    """Is this LAUNCH_MEASURE answer for a guest with this digest and policy, made by who holds the TIK?

    Both forms of the message are tried, with and without the build number (launch.measurement_message): each binds digest, policy
    and nonce. Raises: LengthError; VerificationError("launch measurement").
    """
    if len(blob) != MEASURE_BYTES:
        raise LengthError(f"the launch measurement has {len(blob)} bytes; expected {MEASURE_BYTES}")
    measure, mnonce = blob[:32], blob[32:]
    for number in (None, build):
        try:
            hmac_sm3(tik, measurement_message(api, policy, digest, mnonce, number)).verify(measure)
        except AuthenticationError:
            continue
        return
    raise VerificationError(
        "launch measurement", "it is not that of a guest with the expected digest and policy under this session's keys"
    )


def seal_secret(keys: OwnerKeys, plaintext: BytesLike, measurement: bytes | None) -> tuple[bytes, bytes]:
    """Packs a secret for LAUNCH_SECRET: header and ciphertext.

    Args: plaintext: a multiple of 16 bytes, at most 16 KiB. measurement: the 48 bytes of LAUNCH_MEASURE, already checked; None
        packs it before the launch (flag 2, inferred).
    Raises: LengthError.
    """
    size = size_of(plaintext)
    if not 0 < size <= SECRET_BYTES_MAX or size % 16:
        raise LengthError(f"the secret has {size} bytes; expected a multiple of 16 up to {SECRET_BYTES_MAX}")
    return seal_packet(
        KIND_SECRET,
        keys.tek,
        keys.tik,
        plaintext,
        iv=os.urandom(16),
        flags=FLAG_NO_MEASURE if measurement is None else 0,
        measure=b"" if measurement is None else measurement[:32],
    )


def _decoded(text: bytes, name: str) -> bytes:
    try:
        return base64.b64decode(b"".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as problem:
        raise FormatError(name, "base64", None, str(problem), "base64") from None


def _key(directory: Path, name: str) -> Secret:
    data = read_private_file(directory, name, _KEY_BYTES)
    try:
        if len(data) != _KEY_BYTES:
            raise StateError(f"{directory / name}: {len(data)} bytes; expected {_KEY_BYTES}")
        return Secret(data)
    finally:
        data[:] = bytes(len(data))
