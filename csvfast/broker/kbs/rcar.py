"""Request, challenge, attestation, response: how a guest gets a session.

    POST auth     version, tee          ->  nonce, cookie          session in the store, its nonce unused
    POST attest   cookie, key, evidence ->  token                  the nonce is used up, whichever broker on the store was asked
    GET resource  cookie                ->  the session's guest and its key

Sessions lie in the store, so that every broker on it knows them; the store sees the SHA-256 of a session's id alone, and what it
gives back is authenticated: who can write the database cannot make a session. Attested sessions are kept in memory, too.

Source: confidential-containers/trustee kbs/src/attestation/backend.rs, kbs/src/attestation/session.rs.
Thread-safety: one event loop.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import secrets
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from csvfast.broker.attestation import Attestation
from csvfast.broker.json_input import loads, member
from csvfast.broker.kbs.ear import SESSION, TEE_KEY, TokenIssuer, guest_key_in
from csvfast.broker.kbs.init_data import read_init_data
from csvfast.broker.kbs.jwk import GuestKey
from csvfast.broker.kbs.report_data import report_data
from csvfast.broker.limits import network_of
from csvfast.broker.model import Door
from csvfast.broker.policy import Decision
from csvfast.errors import ConflictError, DeniedError, FormatError, LimitedError, RequestError, UnknownError
from csvfast.report.evidence_json import read_json

if TYPE_CHECKING:
    from csvfast.broker.core import Broker
    from csvfast.broker.store import SessionRow

__all__ = ["PROTOCOL_VERSIONS", "TEES", "Challenge", "Rcar", "Session"]

PROTOCOL_VERSIONS: Final = frozenset(("0.4.0",))
TEES: Final = frozenset(("csv",))
"""Of CoCo's kinds of TEE those whose evidence is verified here."""

_NONCE_BYTES: Final = 32
_AUTH_LIMIT: Final = 16 << 10
_ATTEST_LIMIT: Final = 2 << 20
_ADDITIONAL_LIMIT: Final = 1 << 20
_OPEN_LIMIT: Final = 100_000  # challenges handed out by this broker and not yet expired
_SHARE: Final = 20  # when half of them are, the part of one address that holds more than a 20th of all waits
_ID_CHARACTERS: Final = frozenset("0123456789abcdef")


class Challenge(NamedTuple):
    """What a request is answered with."""

    session_id: str
    nonce: str
    expires: float


class Session(NamedTuple):
    """An attested session. `expires`: seconds since the epoch."""

    attestation: Attestation
    key: GuestKey
    token: str
    expires: float


