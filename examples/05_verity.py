"""dm-verity with SM3: a hash area that veritysetup and the kernel accept, and a check that finds one flipped bit."""

from __future__ import annotations

import tempfile
from pathlib import Path

from csvfast.measure import measure_image
from csvfast.measure.verity import format_verity, verify_verity

with tempfile.TemporaryDirectory() as directory:
    image, hashes = Path(directory, "root.img"), Path(directory, "root.hashes")
    image.write_bytes(b"".join(number.to_bytes(8, "little") * 512 for number in range(2000)))

    record = format_verity(image, hashes, salt=bytes.fromhex("00112233"))
    print("root hash:", record.root_hash.hex())
    print(f"hash area: {hashes.stat().st_size} bytes for {image.stat().st_size}")
    assert verify_verity(image, hashes, record.root_hash).ok

    content = bytearray(image.read_bytes())
    content[1234 * 4096 + 17] ^= 1
    image.write_bytes(content)
    check = verify_verity(image, hashes, record.root_hash)
    print("after one flipped bit:", *check.problems, sep="\n  ")
    assert not check.ok

    # The page tree is the same structure without salt, of any length, as one number.
    print("page tree:", measure_image(image, "tree").hexdigest)
    print("linear:   ", measure_image(image).hexdigest)
