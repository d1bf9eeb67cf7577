"""`emulator`: static programs on an emulated CPU, their memory in the platform's DRAM under the guest's key."""

from __future__ import annotations

import importlib.util
import os

from csvfast.runtime.executor import ExecutorName, LaunchPlan
from csvfast.runtime.executor_process import ProcessExecutor, ProcessGuest
from csvfast.runtime.host import HostMachine

__all__ = ["EmulatorExecutor"]


class EmulatorExecutor(ProcessExecutor):
    """One emulated CPU."""

    name: ExecutorName = "emulator"

    def statement(self) -> str:
        """See Executor."""
        return (
            "encrypted are the programs' memory (SM4-XTS in the DRAM, but for the pages of the window) and the contents of the "
            "container's files. In the clear are the agent, which handles the layers and their keys, the emulated CPU's "
            "registers and window, and file names: parts of processes of this machine, whose administrator can read them"
        )

    def unavailable(self) -> str | None:
        """See Executor."""
        if importlib.util.find_spec("unicorn") is None:
            return "Unicorn is missing; pip install 'csvfast[unicorn]'"
        return None

    def guest_bytes(self, plan: LaunchPlan) -> int:
        """See ProcessExecutor."""
        return plan.memory

    def more_arguments(
        self, _host: HostMachine, _plan: LaunchPlan, _guest: ProcessGuest, _pipes: list[int]
    ) -> list[tuple[list[str], int | None]]:
        """See ProcessExecutor. The key goes from the processor to the emulated memory controller by a pipe."""
        ram = next(found for found in _host.machine.guest_ranges(_guest.launch.handle) if found.guest_physical == 0)
        key_out, key_in = os.pipe2(os.O_CLOEXEC)
        _pipes.append(key_out)
        try:
            _host.processor.key_memory_controller(_guest.launch.handle, key_in)
        finally:
            os.close(key_in)
        return [
            (["--dram", str(_host.descriptor)], _host.descriptor),
            (["--dram-address", str(ram.address), "--dram-size", str(ram.size)], None),
            (["--memory-key", str(key_out)], key_out),
            (["--window", _plan.window], None),
        ]
