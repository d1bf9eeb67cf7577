"""Certificates with an SM2 key: cryptography encodes their names and extensions, but can neither hold the key nor sign.

Version 3, serial number 1, self-signed with SM2 and SM3, user id 1234567812345678, algorithm identifier without parameters as
OpenSSL writes it. Sources: RFC 5280 section 4.1; GM/T 0015; RFC 8998 section 3.2.1; OpenSSL crypto/x509/x_all.c.
Thread-safety: functions without state.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Final

from csvfast.crypto import der, sm2

if TYPE_CHECKING:
    from cryptography import x509

    from csvfast._core import SM2PrivateKey

__all__ = ["SM2_WITH_SM3", "sign_sm2_certificate"]

SM2_WITH_SM3: Final = der.sequence(der.object_identifier("1.2.156.10197.1.501"))

_VERSION_3: Final = der.context(0, der.integer(2))
_TRUE: Final = b"\x01\x01\xff"
_UTC_TIME: Final = 0x17
_GENERALIZED_TIME: Final = 0x18


def sign_sm2_certificate(
    key: SM2PrivateKey,
    name: x509.Name,
    not_before: datetime,
    not_after: datetime,
    extensions: Sequence[tuple[x509.ExtensionType, bool]],
) -> bytes:
    """A self-signed certificate in DER.

    In: name                   issuer and subject
        not_before, not_after  UTC, whole seconds
        extensions             in the order in which they are written, each with whether it is critical
    """
    encoded_name = name.public_bytes()
    to_be_signed = der.sequence(
        _VERSION_3,
        der.integer(1),
        SM2_WITH_SM3,
        encoded_name,
        der.sequence(_time(not_before), _time(not_after)),
        encoded_name,
        sm2.dump_public_key(key.public_key, encoding="der"),
        der.context(3, der.sequence(*(_extension(content, critical) for content, critical in extensions))),
    )
    signature = key.sign(to_be_signed, user_id=sm2.DEFAULT_USER_ID)
    return der.sequence(to_be_signed, SM2_WITH_SM3, der.bit_string(sm2.signature_to_der(signature)))


def _time(moment: datetime) -> bytes:
    # RFC 5280 section 4.1.2.5: two digits of the year until 2049.
    tag, text = (_UTC_TIME, f"{moment:%y%m%d%H%M%SZ}") if 1950 <= moment.year < 2050 else (
        _GENERALIZED_TIME, f"{moment.year:04}{moment:%m%d%H%M%SZ}")  # fmt: skip
    return bytes((tag, len(text))) + text.encode("ascii")


def _extension(content: x509.ExtensionType, critical: bool) -> bytes:
    oid = der.object_identifier(content.oid.dotted_string)
    return der.sequence(oid, *([_TRUE] if critical else []), der.octet_string(content.public_bytes()))
