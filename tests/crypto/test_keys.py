"""Key files: every form is read back, every rule of the format is kept, hostile files are refused by field and offset."""

from __future__ import annotations

import base64
import hashlib
import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from reference import sm2 as model

from csvfast.crypto import (
    SM2PrivateKey,
    ciphertext_from_der,
    ciphertext_to_der,
    der,
    dump_private_key,
    dump_public_key,
    load_private_key,
    load_public_key,
    pbes2,
    signature_from_der,
    signature_to_der,
)
from csvfast.errors import (
    ArgumentError,
    AuthenticationError,
    BufferTypeError,
    CsvfastError,
    FormatError,
    KeyRangeError,
    LengthError,
)

D = bytes.fromhex("3945208f7b2144b13f36e38ac6d39f95889393692860b51a42fb81ef4df7c5b8")
KEY = SM2PrivateKey(D)
POINT = b"\x04" + KEY.public_key.point
EC = der.object_identifier("1.2.840.10045.2.1")
SM2 = der.object_identifier("1.2.156.10197.1.301")
P256 = der.object_identifier("1.2.840.10045.3.1.7")
RSA = der.object_identifier("1.2.840.113549.1.1.1")
VERSION_0, VERSION_1, VERSION_2 = der.integer(0), der.integer(1), der.integer(2)
BER_ZERO = b"\x02\x02\x00\x00"


@pytest.fixture(autouse=True)
def few_iterations(monkeypatch):
    """Encrypting takes a third of a second as it should; the tests do it often."""
    monkeypatch.setattr(pbes2, "ITERATIONS", 3)


def sec1(*parts: bytes, version: bytes = VERSION_1, secret: bytes = D) -> bytes:
    return der.sequence(version, der.octet_string(secret), *parts)


def public(point: bytes = POINT) -> bytes:
    return der.context(1, der.bit_string(point))


CURVE = der.context(0, SM2)


def pkcs8(inner: bytes, *, version: bytes = VERSION_0, algorithm: bytes = EC + SM2, extra: bytes = b"") -> bytes:
    return der.sequence(version, der.sequence(algorithm), der.octet_string(inner), extra)


def spki(algorithm: bytes = EC + SM2, point: bytes = POINT) -> bytes:
    return der.sequence(der.sequence(algorithm), der.bit_string(point))


class TestRoundTrip:
    @pytest.mark.parametrize("password", [None, b"p", "密码".encode(), bytes(range(256))])
    @pytest.mark.parametrize("encoding", ["pem", "der"])
    def test_private(self, encoding, password):
        written = dump_private_key(KEY, encoding=encoding, password=password)
        assert load_private_key(written, password).secret().equals(D)
        assert load_private_key(bytearray(written), password).public_key == KEY.public_key
        assert (D in written) == (encoding == "der" and password is None)

    @pytest.mark.parametrize("encoding", ["pem", "der"])
    def test_sec1_and_public(self, encoding):
        assert load_private_key(dump_private_key(KEY, encoding=encoding, format="sec1")).secret().equals(D)
        assert load_public_key(dump_public_key(KEY.public_key, encoding=encoding)) == KEY.public_key

    @given(d=st.integers(1, model.N - 2))
    def test_any_key(self, d):
        key = SM2PrivateKey(model.number(d))
        for form in ("pkcs8", "sec1"):
            assert load_private_key(dump_private_key(key, format=form)).secret().equals(model.number(d))

    def test_the_bytes_are_what_the_standards_say(self):
        assert dump_private_key(KEY, encoding="der") == pkcs8(sec1(public()))
        assert dump_private_key(KEY, encoding="der", format="sec1") == sec1(CURVE, public())
        assert dump_public_key(KEY.public_key, encoding="der") == spki()
        lines = dump_private_key(KEY).split(b"\n")
        assert lines[0] == b"-----BEGIN PRIVATE KEY-----"
        assert lines[-2:] == [b"-----END PRIVATE KEY-----", b""]
        assert {len(line) for line in lines[1:-3]} == {64}
        assert base64.b64decode(b"".join(lines[1:-2])) == pkcs8(sec1(public()))

    def test_encryption_is_salted(self):
        assert dump_private_key(KEY, password=b"p") != dump_private_key(KEY, password=b"p")

    def test_iterations_are_what_the_documentation_says(self, monkeypatch):
        monkeypatch.undo()
        written = dump_private_key(KEY, encoding="der", password=b"p")
        assert der.integer(600_000) in written
        assert load_private_key(written, b"p").secret().equals(D)


