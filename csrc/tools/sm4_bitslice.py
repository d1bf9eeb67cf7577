#!/usr/bin/env python3
"""Derives the SM4 S-box as a bitsliced circuit and prints csrc/sm4/sm4_portable_sbox.h.

    python3 sm4_bitslice.py > ../sm4/sm4_portable_sbox.h

The SM4 S-box is S(x) = A inv(A x + C) + C over GF(2)[t]/(t^8+t^7+t^6+t^5+t^4+t^2+1) (GB/T 32907-2016; the algebraic form is
from Liu et al., "Analysis of the SMS4 Block Cipher", ACISP 2007). Inversion in any GF(256) is the same map up to a change of
basis, so the non-linear middle of the smallest known AES S-box circuit (Boyar, Peralta: "A new combinational logic minimization
technique with applications to cryptology", SEA 2010; 62 gates from 22 linear forms to 18 products) serves here too.
Only the two linear layers differ. There are 8 * 255 of them (field isomorphisms, and inv(a x) = inv(a) inv(x)); this program
searches them for the fewest exclusive-ors, sharing sums greedily, the bottom layer through its transpose
(a linear circuit and its transpose differ in cost by outputs - inputs only).

The order of the gates is then searched for few spills, as compilers keep the order they are given (gcc -O2 on x86-64: 15 % of the
kernel's speed).

The constants are left out of the circuit: it computes y = S(x + INPUT) + OUTPUT, and the key schedule absorbs both.
The finished text is executed on all 256 inputs before it is printed.
"""

from __future__ import annotations

import argparse
import random
import re
import sys

AES_POLYNOMIAL, SM4_POLYNOMIAL = 0x11B, 0x1F5
AFFINE_CONSTANT = 0xD3

# Boyar and Peralta's top layer for AES, bit 0 = most significant: names of its 22 linear forms as sets of input bits.
AES_TOP = """
y14=x3^x5 y13=x0^x6 y9=x0^x3 y8=x0^x5 t0=x1^x2 y1=t0^x7 y4=y1^x3 y12=y13^y14 y2=y1^x0 y5=y1^x6 y3=y5^y8 t1=x4^y12 y15=t1^x5
y20=t1^x1 y6=y15^x7 y10=y15^t0 y11=y20^y9 y7=x7^y11 y17=y10^y11 y19=y10^y8 y16=t0^y11 y21=y13^y16 y18=x0^y16 y0=x7
"""
FORMS = [f"y{i}" for i in range(22)]

# Their non-linear middle: 22 forms in, 18 products out.
MIDDLE = """
t2=y12&y15 t3=y3&y6 t4=t3^t2 t5=y4&y0 t6=t5^t2 t7=y13&y16 t8=y5&y1 t9=t8^t7 t10=y2&y7 t11=t10^t7 t12=y9&y11 t13=y14&y17
t14=t13^t12 t15=y8&y10 t16=t15^t12 t17=t4^t14 t18=t6^t16 t19=t9^t14 t20=t11^t16 t21=t17^y20 t22=t18^y19 t23=t19^y21 t24=t20^y18
t25=t21^t22 t26=t21&t23 t27=t24^t26 t28=t25&t27 t29=t28^t22 t30=t23^t24 t31=t22^t26 t32=t31&t30 t33=t32^t24 t34=t23^t33
t35=t27^t33 t36=t24&t35 t37=t36^t34 t38=t27^t36 t39=t29&t38 t40=t25^t39 t41=t40^t37 t42=t29^t33 t43=t29^t40 t44=t33^t37
t45=t42^t41
z0=t44&y15 z1=t37&y6 z2=t33&y0 z3=t43&y16 z4=t40&y1 z5=t29&y7 z6=t42&y11 z7=t45&y17 z8=t41&y10 z9=t44&y12 z10=t37&y3
z11=t33&y4 z12=t43&y13 z13=t40&y5 z14=t29&y2 z15=t42&y9 z16=t45&y14 z17=t41&y8
"""
PRODUCTS = [f"z{i}" for i in range(18)]

