"""A guest that has been verified and appraised, as the broker remembers it.

Two questions, two functions: `verify_guest` finds out whether evidence is genuine, `appraise_guest` whether the appraisal policy
allows what it says. An Attestation keeps what was found out (the document), so that it can be appraised again when policies or
reference values change while a connection or a session lasts.

Thread-safety: immutable objects, functions without state.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from csvfast.attest import Appraisal, ChainCache, Verified, Violation, verify
from csvfast.broker.policy import Decision, appraisal_document

if TYPE_CHECKING:

    from csvfast.broker.grounds import Grounds
    from csvfast.certs import CaCertificate, CertificateStore
    from csvfast.report import Evidence

__all__ = ["APPRAISAL_POLICY", "Attestation", "JudgedAppraisal", "Trust", "appraise_guest", "verify_guest"]

APPRAISAL_POLICY: Final = "default_cpu"
"""Id of the appraisal policy, CoCo's name for the one that judges the CPU."""


@dataclass(frozen=True, slots=True)
class Trust:
    """From where evidence must come.

    roots          trusted root certificates; empty: nothing verifies
    certificates   where HSK and CEK are looked for when evidence comes without them; None: nowhere
    cache          chains verified before
    """

    roots: tuple[CaCertificate, ...]
    certificates: CertificateStore | None = None
    cache: ChainCache = field(default_factory=ChainCache)

    @property
    def blocking(self) -> bool:
        """True when verifying may wait for a disk or a network."""
        return self.certificates is not None


@dataclass(frozen=True, slots=True)
class Attestation:
    """What the broker knows of a guest.

    tee               "csv"
    document          what appraisal policies see; JSON values only
    decision          of the appraisal policy
    policy            {"appraisal": id, "appraisal_version": n, "appraisal_digest": hex}
    evidence_digest   SHA-256 of the evidence as it came, hexadecimal
    key               which key the evidence is bound to: SHA-256 of an SPKI, or a JWK thumbprint, hexadecimal
    runtime           claims that the guest bound into the report beside its key; JSON values
    generation        of the store when it was appraised
    valid_until       seconds since the epoch after which it must be appraised again; None: while nothing changes
    """

    tee: str
    document: Mapping[str, Any] = field(repr=False)
    decision: Decision
    policy: Mapping[str, Any]
    evidence_digest: str
    key: str
    runtime: Mapping[str, Any] = field(repr=False)
    generation: int
    valid_until: float | None
    _claims: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    _subject: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def allowed(self) -> bool:
        """True when the appraisal policy allows the guest."""
        return self.decision.allowed

    def subject(self) -> Mapping[str, str]:
        """Who it is, for audit records."""
        if not self._subject:
            csv = self.document.get("csv", {})
            self._subject.update(
                tee=self.tee,
                chip_id=str(csv.get("serial_number", "")),
                cek=str(self.document.get("cek_fingerprint") or ""),
                measure=str(csv.get("measure", "")),
                vm_id=str(csv.get("vm_id", "")),
                evidence=self.evidence_digest,
                key=self.key,
            )
        return self._subject

    def token_claims(self) -> Mapping[str, Any]:
        """What resource policies see: the claims of an EAR token about this guest, without its times."""
        if not self._claims:
            annotated: dict[str, Any] = {
                "report_data": self.document.get("csv", {}).get("report_data", ""),
                "runtime_data_claims": self.runtime,
                "init_data": self.document.get("init_data_digest") or "",
                "init_data_claims": self.document.get("init_data") or {},
                self.tee: self.document.get("csv", {}),
            }
            self._claims.update(
                tee=self.tee,
                submods={
                    "cpu0": {
                        "ear.status": self.decision.status,
                        "ear.trustworthiness-vector": dict(self.decision.trust),
                        "ear.appraisal-policy-id": self.policy["appraisal"],
                        "ear.veraison.annotated-evidence": annotated,
                    }
                },
            )
        return self._claims

    def to_json(self) -> str:
        """For the session store; nothing in it is secret."""
        return json.dumps(
            {
                "tee": self.tee,
                "document": self.document,
                "decision": self.decision.to_dict(),
                "policy": self.policy,
                "evidence_digest": self.evidence_digest,
                "key": self.key,
                "runtime": self.runtime,
                "generation": self.generation,
                "valid_until": self.valid_until,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Attestation:
        """Reads what `to_json` of this release wrote into our own store."""
        members = json.loads(text)
        members["decision"] = Decision.from_dict(members["decision"])
        return cls(**members)


class JudgedAppraisal(Appraisal):
    """An appraisal by the broker's own policy, with the attestation that came of it."""

    attestation: Attestation


def verify_guest(trust: Trust, evidence: Evidence | bytes, report_data: bytes) -> Verified:
    """Is it genuine, and about `report_data`? Raises what csvfast.attest.verify raises."""
    return verify(evidence, roots=trust.roots, store=trust.certificates, report_data=report_data, cache=trust.cache)


def appraise_guest(
    verified: Verified,
    grounds: Grounds,
    *,
    evidence_digest: str,
    key: str,
    tee: str = "csv",
    custom: Mapping[str, str] | None = None,
    init_data: Mapping[str, Any] | None = None,
    runtime: Mapping[str, Any] | None = None,
    now: float,
) -> Attestation:
    """Is it what the appraisal policy allows? The answer is in `decision`; nothing is raised for a guest that is not allowed.

    In: custom   claims of an attested certificate, bytes as hexadecimal
    """
    document = appraisal_document(verified, tee=tee, custom=custom or {}, init_data=init_data)
    first = Attestation(tee, document, Decision(allowed=False), {}, evidence_digest, key, runtime or {}, -1, None)
    return appraise_again(first, grounds, now)


def appraise_again(attestation: Attestation, grounds: Grounds, now: float) -> Attestation:
    """The same guest judged by what holds now."""
    compiled = grounds.appraisal(APPRAISAL_POLICY)
    decision = compiled.policy.evaluate(attestation.document, grounds.references, now)
    policy = {
        "appraisal": APPRAISAL_POLICY,
        "appraisal_version": compiled.version,
        "appraisal_digest": compiled.policy.digest,
    }
    return replace(
        attestation,
        decision=decision,
        policy=policy,
        generation=grounds.generation,
        valid_until=decision.valid_until,
        _claims={},
        _subject={},
    )


def judged(attestation: Attestation) -> JudgedAppraisal:
    """The attestation as csvfast.attest's Appraisal, which the TLS layer understands."""
    decision = attestation.decision
    violations = () if decision.allowed else (Violation(decision.rule or "", decision.observed or "", decision.expected or ""),)
    result = JudgedAppraisal(violations, decision.checked)
    result.attestation = attestation
    return result


def digest_of(evidence: bytes) -> str:
    """SHA-256 of evidence as it came, hexadecimal."""
    return hashlib.sha256(evidence).hexdigest()
