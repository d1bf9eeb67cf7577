"""`csvfast measure image | launch | verity`: options in, `csvfast.measure` called, records out."""

from __future__ import annotations

import hmac
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from csvfast.cli.common import CommandError, ExitCode, format_bytes, format_rate, print_json, progress

if TYPE_CHECKING:
    from csvfast.measure import LaunchDigest, LaunchRecipe, VerityCheck, VerityParameters, VerityRecord

__all__ = ["app"]

app = typer.Typer(
    help="Digests of images, dm-verity with SM3, and launch digests. '-' is standard input.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


class Mode(StrEnum):
    """--mode of `measure image`."""

    linear = "linear"
    tree = "tree"


class Access(StrEnum):
    """--access of `measure image`."""

    read = "read"
    mmap = "mmap"


class VmsaChoice(StrEnum):
    """--vmsa of `measure launch`."""

    none = "none"
    amd = "amd"


Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, no progress bar.")]
Expect = Annotated[
    str | None, typer.Option("--expect", metavar="HEX", help="Compare with this digest; exit code 1 when it differs.")
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Worker threads. Default: one per processor.")]


@app.command()
def image(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Files, block devices, pipes; '-' is standard input.")
    ],
    mode: Annotated[
        Mode, typer.Option(help="linear: one SM3 of all bytes. tree: root of the tree over 4 KiB pages.")
    ] = Mode.linear,
    access: Annotated[Access, typer.Option(help="mmap only for files that nobody truncates meanwhile.")] = Access.read,
    threads: Threads = None,
    expect: Expect = None,
    json: Json = False,
) -> None:
    """Measure images: the SM3 digest of each."""
    from csvfast.measure import measure_images

    expected = _digest_option(expect)
    if expected is not None and len(files) > 1:
        raise CommandError(f"--expect: given with {len(files)} files; expected one file")
    with _progress(_title(files), files, json) as step:
        records = measure_images(files, mode.value, access=access.value, threads=threads, progress=step)
    if json:
        documents = [record.to_dict() for record in records]
        _print_record(documents[0] if len(records) == 1 else {"images": documents}, expected, records[0].digest)
    else:
        for record in records:
            print(_digest_line(record.hexdigest, record.path))
        _note(f"{format_bytes(sum(record.size for record in records))}, {format_rate(_rate(records))}")
    _compare(expected, records[0].digest)


@app.command()
def verity(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Data file, block device or pipe; '-' is standard input.")
    ],
    salt: Annotated[
        str | None, typer.Option(metavar="HEX", help="0 to 256 bytes, '-' for none. Default: 32 random bytes.")
    ] = None,
    hash_file: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Write the hash area here (or behind the data, when it is FILE)."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check FILE against --hash-file and the root hash --expect.")
    ] = False,
    uuid: Annotated[str | None, typer.Option(help="UUID for the superblock. Default: random.")] = None,
    data_block_size: Annotated[int, typer.Option(metavar="BYTES", help="A power of two, 512 to 524288.")] = 4096,
    hash_block_size: Annotated[int, typer.Option(metavar="BYTES", help="A power of two, 512 to 524288.")] = 4096,
    data_blocks: Annotated[int | None, typer.Option(metavar="COUNT", help="Default: all whole blocks of FILE.")] = None,
    hash_offset: Annotated[int, typer.Option(metavar="BYTES", help="Where the hash area begins in --hash-file.")] = 0,
    no_superblock: Annotated[bool, typer.Option("--no-superblock", help="A hash area without a superblock.")] = False,
    format: Annotated[int, typer.Option(metavar="0|1", help="1: today's; 0: Chromium OS (salt after the block).")] = 1,
    threads: Threads = None,
    expect: Expect = None,
    json: Json = False,
) -> None:
    """dm-verity with SM3, as veritysetup makes and checks it: root hash, and hash area with --hash-file."""
    from csvfast.measure import VerityParameters, format_verity, verify_verity
    from csvfast.measure.source import Source

    expected = _digest_option(expect)
    salt_bytes = None if salt is None else _hex_option("--salt", "" if salt == "-" else salt)
    uuid_value = _uuid_option(uuid)
    if verify:
        if hash_file is None or expected is None:
            raise CommandError("--verify: expected --hash-file with the hash area and --expect with the root hash")
        parameters: VerityParameters | None = None
        if no_superblock:
            if salt_bytes is None:
                raise CommandError("--verify --no-superblock: expected --salt, there is no superblock to read it from")
            if data_blocks is None:
                with Source(file) as source:
                    data_blocks = (source.size or 0) // data_block_size if data_block_size > 0 else 0
            parameters = VerityParameters(data_blocks, salt_bytes, data_block_size, hash_block_size, format)
        with _progress(f"verifying {file}", [file], json) as step:
            check = verify_verity(
                file,
                hash_file,
                expected,
                hash_offset=hash_offset,
                parameters=parameters,
                threads=threads,
                progress=step,
            )
        _show_check(check, json)
        return
    with _progress(f"hashing {file}", [file], json) as step:
        record = format_verity(
            file,
            hash_file,
            salt=salt_bytes,
            uuid=uuid_value,
            data_block_bytes=data_block_size,
            hash_block_bytes=hash_block_size,
            data_blocks=data_blocks,
            hash_offset=hash_offset,
            superblock=not no_superblock,
            hash_type=format,
            threads=threads,
            progress=step,
        )
    if json:
        _print_record(record.to_dict(), expected, record.root_hash)
    else:
        _show_verity(record)
    if record.uncovered_bytes and data_blocks is None:
        _warn(
            f"{file}: the last {record.uncovered_bytes} bytes are no whole block of {data_block_size} bytes; "
            f"the root hash does not cover them"
        )
    _compare(expected, record.root_hash)