Matrix = list[int]  # columns: image of each basis vector
Program = list[tuple[str, str, str, str]]  # target, left, operator, right


def multiply(a: int, b: int, polynomial: int) -> int:
    """Product in GF(256)."""
    result = 0
    while b:
        if b & 1:
            result ^= a
        a <<= 1
        if a & 0x100:
            a ^= polynomial
        b >>= 1
    return result


def inverses(polynomial: int) -> list[int]:
    """Table of inverses, 0 to 0."""
    table = [0] * 256
    for a in range(1, 256):
        power = a
        for _ in range(253):
            power = multiply(power, a, polynomial)
        table[a] = power
    return table


def apply(matrix: Matrix, vector: int) -> int:
    """matrix times vector."""
    result = 0
    for column in matrix:
        if vector & 1:
            result ^= column
        vector >>= 1
    return result


def compose(left: Matrix, right: Matrix) -> Matrix:
    """The map right, then left."""
    return [apply(left, column) for column in right]


def inverse_matrix(matrix: Matrix) -> Matrix:
    """Inverse of an 8 x 8 matrix."""
    where = {apply(matrix, x): x for x in range(256)}
    if len(where) != 256:
        raise ValueError("the matrix is singular")
    return [where[1 << i] for i in range(8)]


def sm4_affine() -> Matrix:
    """A: circulant, row r (from the most significant output bit) is 11010011 turned right r places."""
    rows = [((AFFINE_CONSTANT >> r) | (AFFINE_CONSTANT << (8 - r))) & 0xFF for r in range(8)]
    return [sum(((rows[7 - bit] >> column) & 1) << bit for bit in range(8)) for column in range(8)]


def parse(text: str) -> Program:
    """Straight-line program from 'a=b^c' words ('a=b' becomes 'a=b^0')."""
    program: Program = []
    for word in text.split():
        match = re.fullmatch(r"(\w+)=(\w+)(?:([\^&])(\w+))?", word)
        if match is None:
            raise ValueError(f"cannot parse {word!r}")
        program.append((match[1], match[2], match[3] or "^", match[4] or "zero"))
    return program


def run(program: Program, values: dict[str, int]) -> dict[str, int]:
    """Executes a straight-line program on integers used as bit vectors."""
    values = dict(values, zero=0)
    for target, left, operator, right in program:
        values[target] = values[left] ^ values[right] if operator == "^" else values[left] & values[right]
    return values


def share(targets: list[int], width: int, rng: random.Random) -> list[tuple[int, int, int]]:
    """Circuit of exclusive-ors for linear forms over `width` inputs, with cancellation allowed.

    Each step adds one sum of two known forms: one that is wanted itself if there is any, otherwise the one after which most
    wanted forms are one sum away (ties at random). Returns (new form, left, right)."""
    known = [1 << i for i in range(width)]
    wanted = {t for t in targets if t not in known}
    steps: list[tuple[int, int, int]] = []
    while wanted:
        have = set(known)
        sums: dict[int, tuple[int, int]] = {}
        for i, a in enumerate(known):
            for b in known[:i]:
                sums.setdefault(a ^ b, (a, b))
        direct = [s for s in wanted if s in sums]
        if direct:
            choice = rng.choice(direct)
        else:
            best, choices = -1, []
            for candidate in sums:
                if candidate in have:
                    continue
                # 16 per target that becomes one sum away, 1 per target that becomes two sums away
                score = 0
                for target in wanted:
                    rest = target ^ candidate
                    if rest in have:
                        score += 16
                    elif rest in sums:
                        score += 1
                if score > best:
                    best, choices = score, [candidate]
                elif score == best:
                    choices.append(candidate)
            choice = rng.choice(choices)
        steps.append((choice, *sums[choice]))
        known.append(choice)
        wanted.discard(choice)
    return steps


