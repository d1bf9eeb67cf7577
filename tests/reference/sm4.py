"""SM4 block cipher in plain Python, written from GB/T 32907-2016. The S-box is computed from its algebra, not copied."""

from __future__ import annotations

_POLYNOMIAL = 0x1F5  # x^8 + x^7 + x^6 + x^5 + x^4 + x^2 + 1


def _multiply(a: int, b: int) -> int:
    result = 0
    while b:
        if b & 1:
            result ^= a
        a <<= 1
        if a & 0x100:
            a ^= _POLYNOMIAL
        b >>= 1
    return result


def _inverse(a: int) -> int:
    result = 1
    for _ in range(254):
        result = _multiply(result, a)
    return result if a else 0


def _affine(a: int) -> int:
    """Bit i of the result is the parity of a and the row 0xA7 rotated left by i, plus the constant 0xD3."""
    result = 0xD3
    for bit in range(8):
        row = ((0xA7 << bit) | (0xA7 >> (8 - bit))) & 0xFF
        result ^= ((row & a).bit_count() & 1) << bit
    return result


SBOX = bytes(_affine(_inverse(_affine(x))) for x in range(256))
_FK = (0xA3B1BAC6, 0x56AA3350, 0x677D9197, 0xB27022DC)
_CK = tuple(int.from_bytes(bytes((4 * i + j) * 7 % 256 for j in range(4)), "big") for i in range(32))


def _rotate(x: int, n: int) -> int:
    return ((x << n) | (x >> (32 - n))) & 0xFFFFFFFF


def _substitute(x: int) -> int:
    return int.from_bytes(x.to_bytes(4, "big").translate(SBOX), "big")


def round_keys(key: bytes) -> list[int]:
    words = [int.from_bytes(key[4 * i : 4 * i + 4], "big") ^ _FK[i] for i in range(4)]
    for i in range(32):
        t = _substitute(words[i + 1] ^ words[i + 2] ^ words[i + 3] ^ _CK[i])
        words.append(words[i] ^ t ^ _rotate(t, 13) ^ _rotate(t, 23))
    return words[4:]


def crypt_block(keys: list[int], block: bytes) -> bytes:
    """Encrypts with the round keys in order, decrypts with them reversed."""
    x = [int.from_bytes(block[4 * i : 4 * i + 4], "big") for i in range(4)]
    for key in keys:
        t = _substitute(x[1] ^ x[2] ^ x[3] ^ key)
        x = [x[1], x[2], x[3], x[0] ^ t ^ _rotate(t, 2) ^ _rotate(t, 10) ^ _rotate(t, 18) ^ _rotate(t, 24)]
    return b"".join(word.to_bytes(4, "big") for word in reversed(x))


def ctr(key: bytes, counter: bytes, data: bytes) -> bytes:
    keys, number = round_keys(key), int.from_bytes(counter, "big")
    stream = b"".join(
        crypt_block(keys, ((number + i) % (1 << 128)).to_bytes(16, "big")) for i in range(-(-len(data) // 16))
    )
    return bytes(a ^ b for a, b in zip(data, stream, strict=False))
