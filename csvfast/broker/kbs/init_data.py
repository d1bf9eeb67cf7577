"""Init data: what the host gave the guest at its start, as the guest tells it.

    version = "0.1.0"
    algorithm = "sha384"
    [data]
    "aa.toml" = '''...'''

Its digest is the hash of the whole text. No CSV report vouches for it: policies may ask for a digest, and must know that.

Source: confidential-containers/guest-components attestation-agent (initdata); trustee kbs/docs/initdata.md; virtee/kbs-types
(InitData). Thread-safety: functions without state.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from typing import Any, Final

from csvfast.broker.json_input import member
from csvfast.errors import RequestError

__all__ = ["INIT_DATA_LIMIT", "read_init_data"]

INIT_DATA_LIMIT: Final = 64 << 10
"""Bytes of the text."""

_WHAT: Final = "init-data"
_ALGORITHMS: Final = {"sha256": hashlib.sha256, "sha384": hashlib.sha384, "sha512": hashlib.sha512}
# tomllib takes quadratic time for a key of very many parts. Strings and comments may hold any number of dots. A string that does
# not end is taken to the end of its line or of the text, where tomllib gives up, too: so this looks at everything once.
_ASIDE: Final = re.compile(
    r"'''(?:.*?'{3,5}|.*)|\"\"\"(?:(?:\\.|[^\\])*?\"{3,5}|.*)|\"(?:\\.|[^\"\\\n])*+\"?|'[^'\n]*'?|#[^\n]*", re.DOTALL
)
_PARTS: Final = 32


def read_init_data(value: Any) -> dict[str, Any] | None:
    """From the member init-data of an attestation: {"version", "algorithm", "data", "digest"}; None when there is none.

    `data` maps names to texts; digest is hexadecimal. RequestError.
    """
    if value is None:
        return None
    if type(value) is not dict:
        raise RequestError(f"{_WHAT}: {type(value).__name__}; expected an object or null")
    if member(value, "format", str, _WHAT) != "toml":
        raise RequestError(f"{_WHAT}: another format; expected toml")
    text = member(value, "body", str, _WHAT)
    raw = text.encode()
    if len(raw) > INIT_DATA_LIMIT:
        raise RequestError(f"{_WHAT}: {len(raw)} bytes; expected at most {INIT_DATA_LIMIT}")
    if any(line.count(".") > _PARTS for line in _ASIDE.sub("", text).splitlines()):
        raise RequestError(f"{_WHAT}: a key of many parts; expected at most {_PARTS}")
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, ValueError, RecursionError):
        raise RequestError(f"{_WHAT}: no TOML") from None
    name = member(document, "algorithm", str, _WHAT)
    if name not in _ALGORITHMS:
        raise RequestError(f"{_WHAT}: another algorithm; expected {', '.join(_ALGORITHMS)}")
    data = member(document, "data", dict, _WHAT) if "data" in document else {}
    if not all(type(item) is str for item in data.values()):
        raise RequestError(f"{_WHAT}: data holds something other than text")
    return {
        "version": member(document, "version", str, _WHAT),
        "algorithm": name,
        "data": data,
        "digest": _ALGORITHMS[name](raw).hexdigest(),
    }