def transpose(steps: list[tuple[int, int, int]], targets: list[int], inputs: list[str], prefix: str) -> Program:
    """The transposed circuit: from one signal per target to one output o0..o7 per input of the original.

    Every exclusive-or node passes its own sum on to both its operands."""
    feeds: dict[int, list[str]] = {}
    for name, target in zip(inputs, targets, strict=True):
        feeds.setdefault(target, []).append(name)
    program: Program = []
    count = 0

    def collect(form: int, final: str | None) -> str:
        nonlocal count
        names = feeds.get(form, [])
        if not names:
            raise ValueError("an unused node")
        total = names[0]
        for position, name in enumerate(names[1:], 2):
            if final and position == len(names):
                new = final
            else:
                new, count = f"{prefix}{count}", count + 1
            program.append((new, total, "^", name))
            total = new
        return total

    for form, left, right in reversed(steps):
        total = collect(form, None)
        feeds.setdefault(left, []).append(total)
        feeds.setdefault(right, []).append(total)
    for bit in range(8):
        final = f"o{bit}"
        total = collect(1 << bit, final)
        if total != final:
            program.append((final, total, "^", "zero"))
    return program


def solve_bottom(products: list[int], wanted: list[int]) -> Matrix:
    """The linear map from the 18 products to 8 output bits; all given as truth tables of 256 bits. Returns, per product, the
    set of output bits it feeds."""
    basis: dict[int, tuple[int, int]] = {}
    for index, table in enumerate(products):
        combination = 1 << index
        while table:
            top = table.bit_length()
            if top not in basis:
                basis[top] = (table, combination)
                break
            table ^= basis[top][0]
            combination ^= basis[top][1]
        else:
            raise ValueError("the products are linearly dependent")
    columns = [0] * len(products)
    for bit, table in enumerate(wanted):
        combination = 0
        while table:
            reducer, used = basis[table.bit_length()]
            table ^= reducer
            combination ^= used
        for index in range(len(products)):
            if combination >> index & 1:
                columns[index] |= 1 << bit
    return columns


def aes_isomorphisms() -> list[Matrix]:
    """The eight field isomorphisms from the SM4 field to the AES field."""
    maps = []
    for root in range(2, 256):
        powers = [1]
        for _ in range(8):
            powers.append(multiply(powers[-1], root, AES_POLYNOMIAL))
        total = 0
        for i in range(9):
            if SM4_POLYNOMIAL >> i & 1:
                total ^= powers[i]
        if total == 0:
            maps.append(powers[:8])
    return maps


def reference() -> list[int]:
    """The S-box by its definition."""
    affine, table = sm4_affine(), inverses(SM4_POLYNOMIAL)
    sbox = [apply(affine, table[apply(affine, x) ^ AFFINE_CONSTANT]) ^ AFFINE_CONSTANT for x in range(256)]
    if sorted(sbox) != list(range(256)) or sbox[:4] != [0xD6, 0x90, 0xE9, 0xFE] or sbox[0xFF] != 0x48:
        raise AssertionError("the algebraic form does not give the S-box of GB/T 32907")
    return sbox


class Search:
    """Everything that is the same for all candidates."""

    def __init__(self) -> None:
        self.affine = sm4_affine()
        inputs = {f"x{i}": 1 << (7 - i) for i in range(8)}
        forms = run(parse(AES_TOP), inputs)
        self.top = [forms[name] for name in FORMS]  # masks over the AES byte
        tables = {
            name: sum((bin(mask & x).count("1") & 1) << x for x in range(256))
            for name, mask in zip(FORMS, self.top, strict=True)
        }
        produced = run(parse(MIDDLE), tables)
        invert = inverses(AES_POLYNOMIAL)
        wanted = [sum((invert[x] >> bit & 1) << x for x in range(256)) for bit in range(8)]
        self.bottom = solve_bottom([produced[name] for name in PRODUCTS], wanted)  # per product: bits of the AES inverse

    def layers(self, isomorphism: Matrix, scale: int) -> tuple[list[int], list[int]]:
        """Top forms over the SM4 byte, and per product the output bits it feeds."""
        scaling = [multiply(scale, 1 << i, AES_POLYNOMIAL) for i in range(8)]
        into = compose(scaling, compose(isomorphism, self.affine))
        # inv(scale * y) * scale = inv(y)
        out = compose(self.affine, compose(inverse_matrix(isomorphism), scaling))
        top = [sum((bin(mask & into[i]).count("1") & 1) << i for i in range(8)) for mask in self.top]
        return top, [apply(out, column) for column in self.bottom]


