"""What policies see: of a verified report, and of a request for a resource. JSON values only, nothing secret.

An appraisal policy sees

    tee                "csv"
    bound              the report is about this exchange: its report data or mnonce was compared with what was expected. A V1
                       report does not sign its mask, so without that its fields mean nothing (csvfast.attest.verify)
    chain_complete     every signature from a trusted root to the report was verified
    report_version     1 or 2
    measure            launch digest, hexadecimal
    report_data        64 bytes, hexadecimal
    policy             the guest policy's fields: nodbg, noks, es, nosend, domain, csv, csv3, asid_reuse (0 or 1), hsk_version,
                       cek_version, api_major, api_minor
    policy_word        the same as one integer
    firmware_api       "major.minor" of the firmware, from the PEK certificate, which the CEK signs
    build              firmware build; null in V1, which does not say
    cek_fingerprint    SM3 of the chip's CEK certificate, hexadecimal: which chip it is; null without a chain
    root_fingerprint   SM3 of the root certificate; null without a chain
    mac                whether the MAC over PEK and chip id was verified
    event_log          whether an event log was replayed to the report's registers
    checks             names of the checks that verifying made
    csv                trustee's claims (csvfast.attest.claims)
    custom             claims of the guest's attested certificate, bytes as hexadecimal
    init_data          what the guest says its init data is; nothing in a CSV report vouches for it. null without
    init_data_digest   its member "digest"; null without

and a resource policy

    plugin             "resource"
    resource           "repository/type/tag"
    resource_path      the same as a list
    query              of the request
    tee                of the token or attestation; when it does not say, the one whose evidence is annotated
    status             ear.status of every submodule: that one when they agree, else the worst
    trust              trustworthiness vector of cpu0
    appraisal_policy   its id
    csv                annotated evidence of cpu0 about the tee, under its name
    claims             all claims, as the token has them

Thread-safety: functions without state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from csvfast.attest import Verified, claims
from csvfast.crypto import sm3
from csvfast.errors import BufferTypeError

__all__ = ["appraisal_document", "resource_document"]

# A submodule that asserts nothing is worse than one that is affirmed: "affirming" must mean all of them.
_STATUSES: Final = ("affirming", "none", "warning", "contraindicated")
_RANKS: Final = {status: rank for rank, status in enumerate(_STATUSES)}
_EMPTY: Final[Mapping[str, Any]] = {}
_EVIDENCE: Final = "ear.veraison.annotated-evidence"
_NO_TEE: Final = frozenset(("runtime_data_claims", "init_data_claims"))
_BINDING: Final = frozenset(("report data", "mnonce"))


def appraisal_document(
    verified: Verified,
    *,
    tee: str = "csv",
    custom: Mapping[str, str] | None = None,
    init_data: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The document about a verified report; the module lists its members.

    In: custom      claims of the attested certificate, bytes as hexadecimal
        init_data   JSON values; its member "digest" stands in the document by itself as well
    BufferTypeError when `verified` is anything else: what has not been verified cannot be appraised.
    """
    if not isinstance(verified, Verified):
        raise BufferTypeError(f"appraisal_document: expected what verify() returned, found {type(verified).__name__}")
    report, checks = verified.report, verified.checks
    said = claims(verified)
    pek = verified.evidence.pek
    return {
        "tee": tee,
        "bound": not _BINDING.isdisjoint(checks),
        "chain_complete": verified.complete,
        "report_version": report.version,
        "measure": said["measure"],
        "report_data": said["report_data"],
        "policy": said["policy"],
        "policy_word": report.policy.value,
        "firmware_api": f"{pek.api_major}.{pek.api_minor}",
        "build": report.build,
        "cek_fingerprint": None if verified.chain is None else _fingerprint(verified.chain.cek.encoded),
        "root_fingerprint": verified.root_fingerprint,
        "mac": "MAC" in checks,
        "event_log": "event log" in checks,
        "checks": list(checks),
        "csv": said,
        "custom": dict(custom or {}),
        "init_data": None if init_data is None else dict(init_data),
        "init_data_digest": None if init_data is None else init_data.get("digest"),
    }


@lru_cache(maxsize=4096)
def _fingerprint(encoded: bytes) -> str:
    return sm3(encoded).hexdigest()


def resource_document(
    path: Sequence[str], plugin: str, query: Mapping[str, str], token_claims: Mapping[str, Any]
) -> dict[str, Any]:
    """The document about a request for a resource; the module lists its members. Whatever the claims are, it is made.

    In: path           segments, e.g. a ResourcePath
        token_claims   of an EAR token, or Attestation.token_claims()
    """
    submodules = _mapping(token_claims.get("submods"))
    cpu = _mapping(submodules.get("cpu0"))
    evidence = _mapping(cpu.get(_EVIDENCE))
    tee = token_claims.get("tee")
    if tee is None:
        tee = _annotated_tee(evidence)
    document: dict[str, Any] = {
        "plugin": plugin,
        "resource": "/".join(path),
        "resource_path": list(path),
        "query": dict(query),
        "tee": tee,
        "status": cpu.get("ear.status") if len(submodules) == 1 else _worst(submodules),
        "trust": cpu.get("ear.trustworthiness-vector"),
        "appraisal_policy": cpu.get("ear.appraisal-policy-id"),
        "claims": token_claims,
    }
    if type(tee) is str and tee not in document:
        document[tee] = evidence.get(tee)
    return document


def _annotated_tee(evidence: Mapping[str, Any]) -> str | None:
    names = [name for name, value in evidence.items() if isinstance(value, Mapping) and name not in _NO_TEE]
    return names[0] if len(names) == 1 else None


def _worst(submodules: Mapping[str, Any]) -> str | None:
    """One submodule that is not affirming makes all of them what it is; what nobody knows is worse than anything."""
    ranks = [_RANKS.get(str(_mapping(one).get("ear.status"))) for one in submodules.values()]
    known = [rank for rank in ranks if rank is not None]
    return _STATUSES[max(known)] if known and len(known) == len(ranks) else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else _EMPTY
