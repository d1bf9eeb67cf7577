"""Computes the multiples of the SM2 base point and prints csrc/sm2/sm2_base_table.c.

    python3 csrc/tools/sm2_tables.py > csrc/sm2/sm2_base_table.c

Entry (w, i) is (i + 1) * 2^(7 w) * G for w < 37, i < 64: affine coordinates in Montgomery form (x * 2^256 mod p) as four 64-bit
limbs, least significant first. Curve: GB/T 32918.5-2017. Affine arithmetic straight from the definition, each point checked to lie
on the curve, and the last of a window tied to the first of the next one, so that a wrong table cannot be printed.
"""

from __future__ import annotations

P = 0xFFFFFFFEFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF00000000FFFFFFFFFFFFFFFF
A = P - 3
B = 0x28E9FA9E9D9F5E344D5A9E4BCF6509A7F39789F515AB8F92DDBCBD414D940E93
G = (
    0x32C4AE2C1F1981195F9904466A39C9948FE30BBFF2660BE1715A4589334C74C7,
    0xBC3736A2F4F6779C59BDCEE36B692153D0A9877CC62A474002DF32E52139F0A0,
)
BITS, WINDOWS, ENTRIES = 7, 37, 64

Point = tuple[int, int]


def add(left: Point, right: Point) -> Point:
    """Sum of two points, neither opposite to the other."""
    (x1, y1), (x2, y2) = left, right
    if left == right:
        slope = (3 * x1 * x1 + A) * pow(2 * y1, -1, P) % P
    else:
        assert x1 != x2
        slope = (y2 - y1) * pow(x2 - x1, -1, P) % P
    x = (slope * slope - x1 - x2) % P
    return x, (slope * (x1 - x) - y1) % P


def limbs(value: int) -> str:
    """A coordinate in Montgomery form as C initialisers."""
    montgomery = (value << 256) % P
    return ", ".join(f"0x{montgomery >> 64 * i & (1 << 64) - 1:016x}" for i in range(4))


def main() -> None:
    print("/* Multiples of the SM2 base point. Made by tools/sm2_tables.py, which says what they are; do not edit. */")
    print('#include "sm2_kernel.h"\n')
    print("const csvf_sm2_affine csvf__sm2_base_table[CSVF_SM2_BASE_WINDOWS * CSVF_SM2_BASE_ENTRIES] = {")
    first = G
    for _ in range(WINDOWS):
        point = first
        for i in range(ENTRIES):
            x, y = point
            assert (y * y - x * x * x - A * x - B) % P == 0
            print(f"    {{{{{limbs(x)}}}, {{{limbs(y)}}}}},")
            if i < ENTRIES - 1:
                point = add(point, first)
        following = first
        for _ in range(BITS):
            following = add(following, following)
        assert following == add(point, point)  # 2 * 64 * first = 2^7 * first
        first = following
    print("};")


if __name__ == "__main__":
    main()
