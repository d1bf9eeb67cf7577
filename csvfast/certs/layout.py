"""The two certificate formats of the platform, byte for byte.

    CaCertificate     832 bytes: HRK (root) and HSK                       csv-rs src/certs/ca/cert/mod.rs
    CsvCertificate   2084 bytes: CEK, PEK, OCA, PDH, guest owner's DH     csv-rs src/certs/csv/cert/mod.rs

    CA   0 version 4 | 4 key_id 16 | 20 certifying_id 16 | 36 key_usage 4 | 40 reserved1 24 | 64 curve_id 4 | 68 Qx 72 |
         140 Qy 72 | 212 uid_len 2 | 214 uid 254 | 468 reserved2 108 | 576 r 72 | 648 s 72 | 720 reserved3 112
    CSV  0 version 4 | 4 api_major 1 | 5 api_minor 1 | 6 reserved1 2 | 8 usage 4 | 12 algorithm 4 | 16 curve_id 4 | 20 Qx 72 |
         92 Qy 72 | 164 uid_len 2 | 166 uid 254 | 420 issuer_id (sid) 16 | 436 reserved2 608 | slot 1 at 1044, slot 2 at 1564
    slot 0 usage 4 | 4 algorithm 4 | 8 r 72 | 80 s 72 | 152 reserved 368

Integers are little-endian. The signed range ("body") ends where the signatures begin: a slot's own words are not signed.

Parsing refuses what cannot be read: a wrong length, a user id longer than its area, a number that spills over its 32 bytes.
Whether the values are those of a genuine chain is the business of :mod:`csvfast.certs.chain`.

Objects are immutable by convention, equal when their bytes are, and hashable. Thread-safe: what is computed late is the same
whoever computes it.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

from csvfast.certs.fields import FIELD_BYTES, from_field, shown, to_field
from csvfast.crypto import SM2PublicKey
from csvfast.errors import ArgumentError, BufferTypeError, FormatError, LengthError, PointError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from csvfast.crypto import SM2PrivateKey

__all__ = [
    "CA_BYTES",
    "CSV_BYTES",
    "CURVE_SM2",
    "CaCertificate",
    "CsvCertificate",
    "KeyAlgorithm",
    "KeyUsage",
    "SignatureSlot",
    "algorithm_name",
    "usage_name",
]

CA_BYTES: Final = 832
CSV_BYTES: Final = 2084
CURVE_SM2: Final = 3

_CA: Final = Struct("<I16s16sI24xI144xH254x108x256x")
_CSV: Final = Struct("<IBB2xIII144xH254x16s608xII512xII512x")
_CA_BODY: Final = 576
_CSV_BODY: Final = 1044
_SLOT_BYTES: Final = 520
_UID_BYTES: Final = 254
_NUMBER_PADDING: Final = bytes(40)


class KeyUsage(IntEnum):
    """Who a key is; the same numbers say in a slot who signed (csv-rs src/certs/mod.rs)."""

    HRK = 0x0000
    HSK = 0x0013
    INVALID = 0x1000
    OCA = 0x1001
    PEK = 0x1002
    PDH = 0x1003
    CEK = 0x1004


class KeyAlgorithm(IntEnum):
    """What a key is for. 1 to 3 are AMD's, listed by the headers and not seen on Hygon parts (inferred)."""

    NONE = 0
    RSA_SHA256 = 1
    ECDSA_SHA256 = 2
    ECDH_SHA256 = 3
    SM2_SA = 4
    SM2_DH = 5


def usage_name(usage: int) -> str:
    """"CEK" or, for a number nobody has named, "0x1234"."""
    return KeyUsage(usage).name if usage in KeyUsage._value2member_map_ else f"{usage:#06x}"


def algorithm_name(algorithm: int) -> str:
    """"SM2_SA" or, for a number nobody has named, "9"."""
    return KeyAlgorithm(algorithm).name if algorithm in KeyAlgorithm._value2member_map_ else str(algorithm)


class SignatureSlot(NamedTuple):
    """One signature of a CSV certificate.

    usage       KeyUsage of the signer; INVALID in an empty slot
    algorithm   KeyAlgorithm of the signature; NONE in an empty slot
    signature   64 bytes r||s, big-endian
    """

    usage: int
    algorithm: int
    signature: bytes

    @property
    def is_empty(self) -> bool:
        """csv-rs's rule: nobody that signs, or an algorithm that is none of SM2's."""
        return self.usage not in _SIGNERS or self.algorithm not in (KeyAlgorithm.SM2_SA, KeyAlgorithm.SM2_DH)


_SIGNERS: Final = frozenset((KeyUsage.HRK, KeyUsage.HSK, KeyUsage.OCA, KeyUsage.PEK, KeyUsage.CEK))


