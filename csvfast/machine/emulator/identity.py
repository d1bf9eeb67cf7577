"""Who an emulated process is: the host's user, or, where that user may become nobody else, a user that only the program sees."""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING, Any, Final

from csvfast.machine.emulator.syscalls_files import number_of, signed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from csvfast.machine.emulator.process import Process

__all__ = ["CALLS", "Identity", "become"]


class Identity:
    """Users and groups as the program sees them.

    In: user   user and group; None = the host's own, changed by the host's own calls
        groups  others
    A user that is only seen changes no right. The host's user then shows as user 0, as in a user name space of one user.
    """

    def __init__(self, user: tuple[int, int] | None = None, groups: Sequence[int] = ()) -> None:
        self.seen = user is not None
        self._user, self._group = user or (0, 0)
        self._groups = list(groups)

    @property
    def users(self) -> tuple[int, int, int]:
        """Real, effective and saved user."""
        return (self._user,) * 3 if self.seen else os.getresuid()

    @property
    def members(self) -> tuple[int, int, int]:
        """Real, effective and saved group."""
        return (self._group,) * 3 if self.seen else os.getresgid()

    @property
    def groups(self) -> list[int]:
        """Supplementary groups."""
        return self._groups if self.seen else os.getgroups()

    def shown(self, user: int, group: int) -> tuple[int, int]:
        """A file's owners as the program sees them."""
        if not self.seen:
            return user, group
        return 0 if user == os.geteuid() else user, 0 if group == os.getegid() else group

    def meant(self, user: int, group: int) -> tuple[int, int]:
        """The host's owners for those that the program names."""
        if not self.seen:
            return user, group
        return os.geteuid() if user == 0 else user, os.getegid() if group == 0 else group

    def set_users(self, *users: int) -> None:
        """setresuid; -1 = as it is. Raises OSError."""
        if not self.seen:
            os.setresuid(*users)
            return
        self._user = self._next(self._user, users)

    def set_members(self, *members: int) -> None:
        """setresgid; -1 = as it is. Raises OSError."""
        if not self.seen:
            os.setresgid(*members)
            return
        self._group = self._next(self._group, members)

    def set_groups(self, groups: list[int]) -> None:
        """setgroups. Raises OSError."""
        if not self.seen:
            os.setgroups(groups)
            return
        if self._user:
            raise OSError(errno.EPERM, "not the first user")
        self._groups = groups

    def _next(self, old: int, wanted: tuple[int, ...]) -> int:
        named = [value for value in wanted if value != -1]
        if self._user and any(value != old for value in named):
            raise OSError(errno.EPERM, "not the first user")
        return named[min(1, len(named) - 1)] if named else old


def become(user: tuple[int, int], groups: Sequence[int]) -> bool:
    """Makes this process the host's user of that number for good, when it runs as root. Out: False when it does not."""
    if os.geteuid() != 0:
        return False
    os.setgroups(list(groups))
    os.setresgid(user[1], user[1], user[1])
    os.setresuid(user[0], user[0], user[0])
    return True


def _value(number: int) -> int:
    return signed(number, 32)


def _getgroups(process: Process, count: int, address: int, *_: int) -> int:
    groups = process.identity.groups
    if number_of(count):
        if number_of(count) < len(groups):
            raise OSError(errno.EINVAL, "groups")
        process.space.write(address, struct.pack(f"<{len(groups)}I", *groups))
    return len(groups)


def _setgroups(process: Process, count: int, address: int, *_: int) -> int:
    if not 0 <= number_of(count) <= 65536:
        raise OSError(errno.EINVAL, "groups")
    process.identity.set_groups(list(struct.unpack(f"<{count}I", process.space.read(address, 4 * count))))
    return 0


def _triple(process: Process, values: tuple[int, int, int], addresses: tuple[int, ...]) -> int:
    for value, address in zip(values, addresses, strict=False):
        process.space.write(address, struct.pack("<I", value))
    return 0


def _set(which: str, count: int) -> Callable[..., int]:
    def call(process: Process, *values: int) -> int:
        wanted = [_value(value) for value in values[:count]]
        if count == 1:  # setuid, setgid
            wanted *= 3 if process.identity.users[1] == 0 or process.identity.seen else 1
            wanted = wanted if len(wanted) == 3 else [-1, wanted[0], -1]
        elif count == 2:
            wanted.append(-1)
        getattr(process.identity, which)(*wanted)
        return 0

    return call


def _setfs(process: Process, *_: int) -> int:
    return process.identity.users[1]


CALLS: Final[dict[int, Callable[..., Any]]] = {
    102: lambda process, *_: process.identity.users[0],
    104: lambda process, *_: process.identity.members[0],
    105: _set("set_users", 1), 106: _set("set_members", 1),
    107: lambda process, *_: process.identity.users[1],
    108: lambda process, *_: process.identity.members[1],
    113: _set("set_users", 2), 114: _set("set_members", 2), 115: _getgroups, 116: _setgroups,
    117: _set("set_users", 3), 119: _set("set_members", 3),
    118: lambda process, *addresses: _triple(process, process.identity.users, addresses),
    120: lambda process, *addresses: _triple(process, process.identity.members, addresses),
    122: _setfs, 123: lambda process, *_: process.identity.members[1],
}  # fmt: skip