@app.command()
def launch(
    firmware: Annotated[
        str | None, typer.Option(metavar="FILE", help="OVMF image, as given to QEMU as pflash unit 0.")
    ] = None,
    kernel: Annotated[
        str | None, typer.Option(metavar="FILE", help="Kernel of a direct boot, '-' is standard input.")
    ] = None,
    initrd: Annotated[str | None, typer.Option(metavar="FILE", help="Initial RAM disk, '-' is standard input.")] = None,
    append: Annotated[str | None, typer.Option(metavar="TEXT", help="Kernel command line.")] = None,
    vmsa: Annotated[VmsaChoice, typer.Option(help="amd: measure a save area for every vCPU too.")] = VmsaChoice.none,
    vcpus: Annotated[int, typer.Option(metavar="COUNT", help="vCPUs, for --vmsa amd.")] = 1,
    cpu_signature: Annotated[
        str, typer.Option(metavar="NUMBER", help="CPUID leaf 1 EAX of the vCPUs, for --vmsa amd.")
    ] = "0x900f00",
    force_hash_table: Annotated[
        bool,
        typer.Option(
            "--force-hash-table", help="Add the hash table although the firmware has no area for it (experiments)."
        ),
    ] = False,
    csv3: Annotated[bool, typer.Option("--csv3", help="As CSV3 measures: whole pages with addresses, every vCPU.")] = False,
    secure_calls: Annotated[
        str | None,
        typer.Option(
            "--secure-calls", metavar="ADDRESS", help="Page that names the secure call pages, where the firmware does not."
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Read all of the above from a TOML or JSON file.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show each hashed piece and its own digest.")] = False,
    diff: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Compare with another recipe or explanation; exit code 1 when they differ."),
    ] = None,
    expect: Expect = None,
    json: Json = False,
) -> None:
    """The launch digest that the attestation report of a CSV, CSV2 or CSV3 guest will carry."""
    from csvfast.measure import LaunchRecipe, load_explanation, load_recipe

    expected = _digest_option(expect)
    given = [firmware, kernel, initrd, append]
    plan: LaunchRecipe
    if recipe is not None:
        switches = force_hash_table or csv3 or secure_calls is not None or vcpus != 1
        if any(value is not None for value in given) or vmsa is not VmsaChoice.none or switches:
            raise CommandError("--recipe: given together with other inputs; expected the recipe alone to name them")
        plan = load_recipe(recipe)
        expected = plan.expect if expected is None else expected
    elif firmware is None:
        raise CommandError("--firmware is missing; expected an OVMF image (or --recipe FILE)")
    else:
        plan = LaunchRecipe(
            firmware,
            kernel,
            initrd,
            append,
            vmsa.value,
            vcpus,
            _number_option("--cpu-signature", cpu_signature),
            force_hash_table,
            csv3=csv3,
            secure_calls=None if secure_calls is None else _number_option("--secure-calls", secure_calls),
        )
    paths = [str(path) for path in (plan.firmware, plan.kernel, plan.initrd) if path is not None]
    with _progress("measuring launch", paths, json) as step:
        outcome = plan.measure(step)
    for warning in outcome.warnings:
        _warn(warning)
    if diff is not None:
        _show_differences(outcome, load_explanation(diff), diff, json)
    elif json:
        _print_record(outcome.to_dict(explain=explain), expected, outcome.digest)
    elif explain:
        _show_explanation(outcome)
    else:
        print(outcome.hexdigest)
    _compare(expected, outcome.digest)


# ---- Options --------------------------------------------------------------------------------------------------------


def _hex_option(option: str, text: str) -> bytes:
    if len(text) % 2 or any(character not in "0123456789abcdefABCDEF" for character in text):
        raise CommandError(f"{option}: {text!r} is not an even number of hexadecimal digits")
    return bytes.fromhex(text)


def _digest_option(text: str | None) -> bytes | None:
    from csvfast.measure.recipe import parse_digest

    return None if text is None else parse_digest(text, "--expect")


def _number_option(option: str, text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise CommandError(f"{option}: {text!r} is no number; expected one such as 0x900f00") from None


def _uuid_option(text: str | None) -> Any:
    from uuid import UUID

    try:
        return None if text is None else UUID(text)
    except ValueError:
        raise CommandError(f"--uuid: {text!r} is no UUID; expected 32 hexadecimal digits with hyphens") from None


# ---- Output ---------------------------------------------------------------------------------------------------------


def _print_record(record: dict[str, Any], expected: bytes | None, digest: bytes) -> None:
    if expected is not None:
        record = record | {"expected": expected.hex(), "match": hmac.compare_digest(expected, digest)}
    print_json(record)


def _compare(expected: bytes | None, digest: bytes) -> None:
    if expected is not None and not hmac.compare_digest(expected, digest):
        raise CommandError("the digest is not the expected one", ExitCode.CHECK_FAILED)


def _digest_line(digest: str, path: str) -> str:
    """As sha256sum writes it: a name with a line break in it must not pass for two lines, and is escaped."""
    escaped = path.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    plain = "\n" not in path and "\r" not in path and "\\" not in path
    return f"{digest}  {path}" if plain else f"\\{digest}  {escaped}"


def _show_verity(record: VerityRecord) -> None:
    parameters = record.parameters
    lines = [
        ("UUID", str(parameters.uuid) if record.superblock else "-"),
        ("Hash type", parameters.hash_type),
        ("Data blocks", parameters.data_blocks),
        ("Data block size", parameters.data_block_bytes),
        ("Hash blocks", sum(parameters.level_blocks)),
        ("Hash block size", parameters.hash_block_bytes),
        ("Hash algorithm", "sm3"),
        ("Salt", parameters.salt.hex() or "-"),
        ("Root hash", record.root_hash.hex()),
    ]
    if record.hash_path is not None:
        lines.append(("Hash file", f"{record.hash_path} (offset {record.hash_offset})"))
    for name, value in lines:
        print(f"{name + ':':<17}{value}")
    _note(f"{format_bytes(parameters.data_bytes)}, {format_rate(parameters.data_bytes / max(record.seconds, 1e-9))}")


def _show_check(check: VerityCheck, json: bool) -> None:
    if json:
        print_json(check.to_dict())
    elif check.ok:
        print(f"{check.path}: verified, {check.parameters.data_blocks} data blocks")
    if not check.ok:
        raise CommandError(f"{check.path}: verification failed: {'; '.join(check.problems)}", ExitCode.CHECK_FAILED)


def _show_explanation(outcome: LaunchDigest) -> None:
    for item in outcome.inputs:
        print(f"{item.name}: {item.size} bytes{'' if item.path is None else f' of {item.path}'}")
        print(f"    sha256   {item.sha256.hex()}")
    for piece in outcome.pieces:
        place = "" if piece.address is None else f" at {piece.address:#x}"
        print(f"{piece.name}: {piece.size} bytes{place}")
        print(f"    sm3      {piece.sm3.hex()}")
        print(f"    running  {piece.running.hex()}")
    print(f"launch digest: {outcome.hexdigest}")


def _show_differences(outcome: LaunchDigest, other: dict[str, Any], path: Path, json: bool) -> None:
    from csvfast.measure import compare_explanations

    differences = compare_explanations(outcome.to_dict(explain=True), other)
    if json:
        print_json(
            {
                "digest": outcome.hexdigest,
                "other_digest": other["digest"],
                "equal": not differences,
                "differences": [
                    {"piece": item.piece, "field": item.field, "left": item.left, "right": item.right}
                    for item in differences
                ],
            }
        )
    elif not differences:
        print(f"equal: {outcome.hexdigest}")
    else:
        print(f"left   {outcome.hexdigest}\nright  {other['digest']}  {path}")
        for item in differences:
            print(f"{item.piece}: {item.field}\n    left   {item.left}\n    right  {item.right}")
    if differences:
        raise CommandError(
            f"the launches differ, first in: {differences[0].piece} ({differences[0].field})", ExitCode.CHECK_FAILED
        )


def _warn(message: str) -> None:
    print(f"csvfast: warning: {message}", file=sys.stderr)


def _note(message: str) -> None:
    # For people only: scripts read stdout, and logs stay quiet.
    if sys.stderr.isatty():
        print(message, file=sys.stderr)


def _rate(records: Sequence[Any]) -> float:
    return float(sum(record.size for record in records) / max(sum(record.seconds for record in records), 1e-9))


def _title(files: Sequence[str]) -> str:
    return f"measuring {files[0]}" if len(files) == 1 else f"measuring {len(files)} files"


@contextmanager
def _progress(title: str, files: Iterable[str], json: bool) -> Iterator[Callable[[int, int | None], None]]:
    """The shared progress bar, fed with totals instead of steps."""
    from csvfast.measure.source import total_size

    with progress(title, total_size(files), enabled=not json) as advance:
        last = 0

        def step(done: int, _total: int | None) -> None:
            nonlocal last
            advance(done - last)
            last = done

        yield step
