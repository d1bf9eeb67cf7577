"""Derives the constants of the vector SM4 kernels and prints csrc/sm4/sm4_tables.h.

    python3 csrc/tools/sm4_tables.py > csrc/sm4/sm4_tables.h

Everything is derived from the S-box table of GB/T 32907-2016 and from the two field definitions, and every step asserts what
it claims, so a wrong constant cannot be printed.

Algebra
  S-box       S(x) = A inv(A x + C) + C in GF(2^8) modulo x^8+x^7+x^6+x^5+x^4+x^2+1 (0x1f5); A is circulant, C = 0xd3.
              Through a field isomorphism into the AES field (0x11b), whose inversion GFNI and AES-NI compute:
              S(x) = OUT inv(P x + c) + C.
  State       Kernels keep every state byte x as x' = P x + kappa, where kappa gathers the round key and c, so that the sum of three
              state words is already the argument of the inversion. The round keys become constants of the linear layer.
  Linear      L(y) = y + (y<<<2) + (y<<<10) + (y<<<18) + (y<<<24). With U = P (I + shl2) OUT and W = P (I + shr6) OUT applied to the
              inverted bytes, byte b of L is u[b] + w[b+1] + (u+w)[b+2] + (u+w)[b+3], indices modulo 4, byte 0 the least significant.
  Key linear  L'(y) = y + (y<<<13) + (y<<<23): byte b is y[b] + shl5 y[b-1] + (shr3 + shl7) y[b-2] + shr1 y[b-3].
  Tweaks      multiplication by alpha^s for s < 8 moves each byte by s bits into itself and its successor; the byte that leaves
              byte 15 returns through x^128 = x^7 + x^2 + x + 1 into bytes 0 and 1. GB/T 17964 numbers the bits of a byte the other way
              round than IEEE 1619, so its matrices are the IEEE ones conjugated by the bit reversal.

A matrix is a list of eight columns: column i is the image of bit i (1 << i).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

Matrix = list[int]

SBOX = bytes.fromhex(
    "d690e9fecce13db716b614c228fb2c052b679a762abe04c3aa44132649860699"
    "9c4250f491ef987a33540b43edcfac62e4b31ca9c908e89580df94fa758f3fa6"
    "4707a7fcf37317ba83593c19e6854fa8686b81b27164da8bf8eb0f4b70569d35"
    "1e240e5e6358d1a225227c3b01217887d40046579fd327524c3602e7a0c4c89e"
    "eabf8ad240c738b5a3f7f2cef96115a1e0ae5da49b341a55ad933230f58cb1e3"
    "1df6e22e8266ca60c02923ab0d534e6fd5db3745defd8e2f03ff6a726d6c5b51"
    "8d1baf92bbddbc7f11d95c411f105ad80ac13188a5cd7bbd2d74d012b8e5b4b0"
    "8969974a0c96777e65b9f109c56ec68418f07dec3adc4d2079ee5f3ed7cb3948"
)
SM4_FIELD = 0x1F5
AES_FIELD = 0x11B
SBOX_CONSTANT = 0xD3
FK = (0xA3B1BAC6, 0x56AA3350, 0x677D9197, 0xB27022DC)


def multiply(a: int, b: int, polynomial: int) -> int:
    """a b in GF(2^8) modulo `polynomial`."""
    result = 0
    while b:
        if b & 1:
            result ^= a
        a <<= 1
        if a & 0x100:
            a ^= polynomial
        b >>= 1
    return result


def inversions(polynomial: int) -> list[int]:
    """Table of inverses; 0 maps to 0."""
    table = [0] * 256
    for a in range(1, 256):
        table[a] = next(b for b in range(1, 256) if multiply(a, b, polynomial) == 1)
    return table


def matrix_of(function: Callable[[int], int]) -> Matrix:
    return [function(1 << i) for i in range(8)]


def apply(matrix: Matrix, x: int) -> int:
    result = 0
    for i in range(8):
        if x >> i & 1:
            result ^= matrix[i]
    return result


def product(*matrices: Matrix) -> Matrix:
    """Leftmost applied last."""
    result = IDENTITY
    for matrix in reversed(matrices):
        result = [apply(matrix, column) for column in result]
    return result


def total(*matrices: Matrix) -> Matrix:
    result = [0] * 8
    for matrix in matrices:
        result = [a ^ b for a, b in zip(result, matrix, strict=True)]
    return result


def inverse(matrix: Matrix) -> Matrix:
    images = {apply(matrix, x): x for x in range(256)}
    assert len(images) == 256
    return [images[1 << i] for i in range(8)]


def left(bits: int) -> Matrix:
    return matrix_of(lambda x: x << bits & 0xFF)


def right(bits: int) -> Matrix:
    return matrix_of(lambda x: x >> bits)


IDENTITY: Matrix = [1 << i for i in range(8)]
ZERO: Matrix = [0] * 8
REVERSE: Matrix = [0x80 >> i for i in range(8)]

# ---- S-box ---------------------------------------------------------------------------------------------------------------

INVERSE_SM4, INVERSE_AES = inversions(SM4_FIELD), inversions(AES_FIELD)


def circulant(row: int) -> Matrix:
    """Output bit 7 - r is the parity of x against `row` rotated right by r."""
    rows = [(row >> r | row << (8 - r)) & 0xFF for r in range(8)]
    return [sum(1 << (7 - r) for r in range(8) if rows[r] >> i & 1) for i in range(8)]


def sbox_by(first: Matrix, constant: int, inverted: list[int], last: Matrix) -> bytes:
    return bytes(apply(last, inverted[apply(first, x) ^ constant]) ^ SBOX_CONSTANT for x in range(256))


A = next(a for a in map(circulant, range(256)) if sbox_by(a, SBOX_CONSTANT, INVERSE_SM4, a) == SBOX)


def isomorphism() -> Matrix:
    """GF(2^8)/0x1f5 -> GF(2^8)/0x11b: x goes to a root of 0x1f5 in the AES field."""
    for root in range(2, 256):
        powers = [1]
        for _ in range(8):
            powers.append(multiply(powers[-1], root, AES_FIELD))
        value = 0
        for i in range(9):
            if SM4_FIELD >> i & 1:
                value ^= powers[i]
        if value == 0:
            return powers[:8]
    raise AssertionError("0x1f5 has no root in the AES field")


PHI = isomorphism()
assert all(apply(inverse(PHI), INVERSE_AES[apply(PHI, x)]) == INVERSE_SM4[x] for x in range(256))
P = product(PHI, A)
P_INVERSE = inverse(P)
INPUT_CONSTANT = apply(PHI, SBOX_CONSTANT)
OUT = product(A, inverse(PHI))
assert sbox_by(P, INPUT_CONSTANT, INVERSE_AES, OUT) == SBOX

# ---- linear layers -------------------------------------------------------------------------------------------------------

U = product(P, total(IDENTITY, left(2)), OUT)
W = product(P, total(IDENTITY, right(6)), OUT)
V = total(U, W)
# L of the word whose four bytes are all C: the contribution of the S-box's output constant, in the state's basis.
LINEAR_CONSTANT = apply(P, apply(total(left(2), right(6)), SBOX_CONSTANT))
KEY = [product(P, m, OUT) for m in (IDENTITY, left(5), total(right(3), left(7)), right(1))]
# the same constant for L': every byte of C <<< 13 and C <<< 23 as 32-bit words of equal bytes
KEY_CONSTANT = apply(P, apply(total(IDENTITY, left(5), right(3), left(7), right(1)), SBOX_CONSTANT))


def rotate(word: int, bits: int) -> int:
    return (word << bits | word >> (32 - bits)) & 0xFFFFFFFF


def tau(word: int) -> int:
    return int.from_bytes(bytes(SBOX[b] for b in word.to_bytes(4, "little")), "little")


def check_linear_layers() -> None:
    """Both layers by matrices against their definitions, on words that reach every byte value in every position."""
    for n in range(1024):
        word = n * 0x9E3779B1 & 0xFFFFFFFF
        y = tau(word)
        inverted = [INVERSE_AES[apply(P, b) ^ INPUT_CONSTANT] for b in word.to_bytes(4, "little")]
        u, w, v = ([apply(m, x) for x in inverted] for m in (U, W, V))
        wanted = y ^ rotate(y, 2) ^ rotate(y, 10) ^ rotate(y, 18) ^ rotate(y, 24)
        for b in range(4):
            got = u[b] ^ w[(b + 1) % 4] ^ v[(b + 2) % 4] ^ v[(b + 3) % 4] ^ LINEAR_CONSTANT
            assert got == apply(P, wanted >> (8 * b) & 0xFF)
        wanted = y ^ rotate(y, 13) ^ rotate(y, 23)
        for b in range(4):
            got = KEY_CONSTANT
            for k in range(4):
                got ^= apply(KEY[k], inverted[(b - k) % 4])
            assert got == apply(P, wanted >> (8 * b) & 0xFF)


check_linear_layers()

# ---- AES-NI: the last round of AES gives AES_AFFINE inv(x) + 0x63; a nibble table pair applies a matrix with pshufb ----------

def rotate8(x: int, bits: int) -> int:
    return (x << bits | x >> (8 - bits)) & 0xFF


AES_AFFINE = matrix_of(lambda x: x ^ rotate8(x, 1) ^ rotate8(x, 2) ^ rotate8(x, 3) ^ rotate8(x, 4))


AES_TO = inverse(AES_AFFINE)
assert apply(AES_AFFINE, INVERSE_AES[0x53]) ^ 0x63 == 0xED  # FIPS 197, 5.1.1


def nibbles(matrix: Matrix) -> tuple[list[int], list[int]]:
    return [apply(matrix, x) for x in range(16)], [apply(matrix, x << 4) for x in range(16)]


# ---- tweaks --------------------------------------------------------------------------------------------------------------

def times_0x87(x: int) -> int:
    """15 bits."""
    return x ^ x << 1 ^ x << 2 ^ x << 7


FOLD_LOW = matrix_of(lambda x: times_0x87(x) & 0xFF)
FOLD_HIGH = matrix_of(lambda x: times_0x87(x) >> 8)


def as_gb(matrix: Matrix) -> Matrix:
    return product(REVERSE, matrix, REVERSE)


def same(matrix: Matrix) -> Matrix:
    return matrix


def over(bits: int) -> Matrix:
    """What a byte shifted left by `bits` hands to the next byte."""
    return right(8 - bits) if bits else ZERO


def double(tweak: bytes, standard: str) -> bytes:
    """alpha T by the definition of the standard (the reference for the checks)."""
    if standard == "ieee":
        value = int.from_bytes(tweak, "little") << 1
        return ((value & ((1 << 128) - 1)) ^ (0x87 if value >> 128 else 0)).to_bytes(16, "little")
    value = int.from_bytes(tweak, "big")
    return (value >> 1 ^ (0xE1 << 120 if value & 1 else 0)).to_bytes(16, "big")


def gather_indices() -> list[list[int]]:
    """Byte k of T x^(8 m) as an index [m][k] into the 64-byte table T (0..15) | G (16..31) | L (32..47) | Z (48), where L = FOLD_LOW T,
    G[n] = L[n] + FOLD_HIGH T[n-1], Z[0] = T[0] + FOLD_HIGH T[15]."""
    rows = []
    for m in range(16):
        row = []
        for k in range(16):
            if k > m or m == 0:
                row.append(k - m)
            elif k == m:
                row.append(48)
            else:
                row.append(16 + 16 - m + k if k else 32 + 16 - m)
        rows.append(row)
    return rows


GATHER = gather_indices()


def check_tweaks(standard: str, conjugate: Callable[[Matrix], Matrix]) -> None:
    """T x^(8 m + s) by the gather and the matrices against repeated doubling."""
    low, high = conjugate(FOLD_LOW), conjugate(FOLD_HIGH)
    for seed in range(24):
        t = bytes((seed * 151 + 89 * i * i + 7 * i) & 0xFF for i in range(16)) if seed else bytes(15) + b"\xff"
        lows = [apply(low, x) for x in t]
        highs = [apply(high, x) for x in t]
        table = [*t, *(lows[n] ^ (highs[n - 1] if n else 0) for n in range(16)), *lows, t[0] ^ highs[15]]
        wanted = t
        for power in range(128):
            m, s = divmod(power, 8)
            moved = [table[i] for i in GATHER[m]]
            shl, shr = conjugate(left(s)), conjugate(over(s))
            got = [apply(shl, moved[k]) ^ (apply(shr, moved[k - 1]) if k else 0) for k in range(16)]
            got[0] ^= apply(product(low, shr), moved[15])
            got[1] ^= apply(product(high, shr), moved[15])
            assert bytes(got) == wanted
            wanted = double(wanted, standard)


# ---- output --------------------------------------------------------------------------------------------------------------


def qword(matrix: Matrix) -> str:
    """The operand form of gf2p8affineqb: output bit i is the parity of matrix byte 7 - i against the input."""
    value = 0
    for i in range(8):
        row = sum(1 << j for j in range(8) if matrix[j] >> i & 1)
        value |= row << (8 * (7 - i))
    return f"0x{value:016x}"


def define(name: str, value: str) -> None:
    print(f"#define CSVF_SM4_{name} {value}")


def define_matrix(name: str, matrix: Matrix) -> None:
    define(name, f"UINT64_C({qword(matrix)})")


def rows_of(values: Iterable[str], per_row: int) -> str:
    items = list(values)
    rows = [", ".join(items[i : i + per_row]) for i in range(0, len(items), per_row)]
    return ",\n    ".join(rows)


def byte_table(name: str, values: Iterable[int], align: int = 16) -> None:
    items = list(values)
    print(f"CSVF_SM4_TABLE({align}) uint8_t csvf__sm4_{name}[{len(items)}] = {{")
    print(f"    {rows_of((str(x) for x in items), 16)}}};")


def matrix_table(name: str, matrices: Iterable[Matrix]) -> None:
    items = list(matrices)
    print(f"CSVF_SM4_TABLE(64) uint64_t csvf__sm4_{name}[{len(items)}] = {{")
    print(f"    {rows_of((f'UINT64_C({qword(m)})' for m in items), 4)}}};")


def main() -> None:
    print("""/* Constants of the vector SM4 kernels. Made by tools/sm4_tables.py, which derives and checks them; do not edit.
 *
 * None of these tables is ever indexed by a secret: they are whole vector operands, or indexed by public shift counts.
 *
 * Matrices are operands of gf2p8affineqb / gf2p8affineinvqb. State bytes are kept as P x + kappa (see the generator):
 *   P, P_INVERSE       into and out of the state's basis
 *   U, W, V = U + W    S-box output matrix with the linear layer, for bytes already inverted by gf2p8affineinvqb:
 *                      byte b of L(S) = u[b] + w[b+1] + v[b+2] + v[b+3] + LINEAR_CONSTANT (byte 0 least significant, indices modulo 4)
 *   KEY_0..KEY_3       the same for the key schedule: byte b of L'(S) = sum over k of KEY_k y[b-k], + KEY_CONSTANT
 *   INPUT_CONSTANT     the S-box is OUT inv(P x + INPUT_CONSTANT) + 0xd3
 *   *_AES_LOW/_HIGH    nibble tables for pshufb of the same matrices for bytes that come from aesenclast (zero round key); *_AES_CONSTANT
 *                      is what the 0x63 of the AES S-box adds, and P_LOW/.. the plain matrices;
 *                      aes_of_out takes a change of the SM4 S-box's output to the change of aesenclast's output that causes it
 * Tweak tables, one set per standard, s = 0..7 the bits of a shift:
 *   shift_left[s]      what alpha^s leaves in a byte; shift_over[s] what it hands to the next byte
 *   wrap_low[s], wrap_high[s]  what shift_over of byte 15 adds to bytes 0 and 1 (through x^128 = x^7 + x^2 + x + 1)
 *   FOLD_LOW, FOLD_HIGH  x^128 times a byte: its low byte, and what it hands to the next byte
 *   gather[16 m + k]   byte k of T x^(8 m) as an index into T | G | L | Z, where L = FOLD_LOW T, G[n] = L[n] + FOLD_HIGH T[n-1],
 *                      Z[0] = T[0] + FOLD_HIGH T[15]; the same for both standards
 *   gather_columns[8 k + m]  the same for m < 8, eight neighbours for one byte k */
