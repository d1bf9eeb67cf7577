"""Installs csvfast from this checkout into the running environment, quietly unless it fails.

usage: install.py REQUIREMENT        "." or ".[test,bench]"
"""

from __future__ import annotations

import subprocess
import sys
import time


def main() -> int:
    requirement = sys.argv[1]
    print(f"installing csvfast ({requirement}) ...", flush=True)
    start = time.monotonic()
    # Dependencies keep what is there already; csvfast itself is always built anew, its version number says nothing here.
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", requirement],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        print(done.stdout)
        print("installing csvfast failed; the reason stands above", file=sys.stderr)
        return done.returncode
    print(f"installed in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
