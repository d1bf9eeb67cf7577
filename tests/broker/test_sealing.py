"""Keys at rest: known answers, the tree of keys, and everything that must not authenticate."""

from __future__ import annotations

import base64
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from csvfast.broker import sealing
from csvfast.broker.sealing import LARGEST, OVERHEAD, KeyRing, KeyRow, SealedVersion, associate, seal, unseal
from csvfast.crypto import Secret
from csvfast.errors import ArgumentError, AuthenticationError, ClosedError, KeyLengthError, LengthError, StateError

PATH = "default/key/1"
CONTENT = b"the guest's disk key, 32 bytes.."


@dataclass
class Master:
    """A master key without a place of its own."""

    key: Secret
    identity: str

    def wrap(self, key: Secret, associated: bytes) -> bytes:
        return seal(self.key, key, associated)

    def unwrap(self, data: bytes, associated: bytes) -> Secret:
        return unseal(self.key, data, associated)

    def close(self) -> None:
        self.key.wipe()


def master(name: str = "test:1") -> Master:
    return Master(Secret.random(32), name)


def key(first: int = 0) -> Secret:
    return Secret(bytes(range(first, first + 32)))


# -- records ---------------------------------------------------------------------------------------------------------


def test_record_of_a_known_key_is_read() -> None:
    # Made once with another program from the format in the module's text: AES-256-GCM, key 00 01 .. 1f, nonce a0 .. ab.
    nonce = bytes(range(0xA0, 0xAC))
    associated = bytes.fromhex("00000007" + b"content".hex() + "0000000d" + PATH.encode().hex() + "0000000131")
    made = AESGCM(bytes(range(32))).encrypt(nonce, CONTENT, b"csvk\x01" + associated)
    assert associate("content", PATH, 1) == associated
    assert unseal(key(), b"csvk\x01" + nonce + made, associated) == CONTENT
    pinned = (
        "6373766b01a0a1a2a3a4a5a6a7a8a9aaab"
        "9270190d22be67cc1642f4f36313b3b550c73c69be97715ebc6c5ff21ad85b2f"
        "d8a44813810a5ff9b95e9fb69c902e3c"
    )
    assert unseal(key(), bytes.fromhex(pinned), associated) == CONTENT


def test_record_is_what_the_module_says() -> None:
    sealed = seal(key(), CONTENT, b"data")
    assert sealed[:5] == b"csvk\x01"
    assert len(sealed) == len(CONTENT) + OVERHEAD
    assert AESGCM(bytes(range(32))).decrypt(sealed[5:17], sealed[17:], b"csvk\x01data") == CONTENT


def test_nonces_are_new_each_time() -> None:
    assert len({seal(key(), CONTENT, b"")[5:17] for _ in range(256)}) == 256


@given(st.binary(min_size=1, max_size=4096), st.binary(max_size=64))
def test_round_trip(content: bytes, associated: bytes) -> None:
    assert unseal(key(), seal(key(), content, associated), associated) == content


@pytest.mark.parametrize("buffer", [bytes, bytearray, memoryview, Secret])
def test_any_buffer_is_sealed(buffer: Callable[[bytes], bytes]) -> None:
    assert unseal(key(), memoryview(seal(key(), buffer(CONTENT), b"x")), b"x") == CONTENT


def test_every_altered_bit_is_found() -> None:
    sealed = seal(key(), CONTENT, b"data")
    for position in range(len(sealed)):
        for bit in (1, 0x80):
            altered = bytearray(sealed)
            altered[position] ^= bit
            with pytest.raises(AuthenticationError):
                unseal(key(), altered, b"data")


def test_every_cut_is_found() -> None:
    sealed = seal(key(), CONTENT, b"data")
    for length in range(len(sealed)):
        with pytest.raises(AuthenticationError):
            unseal(key(), sealed[:length], b"data")
        with pytest.raises(AuthenticationError):
            unseal(key(), sealed[length + 1 :], b"data")
    with pytest.raises(AuthenticationError):
        unseal(key(), sealed + b"\0", b"data")


