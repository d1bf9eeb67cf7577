"""SM2 both ways with the openssl program: key files, signatures, ciphertexts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from csvfast.crypto import (
    DEFAULT_USER_ID,
    SM2PrivateKey,
    ciphertext_from_der,
    ciphertext_to_der,
    dump_private_key,
    dump_public_key,
    load_private_key,
    load_public_key,
    pbes2,
    signature_from_der,
    signature_to_der,
)
from csvfast.errors import AuthenticationError, FormatError, SignatureError

PROGRAM = shutil.which("openssl")
if PROGRAM is None:
    pytest.skip("the openssl program is not installed", allow_module_level=True)


def openssl(*arguments: object, ok: bool = True, data: bytes = b"") -> bytes:
    done = subprocess.run([PROGRAM, *map(str, arguments)], input=data, capture_output=True, timeout=60, check=False)
    assert (done.returncode == 0) == ok, done.stderr.decode(errors="replace")
    return done.stdout


def works_with_sm2() -> bool:
    shown = subprocess.run([PROGRAM, "version"], capture_output=True, text=True, timeout=60, check=True).stdout
    if int(re.match(r"\w+ (\d+)", shown)[1]) < 3:
        return False
    made = [PROGRAM, "genpkey", "-algorithm", "SM2"]
    return subprocess.run(made, capture_output=True, timeout=60, check=False).returncode == 0


if not works_with_sm2():
    pytest.skip("the openssl program is older than 3.0 or built without SM2", allow_module_level=True)


@pytest.fixture
def key() -> SM2PrivateKey:
    return SM2PrivateKey.generate()


@pytest.fixture
def files(tmp_path: Path, key: SM2PrivateKey) -> Path:
    """A folder with our key in private.pem and public.pem and a message."""
    (tmp_path / "private.pem").write_bytes(dump_private_key(key))
    (tmp_path / "public.pem").write_bytes(dump_public_key(key.public_key))
    (tmp_path / "message").write_bytes(os.urandom(1000))
    return tmp_path


GENERATORS = {
    "genpkey SM2": ("genpkey", "-algorithm", "SM2"),
    "genpkey EC": ("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:SM2"),
    "ecparam": ("ecparam", "-name", "SM2", "-genkey", "-noout"),
    "ecparam with parameters": ("ecparam", "-name", "SM2", "-genkey"),
}


class TestKeyFiles:
    @pytest.mark.parametrize("generator", GENERATORS)
    def test_keys_of_openssl(self, tmp_path, generator):
        path = tmp_path / "key.pem"
        path.write_bytes(openssl(*GENERATORS[generator]))
        ours = load_private_key(path.read_bytes())
        text = openssl("pkey", "-in", path, "-noout", "-text").decode()
        shown = [
            bytes.fromhex(re.sub(r"[^0-9a-f]", "", part))
            for part in re.findall(r"(?:priv|pub):((?:\s+[0-9a-f:]+\n)+)", text)
        ]
        assert ours.secret().equals(shown[0].rjust(32, b"\0"))
        assert b"\x04" + ours.public_key.point == shown[1]
        for form in ("PEM", "DER"):
            public = openssl("pkey", "-in", path, "-pubout", "-outform", form)
            assert load_public_key(public) == ours.public_key
            assert dump_public_key(ours.public_key, encoding=form.lower()) == public
            private = openssl("pkey", "-in", path, "-outform", form)
            assert load_private_key(private).public_key == ours.public_key
            # The same bytes, not only readable ones.
            wrapped = openssl("pkcs8", "-topk8", "-nocrypt", "-in", path, "-outform", form)
            assert dump_private_key(ours, encoding=form.lower()) == wrapped
            sec1 = openssl("ec", "-in", path, "-outform", form)
            assert load_private_key(sec1).public_key == ours.public_key
            if form == "DER":
                assert dump_private_key(ours, encoding="der", format="sec1") == sec1
            compressed = openssl("ec", "-in", path, "-pubout", "-conv_form", "compressed", "-outform", form)
            assert load_public_key(compressed) == ours.public_key

    @pytest.mark.parametrize("encoding", ["pem", "der"])
    @pytest.mark.parametrize("form", ["pkcs8", "sec1"])
    def test_openssl_reads_ours(self, tmp_path, key, encoding, form):
        path = tmp_path / "key"
        path.write_bytes(dump_private_key(key, encoding=encoding, format=form))
        program = "ec" if form == "sec1" else "pkey"
        assert openssl(program, "-in", path, "-inform", encoding, "-pubout") == dump_public_key(key.public_key)
        assert b"Key is valid" in openssl("pkey", "-in", path, "-inform", encoding, "-check", "-noout")

    @pytest.mark.parametrize("encoding", ["pem", "der"])
    def test_openssl_reads_our_encrypted_files(self, tmp_path, key, encoding):
        path = tmp_path / "key"
        path.write_bytes(dump_private_key(key, encoding=encoding, password=b"pass word"))
        out = openssl("pkey", "-in", path, "-inform", encoding, "-passin", "pass:pass word", "-pubout")
        assert out == dump_public_key(key.public_key)
        openssl("pkey", "-in", path, "-inform", encoding, "-passin", "pass:other", "-pubout", ok=False)

    @pytest.mark.parametrize("prf", ["hmacWithSHA1", "hmacWithSHA256", "hmacWithSHA384", "hmacWithSHA512"])
    @pytest.mark.parametrize("cipher", ["aes-128-cbc", "aes-192-cbc", "aes-256-cbc", "sm4-cbc"])
    def test_encrypted_files_of_openssl(self, files, key, cipher, prf):
        sealed = openssl(
            "pkcs8", "-topk8", "-in", files / "private.pem", "-v2", cipher, "-v2prf", prf, "-passout", "pass:abc"
        )
        assert b"BEGIN ENCRYPTED PRIVATE KEY" in sealed
        assert load_private_key(sealed, b"abc").public_key == key.public_key
        with pytest.raises(AuthenticationError):
            load_private_key(sealed, b"abd")

    def test_what_we_do_not_read_is_refused_by_name(self, files):
        private = files / "private.pem"
        old = openssl("ec", "-in", private, "-aes256", "-passout", "pass:abc")
        if b"Proc-Type" in old:
            with pytest.raises(FormatError, match="old encryption of OpenSSL"):
                load_private_key(old, b"abc")
        scrypt = openssl("pkcs8", "-topk8", "-in", private, "-scrypt", "-passout", "pass:abc")
        with pytest.raises(FormatError, match="keyDerivationFunc"):
            load_private_key(scrypt, b"abc")
        numbers = openssl("ecparam", "-name", "SM2", "-genkey", "-noout", "-param_enc", "explicit")
        with pytest.raises(FormatError, match="a curve given by its numbers"):
            load_private_key(numbers)
        p256 = openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")
        with pytest.raises(FormatError, match=r"found 1\.2\.840\.10045\.3\.1\.7"):
            load_private_key(p256)
        rsa = openssl("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:1024")
        with pytest.raises(FormatError, match=r"found 1\.2\.840\.113549\.1\.1\.1"):
            load_private_key(rsa)

    def test_iterations_of_ours(self, monkeypatch, key):
        """OpenSSL shows the parameters we mean to write."""
        monkeypatch.setattr(pbes2, "ITERATIONS", 4096)
        shown = openssl(
            "asn1parse", "-inform", "DER", data=dump_private_key(key, encoding="der", password=b"p")
        ).decode()
        for text in ("PBES2", "PBKDF2", "hmacWithSHA256", "aes-256-cbc", "INTEGER           :1000"):
            assert text in shown


IDS = [DEFAULT_USER_ID.decode(), "Alice", "HYGON-SSD-HRK", "x" * 300]


class TestSignatures:
    @pytest.mark.parametrize("user_id", IDS)
    def test_dgst(self, files, key, user_id):
        message, signature = (files / "message").read_bytes(), files / "signature"
        option = ("-sigopt", f"distid:{user_id}")
        theirs = openssl("dgst", "-sm3", *option, "-sign", files / "private.pem", files / "message")
        key.public_key.verify(signature_from_der(theirs), message, user_id=user_id.encode())
        with pytest.raises(SignatureError):
            key.public_key.verify(signature_from_der(theirs), message, user_id=b"somebody else")
        signature.write_bytes(signature_to_der(key.sign(message, user_id=user_id.encode())))
        verify = ("dgst", "-sm3", "-verify", files / "public.pem", "-signature", signature)
        assert b"Verified OK" in openssl(*verify, *option, files / "message")
        openssl(*verify, "-sigopt", "distid:somebody else", files / "message", ok=False)
        (files / "message").write_bytes(message + b"\0")
        openssl(*verify, *option, files / "message", ok=False)

    @pytest.mark.parametrize("user_id", IDS)
    def test_pkeyutl(self, files, key, user_id):
        message, signature = (files / "message").read_bytes(), files / "signature"
        common = ("-rawin", "-digest", "sm3", "-in", files / "message", "-pkeyopt", f"distid:{user_id}")
        theirs = openssl("pkeyutl", "-sign", "-inkey", files / "private.pem", *common)
        key.public_key.verify(signature_from_der(theirs), message, user_id=user_id.encode())
        signature.write_bytes(signature_to_der(key.sign(message, user_id=user_id.encode())))
        openssl("pkeyutl", "-verify", "-pubin", "-inkey", files / "public.pem", "-sigfile", signature, *common)

    def test_without_an_identity_openssl_means_the_empty_one(self, files, key):
        message = (files / "message").read_bytes()
        theirs = openssl("dgst", "-sm3", "-sign", files / "private.pem", files / "message")
        key.public_key.verify(signature_from_der(theirs), message, user_id=b"")
        with pytest.raises(SignatureError):
            key.public_key.verify(signature_from_der(theirs), message)

    def test_digests(self, files, key):
        """pkeyutl without -rawin signs e as it is given."""
        digest = os.urandom(32)
        (files / "digest").write_bytes(digest)
        theirs = openssl("pkeyutl", "-sign", "-inkey", files / "private.pem", "-in", files / "digest")
        key.public_key.verify_digest(signature_from_der(theirs), digest)
        (files / "signature").write_bytes(signature_to_der(key.sign_digest(digest)))
        arguments = ("-pubin", "-inkey", files / "public.pem", "-in", files / "digest", "-sigfile", files / "signature")
        openssl("pkeyutl", "-verify", *arguments)


def test_the_commands_of_the_documentation(tmp_path):
    page = Path(__file__).parents[2] / "docs" / "sm2.md"
    if not page.is_file():
        pytest.skip("the tests stand outside a source tree")
    lines = re.findall(r"^    openssl (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) == 6
    (tmp_path / "message").write_bytes(b"the message")
    for line in lines:
        done = subprocess.run(
            [PROGRAM, *line.split()], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, (line, done.stderr)
    assert done.stdout == "the message"
    key = load_private_key((tmp_path / "key.pem").read_bytes())
    assert load_public_key((tmp_path / "public.pem").read_bytes()) == key.public_key
    key.public_key.verify(signature_from_der((tmp_path / "message.sig").read_bytes()), b"the message")
    assert key.decrypt(ciphertext_from_der((tmp_path / "message.sealed").read_bytes())) == b"the message"


class TestEncryption:
    @pytest.mark.parametrize("length", [1, 16, 31, 32, 33, 100, 2000])
    def test_both_ways(self, files, key, length):
        plaintext = os.urandom(length)
        (files / "plain").write_bytes(plaintext)
        arguments = ("-pubin", "-inkey", files / "public.pem", "-in", files / "plain")
        theirs = openssl("pkeyutl", "-encrypt", *arguments)
        assert key.decrypt(ciphertext_from_der(theirs)) == plaintext
        assert ciphertext_to_der(ciphertext_from_der(theirs)) == theirs
        (files / "sealed").write_bytes(ciphertext_to_der(key.public_key.encrypt(plaintext)))
        out = openssl("pkeyutl", "-decrypt", "-inkey", files / "private.pem", "-in", files / "sealed")
        assert out == plaintext
