"""SM3 as with hashlib, of a file, and of many messages at once."""

from __future__ import annotations

import tempfile
from pathlib import Path

import csvfast
from csvfast.crypto import hmac_sm3

digest = csvfast.sm3(b"abc")
print("SM3(abc)        ", digest.hexdigest())
assert digest.hexdigest() == "66c7f0f462eeedd9d1f2d46bdc10e4e24167c4875cf2f7a2297da02b8f4ba8e0"

# A stream: copy() forks it, so that a common beginning is hashed once.
stream = csvfast.sm3()
stream.update(b"common beginning, ")
fork = stream.copy()
stream.update(b"one end")
fork.update(b"another end")
print("one end         ", stream.hexdigest()[:32], "...")
print("another end     ", fork.hexdigest()[:32], "...")

with tempfile.TemporaryDirectory() as directory:
    path = Path(directory, "image.bin")
    path.write_bytes(bytes(1 << 20))
    print("a file          ", csvfast.sm3_file(path).hexdigest()[:32], "...")

# Many messages share vector registers: 16 or 32 of them cost little more than one.
messages = [number.to_bytes(4, "big") * 1024 for number in range(1000)]
digests = csvfast.sm3_many(messages)
assert digests[7] == csvfast.sm3(messages[7]).digest()
print("1000 messages   ", digests[999].hex()[:32], "...")

mac = hmac_sm3(b"key", b"message").hexdigest()
print("HMAC-SM3        ", mac[:32], "...")
