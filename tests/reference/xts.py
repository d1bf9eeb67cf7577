"""XTS in plain Python over the reference SM4: both standards, written from GB/T 17964-2021 and IEEE 1619-2018."""

from __future__ import annotations

from reference.sm4 import crypt_block, round_keys


def times_alpha(tweak: bytes, standard: str) -> bytes:
    if standard == "ieee":
        value = int.from_bytes(tweak, "little") << 1
        if value >> 128:
            value ^= (1 << 128) | 0x87
        return value.to_bytes(16, "little")
    value = int.from_bytes(tweak, "big")
    value = (value >> 1) ^ ((0xE1 << 120) if value & 1 else 0)
    return value.to_bytes(16, "big")


def _xor(a: bytes, b: bytes) -> bytes:
    return bytes(x ^ y for x, y in zip(a, b, strict=True))


def crypt_unit(key: bytes, tweak: bytes, data: bytes, standard: str, *, decrypt: bool = False, skip: int = 0) -> bytes:
    """One data unit of at least 16 bytes; `skip` is the index of its first block inside a larger unit."""
    data_keys = round_keys(key[:16])
    if decrypt:
        data_keys.reverse()
    t = crypt_block(round_keys(key[16:]), tweak)
    for _ in range(skip):
        t = times_alpha(t, standard)
    full, rest = divmod(len(data), 16)
    out = []
    for j in range(full - 1 if rest else full):
        out.append(_xor(crypt_block(data_keys, _xor(data[16 * j : 16 * j + 16], t)), t))
        t = times_alpha(t, standard)
    if rest:
        after = times_alpha(t, standard)
        first, second = (after, t) if decrypt else (t, after)
        x = _xor(crypt_block(data_keys, _xor(data[16 * full - 16 : 16 * full], first)), first)
        last = data[16 * full :] + x[rest:]
        out.append(_xor(crypt_block(data_keys, _xor(last, second)), second))
        out.append(x[:rest])
    return b"".join(out)


def crypt(key: bytes, data: bytes, unit: int, unit_size: int, standard: str, *, decrypt: bool = False) -> bytes:
    """Consecutive data units numbered from `unit`."""
    return b"".join(
        crypt_unit(key, (unit + i).to_bytes(16, "little"), data[place : place + unit_size], standard, decrypt=decrypt)
        for i, place in enumerate(range(0, len(data), unit_size))
    )
