"""An x86-64 core of software whose memory is ciphertext in the DRAM: static Linux programs, through Unicorn.

    run_program       runs a program and those it starts in this process
    EmulatedProcess   the same as a child process: start, wait, signal, kill
    EncryptedTree     a root directory whose files hold ciphertext

The extra is csvfast[unicorn].
"""

from __future__ import annotations

from csvfast import _extras

_extras.need("unicorn", "unicorn")

from csvfast.machine.emulator.child import EmulatedProcess  # noqa: E402
from csvfast.machine.emulator.loader import ProgramError  # noqa: E402
from csvfast.machine.emulator.process import UnsupportedCall  # noqa: E402
from csvfast.machine.emulator.run import RunResult, run_program  # noqa: E402
from csvfast.machine.emulator.tree import EncryptedTree, TreeWriter  # noqa: E402

__all__ = ["EmulatedProcess", "EncryptedTree", "ProgramError", "RunResult", "TreeWriter", "UnsupportedCall", "run_program"]
