"""Is it genuine? From a root the caller trusts down to the bytes of a report. What it says is not judged here: see `appraise`.

Steps, in order, and the names a VerificationError carries:

    HRK                the trusted roots: at least one, of the right form, self-signed
    HSK, CEK, PEK      the chip's chain (csvfast.certs.chain); HSK and CEK from the evidence, else from `store`
    report signature   PEK over the report: V1 over the masked bytes, V2 over the plain ones
    report fields      sig_usage PEK, sig_algo SM2; the chip id is readable; strict: reserved areas and padding are zero, rtmr0 is
                       the launch digest
    evidence           the PEK and the serial number beside the report are those inside it
    report data        as expected, when the caller says what
    mnonce             as expected, when the caller says what
    MAC                wherever it can be checked: see below
    event log          V2 with a log: its replay gives rtmr1 .. rtmr4

The MAC covers the PEK, the chip id and the sealing key's field. Clients zero that field before the report leaves the guest, and
then the MAC cannot be recomputed: this is listed under `unchecked`, not refused. A report exactly as the firmware emitted it (raw
or page, still masked) has had nothing removed, so there the MAC must be right even over a zero field. Its key is the report's own
mnonce, which anybody can read: without the caller's mnonce it detects damage, not forgery. The chip id is under the MAC alone,
and whoever asked for the report can make that MAC: which chip it was is told by its CEK, which the chain binds. Unless HSK and
CEK were found in `store` under the chip id, "chip id" is listed under `unchecked`.

The mask of a V1 report is not signed (csvfast.report.layout), so whoever hands the report on chooses it: unless report data or
mnonce were expected, "mask" is listed under `unchecked`, and the fields mean nothing until `measure` has been compared with an
expected value.

Source of the order: confidential-containers/trustee deps/verifier/src/csv/mod.rs; the checks behind the signature that trustee
does not make are this project's. Thread-safety: functions without state; ChainCache has a lock.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from csvfast.attest.cache import ChainCache, KnownChain
from csvfast.certs.chain import USER_IDS, CertificateChain, SignatureCheck, chain_checks, verify_root
from csvfast.certs.layout import CURVE_SM2, CaCertificate, KeyUsage, usage_name
from csvfast.certs.roots import fingerprint, hygon_root
from csvfast.crypto import sm2_verify_many
from csvfast.errors import BufferTypeError, CsvfastError, FormatError, VerificationError
from csvfast.report._input import as_bytes, exactly
from csvfast.report.event_log import EventLog
from csvfast.report.evidence import Evidence, read_evidence
from csvfast.report.layout import REPORT_SIGNATURE_ALGORITHM, REPORT_SIGNER_USAGE, Report
from csvfast.report.request import MNONCE_BYTES, REPORT_DATA_BYTES, REPORT_PAGE

if TYPE_CHECKING:
    from csvfast._core import BytesLike, SM2PublicKey
    from csvfast.certs import CertificateStore
    from csvfast.certs.layout import CsvCertificate

__all__ = ["Unchecked", "Verified", "verify", "verify_many"]

_CHUNK: Final = 4096  # signatures in one call of sm2_verify_many
_AS_EMITTED: Final = ("raw", "page")
_ZERO_PAGE: Final = bytes(REPORT_PAGE)
_SIGNATURE_WORDS: Final = REPORT_SIGNER_USAGE.to_bytes(4, "little") + REPORT_SIGNATURE_ALGORITHM.to_bytes(4, "little")


class Unchecked(NamedTuple):
    """A check that could not be made, and why."""

    name: str
    reason: str


_MAC_ZEROED: Final = Unchecked(
    "MAC", "the field of the sealing key, which it covers, has been zeroed; the chip id is only what the evidence says"
)
_MAC_WITHOUT_NONCE: Final = Unchecked("mnonce", "none was given: the MAC shows that nothing is damaged, not that it is fresh")
_MASK: Final = Unchecked(
    "mask", "a report V1 does not sign it: its fields are the guest's only once report data, mnonce or measure are as expected"
)
_CHIP_ID: Final = Unchecked(
    "chip id", "no signature covers it, and the certificates were not looked up by it: the CEK says which chip it was"
)
_TOLERANT: Final = Unchecked("strict rules", "not asked for: the signatures decided alone")
_PARTIAL: Final = tuple(
    Unchecked(name, "no HSK and CEK certificates: nothing shows that a chip made this PEK") for name in ("HSK", "CEK", "PEK")
)


class Verified:
    """What `verify` returns: evidence that is genuine as far as `checks` says. Made by `verify` and `verify_many` only.

    evidence   what was verified; report: its report
    chain      HSK, CEK and PEK; None when the evidence was verified without HSK and CEK (allow_partial)
    root       the trusted root the chain hangs from; None like the chain
    checks     names of the checks made, in order
    unchecked  checks that could not be made, with the reason
    complete   True when every signature from the root to the report was verified
    """

    __slots__ = ("chain", "checks", "evidence", "report", "root", "unchecked")
    evidence: Final[Evidence]
    report: Final[Report]
    chain: Final[CertificateChain | None]
    root: Final[CaCertificate | None]
    checks: Final[tuple[str, ...]]
    unchecked: Final[tuple[Unchecked, ...]]

    def __init__(
        self,
        evidence: Evidence,
        chain: CertificateChain | None,
        root: CaCertificate | None,
        checks: tuple[str, ...],
        unchecked: tuple[Unchecked, ...],
    ) -> None:
        self.evidence = evidence
        self.report = evidence.report
        self.chain = chain
        self.root = root
        self.checks = checks
        self.unchecked = unchecked

    @property
    def complete(self) -> bool:
        """True when every signature from the root to the report was verified."""
        return self.chain is not None

    @property
    def root_fingerprint(self) -> str | None:
        """SM3 of the root certificate, hexadecimal; None when the chain does not reach a root."""
        return None if self.root is None else fingerprint(self.root)

    def __repr__(self) -> str:
        state = "complete" if self.complete else "PARTIAL: no chain to a root"
        return f"<Verified {self.report!r}, {state}>"


class _Expected(NamedTuple):
    """What the caller asked for, checked once."""

    roots: tuple[CaCertificate, ...]
    store: CertificateStore | None
    report_data: bytes | None
    mnonce: bytes | None
    strict: bool
    allow_partial: bool
    cache: ChainCache | None


class _Pending(NamedTuple):
    """Evidence whose signatures are still to be checked."""

    evidence: Evidence
    known: KnownChain | None  # None: partial
    is_new: bool  # `known` becomes known only when its signatures hold
    cache_key: tuple[object, ...]
    checks: list[SignatureCheck]
    chip_id_is_bound: bool


def verify(
    evidence: Evidence | BytesLike,
    *,
    roots: Sequence[CaCertificate] | None = None,
    store: CertificateStore | None = None,
    report_data: BytesLike | None = None,
    mnonce: BytesLike | None = None,
    strict: bool = True,
    allow_partial: bool = False,
    cache: ChainCache | None = None,
) -> Verified:
    """Verifies one piece of evidence.

    In: evidence       parsed, or bytes in any encoding `read_evidence` knows
        roots          trusted root certificates; None = Hygon's alone, which no simulated chip hangs from. Empty: refused
        store          where HSK and CEK are looked for when the evidence has none; nothing is asked by default
        report_data    expected; zero-padded on the right, cut after 64 bytes, as trustee does
        mnonce         expected, 16 bytes; for whoever made the request
        strict         all rules of csvfast.certs.chain and of this module; False: the signatures decide, as with csv-rs
        allow_partial  evidence whose HSK and CEK are nowhere to be found is verified from its PEK on, which proves NOTHING about
                       the chip: anybody can make a PEK. Otherwise that is refused
        cache          chains verified before
    Raises VerificationError with the step's name; FormatError when `evidence` is bytes of no known encoding; LengthError for an
    mnonce of another length; whatever the store raises. Thread-safe.
    """
    expected = _expected(roots, store, report_data, mnonce, strict, allow_partial, cache)
    pending = _prepare(_read(evidence), expected)
    _run(pending.checks)
    return _finish(pending, expected)


def verify_many(
    evidence: Iterable[Evidence | BytesLike],
    *,
    roots: Sequence[CaCertificate] | None = None,
    store: CertificateStore | None = None,
    strict: bool = True,
    allow_partial: bool = False,
    cache: ChainCache | None = None,
) -> list[Verified | CsvfastError]:
    """Verifies many at once: signatures side by side in vector lanes, each chain once.

    Out: in the order of `evidence`, for each what `verify` returns or the exception of csvfast it would raise
    Arguments as for `verify`; an empty root set raises here. Without a cache one lives as long as the call.
    """
    expected = _expected(roots, store, None, None, strict, allow_partial, ChainCache() if cache is None else cache)
    results: list[Verified | CsvfastError] = []
    batch: list[_Pending | CsvfastError] = []
    known: dict[tuple[object, ...], KnownChain] = {}
    count = 0
    for item in evidence:
        try:
            pending = _prepare(_read(item), expected, known)
        except CsvfastError as error:
            batch.append(error)
        else:
            batch.append(pending)
            count += len(pending.checks)
        if count >= _CHUNK or len(batch) >= _CHUNK:
            results += _settle(batch, expected)
            batch, count = [], 0
            known.clear()
    return results + _settle(batch, expected)


def _expected(
    roots: Sequence[CaCertificate] | None,
    store: CertificateStore | None,
    report_data: BytesLike | None,
    mnonce: BytesLike | None,
    strict: bool,
    allow_partial: bool,
    cache: ChainCache | None,
) -> _Expected:
    trusted = (hygon_root(),) if roots is None else tuple(roots)
    if not trusted:
        raise VerificationError("HRK", "no trusted root was given, so nothing can be genuine")
    for root in trusted:
        if not isinstance(root, CaCertificate):
            raise BufferTypeError(f"roots: {type(root).__name__}; expected CaCertificate objects")
    data = None
    if report_data is not None:
        data = as_bytes(report_data, "report_data")[:REPORT_DATA_BYTES].ljust(REPORT_DATA_BYTES, b"\0")
    nonce = None if mnonce is None else exactly("mnonce", mnonce, MNONCE_BYTES)
    return _Expected(trusted, store, data, nonce, strict, allow_partial, cache)


def _read(evidence: Evidence | BytesLike) -> Evidence:
    return evidence if isinstance(evidence, Evidence) else read_evidence(evidence)


# Before the signatures: certificates are read, rules checked, signatures collected.


def _prepare(
    evidence: Evidence, expected: _Expected, known_here: dict[tuple[object, ...], KnownChain] | None = None
) -> _Pending:
    hsk_cek = evidence.hsk_cek
    if hsk_cek is None:
        hsk_cek = _from_store(evidence, expected.store)
    pek_bytes = evidence.report.pek_bytes if evidence.pek_beside is None else evidence.pek_beside
    if hsk_cek is None:
        return _prepare_partial(evidence, expected)
    key = (expected.strict, expected.roots, hsk_cek, pek_bytes)
    known = expected.cache.find(key) if expected.cache is not None else None
    is_new = False
    checks: list[SignatureCheck] = []
    if known is None and known_here is not None and (known := known_here.get(key)) is not None:
        is_new = True
        known.count_use()
    if known is None:
        with_chain = evidence if evidence.hsk_cek is not None else evidence.with_certificates(hsk_cek)
        chain = _read_chain(with_chain)
        root, checks = chain_checks(chain, expected.roots, strict=expected.strict)
        known, is_new = KnownChain(chain, root), True
    assert known.chain.pek is not None
    checks.append(_report_check(evidence.report, known.chain.pek))
    if known_here is not None and len(checks) > 1:
        # Only now: had the report's check raised, the chain's would be lost and nobody may rely on them.
        known_here[key] = known
    return _Pending(evidence, known, is_new, key, checks, evidence.hsk_cek is None)


def _from_store(evidence: Evidence, store: CertificateStore | None) -> bytes | None:
    if store is None:
        return None
    try:
        chip_id = evidence.serial_number
    except FormatError as error:
        raise VerificationError("report fields", str(error)) from None
    try:
        pek = evidence.pek
    except FormatError:
        pek = None  # the chain will say so; files named after the chip can still be found
    found = store.find(chip_id, pek=pek)
    return None if found is None else found[0].encoded + found[1].encoded


def _prepare_partial(evidence: Evidence, expected: _Expected) -> _Pending:
    if not expected.allow_partial:
        where = "in the evidence" if expected.store is None else "in the evidence and in the store"
        raise VerificationError("HSK", f"chain incomplete: no HSK and CEK certificates {where}, so nothing leads to a root")
    for root in expected.roots:
        verify_root(root, strict=expected.strict)
    try:
        pek = evidence.pek
        pek.public_key  # noqa: B018 - reads the point
    except FormatError as error:
        raise VerificationError("PEK", str(error)) from None
    if pek.usage != KeyUsage.PEK or pek.curve_id != CURVE_SM2:
        raise VerificationError("PEK", f"usage {usage_name(pek.usage)}, curve {pek.curve_id}; expected PEK, {CURVE_SM2} (SM2)")
    if expected.strict and pek.user_id != USER_IDS[KeyUsage.PEK]:
        raise VerificationError("PEK", f"user id {pek.user_id!r}; expected {USER_IDS[KeyUsage.PEK]!r}")
    return _Pending(evidence, None, False, (), [_report_check(evidence.report, pek)], False)


def _read_chain(evidence: Evidence) -> CertificateChain:
    step = "HSK"
    try:
        hsk = evidence.hsk
        step = "CEK"
        cek = evidence.cek
        step = "PEK"
        pek = evidence.pek
    except FormatError as error:
        raise VerificationError(step, str(error)) from None
    assert hsk is not None
    assert cek is not None
    return CertificateChain(hsk, cek, pek)


def _report_check(report: Report, pek: CsvCertificate) -> SignatureCheck:
    try:
        signature = report.signature
    except FormatError as error:
        raise VerificationError("report signature", str(error)) from None
    return SignatureCheck("report signature", "the PEK", pek.public_key, pek.user_id, report.signed_bytes, (signature,))


# The signatures.


def _run(checks: list[SignatureCheck]) -> None:
    if len(checks) == 1:  # the chain is known: its PEK has a table, and lanes gain nothing
        checks[0].run()
        return
    batch = _Batch()
    for check in checks:
        batch.add(check)
    for check, valid in zip(checks, batch.run(), strict=True):
        if not valid:
            raise check.failure()


class _Batch:
    """Signature checks side by side: even the four of one chain cost half of what they do one after the other."""

    def __init__(self) -> None:
        self.keys: list[SM2PublicKey] = []
        self.signatures: list[bytes] = []
        self.digests: list[bytes] = []
        self.ends: list[int] = []

    def add(self, check: SignatureCheck) -> None:
        digest = check.key.digest(check.message, user_id=check.user_id)
        for signature in check.signatures:
            self.keys.append(check.key)
            self.signatures.append(signature)
            self.digests.append(digest)
        self.ends.append(len(self.keys))

    def run(self) -> list[bool]:
        """For each check added whether any of its signatures is valid."""
        valid = sm2_verify_many(self.keys, self.signatures, self.digests) if self.keys else []
        starts = [0, *self.ends]
        return [any(valid[start:end]) for start, end in zip(starts, self.ends, strict=False)]


def _settle(batch: list[_Pending | CsvfastError], expected: _Expected) -> list[Verified | CsvfastError]:
    signatures = _Batch()
    for item in batch:
        if isinstance(item, _Pending):
            for check in item.checks:
                signatures.add(check)
    valid = iter(signatures.run())
    failures: dict[KnownChain, VerificationError] = {}  # a chain stands in the batch once, its failure is that of all its reports
    return [_settled(item, valid, failures, expected) if isinstance(item, _Pending) else item for item in batch]


def _settled(
    pending: _Pending, valid: Iterator[bool], failures: dict[KnownChain, VerificationError], expected: _Expected
) -> Verified | CsvfastError:
    wrong = [check for check in pending.checks if not next(valid)]
    if wrong:
        error = wrong[0].failure()
        if pending.known is not None and wrong[0].step != "report signature":
            failures[pending.known] = error
        return error
    if pending.known is not None and pending.known in failures:
        failed = failures[pending.known]
        return VerificationError(failed.step, "the chain of this report, which others in the batch share, is not valid")
    try:
        return _finish(pending, expected)
    except VerificationError as error:
        return error


# After the signatures.


def _finish(pending: _Pending, expected: _Expected) -> Verified:
    evidence, known = pending.evidence, pending.known
    report = evidence.report
    if known is not None and pending.is_new and expected.cache is not None:
        expected.cache.add(pending.cache_key, known)
    unchecked: list[Unchecked] = []
    if known is None:
        checks = ["HRK", "report signature"]
        unchecked += _PARTIAL
    else:
        checks = ["HRK", "HSK", "CEK", "PEK", "report signature"]
    _check_fields(report, expected.strict)
    checks.append("report fields")
    if not expected.strict:
        unchecked.append(_TOLERANT)
    if evidence.pek_beside is not None and evidence.pek_beside != report.pek_bytes:
        raise VerificationError("evidence", "the PEK certificate beside the report is not the one inside it")
    if evidence.serial_beside is not None and evidence.serial_beside != report.serial_number:
        raise VerificationError("evidence", "the serial number beside the report is not the one inside it")
    if evidence.pek_beside is not None or evidence.serial_beside is not None:
        checks.append("evidence")
    if expected.report_data is not None:
        _check_value("report data", report.report_data, expected.report_data)
        checks.append("report data")
    if expected.mnonce is not None:
        _check_value("mnonce", report.mnonce, expected.mnonce)
        checks.append("mnonce")
    if report.version == 1 and expected.report_data is None and expected.mnonce is None:
        unchecked.append(_MASK)
    _check_mac(evidence, expected.mnonce, checks, unchecked)
    if not pending.chip_id_is_bound:
        unchecked.append(_CHIP_ID)
    _check_event_log(evidence, checks, unchecked)
    chain, root = (None, None) if known is None else (known.chain, known.root)
    return Verified(evidence, chain, root, tuple(checks), tuple(unchecked))


def _check_fields(report: Report, strict: bool) -> None:
    if report.info[-8:] != _SIGNATURE_WORDS:
        raise VerificationError(
            "report fields",
            f"sig_usage {report.sig_usage:#x}, sig_algo {report.sig_algo:#x}; expected {REPORT_SIGNER_USAGE:#x} (PEK) "
            f"and {REPORT_SIGNATURE_ALGORITHM} (SM2)",
        )
    try:
        report.chip_id  # noqa: B018 - reads the field
    except FormatError as error:
        raise VerificationError("report fields", str(error)) from None
    if not strict:
        return
    if report.version == 2:
        if report.rtmrs[0] != report.measure:
            raise VerificationError("report fields", "rtmr0 is not the launch digest")
        if not _ZERO_PAGE.startswith(report.reserved0) or not _ZERO_PAGE.startswith(report.reserved1):
            raise VerificationError("report fields", "reserved areas hold bytes other than zero")
    if not _ZERO_PAGE.startswith(report.padding):
        raise VerificationError("report fields", "the page holds bytes other than zero behind the report")


def _check_value(step: str, found: bytes, wanted: bytes) -> None:
    if not hmac.compare_digest(found, wanted):
        raise VerificationError(step, f"{found.hex()}; expected {wanted.hex()}")


def _check_mac(evidence: Evidence, mnonce: bytes | None, checks: list[str], unchecked: list[Unchecked]) -> None:
    report = evidence.report
    as_emitted = evidence.encoding in _AS_EMITTED and report.pek_is_masked
    if not as_emitted and not report.sealing_key_is_present:
        unchecked.append(_MAC_ZEROED)
        return
    if not report.mac_is_valid():
        raise VerificationError("MAC", "the MAC over PEK, serial number and reserved field is not valid")
    checks.append("MAC")
    if mnonce is None:
        unchecked.append(_MAC_WITHOUT_NONCE)


def _check_event_log(evidence: Evidence, checks: list[str], unchecked: list[Unchecked]) -> None:
    if evidence.event_log is None:
        return
    if evidence.report.version == 1:
        unchecked.append(Unchecked("event log", "a report V1 has no registers to compare it with"))
        return
    try:
        registers = EventLog.parse(evidence.event_log).replay()
    except FormatError as error:
        raise VerificationError("event log", str(error)) from None
    if not registers.keys() <= {1, 2, 3, 4}:
        raise VerificationError("event log", f"events for registers {sorted(registers)}; reports vouch for 1 to 4 only")
    for index in range(1, 5):
        found, reported = registers.get(index, bytes(32)), evidence.report.rtmrs[index]
        if found != reported:
            raise VerificationError("event log", f"register {index} replays to {found.hex()}; the report says {reported.hex()}")
    checks.append("event log")
