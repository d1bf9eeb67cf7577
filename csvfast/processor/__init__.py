"""The security processor of a Hygon CSV part in software: platform, guests, launch, attestation, migration.

    Processor                        every command as a method; refusals are FirmwareError with the firmware's code
    Profile, Options                 which firmware it is, and choices the public sources leave open
    StateDirectory                   a chip's directory on disk
    make_session                     the guest owner's side of a launch
    seal_packet, pack_secret_table   the guest owner's side of LAUNCH_SECRET

Everything a processor of this package signs hangs from a simulator's root, never from Hygon's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from csvfast._lazy import lazy

if TYPE_CHECKING:
    from csvfast.processor.guest import Guest, GuestStatus
    from csvfast.processor.options import Options
    from csvfast.processor.packet import pack_disk_password, pack_secret_table, seal_packet
    from csvfast.processor.platform import PlatformStatus
    from csvfast.processor.processor import Processor
    from csvfast.processor.profile import PROFILE_1_3_2011, PROFILE_1_4_2337, PROFILES, Profile
    from csvfast.processor.session import OwnerSession, SessionBlob, make_session
    from csvfast.processor.state import StateDirectory
    from csvfast.processor.states import GuestState, PlatformState

__all__ = [
    "PROFILES",
    "PROFILE_1_3_2011",
    "PROFILE_1_4_2337",
    "Guest",
    "GuestState",
    "GuestStatus",
    "Options",
    "OwnerSession",
    "PlatformState",
    "PlatformStatus",
    "Processor",
    "Profile",
    "SessionBlob",
    "StateDirectory",
    "make_session",
    "pack_disk_password",
    "pack_secret_table",
    "seal_packet",
]

if not TYPE_CHECKING:
    __getattr__ = lazy(
        __name__,
        {
            "Guest": "guest", "GuestStatus": "guest", "Options": "options", "pack_disk_password": "packet",
            "pack_secret_table": "packet", "seal_packet": "packet", "PlatformStatus": "platform", "Processor": "processor",
            "PROFILE_1_3_2011": "profile", "PROFILE_1_4_2337": "profile", "PROFILES": "profile", "Profile": "profile",
            "OwnerSession": "session", "SessionBlob": "session", "make_session": "session", "StateDirectory": "state",
            "GuestState": "states", "PlatformState": "states",
        },
    )  # fmt: skip
