"""Guest memory under two ASIDs, and the host's view of the same frames."""

from __future__ import annotations

import csvfast

with csvfast.EncryptedMemory(1 << 20) as memory:
    memory.install(1)  # a random key that nobody can learn
    memory.install(2)

    memory.write(0x3000, b"the guest's secret", asid=1)
    print("guest 1 reads:", memory.read(0x3000, 18, asid=1))
    print("guest 2 reads:", memory.read(0x3000, 18, asid=2).hex())
    print("host sees:    ", bytes(memory.raw[0x3000:0x3012]).hex())
    assert memory.read(0x3000, 18, asid=1) == b"the guest's secret"
    assert memory.read(0x3000, 18, asid=2) != b"the guest's secret"

    # Ciphertext moved to another frame is worthless: the tweak is the place.
    memory.raw[0x5000:0x6000] = memory.raw[0x3000:0x4000]
    assert memory.read(0x5000, 18, asid=1) != b"the guest's secret"

    # Launch: the host loads plaintext, the engine measures and encrypts it in one pass.
    firmware = bytes(range(256)) * 64
    memory.write(0x10000, firmware, asid=0)
    digest = csvfast.sm3()
    memory.launch_update(0x10000, len(firmware), asid=1, linear=digest)
    assert digest.digest() == csvfast.sm3(firmware).digest()
    assert memory.read(0x10000, len(firmware), asid=1) == firmware
    print("launch digest:", digest.hexdigest()[:32], "...")

    memory.remove(1)  # wiped; the frames keep a ciphertext that nobody can read any more
    try:
        memory.read(0x3000, 18, asid=1)
    except csvfast.errors.UnknownAsidError as error:
        print("after remove: ", error)
    print("statistics:   ", memory.stats())
