"""Recipes for launch digests, and what makes two of them differ.

A recipe is a TOML or JSON file that names the pieces, so that a digest can be computed again, reviewed and kept in
version control. Paths are relative to the file's directory.

    firmware = "OVMF.fd"
    kernel = "vmlinuz"
    initrd = "initrd.img"
    append = "console=ttyS0"
    vmsa = "amd"              # "none" when left out
    vcpus = 4                 # 1
    cpu_signature = 0x900f01  # or a text "0x900f01", which JSON needs
    force_hash_table = false
    csv3 = false              # as CSV3 measures
    secure_calls = "0xffd000" # see launch_digest; none when left out
    expect = "8869…547b"      # checked by the command line

An explanation is what `csvfast measure launch --explain --json` prints: a recipe's outcome, with the digest of every
piece. Either can be compared with the other.
"""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from csvfast.measure.errors import ParameterError, RecipeError, SourceNotFoundError, SourceUnreadableError
from csvfast.measure.launch import LaunchDigest, Vmsa, launch_digest
from csvfast.measure.source import STDIN, AnyPath, Progress
from csvfast.measure.vmsa import DEFAULT_CPU_SIGNATURE

__all__ = ["Difference", "LaunchRecipe", "compare_explanations", "load_explanation", "load_recipe", "parse_digest"]

RECIPE_MAX_BYTES = 16 << 20
DIGEST_DIGITS = 64

_KEYS: dict[str, tuple[type, ...]] = {
    "firmware": (str,),
    "kernel": (str,),
    "initrd": (str,),
    "append": (str,),
    "vmsa": (str,),
    "vcpus": (int,),
    "cpu_signature": (int, str),
    "force_hash_table": (bool,),
    "csv3": (bool,),
    "secure_calls": (int, str),
    "expect": (str,),
}


