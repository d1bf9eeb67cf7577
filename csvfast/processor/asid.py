"""The ASIDs: who is bound to which, and which caches still have to be flushed before one may be used again.

An ASID is FREE, ACTIVE (one guest, or several of one user), DIRTY (released; some core has not executed WBINVD since), or
NEED_DF (every core has; the data fabric's buffers have not been flushed). DF_FLUSH makes all released ones FREE
(the reclaim order of arch/x86/kvm/svm/{sev,csv}.c: DEACTIVATE, WBINVD on all cores, DF_FLUSH).

Thread-safety: none of its own; the processor's lock is held by the callers.
"""

from __future__ import annotations

from enum import Enum

__all__ = ["AsidState", "AsidTable"]


class AsidState(Enum):
    """Where an ASID is in its cycle."""

    FREE = "free"
    ACTIVE = "active"
    DIRTY = "dirty"
    NEED_DF = "need-df"


class AsidTable:
    """Bindings and flush marks of ASIDs 1 .. highest.

    Args:
        highest: last ASID.
        cores: number of cores that must WBINVD.
    """

    __slots__ = ("_bound", "_released", "cores", "highest")

    def __init__(self, highest: int, cores: int) -> None:
        self.highest = highest
        self.cores = cores
        self._bound: dict[int, set[int]] = {}
        # Released ASID -> cores that have not executed WBINVD since the release.
        self._released: dict[int, set[int]] = {}

    def state(self, asid: int) -> AsidState:
        """The state of one ASID."""
        if asid in self._bound:
            return AsidState.ACTIVE
        if asid not in self._released:
            return AsidState.FREE
        return AsidState.DIRTY if self._released[asid] else AsidState.NEED_DF

    def guests(self, asid: int) -> frozenset[int]:
        """Handles bound to the ASID."""
        return frozenset(self._bound.get(asid, ()))

    def bind(self, asid: int, handle: int) -> bool:
        """Binds a guest; True if it is the ASID's first."""
        bound = self._bound.setdefault(asid, set())
        bound.add(handle)
        return len(bound) == 1

    def release(self, asid: int, handle: int) -> bool:
        """Unbinds a guest; True if it was the ASID's last, which must be flushed from now on."""
        bound = self._bound[asid]
        bound.discard(handle)
        if bound:
            return False
        del self._bound[asid]
        self._released[asid] = set(range(self.cores))
        return True

    def wbinvd(self, core: int | None = None) -> None:
        """A core (None = each) has written back and dropped its caches."""
        for waiting in self._released.values():
            if core is None:
                waiting.clear()
            else:
                waiting.discard(core)

    def cores_to_flush(self) -> frozenset[int]:
        """Cores that must still execute WBINVD before DF_FLUSH."""
        return frozenset().union(*self._released.values())

    def flushed(self) -> None:
        """DF_FLUSH has been done: every released ASID is free."""
        self._released.clear()
