"""Attestation tokens: EAR claims in a JWT, signed with ES256.

A token says what the broker found out about a guest and which key the guest holds. The broker takes its own tokens
back, and those of issuers it was told to trust; the key in a token's header is only looked up among the trusted ones, never
believed.

    header   {"alg":"ES256","typ":"JWT","kid":thumbprint,"jwk":{...},"x5c":[...]}
    claims   eat_profile, iss, iat, nbf, exp, jti, ear.verifier-id, tee, submods.cpu0...

Source: confidential-containers/trustee attestation-service/src/ear_token/broker.rs, kbs/src/token/jwk.rs; draft-ietf-rats-ear;
RFC 7519. Thread-safety: immutable objects.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import ECKey

from csvfast import __version__
from csvfast.broker.json_input import loads, member
from csvfast.broker.kbs.jwk import base64url
from csvfast.errors import DeniedError, RequestError, StateError

if TYPE_CHECKING:
    from csvfast.broker.attestation import Attestation

__all__ = ["EAT_PROFILE", "ISSUER", "TEE_KEY", "TOKEN_LIMIT", "TokenIssuer", "guest_key_in"]

EAT_PROFILE: Final = "tag:github.com,2024:confidential-containers/Trustee"
ISSUER: Final = "CoCo-Attestation-Service"
TEE_KEY: Final = "tee-pubkey"
TOKEN_LIMIT: Final = 256 << 10
"""Characters of a token that is looked at."""
SESSION: Final = "csvfast.session"
"""Claim that names the session a token came from, by the SHA-256 of its id."""

_SKEW: Final = 60.0
_EVIDENCE: Final = ("submods", "cpu0", "ear.veraison.annotated-evidence", "runtime_data_claims")
_PLACES: Final = (_EVIDENCE, ("customized_claims", "runtime_data"), ())


class _Registry(jws.JWSRegistry):
    """Headers carry certificates, payloads event logs: more than joserfc expects of a token."""

    max_header_length = 32 << 10
    max_payload_length = TOKEN_LIMIT


_REGISTRY: Final = _Registry(algorithms=["ES256"])


class TokenIssuer:
    """Signs tokens, and verifies those of trusted issuers, itself among them.

    In: key            P-256
        seconds        how long a token is valid
        certificates   DER, the key's first: sent as x5c
        trusted        further issuers' public keys, P-256
        clock          seconds since the epoch
    """

    def __init__(
        self,
        key: ec.EllipticCurvePrivateKey,
        *,
        seconds: int = 300,
        certificates: Sequence[bytes] = (),
        trusted: Sequence[ec.EllipticCurvePublicKey] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        _check_curve(key)
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        self._key = ECKey.import_key(pem)
        self._session_key = hashlib.sha256(b"csvfast sessions\0" + pem).digest()
        self.seconds: Final = seconds
        self.clock: Final = clock
        public = self._key.as_dict(private=False)
        jwk: dict[str, str | list[str]] = {name: str(public[name]) for name in ("kty", "crv", "x", "y")}
        self.thumbprint: Final = _thumbprint(jwk)
        self._header: dict[str, Any] = {"alg": "ES256", "typ": "JWT", "kid": self.thumbprint, "jwk": {**jwk, "alg": "ES256"}}
        if certificates:
            self._header["x5c"] = [base64.b64encode(der).decode("ascii") for der in certificates]
        self._trusted = {self.thumbprint: ECKey.import_key(jwk)}
        for other in trusted:
            _check_curve(other)
            imported = ECKey.import_key(other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
            self._trusted[_thumbprint(imported.as_dict(private=False))] = imported

    @property
    def jwks(self) -> dict[str, Any]:
        """The key set by which others verify this issuer's tokens (RFC 7517, 5)."""
        return {"keys": [{**self._header["jwk"], "kid": self.thumbprint, "use": "sig"}]}

    def issue(self, attestation: Attestation, session: str = "") -> str:
        """A token about a guest. In: session   SHA-256 of the session's id, hexadecimal."""
        now = self.clock()
        claims: dict[str, Any] = {
            "eat_profile": EAT_PROFILE,
            "iss": ISSUER,
            "iat": int(now),
            "nbf": int(now),
            "exp": int(now) + self.seconds,
            "jti": secrets.token_hex(16),
            "ear.verifier-id": {"developer": "csvfast", "build": f"csvfast {__version__}"},
            **attestation.token_claims(),
        }
        if session:
            claims[SESSION] = session
        payload = json.dumps(claims, separators=(",", ":"))
        return jws.serialize_compact(self._header, payload, self._key, registry=_REGISTRY)

    def verify(self, token: str) -> Mapping[str, Any]:
        """The claims of a token that a trusted issuer signed and that is valid now. DeniedError says why not.

        SESSION is among them only when we signed it.
        """
        if len(token) > TOKEN_LIMIT or token.count(".") != 2 or not token.isascii():
            raise DeniedError("token: no JWT of a length that is looked at")
        try:
            header = loads(_decoded(token.partition(".")[0]), "token header", limit=_Registry.max_header_length)
            key = self._find(header)
            found = jws.deserialize_compact(token, key, registry=_REGISTRY)
            claims = loads(found.payload, "token", limit=TOKEN_LIMIT)
            if type(claims) is not dict:
                raise RequestError("token: claims are no object")
            self._check_times(claims)
            if key is not self._trusted[self.thumbprint]:
                claims.pop(SESSION, None)  # of a broker on another store: no session here
        except RequestError as error:
            raise DeniedError(str(error)) from None
        except (JoseError, ValueError) as error:
            raise DeniedError(f"token: {type(error).__name__}") from None
        return claims

    def authenticate(self, name: str, content: str) -> str:
        """HMAC-SHA256 over a session's name and content, hexadecimal: nobody without the key can write sessions."""
        return hmac.new(self._session_key, f"{name}:{content}".encode(), hashlib.sha256).hexdigest()

    def is_own(self, token_claims: Mapping[str, Any]) -> bool:
        """True when a session of this store is named: of what `verify` gives, only own tokens have one."""
        return type(token_claims.get(SESSION)) is str

    def _find(self, header: Any) -> ECKey:
        if type(header) is not dict or header.get("alg") != "ES256":
            raise RequestError("token: alg is not ES256")
        if "crit" in header:
            raise RequestError("token: crit names extensions; expected none")
        name = header.get("kid")
        jwk = header.get("jwk")
        if type(jwk) is dict:
            name = _thumbprint(jwk)
        found = self._trusted.get(name) if type(name) is str else None
        if found is None:
            raise RequestError("token: signed by nobody who is trusted")
        return found

    def _check_times(self, claims: Mapping[str, Any]) -> None:
        now = self.clock()
        if now >= _time(claims, "exp"):
            raise RequestError("token: expired")
        for name in ("nbf", "iat"):
            if name in claims and now < _time(claims, name) - _SKEW:
                raise RequestError(f"token: {name} lies in the future")


def guest_key_in(claims: Mapping[str, Any]) -> Mapping[str, Any]:
    """The guest's JWK in a token's claims, wherever issuers put it. RequestError: none."""
    for path in _PLACES:
        place: Any = claims
        for name in path:
            place = place.get(name) if isinstance(place, Mapping) else None
        if isinstance(place, Mapping) and isinstance(place.get(TEE_KEY), Mapping):
            found: Mapping[str, Any] = place[TEE_KEY]
            return found
    raise RequestError("token: holds no tee-pubkey")


def _check_curve(key: ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey) -> None:
    if not isinstance(key.curve, ec.SECP256R1):
        raise StateError(f"token key on {key.curve.name}; expected P-256")


def _thumbprint(jwk: Mapping[str, Any]) -> str:
    required = {name: jwk.get(name) for name in ("crv", "kty", "x", "y")}
    return base64url(hashlib.sha256(json.dumps(required, separators=(",", ":")).encode()).digest())


def _decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _time(claims: Mapping[str, Any], name: str) -> float:
    value = claims.get(name)
    if type(value) is float:
        return value
    return float(member(claims, name, int, "token"))