@dataclass(frozen=True, slots=True)
class LaunchRecipe:
    """The arguments of `launch_digest`, and the digest that is expected, if any. Thread-safety: immutable."""

    firmware: AnyPath
    kernel: AnyPath | None = None
    initrd: AnyPath | None = None
    append: str | None = None
    vmsa: Vmsa = "none"
    vcpus: int = 1
    cpu_signature: int = DEFAULT_CPU_SIGNATURE
    force_hash_table: bool = False
    expect: bytes | None = None
    csv3: bool = False
    secure_calls: int | None = None

    def measure(self, progress: Progress | None = None) -> LaunchDigest:
        """Computes the digest. Raises what `launch_digest` raises."""
        return launch_digest(
            self.firmware,
            kernel=self.kernel,
            initrd=self.initrd,
            append=self.append,
            vmsa=self.vmsa,
            vcpus=self.vcpus,
            cpu_signature=self.cpu_signature,
            force_hash_table=self.force_hash_table,
            csv3=self.csv3,
            secure_calls=self.secure_calls,
            progress=progress,
        )


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing in which two explanations differ. `left` and `right` are texts for people, "absent" where there is
    none."""

    piece: str
    field: str
    left: str
    right: str

    def __str__(self) -> str:
        return f"{self.piece}: {self.field} is {self.left} on the left, {self.right} on the right"


def load_recipe(path: AnyPath) -> LaunchRecipe:
    """Reads a recipe.

    Raises: RecipeError naming the key, what it holds and what was expected; SourceError.
    Thread-safety: safe from any thread.
    """
    return _recipe_of(_load(path), path)


def load_explanation(path: AnyPath, progress: Progress | None = None) -> dict[str, Any]:
    """An explanation: read from an explanation file, or computed from a recipe file.

    Raises: RecipeError, SourceError, and what `launch_digest` raises.
    Thread-safety: safe from any thread.
    """
    data = _load(path)
    if "pieces" not in data:
        return _recipe_of(data, path).measure(progress).to_dict(explain=True)
    name = os.fspath(path)
    parse_digest(data.get("digest"), f"{name}: digest", RecipeError)
    for key, digest in (("inputs", "sha256"), ("pieces", "sm3")):
        items = data.get(key)
        if not isinstance(items, list):
            raise RecipeError(f"{name}: {key} is {type(items).__name__}; expected a list")
        for index, item in enumerate(items):
            where = f"{name}: {key}[{index}]"
            if not isinstance(item, dict) or not isinstance(item.get("name"), str):
                raise RecipeError(f"{where}: has no name; expected an explanation made by csvfast")
            if not isinstance(item.get("bytes"), int):
                raise RecipeError(f"{where}.bytes is {item.get('bytes')!r}; expected a number")
            parse_digest(item.get(digest), f"{where}.{digest}", RecipeError)
    if not isinstance(data.get("append"), str | None):
        raise RecipeError(f"{name}: append is {data['append']!r}; expected a text or null")
    return data


def compare_explanations(left: dict[str, Any], right: dict[str, Any]) -> list[Difference]:
    """All differences, in the order in which the bytes are measured: the first one is where the digests part.

    Thread-safety: safe from any thread.
    """
    found: list[Difference] = []
    _compare(found, left["pieces"][:1], right["pieces"][:1], "sm3")
    if left.get("append") != right.get("append"):
        found.append(_first_difference(left.get("append"), right.get("append")))
    _compare(found, left["inputs"], right["inputs"], "sha256")
    _compare(found, left["pieces"][1:], right["pieces"][1:], "sm3")
    if not found and left["digest"] != right["digest"]:
        found.append(Difference("launch", "digest", left["digest"], right["digest"]))
    return found


def parse_digest(text: object, name: str, error: type[ParameterError] | type[RecipeError] = ParameterError) -> bytes:
    """32 bytes of 64 hexadecimal digits. Raises the given error, naming what was found."""
    if not isinstance(text, str):
        raise error(f"{name} is {text!r}; expected {DIGEST_DIGITS} hexadecimal digits")
    if len(text) != DIGEST_DIGITS:
        raise error(f"{name} has {len(text)} characters; expected {DIGEST_DIGITS} hexadecimal digits")
    if any(character not in "0123456789abcdefABCDEF" for character in text):
        raise error(f"{name} is {text!r}; expected {DIGEST_DIGITS} hexadecimal digits")
    return bytes.fromhex(text)


def _compare(found: list[Difference], left: list[dict[str, Any]], right: list[dict[str, Any]], digest: str) -> None:
    lefts = {item["name"]: item for item in left}
    rights = {item["name"]: item for item in right}
    for name in [*lefts, *(name for name in rights if name not in lefts)]:
        if name not in lefts or name not in rights:
            sides = ["absent" if name not in side else f"{side[name]['bytes']} bytes" for side in (lefts, rights)]
            found.append(Difference(name, "presence", *sides))
            continue
        for field in ("bytes", digest):
            one, other = lefts[name][field], rights[name][field]
            if one != other:
                found.append(Difference(name, field, str(one), str(other)))


def _first_difference(left: str | None, right: str | None) -> Difference:
    if left is None or right is None:
        return Difference("command line", "text", *("absent" if text is None else repr(text) for text in (left, right)))
    pairs = enumerate(zip(left, right, strict=False))
    position = next((index for index, (one, other) in pairs if one != other), min(len(left), len(right)))
    sides = [repr(text[position : position + 32]) if position < len(text) else "the end" for text in (left, right)]
    return Difference("command line", f"text from character {position}", *sides)


def _load(path: AnyPath) -> dict[str, Any]:
    file = Path(path)
    try:
        with file.open("rb") as stream:
            content = stream.read(RECIPE_MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"{file}: no such file") from error
    except OSError as error:
        raise SourceUnreadableError(f"{file}: cannot be read: {error.strerror or error}") from error
    if len(content) > RECIPE_MAX_BYTES:
        raise RecipeError(f"{file}: is larger than {RECIPE_MAX_BYTES} bytes; expected a recipe or an explanation")
    try:
        text = content.decode()
        data = json.loads(text) if text.lstrip().startswith("{") else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{file}: is neither JSON nor TOML: {error}") from error
    return cast(dict[str, Any], data)


def _recipe_of(data: dict[str, Any], path: AnyPath) -> LaunchRecipe:
    name = os.fspath(path)
    for key, value in data.items():
        kinds = _KEYS.get(key)
        if kinds is None:
            raise RecipeError(f"{name}: unknown key {key!r}; expected one of {', '.join(_KEYS)}")
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise RecipeError(f"{name}: {key} is {value!r}; expected {expected}")
    if "firmware" not in data:
        raise RecipeError(f"{name}: has no firmware; expected the path of an OVMF image")
    values = dict(data)
    for key in ("firmware", "kernel", "initrd"):
        if key in values and values[key] != STDIN:
            values[key] = Path(path).parent / values[key]
    for key, example in (("cpu_signature", "0x900f00"), ("secure_calls", "0xffd000")):
        if isinstance(values.get(key), str):
            try:
                values[key] = int(values[key], 0)
            except ValueError as error:
                raise RecipeError(f"{name}: {key} is {data[key]!r}; expected a number such as {example}") from error
    if "expect" in values:
        values["expect"] = parse_digest(values["expect"], f"{name}: expect", RecipeError)
    return LaunchRecipe(**values)
