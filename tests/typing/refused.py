"""Checked by mypy --strict, never run: each line marked `# error` must be refused, and no other."""

from __future__ import annotations

import csvfast
from csvfast.crypto import SM4GCM, SM4XTS, Secret, SM2PrivateKey, SM2PublicKey, dump_private_key, sm2_verify_many

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
Secret("text")  # error
SM2PrivateKey(5)  # error
SM2PublicKey("04")  # error
SM2PublicKey(b"").point = b""  # error
SM2PublicKey(b"").verify(b"", b"", b"user")  # error
SM2PrivateKey(b"").agree(SM2PrivateKey(b""), b"", b"", 16, initiator=True)  # error
sm2_verify_many([b""], b"", b"")  # error
dump_private_key(SM2PrivateKey(b""), encoding="text")  # error


class Mine(csvfast.sm3):  # error
    pass
