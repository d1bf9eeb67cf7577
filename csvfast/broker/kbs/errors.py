"""Refusals as CoCo's clients understand them.

    {"type":"https://github.com/confidential-containers/kbs/errors/<Variant>","detail":"text"}

404 for a path that leads nowhere, 401 for everything else: the reference server sends no other code, and its client repeats the
handshake after a 401 and gives up after any other. The reason stays with the broker; the peer learns the correlation id.

Source: confidential-containers/trustee kbs/src/error.rs. Thread-safety: immutable objects.
"""

from __future__ import annotations

import json
import math
from typing import Final, Literal

from csvfast.errors import (
    AuthenticationError,
    BrokerError,
    ConflictError,
    CsvfastError,
    DeniedError,
    FormatError,
    LengthError,
    LimitedError,
    RequestError,
    UnavailableError,
    UnknownError,
)

__all__ = ["ERROR_BASE", "KbsError", "Variant", "answer_to"]

ERROR_BASE: Final = "https://github.com/confidential-containers/kbs/errors/"

Variant = Literal[
    "AdminAuthAccess",
    "AttestationError",
    "HTTPFailed",
    "InvalidRequestPath",
    "JweError",
    "ParsePolicyError",
    "PluginInternalError",
    "PluginNotFound",
    "PolicyDeny",
    "PolicyEngineError",
    "RvpsError",
    "SerdeError",
    "TokenNotFound",
    "TokenVerifierError",
]
_NOT_FOUND: Final = frozenset(("InvalidRequestPath", "PluginNotFound"))


class KbsError(Exception):
    """An answer that is not the one asked for. Never leaves this package.

    In: variant       which of CoCo's errors
        detail        text for the peer
        correlation   names the request in the broker's log and audit
        status        HTTP status, when the protocol does not fix it (HTTPFailed)
        retry_after   seconds, for the header of that name
    """

    def __init__(
        self, variant: Variant, detail: str, correlation: str = "", *, status: int = 0, retry_after: float | None = None
    ) -> None:
        super().__init__(detail)
        self.variant: Final = variant
        self.correlation: Final = correlation
        self.detail: Final = f"{detail} ({correlation})" if correlation else detail
        self.status: Final = status or (404 if variant in _NOT_FOUND else 401)
        self.retry_after: Final = retry_after

    @property
    def body(self) -> bytes:
        """The JSON that is sent."""
        return json.dumps({"type": ERROR_BASE + self.variant, "detail": self.detail}, separators=(",", ":")).encode()

    @property
    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """Headers of the answer beside those of its body."""
        if self.retry_after is None:
            return ()
        return ((b"retry-after", b"%d" % max(1, math.ceil(min(self.retry_after, 86400)))),)


def answer_to(error: CsvfastError | KbsError, variant: Variant, correlation: str) -> KbsError:
    """What a peer is told about an error. Its text is passed on only where it speaks of the peer's own request.

    In: variant   of refusals in this place; other kinds of error have one of their own
    """
    if isinstance(error, KbsError):
        if error.correlation:
            return error
        return KbsError(error.variant, error.detail, correlation, status=error.status, retry_after=error.retry_after)
    if isinstance(error, DeniedError):
        return KbsError(variant, "not allowed", error.correlation or correlation)
    if isinstance(error, LimitedError):
        return KbsError(variant, "too many requests", correlation, retry_after=error.retry_after)
    if isinstance(error, UnavailableError):
        return KbsError(variant, "not available", correlation)
    if isinstance(error, (RequestError, FormatError, LengthError, ConflictError, UnknownError)):
        return KbsError("SerdeError" if isinstance(error, RequestError) else variant, str(error), correlation)
    if isinstance(error, (BrokerError, AuthenticationError)):
        return KbsError(variant, "not allowed", correlation)
    return KbsError("PluginInternalError", "internal error", correlation)