def gates(program: Program) -> int:
    """Gates of a program; a copy costs nothing."""
    return sum(1 for step in program if step[3] != "zero")


def top_program(steps: list[tuple[int, int, int]], targets: list[int]) -> Program:
    """Names the steps: wanted forms y*, the others a*."""
    names = {1 << i: f"x{i}" for i in range(8)}
    wanted = dict(zip(targets, FORMS, strict=True))
    if len(wanted) != len(targets):
        raise ValueError("two forms are equal")
    program: Program = []
    for position, (form, left, right) in enumerate(steps):
        names[form] = wanted.get(form, f"a{position}")
        program.append((names[form], names[left], "^", names[right]))
    alias = {wanted[1 << i]: f"x{i}" for i in range(8) if 1 << i in wanted}
    return program + [(name, source, "^", "zero") for name, source in alias.items()]


def search(tries: int, seed: int) -> tuple[Program, int]:
    """Best circuit found and the constant to be added to its input."""
    rng = random.Random(seed)  # noqa: S311 - a search, no secret
    space = Search()
    ranked = []
    for isomorphism in aes_isomorphisms():
        for scale in range(1, 256):
            top, bottom = space.layers(isomorphism, scale)
            cost = len(share(top, 8, rng)) + len(share(bottom, 8, rng)) + 10
            ranked.append((cost, top, bottom))
    ranked.sort(key=lambda entry: entry[0])
    best: tuple[int, Program, int] | None = None
    for _, top, bottom in ranked[:24]:
        upper = min((share(top, 8, rng) for _ in range(tries)), key=len)
        lower = min((share(bottom, 8, rng) for _ in range(tries)), key=len)
        program = top_program(upper, top) + parse(MIDDLE) + transpose(lower, bottom, PRODUCTS, "b")
        # A (x + d) + C = A x when A d = C: the constant moves to the input
        constant = apply(inverse_matrix(space.affine), AFFINE_CONSTANT)
        if best is None or gates(program) < best[0]:
            best = (gates(program), program, constant)
    if best is None:
        raise AssertionError("no candidate")
    return best[1], best[2]


def inline_copies(program: Program) -> Program:
    """Removes copies by renaming their uses (outputs keep theirs)."""
    rename: dict[str, str] = {}
    result: Program = []
    for target, left, operator, right in program:
        left, right = rename.get(left, left), rename.get(right, right)
        if right == "zero" and not target.startswith("o"):
            rename[target] = left
        else:
            result.append((target, left, operator, right))
    return result


def spill_cost(program: Program, registers: int) -> float:
    """Reloads plus 1.5 per spill of the program in its order, values being evicted by furthest next use (Belady)."""
    uses: dict[str, list[int]] = {}
    for position, (_, left, _, right) in enumerate(program):
        for name in (left, right):
            uses.setdefault(name, []).append(position)

    def next_use(name: str, after: int) -> int:
        return next((position for position in uses.get(name, ()) if position > after), len(program))

    live, spilled, cost = {f"x{i}" for i in range(8)}, set[str](), 0.0
    for position, (target, left, _, right) in enumerate(program):
        for name in (left, right):
            if name not in live and name != "zero":
                cost += 1
                live.add(name)
        live = {name for name in live if next_use(name, position) < len(program)}
        live.add(target)
        while len(live) > registers:
            victim = max(sorted(live - {target}), key=lambda name: next_use(name, position))
            live.discard(victim)
            if victim not in spilled:
                spilled.add(victim)
                cost += 1.5
        if target.startswith("o"):
            live.discard(target)
    return cost


