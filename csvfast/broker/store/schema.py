"""The tables of the broker's database, the same on SQLite and PostgreSQL.

    meta               name -> text: schema version, identity of the store, its audit key
    chain              one row that every writer locks: generation, head of the audit log, seal of the rules
    audit              one row a decision: the canonical text as hashed, and the chain's hash after it
    audit_heads        signed heads, now and then
    wrapping_keys      key-encryption keys, wrapped by the master key
    internal_keys      the broker's own keys (audit, seal of the rules, token issuer), sealed like resources
    resources          sealed versions of resources; what is deleted leaves its row, without key and content
    policies           every version ever put; the highest counts, which may say that the policy is deleted
    reference_values   what is deleted leaves its name, so that a rule that asks for it fails
    sessions           challenges of the KBS protocol and what came of them
    tokens             administrators' tokens: digests, roles, scopes

Times are seconds since the epoch (float) but for `audit` and `chain`, where they are microseconds (integer).
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import BigInteger, Boolean, Column, Double, Index, Integer, LargeBinary, MetaData, Table, Text

__all__ = [
    "SCHEMA_VERSION",
    "audit",
    "audit_heads",
    "chain",
    "internal_keys",
    "meta",
    "metadata",
    "policies",
    "reference_values",
    "resources",
    "sessions",
    "tokens",
    "wrapping_keys",
]

SCHEMA_VERSION: Final = "1"

metadata: Final = MetaData()

# SQLite keeps a table in the order of a column only if that is declared INTEGER, which holds 64 bits there.
_Sequence: Final = BigInteger().with_variant(Integer, "sqlite")

meta: Final = Table(
    "meta", metadata, Column("name", Text, primary_key=True), Column("value", Text, nullable=False)
)

chain: Final = Table(
    "chain",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("generation", BigInteger, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("hash", LargeBinary, nullable=False),
    Column("time", BigInteger, nullable=False),
    Column("signature", LargeBinary, nullable=False),
    Column("headed_sequence", BigInteger, nullable=False),
    Column("headed_time", BigInteger, nullable=False),
    Column("rules_version", BigInteger, nullable=False),
    Column("rules_seal", LargeBinary, nullable=False),
)

audit: Final = Table(
    "audit",
    metadata,
    Column("sequence", _Sequence, primary_key=True, autoincrement=False),
    Column("record", Text, nullable=False),
    Column("hash", LargeBinary, nullable=False),
)

audit_heads: Final = Table(
    "audit_heads",
    metadata,
    Column("sequence", _Sequence, primary_key=True, autoincrement=False),
    Column("hash", LargeBinary, nullable=False),
    Column("time", BigInteger, nullable=False),
    Column("signature", LargeBinary, nullable=False),
)

wrapping_keys: Final = Table(
    "wrapping_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("master", Text, nullable=False),
    Column("created", Double, nullable=False),
    Column("wrapped", LargeBinary, nullable=False),
)

internal_keys: Final = Table(
    "internal_keys",
    metadata,
    Column("name", Text, primary_key=True),
    Column("kek", Text, nullable=False),
    Column("wrapped_key", LargeBinary, nullable=False),
    Column("ciphertext", LargeBinary, nullable=False),
)

resources: Final = Table(
    "resources",
    metadata,
    Column("path", Text, primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("state", Text, nullable=False),
    Column("created", Double, nullable=False),
    Column("changed", Double, nullable=False),
    Column("kek", Text),
    Column("wrapped_key", LargeBinary),
    Column("ciphertext", LargeBinary),
)

policies: Final = Table(
    "policies",
    metadata,
    Column("kind", Text, primary_key=True),
    Column("id", Text, primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("engine", Text, nullable=False),
    Column("text", Text, nullable=False),
    Column("created", Double, nullable=False),
    Column("deleted", Boolean, nullable=False),
)

reference_values: Final = Table(
    "reference_values",
    metadata,
    Column("name", Text, primary_key=True),
    Column("items", Text, nullable=False),
    Column("expires", Double),
    Column("created", Double, nullable=False),
    Column("deleted", Boolean, nullable=False),
)

sessions: Final = Table(
    "sessions",
    metadata,
    Column("id", Text, primary_key=True),
    Column("nonce", Text, nullable=False),
    Column("tee", Text, nullable=False),
    Column("created", Double, nullable=False),
    Column("expires", Double, nullable=False),
    Column("attested", Double),
    Column("record", Text),
    Index("sessions_expires", "expires"),
)

tokens: Final = Table(
    "tokens",
    metadata,
    Column("name", Text, primary_key=True),
    Column("digest", Text, nullable=False, unique=True),
    Column("roles", Text, nullable=False),
    Column("scope", Text, nullable=False),
    Column("created", Double, nullable=False),
    Column("expires", Double),
)
