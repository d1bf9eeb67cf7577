"""The host's requests, read without trust: each member's type and bounds; what is not known is refused.

    CreateSandbox     {"sandbox", "hostname"?, "certificates"?: base64 of HSK and CEK}  -> {"agent", "runner", "shared"}
    PullImage         {"image", "source"?: where it is fetched instead}         -> {"image", "manifest", "layers", "encrypted"}
    CreateContainer   {"container", "image", "process"?: {"args"?, "command"?, "env"?, "cwd"?, "user"?}, "stdin"?,
                       "memory"?, "pids"?, "readonly"?, "volumes"?: [{"name", "path"}]}   -> {"container", "process"}
    StartContainer    {"container"}                                             -> {"pid"}
    ExecProcess       {"container", "args", "env"?, "cwd"?, "user"?, "stdin"?}  -> {"process"}
    SignalProcess     {"process", "signal"}                                     -> {}
    WaitProcess       {"process", "seconds"?}                                   -> {"exit_code"}, "running" when time was up
    CloseStdin        {"process"}                                               -> {}
    StatsContainer    {"container"}                                             -> what the runner counts
    RemoveContainer   {"container"}: its programs are killed                    -> {}
    GetTimings        {}                                                        -> {"steps": [{"step", "seconds"}]}
    DestroySandbox    {}                                                        -> {}, and the agent ends

"process" is a number on the wire, as STDIN, STDOUT and STDERR frames have it. "container" may stand beside it. "args" is a whole
command, "command" what comes behind the image's entrypoint. After a process's end there is an event
{"event": "exit", "process", "container", "exit_code"}.

Source: kata-containers src/libs/protocols/protos/agent.proto (names). Thread-safety: functions without state.
"""

from __future__ import annotations

import base64
import binascii
import posixpath
import re
from collections.abc import Mapping
from typing import Any, Final

from csvfast.errors import ContainerError

__all__ = ["Fields"]

_IDENTIFIER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}\Z")
_TEXT_MAX: Final = 128 << 10
_LIST_MAX: Final = 4096


class Fields:
    """Members of one request. In: method   for errors. document: the parameters

    Raises ContainerError "protocol" wherever something is not as expected.
    """

    def __init__(self, method: str, document: Mapping[str, Any]) -> None:
        self._method = method
        self._document = dict(document)
        self._taken: set[str] = set()

    def identifier(self, name: str) -> str:
        """A name: letters, digits, "_", ".", "-", at most 128 characters."""
        value = self._get(name, str)
        if value is None or not _IDENTIFIER.match(value):
            self._refuse(name, "a name of letters, digits, '_', '.', '-'")
        return str(value)

    def text(self, name: str, limit: int = _TEXT_MAX) -> str | None:
        """A text without NUL, or None."""
        value = self._get(name, str)
        if value is not None and (len(value) > limit or "\0" in value):
            self._refuse(name, f"a text without NUL of at most {limit} characters")
        return value  # type: ignore[no-any-return]

    def needed_text(self, name: str, limit: int = _TEXT_MAX) -> str:
        """A text that must be there."""
        value = self.text(name, limit)
        if not value:
            self._refuse(name, "a text")
        return str(value)

    def path(self, name: str) -> str | None:
        """An absolute path, or None. Patterns of the policy judge its text: nothing in that leads elsewhere."""
        value = self.text(name, 4096)
        if value is not None and (not value.startswith("/") or value.startswith("//") or posixpath.normpath(value) != value):
            self._refuse(name, "an absolute path without '.', '..' and needless '/'")
        return value

    def texts(self, name: str) -> list[str] | None:
        """A list of texts without NUL, or None."""
        value = self._get(name, list)
        if value is not None:
            good = all(isinstance(one, str) and "\0" not in one and len(one) <= _TEXT_MAX for one in value)
            if len(value) > _LIST_MAX or not good:
                self._refuse(name, f"at most {_LIST_MAX} texts without NUL")
        return value  # type: ignore[no-any-return]

    def number(self, name: str, least: int, most: int) -> int | None:
        """A whole number, or None."""
        value = self._get(name, int)
        if value is not None and (isinstance(value, bool) or not least <= value <= most):
            self._refuse(name, f"a number from {least} to {most}")
        return value  # type: ignore[no-any-return]

    def needed_number(self, name: str, least: int, most: int) -> int:
        """A number that must be there."""
        value = self.number(name, least, most)
        if value is None:
            self._refuse(name, f"a number from {least} to {most}")
        return int(value or 0)

    def seconds(self, name: str) -> float | None:
        """Seconds, 0 to a day, or None."""
        value = self._get(name, (int, float))
        if value is not None and (isinstance(value, bool) or not 0 <= value <= 86400):
            self._refuse(name, "seconds, at most a day")
        return value  # type: ignore[no-any-return]

    def flag(self, name: str) -> bool:
        """True or false; absent = false."""
        return bool(self._get(name, bool))

    def data(self, name: str, limit: int) -> bytes | None:
        """Bytes in base64, or None."""
        value = self.text(name, limit * 4 // 3 + 4)
        try:
            return None if value is None else base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            self._refuse(name, "base64")
        return None

    def fields(self, name: str) -> Fields:
        """An object; absent = an empty one."""
        return Fields(f"{self._method}: {name}", self._get(name, dict) or {})

    def many(self, name: str, limit: int = 64) -> list[Fields]:
        """A list of objects; absent = an empty one."""
        value = self._get(name, list) or []
        if len(value) > limit or not all(isinstance(one, dict) for one in value):
            self._refuse(name, f"at most {limit} objects")
        return [Fields(f"{self._method}: {name}", one) for one in value]

    def ignore(self, *names: str) -> None:
        """Members that are known and of no use."""
        self._taken.update(names)

    def end(self) -> None:
        """Nothing else may be there."""
        if unknown := sorted(set(self._document) - self._taken):
            raise ContainerError("protocol", f"{self._method}: {unknown[0][:40]!r} is unknown")

    def _get(self, name: str, kind: type | tuple[type, ...]) -> Any:
        self._taken.add(name)
        value = self._document.get(name)
        if value is not None and not isinstance(value, kind):
            self._refuse(name, getattr(kind, "__name__", "a number"))
        return value

    def _refuse(self, name: str, expected: str) -> None:
        raise ContainerError("protocol", f"{self._method}: {name}: expected {expected}")
