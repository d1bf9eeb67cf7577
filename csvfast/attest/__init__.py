"""Attestation of CSV guests, for the side that has to decide.

    verify, verify_many, Verified    is it genuine? from a root the caller trusts; Hygon's by default
    ChainCache                       chains verified before
    claims                           what the report says, as trustee's JSON
    appraise, AppraisalPolicy        do I allow what it says? every violation at once

Neither does the other's work: `verify` allows nothing, and `appraise` takes only what `verify` returned.
"""

from __future__ import annotations

from csvfast.attest.appraise import Appraisal, Violation, appraise
from csvfast.attest.cache import ChainCache
from csvfast.attest.claims import claims
from csvfast.attest.policy import AppraisalPolicy
from csvfast.attest.verify import Unchecked, Verified, verify, verify_many

__all__ = [
    "Appraisal",
    "AppraisalPolicy",
    "ChainCache",
    "Unchecked",
    "Verified",
    "Violation",
    "appraise",
    "claims",
    "verify",
    "verify_many",
]