class _Certificate:
    """What both formats share: the bytes, and numbers read from them when first asked for."""

    __slots__ = ("_key", "_point", "_user_id", "_user_id_bytes", "encoded")

    KIND: str
    BYTES: int
    BODY_BYTES: int
    POINT_OFFSET: int
    UID_OFFSET: int
    RESERVED: tuple[tuple[int, int, str], ...]

    encoded: bytes
    _key: SM2PublicKey | None
    _point: bytes | None
    _user_id: bytes | None
    _user_id_bytes: int

    def _check_numbers(self, data: bytes) -> None:
        offset = self.POINT_OFFSET
        if data[offset + 32 : offset + 72] != _NUMBER_PADDING:
            from_field(data[offset : offset + FIELD_BYTES], self.KIND, "Qx", offset)
        if data[offset + 104 : offset + 144] != _NUMBER_PADDING:
            from_field(data[offset + FIELD_BYTES : offset + 2 * FIELD_BYTES], self.KIND, "Qy", offset + FIELD_BYTES)
        if self._user_id_bytes > _UID_BYTES:
            raise FormatError(self.KIND, "uid_len", self.UID_OFFSET - 2, str(self._user_id_bytes), f"0 to {_UID_BYTES}")

    @property
    def body(self) -> bytes:
        """The signed bytes."""
        return self.encoded[: self.BODY_BYTES]

    @property
    def point(self) -> bytes:
        """The public key, 64 bytes x||y big-endian; not checked to be on the curve (see public_key)."""
        point = self._point
        if point is None:
            point = self._point = _number_pair(self.encoded, self.POINT_OFFSET)
        return point

    @property
    def user_id(self) -> bytes:
        """The user id this key signs with: `uid_len` bytes of the area, which may be none."""
        user_id = self._user_id
        if user_id is None:
            user_id = self._user_id = self.encoded[self.UID_OFFSET : self.UID_OFFSET + self._user_id_bytes]
        return user_id

    @property
    def user_id_padding(self) -> bytes:
        """The rest of the 254-byte area, zero in every certificate seen."""
        return self.encoded[self.UID_OFFSET + self._user_id_bytes : self.UID_OFFSET + _UID_BYTES]

    @property
    def public_key(self) -> SM2PublicKey:
        """The key as an object, the same one each time (so that preparing it lasts).

        Raises FormatError when the point is not on the curve.
        """
        key = self._key
        if key is None:
            try:
                key = self._key = SM2PublicKey(self.point)
            except PointError:
                raise FormatError(
                    self.KIND, "public key", self.POINT_OFFSET, f"x = {self.point[:32].hex()} with a y that does not fit",
                    "a point of the SM2 curve",
                ) from None  # fmt: skip
        return key

    def __eq__(self, other: object) -> bool:
        return self.encoded == other.encoded if isinstance(other, type(self)) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.encoded)

    def __bytes__(self) -> bytes:
        return self.encoded