def test_other_key_or_data_is_found() -> None:
    sealed = seal(key(), CONTENT, b"data")
    for wrong, associated in ((key(1), b"data"), (key(), b"datb"), (key(), b""), (key(), b"data\0")):
        with pytest.raises(AuthenticationError, match=r"^this one: does not authenticate"):
            unseal(wrong, sealed, associated, what="this one")


@given(st.lists(st.text(max_size=8), max_size=4), st.lists(st.text(max_size=8), max_size=4))
def test_associated_data_is_injective(first: list[str], second: list[str]) -> None:
    assert (associate("p", *first) == associate("p", *second)) == (first == second)


def test_associated_data_of_neighbours_differs() -> None:
    assert associate("ab", "c") != associate("a", "bc")
    assert associate("a", "b", 11) != associate("a", "b1", 1)


def test_lengths_are_checked() -> None:
    with pytest.raises(LengthError, match=r"^0 bytes"):
        seal(key(), b"", b"")
    with pytest.raises(LengthError, match=f"^{LARGEST + 1} bytes"):
        seal(key(), memoryview(bytearray(LARGEST + 1)), b"")
    for length in (16, 31, 33):
        with pytest.raises(KeyLengthError, match=f"{length} bytes"):
            seal(Secret(bytes(length)), CONTENT, b"")
        with pytest.raises(KeyLengthError, match=f"{length} bytes"):
            unseal(Secret(bytes(length)), bytes(100), b"")


def test_wiped_key_is_refused() -> None:
    wiped = key()
    wiped.wipe()
    with pytest.raises(ClosedError):
        seal(wiped, CONTENT, b"")


def test_errors_hold_neither_key_nor_content() -> None:
    # A caller that mixes plaintext up with a record must not read it back in an error.
    for wrong in (CONTENT, CONTENT * 4, b"csvk\x01" + CONTENT * 4):
        with pytest.raises(AuthenticationError) as caught:
            unseal(key(), wrong, b"")
        text = str(caught.value)
        for part in (CONTENT[:5], bytes(range(5))):
            assert part.decode() not in text
            assert part.hex() not in text
            assert base64.b64encode(part).decode().rstrip("=") not in text
        assert caught.value.__cause__ is None


# -- the ring --------------------------------------------------------------------------------------------------------


def test_ring_opens_and_unseals() -> None:
    own = master()
    ring = KeyRing.create(own)
    sealed = ring.seal(PATH, 1, CONTENT)
    assert sealed.kek == ring.current.id
    assert ring.current.master == own.identity
    again = KeyRing.open(ring.rows, own)
    content = again.unseal(PATH, 1, sealed)
    assert isinstance(content, Secret)
    assert content == CONTENT


def test_ring_reads_a_store_of_format_1() -> None:
    """A KEK row and a version that an earlier program would have left; the levels are made by hand here."""
    kek, data_key = bytes(range(64, 96)), bytes(range(128, 160))

    def record(wrapping: bytes, content: bytes, *fields: str) -> bytes:
        data = b"".join(len(field).to_bytes(4, "big") + field.encode() for field in fields)
        return b"csvk\x01" + bytes(12) + AESGCM(wrapping).encrypt(bytes(12), content, b"csvk\x01" + data)

    own = Master(key(), "test:known")
    wrapped = record(bytes(range(32)), kek, "key-encryption key", "00112233aabbccdd", "test:known", "1700000000123456")
    row = KeyRow("00112233aabbccdd", "test:known", 1700000000.123456, wrapped)
    version = SealedVersion(
        row.id, record(kek, data_key, "data key", row.id, PATH, "7"), record(data_key, CONTENT, "content", PATH, "7")
    )
    assert KeyRing.open([row], own).unseal(PATH, 7, version) == CONTENT


def test_each_version_has_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bytes] = []
    real = sealing.seal
    monkeypatch.setattr(sealing, "seal", lambda key, plain, data: made.append(bytes(key)) or real(key, plain, data))
    ring = KeyRing.create(master())
    made.clear()
    for version in range(1, 5):
        ring.seal(PATH, version, CONTENT)
    assert len(set(made)) == 5  # four data keys and the key that wraps them