class Rcar:
    """The protocol's states.

    In: broker     attests
        issuer     signs tokens; its key authenticates sessions as well, so brokers on one store share it
        versions   of the protocol that are spoken
        seconds    a session's life
        cached     attested sessions kept in memory
    """

    def __init__(
        self,
        broker: Broker,
        issuer: TokenIssuer,
        *,
        versions: frozenset[str] = PROTOCOL_VERSIONS,
        seconds: float = 300.0,
        cached: int = 65536,
    ) -> None:
        self.broker: Final = broker
        self.issuer: Final = issuer
        self.seconds: Final = seconds
        self._versions = versions
        self._store = broker.store
        self._clock = broker.clock
        self._cached = cached
        self._attested: OrderedDict[str, Session] = OrderedDict()
        self._open: deque[tuple[float, str]] = deque()  # when it expires, whose it is
        self._held: Counter[str] = Counter()

    # ---- auth

    async def challenge(self, body: bytes, address: str) -> Challenge:
        """Answers a request. RequestError, LimitedError, UnavailableError."""
        self.broker.limits.check_request(address)
        what = "auth request"
        document = loads(body, what, limit=_AUTH_LIMIT)
        if type(document) is not dict:
            raise RequestError(f"{what}: expected an object")
        version, tee = member(document, "version", str, what), member(document, "tee", str, what)
        if type(document.get("extra-params", "")) not in (str, dict):
            raise RequestError(f"{what}: extra-params is neither a string nor an object")
        if version not in self._versions:
            raise RequestError(f"{what}: another protocol version; expected {', '.join(sorted(self._versions))}")
        if tee not in TEES:
            raise RequestError(f"{what}: this tee is not verified here; expected {', '.join(sorted(TEES))}")
        now = self._clock()
        place = network_of(address)
        self._close_expired(now)
        count = len(self._open)
        if count >= _OPEN_LIMIT or (count >= _OPEN_LIMIT // 2 and self._held[place] >= _OPEN_LIMIT // _SHARE):
            raise LimitedError("too many open challenges", self._open[0][0] - now)
        challenge = Challenge(
            secrets.token_hex(16), base64.b64encode(secrets.token_bytes(_NONCE_BYTES)).decode("ascii"), now + self.seconds
        )
        self._open.append((challenge.expires, place))
        self._held[place] += 1
        job = self._store.sessions.create_job(_digest(challenge.session_id), challenge.nonce, tee, challenge.expires)
        await self._store.committer.commit(job)
        return challenge

    def _close_expired(self, now: float) -> None:
        while self._open and self._open[0][0] <= now:
            _expires, place = self._open.popleft()
            self._held[place] -= 1
            if not self._held[place]:
                del self._held[place]

    # ---- attest

    async def attest(
        self, session_id: str | None, read: Callable[[], Awaitable[bytes]], address: str, correlation: str
    ) -> Session:
        """Attests a session, once; afterwards gives what came of it.

        In: read   gives the request's body; called for an open session alone
        RequestError, DeniedError, LimitedError, UnavailableError.
        """
        name = self._name(session_id, correlation)
        row = await self._row(name)
        if row is None or row.expires <= self._clock():
            raise DeniedError("no such session, or it has expired", correlation)
        if row.record is not None:
            return self._remember(name, self._read(name, row.record))
        if row.tee not in TEES:
            raise DeniedError("a session in the store that no broker has opened", correlation)
        body = await read()
        self.broker.limits.check_identity(address)
        try:
            key, evidence, additional, init_data = self._parse(body, row.nonce)
            parsed = read_json(evidence)
        except (RequestError, FormatError) as error:
            self.broker.limits.note_failure(address)  # looking at it took time, and it leaves the challenge as it was
            raise RequestError(str(error)) from None
        runtime = {TEE_KEY: key.document, "nonce": row.nonce, "additional-evidence": additional}
        attestation = await self.broker.attest(
            parsed,
            report_data(row.nonce, key.document, additional),
            encoded=evidence,
            door=Door.KBS,
            address=address,
            correlation=correlation,
            tee=row.tee,
            key=key.thumbprint,
            init_data=init_data,
            runtime=runtime,
        )
        session = Session(attestation, key, self.issuer.issue(attestation, name), row.expires)
        try:
            await self._store.committer.commit(self._store.sessions.attest_job(name, self._write(name, session)))
        except UnknownError:
            raise DeniedError("the session has expired", correlation) from None
        except ConflictError:  # another request with the same nonce was quicker
            return await self._session_named(name, correlation)
        return self._remember(name, session)

    @staticmethod
    def _parse(body: bytes, nonce: str) -> tuple[GuestKey, bytes, str, dict[str, Any] | None]:
        what = "attestation"
        document = loads(body, what, limit=_ATTEST_LIMIT)
        if type(document) is not dict:
            raise RequestError(f"{what}: expected an object")
        runtime = member(document, "runtime-data", dict, what)
        key = GuestKey(member(runtime, TEE_KEY, dict, "runtime-data"))
        if not hmac.compare_digest(member(runtime, "nonce", str, "runtime-data").encode(), nonce.encode()):
            raise RequestError("runtime-data: another nonce than the challenge's")
        evidence = member(document, "tee-evidence", dict, what)
        primary = member(evidence, "primary_evidence", dict, "tee-evidence")
        additional = member(evidence, "additional_evidence", str, "tee-evidence")
        if additional:
            devices = loads(additional.encode(), "additional_evidence", limit=_ADDITIONAL_LIMIT)
            if type(devices) is not dict or devices:
                raise RequestError("additional_evidence: of devices that are not verified here; expected none")
        # serde_json writes objects in alphabetical order, too: for CoCo's guests these are the bytes the attester made.
        encoded = json.dumps(primary, separators=(",", ":"), sort_keys=True, ensure_ascii=False).encode()
        return key, encoded, additional, read_init_data(document.get("init-data"))

    # ---- resource

    def cached(self, session_id: str) -> Session | None:
        """An attested session that this broker remembers. HOT: no store, no waiting."""
        found = self._attested.get(_digest(session_id))
        if found is None or found.expires <= self._clock():
            return None
        return found

    async def session(self, session_id: str | None, correlation: str) -> Session:
        """An attested session, perhaps of another broker. DeniedError, UnavailableError."""
        return await self._session_named(self._name(session_id, correlation), correlation)

    async def session_of_token(self, token: str, correlation: str) -> Session:
        """The guest behind a token: for our own the session it came from, so that what has been withdrawn since counts.

        DeniedError, RequestError, UnavailableError.
        """
        claims = self.issuer.verify(token)
        if self.issuer.is_own(claims):
            return await self._session_named(claims[SESSION], correlation)
        return _session_of_claims(claims, token)

    async def _session_named(self, name: str, correlation: str) -> Session:
        found = self._attested.get(name)
        if found is None:
            row = await self._row(name)
            if row is None or row.record is None:
                raise DeniedError("no such session, or it is not attested", correlation)
            found = self._remember(name, self._read(name, row.record))
        if found.expires <= self._clock():
            raise DeniedError("the session has expired", correlation)
        return found

    # ---- Housekeeping

    async def purge(self) -> None:
        """Forgets sessions that have expired, here and in the store. UnavailableError."""
        now = self._clock()
        for name in [name for name, session in self._attested.items() if session.expires <= now]:
            del self._attested[name]
        await asyncio.to_thread(self._store.sessions.purge_expired)

    async def _row(self, name: str) -> SessionRow | None:
        return await asyncio.to_thread(self._store.sessions.get, name)

    def _remember(self, name: str, session: Session) -> Session:
        if len(self._attested) >= self._cached:
            self._attested.popitem(last=False)
        self._attested[name] = session
        return session

    def _name(self, session_id: str | None, correlation: str) -> str:
        if session_id is None or len(session_id) != 32 or not _ID_CHARACTERS.issuperset(session_id):
            raise DeniedError("no session", correlation)
        return _digest(session_id)

    def _write(self, name: str, session: Session) -> str:
        content = json.dumps(
            {
                "attestation": session.attestation.to_json(),
                "key": session.key.document,
                "token": session.token,
                "expires": session.expires,
            },
            separators=(",", ":"),
        )
        return f"{self.issuer.authenticate(name, content)}{content}"

    def _read(self, name: str, record: str) -> Session:
        tag, content = record[:64], record[64:]
        if not hmac.compare_digest(tag.encode(), self.issuer.authenticate(name, content).encode()):
            raise DeniedError("a session in the store that no broker with this token key has written")
        members = json.loads(content)
        attestation, key = Attestation.from_json(members["attestation"]), GuestKey(members["key"])
        return Session(attestation, key, members["token"], float(members["expires"]))


def _session_of_claims(claims: Mapping[str, Any], token: str) -> Session:
    """A guest that another issuer has attested: its token is all there is."""
    key = GuestKey(dict(guest_key_in(claims)))
    submodules = claims.get("submods")
    cpu = submodules.get("cpu0") if isinstance(submodules, Mapping) else None
    status = cpu.get("ear.status") if isinstance(cpu, Mapping) else None
    allowed = status == "affirming"
    decision = Decision(
        allowed,
        rule="" if allowed else "token",
        observed=str(status)[:64],
        expected="ear.status affirming",
        status=status if status in ("none", "affirming", "warning", "contraindicated") else "none",
    )
    expires = float(claims["exp"])
    attestation = Attestation(
        str(claims.get("tee", ""))[:32],
        {},
        decision,
        {"appraisal": "token", "issuer": str(claims.get("iss", ""))[:128]},
        hashlib.sha256(token.encode()).hexdigest(),
        key.thumbprint,
        {},
        -1,
        expires,
        dict(claims),
    )
    return Session(attestation, key, token, expires)


def _digest(session_id: str) -> str:
    return hashlib.sha256(session_id.encode("ascii", "replace")).hexdigest()
