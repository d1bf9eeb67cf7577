"""What can go wrong while something is measured.

Two families, told apart by what a caller can do about them: the bytes could not be had (`SourceError`, `TargetError`:
the environment), or the bytes, or what was asked of them, make no sense (`FormatError` and its children: the input).
"""

from __future__ import annotations

from csvfast.errors import CsvfastError

__all__ = [
    "EmptySourceError",
    "FirmwareTableError",
    "FormatError",
    "HashTableAreaError",
    "MeasureError",
    "ParameterError",
    "RecipeError",
    "ResetBlockError",
    "SourceChangedError",
    "SourceError",
    "SourceKindError",
    "SourceNotFoundError",
    "SourceTruncatedError",
    "SourceUnreadableError",
    "SuperblockError",
    "TargetError",
]


class MeasureError(CsvfastError):
    """Anything `csvfast.measure` raises by itself."""


class SourceError(MeasureError, OSError):
    """The bytes to measure could not be had; the message names the path and why."""


class SourceNotFoundError(SourceError, FileNotFoundError):
    """The path does not exist, or vanished while it was measured."""


class SourceUnreadableError(SourceError):
    """The path exists and cannot be opened or read (permission, input/output error)."""


class SourceKindError(SourceError):
    """The path is a directory, a socket, or another thing that has no bytes to measure."""


class SourceChangedError(SourceError):
    """The file changed while it was measured: the digest would describe no state it was ever in."""


class SourceTruncatedError(SourceChangedError):
    """The file ended before the size it had, or should have, was read."""


class TargetError(MeasureError, OSError):
    """A hash area could not be written; nothing half-written remains."""


class FormatError(MeasureError, ValueError):
    """An input file, or a parameter, has a form that cannot be used."""


class ParameterError(FormatError):
    """A parameter lies outside its documented set."""


class EmptySourceError(FormatError):
    """There is no whole block to build a tree over."""


class SuperblockError(FormatError):
    """A dm-verity superblock is missing or malformed."""


class FirmwareTableError(FormatError):
    """An OVMF image's GUID table is missing or malformed."""


class HashTableAreaError(FirmwareTableError):
    """A kernel was given, and the OVMF publishes no usable area for the table of its hashes."""


class ResetBlockError(FirmwareTableError):
    """More than one vCPU was asked for, and the OVMF has no SEV-ES reset block for the others."""


class RecipeError(FormatError):
    """A recipe or explanation file is malformed."""