@pytest.mark.parametrize("field", ["path", "version", "kek", "wrapped_key", "content"])
def test_exchanged_resources_are_found(field: str) -> None:
    own = master()
    ring = KeyRing.create(own).with_new_key(own)
    first, second = ring.seal(PATH, 1, CONTENT), ring.seal("default/key/2", 1, b"other")
    assert ring.unseal(PATH, 1, first) == CONTENT
    path, version = PATH, 1
    if field == "path":
        path = "default/key/2"
    elif field == "version":
        version = 2
    elif field == "kek":
        first = first._replace(kek=ring.rows[0].id)
    else:
        first = first._replace(**{field: getattr(second, field)})
    with pytest.raises(AuthenticationError, match=rf"{path} version {version}: does not authenticate"):
        ring.unseal(path, version, first)
    if field != "content":  # which wrapping anew does not read
        with pytest.raises(AuthenticationError):
            ring.rewrap(path, version, first)


def test_whole_record_of_another_version_is_found() -> None:
    ring = KeyRing.create(master())
    with pytest.raises(AuthenticationError):
        ring.unseal(PATH, 2, ring.seal(PATH, 1, CONTENT))


@pytest.mark.parametrize("field", ["id", "master", "created", "wrapped"])
def test_exchanged_keys_are_found(field: str) -> None:
    own = master()
    rows = KeyRing.create(own).with_new_key(own).rows
    value = "test:2" if field == "master" else getattr(rows[1], field)
    altered = rows[0]._replace(**{field: value})
    with pytest.raises(AuthenticationError):
        KeyRing.open([altered], own)
    if field == "master":
        with pytest.raises(AuthenticationError):
            KeyRing.open([altered], Master(own.key, "test:2"))


def test_older_key_cannot_be_made_the_current_one() -> None:
    own = master()
    ring = KeyRing.create(own).with_new_key(own)
    old, new = ring.rows
    with pytest.raises(AuthenticationError):
        KeyRing.open([old._replace(created=new.created + 10), new], own)


def test_data_key_does_not_pass_for_a_key_encryption_key() -> None:
    own = master()
    ring = KeyRing.create(own)
    sealed = ring.seal(PATH, 1, CONTENT)
    with pytest.raises(AuthenticationError):
        KeyRing.open([ring.current._replace(wrapped=sealed.wrapped_key)], own)


def test_wrong_master_is_named() -> None:
    ring = KeyRing.create(master("test:1"))
    with pytest.raises(AuthenticationError, match=r"was wrapped by master key test:1; this is test:2"):
        KeyRing.open(ring.rows, master("test:2"))
    with pytest.raises(AuthenticationError, match="does not authenticate"):
        KeyRing.open(ring.rows, master("test:1"))


def test_rows_are_checked() -> None:
    own = master()
    ring = KeyRing.create(own)
    with pytest.raises(StateError, match="no key-encryption key"):
        KeyRing.open([], own)
    with pytest.raises(AuthenticationError, match="is there twice"):
        KeyRing.open([*ring.rows, *ring.rows], own)
    short = Secret.random(16)
    data = associate("key-encryption key", ring.current.id, own.identity, round(ring.current.created * 1_000_000))
    with pytest.raises(AuthenticationError, match="16 bytes; expected 32"):
        KeyRing.open([ring.current._replace(wrapped=own.wrap(short, data))], own)


def test_hostile_rows_give_short_errors() -> None:
    row = KeyRow("x" * 100_000, "y" * 100_000, 0.0, b"z" * 100_000)
    with pytest.raises(AuthenticationError) as caught:
        KeyRing.open([row], master())
    assert len(str(caught.value)) < 500
    ring = KeyRing.create(master())
    with pytest.raises(AuthenticationError, match="which is not there") as caught:
        ring.unseal(PATH, 1, SealedVersion("k" * 100_000, b"", b""))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("field", "value"),
    [("id", None), ("id", b"x"), ("master", 1), ("master", None), ("wrapped", "text"), ("wrapped", None), ("wrapped", 1.5)]
    + [("created", value) for value in (None, "1", b"1", float("nan"), float("inf"), -1.0, 1e300, 1 << 100, True)],
)
def test_rows_of_other_types_are_found(field: str, value: object) -> None:
    own = master()
    with pytest.raises(AuthenticationError):
        KeyRing.open([KeyRing.create(own).current._replace(**{field: value})], own)