def depth_first(program: Program, rng: random.Random) -> Program:
    """The same gates, each one just before it is needed, from the outputs in random order."""
    gate_of = {step[0]: step for step in program}
    order: Program = []
    done = {f"x{i}" for i in range(8)} | {"zero"}

    def emit(name: str) -> None:
        if name in done:
            return
        operands = [gate_of[name][1], gate_of[name][3]]
        if rng.random() < 0.5:
            operands.reverse()
        for operand in operands:
            emit(operand)
        done.add(name)
        order.append(gate_of[name])

    outputs = [f"o{i}" for i in range(8)]
    rng.shuffle(outputs)
    for output in outputs:
        emit(output)
    return order


def schedule(program: Program, moves: int, seed: int, registers: int = 14) -> Program:
    """Orders the gates for few spills: the best of 300 depth-first orders, then random moves that do not make it worse."""
    rng = random.Random(seed)  # noqa: S311 - a search, no secret
    order = min((depth_first(program, rng) for _ in range(300)), key=lambda candidate: spill_cost(candidate, registers))
    cost = spill_cost(order, registers)
    for _ in range(moves):
        position = rng.randrange(len(order))
        step = order[position]
        first = max((i + 1 for i in range(position) if order[i][0] in (step[1], step[3])), default=0)
        last = min((i for i in range(position + 1, len(order)) if step[0] in (order[i][1], order[i][3])), default=len(order)) - 1
        candidate = order[:position] + order[position + 1 :]
        candidate.insert(rng.randint(first, last), step)
        new_cost = spill_cost(candidate, registers)
        if new_cost <= cost:
            order, cost = candidate, new_cost
    return order


def verify(program: Program, constant: int) -> None:
    """Runs the circuit on all 256 inputs at once."""
    sbox = reference()
    inputs = {f"x{i}": sum((x >> i & 1) << x for x in range(256)) for i in range(8)}
    values = run(program, inputs)
    for x in range(256):
        got = sum((values[f"o{i}"] >> x & 1) << i for i in range(8))
        if got != sbox[x ^ constant] ^ AFFINE_CONSTANT:
            raise AssertionError(f"wrong at input {x}")


def header(program: Program, constant: int) -> str:
    """C text of the circuit."""
    statements = []
    for target, left, operator, right in program:
        value = left if right == "zero" else f"{left} {operator} {right}"
        statements.append(f"{target} = {value};" if target[0] == "o" else f"const CSVF_SBOX_WORD {target} = {value};")
    lines = [
        f"/* SM4 S-box as a circuit of {gates(program)} gates. Written by csrc/tools/sm4_bitslice.py, which holds",
        " * the derivation and checks all 256 inputs; do not edit.",
        " *",
        " * Computes o = S(x + INPUT) + OUTPUT on bit planes of type CSVF_SBOX_WORD (define it before use; any type with",
        " * ^ and &), bit 0 being the least significant of the byte. The key schedule absorbs the constants. */",
        "#ifndef CSVF_SM4_PORTABLE_SBOX_H",
        "#define CSVF_SM4_PORTABLE_SBOX_H",
        "",
        f"#define CSVF_SBOX_INPUT 0x{constant:02x}u",
        f"#define CSVF_SBOX_OUTPUT 0x{AFFINE_CONSTANT:02x}u",
        "",
        "#define CSVF_SBOX(x0, x1, x2, x3, x4, x5, x6, x7, o0, o1, o2, o3, o4, o5, o6, o7) \\",
        "    do { \\",
        *[f"        {statement} \\" for statement in statements],
        "    } while (0)",
        "",
        "#endif",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tries", type=int, default=40, help="random restarts per good candidate")
    parser.add_argument("--moves", type=int, default=20000, help="moves tried when ordering the gates")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    reference()
    program, constant = search(options.tries, options.seed)
    program = schedule(inline_copies(program), options.moves, options.seed)
    verify(program, constant)
    print(f"{gates(program)} gates", file=sys.stderr)
    sys.stdout.write(header(program, constant))
    return 0


if __name__ == "__main__":
    sys.exit(main())
