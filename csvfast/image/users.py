"""Who a container runs as: the image's own passwd and group files, which come from strangers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from csvfast.errors import ImageError

__all__ = ["FILE_LIMIT", "ReadFile", "User", "lookup_user"]

FILE_LIMIT: Final = 4 << 20
_ID_LIMIT: Final = 0xFFFF_FFFF
_GROUPS: Final = 65_536  # NGROUPS_MAX

ReadFile = Callable[[str, int], "bytes | None"]
"""(path in the container, limit in bytes) -> the file's bytes, or None: there is none. Must not leave the container's tree."""


class User(NamedTuple):
    """Numbers of a container's user; `home` is "" when the image does not tell."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    home: str = ""


def lookup_user(text: str, read: ReadFile) -> User:
    """The user that an image configuration's "User" means.

    In: text   "", "name", "number", either with ":group" (name or number)
        read   gives /etc/passwd and /etc/group
    As Docker and runc read it (opencontainers/runc, libcontainer/user): numbers need not be in the files; without a group the
    user's own group counts, and the groups that name the user. Raises ImageError for names that are not there.
    """
    name, colon, group = text.partition(":")
    if colon and not group:
        raise ImageError("user", f"{text[:80]!r}; expected a group behind the colon")
    if not name and colon:
        raise ImageError("user", f"{text[:80]!r}; expected a user before the colon")
    wanted = name or "0"
    number = _number(wanted)
    found: tuple[str, int, int, str] | None = None
    for fields in _lines(read("etc/passwd", FILE_LIMIT), 6):
        uid, gid = _number(fields[2]), _number(fields[3])
        if uid is not None and gid is not None and (fields[0] == wanted or uid == number):
            found = fields[0], uid, gid, fields[5]
            break
    if found is not None:
        user, uid, gid, home = found
    elif number is not None:
        user, uid, gid, home = "", number, 0, ""
    else:
        raise ImageError("user", f"{wanted[:80]!r} is not in the image's /etc/passwd")
    if group:
        return User(uid, _group(group, read), (), home)
    groups = []
    if user:
        for fields in _lines(read("etc/group", FILE_LIMIT), 4):
            other = _number(fields[2])
            if other is not None and other != gid and user in fields[3].split(",") and other not in groups:
                groups.append(other)
                if len(groups) > _GROUPS:
                    raise ImageError("user", f"{user[:80]!r} is in more than {_GROUPS} groups")
    return User(uid, gid, tuple(groups), home)


def _group(group: str, read: ReadFile) -> int:
    number = _number(group)
    for fields in _lines(read("etc/group", FILE_LIMIT), 3):
        gid = _number(fields[2])
        if gid is not None and (fields[0] == group or gid == number):
            return gid
    if number is not None:
        return number
    raise ImageError("user", f"the group {group[:80]!r} is not in the image's /etc/group")


def _number(text: str) -> int | None:
    if text.isascii() and text.isdigit() and len(text) <= 10 and int(text) < _ID_LIMIT:
        return int(text)
    return None


def _lines(data: bytes | None, fields: int) -> Iterator[list[str]]:
    """Fields of the lines that have enough of them."""
    for line in (data or b"").decode("utf-8", "surrogateescape").split("\n"):
        parts = line.strip().split(":")
        if len(parts) >= fields and not line.startswith("#"):
            yield parts
