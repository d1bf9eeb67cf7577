"""A test tool for people who build verifiers: a complete chain, and any one thing in it wrong.

    factory = ChainFactory()
    chain, roots = factory.chain(factory.wrong("CEK", "issuer_id"))       # only the rule is broken: signed again by the HSK
    chain, roots = factory.chain(factory.wrong("PEK", "x", resign=False)) # the signature is broken too

Chains made here hang from a root of their own. Not for products: the private keys lie open in :attr:`ChainFactory.keys`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

from csvfast.certs.chain import USER_IDS, CertificateChain
from csvfast.certs.fields import to_field
from csvfast.certs.layout import CaCertificate, CsvCertificate, KeyAlgorithm, KeyUsage
from csvfast.crypto import SM2PrivateKey
from csvfast.errors import ArgumentError

__all__ = ["CA_FIELDS", "CSV_FIELDS", "ChainFactory", "altered", "fields_of", "raw", "wrong_value"]

CA_FIELDS: Final[dict[str, tuple[int, int]]] = {
    "version": (0, 4),
    "key_id": (4, 16),
    "certifying_id": (20, 16),
    "key_usage": (36, 4),
    "reserved1": (40, 24),
    "curve_id": (64, 4),
    "x": (68, 72),
    "y": (140, 72),
    "uid_len": (212, 2),
    "uid": (214, 254),
    "reserved2": (468, 108),
    "r": (576, 72),
    "s": (648, 72),
    "reserved3": (720, 112),
}
"""Offset and size of every field of a CA certificate."""

CSV_FIELDS: Final[dict[str, tuple[int, int]]] = {
    "version": (0, 4),
    "api_major": (4, 1),
    "api_minor": (5, 1),
    "reserved1": (6, 2),
    "usage": (8, 4),
    "algorithm": (12, 4),
    "curve_id": (16, 4),
    "x": (20, 72),
    "y": (92, 72),
    "uid_len": (164, 2),
    "uid": (166, 254),
    "issuer_id": (420, 16),
    "reserved2": (436, 608),
    "slot1_usage": (1044, 4),
    "slot1_algorithm": (1048, 4),
    "slot1_r": (1052, 72),
    "slot1_s": (1124, 72),
    "slot1_reserved": (1196, 368),
    "slot2_usage": (1564, 4),
    "slot2_algorithm": (1568, 4),
    "slot2_r": (1572, 72),
    "slot2_s": (1644, 72),
    "slot2_reserved": (1716, 368),
}
"""Offset and size of every field of a CSV certificate."""

_NUMBERS: Final = frozenset(("x", "y", "r", "s", "slot1_r", "slot1_s", "slot2_r", "slot2_s"))

# Who signs whom, into which slot (0: the only one of a CA certificate).
_SIGNERS: Final[dict[str, tuple[tuple[str, int], ...]]] = {
    "HRK": (("HRK", 0),),
    "HSK": (("HRK", 0),),
    "CEK": (("HSK", 1),),
    "OCA": (("OCA", 1),),
    "PEK": (("CEK", 1), ("OCA", 2)),
    "PDH": (("PEK", 1),),
}


def fields_of(encoded: bytes) -> Mapping[str, tuple[int, int]]:
    """CA_FIELDS or CSV_FIELDS, by length. Raises ArgumentError for another length."""
    for size, table in ((CaCertificate.BYTES, CA_FIELDS), (CsvCertificate.BYTES, CSV_FIELDS)):
        if len(encoded) == size:
            return table
    raise ArgumentError(f"certificate: {len(encoded)} bytes; expected {CaCertificate.BYTES} or {CsvCertificate.BYTES}")


def altered(encoded: bytes, **values: int | bytes) -> bytes:
    """The certificate's bytes with fields replaced, not signed again; they may no longer parse.

    In: values   by name (CA_FIELDS, CSV_FIELDS): a number, little-endian in the field's size; bytes, padded with zeros; for x,
                 y, r and s 32 bytes big-endian or the 72 bytes of the field
    Raises ArgumentError: no such field, a value that does not fit.
    """
    table = fields_of(encoded)
    for name, value in values.items():
        if name not in table:
            raise ArgumentError(f"field {name!r}: expected one of {', '.join(table)}")
        offset, size = table[name]
        if isinstance(value, int):
            try:
                content = value.to_bytes(size, "little")
            except OverflowError:
                raise ArgumentError(f"{name}: {value} does not fit {size} bytes") from None
        else:
            content = to_field(value) if name in _NUMBERS and len(value) == 32 else value.ljust(size, b"\0")
        if len(content) != size:
            raise ArgumentError(f"{name}: {len(content)} bytes; expected at most {size}")
        encoded = raw(encoded, offset, content)
    return encoded


def raw(encoded: bytes, offset: int, content: bytes) -> bytes:
    """The certificate's bytes with `content` at `offset`. Raises ArgumentError when it does not lie inside."""
    if not 0 <= offset <= len(encoded) - len(content):
        raise ArgumentError(f"offset {offset} with {len(content)} bytes: expected to lie inside {len(encoded)}")
    return encoded[:offset] + content + encoded[offset + len(content) :]


