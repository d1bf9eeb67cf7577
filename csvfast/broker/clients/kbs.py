"""A guest's client of CoCo's Key Broker Service, csvfast's or the reference one.

    with KbsClient("https://broker:8080", attester, tls=Tls(ca=Path("ca.pem"))) as client:
        key = client.get_resource("kbs:///default/key/disk")

Retries like CoCo's client: a handshake five times, a second apart; a resource three times, with a new handshake after each 401.

Source: confidential-containers/guest-components attestation-agent/kbs_protocol/src/client/rcar_client.rs.
Thread-safety: a client belongs to one thread at a time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING, Any, Final, Literal

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from csvfast import __version__
from csvfast.broker.clients.http import Answer, HttpConnection, Tls
from csvfast.broker.json_input import loads, member
from csvfast.broker.kbs.jwe import GuestPrivateKey, open_jwe
from csvfast.broker.kbs.jwk import jwk_of
from csvfast.broker.kbs.report_data import report_data
from csvfast.broker.model import ResourcePath, for_kid
from csvfast.errors import AuthenticationError, BrokerError, DeniedError, RequestError, UnavailableError, UnknownError

if TYPE_CHECKING:
    from csvfast.crypto import Secret
    from csvfast.ratstls.attester import Attester

__all__ = ["KbsClient", "Tls", "new_guest_key"]

HANDSHAKES: Final = 5
HANDSHAKE_PAUSE: Final = 1.0
ROUNDS: Final = 3
TOTAL_SECONDS: Final = 60.0

_COOKIE: Final = "kbs-session-id"
_ALGORITHMS: Final = ["sha256", "sha384", "sha512", "sm3"]
_ANSWER_LIMIT: Final = 2 << 20
_DIGEST: Final = "sha384"


class KbsClient:
    """A client.

    In: url         http://host:port or https://host:port
        attester    makes evidence
        tls         for https
        key         of the guest, on P-256 or P-521 or RSA; a new one on P-256 unless given
        init_data   TOML text that is sent along
        version     of the protocol
        insecure    plain HTTP to other machines, too: resources stay encrypted, but who answers is unknown
    """

    def __init__(
        self,
        url: str,
        attester: Attester,
        *,
        tls: Tls | None = None,
        key: GuestPrivateKey | None = None,
        init_data: str | None = None,
        tee: str = "csv",
        version: str = "0.4.0",
        insecure: bool = False,
        timeout: float = TOTAL_SECONDS,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._http = HttpConnection(url, tls=tls, insecure=insecure, timeout=timeout)
        self._attester = attester
        self._key: GuestPrivateKey = key if key is not None else ec.generate_private_key(ec.SECP256R1())
        self._jwk = jwk_of(self._key.public_key())
        self._init_data = init_data
        self._tee = tee
        self._version = version
        self._sleep = sleep
        self._cookie: str | None = None
        self._token: str | None = None

    # ---- Attestation

    def attest(self) -> str:
        """Attests, unless that has been done, and gives the token. Tries again as CoCo's client does.

        DeniedError, UnavailableError, RequestError, AttestedTlsError of the last try.
        """
        for left in reversed(range(HANDSHAKES)):
            if self._token is not None:
                break
            try:
                self.handshake()
            except (BrokerError, AuthenticationError):
                if not left:
                    raise
                self._sleep(HANDSHAKE_PAUSE)
        assert self._token is not None
        return self._token

    def handshake(self) -> None:
        """One handshake: request, challenge, evidence, token."""
        self._cookie = self._token = None
        request = {"version": self._version, "tee": self._tee, "extra-params": {"supported-hash-algorithms": _ALGORITHMS}}
        challenge = self._post("auth", json.dumps(request).encode())
        nonce = member(challenge, "nonce", str, "challenge")
        extra = challenge.get("extra-params")
        if isinstance(extra, dict) and extra.get("selected-hash-algorithm", _DIGEST) != _DIGEST:
            raise RequestError(f"challenge: another hash algorithm; expected {_DIGEST}")
        evidence = self._attester.evidence(report_data(nonce, self._jwk))
        init_data = None if self._init_data is None else {"format": "toml", "body": self._init_data}
        runtime = {"nonce": nonce, "tee-pubkey": self._jwk}
        body = b'{"init-data":%b,"runtime-data":%b,"tee-evidence":{"primary_evidence":%b,"additional_evidence":""}}' % (
            json.dumps(init_data).encode(),
            json.dumps(runtime).encode(),
            evidence.to_json(),
        )
        self._token = member(self._post("attest", body), "token", str, "attestation response")

    def _post(self, name: str, body: bytes) -> dict[str, Any]:
        answer = self._http.request("POST", f"/kbs/v0/{name}", body, self._headers(), limit=_ANSWER_LIMIT)
        if answer.status != 200:
            raise _error(answer)
        self._cookie = _session_in(answer.headers.get("set-cookie")) or self._cookie
        document = loads(answer.body, f"answer to {name}", limit=_ANSWER_LIMIT)
        if type(document) is not dict:
            raise RequestError(f"answer to {name}: expected an object")
        return document

    # ---- Resources

    def get_resource(self, path: str | ResourcePath, *, version: int | None = None) -> Secret:
        """A resource. In: path   kbs:///repository/type/tag, repository/type/tag, or a key id below default/key.

        DeniedError: not allowed, or there is none. UnavailableError, RequestError, AuthenticationError (what came is not for us).
        """
        where = path if isinstance(path, ResourcePath) else for_kid(path)
        target = f"/kbs/v0/resource/{where}" + ("" if version is None else f"?version={version}")
        if self._token is None:
            self.attest()
        for left in reversed(range(ROUNDS)):
            answer = self._http.request("GET", target, headers=self._headers())
            if answer.status == 200:
                return open_jwe(self._key, answer.body)
            if answer.status != 401 or not left:
                raise _error(answer)
            self.handshake()
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Closes the connection."""
        self._http.close()

    def __enter__(self) -> KbsClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _headers(self) -> dict[str, str]:
        headers = {"User-Agent": f"csvfast-kbs-client/{__version__}", "Content-Type": "application/json"}
        if self._cookie is not None:
            headers["Cookie"] = f"{_COOKIE}={self._cookie}"
        return headers


def new_guest_key(kind: Literal["P-256", "P-521", "RSA"]) -> GuestPrivateKey:
    """A key for KbsClient."""
    if kind == "RSA":
        return rsa.generate_private_key(65537, 3072)
    return ec.generate_private_key(ec.SECP256R1() if kind == "P-256" else ec.SECP521R1())


def _session_in(header: str | None) -> str | None:
    if header is None:
        return None
    try:
        found = SimpleCookie(header).get(_COOKIE)
    except CookieError:
        return None
    return None if found is None or len(found.value) > 256 else found.value


def _error(answer: Answer) -> BrokerError:
    try:
        document = loads(answer.body, "error", limit=64 << 10)
        detail = f"{str(document['type']).rpartition('/')[2]}: {document['detail']}"[:500]
    except (RequestError, KeyError, TypeError):
        detail = f"HTTP status {answer.status}"
    correlation = answer.headers.get("x-csvfast-correlation", "")
    if answer.status == 401:
        return DeniedError(detail, correlation)
    if answer.status == 404:
        return UnknownError(detail)
    if answer.status >= 500:
        return UnavailableError(detail)
    return RequestError(detail)
