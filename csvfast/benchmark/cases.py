"""What is measured: csvfast's primitives on every kernel, and each peer's offer of the same name.

All work is done in place or into a buffer made beforehand, on one buffer per thread. Before a case is measured its answer on a
short input is compared with an independent one: kernels with each other, peers with csvfast.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import csvfast
from csvfast.benchmark import sm2
from csvfast.benchmark.peers import COUNTER, CTR_KEY, PAGE, XTS_KEY, Offer, Peer, find_peers, veritysetup
from csvfast.benchmark.runner import Case
from csvfast.crypto import SM4CTR, SM4XTS

__all__ = ["NAMES", "Plan", "WrongAnswerError", "kernels_of", "make_cases"]

# Fixed: outside scripts compare results by these names.
NAMES: Final = (
    "sm4-xts-encrypt/4096",
    "sm4-xts-decrypt/4096",
    "sm4-xts-line/64",
    "sm4-ctr/65536",
    "sm3/1048576",
    "sm3-many/4096",
    "verity-sm3/4096",
    "memory-write/4096",
    "launch-encrypt-measure",
    *sm2.NAMES,
    "memcpy",
)

Standard = Literal["gb", "ieee"]
Work = Callable[[], object]
_LINE: Final = 64
_CTR_BYTES: Final = 65536
_SM3_BYTES: Final = 1048576


class WrongAnswerError(RuntimeError):
    """A kernel or a peer computed something else than csvfast's portable kernel. Nothing of it is measured."""

    exit_code = 1  # a check failed


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    buffer_bytes   size of the buffer of each thread, a multiple of 4096 (64 MiB is what performance statements are about:
                   it leaves every cache)
    names          which of NAMES
    kernels        only these kernels; None = every kernel this CPU can run
    threads        thread counts, each measured on its own
    peers          compare with other implementations
    """

    buffer_bytes: int = 64 << 20
    names: tuple[str, ...] = NAMES
    kernels: tuple[str, ...] | None = None
    threads: tuple[int, ...] = (1,)
    peers: bool = True


def kernels_of(primitive: str, only: tuple[str, ...] | None = None) -> list[str]:
    """Kernels of a primitive that this CPU can run, most preferred first."""
    entry = csvfast.info()["kernels"][primitive]
    return [name for name in entry["available"] if only is None or name in only]


def make_cases(plan: Plan) -> Iterator[Case]:
    """Cases in the order of NAMES, for each name once per thread count; those of one name and thread count follow each
    other, so that the runner measures them side by side.

    Raises WrongAnswerError before the first case of a name is given."""
    peers = find_peers() if plan.peers else []
    for name in NAMES:
        if name not in plan.names:
            continue
        cases = [*_own(name, plan), *_of_peers(name, plan, peers)]
        for threads in plan.threads:
            yield from (replace(case, threads=threads) for case in cases if threads == 1 or not case.once)


def _own(name: str, plan: Plan) -> Iterator[Case]:
    match name:
        case "sm4-xts-encrypt/4096" | "sm4-xts-decrypt/4096":
            yield from _xts(name, plan)
        case "sm4-xts-line/64":
            yield from _lines(name, plan)
        case "sm4-ctr/65536":
            yield from _counter_mode(name, plan)
        case "sm3/1048576":
            yield from _single_sm3(name, plan)
        case "sm3-many/4096":
            yield from _many_sm3(name, plan)
        case "verity-sm3/4096":
            yield from _verity(name, plan)
        case "memory-write/4096":
            yield from _memory_write(name, plan)
        case "launch-encrypt-measure":
            yield from _launch(name, plan)
        case "memcpy":
            yield _copy(name, plan)
        case _:
            yield from _sm2(name, plan)


@contextmanager
def _forced(choices: dict[str, str]) -> Iterator[None]:
    try:
        for primitive, kernel in choices.items():
            csvfast.force_kernel(primitive, kernel)
        yield
    finally:
        for primitive in choices:
            csvfast.force_kernel(primitive, None)


def _force(**choices: str) -> Callable[[], AbstractContextManager[object]]:
    named = {primitive.replace("_", "-"): kernel for primitive, kernel in choices.items()}
    return lambda: _forced(named)


def _agree(name: str, who: str, answer: Any, expected: Any) -> None:
    if answer != expected:
        raise WrongAnswerError(f"{name}: {who} does not compute what csvfast's portable kernel computes; nothing measured")


def _pattern(length: int) -> bytes:
    """Bytes that are the same on every run and repeat nowhere within a page."""
    return b"".join(number.to_bytes(4, "little") for number in range(-(-length // 4)))[:length]


def _filled(length: int) -> memoryview:
    """A buffer whose every page has been touched and differs from the next.

    In huge pages where the system gives them, as encrypted memory is: otherwise the figure is that of the address translation.
    """
    memory = mmap.mmap(-1, length)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    buffer = memoryview(memory)
    for at in range(0, length, PAGE):
        buffer[at : at + 8] = at.to_bytes(8, "little")
    return buffer


def _slow_buffer(kernel: str, size: int) -> int:
    """Portable code runs far below memory speed: a smaller buffer gives the same figure in less time."""
    return min(size, 4 << 20) if kernel == "portable" else size


# ---- csvfast ---------------------------------------------------------------------------------------------------------


def _xts(name: str, plan: Plan) -> Iterator[Case]:
    decrypting = "decrypt" in name
    sample = _pattern(3 * PAGE)
    for standard in ("gb", "ieee"):
        expected = _xts_answer("portable", standard, sample, decrypting)
        for kernel in kernels_of("sm4", plan.kernels):
            _agree(name, kernel, _xts_answer(kernel, standard, sample, decrypting), expected)
            size = _slow_buffer(kernel, plan.buffer_bytes)

            def make(standard: Standard = standard, size: int = size) -> Work:
                xts, buffer = SM4XTS(XTS_KEY, standard=standard, unit_size=PAGE), _filled(size)
                call = xts.decrypt if decrypting else xts.encrypt
                return lambda: call(buffer, 0, buffer)

            yield Case(name, make, size, kernel, variant=standard, setup=_force(sm4=kernel))


def _xts_answer(kernel: str, standard: Standard, data: bytes, decrypting: bool = False) -> bytes:
    with _forced({"sm4": kernel}):
        xts = SM4XTS(XTS_KEY, standard=standard, unit_size=PAGE)
        return bytes(xts.decrypt(data, 0) if decrypting else xts.encrypt(data, 0))


def _lines(name: str, plan: Plan) -> Iterator[Case]:
    # Many lines of many pages in one call: a write-back of a cache model. 16 consecutive lines of each page.
    import numpy as np

    size = min(plan.buffer_bytes, 4 << 20)
    numbers = np.arange(size // _LINE, dtype=np.uint64)
    addresses = (numbers // 16) * PAGE + (numbers % 16) * _LINE
    sample = _pattern(4 * _LINE)
    places = np.array([0, 64, 8192, 8192 + 4032], dtype=np.uint64)
    expected = None
    for kernel in ["portable", *kernels_of("sm4", plan.kernels)]:
        with _forced({"sm4": kernel}):
            answer = bytes(SM4XTS(XTS_KEY).encrypt_lines(sample, places))
        expected = answer if expected is None else expected
        _agree(name, kernel, answer, expected)
    for kernel in kernels_of("sm4", plan.kernels):

        def make_many() -> Work:
            xts, buffer = SM4XTS(XTS_KEY), _filled(size)
            return lambda: xts.encrypt_lines(buffer, addresses, buffer)

        yield Case(name, make_many, size, kernel, variant="many", setup=_force(sm4=kernel))


def _counter_mode(name: str, plan: Plan) -> Iterator[Case]:
    sample = _pattern(_CTR_BYTES)
    with _forced({"sm4": "portable"}):
        expected = SM4CTR(CTR_KEY, COUNTER).encrypt(sample)
    for kernel in kernels_of("sm4", plan.kernels):
        with _forced({"sm4": kernel}):
            _agree(name, kernel, SM4CTR(CTR_KEY, COUNTER).encrypt(sample), expected)

        def make() -> Work:
            stream, buffer = SM4CTR(CTR_KEY, COUNTER), _filled(_CTR_BYTES)
            return lambda: stream.encrypt(buffer, buffer)

        yield Case(name, make, _CTR_BYTES, kernel, setup=_force(sm4=kernel))


def _single_sm3(name: str, plan: Plan) -> Iterator[Case]:
    sample = _pattern(100_003)
    with _forced({"sm3": "portable"}):
        expected = csvfast.sm3(sample).digest()
    for kernel in kernels_of("sm3", plan.kernels):
        with _forced({"sm3": kernel}):
            _agree(name, kernel, csvfast.sm3(sample).digest(), expected)

        def make() -> Work:
            buffer = _filled(_SM3_BYTES)
            return lambda: csvfast.sm3(buffer).digest()

        yield Case(name, make, _SM3_BYTES, kernel, setup=_force(sm3=kernel))


def _many_sm3(name: str, plan: Plan) -> Iterator[Case]:
    from csvfast.crypto import sm3_blocks

    sample = _pattern(67 * PAGE)
    with _forced({"sm3": "portable"}):
        expected = b"".join(csvfast.sm3(sample[at : at + PAGE]).digest() for at in range(0, len(sample), PAGE))
    for kernel in kernels_of("sm3-many", plan.kernels):
        with _forced({"sm3-many": kernel}):
            _agree(name, kernel, bytes(sm3_blocks(sample, PAGE)), expected)
        size = _slow_buffer(kernel, plan.buffer_bytes)

        def make(size: int = size) -> Work:
            buffer = _filled(size)
            return lambda: sm3_blocks(buffer, PAGE)

        yield Case(name, make, size, kernel, setup=_force(sm3_many=kernel))


def _memory_write(name: str, plan: Plan) -> Iterator[Case]:
    for kernel in kernels_of("sm4", plan.kernels):
        size = min(_slow_buffer(kernel, plan.buffer_bytes), 16 << 20)

        def make(size: int = size) -> Work:
            memory = csvfast.EncryptedMemory(size)
            memory.install(1, XTS_KEY)
            page, write, addresses = _pattern(PAGE), memory.write, range(0, size, PAGE)

            def work() -> None:
                for address in addresses:
                    write(address, page, 1)

            return work

        yield Case(name, make, size, kernel, setup=_force(sm4=kernel))


def _launch(name: str, plan: Plan) -> Iterator[Case]:
    # The pairing of kernels is the one a CPU of that level would choose by itself: best SM3 beside each SM4 kernel.
    digesters = {"linear": kernels_of("sm3"), "tree": kernels_of("sm3-many")}
    for variant in ("linear", "tree"):
        primitive = "sm3" if variant == "linear" else "sm3-many"
        for kernel in kernels_of("sm4", plan.kernels):
            digester = kernel if kernel in digesters[variant] else _partner(kernel, digesters[variant])
            size = _slow_buffer(kernel, plan.buffer_bytes)

            def make(size: int = size, variant: str = variant) -> Work:
                memory = csvfast.EncryptedMemory(size)
                memory.install(1, XTS_KEY)
                memory.write(0, _filled(size), 0)
                if variant == "tree":
                    return lambda: memory.launch_update(0, size, 1, page_digests=True)
                return lambda: memory.launch_update(0, size, 1, linear=csvfast.sm3())

            setup = _force(sm4=kernel, **{primitive: digester})
            yield Case(name, make, size, f"{kernel}+{digester}", variant=variant, setup=setup)


def _partner(kernel: str, digesters: list[str]) -> str:
    """The best SM3 kernel that a CPU without more than `kernel` needs could still run."""
    if "avx512" in kernel:
        return digesters[0]
    if kernel == "portable":
        return "portable"
    return next(name for name in digesters if "avx512" not in name)


def _verity(name: str, plan: Plan) -> Iterator[Case]:
    """dm-verity of a file in the page cache, the hash area written to another: wall time, as it is for the peer."""
    from csvfast.measure import verity

    for kernel in kernels_of("sm3-many", plan.kernels):

        def make() -> Work:
            image, hashes = _verity_files(plan.buffer_bytes)
            return lambda: verity.format_verity(image, hashes, salt=b"", threads=1)

        yield Case(name, make, plan.buffer_bytes, kernel, clock="wall", setup=_force(sm3_many=kernel))


_directory: tempfile.TemporaryDirectory[str] | None = None


def _verity_files(size: int) -> tuple[Path, Path]:
    """A data file and a place for its hash area, in a directory that goes away with the process."""
    global _directory
    if _directory is None:
        _directory = tempfile.TemporaryDirectory(prefix="csvfast-bench-")
    image = Path(_directory.name, f"image-{size}")
    if not image.exists():
        image.write_bytes(_filled(size))
    handle, hashes = tempfile.mkstemp(dir=_directory.name)
    os.close(handle)
    return image, Path(hashes)


def _sm2(name: str, plan: Plan) -> Iterator[Case]:
    primitive = "sm2-many" if name == "sm2-verify-many" else "sm2"

    def force(kernel: str) -> Callable[[], AbstractContextManager[object]]:
        # Without lanes sm2-many does one after another by the kernel of sm2: portable means both.
        both = {"sm2": kernel} if kernel == "portable" else {}
        return lambda: _forced({primitive: kernel} | both)

    yield from sm2.sm2_cases(name, kernels_of(primitive, plan.kernels), force)


def _copy(name: str, plan: Plan) -> Case:
    """What memory itself gives: bytes copied per second by the C library."""

    def make() -> Work:
        source, target = _filled(plan.buffer_bytes), _filled(plan.buffer_bytes)
        pins = [(ctypes.c_char * plan.buffer_bytes).from_buffer(buffer) for buffer in (target, source)]
        to, where = (ctypes.addressof(pin) for pin in pins)

        def work(_keep: object = pins) -> None:
            ctypes.memmove(to, where, plan.buffer_bytes)

        return work

    return Case(name, make, plan.buffer_bytes, peer="libc")


# ---- Peers -----------------------------------------------------------------------------------------------------------


def _of_peers(name: str, plan: Plan, peers: list[Peer]) -> Iterator[Case]:
    if name == "verity-sm3/4096" and plan.peers:
        yield from _veritysetup(name, plan)
    if name in sm2.NAMES and plan.peers:
        for signer in sm2.find_sm2_peers():
            _agree(name, f"{signer.name} {signer.version}", sm2.agrees(signer), True)
            yield from sm2.peer_cases(name, signer)
    for peer in peers:
        for offer in peer.offers:
            if offer.name == name:
                _check(peer, offer)
                yield _peer_case(peer, offer, plan)


def _peer_case(peer: Peer, offer: Offer, plan: Plan) -> Case:
    usual = {"sm4-ctr/65536": _CTR_BYTES, "sm3/1048576": _SM3_BYTES}.get(offer.name, plan.buffer_bytes)
    size = min(usual, offer.limit or usual, 16 << 20 if "xts" in offer.name else usual)
    return Case(offer.name, lambda: offer.make(_filled(size)), size, peer=peer.name, variant=offer.variant)


def _check(peer: Peer, offer: Offer) -> None:
    """The peer's answer on a short input against csvfast's portable kernels."""
    with _forced({"sm4": "portable", "sm3": "portable"}):
        expected: bytes
        if offer.name.startswith("sm4-xts"):
            sample = _pattern(3 * PAGE)
            standard: Standard = "ieee" if offer.variant == "ieee" else "gb"
            expected = _xts_answer("portable", standard, sample, "decrypt" in offer.name)
        elif offer.name.startswith("sm4-ctr"):
            sample = _pattern(99)
            expected = bytes(SM4CTR(CTR_KEY, COUNTER).encrypt(sample))
        else:
            sample = _pattern(1001)
            expected = csvfast.sm3(sample).digest()
    _agree(offer.name, f"{peer.name} {peer.version}", offer.answer(sample), expected)


def _veritysetup(name: str, plan: Plan) -> Iterator[Case]:
    found = veritysetup()
    if found is None:
        return
    program, _ = found

    def make() -> Work:
        image, hashes = _verity_files(plan.buffer_bytes)
        command = [program, "format", "--hash=sm3", "--salt=-", str(image), str(hashes)]
        return lambda: subprocess.run(command, check=True, capture_output=True, timeout=600)

    yield Case(name, make, plan.buffer_bytes, peer="veritysetup", clock="wall", once=True)
