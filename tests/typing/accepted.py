"""Checked by mypy --strict, never run: what callers write, and the type each expression must have."""

from __future__ import annotations

import mmap
from array import array
from typing import assert_type

import numpy as np
from numpy.typing import NDArray

import csvfast
from csvfast.crypto import (
    SM4CTR,
    SM4GCM,
    SM4XTS,
    Secret,
    SM2PrivateKey,
    SM2PublicKey,
    ciphertext_from_der,
    dump_private_key,
    dump_public_key,
    load_private_key,
    load_public_key,
    signature_to_der,
    sm2_verify_many,
)

buffer = bytearray(64)
pages = np.zeros(4096, np.uint8)

assert_type(csvfast.sm3(b"").digest(), bytes)
assert_type(csvfast.sm3(buffer).copy(), csvfast.sm3)
assert_type(csvfast.sm3_file("name").hexdigest(), str)
assert_type(csvfast.sm3_many([b"", buffer, memoryview(b""), pages]), list[bytes])
assert_type(csvfast.sm3_blocks(pages), bytes)
assert_type(csvfast.sm3_blocks(pages, 512, prefix=b"salt", out=buffer), bytearray)
assert_type(csvfast.sm3_kdf(b"", 16), bytes)
csvfast.hmac_sm3(b"key", mmap.mmap(-1, 1)).verify(bytes(32))

cipher = SM4XTS(bytes(32), standard="ieee", unit_size=512, pool=csvfast.WorkerPool(2))
assert_type(cipher.encrypt(array("B", [0] * 16)), bytes)
assert_type(cipher.encrypt(b"", 5), bytes)
assert_type(cipher.encrypt(b"", 5, buffer), bytearray)
assert_type(cipher.decrypt(b"", out=buffer), bytearray)
assert_type(cipher.encrypt_unit(b"", bytes(16)), bytes)
assert_type(cipher.encrypt_lines(b"", np.zeros(1, np.uint64), buffer), bytearray)
assert_type(SM4CTR(bytes(16), bytes(16)).encrypt(b""), bytes)
assert_type(SM4GCM(bytes(16)).encrypt(bytes(12), b""), tuple[bytes, bytes])
assert_type(SM4GCM(bytes(16)).encrypt(bytes(12), b"", out=buffer), tuple[bytearray, bytes])
assert_type(SM4GCM(bytes(16)).decrypt(bytes(12), b"", bytes(16)), bytes)

secret = Secret.random(32)
private = SM2PrivateKey(secret)
public = private.public_key
assert_type(csvfast.sm3_kdf(secret, 16), bytes)
assert_type(csvfast.sm3_kdf(secret, 64, out=buffer), bytearray)
csvfast.hmac_sm3(secret, secret.part(0, 16)).verify(bytes(32))
assert_type(Secret.concatenate(secret, b"", buffer), Secret)
assert_type(secret.equals(buffer), bool)
assert_type(len(secret), int)
assert_type(bytes(secret), bytes)
assert_type(SM2PrivateKey.generate().secret(), Secret)
assert_type(public, SM2PublicKey)
assert_type(SM2PublicKey(bytearray(65)).point, bytes)
assert_type({public: 1}, dict[SM2PublicKey, int])
assert_type(private.sign(b"", user_id=buffer), bytes)
assert_type(private.sign_digest(bytes(32)), bytes)
assert_type(private.decrypt(public.encrypt(secret)), bytes)
assert_type(private.decrypt_secret(b""), Secret)
assert_type(private.agree(private, public, public, 16, initiator=True), tuple[Secret, bytes, bytes])
assert_type(sm2_verify_many([public], [buffer], bytes(32)), list[bool])
assert_type(sm2_verify_many((public,), pages, [memoryview(b"")]), list[bool])
assert_type(load_private_key(dump_private_key(private, encoding="der", password=b"p"), b"p"), SM2PrivateKey)
assert_type(load_public_key(dump_public_key(public)), SM2PublicKey)
assert_type(signature_to_der(buffer), bytes)
assert_type(ciphertext_from_der(memoryview(b"")), bytes)

with csvfast.EncryptedMemory(4096, tweak_model="line") as memory:
    assert_type(memory, csvfast.EncryptedMemory)
    assert_type(memory.install(1), int)
    assert_type(memory.read(0, 16, asid=1), bytes)
    assert_type(memory.raw, NDArray[np.uint8])
    assert_type(memory.launch_update(0, 4096, 1, page_digests=True), bytes)
    assert_type(memory.stats(), dict[str, int])
    memory.launch_update(0, 4096, 1, linear=csvfast.sm3())
