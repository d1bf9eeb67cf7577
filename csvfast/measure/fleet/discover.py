"""From what an operator names to items: files, directories with patterns, URLs of providers, manifests.

What is found comes in a fixed order (names sorted, directory by directory), so that two runs agree. What cannot be measured comes
as a row with an error and never ends the search. Symbolic links are followed; directories that contain themselves are noticed.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from csvfast.measure.errors import ParameterError, RecipeError, SourceNotFoundError, SourceUnreadableError
from csvfast.measure.fleet.providers import (
    FileSource,
    error_of,
    identity_of,
    load_provider,
    provider_for,
    recipe_identity,
)
from csvfast.measure.fleet.rows import CONTENTS, MODES, Content, Identity, Item, Mode, Options, Row, is_digest
from csvfast.measure.source import STDIN, AnyPath
from csvfast.measure.tree import SALT_MAX_BYTES, check_block_bytes

__all__ = ["Selection", "discover", "read_manifest"]

MANIFEST_LINE_MAX: Final = 64 << 10
DEPTH_MAX: Final = 128


@dataclass(frozen=True, slots=True)
class Selection:
    """How everything that is found is measured, and what of directories is taken.

    patterns: of files in directories, as shells have them: of the name, or with "/" of the path below the directory; none: all.
    exclude: what is left out, files and directories.
    Raises: ParameterError.
    """

    mode: Mode = "linear"
    content: Content = "file"
    options: Options = Options()  # noqa: RUF009
    patterns: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ParameterError(f"mode is {self.mode!r}; expected one of {', '.join(MODES)}")
        if self.content not in CONTENTS:
            raise ParameterError(f"content is {self.content!r}; expected one of {', '.join(CONTENTS)}")
        if self.mode == "launch" and self.content != "file":
            raise ParameterError("mode 'launch' measures what a recipe names; expected content 'file'")
        if self.mode != "verity" and self.options != Options():
            raise ParameterError(f"mode {self.mode!r} has no salt and no block size; expected mode 'verity'")
        try:
            salt = bytes.fromhex(self.options.salt)
        except ValueError:
            raise ParameterError(f"salt is {self.options.salt!r}; expected hexadecimal digits") from None
        if len(salt) > SALT_MAX_BYTES:
            raise ParameterError(f"salt has {len(salt)} bytes; expected at most {SALT_MAX_BYTES}")
        check_block_bytes("block size", self.options.block_bytes)


def discover(sources: Iterable[AnyPath | Item], selection: Selection) -> Iterator[Item | Row]:
    """Items, and rows with errors for what is none, in a fixed order. Nothing comes twice.

    sources: paths, URLs, and items as `read_manifest` gives them, whose identity is looked up.
    """
    sources = list(sources)
    if len(sources) == 1:
        yield from _found(sources[0], selection)
        return
    seen = set()
    for source in sources:
        for found in _found(source, selection):
            if found.key not in seen:
                seen.add(found.key)
                yield found


def read_manifest(path: AnyPath, selection: Selection) -> list[Item]:
    """The items of a manifest, in its order.

    Each line is a path or URL, or a JSON object with the members source (needed), name, mode, content, salt, block_bytes, expect;
    empty lines and lines that begin with "#" are nothing. Paths are relative to the manifest. `path` may be "-".
    Raises: SourceError; RecipeError with line and column.
    """
    name = os.fspath(path)
    folder = Path() if name == STDIN else Path(name).parent
    try:
        data = os.fdopen(os.dup(0), "rb").read() if name == STDIN else Path(name).read_bytes()
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"{name}: no such file") from error
    except OSError as error:
        raise SourceUnreadableError(f"{name}: cannot be read: {error.strerror or error}") from error
    items: list[Item] = []
    lines: dict[str, int] = {}
    for number, raw in enumerate(data.split(b"\n"), 1):
        place = f"{name}: line {number}"
        if len(raw) > MANIFEST_LINE_MAX:
            raise RecipeError(f"{place}: has {len(raw)} bytes; expected at most {MANIFEST_LINE_MAX}")
        try:
            text = raw.decode().strip()
        except UnicodeDecodeError as error:
            raise RecipeError(f"{place}, column {error.start + 1}: is no UTF-8") from error
        if not text or text.startswith("#"):
            continue
        item = _manifest_item(text, place, folder, selection, column=len(raw.decode()) - len(raw.decode().lstrip()))
        key = repr(item.key)
        if key in lines:
            raise RecipeError(f"{place}, column 1: {item.name} again, as in line {lines[key]}; expected each once")
        lines[key] = number
        items.append(item)
    return items


_MEMBERS: Final[dict[str, type]] = {
    "source": str,
    "name": str,
    "mode": str,
    "content": str,
    "salt": str,
    "block_bytes": int,
    "expect": str,
}


def _manifest_item(text: str, place: str, folder: Path, selection: Selection, column: int) -> Item:
    data: Any = {"source": text}
    if text.startswith("{"):
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise RecipeError(f"{place}, column {column + error.colno}: {error.msg}; expected a JSON object") from error
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"{place}, column {column + 1}: {error}; expected a JSON object") from error

    def refuse(member: str, problem: str) -> RecipeError:
        at = max(text.find(f'"{member}"'), 0) if text.startswith("{") else 0
        return RecipeError(f"{place}, column {column + at + 1}: {problem}")

    for member, value in data.items():
        kind = _MEMBERS.get(member)
        if kind is None:
            raise refuse(member, f"unknown member {member!r}; expected one of {', '.join(_MEMBERS)}")
        if type(value) is not kind:
            raise refuse(member, f"{member} is {value!r}; expected {'text' if kind is str else 'a number'}")
        if isinstance(value, str) and "\0" in value:
            raise refuse(member, f"{member} holds a NUL; expected text without")
    if not data.get("source"):
        raise refuse("source", "has no source; expected a path or URL")
    expect = data.get("expect")
    if expect is not None and not is_digest(expect):
        raise refuse("expect", f"expect is {expect!r}; expected 64 hexadecimal digits in lower case")
    mode = data.get("mode", selection.mode)
    options = selection.options if mode == "verity" else Options()
    try:
        if "salt" in data or "block_bytes" in data:
            salt = bytes.fromhex(data.get("salt", options.salt)).hex()
            options = Options(salt, data.get("block_bytes", options.block_bytes))
        content = data.get("content", "file" if mode == "launch" else selection.content)
        chosen = replace(selection, mode=mode, content=content, options=options)
        provider = provider_for(data["source"])
    except ValueError as error:
        member = next((member for member in ("mode", "content", "salt", "block_bytes") if member in data), "source")
        raise refuse(member, str(error)) from error
    location = data["source"] if provider else os.fspath(folder / data["source"])
    name = data.get("name", data["source"] if provider else location)
    return Item(name, location, chosen.mode, chosen.content, chosen.options, provider, expect=expect)


def _found(source: AnyPath | Item, selection: Selection) -> Iterator[Item | Row]:
    if isinstance(source, Item):
        chosen = replace(selection, mode=source.mode, content=source.content, options=source.options)
        if not source.provider:
            yield from _local(source, chosen)
            return
        item = source
    else:
        name = os.fspath(source)
        item = Item(name, name, selection.mode, selection.content, selection.options)
        try:
            item = replace(item, provider=provider_for(name))
        except ParameterError as error:
            yield Row.failed(item, *error_of(error))
            return
        if not item.provider:
            yield from _local(item, selection)
            return
    yield from _provided(item)


def _provided(item: Item) -> Iterator[Item | Row]:
    try:
        if item.mode == "launch":
            raise ParameterError(f"{item.name}: mode 'launch' measures local recipes; expected a path")
        found = list(load_provider(item.provider).expand(item.location))
    except Exception as error:  # of a server, of a library: one source, one row
        yield Row.failed(item, *error_of(error))
        return
    for one in found:
        name = item.name if len(found) == 1 and item.name != item.location else one.name
        yield replace(item, name=name, location=one.location, identity=one.identity)


def _local(item: Item, selection: Selection) -> Iterator[Item | Row]:
    if item.location == STDIN:
        yield Row.failed(item, "kind", "-: is standard input; expected files (csvfast measure image takes it)")
        return
    try:
        status = Path(item.location).stat()
    except (OSError, ValueError) as error:
        yield _unreadable(item, error)
        return
    if stat.S_ISDIR(status.st_mode):
        yield from _walk(item, item.location, "", selection, ((status.st_dev, status.st_ino),))
    else:
        yield _one(item, status)


def _one(item: Item, status: os.stat_result) -> Item | Row:
    try:
        if item.mode == "launch":
            return replace(item, identity=recipe_identity(item.location))
        if stat.S_ISBLK(status.st_mode):
            with FileSource(item.location) as source:
                return replace(item, identity=Identity(source.size))
    except Exception as error:
        return Row.failed(item, *error_of(error))
    if not stat.S_ISREG(status.st_mode):
        what = next((name for test, name in _KINDS if test(status.st_mode)), "no file")
        return Row.failed(item, "kind", f"{item.name}: is {what}; expected a file, a directory or a block device")
    return replace(item, identity=identity_of(status.st_size, status))


_KINDS: Final[tuple[tuple[Callable[[int], bool], str], ...]] = (
    (stat.S_ISFIFO, "a pipe, which has no end that is known"),
    (stat.S_ISCHR, "a character device, which has no end"),
    (stat.S_ISSOCK, "a socket"),
)


def _walk(
    root: Item, folder: str, below: str, selection: Selection, above: tuple[tuple[int, int], ...]
) -> Iterator[Item | Row]:
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        yield _unreadable(_at(root, folder), error)
        return
    prefix = folder if folder.endswith("/") else f"{folder}/"
    plain = root.name == root.location and root.mode != "launch"
    every = not selection.patterns
    for entry in entries:
        relative = f"{below}{entry.name}"
        if selection.exclude and _matches(entry.name, relative, selection.exclude):
            continue
        path = f"{prefix}{entry.name}"
        wanted = every or _matches(entry.name, relative, selection.patterns)
        try:
            is_folder = entry.is_dir()
            if not is_folder and not wanted:
                continue
            status = entry.stat()
        except OSError as error:
            if wanted:
                yield _unreadable(_at(root, path), error)
            continue
        if not is_folder:
            if plain and status.st_mode & 0o170000 == 0o100000:  # thousands of times: identity_of, and nothing else
                one = Identity(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)
                yield Item(path, path, root.mode, root.content, root.options, "", one)
            else:
                yield _one(_at(root, path), status)
            continue
        this = (status.st_dev, status.st_ino)
        if this in above or len(above) > DEPTH_MAX:
            why = "leads back to a directory above it" if this in above else f"is deeper than {DEPTH_MAX} directories"
            yield Row.failed(_at(root, path), "loop", f"{path}: {why}; expected a directory that ends")
            continue
        yield from _walk(root, path, f"{relative}/", selection, (*above, this))


def _at(root: Item, path: str) -> Item:
    name = path if root.name == root.location else f"{root.name}{path[len(root.location) :]}"
    return Item(name, path, root.mode, root.content, root.options)


def _matches(name: str, relative: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(relative if "/" in pattern else name, pattern) for pattern in patterns)


def _unreadable(item: Item, error: OSError | ValueError) -> Row:
    if isinstance(error, ValueError):
        return Row.failed(item, "option", f"{item.name!r} cannot be a path: {error}")
    if error.errno == errno.ELOOP:
        return Row.failed(item, "loop", f"{item.name}: symbolic links go in circles; expected a file")
    if isinstance(error, FileNotFoundError):
        return Row.failed(item, "not-found", f"{item.name}: no such file")
    return Row.failed(item, "unreadable", f"{item.name}: cannot be read: {error.strerror or error}")