def wrong_value(encoded: bytes, field: str) -> bytes:
    """A wrong value for a field that still parses: its lowest bit turned over."""
    offset, size = fields_of(encoded)[field]
    return bytes([encoded[offset] ^ 1]) + encoded[offset + 1 : offset + size]


class ChainFactory:
    """Keys and certificates of a complete, genuine chain of one simulated chip.

    keys       private key by role: "HRK", "HSK", "CEK", "OCA", "PEK", "PDH"
    encodings  certificate bytes by role
    """

    def __init__(self) -> None:
        self.keys = {role: SM2PrivateKey.generate() for role in _SIGNERS}
        root_id, hsk_id = os.urandom(16), os.urandom(16)
        self.encodings: dict[str, bytes] = {}
        for role, key_id in (("HRK", root_id), ("HSK", hsk_id)):
            usage = KeyUsage[role]
            self._add(
                role,
                CaCertificate.build(
                    key_usage=usage,
                    key_id=key_id,
                    certifying_id=root_id,
                    point=self.keys[role].public_key.point,
                    user_id=USER_IDS[usage],
                ).encoded,
            )
        for role in ("CEK", "OCA", "PEK", "PDH"):
            usage = KeyUsage[role]
            certificate = CsvCertificate.build(
                usage=usage,
                algorithm=KeyAlgorithm.SM2_DH if role == "PDH" else KeyAlgorithm.SM2_SA,
                point=self.keys[role].public_key.point,
                user_id=USER_IDS[usage],
                api=(1, 1) if role == "CEK" else (1, 3),
                version=2 if role == "CEK" else 1,
                issuer_id=hsk_id if role == "CEK" else bytes(16),
            )
            encoded = certificate.encoded
            for signer, slot in _SIGNERS[role]:
                values: dict[str, int | bytes] = {
                    f"slot{slot}_usage": int(KeyUsage[signer]),
                    f"slot{slot}_algorithm": int(KeyAlgorithm.SM2_SA),
                }
                encoded = altered(encoded, **values)
            self._add(role, encoded)

    def _add(self, role: str, encoded: bytes) -> None:
        self.encodings[role] = encoded  # a self-signature reads the user id from here
        self.encodings[role] = self.signed(role, encoded)

    def signed(self, role: str, encoded: bytes) -> bytes:
        """The bytes with every signature of its issuers made anew; the slots' own words stay as they are."""
        body = encoded[: CaCertificate.BODY_BYTES if len(encoded) == CaCertificate.BYTES else CsvCertificate.BODY_BYTES]
        for signer, slot in _SIGNERS[role]:
            issuer = encoded if signer == role else self.encodings[signer]
            signature = self.keys[signer].sign(body, user_id=_user_id(issuer))
            prefix = f"slot{slot}_" if slot else ""
            encoded = altered(encoded, **{prefix + "r": signature[:32], prefix + "s": signature[32:]})
        return encoded

    def wrong(self, role: str, field: str, value: int | bytes | None = None, *, resign: bool = True) -> dict[str, bytes]:
        """All certificates, with one field of one of them replaced.

        In: value    None = wrong_value()
            resign   sign the altered certificate again, so that nothing but the field is wrong (meaningless for signatures)
        """
        encoded = self.encodings[role]
        encoded = altered(encoded, **{field: wrong_value(encoded, field) if value is None else value})
        is_signature = field in ("r", "s") or field.endswith(("_r", "_s"))
        return self.encodings | {role: self.signed(role, encoded) if resign and not is_signature else encoded}

    def chain(self, encodings: Mapping[str, bytes] | None = None) -> tuple[CertificateChain, list[CaCertificate]]:
        """Chain and trusted roots (its HRK alone) from certificate bytes by role; OCA, PEK and PDH may be missing.

        Raises FormatError when one of them does not parse.
        """
        given = self.encodings if encodings is None else encodings
        root = CaCertificate.parse(given["HRK"])

        def read(role: str) -> CsvCertificate | None:
            return CsvCertificate.parse(given[role]) if role in given else None

        return CertificateChain(
            hsk=CaCertificate.parse(given["HSK"]),
            cek=CsvCertificate.parse(given["CEK"]),
            pek=read("PEK"),
            oca=read("OCA"),
            pdh=read("PDH"),
            hrk=root,
        ), [root]


def _user_id(encoded: bytes) -> bytes:
    table = fields_of(encoded)
    offset = table["uid_len"][0]
    length = int.from_bytes(encoded[offset : offset + 2], "little")
    start, size = table["uid"]
    return encoded[start : start + min(length, size)]
