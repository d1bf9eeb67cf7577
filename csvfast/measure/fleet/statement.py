"""A signed list of measurements: an in-toto statement in a DSSE envelope, under an SM2 or a P-256 key.

The statement's subjects are the measured names with their digests; its predicate has every row in full, and says what could not
be measured. The signature is over the envelope's payload and type (PAE): SM2 with SM3 and the default user id (GB/T 32918.2), or
ECDSA with SHA-256, DER either way, so that OpenSSL and other DSSE tools verify it. Nothing is believed of a statement whose
signature was not verified under a key that the caller names: `open_statement` has no way around it.

Source: in-toto attestation spec v1 (Statement), secure-systems-lab/dsse protocol.md and envelope.md.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from csvfast.crypto import (
    SM2PrivateKey,
    SM2PublicKey,
    dump_public_key,
    load_private_key,
    load_public_key,
    signature_from_der,
    signature_to_der,
)
from csvfast.errors import CsvfastError, SignatureError
from csvfast.errors import FormatError as StructureError
from csvfast.measure.errors import ParameterError, RecipeError
from csvfast.measure.fleet.rows import Row

__all__ = [
    "PAYLOAD_TYPE",
    "PREDICATE_TYPE",
    "load_signing_key",
    "load_verifying_key",
    "make_statement",
    "open_statement",
    "sign_statement",
]

PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "urn:csvfast:measurements:v1"
STATEMENT_MAX_BYTES: Final = 256 << 20
ALGORITHMS: Final = {"linear": "sm3", "tree": "sm3-tree-4096", "verity": "sm3-verity", "launch": "csv-launch-sm3"}
"""Names of digests in subjects, by mode."""

PrivateKey = SM2PrivateKey | ec.EllipticCurvePrivateKey
PublicKey = SM2PublicKey | ec.EllipticCurvePublicKey


def make_statement(rows: Iterable[Row], *, when: datetime | None = None) -> bytes:
    """The statement, unsigned: JSON in UTF-8. when: of the statement, None = now. Rows that are not as expected are failures."""
    rows = list(rows)
    measured = [row for row in rows if row.ok]
    if not measured:
        raise ParameterError("nothing was measured; expected a digest to state")
    moment = (when or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [_subject(row) for row in measured],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "made": moment,
            "rows": [_stated(row) for row in measured],
            "failures": [_failure(row) for row in rows if not row.ok],
        },
    }
    return json.dumps(statement, separators=(",", ":")).encode()


def sign_statement(statement: bytes, key: PrivateKey) -> bytes:
    """The envelope, JSON."""
    encoded = _encoded(PAYLOAD_TYPE, statement)
    if isinstance(key, SM2PrivateKey):
        signature = signature_to_der(key.sign(encoded))
        public: PublicKey = key.public_key
    else:
        signature = key.sign(encoded, ec.ECDSA(hashes.SHA256()))
        public = key.public_key()
    envelope = {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(statement).decode(),
        "signatures": [{"keyid": _key_id(public), "sig": base64.b64encode(signature).decode()}],
    }
    return json.dumps(envelope, separators=(",", ":")).encode() + b"\n"


def open_statement(envelope: bytes, key: PublicKey, name: str = "statement") -> list[Row]:
    """The rows of an envelope whose signature is valid under this key.

    Raises: RecipeError (no envelope, or a statement of something else), SignatureError.
    """
    document = _object(envelope, name)
    kind, payload = document.get("payloadType"), _bytes(document.get("payload"), f"{name}: payload")
    signatures = document.get("signatures")
    if kind != PAYLOAD_TYPE:
        raise RecipeError(f"{name}: payload type is {kind!r}; expected {PAYLOAD_TYPE!r}")
    if not isinstance(signatures, list) or not 1 <= len(signatures) <= 64:
        raise RecipeError(f"{name}: has no list of 1 to 64 signatures")
    encoded = _encoded(PAYLOAD_TYPE, payload)
    for one in signatures:
        raw = _bytes(one.get("sig") if isinstance(one, dict) else None, f"{name}: signature")
        if _is_valid(raw, encoded, key):
            return _rows(payload, name)
    raise SignatureError(f"{name}: no signature is valid under the key {_key_id(key)}")


def load_signing_key(data: bytes, password: bytes | None = None) -> PrivateKey:
    """An SM2 or P-256 private key, PEM or DER. Raises ParameterError, and what `crypto.load_private_key` raises."""
    try:
        return load_private_key(data, password)
    except StructureError as error:
        first = error
    try:
        load = serialization.load_pem_private_key if data.lstrip().startswith(b"-----") else serialization.load_der_private_key
        key = load(data, password)
    except (ValueError, TypeError) as error:
        raise ParameterError(f"the key is neither SM2 ({first}) nor P-256 ({error})") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
        raise ParameterError("the key is of another kind; expected SM2 or P-256")
    return key


def load_verifying_key(data: bytes) -> PublicKey:
    """An SM2 or P-256 public key, PEM or DER. Raises ParameterError."""
    try:
        return load_public_key(data)
    except CsvfastError as error:
        first = error
    try:
        load = serialization.load_pem_public_key if data.lstrip().startswith(b"-----") else serialization.load_der_public_key
        key = load(data)
    except (ValueError, TypeError) as error:
        raise ParameterError(f"the key is neither SM2 ({first}) nor P-256 ({error})") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise ParameterError("the key is of another kind; expected SM2 or P-256")
    return key


def _subject(row: Row) -> dict[str, Any]:
    return {"name": row.name, "digest": {ALGORITHMS[row.mode]: row.digest}}


def _stated(row: Row) -> dict[str, Any]:
    members = ("name", "mode", "content", "options", "digest", "size", "uncovered", "expect", "location")
    return {name: value for name, value in row.to_json().items() if name in members}


def _failure(row: Row) -> dict[str, Any]:
    return {"name": row.name, "mode": row.mode, "error": row.error or "other digest than expected"}


def _rows(payload: bytes, name: str) -> list[Row]:
    statement = _object(payload, name)
    for member, expected in (("_type", STATEMENT_TYPE), ("predicateType", PREDICATE_TYPE)):
        if statement.get(member) != expected:
            raise RecipeError(f"{name}: {member} is {statement.get(member)!r}; expected {expected!r}")
    predicate = statement.get("predicate")
    stated = predicate.get("rows") if isinstance(predicate, dict) else None
    if not isinstance(stated, list):
        raise RecipeError(f"{name}: the predicate has no list of rows")
    try:
        rows = [Row.from_json(one) for one in stated]
    except RecipeError as error:
        raise RecipeError(f"{name}: {error}") from error
    if statement.get("subject") != [_subject(row) for row in rows]:
        raise RecipeError(f"{name}: the subjects are not those of the predicate's rows")
    return rows


def _encoded(kind: str, payload: bytes) -> bytes:
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)


def _is_valid(signature: bytes, encoded: bytes, key: PublicKey) -> bool:
    try:
        if isinstance(key, SM2PublicKey):
            key.verify(signature_from_der(signature), encoded)
        else:
            key.verify(signature, encoded, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, CsvfastError):
        return False
    return True


def _key_id(key: PublicKey) -> str:
    if isinstance(key, SM2PublicKey):
        der = dump_public_key(key, encoding="der")
    else:
        der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return f"sha256:{hashlib.sha256(der).hexdigest()}"


def _object(data: bytes, name: str) -> dict[str, Any]:
    if len(data) > STATEMENT_MAX_BYTES:
        raise RecipeError(f"{name}: has {len(data)} bytes; expected at most {STATEMENT_MAX_BYTES}")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{name}: is no JSON: {error}") from error
    if not isinstance(document, dict):
        raise RecipeError(f"{name}: is {type(document).__name__}; expected an object")
    return document


def _bytes(text: Any, name: str) -> bytes:
    try:
        if isinstance(text, str):
            return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        pass
    raise RecipeError(f"{name}: is no base64")
