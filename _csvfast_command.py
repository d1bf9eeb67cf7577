"""The console script `csvfast`. It stands outside the package because importing csvfast can be refused.

`import csvfast` raises StartupError when CSVFAST_KERNEL or CSVFAST_DISABLE asks for what cannot be had; for the command that
is one line and exit code 3, like every other trouble of the environment.
"""

from __future__ import annotations

import os
import sys

__all__ = ["main"]

ENVIRONMENT = 3  # csvfast.cli.common.ExitCode.ENVIRONMENT, which may be out of reach here


def main() -> int:
    """Runs the command and returns its exit code."""
    try:
        from csvfast.cli import main as run
    except ImportError as error:
        if os.environ.get("CSVFAST_TRACEBACK") == "1":
            raise
        print(f"csvfast: error: {' '.join(str(error).split())}", file=sys.stderr)
        return ENVIRONMENT
    return run()
