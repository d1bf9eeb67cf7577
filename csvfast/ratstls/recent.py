"""What was found out lately, so that a peer that comes back with the same certificate or evidence costs less.

Thread-safety: a lock around every access.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Final, Generic, TypeVar

__all__ = ["Recent"]

_Value = TypeVar("_Value")


class Recent(Generic[_Value]):
    """Values by the bytes they are about, the least recently used dropped when there are more than `capacity`.

    Only what holds for the same bytes at any time may be kept here, and only about peers that were accepted: strangers can show
    as many certificates as they like.
    """

    def __init__(self, capacity: int = 512) -> None:
        self.capacity: Final = capacity
        self._values: OrderedDict[bytes, _Value] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, shown: bytes) -> _Value | None:
        """What was kept about these bytes."""
        with self._lock:
            found = self._values.get(shown)
            if found is not None:
                self._values.move_to_end(shown)
            return found

    def keep(self, shown: bytes, value: _Value) -> None:
        """Keeps it, in the place of what was there."""
        with self._lock:
            self._values[shown] = value
            self._values.move_to_end(shown)
            if len(self._values) > self.capacity:
                self._values.popitem(last=False)

    def __len__(self) -> int:
        with self._lock:
            return len(self._values)
