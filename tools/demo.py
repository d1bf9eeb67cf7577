"""The life of a confidential container, and the attacks on it: `make demo` runs it inside .venv, in under a minute.

usage: demo.py [--executor NAME] [--report FILE] [--keep DIRECTORY] [--engine [ARGUMENT...]]

No server, no root, no network: chip, broker and registry are made here and are gone afterwards. Where QEMU and the guests' kernel
are installed (tools/install-test-tools.sh) the container runs in a real Linux guest, else on an emulated CPU; --executor vm or
emulator decides otherwise. The report is one HTML file, build/demo.html unless told. --engine: measurement, encryption and speed
instead (demo_engine.py). Exit code 0 when every check held and every attack failed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.rule import Rule

import csvfast

sys.path.insert(0, str(Path(__file__).resolve().parent))
from demo_attacks import attack  # python -P leaves the script's directory out
from demo_life import Failed, Life
from demo_page import write_page


def main() -> int:
    if "--engine" in sys.argv[1:2]:
        import demo_engine

        return demo_engine.main(sys.argv[2:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--executor", default="auto", choices=("auto", "vm", "emulator"))
    parser.add_argument("--report", type=Path, default=Path("build/demo.html"), metavar="FILE", help="default: build/demo.html")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="a new directory for everything that is made, kept")
    options = parser.parse_args()
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 130)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="csvfast-demo-") as temporary:
        work = Path(temporary) if options.keep is None else options.keep.absolute()
        if options.keep is not None:
            work.mkdir(mode=0o700)
        try:
            with Life(work, out, options.executor) as life:
                out.print(Rule(f"[bold]The life of a confidential container[/], executor {life.executor.name}", align="left"))
                out.print(f"[dim]{life.executor.statement()}[/]")
                life.tell()
                out.print(Rule("[bold]Attacks[/]", align="left"))
                attack(life)
        except (Failed, csvfast.errors.CsvfastError) as problem:
            print(f"demo: {problem}", file=sys.stderr)
            return 1
    seconds = time.monotonic() - begin
    life.page.footer = (
        f"csvfast {csvfast.__version__}; everything in {seconds:.1f} s. The chip is simulated: its root is not Hygon's, and what "
        "it proves is that software, formats and protocols do what they should, not that this machine's owner is kept out."
    )
    options.report.parent.mkdir(parents=True, exist_ok=True)
    write_page(options.report, life.page)
    verdict = "[green]every check held, every attack failed[/]" if life.held else "[red]A CHECK FAILED[/]"
    out.print(Rule(align="left"))
    out.print(f"{verdict}; {seconds:.0f} s. Report: [bold]{options.report}[/].")
    out.print("Next: .venv/bin/csvfast run --help, docs/containers.md, README.md")
    return 0 if life.held else 1


if __name__ == "__main__":
    sys.exit(main())