class CaCertificate(_Certificate):
    """HRK or HSK. Made by :meth:`parse` or :meth:`build`.

    version, key_usage (KeyUsage), curve_id: int; key_id, certifying_id: 16 bytes; encoded: 832 bytes
    """

    __slots__ = ("certifying_id", "curve_id", "key_id", "key_usage", "version")

    KIND = "CA certificate"
    BYTES = CA_BYTES
    BODY_BYTES = _CA_BODY
    POINT_OFFSET = 68
    UID_OFFSET = 214
    RESERVED = ((40, 64, "reserved1"), (468, 576, "reserved2"), (720, 832, "reserved3"))

    version: int
    key_id: bytes
    certifying_id: bytes
    key_usage: int
    curve_id: int

    @classmethod
    def parse(cls, data: Buffer) -> CaCertificate:
        """Reads 832 bytes. Raises FormatError (see the module), BufferTypeError."""
        encoded = _copied(data, cls.KIND, CA_BYTES)
        self = cls.__new__(cls)
        self.encoded = encoded
        self._key = self._point = self._user_id = None
        self.version, self.key_id, self.certifying_id, self.key_usage, self.curve_id, self._user_id_bytes = _CA.unpack(encoded)
        self._check_numbers(encoded)
        _check_signature(encoded, cls.KIND, "", _CA_BODY)
        return self

    @classmethod
    def build(
        cls,
        *,
        key_usage: int,
        key_id: bytes,
        certifying_id: bytes,
        point: bytes,
        user_id: bytes,
        version: int = 1,
        signature: bytes = bytes(64),
    ) -> CaCertificate:
        """A certificate of these values; its signature is zero unless given (:meth:`with_signature` makes one).

        In: key_id, certifying_id   16 bytes; point, signature  64 bytes big-endian; user_id  up to 254 bytes
        Raises LengthError.
        """
        _need(key_id, 16, "key_id")
        _need(certifying_id, 16, "certifying_id")
        encoded = b"".join(
            (
                version.to_bytes(4, "little"),
                key_id,
                certifying_id,
                key_usage.to_bytes(4, "little"),
                bytes(24),
                CURVE_SM2.to_bytes(4, "little"),
                _encoded_pair(point, "point"),
                _encoded_user_id(user_id),
                bytes(108),
                _encoded_pair(signature, "signature"),
                bytes(112),
            )
        )
        return cls.parse(encoded)

    def with_signature(self, signer: SM2PrivateKey, signer_user_id: bytes) -> CaCertificate:
        """The same certificate signed by `signer`, whose own certificate carries `signer_user_id`."""
        signature = _encoded_pair(signer.sign(self.body, user_id=signer_user_id), "signature")
        return self.parse(self.body + signature + self.encoded[_CA_BODY + len(signature) :])

    @property
    def usage(self) -> int:
        """key_usage under the name CSV certificates use."""
        return self.key_usage

    @property
    def signature(self) -> bytes:
        """64 bytes r||s, big-endian."""
        return _number_pair(self.encoded, _CA_BODY)

    @property
    def reserved(self) -> tuple[tuple[str, int, bytes], ...]:
        """Name, offset and bytes of each reserved area."""
        return tuple((name, start, self.encoded[start:stop]) for start, stop, name in self.RESERVED)

    def __repr__(self) -> str:
        return f"CaCertificate({usage_name(self.key_usage)}, key_id={self.key_id.hex()}, uid={shown(self.user_id)})"


class CsvCertificate(_Certificate):
    """CEK, PEK, OCA, PDH or a guest owner's DH key. Made by :meth:`parse` or :meth:`build`.

    version, api_major, api_minor, usage (KeyUsage), algorithm (KeyAlgorithm), curve_id: int
    issuer_id: 16 bytes ("sid": the HSK's key_id in a CEK, zero in the PEKs seen); encoded: 2084 bytes
    """

    __slots__ = (
        "_slot_words", "_slots", "algorithm", "api_major", "api_minor", "curve_id", "issuer_id", "usage", "version",
    )  # fmt: skip

    KIND = "CSV certificate"
    BYTES = CSV_BYTES
    BODY_BYTES = _CSV_BODY
    POINT_OFFSET = 20
    UID_OFFSET = 166
    RESERVED = (
        (6, 8, "reserved1"),
        (436, 1044, "reserved2"),
        (1196, 1564, "slot 1 reserved"),
        (1716, 2084, "slot 2 reserved"),
    )

    version: int
    api_major: int
    api_minor: int
    usage: int
    algorithm: int
    curve_id: int
    issuer_id: bytes
    _slot_words: tuple[int, int, int, int]
    _slots: tuple[SignatureSlot, SignatureSlot] | None

    @classmethod
    def parse(cls, data: Buffer) -> CsvCertificate:
        """Reads 2084 bytes. Raises FormatError (see the module), BufferTypeError.

        The numbers of a slot marked empty are not looked at: nothing is specified about them.
        """
        encoded = _copied(data, cls.KIND, CSV_BYTES)
        self = cls.__new__(cls)
        self.encoded = encoded
        self._key = self._point = self._user_id = self._slots = None
        (
            self.version, self.api_major, self.api_minor, self.usage, self.algorithm, self.curve_id,
            self._user_id_bytes, self.issuer_id, usage1, algorithm1, usage2, algorithm2,
        ) = _CSV.unpack(encoded)  # fmt: skip
        self._slot_words = (usage1, algorithm1, usage2, algorithm2)
        self._check_numbers(encoded)
        if usage1 != 0x1000:
            _check_signature(encoded, cls.KIND, "slot 1 ", 1052)
        if usage2 != 0x1000:
            _check_signature(encoded, cls.KIND, "slot 2 ", 1572)
        return self

    @classmethod
    def build(
        cls,
        *,
        usage: int,
        algorithm: int,
        point: bytes,
        user_id: bytes,
        api: tuple[int, int] = (1, 3),
        version: int = 1,
        issuer_id: bytes = bytes(16),
    ) -> CsvCertificate:
        """A certificate of these values with two empty slots (:meth:`with_signature` fills them).

        In: point   64 bytes big-endian; user_id  up to 254 bytes; api  firmware API (major, minor); issuer_id  16 bytes
        Raises LengthError.
        """
        _need(issuer_id, 16, "issuer_id")
        body = b"".join(
            (
                version.to_bytes(4, "little"),
                bytes(api),
                bytes(2),
                usage.to_bytes(4, "little"),
                algorithm.to_bytes(4, "little"),
                CURVE_SM2.to_bytes(4, "little"),
                _encoded_pair(point, "point"),
                _encoded_user_id(user_id),
                issuer_id,
                bytes(608),
            )
        )
        return cls.parse(body + 2 * _EMPTY_SLOT)

    def with_signature(self, slot: int, signer: SM2PrivateKey, signer_usage: int, signer_user_id: bytes) -> CsvCertificate:
        """The same certificate with slot 1 or 2 signed by `signer`, whose certificate has that usage and that user id."""
        return self.with_slot(
            slot, SignatureSlot(signer_usage, KeyAlgorithm.SM2_SA, signer.sign(self.body, user_id=signer_user_id))
        )

    def with_empty_slot(self, slot: int) -> CsvCertificate:
        """The same certificate with slot 1 or 2 empty: usage INVALID, the rest zero."""
        return self._with_slot_bytes(slot, _EMPTY_SLOT)

    def with_slot(self, slot: int, value: SignatureSlot) -> CsvCertificate:
        """The same certificate with `value` in slot 1 or 2."""
        words = value.usage.to_bytes(4, "little") + value.algorithm.to_bytes(4, "little")
        return self._with_slot_bytes(slot, words + _encoded_pair(value.signature, "signature") + bytes(368))

    def _with_slot_bytes(self, slot: int, content: bytes) -> CsvCertificate:
        if slot not in (1, 2):
            raise ArgumentError(f"slot: {slot}; expected 1 or 2")
        start = _CSV_BODY + (slot - 1) * _SLOT_BYTES
        return self.parse(self.encoded[:start] + content + self.encoded[start + _SLOT_BYTES :])

    @property
    def slots(self) -> tuple[SignatureSlot, SignatureSlot]:
        """Slot 1 and slot 2."""
        slots = self._slots
        if slots is None:
            usage1, algorithm1, usage2, algorithm2 = self._slot_words
            slots = self._slots = (
                SignatureSlot(usage1, algorithm1, _number_pair(self.encoded, 1052)),
                SignatureSlot(usage2, algorithm2, _number_pair(self.encoded, 1572)),
            )
        return slots

    @property
    def reserved(self) -> tuple[tuple[str, int, bytes], ...]:
        """Name, offset and bytes of each reserved area."""
        return tuple((name, start, self.encoded[start:stop]) for start, stop, name in self.RESERVED)

    def __repr__(self) -> str:
        api = f"{self.api_major}.{self.api_minor}"
        return f"CsvCertificate({usage_name(self.usage)}, api={api}, uid={shown(self.user_id)}, x={self.point[:8].hex()}...)"