def test_rotation_of_the_master_key_only() -> None:
    old, new = master("test:old"), master("test:new")
    ring = KeyRing.create(old).with_new_key(old)
    sealed = ring.seal(PATH, 1, CONTENT)
    moved = ring.under(new)
    assert [row.id for row in moved.rows] == [row.id for row in ring.rows]
    assert KeyRing.open(moved.rows, new).unseal(PATH, 1, sealed) == CONTENT
    with pytest.raises(AuthenticationError):
        KeyRing.open(moved.rows, old)


def test_rotation_of_everything() -> None:
    old, new = master("test:old"), master("test:new")
    ring = KeyRing.create(old)
    versions = {number: ring.seal(PATH, number, f"content {number}".encode()) for number in range(1, 4)}
    rotated = ring.with_new_key(new)
    assert len(ring.rows) == 1, "a ring never changes"
    assert rotated.current.id != ring.current.id
    moved = {number: rotated.rewrap(PATH, number, sealed) for number, sealed in versions.items()}
    for number, sealed in moved.items():
        assert sealed.kek == rotated.current.id
        assert sealed.content == versions[number].content
    remaining = KeyRing.open(rotated.current_only().rows, new)
    assert len(remaining.rows) == 1
    for number, sealed in moved.items():
        assert remaining.unseal(PATH, number, sealed) == f"content {number}".encode()
    # What an old backup holds cannot be read any more.
    with pytest.raises(AuthenticationError, match="which is not there"):
        remaining.unseal(PATH, 1, versions[1])
    with pytest.raises(AuthenticationError):
        remaining.unseal(PATH, 1, versions[1]._replace(kek=remaining.current.id))


def test_new_key_is_current_although_the_clock_went_back(monkeypatch: pytest.MonkeyPatch) -> None:
    own = master()
    ring = KeyRing.create(own)
    monkeypatch.setattr(sealing.time, "time", lambda: 1000.0)
    rotated = ring.with_new_key(own)
    assert rotated.current.id != ring.current.id
    assert KeyRing.open(random.sample(rotated.rows, 2), own).current == rotated.current


@pytest.mark.parametrize("step", range(8))
def test_times_survive_a_database(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """REAL and DOUBLE PRECISION keep a float; one that comes back by way of decimal text is the same microsecond, also when the
    clock gave a time halfway between two of them."""
    own = master()
    monkeypatch.setattr(time, "time", lambda: 1795759999.5 + step * 2.0**-22)
    row = KeyRing.create(own).current
    assert KeyRing.open([row._replace(created=float(f"{row.created:.6f}"))], own).current.id == row.id


@pytest.mark.parametrize(("path", "version"), [("", 1), (PATH, 0), (PATH, -1), (PATH, True), (PATH, 1.0), (PATH, "1")])
def test_places_are_checked(path: str, version: int) -> None:
    ring = KeyRing.create(master())
    with pytest.raises(ArgumentError, match="expected a path and a version"):
        ring.seal(path, version, CONTENT)
    with pytest.raises(ArgumentError):
        ring.unseal(path, version, SealedVersion(ring.current.id, b"", b""))


def test_ring_shows_no_key() -> None:
    ring = KeyRing.create(master())
    secret = bytes(ring._keys[ring.current.id])
    for text in (repr(ring), str(ring.rows), repr(ring._keys)):
        assert secret.hex() not in text
        assert repr(secret) not in text


def test_threads_share_a_ring() -> None:
    ring = KeyRing.create(master())
    sealed = {number: ring.seal(PATH, number, bytes([number]) * 1000) for number in range(1, 9)}
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            for _ in range(300):
                assert ring.unseal(PATH, number, sealed[number]) == bytes([number]) * 1000
                assert ring.unseal(PATH, number, ring.seal(PATH, number, CONTENT)) == CONTENT
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in sealed]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
