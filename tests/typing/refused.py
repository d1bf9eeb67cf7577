"""Checked by mypy --strict, never run: each line marked `# error` must be refused, and no other."""

from __future__ import annotations

import csvfast
from csvfast.crypto import SM4GCM, SM4XTS

csvfast.sm3("text")  # error
csvfast.sm3_many([b"", "text"])  # error
csvfast.sm3_many(["text"])  # error
SM4XTS(bytes(32), standard="gcm")  # error
SM4XTS(bytes(32), "gb")  # error
SM4XTS(bytes(32)).encrypt([1, 2, 3])  # error
SM4XTS(bytes(32)).encrypt(b"", 0.5)  # error
SM4GCM(bytes(16)).decrypt(bytes(12), b"")  # error
csvfast.EncryptedMemory(4096, tweak_model="page")  # error
csvfast.EncryptedMemory(4096).write(0, b"")  # error
csvfast.EncryptedMemory(4096).read("0", 1, 1)  # error
csvfast.force_kernel("sm4")  # error


class Mine(csvfast.sm3):  # error
    pass