_EMPTY_SLOT: Final = KeyUsage.INVALID.to_bytes(4, "little") + bytes(516)


def _copied(data: Buffer, structure: str, length: int) -> bytes:
    if type(data) is not bytes:
        # bytes() alone would also take an iterable, and a number as a length.
        try:
            data = bytes(memoryview(data))
        except (TypeError, BufferError):
            raise BufferTypeError(f"{structure}: {type(data).__name__}; expected a bytes-like object") from None
    if len(data) != length:
        raise FormatError(structure, "length", None, f"{len(data)} bytes", f"{length} bytes")
    return data


def _check_signature(data: bytes, structure: str, prefix: str, offset: int) -> None:
    if data[offset + 32 : offset + 72] != _NUMBER_PADDING or data[offset + 104 : offset + 144] != _NUMBER_PADDING:
        from_field(data[offset : offset + FIELD_BYTES], structure, prefix + "r", offset)
        from_field(data[offset + FIELD_BYTES : offset + 2 * FIELD_BYTES], structure, prefix + "s", offset + FIELD_BYTES)


def _number_pair(data: bytes, offset: int) -> bytes:
    return data[offset + 31 : offset - 1 : -1] + data[offset + 103 : offset + 71 : -1]


def _encoded_pair(value: bytes, name: str) -> bytes:
    _need(value, 64, name)
    return to_field(value[:32]) + to_field(value[32:])


def _encoded_user_id(user_id: bytes) -> bytes:
    if len(user_id) > _UID_BYTES:
        raise LengthError(f"user_id: {len(user_id)} bytes; expected at most {_UID_BYTES}")
    return len(user_id).to_bytes(2, "little") + user_id.ljust(_UID_BYTES, b"\0")


def _need(value: bytes, length: int, name: str) -> None:
    if len(value) != length:
        raise LengthError(f"{name}: {len(value)} bytes; expected {length}")
