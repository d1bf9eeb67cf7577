"""The key broker: keys only to virtual machines that prove themselves.

What serves needs the packages of the extra "broker", and asks for them (csvfast.broker._serving); guests have the clients alone.
"""

from __future__ import annotations
