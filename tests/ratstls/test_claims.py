"""Claims and evidence buffers: published bytes both ways, what we write we read, and every other encoding refused."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from csvfast.errors import ArgumentError, BufferTypeError, FormatError
from csvfast.ratstls.claims import (
    BUFFER_LIMIT,
    CSV_TAG,
    HASHES,
    TAGS,
    decode_claims,
    decode_evidence_buffer,
    encode_claims,
    encode_evidence_buffer,
    report_data_of,
    spki_hash,
)

SPKI = b"any bytes will do: they are hashed"
DIGEST = hashlib.sha256(SPKI).digest()
# attested-tls: map(1), "pubkey-hash", bytes(36), [1, bytes(32)].
HEAD = bytes.fromhex("a1 6b7075626b65792d68617368 5824 82015820")
CLAIMS = HEAD + DIGEST
NAME = b"\x6bpubkey-hash"

# CCC-Attestation/interoperable-ra-tls, interoperability-tests/rats-tls-cert.pem: written by rats-tls for an SGX enclave. Its key,
# its claims buffer, and the user data of its report.
CCC_SPKI = bytes.fromhex(
    "3059301306072a8648ce3d020106082a8648ce3d030107034200040dfa1935fcb521405032ed61350bb9aa8e1da528a157aae33f6ffebe2d1cdc2f"
    "66706b58f768f6b36017dacd52caa2007c9995e7227cde1b05d82f052dfd3283"
)
CCC_CLAIMS = bytes.fromhex(
    "a36b7075626b65792d6861736858248201582072c0b70c2092741a4cfda0c2465487faf132998617b0aad53118aa5d6e180006"
    "656b65795f304876616c75655f3000656b65795f314876616c75655f3100"
)
CCC_USER_DATA = bytes.fromhex("3ef61b935603341747b96c602397da1c4761afe4eeed2cdc08cbf5f4ff61c533") + bytes(32)


def test_published_claims() -> None:
    found = decode_claims(CCC_CLAIMS)
    assert (found.hash_id, found.pubkey_hash) == (1, hashlib.sha256(CCC_SPKI).digest())
    assert list(found.custom.items()) == [("key_0", b"value_0\0"), ("key_1", b"value_1\0")]
    assert found.encoded == CCC_CLAIMS
    assert report_data_of(CCC_CLAIMS) == CCC_USER_DATA
    assert encode_claims(CCC_SPKI, {"key_0": b"value_0\0", "key_1": b"value_1\0"}) == CCC_CLAIMS


def test_published_evidence_buffer() -> None:
    """Its head: tag 60000, array of 2, bytes(0x127e)."""
    encoded = bytes.fromhex("d9ea60 82 59127e") + bytes(0x127E) + b"\x58\x51" + CCC_CLAIMS
    found = decode_evidence_buffer(encoded)
    assert (found.tag, found.raw, found.claims) == (60000, bytes(0x127E), CCC_CLAIMS)
    assert encode_evidence_buffer(found.raw, found.claims, 60000) == encoded


def test_pattern_with_the_mandatory_claim() -> None:
    assert encode_claims(SPKI) == CLAIMS
    assert len(CLAIMS) == 51
    found = decode_claims(CLAIMS)
    assert (found.hash_id, found.pubkey_hash, dict(found.custom)) == (1, DIGEST, {})


def test_pattern_of_the_buffer() -> None:
    encoded = encode_evidence_buffer(bytes(7016), CLAIMS)
    assert encoded[:9] == bytes.fromhex("da001a7506 82 591b68")
    assert encoded[7025:7027] == b"\x58\x33"
    assert len(encoded) == 7078
    assert len(encode_evidence_buffer(bytes(7016), encode_claims(SPKI, {"key_0": b"value_0\0"}))) == 7093
    found = decode_evidence_buffer(encoded)
    assert (found.tag, found.raw, found.claims) == (CSV_TAG, bytes(7016), CLAIMS)
    assert "Hygon CSV: 7016 bytes" in repr(found)


@pytest.mark.parametrize("hash_id", HASHES)
def test_hashes(hash_id: int) -> None:
    name, size = HASHES[hash_id]
    found = decode_claims(encode_claims(SPKI, hash_id=hash_id))
    assert (found.hash_id, found.pubkey_hash) == (hash_id, hashlib.new(name, SPKI).digest())
    assert len(found.pubkey_hash) == size
    assert spki_hash(SPKI, hash_id) == found.pubkey_hash


@pytest.mark.parametrize("tag", TAGS)
def test_tags(tag: int) -> None:
    assert decode_evidence_buffer(encode_evidence_buffer(b"raw", b"claims", tag)).tag == tag


def test_claims_are_not_sorted_and_read_only() -> None:
    found = decode_claims(encode_claims(SPKI, {"z": b"1", "a": bytearray(b"2"), "": memoryview(b"")}))
    assert list(found.custom) == ["z", "a", ""]
    with pytest.raises(TypeError):
        found.custom["z"] = b""  # type: ignore[index]


def test_pubkey_hash_in_another_place() -> None:
    """Peers that sort their claims put shorter names first."""
    found = decode_claims(b"\xa2\x61a\x41\x01" + CLAIMS[1:])
    assert (found.pubkey_hash, dict(found.custom)) == (DIGEST, {"a": b"\x01"})


@given(st.dictionaries(st.text(max_size=40).filter(lambda name: name != "pubkey-hash"), st.binary(max_size=300), max_size=20))
def test_what_is_written_is_read(custom: dict[str, bytes]) -> None:
    encoded = encode_claims(SPKI, custom)
    found = decode_claims(encoded)
    assert list(found.custom.items()) == list(custom.items())
    assert found.encoded == encoded
    assert encoded[1 if len(custom) < 23 else 2 :].startswith(NAME)


BAD_CLAIMS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "encoding"),
    "trailing byte": (CLAIMS + b"\0", "encoding"),
    "a second item": (CLAIMS + CLAIMS, "encoding"),
    "cut": (CLAIMS[:-1], "encoding"),
    "an array": (b"\x81" + CLAIMS, "map"),
    "a tag before it": (b"\xd9\xd9\xf7" + CLAIMS, "encoding"),
    "no claims": (b"\xa0", "pubkey-hash"),
    "only others": (b"\xa1\x61a\x41\x01", "pubkey-hash"),
    "map of indefinite length": (b"\xbf" + CLAIMS[1:] + b"\xff", "encoding"),
    "count of the map in two bytes": (b"\xb8\x01" + CLAIMS[1:], "encoding"),
    "length of the name in two bytes": (b"\xa1\x78" + CLAIMS[1:].replace(b"\x6b", b"\x0b", 1), "encoding"),
    "name in pieces": (b"\xa1\x7f\x63pub\x68key-hash\xff" + CLAIMS[13:], "encoding"),
    "length of the value in three bytes": (CLAIMS.replace(b"\x58\x24", b"\x59\x00\x24"), "encoding"),
    "value in pieces": (CLAIMS[:13] + b"\x5f" + CLAIMS[13:] + b"\xff", "encoding"),
    "twice the same": (b"\xa2" + CLAIMS[1:] + CLAIMS[1:], "encoding"),
    "a custom claim twice": (b"\xa3" + CLAIMS[1:] + b"\x61a\x41\x01\x61a\x41\x02", "encoding"),
    "pubkey-hash twice": (b"\xa2" + CLAIMS[1:19] + bytes(32) + CLAIMS[1:], "encoding"),
    "a number as name": (b"\xa2" + CLAIMS[1:] + b"\x01\x41\x01", "name"),
    "bytes as name": (b"\xa2" + CLAIMS[1:] + b"\x41a\x41\x01", "name"),
    "text as value": (b"\xa2" + CLAIMS[1:] + b"\x61a\x61b", "'a'"),
    "a number as value": (b"\xa2" + CLAIMS[1:] + b"\x61a\x01", "'a'"),
    "a map as value": (b"\xa2" + CLAIMS[1:] + b"\x61a\xa0", "'a'"),
    "a date as value": (b"\xa2" + CLAIMS[1:] + b"\x61a\xc1\x01", "encoding"),
    "an unknown tag as value": (b"\xa2" + CLAIMS[1:] + b"\x61a\xd9\x7f\xff\x41\x01", "'a'"),
    "a tag of evidence as value": (b"\xa2" + CLAIMS[1:] + b"\x61a\xda\x00\x1a\x75\x06\x41\x01", "'a'"),
    "a name that is no UTF-8": (b"\xa2" + CLAIMS[1:] + b"\x61\xff\x41\x01", "encoding"),
    "pubkey-hash as array, not inside bytes": (b"\xa1" + NAME + b"\x82\x01\x58\x20" + DIGEST, "'pubkey-hash'"),
    "nesting": (b"\x81" * 60000, "encoding"),
    "nested tags": (b"\xc1" * 60000, "encoding"),
    "a map of 2**64 - 1": (b"\xbb" + b"\xff" * 8, "encoding"),
    "bytes of 2**63": (b"\x5b\x7f" + b"\xff" * 7, "encoding"),
    "an array of 2**32 - 1": (b"\x9a\xff\xff\xff\xff", "encoding"),
    "a reference to itself": (b"\xd8\x1c\xa1\x61a\xd8\x1d\x00", "encoding"),
    "a regular expression": (b"\xd8\x23\x63(((", "encoding"),
    "too long": (bytes(BUFFER_LIMIT + 1), "length"),
}


@pytest.mark.parametrize("name", BAD_CLAIMS)
def test_bad_claims(name: str) -> None:
    data, field = BAD_CLAIMS[name]
    with pytest.raises(FormatError) as caught:
        decode_claims(data)
    assert (caught.value.structure, caught.value.field) == ("claims buffer", field)


BAD_HASHES: dict[str, tuple[bytes, str]] = {
    "reserved id 0": (b"\x82\x00\x58\x20" + DIGEST, "hash id"),
    "unknown id": (b"\x82\x02\x50" + DIGEST[:16], "hash id"),
    "negative id": (b"\x82\x20\x58\x20" + DIGEST, "hash id"),
    "an id of 300 bits": (b"\x82\xc2\x58\x26" + b"\x01" * 38 + b"\x58\x20" + DIGEST, "encoding"),
    "an id of 64 bits": (b"\x82\x1b" + b"\xff" * 8 + b"\x58\x20" + DIGEST, "hash id"),
    "id in two bytes": (b"\x82\x18\x01\x58\x20" + DIGEST, "encoding"),
    "id as bignum": (b"\x82\xc2\x41\x01\x58\x20" + DIGEST, "encoding"),
    "true as id": (b"\x82\xf5\x58\x20" + DIGEST, "array"),
    "1.0 as id": (b"\x82\xf9\x3c\x00\x58\x20" + DIGEST, "array"),
    "31 bytes of SHA-256": (b"\x82\x01\x58\x1f" + DIGEST[:31], "hash"),
    "33 bytes of SHA-256": (b"\x82\x01\x58\x21" + DIGEST + b"\0", "hash"),
    "32 bytes of SHA-384": (b"\x82\x07\x58\x20" + DIGEST, "hash"),
    "48 bytes of SHA-512": (b"\x82\x08\x58\x30" + bytes(48), "hash"),
    "no hash": (b"\x82\x01\x40", "hash"),
    "one member": (b"\x81\x01", "array"),
    "three members": (b"\x83\x01\x58\x20" + DIGEST + b"\x01", "array"),
    "array of indefinite length": (b"\x9f\x01\x58\x20" + DIGEST + b"\xff", "encoding"),
    "text as hash": (b"\x82\x01\x78\x20" + b"a" * 32, "array"),
    "a map": (b"\xa1\x01\x58\x20" + DIGEST, "array"),
    "trailing byte": (b"\x82\x01\x58\x20" + DIGEST + b"\0", "encoding"),
    "nothing": (b"", "encoding"),
}


@pytest.mark.parametrize("name", BAD_HASHES)
def test_bad_pubkey_hash(name: str) -> None:
    data, field = BAD_HASHES[name]
    with pytest.raises(FormatError) as caught:
        decode_claims(cbor2.dumps({"pubkey-hash": data}))
    assert (caught.value.structure, caught.value.field) == ("claims buffer, pubkey-hash", field)
    assert len(str(caught.value)) < 300


GOOD = encode_evidence_buffer(b"raw", b"claims")
BAD_BUFFERS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "encoding"),
    "no tag": (GOOD[5:], "tag"),
    "unknown tag": (b"\xda\x00\x1a\x75\x07" + GOOD[5:], "tag"),
    "a tag that rats-tls' range contains": (b"\xda\x00\x1a\x75\x03" + GOOD[5:], "tag"),
    "tag in nine bytes": (b"\xdb\x00\x00\x00\x00\x00\x1a\x75\x06" + GOOD[5:], "encoding"),
    "two tags": (GOOD[:5] + GOOD, "array"),
    "one member": (GOOD[:5] + b"\x81\x43raw", "array"),
    "three members": (GOOD[:5] + b"\x83" + GOOD[6:] + b"\x40", "array"),
    "text as evidence": (GOOD[:5] + b"\x82\x63raw\x46claims", "array"),
    "claims as a map": (GOOD[:5] + b"\x82\x43raw\xa0", "array"),
    "array of indefinite length": (GOOD[:5] + b"\x9f" + GOOD[6:] + b"\xff", "encoding"),
    "evidence in pieces": (GOOD[:5] + b"\x82\x5f\x41r\x42aw\xff\x46claims", "encoding"),
    "length in two bytes": (GOOD[:5] + b"\x82\x58\x03raw\x46claims", "encoding"),
    "trailing byte": (GOOD + b"\0", "encoding"),
    "cut": (GOOD[:-1], "encoding"),
    "bytes around it": (cbor2.dumps(GOOD), "tag"),
    "too long": (bytes(BUFFER_LIMIT + 1), "length"),
}


@pytest.mark.parametrize("name", BAD_BUFFERS)
def test_bad_buffer(name: str) -> None:
    data, field = BAD_BUFFERS[name]
    with pytest.raises(FormatError) as caught:
        decode_evidence_buffer(data)
    assert (caught.value.structure, caught.value.field) == ("evidence buffer", field)


def test_the_error_says_where() -> None:
    with pytest.raises(FormatError, match=r"encoding at offset 51 \(0x33\): found 1 more bytes; expected the end"):
        decode_claims(CLAIMS + b"\0")
    with pytest.raises(FormatError, match=r"offset 13 .*another encoding"):
        decode_claims(CLAIMS.replace(b"\x58\x24", b"\x59\x00\x24"))


def test_nothing_is_worked_out() -> None:
    """Numbers, patterns and mails that cost cbor2 up to 80 ms each, times as many as a certificate has room for."""
    number = b"\xc2\x59\x3f\x00" + b"\xff" * 0x3F00
    costly = [
        b"\xc4\x82\x01" + number, b"\xc5\x82\x19\x7f\xff" + number, b"\xd8\x1e\x82" + number + number,
        b"\xd8\x23\x79\x60\x00" + b"(?:a{1,9})" * 2457 + b"aaaaaa", b"\xd8\x24\x79\x60\x00" + b"A: b" * 6144,
    ]  # fmt: skip
    start = time.process_time()
    for value in costly:
        with pytest.raises(FormatError):
            decode_claims(b"\xa2" + CLAIMS[1:] + b"\x61a" + value)
    assert time.process_time() - start < 0.02


def test_keys_of_one_hash() -> None:
    """Arrays as names, for which Python's hash can be chosen: each would be compared with all before it."""
    mask, first, second, start = (1 << 64) - 1, 11400714785074694791, 14029467366897019727, 2870177450012600261
    inverse, names, number = pow(second, -1, 1 << 64), [], 0
    while len(names) < 2300:  # CPython, Objects/tupleobject.c: xxHash of the members' hashes
        state = (start + number * second) & mask
        state = (state << 31 | state >> 33) * first & mask
        other = (1 - state) * inverse & mask
        if other < (1 << 61) - 1:
            names.append((number, other))
        number += 1
    assert len(set(map(hash, names))) == 1
    data = b"\xb9" + len(names).to_bytes(2, "big") + b"".join(cbor2.dumps(list(name)) + b"\0" for name in names)
    begin = time.process_time()
    for read in (decode_claims, decode_evidence_buffer):
        with pytest.raises(FormatError, match="more than 1024 data items"):
            read(data)
    assert time.process_time() - begin < 0.02


