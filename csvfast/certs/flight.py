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

    Thread-safe. A failure is shared like a result, and the next one to ask tries again; an interruption (KeyboardInterrupt,
    SystemExit) is not shared.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, Future[_Answer]] = {}

    def run(self, name: str, work: Callable[[], _Answer]) -> _Answer:
        """work()'s result, whoever runs it. Raises what it raises."""
        # Brings logging along, which nobody needs who only verifies.
        from concurrent.futures import CancelledError, Future

        while True:
            with self._lock:
                future = self._running.get(name)
                is_mine = future is None
                if future is None:
                    future = self._running[name] = Future()
            if not is_mine:
                try:
                    return future.result()
                except CancelledError:
                    continue
            try:
                answer = work()
                future.set_result(answer)
                return answer
            except Exception as error:
                future.set_exception(error)
                raise
            except BaseException:
                # Ctrl-C means this thread alone; whoever waits has to ask again.
                future.cancel()
                raise
            finally:
                with self._lock:
                    del self._running[name]
