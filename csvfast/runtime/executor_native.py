"""`native`: containers as processes of this machine's own kernel, by runc, crun or bwrap. Attested, not encrypted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from csvfast.runtime.executor import ExecutorName, LaunchPlan
from csvfast.runtime.executor_process import GUEST_BYTES, ProcessExecutor
from csvfast.runtime.state import RUNTIME_STATE

__all__ = ["NativeExecutor"]

RUNTIMES: Final = ("runc", "crun", "bwrap")


class NativeExecutor(ProcessExecutor):
    """Containers of the host's own kernel."""

    name: ExecutorName = "native"

    def statement(self) -> str:
        """See Executor."""
        return (
            "nothing is encrypted in memory: container, agent and keys are in ordinary processes of this machine, whose "
            "administrator can read them. Encrypted are the image's layers, in the registry and in the cache. The report shows "
            "which code and configuration were measured, not that this machine protects them"
        )

    def unavailable(self) -> str | None:
        """See Executor."""
        if any(shutil.which(runtime) for runtime in RUNTIMES):
            return None
        return f"none of {', '.join(RUNTIMES)} is installed"

    def remove_remains(self, work: Path) -> None:
        """See ProcessExecutor. A runtime's containers are nobody's children when agent and runtime were killed together."""
        if (work / RUNTIME_STATE).exists():
            from csvfast.runtime.agent.containers_native import remove_remains

            remove_remains(work)

    def guest_bytes(self, _plan: LaunchPlan) -> int:
        """See ProcessExecutor."""
        return GUEST_BYTES