def test_many_claims() -> None:
    custom = {f"claim {number}": b"" for number in range(500)}
    assert decode_claims(encode_claims(SPKI, custom)).custom == custom
    with pytest.raises(FormatError, match="data items"):
        decode_claims(encode_claims(SPKI, custom | {f"more {number}": b"" for number in range(50)}))


@given(st.binary(max_size=80))
def test_any_bytes(data: bytes) -> None:
    for read in (decode_claims, decode_evidence_buffer):
        with pytest.raises(FormatError):
            read(data)


@given(position=st.integers(0, len(CCC_CLAIMS) - 1), value=st.integers(0, 255))
def test_one_byte_changed(position: int, value: int) -> None:
    """It is refused, or it is another claims buffer that is written just so."""
    changed = CCC_CLAIMS[:position] + bytes([value]) + CCC_CLAIMS[position + 1 :]
    try:
        found = decode_claims(changed)
    except FormatError:
        return
    value_of_hash = cbor2.dumps([found.hash_id, found.pubkey_hash])
    assert cbor2.dumps({"pubkey-hash": value_of_hash, **found.custom}) == changed


@pytest.mark.parametrize("custom", [{"pubkey-hash": b""}, {1: b""}, {"\ud800": b""}, {b"a": b""}, {"a": bytes(BUFFER_LIMIT)}])
def test_claims_that_are_not_written(custom: Any) -> None:
    with pytest.raises(ArgumentError):
        encode_claims(SPKI, custom)


@pytest.mark.parametrize("value", ["text", 1, None, {}])
def test_values_that_are_no_bytes(value: Any) -> None:
    with pytest.raises(BufferTypeError):
        encode_claims(SPKI, {"a": value})


def test_other_arguments() -> None:
    with pytest.raises(ArgumentError):
        encode_claims(SPKI, hash_id=0)
    with pytest.raises(ArgumentError):
        encode_evidence_buffer(b"", b"", 1)
    with pytest.raises(ArgumentError):
        encode_evidence_buffer(bytes(BUFFER_LIMIT), b"")
    with pytest.raises(BufferTypeError):
        decode_claims(5)  # type: ignore[arg-type]
