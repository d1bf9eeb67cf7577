"""What every part of the broker speaks of: paths of resources, and the doors through which they are asked for.

A resource has a path of three segments, repository/type/tag, as in CoCo's KBS. Verdictd's key ids are tags below `default/key`.

Source: confidential-containers/trustee kbs/src/plugins/implementations/resource (the rule for segments); guest-components
attestation-agent/docs/RESOURCE_URI.md (the URI); inclavare-containers/verdictd src/resources (key ids).
Thread-safety: immutable objects.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Final, NamedTuple

from csvfast.errors import RequestError

__all__ = ["SEGMENT_LIMIT", "VERDICTD_KEYS", "Door", "ResourcePath", "for_kid"]

SEGMENT_LIMIT: Final = 128
"""Characters of one segment."""

VERDICTD_KEYS: Final = ("default", "key")
"""Where a key id without a path is looked for."""

_SEGMENT: Final = re.compile(rf"(?=.{{1,{SEGMENT_LIMIT}}}\Z)[A-Za-z0-9_-]+[A-Za-z0-9_.-]*\Z", re.ASCII)
_URI_START: Final = "kbs://"


class Door(StrEnum):
    """Through which door a request came."""

    VERDICTD = "verdictd"
    KBS = "kbs"
    KEYPROVIDER = "keyprovider"
    CLIENTAPI = "clientapi"
    ADMINISTRATION = "administration"


class ResourcePath(NamedTuple):
    """repository/type/tag. Made by `parse`, `from_uri` or `for_kid`, which check the segments."""

    repository: str
    type: str
    tag: str

    @classmethod
    def parse(cls, text: str) -> ResourcePath:
        """From "repository/type/tag". RequestError: another number of segments, or characters no segment may have."""
        parts = text.split("/", 3)
        if len(parts) != 3 or not all(map(_SEGMENT.match, parts)):
            raise RequestError(f"resource path {_shown(text)}: expected repository/type/tag of letters, digits, '_', '-', '.'")
        return cls(*parts)

    @classmethod
    def from_uri(cls, text: str) -> ResourcePath:
        """From "kbs:///repository/type/tag"; the host between the slashes is ignored, as guests do. RequestError."""
        if not text.startswith(_URI_START):
            raise RequestError(f"resource URI {_shown(text)}: expected kbs:///repository/type/tag")
        _host, slash, path = text.removeprefix(_URI_START).partition("/")
        if not slash:
            raise RequestError(f"resource URI {_shown(text)}: expected kbs:///repository/type/tag")
        return cls.parse(path)

    def __str__(self) -> str:
        return f"{self.repository}/{self.type}/{self.tag}"

    @property
    def uri(self) -> str:
        """kbs:///repository/type/tag."""
        return f"kbs:///{self}"


def for_kid(kid: str) -> ResourcePath:
    """The resource behind a key id: a URI, a path of three segments, or a plain name below default/key. RequestError."""
    if kid.startswith(_URI_START):
        return ResourcePath.from_uri(kid)
    if "/" not in kid:
        return ResourcePath.parse(f"{VERDICTD_KEYS[0]}/{VERDICTD_KEYS[1]}/{kid}")
    return ResourcePath.parse(kid)


def _shown(text: str) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
