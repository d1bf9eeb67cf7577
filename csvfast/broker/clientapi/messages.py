"""What Verdictd's client API means in this broker's terms: names, reference documents, texts of replies.

    csvData   {"measure": [base64 of 32 bytes, ...]}   <->   reference "csv_measure", hexadecimal

The texts are the original's where a client could depend on them, its spelling included.

Source: inclavare-containers/verdictd src/client_api/*.rs, src/resources/*.rs.
Thread-safety: functions without state.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from typing import Any, Final

from csvfast.broker.json_input import loads, members
from csvfast.broker.model import ResourcePath
from csvfast.errors import RequestError

__all__ = [
    "CREATE_FAILED",
    "CSV_DATA",
    "CSV_POLICY",
    "GPG_DELETED",
    "GPG_KEYRING",
    "IMAGE_POLICY",
    "IMAGE_SIGSTORE",
    "KEY_MISSING",
    "MEASURE_REFERENCE",
    "OK",
    "UNSUPPORTED_NAMES",
    "read_csv_data",
    "write_csv_data",
]

OK: Final = b"OK"
CREATE_FAILED: Final = b"Greate key failed"
KEY_MISSING: Final = b"key is not exist"
GPG_DELETED: Final = b"Delete key successfully"

IMAGE_POLICY: Final = ResourcePath.parse("verdictd/image/policy")
IMAGE_SIGSTORE: Final = ResourcePath.parse("verdictd/image/sigstore")
GPG_KEYRING: Final = ResourcePath.parse("verdictd/image/gpg-keyring")

CSV_POLICY: Final = "csvPolicy.rego"
CSV_DATA: Final = "csvData"
MEASURE_REFERENCE: Final = "csv_measure"
UNSUPPORTED_NAMES: Final = frozenset(("sgxPolicy.rego", "sgxData"))

_DATA_LIMIT: Final = 1 << 20
_MEASURE_BYTES: Final = 32


def read_csv_data(content: bytes) -> list[str]:
    """The measurements of a csvData document, hexadecimal. RequestError: anything else in it would not be enforced."""
    what = CSV_DATA
    listed = members(loads(content, what, limit=_DATA_LIMIT), what, {"measure": list})["measure"]
    result = []
    for text in listed:
        try:
            digest = base64.b64decode(text, validate=True) if type(text) is str else b""
        except (binascii.Error, ValueError):
            digest = b""
        if len(digest) != _MEASURE_BYTES:
            raise RequestError(f"{what}: measure; expected base64 of {_MEASURE_BYTES} bytes each")
        result.append(digest.hex())
    return result


def write_csv_data(values: Sequence[Any]) -> bytes:
    """The csvData document of a reference's values."""
    listed = [base64.b64encode(bytes.fromhex(str(value))).decode("ascii") for value in values]
    return json.dumps({"measure": listed}, separators=(",", ":")).encode()
