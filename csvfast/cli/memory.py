"""`csvfast memory`: encrypted guest memory on the screen."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from csvfast.cli.common import CommandError, ExitCode, console, print_json

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["app"]

app = typer.Typer(help="Encrypted guest memory.", no_args_is_help=True, rich_markup_mode=None)

PAGE = 4096
_FIRST, _SECOND = 1, 2  # the two guests' ASIDs
_PAIR_WIDTH = 118  # columns that two dumps side by side take
_SHOWN = 64  # bytes of each dump: one cache line, four SM4 blocks


class StandardChoice(Enum):
    """--standard of `memory demo`."""

    gb = "gb"
    ieee = "ieee"


class TweakModelChoice(Enum):
    """--tweak-model of `memory demo`."""

    xts = "xts"
    line = "line"


@app.callback()
def _memory() -> None:
    """Encrypted guest memory."""


@app.command("demo")
def demo(
    standard: Annotated[StandardChoice, typer.Option("--standard", help="Tweak order.")] = StandardChoice.gb,
    tweak_model: Annotated[
        TweakModelChoice, typer.Option("--tweak-model", help="line: the leak published for real parts.")
    ] = TweakModelChoice.xts,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Two guests write the same page; the host looks at the frames; one key is removed.

    Every step is checked; the exit code is 1 if one does not hold.
    """
    report = run_demo(standard.value, tweak_model.value)
    if as_json:
        print_json(report)
    else:
        out = console()
        out.print(*render(report, out.width), sep="\n")
    if not all(report["checks"].values()):
        failed = ", ".join(name for name, held in report["checks"].items() if not held)
        raise CommandError(f"memory demo: does not hold: {failed}", ExitCode.CHECK_FAILED)


def run_demo(standard: Literal["gb", "ieee"], tweak_model: Literal["xts", "line"]) -> dict[str, Any]:
    """Does the walk and gives what each party saw, first bytes as hex, and what was checked.

    Both guests write one text over and over: whatever repeats in a ciphertext is a leak.
    """
    import csvfast
    from csvfast.errors import UnknownAsidError

    text = b"account 0042: 1,000,000 yuan\r\n.."
    plain = (text * (PAGE // len(text) + 1))[:PAGE]
    with csvfast.EncryptedMemory(4 * PAGE, standard=standard, tweak_model=tweak_model) as memory:
        memory.install(_FIRST)
        memory.install(_SECOND)
        memory.write(0 * PAGE, plain, _FIRST)
        memory.write(1 * PAGE, plain, _SECOND)
        memory.write(2 * PAGE, plain, _FIRST)
        memory.write(3 * PAGE, plain, 0)
        frames = [bytes(memory.read(number * PAGE, PAGE, 0)) for number in range(4)]
        own = bytes(memory.read(0, PAGE, _FIRST))
        other = bytes(memory.read(0, PAGE, _SECOND))

        # The host moves ciphertext to another frame: the tweak is the place, so it decrypts to noise there.
        memory.write(2 * PAGE, frames[0], 0)
        moved = bytes(memory.read(2 * PAGE, PAGE, _FIRST))

        # Seventeen bytes in the middle of a block: neighbours must survive the read, merge and write.
        patch = b"-- overwritten --"
        memory.write(1000, patch, _FIRST)
        patched = bytes(memory.read(0, PAGE, _FIRST))

        # The key dies and the frame is given a new one: what the old guest left is noise to the new.
        memory.remove(_FIRST)
        try:
            memory.read(0, 16, _FIRST)
            refused = False
        except UnknownAsidError:
            refused = True
        memory.install(_FIRST)
        recycled = bytes(memory.read(0, PAGE, _FIRST))
        stats = {name: int(value) for name, value in dict(memory.stats()).items()}

    distinct_blocks = [len({frame[at : at + 16] for at in range(0, PAGE, 16)}) for frame in frames]
    checks = {
        "a guest reads back what it wrote": own == plain,
        "the host sees no plaintext in a guest's frame": all(text[:16] not in frame for frame in frames[:3]),
        "two keys give two ciphertexts of one plaintext": frames[0] != frames[1],
        "one key gives two ciphertexts in two frames": frames[0] != frames[2],
        "another guest reads noise": other != plain and text[:16] not in other,
        "moved ciphertext decrypts to noise": moved != plain and text[:16] not in moved,
        "an unaligned write leaves its neighbours alone": patched == plain[:1000] + patch + plain[1000 + len(patch) :],
        "the host's own page is not encrypted": frames[3] == plain,
        "a removed key is refused": refused,
        "a recycled ASID reads noise": recycled != plain and text[:16] not in recycled,
    }
    views = {
        f"guest ASID {_FIRST} reads frame 0": own,
        "host reads frame 0": frames[0],
        f"guest ASID {_SECOND} reads frame 0": other,
        f"host reads frame 1 (same text, ASID {_SECOND})": frames[1],
        f"host reads frame 2 (same text, ASID {_FIRST})": frames[2],
        "host reads frame 3 (its own page)": frames[3],
        "host copied frame 0 to 2: what the guest reads": moved,
        f"frame 0 after ASID {_FIRST} got a new key": recycled,
    }
    return {
        "standard": standard,
        "tweak_model": tweak_model,
        "kernel": csvfast.info()["kernels"]["sm4"]["chosen"],
        "views": {name: view[:_SHOWN].hex() for name, view in views.items()},
        "distinct_blocks_per_frame": distinct_blocks,
        "checks": checks,
        "stats": stats,
    }


def render(report: dict[str, Any], width: int = 120) -> list[RenderableType]:
    """The report as rich renderables for a console of that width: dumps side by side where they fit, then the checks."""
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    dumps = []
    for name, view in report["views"].items():
        content = bytes.fromhex(view)
        readable = content.isascii()
        dumps.append(Panel(Text(hexdump(content)), title=name, title_align="left", width=58,
                           border_style="green" if readable else "red"))  # fmt: skip
    columns = 2 if width >= _PAIR_WIDTH else 1
    pairs = Table.grid(padding=(0, 1))
    for start in range(0, len(dumps), columns):
        pairs.add_row(*dumps[start : start + columns])
    checks = Table(title="Checks", title_justify="left", show_header=False)
    for name, held in report["checks"].items():
        checks.add_row("[green]holds[/]" if held else "[red]FAILS[/]", name)
    counts = report["distinct_blocks_per_frame"]
    repeats = Text(
        f"distinct 16-byte blocks of 256 as the host sees them: frames 0-2 {counts[0]}, {counts[1]}, {counts[2]}; "
        f"its own page {counts[3]}.  SM4 kernel {report['kernel']}, {report['standard']} order, {report['tweak_model']} tweaks."
    )
    legend = Text("green: readable, red: noise. Two guests wrote the same text; keys never leave the engine.", style="dim")
    return [pairs, legend, Columns([checks]), repeats]


def hexdump(content: bytes, width: int = 16) -> str:
    """Lines of offset, hex and printable characters."""
    lines = []
    for at in range(0, len(content), width):
        part = content[at : at + width]
        readable = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        lines.append(f"{at:03x} {part[:8].hex()} {part[8:].hex()} {readable}")
    return "\n".join(lines)
