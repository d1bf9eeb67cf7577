"""How long the agent's own steps took. Thread-safety: any thread."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["StepTimes"]

_STEPS_MAX: Final = 500


class StepTimes:
    """Steps in the order in which they ended."""

    def __init__(self) -> None:
        self._steps: list[tuple[str, float]] = []

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Times the block, also when it fails."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - begin)

    def add(self, name: str, seconds: float) -> None:
        """A step that was timed elsewhere; after 500 steps nothing is added."""
        if len(self._steps) < _STEPS_MAX:
            self._steps.append((name, seconds))

    def document(self) -> list[dict[str, object]]:
        """For JSON."""
        return [{"step": name, "seconds": round(seconds, 5)} for name, seconds in self._steps]
