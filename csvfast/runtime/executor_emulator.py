"""`emulator`: static programs on an emulated CPU, their memory the guest's RAM: in the platform's DRAM under the guest's key."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

from csvfast.runtime.executor import ExecutorName, LaunchPlan
from csvfast.runtime.executor_process import GUEST_BYTES, ProcessExecutor

if TYPE_CHECKING:
    from csvfast.runtime.host import HostMachine

__all__ = ["EmulatorExecutor"]


class EmulatorExecutor(ProcessExecutor):
    """One emulated CPU."""

    name: ExecutorName = "emulator"

    def statement(self) -> str:
        """See Executor."""
        return (
            "encrypted are the programs' memory (SM4-XTS in the DRAM, but for the pages of the window) and the "
            "contents of the container's files. In the clear are the agent, which handles the layers and their keys, the "
            "emulated CPU's registers and window, and file names: parts of processes of this machine, whose administrator can "
            "read them"
        )

    def unavailable(self) -> str | None:
        """See Executor."""
        if importlib.util.find_spec("unicorn") is None:
            return "Unicorn is missing; pip install 'csvfast[unicorn]'"
        return None

    def guest_bytes(self, plan: LaunchPlan) -> int:
        """See ProcessExecutor. The programs' memory, and behind it the page of the agent's requests."""
        return plan.memory + GUEST_BYTES

    def more_arguments(self, host: HostMachine, plan: LaunchPlan, handle: int, descriptors: list[int]) -> list[str]:
        """See ProcessExecutor. The agent is the memory controller: it gets the guest's key by a pipe."""
        ram = next(found for found in host.machine.guest_ranges(handle) if found.guest_physical == 0)
        key, pipe = os.pipe2(os.O_CLOEXEC)
        descriptors += [key, dram := os.dup(host.descriptor)]
        try:
            host.processor.key_memory_controller(handle, pipe)
        finally:
            os.close(pipe)
        arguments = ["--dram", str(dram), "--dram-address", str(ram.address), "--memory-key", str(key)]
        return [*arguments, "--memory", str(plan.memory), *(["--window", plan.window] if plan.window else [])]
