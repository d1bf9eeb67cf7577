"""SM2 as the standard writes it: affine points, Python integers, no cleverness. Slow, and not for secrets."""

from __future__ import annotations

import struct

import csvfast

P = 0xFFFFFFFEFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF00000000FFFFFFFFFFFFFFFF
A = P - 3
B = 0x28E9FA9E9D9F5E344D5A9E4BCF6509A7F39789F515AB8F92DDBCBD414D940E93
N = 0xFFFFFFFEFFFFFFFFFFFFFFFFFFFFFFFF7203DF6B21C6052B53BBF40939D54123
G = (
    0x32C4AE2C1F1981195F9904466A39C9948FE30BBFF2660BE1715A4589334C74C7,
    0xBC3736A2F4F6779C59BDCEE36B692153D0A9877CC62A474002DF32E52139F0A0,
)
Point = tuple[int, int] | None  # None is infinity


def on_curve(point: Point) -> bool:
    return point is not None and (point[1] ** 2 - point[0] ** 3 - A * point[0] - B) % P == 0


def lift(x: int, odd: int = 0) -> Point:
    """The point with that x and parity of y, or None."""
    square = (x**3 + A * x + B) % P
    y = pow(square, (P + 1) // 4, P)
    if y * y % P != square:
        return None
    return (x, y if y % 2 == odd else P - y)


def negate(point: Point) -> Point:
    return point and (point[0], -point[1] % P)


def add(one: Point, other: Point) -> Point:
    if one is None or other is None:
        return one or other
    (x1, y1), (x2, y2) = one, other
    if x1 == x2:
        if (y1 + y2) % P == 0:
            return None
        slope = (3 * x1 * x1 + A) * pow(2 * y1, -1, P) % P
    else:
        slope = (y2 - y1) * pow(x2 - x1, -1, P) % P
    x3 = (slope * slope - x1 - x2) % P
    return x3, (slope * (x1 - x3) - y1) % P


def multiply(factor: int, point: Point = G) -> Point:
    result: Point = None
    for bit in bin(factor % N)[2:]:
        result = add(result, result)
        if bit == "1":
            result = add(result, point)
    return result


def encode(point: Point) -> bytes:
    assert point is not None
    return number(point[0]) + number(point[1])


def decode(encoded: bytes) -> Point:
    return int.from_bytes(encoded[:32], "big"), int.from_bytes(encoded[32:], "big")


def number(value: int) -> bytes:
    return value.to_bytes(32, "big")


def z(user_id: bytes, point: Point) -> bytes:
    text = struct.pack(">H", 8 * len(user_id)) + user_id + b"".join(map(number, (A, B, *G))) + encode(point)
    return csvfast.sm3(text).digest()


def sign(d: int, e: int, k: int) -> bytes:
    point = multiply(k)
    assert point is not None
    r = (e + point[0]) % N
    s = pow(1 + d, -1, N) * (k - r * d) % N
    assert r
    assert s
    assert (r + k) % N
    return number(r) + number(s)


def verify(point: Point, e: int, signature: bytes) -> bool:
    r, s = decode(signature)  # type: ignore[misc]
    t = (r + s) % N
    if not (0 < r < N and 0 < s < N and t):
        return False
    found = add(multiply(s), multiply(t, point))
    return found is not None and (e + found[0]) % N == r


def kdf(secret: bytes, length: int) -> bytes:
    blocks = (csvfast.sm3(secret + struct.pack(">I", i)).digest() for i in range(1, length // 32 + 2))
    return b"".join(blocks)[:length]


def encrypt(point: Point, plaintext: bytes, k: int) -> bytes:
    shared = encode(multiply(k, point))
    stream = kdf(shared, len(plaintext))
    c3 = csvfast.sm3(shared[:32] + plaintext + shared[32:]).digest()
    return b"\x04" + encode(multiply(k)) + c3 + bytes(a ^ b for a, b in zip(plaintext, stream, strict=True))


def forge(s: int, t: int, target: Point) -> tuple[Point, int, bytes]:
    """A key, an e and a signature that is valid because s G + t P is exactly `target`; nobody knows the private key."""
    assert target is not None
    point = multiply(pow(t, -1, N), add(target, negate(multiply(s))))
    r = (t - s) % N
    return point, (r - target[0]) % N, number(r) + number(s)
