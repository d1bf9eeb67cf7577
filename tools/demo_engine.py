"""The engine on real input: `make demo ARGS=--engine` runs it inside .venv.

usage: demo_engine.py [--megabytes N] [--keep DIRECTORY]

Makes an image of real files found under /usr and /lib and a generated one, measures them three ways and checks the digests
against OpenSSL and veritysetup where those are there; lets two guests write memory and looks at it as the host; makes a chip,
launches a guest of real boot files on it and has its report verified (demo_guest.py); measures the kernels. Everything temporary
is removed. Exit code 0 when every check held.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.rule import Rule
from rich.table import Table

import csvfast
from csvfast.benchmark import Plan, machine_facts, make_cases, run_cases
from csvfast.benchmark.peers import veritysetup
from csvfast.cli.bench import print_table
from csvfast.cli.common import format_bytes, format_rate, progress
from csvfast.cli.memory import render, run_demo
from csvfast.measure import measure_image
from csvfast.measure.verity import format_verity, verify_verity

sys.path.insert(0, str(Path(__file__).resolve().parent))
from demo_guest import run_guest_demo  # python -P leaves the script's directory out

OUT = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
CHUNK = 4 << 20


def system_files() -> Iterator[Path]:
    """Real files, largest directories of libraries and programs first; links and odd files left out."""
    for top in ("/usr/lib", "/lib", "/usr/bin", "/usr/share", "/opt", sys.prefix, sys.base_prefix):
        for directory, names, files in os.walk(top):
            names.sort()
            for name in sorted(files):
                path = Path(directory, name)
                if path.is_file() and not path.is_symlink() and os.access(path, os.R_OK):
                    yield path


def make_found_image(image: Path, size: int) -> int:
    """Concatenates real files, each padded to whole pages as in a file system, until `size` is reached. Returns how many."""
    count = written = 0
    with image.open("wb") as target, progress("collecting files", size) as advance:
        for path in system_files():
            try:
                content = path.read_bytes() if path.stat().st_size <= 256 << 20 else b""
            except OSError:
                continue
            piece = content[: size - written]
            piece += bytes(-len(piece) % 4096)
            target.write(piece)
            written += len(piece)
            count += 1
            advance(len(piece))
            if written >= size:
                break
    return count


def make_generated_image(image: Path, size: int) -> None:
    """Reproducible noise: the same on every machine, so its digest is too."""
    source = random.Random(20260101)
    with image.open("wb") as target, progress("generating", size) as advance:
        for start in range(0, size, CHUNK):
            target.write(source.randbytes(min(CHUNK, size - start)))
            advance(min(CHUNK, size - start))


def openssl_digest(image: Path) -> str | None:
    """SM3 by hashlib, or by the openssl program where this Python's OpenSSL has none."""
    if "sm3" in hashlib.algorithms_available:
        with image.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.new("sm3")).hexdigest()
    if shutil.which("openssl"):
        done = subprocess.run(["openssl", "dgst", "-sm3", "-r", str(image)], capture_output=True, text=True, check=False)
        return done.stdout.split()[0] if done.returncode == 0 else None
    return None


