"""The states of section 4 of AMD's SEV API (publication 55766), whose numbers Hygon's firmware reports too.

Thread-safety: immutable.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = ["GuestState", "PlatformState"]


class PlatformState(IntEnum):
    """State of the platform as PLATFORM_STATUS reports it."""

    UNINIT = 0
    INIT = 1
    WORKING = 2


class GuestState(IntEnum):
    """State of a guest as GUEST_STATUS reports it."""

    UNINIT = 0
    LUPDATE = 1
    LSECRET = 2
    RUNNING = 3
    SUPDATE = 4
    RUPDATE = 5
    SENT = 6
