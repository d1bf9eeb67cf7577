"""Kernel modules for an initrd: found by name in a folder, with what they depend on, in the order in which they load.

Each module names its dependencies itself (".modinfo"); no index made by depmod is needed. Modules may be packed (.ko.xz, .ko.gz):
they are unpacked here, because not every insmod can.

Source: torvalds/linux include/linux/moduleinfo.h, scripts/mod/modpost.c (add_depends). Thread-safety: functions without state.
"""

from __future__ import annotations

import gzip
import lzma
import os
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from csvfast.errors import ArgumentError, FormatError

__all__ = ["load_order"]

_DEPENDS: Final = re.compile(rb"\0depends=([A-Za-z0-9_,\-]*)\0")
_SUFFIXES: Final = (".ko", ".ko.xz", ".ko.gz")


def load_order(folder: str | os.PathLike[str], names: Iterable[str]) -> dict[str, bytes]:
    """The modules and everything they need, by name, in an order in which each can be loaded.

    In: folder  searched with everything below it, e.g. /lib/modules/6.1.0-9-amd64
        names   "-" and "_" are the same, as for modprobe
    Raises: ArgumentError: a module is not there; FormatError: a file that is no module; OSError.
    """
    there: dict[str, Path] = {}
    for path in sorted(Path(folder).rglob("*.ko*")):
        for suffix in _SUFFIXES:
            if path.name.endswith(suffix):
                there.setdefault(_plain(path.name.removesuffix(suffix)), path)
    loaded: dict[str, bytes] = {}

    def load(name: str, chain: tuple[str, ...]) -> None:
        plain = _plain(name)
        if plain in loaded:
            return
        if plain in chain:
            raise FormatError("kernel modules", "depends", None, " needs ".join((*chain, plain)), "no circle")
        path = there.get(plain)
        if path is None:
            why = f", which {chain[-1]} needs," if chain else ""
            raise ArgumentError(f"kernel module {name}{why} is not in {os.fspath(folder)}")
        data = _content(path)
        for other in _dependencies(data, path):
            load(other, (*chain, plain))
        loaded[plain] = data

    for name in names:
        load(name, ())
    return loaded


def _plain(name: str) -> str:
    return name.replace("-", "_")


def _content(path: Path) -> bytes:
    raw = path.read_bytes()
    try:
        if path.suffix == ".xz":
            return lzma.decompress(raw)
        if path.suffix == ".gz":
            return gzip.decompress(raw)
    except (lzma.LZMAError, OSError, EOFError, zlib.error) as problem:
        raise FormatError(os.fspath(path), "compression", None, str(problem), f"a file packed as {path.suffix}") from None
    return raw


def _dependencies(data: bytes, path: Path) -> list[str]:
    match = _DEPENDS.search(data)
    if data[:4] != b"\x7fELF" or match is None:
        raise FormatError(os.fspath(path), "content", 0, data[:4].hex() or "nothing", "a kernel module that lists what it needs")
    return [name.decode() for name in match[1].split(b",") if name]
