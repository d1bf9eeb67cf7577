"""Python for an initrd: the running interpreter, its standard library and packages, compiled ahead.

Only compiled files go in, each at the place of its source: an emulated processor would need minutes to compile them. Their bytes
depend on the sources and the interpreter's version alone: the code is marshalled without references (format 2: with references it
would depend on what else holds an object), and the header says "unchecked hash", so no time stands in it.

Sources: PEP 552 (deterministic pycs), PEP 3147 (a .pyc in the place of its source), Python's
Lib/importlib/_bootstrap_external.py.
Thread-safety: functions without state.
"""

from __future__ import annotations

import importlib.util
import marshal
import os
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from csvfast.errors import ArgumentError, FormatError

__all__ = ["GUEST_LEAVES_OUT", "STANDARD_LEAVES_OUT", "compiled", "library_files", "package_files"]

# Of the standard library: tests, graphical things, other programs' tools, and what would bring big libraries along.
STANDARD_LEAVES_OUT: Final = frozenset({
    "__phello__", "_bootsubprocess", "_crypt", "_ctypes_test", "_curses", "_curses_panel", "_dbm", "_gdbm", "_hashlib", "_ssl",
    "_sqlite3", "_testbuffer", "_testcapi", "_testclinic", "_testimportmultiple", "_testinternalcapi", "_testmultiphase",
    "_tkinter", "_xxsubinterpreters", "_xxtestfuzz", "antigravity", "curses", "dbm", "distutils", "doctest", "ensurepip",
    "idlelib", "lib2to3", "msilib", "nis", "ossaudiodev", "pydoc", "pydoc_data", "readline", "site-packages", "sqlite3", "ssl",
    "test", "this", "tkinter", "turtle", "turtledemo", "unittest", "venv", "wsgiref", "xmlrpc", "xxlimited", "xxlimited_35",
})  # fmt: skip
# Of csvfast: what no guest does.
GUEST_LEAVES_OUT: Final = frozenset({
    "csvfast.benchmark", "csvfast.broker", "csvfast.cli", "csvfast.include", "csvfast.lib", "csvfast.machine.emulator",
    "csvfast.ratstls",
})  # fmt: skip

_UNCHECKED_HASH: Final = (1).to_bytes(4, "little")


def compiled(source: bytes, path: str) -> bytes:
    """A .pyc of this source, which tracebacks name `path`. FormatError: not Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the source's authors have seen them
            code = compile(source, path, "exec", dont_inherit=True, optimize=0)
    except (SyntaxError, ValueError) as problem:
        raise FormatError(path, "source", None, str(problem), f"Python {sys.version_info[0]}.{sys.version_info[1]}") from None
    return importlib.util.MAGIC_NUMBER + _UNCHECKED_HASH + importlib.util.source_hash(source) + marshal.dumps(code, 2)


def library_files(leaves_out: frozenset[str] = STANDARD_LEAVES_OUT) -> Iterator[tuple[str, Path]]:
    """The standard library's modules: path under lib/pythonX.Y, and the file here."""
    for scheme in ("stdlib", "platstdlib"):
        root = Path(sysconfig.get_path(scheme))
        yield from _walk(root, "", lambda name: name.replace("/", ".").removeprefix("lib-dynload.") in leaves_out)
        if sysconfig.get_path("platstdlib") == sysconfig.get_path("stdlib"):
            return


def package_files(name: str, leaves_out: frozenset[str] = GUEST_LEAVES_OUT) -> Iterator[tuple[str, Path]]:
    """A package's or module's files: path under site-packages, and the file here.

    ArgumentError: there is no such package, or it has no files (built in, in a zip archive).
    """
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError) as problem:
        raise ArgumentError(f"package {name}: {problem}") from None
    if spec is None:
        raise ArgumentError(f"package {name} is not installed")
    place = name.replace(".", "/")
    if spec.submodule_search_locations:
        found = False
        for folder in spec.submodule_search_locations:
            for item in _walk(Path(folder), f"{place}/", lambda path: path.replace("/", ".") in leaves_out):
                found = True
                yield item
        if not found:
            raise ArgumentError(f"package {name} has no files")
        return
    file = Path(spec.origin or "")
    if not spec.has_location or not file.is_file():
        raise ArgumentError(f"package {name} has no file ({spec.origin})")
    yield f"{place.rpartition('/')[0]}/{file.name}".removeprefix("/"), file


def _walk(root: Path, prefix: str, is_left_out: Callable[[str], bool]) -> Iterator[tuple[str, Path]]:
    for folder, folders, files in os.walk(root):
        below = Path(folder).relative_to(root).as_posix()
        at = prefix if below == "." else f"{prefix}{below}/"
        folders[:] = sorted(
            name for name in folders
            if name not in ("__pycache__", "test", "tests", "idle_test")
            and not name.startswith("config-")
            and not name.endswith((".dist-info", ".egg-info"))
            and not is_left_out(f"{at}{name}")
        )  # fmt: skip
        for name in sorted(files):
            module = at + name.split(".")[0]
            if name.endswith((".py", ".so")) and not is_left_out(module):
                yield at + name, Path(folder, name)
