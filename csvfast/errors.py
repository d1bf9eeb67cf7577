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
    │   ├── LimitError                         the algorithm's limit under one key or nonce is reached
    ├── BufferTypeError (TypeError)            not a bytes-like object
    ├── ReadOnlyBufferError (BufferError)      the output buffer cannot be written
    ├── NonContiguousBufferError (BufferError) a strided buffer
    │   ├── KeyRangeError                      an SM2 private key or nonce outside its range
    │   ├── PointError                         bytes that are no point of the SM2 curve
    │   └── FormatError                        a structure whose bytes break its format: which field, where, what was expected
    ├── AuthenticationError                    a tag or MAC did not match
    │   └── SignatureError                     an SM2 signature is not valid
    ├── VerificationError                      a certificate chain or report is not genuine: which step, why
    ├── AppraisalError                         genuine, but not what the policy allows: every violation
    ├── FirmwareError                          the security processor refused a command: its status code
    ├── AttestedTlsError (ConnectionError)     a TLS peer was refused, or the connection failed: at which stage
    ├── BrokerError                            the key broker did not do what was asked
    │   ├── RequestError (ValueError)          a request that is no request of the protocol
    │   ├── DeniedError                        not allowed: the reason is for operators, the text for anybody
    │   ├── LimitedError                       too many requests or failures: when to come again
    │   ├── UnavailableError                   the store or the audit log cannot be written, so nothing is released
    │   ├── StaleGenerationError               decided on the grounds of policies or keys that have changed since
    │   ├── ConflictError                      what is asked for contradicts what is there
    │   └── UnknownError (LookupError)         administration: there is no such thing
    ├── ImageError (ValueError)                a container image, a layer or an archive is not acceptable
    │   ├── RegistryError                      a registry refused, or could not be reached
    │   └── IntegrityError (AuthenticationError)  a blob is not what its digest, MAC or size say
    ├── ContainerError                         a container cannot be created, or cannot go on: of which kind
    ├── StateError                             a directory of chip, platform or broker state is damaged, in use or not private
    ├── MissingExtraError (ImportError)        an optional package is needed: the pip command to type
    ├── PageFaultError (LookupError)           a guest's page tables refuse an access: stage and level
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

from collections.abc import Sequence
from enum import IntEnum
from typing import Final

