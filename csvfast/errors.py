"""Every exception csvfast raises, in one tree.

All of them derive from :class:`CsvfastError`, and from the built-in exception a Python user would expect in that place
(``ValueError``, ``TypeError``, ``BufferError``, ``OSError``, ...), so both ways of catching work. A message names the
value at fault and what was expected; it never holds key or plaintext bytes. When one of them is raised, nothing has been
written to the caller's buffers or to memory, unless the class says otherwise.

    CsvfastError
    ├── StartupError (ImportError)             the environment asks for a kernel that cannot be had
    ├── ArgumentError (ValueError)             an argument outside its documented set
    │   ├── KernelError                        no such primitive or kernel, or the CPU cannot run it
    │   ├── LengthError                        a length is too short, too long or not the multiple it must be
    │   │   └── KeyLengthError                 a key of the wrong length
    │   ├── WeakKeyError                       the two halves of an XTS key are equal
    │   ├── AddressError                       an address, span or unit number out of range
    │   ├── AlignmentError                     an address not on the boundary the call needs
    │   ├── OverlapError                       input and output overlap without being the same
    │   ├── AsidError                          an ASID outside 1 .. asid_max
    │   │   ├── UnknownAsidError (LookupError) the ASID has no key
    │   │   └── AsidInUseError                 the ASID already has a key
    │   └── LimitError                         the algorithm's limit under one key or nonce is reached
    ├── BufferTypeError (TypeError)            not a bytes-like object
    ├── ReadOnlyBufferError (BufferError)      the output buffer cannot be written
    ├── NonContiguousBufferError (BufferError) a strided buffer
    ├── AuthenticationError                    a tag or MAC did not match
    ├── ClosedError (ValueError)               the memory has been closed
    ├── MemoryInUseError (BufferError)         close() while views exist or calls run
    ├── KeyExposureError (TypeError)           an object that holds a key cannot be pickled or copied
    ├── SnapshotError (ValueError)             a snapshot file that is damaged or belongs to another memory
    ├── AllocationError (MemoryError)
    ├── SystemCallError (OSError)              a system call failed; ``errno`` says how
    └── InternalError (RuntimeError)           a state the library believes impossible; please report it

Thread-safety: exception classes are immutable.
"""

from __future__ import annotations

__all__ = [
    "AddressError",
    "AlignmentError",
    "AllocationError",
    "ArgumentError",
    "AsidError",
    "AsidInUseError",
    "AuthenticationError",
    "BufferTypeError",
    "ClosedError",
    "CsvfastError",
    "InternalError",
    "KernelError",
    "KeyExposureError",
    "KeyLengthError",
    "LengthError",
    "LimitError",
    "MemoryInUseError",
    "NonContiguousBufferError",
    "OverlapError",
    "ReadOnlyBufferError",
    "SnapshotError",
    "StartupError",
    "SystemCallError",
    "UnknownAsidError",
    "WeakKeyError",
]


class CsvfastError(Exception):
    """Base of every exception of csvfast."""


class StartupError(CsvfastError, ImportError):
    """``CSVFAST_KERNEL`` or ``CSVFAST_DISABLE`` asks for something this CPU or build cannot give."""


class ArgumentError(CsvfastError, ValueError):
    """An argument lies outside its documented set."""


class KernelError(ArgumentError):
    """There is no such primitive or kernel, or this CPU cannot run it."""


class LengthError(ArgumentError):
    """A length is too short, too long, or not the multiple it must be."""


class KeyLengthError(LengthError):
    """A key has the wrong length."""


class WeakKeyError(ArgumentError):
    """The halves K1 and K2 of an XTS key are equal."""


class AddressError(ArgumentError):
    """An address, a span or a data unit number is out of range."""


class AlignmentError(ArgumentError):
    """An address is not on the boundary the call needs."""


class OverlapError(ArgumentError):
    """Input and output overlap without being the same buffer."""


class AsidError(ArgumentError):
    """An ASID is outside 1 .. asid_max (0 is the host, which has no key)."""


class UnknownAsidError(AsidError, LookupError):
    """The ASID has no key installed."""


class AsidInUseError(AsidError):
    """The ASID already has a key: remove it first."""


class LimitError(ArgumentError):
    """The algorithm's limit on the amount of data under one key or nonce is reached."""


class BufferTypeError(CsvfastError, TypeError):
    """The argument is not a bytes-like object."""


class ReadOnlyBufferError(CsvfastError, BufferError):
    """An output buffer is read-only."""


class NonContiguousBufferError(CsvfastError, BufferError):
    """A buffer is strided; only C-contiguous buffers are accepted."""


class AuthenticationError(CsvfastError):
    """A tag or MAC did not match. An output buffer given by the caller has been wiped."""


class ClosedError(CsvfastError, ValueError):
    """The object has been closed."""


class MemoryInUseError(CsvfastError, BufferError):
    """The memory cannot be closed: views of it exist, or calls on it are running in other threads."""


class KeyExposureError(CsvfastError, TypeError):
    """An object that holds key material cannot be pickled or copied."""


class SnapshotError(CsvfastError, ValueError):
    """A snapshot is damaged, truncated, or was taken of a memory of another shape."""


class AllocationError(CsvfastError, MemoryError):
    """The system has no memory of the size asked for."""


class SystemCallError(CsvfastError, OSError):
    """A system call failed; ``errno`` and ``strerror`` say how."""


class InternalError(CsvfastError, RuntimeError):
    """The C library reported a state this binding believes impossible."""