ACCEPTED = {
    "SEC1": sec1(CURVE, public()),
    "SEC1 without its public key": sec1(CURVE),
    "SEC1, compressed": sec1(CURVE, public(bytes([2 + POINT[64] % 2]) + POINT[1:33])),
    "PKCS#8": pkcs8(sec1(public())),
    "PKCS#8 without the public key": pkcs8(sec1()),
    "PKCS#8 with the curve inside too": pkcs8(sec1(CURVE, public())),
    "PKCS#8 with SM2 as its algorithm": pkcs8(sec1(public()), algorithm=SM2),
    "PKCS#8 with SM2 and NULL": pkcs8(sec1(public()), algorithm=SM2 + der.null()),
    "PKCS#8 with SM2 twice": pkcs8(sec1(public()), algorithm=SM2 + SM2),
    "PKCS#8 with attributes": pkcs8(sec1(), extra=der.context(0, der.sequence())),
    "PKCS#8 version 1": pkcs8(sec1(public()), version=VERSION_1),
}

REFUSED = {
    "nothing": (b"", "file"),
    "a number": (VERSION_1, "file"),
    "empty SEQUENCE": (der.sequence(), "version"),
    "only a version": (der.sequence(VERSION_0), "privateKeyAlgorithm"),
    "trailing byte": (pkcs8(sec1()) + b"\0", "PrivateKeyInfo"),
    "trailing newline": (sec1(CURVE) + b"\n", "PrivateKeyInfo"),
    "cut": (pkcs8(sec1())[:-1], "PrivateKeyInfo"),
    "version 2": (pkcs8(sec1(), version=VERSION_2), "version"),
    "version in two bytes": (pkcs8(sec1(), version=BER_ZERO), "version"),
    "negative version": (pkcs8(sec1(), version=b"\x02\x01\xff"), "version"),
    "huge version": (pkcs8(sec1(), version=der.integer(1 << 40)), "version"),
    "SEC1 version 0": (sec1(CURVE, version=VERSION_0), "version"),
    "SEC1 version 2 inside": (pkcs8(sec1(version=VERSION_2)), "ECPrivateKey version"),
    "SEC1 without a curve": (sec1(public()), "parameters"),
    "SEC1 on P-256": (sec1(der.context(0, P256)), "parameters"),
    "SEC1 on a curve of numbers": (sec1(der.context(0, der.sequence(VERSION_1))), "parameters"),
    "SEC1 with two curves": (sec1(der.context(0, SM2 + SM2)), "parameters"),
    "P-256": (pkcs8(sec1(), algorithm=EC + P256), "privateKeyAlgorithm parameters"),
    "RSA": (pkcs8(sec1(), algorithm=RSA + der.null()), "privateKeyAlgorithm"),
    "no parameters": (pkcs8(sec1(), algorithm=EC), "privateKeyAlgorithm parameters"),
    "too many parameters": (pkcs8(sec1(), algorithm=EC + SM2 + der.null()), "privateKeyAlgorithm"),
    "NULL with content": (pkcs8(sec1(), algorithm=SM2 + b"\x05\x01\x00"), "privateKeyAlgorithm parameters"),
    "P-256 inside": (pkcs8(sec1(der.context(0, P256))), "parameters"),
    "31 bytes of key": (pkcs8(sec1(secret=D[:31])), "privateKey"),
    "33 bytes of key": (pkcs8(sec1(secret=b"\0" + D)), "privateKey"),
    "no bytes of key": (pkcs8(sec1(secret=b"")), "privateKey"),
    "another public key": (pkcs8(sec1(public(b"\x04" + model.encode(model.G)))), "publicKey"),
    "the negated public key": (
        pkcs8(sec1(public(b"\x04" + model.encode(model.negate(model.decode(POINT[1:])))))),
        "publicKey",
    ),
    "a public key off the curve": (pkcs8(sec1(public(POINT[:-1] + b"\0"))), "publicKey"),
    "x || y as the public key": (pkcs8(sec1(public(POINT[1:]))), "publicKey"),
    "infinity as the public key": (pkcs8(sec1(public(b"\0"))), "publicKey"),
    "empty public key": (pkcs8(sec1(der.context(1, b"\x03\x01\x00"))), "publicKey"),
    "BIT STRING without content": (pkcs8(sec1(der.context(1, b"\x03\x00"))), "publicKey"),
    "BIT STRING with unused bits": (pkcs8(sec1(der.context(1, b"\x03\x42\x01" + POINT))), "publicKey"),
    "two public keys": (pkcs8(sec1(public(), public())), "ECPrivateKey"),
    "two points": (pkcs8(sec1(der.context(1, der.bit_string(POINT) + der.null()))), "publicKey"),
    "something after SEC1": (pkcs8(sec1() + b"\0"), "ECPrivateKey"),
    "something after the key": (pkcs8(sec1(), extra=der.null()), "PrivateKeyInfo"),
    "a public key of PKCS#8 version 1": (
        pkcs8(sec1(), version=VERSION_1, extra=b"\x81\x42\x00" + POINT),
        "publicKey",
    ),
    "indefinite length": (b"\x30\x80" + pkcs8(sec1())[2:] + b"\0\0", "PrivateKeyInfo"),
    "long length": (b"\x30\x82\x00" + pkcs8(sec1(public()))[2:], "PrivateKeyInfo"),
    "an identifier with a leading zero": (pkcs8(sec1(), algorithm=b"\x06\x03\x2a\x80\x01"), "privateKeyAlgorithm"),
    "an identifier without an end": (pkcs8(sec1(), algorithm=b"\x06\x02\x2a\x81"), "privateKeyAlgorithm"),
    "an empty identifier": (pkcs8(sec1(), algorithm=b"\x06\x00"), "privateKeyAlgorithm"),
    "64 KiB and more": (der.sequence(bytes(1 << 16)), "file"),
}


