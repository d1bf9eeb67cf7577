"""One piece of work for everybody who wants its result at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future

__all__ = ["SingleFlight"]

_Answer = TypeVar("_Answer")


class SingleFlight(Generic[_Answer]):
    """Runs a function once for all threads that ask under the same name while it runs. Nothing is kept afterwards.

    Thread-safe. A failure is shared like a result, and the next one to ask tries again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, Future[_Answer]] = {}

    def run(self, name: str, work: Callable[[], _Answer]) -> _Answer:
        """work()'s result, whoever runs it. Raises what it raises."""
        from concurrent.futures import Future  # brings logging along, which nobody needs who only verifies

        with self._lock:
            future = self._running.get(name)
            is_mine = future is None
            if future is None:
                future = self._running[name] = Future()
        if is_mine:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            finally:
                with self._lock:
                    del self._running[name]
        return future.result()
