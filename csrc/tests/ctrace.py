"""Compares instruction traces of different secrets (see ctrace.c) and checks the machine code that ran.

For every operation and kernel, traces of several secrets (all zeros, random; with --seeds 3 all ones, too) must agree in the sequence of
instructions and in every address an instruction forms. Executed instructions that would leak otherwise are refused: gathers and
scatters (addresses out of vector registers), and divisions whose operands differ between secrets.

    python3 ctrace.py CTRACE [--seeds N] [--only TEXT] [--all]      exit 0 all equal, 1 a difference, 3 it could not run

Needs objdump (binutils) and numpy. CTRACE is linked statically, so its disassembly covers the C library's memcpy too.
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

REGISTERS = ["rip", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"]
REGISTERS += [f"r{n}" for n in range(8, 16)] + ["fs_base"]
COLUMN = {name: index for index, name in enumerate(REGISTERS)}
for wide, narrow in {"rax": "eax", "rbx": "ebx", "rcx": "ecx", "rdx": "edx", "rsi": "esi", "rdi": "edi"}.items():
    COLUMN[narrow] = COLUMN[wide]
for number in range(8, 16):
    COLUMN[f"r{number}d"] = COLUMN[f"r{number}"]

INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\t(.*)$")
MEMORY = re.compile(r"\(([^)]*)\)")
STRING = re.compile(r"^(rep\w*\s+)?(movs|stos|cmps|scas|lods)[bwlq]?\b")
VECTOR_ADDRESS = re.compile(r"^v?p?(gather|scatter)|^vp(gather|scatter)|^v(gather|scatter)")
DIVISION = re.compile(r"^i?div[bwlq]?\b")

# Half a million instructions for each multiplication of a point, which "sm2 sign, decrypt" has shown already; the rest of them is C without
# instructions of its own, which valgrind and MSan cover.
REPEATED = {"sm2 encrypt", "sm2 agreement", "sm2 generate, sign"}


@dataclass(frozen=True)
class Instruction:
    text: str
    address_columns: tuple[int, ...]  # registers that form its address
    value_columns: tuple[int, ...]  # registers whose values decide its time


def disassemble(binary: Path) -> dict[int, Instruction]:
    """Every instruction of the binary by address, with the registers its time may depend on."""
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", "-w", str(binary)], check=True, capture_output=True, text=True
    ).stdout
    found: dict[int, Instruction] = {}
    for line in text.splitlines():
        match = INSTRUCTION.match(line)
        if not match:
            continue
        body = re.sub(r"\s+", " ", match.group(2)).strip()
        columns: set[int] = set()
        mnemonic = body.split(" ", 1)[0]
        if not mnemonic.startswith(("lea", "nop")) and " nop" not in body:
            for operand in MEMORY.findall(body):
                columns |= {COLUMN[name] for name in re.findall(r"%(\w+)", operand) if name in COLUMN}
        if STRING.match(body):
            columns |= {COLUMN["rsi"], COLUMN["rdi"], COLUMN["rcx"]}
        if mnemonic.startswith(("push", "pop", "call", "ret", "leave")):
            columns.add(COLUMN["rsp"])
        values: set[int] = set()
        if DIVISION.match(body):
            values = {COLUMN["rax"], COLUMN["rdx"]}
            values |= {COLUMN[name] for name in re.findall(r"%(\w+)", body) if name in COLUMN}
        columns.discard(COLUMN["rip"])
        found[int(match.group(1), 16)] = Instruction(body, tuple(sorted(columns)), tuple(sorted(values)))
    return found


def trace(binary: Path, operation: str, kernel: str, seed: int) -> np.ndarray:
    with tempfile.NamedTemporaryFile(suffix=".trace") as file:
        done = subprocess.run(
            [str(binary), operation, kernel, str(seed), file.name], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"{operation} [{kernel}] seed {seed}: {done.stderr.strip()}")
        return np.fromfile(file.name, dtype="<u8").reshape(-1, len(REGISTERS))


def first_difference(code: dict[int, Instruction], left: np.ndarray, right: np.ndarray) -> str | None:
    """The first step at which control flow or an address differs, or None."""
    steps = min(len(left), len(right))
    differs = np.nonzero(left[:steps, 0] != right[:steps, 0])[0]
    if differs.size or len(left) != len(right):
        step = int(differs[0]) if differs.size else steps
        before = int(left[max(step - 1, 0), 0])
        return f"control flow parts at step {step} after {before:#x}: {code[before].text if before in code else '?'}"
    for address in np.unique(left[:, 0]):
        instruction = code.get(int(address))
        if instruction is None:
            return f"an instruction at {int(address):#x} is not in the binary"
        if VECTOR_ADDRESS.match(instruction.text):
            return f"gather or scatter at {int(address):#x}: {instruction.text}"
    # Registers may well hold secrets; they may not differ where an instruction forms an address or divides by them.
    for column in range(1, len(REGISTERS)):
        for address in np.unique(left[left[:, column] != right[:, column], 0]):
            instruction = code[int(address)]
            if column in instruction.address_columns:
                return f"an address depends on the secret at {int(address):#x}: {instruction.text}"
            if column in instruction.value_columns:
                return f"a division depends on the secret at {int(address):#x}: {instruction.text}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("binary", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", default="")
    parser.add_argument(
        "--all",
        action="store_true",
        help="also the portable kernels, which valgrind and MSan cover in less time, the engine over every kernel, "
        "and SM2 calls that only repeat the multiplications of shorter ones",
    )
    arguments = parser.parse_args()
    binary: Path = arguments.binary.resolve()
    listing = subprocess.run([str(binary), "list"], check=True, capture_output=True, text=True).stdout.splitlines()
    cases = [
        (operation, kernel) for operation, kernel in (line.split("\t") for line in listing if arguments.only in line)
    ]
    if not arguments.all:
        cases = [case for case in cases if case[1] != "portable" or case[0].startswith("control:")]
        cases = [case for case in cases if case[0] not in REPEATED]
        # The engine's own code is the same over every kernel, and long: once is enough.
        kernel_of = dict(reversed(cases))
        cases = [case for case in cases if not case[0].startswith("memory") or kernel_of[case[0]] == case[1]]
    code = disassemble(binary)
    # Zeros, random, ones, random ...: the first two say most, and each costs minutes of single steps.
    secrets = [0, 2, 1, *range(3, arguments.seeds)][: max(2, arguments.seeds)]

    def examine(case: tuple[str, str]) -> tuple[int, str | None]:
        operation, kernel = case
        traces = [trace(binary, operation, kernel, 0)]
        traces += [trace(binary, operation, kernel, seed) for seed in secrets[1:]]
        problems = [first_difference(code, traces[0], other) for other in traces[1:]]
        problem = next((p for p in problems if p), None)
        if operation.startswith("control:"):  # leaks on purpose: not noticing it is the failure
            problem = None if problem else "a deliberate leak went unnoticed"
        return len(traces[0]), problem

    # One thread a CPU, bound to it: what it starts inherits the binding, and a traced process shares its tracer's CPU (ctrace.c).
    free_cpus = queue.SimpleQueue[int]()
    for cpu in sorted(os.sched_getaffinity(0)):
        free_cpus.put(cpu)
    passed = failed = 0
    with ThreadPoolExecutor(
        free_cpus.qsize(), initializer=lambda: os.sched_setaffinity(0, {free_cpus.get()})
    ) as workers:
        results = workers.map(examine, cases)
        for operation, kernel in cases:
            try:
                steps, problem = next(results)
            except RuntimeError as error:
                print(f"ERROR {error}")
                workers.shutdown(cancel_futures=True)
                return 3
            print(f"{'FAIL' if problem else 'ok  '} {operation:<28} {kernel:<14} {steps:>8} instructions", flush=True)
            if problem:
                print(f"     {problem}")
                failed += 1
            else:
                passed += 1
    print(f"instruction traces: {passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