__all__ = [
    "AddressError",
    "AlignmentError",
    "AllocationError",
    "AppraisalError",
    "ArgumentError",
    "AsidError",
    "AsidInUseError",
    "AttestedTlsError",
    "AuthenticationError",
    "BrokerError",
    "BufferTypeError",
    "ClosedError",
    "ConflictError",
    "ContainerError",
    "CsvfastError",
    "DeniedError",
    "FirmwareError",
    "FirmwareStatus",
    "FormatError",
    "ImageError",
    "IntegrityError",
    "InternalError",
    "KernelError",
    "KeyExposureError",
    "KeyLengthError",
    "KeyRangeError",
    "LengthError",
    "LimitError",
    "LimitedError",
    "MemoryInUseError",
    "MissingExtraError",
    "NonContiguousBufferError",
    "OverlapError",
    "PageFaultError",
    "PointError",
    "ReadOnlyBufferError",
    "RegistryError",
    "RequestError",
    "SignatureError",
    "SnapshotError",
    "StaleGenerationError",
    "StartupError",
    "StateError",
    "SystemCallError",
    "UnavailableError",
    "UnknownAsidError",
    "UnknownError",
    "VerificationError",
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


class KeyRangeError(ArgumentError):
    """An SM2 private key is outside 1 .. n - 2, or a nonce outside 1 .. n - 1."""


class PointError(ArgumentError):
    """The bytes are no encoding of a point of the SM2 curve."""


class FormatError(ArgumentError):
    """A structure's bytes break its format.

    Attributes:
        structure: what was being read, e.g. ``"CSV certificate"``.
        field: name of the field at fault, e.g. ``"curve_id"``.
        offset: its byte offset from the structure's start, or None where there is none (JSON, TOML).
        found, expected: in words, never key material.
    """

    def __init__(self, structure: str, field: str, offset: int | None, found: str, expected: str) -> None:
        place = "" if offset is None else f" at offset {offset} ({offset:#x})"
        super().__init__(f"{structure}: {field}{place}: found {found}; expected {expected}")
        self.structure = structure
        self.field = field
        self.offset = offset
        self.found = found
        self.expected = expected


class BufferTypeError(CsvfastError, TypeError):
    """The argument is not a bytes-like object."""


class ReadOnlyBufferError(CsvfastError, BufferError):
    """An output buffer is read-only."""


class NonContiguousBufferError(CsvfastError, BufferError):
    """A buffer is strided; only C-contiguous buffers are accepted."""


class AuthenticationError(CsvfastError):
    """A tag or MAC did not match. An output buffer given by the caller has been wiped."""


class SignatureError(AuthenticationError):
    """An SM2 signature is not valid for this key, user identity and message."""


class VerificationError(CsvfastError):
    """A certificate or report is not genuine, or cannot be shown to be.

    Attributes:
        step: the check that failed, one of the names of :mod:`csvfast.certs.chain` and :mod:`csvfast.attest.verify`,
            e.g. ``"HRK"``, ``"HSK"``, ``"CEK"``, ``"PEK"``, ``"report signature"``.
    """

    def __init__(self, step: str, message: str) -> None:
        super().__init__(f"{step}: {message}")
        self.step = step


class AppraisalError(CsvfastError):
    """Evidence that is genuine but not allowed by the policy.

    Attributes:
        violations: one line each, with what was observed and what was expected.
    """

    def __init__(self, violations: Sequence[str]) -> None:
        super().__init__("; ".join(violations))
        self.violations: Final = tuple(violations)


class FirmwareStatus(IntEnum):
    """Status codes of the firmware (torvalds/linux include/uapi/linux/psp-sev.h and Hygon's csv-dev.c)."""

    SUCCESS = 0x00
    INVALID_PLATFORM_STATE = 0x01
    INVALID_GUEST_STATE = 0x02
    INVALID_CONFIG = 0x03
    INVALID_LENGTH = 0x04
    ALREADY_OWNED = 0x05
    INVALID_CERTIFICATE = 0x06
    POLICY_FAILURE = 0x07
    INACTIVE = 0x08
    INVALID_ADDRESS = 0x09
    BAD_SIGNATURE = 0x0A
    BAD_MEASUREMENT = 0x0B
    ASID_OWNED = 0x0C
    INVALID_ASID = 0x0D
    WBINVD_REQUIRED = 0x0E
    DFFLUSH_REQUIRED = 0x0F
    INVALID_GUEST = 0x10
    INVALID_COMMAND = 0x11
    ACTIVE = 0x12
    HWERROR_PLATFORM = 0x13
    HWERROR_UNSAFE = 0x14
    UNSUPPORTED = 0x15
    INVALID_PARAM = 0x16
    RESOURCE_LIMIT = 0x17
    SECURE_DATA_INVALID = 0x18
    INVALID_PAGE_SIZE = 0x19
    INVALID_PAGE_STATE = 0x1A
    INVALID_MDATA_ENTRY = 0x1B
    INVALID_PAGE_OWNER = 0x1C
    AEAD_OFLOW = 0x1D
    EXIT_RING_BUFFER = 0x1F
    RMP_INIT_REQUIRED = 0x20
    BAD_SVN = 0x21
    BAD_VERSION = 0x22
    SHUTDOWN_REQUIRED = 0x23
    UPDATE_FAILED = 0x24
    RESTORE_REQUIRED = 0x25
    RMP_INITIALIZATION_FAILED = 0x26
    INVALID_KEY = 0x27


class FirmwareError(CsvfastError):
    """The security processor refused a command.

    Attributes:
        status: the code a driver would read from the mailbox.
        needed: where the firmware writes back a required length (INVALID_LENGTH), that length or lengths by field name.
    """

    def __init__(self, status: FirmwareStatus, message: str, needed: dict[str, int] | None = None) -> None:
        super().__init__(f"{status.name} ({status:#04x}): {message}")
        self.status = status
        self.needed = needed or {}


class AttestedTlsError(CsvfastError, ConnectionError):
    """A TLS peer was refused, or the connection to it failed.

    Attributes:
        stage: "handshake", "certificate", "binding", "verify", "appraise", "deadline" or "closed". The text is for this
            side's operator; a refused peer sees an alert or the end of the connection.
    """

    def __init__(self, stage: str, message: str) -> None:
        super().__init__(f"{stage}: {message}")
        self.stage = stage


class ImageError(CsvfastError, ValueError):
    """A container image, a layer or an archive is not acceptable.

    Attributes: subject: what it is about ("layer 2, sha256:4f...", "etc/passwd"). problem: what was found and what was expected.
    """

    def __init__(self, subject: str, problem: str) -> None:
        self.subject, self.problem = subject, problem
        super().__init__(f"{subject}: {problem}")


class RegistryError(ImageError):
    """A registry refused, could not be reached, or does not speak the distribution API.

    Attributes: status: of HTTP; 0 without an answer. code: the registry's own ("MANIFEST_UNKNOWN"); "" without one.
    """

    def __init__(self, subject: str, problem: str, *, status: int = 0, code: str = "") -> None:
        self.status, self.code = status, code
        super().__init__(subject, problem)


class IntegrityError(ImageError, AuthenticationError):
    """A blob is not what its digest, its MAC or its size say: changed, cut off, or another one."""


class ContainerError(CsvfastError):
    """A container cannot be created, or cannot go on.

    Attributes: kind: "policy" (the agent's policy forbids it), "attestation", "broker", "image", "launch", "state", "limit",
        "executor", "protocol". problem: what was found.
    """

    def __init__(self, kind: str, problem: str) -> None:
        self.kind, self.problem = kind, problem
        super().__init__(f"{kind}: {problem}")


class BrokerError(CsvfastError):
    """The key broker did not do what was asked."""


class RequestError(BrokerError, ValueError):
    """A request that is no request of the protocol: what was wrong, and what was expected."""


class DeniedError(BrokerError):
    """The request is understood and refused.

    Attributes:
        reason: for the operator's log and audit; never sent to a peer.
        correlation: what the peer is told, so that an operator can find the reason.
    """

    def __init__(self, reason: str, correlation: str = "") -> None:
        super().__init__(f"not allowed ({correlation})" if correlation else "not allowed")
        self.reason = reason
        self.correlation = correlation


class LimitedError(BrokerError):
    """Too many requests or failures.

    Attributes:
        retry_after: seconds after which another request can succeed.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UnavailableError(BrokerError):
    """The store or the audit log cannot be read or written: nothing is released until it can."""


class StaleGenerationError(BrokerError):
    """A decision rests on policies, references or keys that have changed since: decide again."""


class ConflictError(BrokerError):
    """What is asked for contradicts what is there, e.g. a name that is taken."""


class UnknownError(BrokerError, LookupError):
    """Administration: there is no such resource, policy, reference value or token."""


class StateError(CsvfastError):
    """A state directory is damaged, in use by another process, not private to the user, or of another version."""


class MissingExtraError(CsvfastError, ImportError):
    """An optional package is not installed; the message holds the pip command."""


class PageFaultError(CsvfastError, LookupError):
    """Page tables give no translation for an access, or do not allow it. What lies on pages before it has been transferred.

    Attributes:
        address: the address that was refused: virtual at the guest's stage, guest physical at the nested one.
        stage: ``"guest"`` or ``"nested"``.
        level: 4 .. 1, the table whose entry refused; 0 = the address is not canonical or too large.
    """

    def __init__(self, message: str, address: int, stage: str, level: int) -> None:
        super().__init__(message)
        self.address: Final = address
        self.stage: Final = stage
        self.level: Final = level


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