#ifndef CSVF_SM4_TABLES_H
#define CSVF_SM4_TABLES_H

#include <stdint.h>

/* A kernel uses some of the tables only. */
#define CSVF_SM4_TABLE(alignment) static const __attribute__((aligned(alignment), unused))
""")
    for name, matrix in (("P", P), ("P_INVERSE", P_INVERSE), ("U", U), ("W", W), ("V", V)):
        define_matrix(name, matrix)
    for k in range(4):
        define_matrix(f"KEY_{k}", KEY[k])
    for name, value in (("INPUT_CONSTANT", INPUT_CONSTANT), ("LINEAR_CONSTANT", LINEAR_CONSTANT), ("KEY_CONSTANT", KEY_CONSTANT)):
        define(name, f"0x{value:02x}")
    print("\n/* P applied to the bytes of the system parameter FK and of the constants CK (GB/T 32907-2016 7.3), most significant byte of each word first. */")

    byte_table("fk", [apply(P, b) for word in FK for b in word.to_bytes(4, "big")])
    byte_table("ck", [apply(P, n * 7 & 0xFF) for n in range(128)], 64)
    print("\n/* AES-NI */")
    for name, matrix in (("u", product(U, AES_TO)), ("w", product(W, AES_TO))):
        low, high = nibbles(matrix)
        byte_table(f"{name}_aes_low", low)
        byte_table(f"{name}_aes_high", high)
        define(f"{name.upper()}_AES_CONSTANT", f"0x{apply(matrix, 0x63):02x}")
    for k in range(4):
        matrix = product(KEY[k], AES_TO)
        low, high = nibbles(matrix)
        byte_table(f"key{k}_aes_low", low)
        byte_table(f"key{k}_aes_high", high)
        define(f"KEY_{k}_AES_CONSTANT", f"0x{apply(matrix, 0x63):02x}")
    for name, matrix in (("p", P), ("p_inverse", P_INVERSE), ("aes_of_out", product(AES_AFFINE, inverse(OUT)))):
        low, high = nibbles(matrix)
        byte_table(f"{name}_low", low)
        byte_table(f"{name}_high", high)
    print("/* undoes the ShiftRows of aesenclast (pshufb before it) */")
    byte_table("unshift_rows", [(13 * i) % 16 for i in range(16)])
    print("\n/* tweaks */")
    byte_table("gather", [x for row in GATHER for x in row], 64)
    byte_table("gather_columns", [GATHER[m][k] for k in range(16) for m in range(8)], 64)
    sets: tuple[tuple[str, Callable[[Matrix], Matrix]], ...] = (("ieee", same), ("gb", as_gb))
    for standard, conjugate in sets:
        check_tweaks(standard, conjugate)
        upper = standard.upper()
        define_matrix(f"{upper}_FOLD_LOW", conjugate(FOLD_LOW))
        define_matrix(f"{upper}_FOLD_HIGH", conjugate(FOLD_HIGH))
        matrix_table(f"{standard}_shift_left", [conjugate(left(s)) for s in range(8)])
        matrix_table(f"{standard}_shift_over", [conjugate(over(s)) for s in range(8)])
        matrix_table(f"{standard}_wrap_low", [conjugate(product(FOLD_LOW, over(s))) for s in range(8)])
        matrix_table(f"{standard}_wrap_high", [conjugate(product(FOLD_HIGH, over(s))) for s in range(8)])
    print("\n#endif")


if __name__ == "__main__":
    main()
