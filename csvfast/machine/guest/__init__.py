"""Inside a guest: reports, sealing key and RTMRs, asked for as software in a guest of a real CSV machine asks.

    with GuestDevice.open() as device:
        report = device.report(b"nonce of the one who asks")
        key = device.sealing_key()

Needs the standard library and csvfast's own compiled part, no other package: what lies here works in a small initrd.
"""

from __future__ import annotations

from csvfast.machine.guest.channel import CHANNEL, ChannelOperation, ProcessorChannel
from csvfast.machine.guest.client import GuestDevice
from csvfast.machine.guest.page import RequestPage
from csvfast.machine.guest.secure_call import SecureCallPages, SecureCallTransport
from csvfast.machine.guest.transport import ChannelTransport, DeviceTransport, SocketTransport, Transport

__all__ = [
    "CHANNEL",
    "ChannelOperation",
    "ChannelTransport",
    "DeviceTransport",
    "GuestDevice",
    "ProcessorChannel",
    "RequestPage",
    "SecureCallPages",
    "SecureCallTransport",
    "SocketTransport",
    "Transport",
]
