"""Policies of the key broker: which guests are allowed (appraisal), and which of them may have what (resource).

    rules      TOML rules, the engine that is always there
    rego       policies in Rego, as CoCo and Verdictd have them, in a process of their own
    documents  what policies see
    references registered measurements, chips and versions, which expire
    defaults   the policies that csvfast ships
"""

from __future__ import annotations

from csvfast.broker.policy.base import Policy
from csvfast.broker.policy.compiler import compile_policy, dry_run
from csvfast.broker.policy.decision import Decision
from csvfast.broker.policy.defaults import default_policies
from csvfast.broker.policy.documents import appraisal_document, resource_document
from csvfast.broker.policy.references import Reference, References

__all__ = [
    "Decision",
    "Policy",
    "Reference",
    "References",
    "appraisal_document",
    "compile_policy",
    "default_policies",
    "dry_run",
    "resource_document",
]
