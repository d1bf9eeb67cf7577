"""Do I allow it? Compares what a verified report says with a policy and reports every violation, not just the first.

Whether the report is genuine was for `verify` to find out: only its result is taken. Thread-safety: functions without state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from csvfast.attest.verify import Verified
from csvfast.crypto import sm3
from csvfast.errors import AppraisalError, BufferTypeError
from csvfast.report._input import exactly
from csvfast.report.request import MNONCE_BYTES, pad_report_data

if TYPE_CHECKING:
    from csvfast._core import BytesLike
    from csvfast.attest.policy import AppraisalPolicy

__all__ = ["Appraisal", "Violation", "appraise"]


class Violation(NamedTuple):
    """One thing the policy does not allow: which, what was observed, what it expects (both as text)."""

    name: str
    observed: str
    expected: str

    def __str__(self) -> str:
        return f"{self.name}: {self.observed}; expected {self.expected}"


class Appraisal(NamedTuple):
    """The outcome: `violations`, empty when everything is allowed, and the names of what was looked at."""

    violations: tuple[Violation, ...]
    checked: tuple[str, ...]

    @property
    def allowed(self) -> bool:
        """True when there is no violation."""
        return not self.violations

    def require(self) -> None:
        """AppraisalError with every violation, unless there is none."""
        if self.violations:
            raise AppraisalError([str(violation) for violation in self.violations])

    def to_dict(self) -> dict[str, Any]:
        """For JSON: allowed, checked, violations."""
        return {
            "allowed": self.allowed,
            "checked": list(self.checked),
            "violations": [violation._asdict() for violation in self.violations],
        }


def appraise(
    verified: Verified,
    policy: AppraisalPolicy,
    *,
    report_data: BytesLike | None = None,
    mnonce: BytesLike | None = None,
) -> Appraisal:
    """Appraises what `verify` returned.

    In: policy        what is allowed
        report_data   expected in this one exchange, at most 64 bytes, besides what the policy says; LengthError when longer
        mnonce        the same, 16 bytes
    BufferTypeError when `verified` is anything else: a report that has not been verified cannot be appraised.
    """
    if not isinstance(verified, Verified):
        raise BufferTypeError(f"appraise: expected what verify() returned, found {type(verified).__name__}")
    checked: list[str] = []
    violations: list[Violation] = []
    wanted_data = None if report_data is None else pad_report_data(report_data)
    wanted_nonce = None if mnonce is None else exactly("mnonce", mnonce, MNONCE_BYTES)
    for name, holds, observed, expected in _comparisons(verified, policy, wanted_data, wanted_nonce):
        if name not in checked:
            checked.append(name)
        if not holds:
            violations.append(Violation(name, observed, expected))
    return Appraisal(tuple(violations), tuple(checked))


_Comparison = tuple[str, bool, str, str]
_MASKED: Final = (
    *("vm_ids", "vm_versions", "policy_required", "policy_forbidden", "policy_exact"),
    *("minimum_policy_api", "minimum_policy_hsk_version", "minimum_policy_cek_version"),
)


def _comparisons(
    verified: Verified, policy: AppraisalPolicy, report_data: bytes | None, mnonce: bytes | None
) -> Iterator[_Comparison]:
    report, guest = verified.report, verified.report.policy
    if not policy.allow_partial:
        unchecked = ", ".join(one.name for one in verified.unchecked if one.name in ("HSK", "CEK", "PEK"))
        observed = "complete" if verified.complete else f"not verified: {unchecked}"
        yield "chain", verified.complete, observed, "every signature from a trusted root to the report"
    yield from _one_of("measure", report.measure, policy.measurements)
    if policy.report_versions:
        expected = " or ".join(map(str, policy.report_versions))
        yield "report version", report.version in policy.report_versions, str(report.version), expected
    if policy.chip_ids:
        yield "chip id", report.chip_id in policy.chip_ids, report.chip_id, " or ".join(policy.chip_ids)
    if policy.cek_fingerprints:
        if verified.chain is None:
            expected = " or ".join(value.hex() for value in policy.cek_fingerprints)
            yield "CEK fingerprint", False, "no CEK certificate", expected
        else:
            yield from _one_of("CEK fingerprint", sm3(verified.chain.cek.encoded).digest(), policy.cek_fingerprints)
    masked = _masked_members(policy)
    if report.version == 1 and masked and not _mask_is_bound(verified, policy, report_data, mnonce):
        observed = f"chosen by whoever handed the report on, and with it {', '.join(masked)}"
        expected = "measurements, report_data or mnonce to compare: a report V1 does not sign its mask"
        yield "mask", False, observed, expected
    yield from _one_of("vm_id", report.vm_id, policy.vm_ids)
    yield from _one_of("vm_version", report.vm_version, policy.vm_versions)
    yield from _one_of("user_pubkey_digest", report.user_pubkey_digest, policy.user_pubkey_digests)
    for data in (policy.report_data, report_data):
        yield from _one_of("report_data", report.report_data, () if data is None else (data,))
    for nonce in (policy.mnonce, mnonce):
        yield from _one_of("mnonce", report.mnonce, () if nonce is None else (nonce,))
    for name in policy.policy_required:
        yield f"policy {name}", name in guest.flags, "clear" if name not in guest.flags else "set", "set"
    for name in policy.policy_forbidden:
        yield f"policy {name}", name not in guest.flags, "clear" if name not in guest.flags else "set", "clear"
    if policy.policy_exact:
        expected = " or ".join(f"{word:#010x}" for word in policy.policy_exact)
        yield "policy", guest.value in policy.policy_exact, f"{guest.value:#010x}", expected
    yield from _versions(verified, policy)
    for index, values in sorted(policy.rtmrs.items()):
        if report.version == 1:
            yield f"rtmr{index}", False, "none: the report is V1", " or ".join(value.hex() for value in values)
        else:
            yield from _one_of(f"rtmr{index}", report.rtmrs[index], values)
    if policy.require_event_log:
        held = "event log" in verified.checks
        yield "event log", held, "replayed" if held else "none that was replayed", "a log that replays to the report's registers"
    if policy.require_mac:
        held = "MAC" in verified.checks and "mnonce" in verified.checks
        yield "MAC", held, "verified" if held else "not verified with an expected mnonce", "a MAC keyed with the request's mnonce"


def _masked_members(policy: AppraisalPolicy) -> list[str]:
    """Members of the policy that look at masked fields and that one choice of the mask can satisfy."""
    return [name for name in _MASKED if getattr(policy, name) not in (None, ())]


def _mask_is_bound(verified: Verified, policy: AppraisalPolicy, report_data: bytes | None, mnonce: bytes | None) -> bool:
    # Under another mask each of these would have to be off by the same 4 bytes repeated: two digests never are, and of report
    # data and mnonce there is one expected value. vm ids and versions are short lists somebody made up.
    if policy.measurements or policy.user_pubkey_digests:
        return True
    values = (policy.report_data, policy.mnonce, report_data, mnonce)
    return any(value is not None for value in values) or not {"report data", "mnonce"}.isdisjoint(verified.checks)


def _versions(verified: Verified, policy: AppraisalPolicy) -> Iterator[_Comparison]:
    report, guest = verified.report, verified.report.policy
    if policy.minimum_api is not None:
        pek = verified.evidence.pek
        api = (pek.api_major, pek.api_minor)
        yield "firmware API", api >= policy.minimum_api, _dotted(api), f"at least {_dotted(policy.minimum_api)}"
    if policy.minimum_build is not None:
        build = report.build
        observed = "unknown: a V1 report does not say" if build is None else str(build)
        yield "build", build is not None and build >= policy.minimum_build, observed, f"at least {policy.minimum_build}"
    if policy.minimum_policy_api is not None:
        api = (guest.api_major, guest.api_minor)
        yield "policy api", api >= policy.minimum_policy_api, _dotted(api), f"at least {_dotted(policy.minimum_policy_api)}"
    for name, version, minimum in (
        ("policy hsk_version", guest.hsk_version, policy.minimum_policy_hsk_version),
        ("policy cek_version", guest.cek_version, policy.minimum_policy_cek_version),
    ):
        if minimum is not None:
            yield name, version >= minimum, str(version), f"at least {minimum}"


def _one_of(name: str, found: bytes, allowed: Sequence[bytes]) -> Iterator[_Comparison]:
    if allowed:
        yield name, found in allowed, found.hex(), " or ".join(value.hex() for value in allowed)


def _dotted(api: tuple[int, int]) -> str:
    return f"{api[0]}.{api[1]}"
