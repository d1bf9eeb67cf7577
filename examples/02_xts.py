"""SM4-XTS over pages: in place, from the middle, and the two tweak orders."""

from __future__ import annotations

import secrets

import csvfast
from csvfast.crypto import SM4XTS

xts = SM4XTS(secrets.token_bytes(32))  # GB/T 17964-2021, data units of 4096 bytes

pages = bytearray(b"sixteen bytes... " * 1000)[: 3 * 4096]
plain = bytes(pages)
xts.encrypt(pages, unit=100, out=pages)  # units 100, 101, 102, in place
assert bytes(pages) != plain
assert xts.decrypt(pages, unit=100) == plain
print("three pages in place and back")

# The unit number is part of the encryption: one plaintext, two places, two ciphertexts.
page = bytes(4096)
assert xts.encrypt(page, unit=0) != xts.encrypt(page, unit=1)

# One cache line out of a page, without the page around it.
line = xts.decrypt_span(pages[4096 + 640 : 4096 + 704], unit=101, offset=640)
assert line == plain[4096 + 640 : 4096 + 704]
print("one line from the middle of a page:", line[:16])

# Lengths that are no multiple of 16 steal ciphertext; nothing is padded.
odd = xts.encrypt(b"seventeen bytes.." * 3, unit=5)
assert len(odd) == 51

# The IEEE order differs from the second block on.
key = secrets.token_bytes(32)
gb, ieee = SM4XTS(key), SM4XTS(key, standard="ieee")
assert gb.encrypt(page)[:16] == ieee.encrypt(page)[:16]
assert gb.encrypt(page)[16:] != ieee.encrypt(page)[16:]
print("kernel in use:", csvfast.info()["kernels"]["sm4"]["chosen"])