class TestPrivateKeyDer:
    @pytest.mark.parametrize("name", ACCEPTED)
    def test_accepted(self, name):
        assert load_private_key(ACCEPTED[name]).secret().equals(D)

    @pytest.mark.parametrize("name", REFUSED)
    def test_refused(self, name):
        data, field = REFUSED[name]
        with pytest.raises(FormatError, match=r"^SM2 private key: .*found .*; expected ") as caught:
            load_private_key(data)
        assert caught.value.field == field
        assert caught.value.structure == "SM2 private key"
        if caught.value.offset is not None:
            assert 0 <= caught.value.offset <= len(data)

    def test_the_offset_points_at_the_byte(self):
        good = pkcs8(sec1(public()))
        for needle, replacement, field in (
            (SM2, P256, "privateKeyAlgorithm parameters"),
            (POINT, b"\x05" + POINT[1:], "publicKey"),
        ):
            at = good.index(needle)
            bad = good[:at] + replacement + good[at + len(needle) :]
            with pytest.raises(FormatError) as caught:
                load_private_key(bad)
            assert (caught.value.field, caught.value.offset) == (field, at)

    @pytest.mark.parametrize("d", [0, model.N - 1, model.N, 2**256 - 1])
    def test_numbers_that_are_no_private_key(self, d):
        with pytest.raises(KeyRangeError):
            load_private_key(pkcs8(sec1(secret=model.number(d))))

    def test_every_flipped_bit_is_refused_or_the_same_key(self):
        """The public part guards the private part, the structure guards itself."""
        good = pkcs8(sec1(public()))
        for bit in range(8 * len(good)):
            data = bytearray(good)
            data[bit // 8] ^= 1 << bit % 8
            try:
                key = load_private_key(bytes(data))
            except (FormatError, ArgumentError):  # flipped into what looks encrypted: asks for a password
                continue
            # Version 1 instead of 0 is allowed.
            assert key.secret().equals(D)
            assert bit == 8 * good.index(VERSION_0) + 16

    def test_every_prefix_is_refused(self):
        good = pkcs8(sec1(public()))
        for length in range(len(good)):
            with pytest.raises(FormatError):
                load_private_key(good[:length])


class TestPublicKeyDer:
    @pytest.mark.parametrize("algorithm", [EC + SM2, SM2, SM2 + der.null(), SM2 + SM2])
    def test_accepted(self, algorithm):
        assert load_public_key(spki(algorithm)) == KEY.public_key
        assert load_public_key(spki(algorithm, bytes([2 + POINT[64] % 2]) + POINT[1:33])) == KEY.public_key

    @pytest.mark.parametrize(
        ("data", "field"),
        [
            (b"", "file"),
            (spki() + b"\0", "SubjectPublicKeyInfo"),
            (spki(EC + P256), "algorithm parameters"),
            (spki(RSA + der.null()), "algorithm"),
            (spki(EC), "algorithm parameters"),
            (spki(point=POINT[1:]), "publicKey"),
            (spki(point=POINT + b"\0"), "publicKey"),
            (spki(point=b"\x04" + bytes(64)), "publicKey"),
            (spki(point=POINT[:-1] + b"\0"), "publicKey"),
            (spki(point=b""), "publicKey"),
            (der.sequence(der.sequence(EC + SM2), der.octet_string(POINT)), "publicKey"),
            (der.sequence(der.sequence(EC + SM2), der.bit_string(POINT), der.null()), "SubjectPublicKeyInfo"),
        ],
    )
    def test_refused(self, data, field):
        with pytest.raises(FormatError, match=r"^SM2 public key: ") as caught:
            load_public_key(data)
        assert caught.value.field == field

    def test_every_flipped_bit_is_refused_or_another_key(self):
        good = spki()
        for bit in range(8 * len(good)):
            data = bytearray(good)
            data[bit // 8] ^= 1 << bit % 8
            with pytest.raises(FormatError):
                load_public_key(data)

    def test_a_private_key_is_no_public_key(self):
        with pytest.raises(FormatError):
            load_public_key(dump_private_key(KEY, encoding="der"))
        with pytest.raises(FormatError, match="PEM label"):
            load_public_key(dump_private_key(KEY))
        with pytest.raises(FormatError, match="PEM label"):
            load_private_key(dump_public_key(KEY.public_key))


class TestPem:
    good = dump_private_key(KEY)

    def test_accepted(self):
        for data in (
            self.good.replace(b"\n", b"\r\n"),
            b"Bag Attributes\n    friendlyName: x\n" + self.good + b"trailing text\n",
            b"-----BEGIN SM2 PARAMETERS-----\nBggqgRzPVQGCLQ==\n-----END SM2 PARAMETERS-----\n" + self.good,
            self.good.rstrip(b"\n"),
            b"".join(self.good.partition(b"KEY-----\n")[:2])
            + self.good.partition(b"KEY-----\n")[2].replace(b"M", b"\nM", 1),
        ):
            assert load_private_key(data).secret().equals(D)

    @pytest.mark.parametrize(
        "data",
        [
            good[:-30],
            good.replace(b"-----END PRIVATE KEY-----", b"-----END PUBLIC KEY-----"),
            good.replace(b"PRIVATE KEY", b"RSA PRIVATE KEY"),
            good + good,
            good.replace(b"MIG", b"MI!"),
            good.replace(b"MIG", b"M=G"),
            good.replace(b"KEY-----\n", b"KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\n", 1),
            b"-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n",
            b"-----BEGIN PRIVATE KEY-----",
            b"-----BEGIN " * 1000,
            good + bytes(1 << 16),
        ],
        ids=itertools.count(),
    )
    def test_refused(self, data):
        with pytest.raises(FormatError, match=r"^SM2 private key: "):
            load_private_key(data)

    def test_old_encryption_is_refused_by_name(self):
        header = b"KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00112233\n\n"
        with pytest.raises(FormatError, match=r"old encryption of OpenSSL.*expected no encryption, or PKCS#8's"):
            load_private_key(self.good.replace(b"KEY-----\n", header, 1), b"p")

    def test_label_does_not_decide_the_form(self):
        """What the bytes are is read from the bytes: OpenSSL itself has written SEC1 under three labels."""
        body = dump_private_key(KEY, format="sec1").replace(b"EC PRIVATE", b"SM2 PRIVATE")
        assert load_private_key(body).secret().equals(D)


class TestPasswords:
    sealed_p = None

    def test_wrong(self):
        written = dump_private_key(KEY, password=b"right")
        for number in range(300):  # enough for padding that looks right by chance
            with pytest.raises(AuthenticationError, match="wrong password"):
                load_private_key(written, b"wrong %d" % number)
        with pytest.raises(AuthenticationError):
            load_private_key(written, b"")

    def test_missing_and_superfluous(self):
        with pytest.raises(ArgumentError, match="a password is needed"):
            load_private_key(dump_private_key(KEY, password=b"p"))
        with pytest.raises(ArgumentError, match="not encrypted"):
            load_private_key(dump_private_key(KEY), b"p")
        with pytest.raises(ArgumentError, match="at least 1 byte"):
            dump_private_key(KEY, password=b"")
        with pytest.raises(ArgumentError, match="pkcs8"):
            dump_private_key(KEY, format="sec1", password=b"p")

    def test_every_damage_of_the_ciphertext_is_noticed(self):
        written = dump_private_key(KEY, encoding="der", password=b"p")
        for at in range(len(written) - 160, len(written)):
            data = bytearray(written)
            data[at] ^= 0x10
            with pytest.raises(CsvfastError):
                load_private_key(data, b"p")

    def test_padding_is_checked_to_its_first_byte(self):
        """The last byte says how long it is; the others must say the same."""
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        plain = pkcs8(sec1())
        count = 16 - len(plain) % 16
        assert count >= 2
        key = hashlib.pbkdf2_hmac("sha256", b"p", b"salt", 2, 32)

        def sealed(padding: bytes) -> bytes:
            return encrypted(sealed=Cipher(algorithms.AES(key), modes.CBC(bytes(16))).encryptor().update(plain + padding))

        assert load_private_key(sealed(bytes([count]) * count), b"p").public_key == KEY.public_key
        for padding in (bytes(count - 1) + bytes([count]), bytes([count ^ 1]) + bytes([count]) * (count - 1)):
            with pytest.raises(AuthenticationError, match="wrong password"):
                load_private_key(sealed(padding), b"p")

    def test_a_foreign_key_under_the_right_password_is_named(self):
        sealed = pbes2.encrypt(bytearray(pkcs8(sec1(), algorithm=EC + P256)), b"p")
        with pytest.raises(FormatError, match="privateKeyAlgorithm parameters"):
            load_private_key(sealed, b"p")

    @pytest.mark.parametrize(
        ("old", "new", "field"),
        [
            ("1.2.840.113549.1.5.13", "1.2.840.113549.1.5.10", "encryptionAlgorithm"),
            ("1.2.840.113549.1.5.12", "1.2.840.113549.1.5.11", "keyDerivationFunc"),
            ("1.2.840.113549.2.9", "1.2.840.113549.2.5", "prf"),
            ("2.16.840.1.101.3.4.1.42", "2.16.840.1.101.3.4.1.41", "encryptionScheme"),
        ],
    )
    def test_other_schemes_are_refused_by_name(self, old, new, field):
        written = dump_private_key(KEY, encoding="der", password=b"p")
        assert der.object_identifier(old) in written
        with pytest.raises(FormatError) as caught:
            load_private_key(written.replace(der.object_identifier(old), der.object_identifier(new)), b"p")
        assert caught.value.field == field
        assert new in caught.value.found

    @pytest.mark.parametrize("iterations", [0, 2_000_001, 1 << 31])
    def test_iterations_are_bounded(self, monkeypatch, iterations):
        derived = []
        monkeypatch.setattr(pbes2, "_cipher", lambda *arguments: derived.append(arguments))
        scheme = encrypted(iterations=der.integer(iterations))
        with pytest.raises(FormatError) as caught:
            load_private_key(scheme, b"p")
        assert caught.value.field == "iterationCount"
        assert derived == []

    @pytest.mark.parametrize(
        ("changes", "field"),
        [
            ({"salt": b""}, "salt"),
            ({"salt": bytes(1025)}, "salt"),
            ({"key_length": der.integer(16)}, "keyLength"),
            ({"iv": bytes(15)}, "iv"),
            ({"sealed": b""}, "encryptedData"),
            ({"sealed": bytes(17)}, "encryptedData"),
            ({"tail": der.null()}, "encryptedData"),
            ({"prf": der.null()}, "prf"),
        ],
    )
    def test_parameters_are_checked(self, changes, field):
        with pytest.raises(FormatError) as caught:
            load_private_key(encrypted(**changes), b"p")
        assert caught.value.field == field

    def test_defaults_of_the_standard(self):
        """No PRF means HMAC-SHA-1; a key length that fits may stand there."""
        import hashlib

        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        plain = pkcs8(sec1(public()))
        padding = 16 - len(plain) % 16
        key = hashlib.pbkdf2_hmac("sha1", b"p", b"salt", 2, 32)
        sealed = (
            Cipher(algorithms.AES(key), modes.CBC(bytes(16))).encryptor().update(plain + bytes([padding]) * padding)
        )
        for key_length in (b"", der.integer(32)):
            data = encrypted(sealed=sealed, prf=b"", key_length=key_length, iterations=der.integer(2))
            assert load_private_key(data, b"p").secret().equals(D)


def encrypted(
    *,
    salt: bytes = b"salt",
    iterations: bytes = VERSION_2,
    key_length: bytes = b"",
    prf: bytes | None = None,
    iv: bytes = bytes(16),
    sealed: bytes = bytes(32),
    tail: bytes = b"",
) -> bytes:
    oid = der.object_identifier
    prf = der.sequence(oid("1.2.840.113549.2.9"), der.null()) if prf is None else prf
    derivation = der.sequence(
        oid("1.2.840.113549.1.5.12"), der.sequence(der.octet_string(salt), iterations, key_length, prf)
    )
    scheme = der.sequence(derivation, der.sequence(oid("2.16.840.1.101.3.4.1.42"), der.octet_string(iv)))
    return der.sequence(der.sequence(oid("1.2.840.113549.1.5.13"), scheme), der.octet_string(sealed), tail)


class TestCiphertextDer:
    raw = KEY.public_key.encrypt(b"secret")

    def test_small_coordinates(self):
        raw = b"\x04" + bytes(31) + b"\x01" + bytes(31) + b"\x80" + bytes(32) + b"\xff"
        encoded = ciphertext_to_der(raw)
        assert encoded == der.sequence(
            der.integer(1), b"\x02\x02\x00\x80", der.octet_string(bytes(32)), b"\x04\x01\xff"
        )
        assert ciphertext_from_der(encoded) == raw

    @pytest.mark.parametrize("length", [1, 30, 31, 200, 70000])
    def test_long_lengths(self, length):
        raw = self.raw[:97] + bytes(length)
        assert ciphertext_from_der(ciphertext_to_der(raw)) == raw

    @pytest.mark.parametrize(
        ("parts", "field"),
        [
            ((), "x"),
            ((der.integer(1),), "y"),
            ((der.integer(1), der.integer(2)), "C3"),
            ((der.integer(1), der.integer(2), der.octet_string(bytes(32))), "C2"),
            ((der.integer(1), der.integer(2), der.octet_string(bytes(31)), der.octet_string(b"a")), "C3"),
            ((der.integer(1), der.integer(2), der.octet_string(bytes(32)), der.octet_string(b"")), "C2"),
            ((der.integer(1 << 256), der.integer(2), der.octet_string(bytes(32)), der.octet_string(b"a")), "x"),
            ((b"\x02\x01\xff", der.integer(2), der.octet_string(bytes(32)), der.octet_string(b"a")), "x"),
            ((der.integer(1), b"\x02\x02\x00\x01", der.octet_string(bytes(32)), der.octet_string(b"a")), "y"),
            ((der.integer(1), der.integer(2), der.octet_string(b"a"), der.octet_string(bytes(32))), "C3"),
            (
                (der.integer(1), der.integer(2), der.octet_string(bytes(32)), der.octet_string(b"a"), der.null()),
                "ciphertext",
            ),
        ],
    )
    def test_refused(self, parts, field):
        with pytest.raises(FormatError, match=r"^SM2 ciphertext: ") as caught:
            ciphertext_from_der(der.sequence(*parts))
        assert caught.value.field == field

    def test_trailing_byte(self):
        with pytest.raises(FormatError, match="1 more bytes"):
            ciphertext_from_der(ciphertext_to_der(self.raw) + b"\0")


def mutated(good: bytes) -> st.SearchStrategy[bytes]:
    """Good bytes with a few of them changed, cut out or doubled."""

    def apply(changes: list[tuple[int, int, bytes]]) -> bytes:
        data = bytearray(good)
        for at, length, replacement in changes:
            data[at % (len(data) + 1) : at % (len(data) + 1) + length] = replacement
        return bytes(data)

    change = st.tuples(st.integers(0, 300), st.integers(0, 4), st.binary(max_size=4))
    return st.lists(change, max_size=4).map(apply)


class TestFuzz:
    """Whatever comes in, a FormatError or its kin comes out, and what is accepted is written back as it was."""

    @given(
        data=st.binary(max_size=300)
        | mutated(pkcs8(sec1(public())))
        | mutated(sec1(CURVE, public()))
        | mutated(TestPem.good)
    )
    @example(data=b"\x30\x00")
    @example(data=b"-----BEGIN PRIVATE KEY-----\n\n-----END PRIVATE KEY-----")
    def test_private_keys(self, data):
        try:
            key = load_private_key(data)
        except (FormatError, KeyRangeError):
            return
        except ArgumentError as problem:
            refusal = str(problem)
        else:
            assert load_private_key(dump_private_key(key)).public_key == key.public_key
            return
        assert "password is needed" in refusal

    @given(data=mutated(encrypted()))
    def test_encrypted_private_keys(self, data):
        try:
            load_private_key(data, b"p")
        except (FormatError, AuthenticationError):
            return
        except ArgumentError as problem:
            refusal = str(problem)
        else:
            refusal = "zeros decrypted to a key"
        assert "not encrypted" in refusal

    @given(data=st.binary(max_size=200) | mutated(spki()))
    def test_public_keys(self, data):
        try:
            key = load_public_key(data)
        except FormatError:
            return
        assert load_public_key(dump_public_key(key, encoding="der")) == key

    @given(data=st.binary(max_size=100) | mutated(der.sequence(der.integer(1 << 255), der.integer(77))))
    def test_signatures(self, data):
        from csvfast.crypto import signature_to_der

        try:
            raw = signature_from_der(data)
        except FormatError as problem:
            place = problem.offset
        else:
            assert signature_to_der(raw) == data  # DER has one encoding for each value
            return
        assert place is not None
        assert 0 <= place <= len(data)

    @given(data=st.binary(max_size=200) | mutated(ciphertext_to_der(TestCiphertextDer.raw)))
    def test_ciphertexts(self, data):
        try:
            raw = ciphertext_from_der(data)
        except FormatError:
            return
        assert ciphertext_to_der(raw) == data


def test_arguments():
    with pytest.raises(ArgumentError, match="'text'"):
        dump_private_key(KEY, encoding="text")
    with pytest.raises(ArgumentError, match="'pkcs1'"):
        dump_private_key(KEY, format="pkcs1")
    with pytest.raises(ArgumentError, match="'raw'"):
        dump_public_key(KEY.public_key, encoding="raw")
    with pytest.raises(LengthError):
        ciphertext_to_der(b"")


@pytest.mark.parametrize("value", [None, 64, 98, 10**12, "text", [48, 0], object()], ids=repr)
def test_what_is_no_buffer(value):
    """bytes() would make zeros of a number, and run out of memory on the way."""
    for read in (
        load_private_key, load_public_key, signature_to_der, signature_from_der, ciphertext_to_der, ciphertext_from_der,
    ):  # fmt: skip
        with pytest.raises(BufferTypeError, match=f"must be a bytes-like object, not {type(value).__name__}"):
            read(value)


def test_passwords_are_bytes():
    sealed = dump_private_key(KEY, password=b"word")
    for call in (lambda: load_private_key(sealed, "word"), lambda: dump_private_key(KEY, password="word")):
        with pytest.raises(BufferTypeError, match="password must be bytes, not str"):
            call()
    assert load_private_key(sealed, bytearray(b"word")).public_key == KEY.public_key


def test_lengths_end_with_their_level():
    """An element that stays inside the file but reaches out of the SEQUENCE it stands in."""
    reader = der.Reader(bytes.fromhex("3003020201" + "05"), "x").sequence("outer")
    with pytest.raises(FormatError, match="found a length of 2 bytes; expected at most the 1 that follow") as caught:
        reader.unsigned("number", 4)
    assert caught.value.offset == 3
    for head in ("3081020101", "3082000302010100"):
        with pytest.raises(FormatError, match="the shortest form"):
            der.Reader(bytes.fromhex(head), "x").sequence("outer")


def test_object_identifiers():
    for dotted, content in (
        ("1.2.156.10197.1.301", "2a811ccf5501822d"),
        ("2.999.3", "883703"),
        ("0.9.2342", "099226"),
        ("1.2.840.10045.2.1", "2a8648ce3d0201"),
    ):
        encoded = der.object_identifier(dotted)
        assert encoded[2:].hex() == content
        assert der.Reader(encoded, "x").object_identifier("oid") == (dotted, 0)
