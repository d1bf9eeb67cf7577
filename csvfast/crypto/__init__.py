"""SM3 and SM4 for Python: buffers in, buffers out, the GIL released while C works.

    sm3, sm3_file, sm3_many, sm3_blocks, hmac_sm3, sm3_kdf     hashing (GB/T 32905, RFC 2104, GB/T 32918.4)
    SM4XTS, SM4CTR, SM4GCM                                      encryption (GB/T 32907, GB/T 17964-2021, IEEE 1619)
    WorkerPool                                                  threads for bulk calls

Every object is made under one key or for one message and keeps the kernel that was chosen at that moment. Buffers may be
anything C-contiguous (bytes, bytearray, memoryview, mmap, array, NumPy); ``out=`` may be the input itself (in place).
"""

from __future__ import annotations

from csvfast._core import SM4CTR, SM4GCM, SM4XTS, WorkerPool, hmac_sm3, sm3, sm3_blocks, sm3_kdf, sm3_many
from csvfast.crypto.file import sm3_file

__all__ = [
    "SM4CTR",
    "SM4GCM",
    "SM4XTS",
    "WorkerPool",
    "hmac_sm3",
    "sm3",
    "sm3_blocks",
    "sm3_file",
    "sm3_kdf",
    "sm3_many",
]
