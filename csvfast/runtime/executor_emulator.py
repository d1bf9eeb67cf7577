"""`emulator`: static programs on an emulated CPU, their memory in a DRAM of its own under a key that the emulator made."""

from __future__ import annotations

import importlib.util

from csvfast.runtime.executor import ExecutorName, LaunchPlan
from csvfast.runtime.executor_process import GUEST_BYTES, ProcessExecutor

__all__ = ["EmulatorExecutor"]


class EmulatorExecutor(ProcessExecutor):
    """One emulated CPU."""

    name: ExecutorName = "emulator"

    def statement(self) -> str:
        """See Executor."""
        return (
            "encrypted are the programs' memory (SM4-XTS in the emulator's DRAM, but for the pages of the window) and the "
            "contents of the container's files. In the clear are the agent, which handles the layers and their keys, the "
            "emulated CPU's registers and window, and file names: parts of processes of this machine, whose administrator can "
            "read them"
        )

    def unavailable(self) -> str | None:
        """See Executor."""
        if importlib.util.find_spec("unicorn") is None:
            return "Unicorn is missing; pip install 'csvfast[unicorn]'"
        return None

    def guest_bytes(self, _plan: LaunchPlan) -> int:
        """See ProcessExecutor. The processor's guest holds the page of its requests; the emulated CPU has a DRAM of its own."""
        return GUEST_BYTES

    def more_arguments(self, plan: LaunchPlan) -> list[str]:
        """See ProcessExecutor."""
        return ["--memory", str(plan.memory), *(["--window", plan.window] if plan.window else [])]
