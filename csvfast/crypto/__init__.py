"""SM2, SM3 and SM4 for Python: buffers in, buffers out, the GIL released while C works.

    sm3, sm3_file, sm3_many, sm3_blocks, hmac_sm3, sm3_kdf     hashing (GB/T 32905, RFC 2104, GB/T 32918.4)
    SM4XTS, SM4CTR, SM4GCM                                      encryption (GB/T 32907, GB/T 17964-2021, IEEE 1619)
    SM2PrivateKey, SM2PublicKey, sm2_verify_many                signatures, encryption, key agreement (GB/T 32918)
    load_private_key, dump_private_key, ...                     SM2 keys, signatures and ciphertexts in PEM and DER
    Secret                                                      bytes that are wiped with their object
    WorkerPool                                                  threads for bulk calls

Every SM3 or SM4 object is made under one key or for one message and keeps the kernel that was chosen at that moment. Buffers may
be anything C-contiguous (bytes, bytearray, memoryview, mmap, array, NumPy); ``out=`` may be the input itself (in place).
"""

from __future__ import annotations

from csvfast._core import (
    SM4CTR,
    SM4GCM,
    SM4XTS,
    Secret,
    SM2PrivateKey,
    SM2PublicKey,
    WorkerPool,
    hmac_sm3,
    sm2_verify_many,
    sm3,
    sm3_blocks,
    sm3_kdf,
    sm3_many,
)
from csvfast.crypto.file import sm3_file
from csvfast.crypto.sm2 import (
    DEFAULT_USER_ID,
    ciphertext_from_der,
    ciphertext_to_der,
    dump_private_key,
    dump_public_key,
    load_private_key,
    load_public_key,
    signature_from_der,
    signature_to_der,
)

__all__ = [
    "DEFAULT_USER_ID",
    "SM4CTR",
    "SM4GCM",
    "SM4XTS",
    "SM2PrivateKey",
    "SM2PublicKey",
    "Secret",
    "WorkerPool",
    "ciphertext_from_der",
    "ciphertext_to_der",
    "dump_private_key",
    "dump_public_key",
    "hmac_sm3",
    "load_private_key",
    "load_public_key",
    "signature_from_der",
    "signature_to_der",
    "sm2_verify_many",
    "sm3",
    "sm3_blocks",
    "sm3_file",
    "sm3_kdf",
    "sm3_many",
]