def veritysetup_root(image: Path, hashes: Path, salt: str) -> str | None:
    """Root hash by the real veritysetup."""
    found = veritysetup()
    if found is None:
        return None
    command = [found[0], "format", "--hash=sm3", f"--salt={salt}", str(image), str(hashes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return next(line.split()[-1] for line in done.stdout.splitlines() if line.startswith("Root hash"))


def measure(images: dict[str, Path], work: Path) -> bool:
    """Measures every image linearly, as a page tree and as dm-verity, each beside its cross-check."""
    table = Table(title="Measured", title_justify="left")
    for heading in ("image", "how", "digest", "rate", "checked against", "its rate", "x", "equal"):
        table.add_column(heading, justify="right" if "rate" in heading or heading == "x" else "left", no_wrap=True)
    held = True

    def row(
        name: str, how: str, digest: str, rate: float, other: str, other_digest: str | None, other_rate: float
    ) -> None:
        nonlocal held
        equal = "" if other_digest is None else "yes" if digest == other_digest else "NO"
        held = held and equal != "NO"
        ratio = f"{rate / other_rate:.1f}" if other_digest is not None and other_rate else ""
        shown = format_rate(other_rate) if other_digest is not None and other_rate else ""
        table.add_row(name, how, f"{digest[:14]}..", format_rate(rate), other, shown, ratio, f"[green]{equal}[/]")

    salt = bytes(range(32))
    for name, image in images.items():
        size = image.stat().st_size
        image.read_bytes()  # into the page cache, so that everyone is measured on the same terms

        linear = measure_image(image)
        start = time.perf_counter()
        digest = openssl_digest(image)
        seconds = time.perf_counter() - start
        row(name, "linear SM3", linear.hexdigest, linear.bytes_per_second, "OpenSSL" if digest else "(no OpenSSL SM3)",
            digest, size / seconds)  # fmt: skip

        tree = measure_image(image, "tree")
        root = format_verity(image, salt=b"").root_hash.hex()
        row(name, "page tree", tree.hexdigest, tree.bytes_per_second, "verity, no salt", root, 0.0)

        record = format_verity(image, work / f"{name}.hashes", salt=salt)
        rate = size / record.seconds
        start = time.perf_counter()
        theirs = veritysetup_root(image, work / f"{name}.theirs", salt.hex())
        seconds = time.perf_counter() - start
        row(name, "dm-verity", record.root_hash.hex(), rate, "veritysetup" if theirs else "(no veritysetup)", theirs,
            size / seconds)  # fmt: skip
        check = verify_verity(image, work / f"{name}.hashes", record.root_hash)
        held = held and check.ok

        # One flipped bit in the last page must be found, and named.
        with image.open("r+b") as file:
            file.seek(size - 100)
            byte = file.read(1)[0]
            file.seek(size - 100)
            file.write(bytes([byte ^ 1]))
        damaged = verify_verity(image, work / f"{name}.hashes", record.root_hash)
        held = held and not damaged.ok and damaged.bad_data_blocks == 1
        found = f"found: block {size // 4096 - 1}" if not damaged.ok else "NOT FOUND"
        table.add_row("", "one bit flipped", found, "", "", "", "", "")
    OUT.print(table)
    return held


def bench(buffer_bytes: int) -> None:
    """A quick round on the kernels in use, beside the peers that are installed."""
    kernels = {entry["chosen"] for entry in csvfast.info()["kernels"].values()}
    names = ("sm4-xts-encrypt/4096", "sm4-ctr/65536", "sm3/1048576", "sm3-many/4096", "memory-write/4096",
             "launch-encrypt-measure", "sm2-sign", "sm2-verify", "memcpy")  # fmt: skip
    plan = Plan(buffer_bytes=buffer_bytes, names=names, kernels=tuple(kernels))
    # The bulk speed is the same in both tweak orders; one line of it is enough here.
    cases = [case for case in make_cases(plan) if case.variant != "ieee" or case.peer is not None]
    with progress("benchmark", len(cases) * 3, unit="runs") as advance:
        results = list(run_cases(cases, seconds=0.3, rounds=3, started=lambda _: advance(1)))
    print_table(OUT, machine_facts(), results)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=384, help="size of each image in MiB")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="put the images here and keep them")
    options = parser.parse_args(arguments)
    size = options.megabytes << 20
    start = time.monotonic()

    with tempfile.TemporaryDirectory(prefix="csvfast-demo-") as temporary:
        work = options.keep or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        needed = 2 * size + (size // 32)
        if shutil.disk_usage(work).free < needed:
            print(f"demo: {work} has less than {format_bytes(needed)} free; set TMPDIR or use --megabytes", file=sys.stderr)
            return 3
        images = {"found": work / "found.img", "generated": work / "generated.img"}

        OUT.print(Rule("[bold]1  Measurement of images[/]", align="left"))
        count = make_found_image(images["found"], size)
        make_generated_image(images["generated"], size)
        OUT.print(f"found: {count} real files of this system, {format_bytes(images['found'].stat().st_size)}; "
                  f"generated: {format_bytes(size)} of reproducible noise; both in the page cache")  # fmt: skip
        held = measure(images, work)

    OUT.print(Rule("[bold]2  Guest memory under two ASIDs, and what the host sees[/]", align="left"))
    report = run_demo("gb", "xts")
    OUT.print(*render(report, OUT.width), sep="\n")
    held = held and all(report["checks"].values())

    OUT.print(Rule("[bold]3  A chip, a guest, its report, and who believes it[/]", align="left"))
    with tempfile.TemporaryDirectory(prefix="csvfast-demo-") as temporary:
        held = run_guest_demo(OUT, Path(temporary, "guest")) and held

    OUT.print(Rule("[bold]4  Speed, on the kernels in use[/]", align="left"))
    bench(min(size, 64 << 20))
    verdict = "[green]every check held[/]" if held else "[red]A CHECK FAILED[/]"
    OUT.print(f"{verdict}; {time.monotonic() - start:.0f} s.  Next: [bold].venv/bin/csvfast --help[/], examples/, README.md")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
