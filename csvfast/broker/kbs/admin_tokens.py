"""JSON Web Tokens of administrators: signed by keys that the broker was told, with a role.

CoCo's `kbs-client` sends such a token. It says {"role": ..., "exp": ...}; which of csvfast's roles that means, and over which
resources, is a matter of the configuration. A key without `role_names` gives its roles to every token it signs.

Source: RFC 7519, RFC 8037 (EdDSA); confidential-containers/trustee kbs/src/admin/token_verifier/bearer_jwt.rs.
Thread-safety: immutable objects.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from joserfc import jws
from joserfc.errors import JoseError, UnsupportedAlgorithmError
from joserfc.jwk import ECKey, OKPKey

from csvfast.broker.administration import ROLES, Administrator
from csvfast.broker.json_input import loads
from csvfast.errors import ArgumentError, RequestError

__all__ = ["AdministratorKey", "AdministratorTokens"]

_TOKEN_LIMIT: Final = 16 << 10
_SKEW: Final = 60.0
_LONGEST: Final = 24 * 3600.0
"""Seconds from `iat` to `exp` that a token may be good for: these cannot be revoked one by one."""


class _Registry(jws.JWSRegistry):
    max_header_length = 4096
    max_payload_length = _TOKEN_LIMIT

    def get_alg(self, name: str) -> Any:
        """One of ours. joserfc would warn that EdDSA is deprecated; CoCo's client has no other."""
        if name not in _ALGORITHMS or name not in self.algorithms:
            raise UnsupportedAlgorithmError(name)
        return self.algorithms[name]


_ALGORITHMS: Final = {"ES256": "ES256", "EdDSA": "Ed25519", "Ed25519": "Ed25519"}  # of the token -> of the key (RFC 9864)
_REGISTRY: Final = _Registry(algorithms=list(_ALGORITHMS), strict_check_header=False)


@dataclass(frozen=True)
class AdministratorKey:
    """A public key whose tokens are believed.

    name         for records; the token's `sub` is added
    pem          public key in PEM: Ed25519 (EdDSA) or P-256 (ES256)
    roles        at most these are given: "keys", "policy", "audit"
    scope        glob over resource paths
    role_names   the token's `role` -> roles; None: `roles`, whatever the token says
    issuer       the token's `iss` must be this; None: anything
    audience     the token's `aud` must be or contain this; None: anything
    """

    name: str
    pem: bytes = field(repr=False)
    roles: frozenset[str]
    scope: str = "*"
    role_names: Mapping[str, frozenset[str]] | None = None
    issuer: str | None = None
    audience: str | None = None

    def __post_init__(self) -> None:
        for roles in (self.roles, *(self.role_names or {}).values()):
            if not roles or not roles <= ROLES:
                raise ArgumentError(f"administrator's key {self.name}: expected roles out of {', '.join(sorted(ROLES))}")

    def load(self) -> tuple[ECKey | OKPKey, str]:
        """The key and its algorithm. ArgumentError."""
        try:
            key = load_pem_public_key(self.pem)
        except (ValueError, UnsupportedAlgorithm):
            raise ArgumentError(f"administrator's key {self.name}: no public key in PEM") from None
        if isinstance(key, ed25519.Ed25519PublicKey):
            return OKPKey.import_key(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)), "Ed25519"
        if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
            return ECKey.import_key(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)), "ES256"
        raise ArgumentError(f"administrator's key {self.name}: expected Ed25519 or P-256")


class AdministratorTokens:
    """Verifies tokens against configured keys."""

    def __init__(self, keys: Sequence[AdministratorKey], *, clock: Callable[[], float] = time.time) -> None:
        self._keys = [(key, *key.load()) for key in keys]
        self._clock = clock

    def find(self, token: str, address: str, door: str) -> Administrator | None:
        """The administrator behind a token; None when no key's token it is, or it is not valid now."""
        if len(token) > _TOKEN_LIMIT or token.count(".") != 2 or not token.isascii():
            return None
        for key, public, algorithm in self._keys:
            try:
                found = jws.deserialize_compact(token, public, registry=_REGISTRY)
                if _ALGORITHMS.get(str(found.headers().get("alg"))) != algorithm or "crit" in found.headers():
                    continue
                claims = loads(found.payload, "administrator's token", limit=_TOKEN_LIMIT)
            except (JoseError, RequestError, ValueError):
                continue
            roles = self._roles(key, claims)
            if roles:
                subject = claims.get("sub")
                name = f"{key.name}:{ascii(subject)[1:-1][:64]}" if type(subject) is str else key.name
                return Administrator(name, roles, key.scope, address, door)
        return None

    def _roles(self, key: AdministratorKey, claims: Any) -> frozenset[str]:
        nobody: frozenset[str] = frozenset()
        if type(claims) is not dict or not self._is_current(claims):
            return nobody
        if key.issuer is not None and claims.get("iss") != key.issuer:
            return nobody
        audience = claims.get("aud")
        if key.audience is not None and key.audience not in (audience if type(audience) is list else [audience]):
            return nobody
        if key.role_names is None:
            return key.roles
        role = claims.get("role")
        return key.roles & key.role_names.get(role, nobody) if type(role) is str else nobody

    def _is_current(self, claims: Mapping[str, Any]) -> bool:
        times = {name: claims.get(name) for name in ("iat", "nbf", "exp")}
        if any(value is not None and type(value) not in (int, float) for value in times.values()):
            return False
        now, issued, start, end = self._clock(), times["iat"], times["nbf"], times["exp"]
        if issued is None or end is None or end - issued > _LONGEST:
            return False
        return bool(issued - _SKEW <= now < end and (start is None or start - _SKEW <= now))
