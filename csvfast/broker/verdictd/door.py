"""The door of Verdictd's protocol: guests prove themselves in the TLS handshake, then send commands.

    handshake ──judged by the broker──> commands ──Broker.release──> on record, durably ──> reply

A connection is one task. Its requests are answered one after the other, whatever was sent ahead; nothing is read meanwhile, so
a peer that does not read its replies stops itself. Connections that stay silent are AttestedServer's to end; a request that has
begun must be complete within `request_seconds`, for which a timer is set only when it did not come in one piece.

A report that was seen with one key is refused with another: its binding forbids that already, this does not depend on it.

Refused guests are on record. Peers that went away or were sent away before they had been judged are not: health checks and port
scanners do that all day, and the server's log has them. Nor are those that are locked out: their connections end before the
handshake, or strangers could fill the audit log with their refusals.

Source: inclavare-containers/verdictd src/attestation_agent/rats_tls.rs, README.md (the listener).
Thread-safety: one event loop.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Self

from csvfast.broker.logs import event, new_correlation
from csvfast.broker.model import Door
from csvfast.broker.verdictd.commands import Commands, Guest
from csvfast.broker.verdictd.protocol import REQUEST_BYTES, JsonFrames, read_request
from csvfast.certs.private import read_private_file
from csvfast.errors import ArgumentError, AttestedTlsError, CsvfastError, LimitedError, RequestError, StateError
from csvfast.ratstls.asynchronous import AttestedServer, ConnectionLimits
from csvfast.ratstls.certificate import attest_certificate, make_certificate
from csvfast.ratstls.context import Identity, TlsOptions
from csvfast.ratstls.freshness import SeenReports
from csvfast.ratstls.keys import TlsKey
from csvfast.ratstls.peer import Requirement

if TYPE_CHECKING:
    from pathlib import Path

    from csvfast.attest import Appraisal, Verified
    from csvfast.broker.config import VerdictdConfig
    from csvfast.broker.core import Broker
    from csvfast.ratstls.attester import Attester
    from csvfast.ratstls.certificate import AttestedCertificate
    from csvfast.ratstls.peer import Judge
    from csvfast.ratstls.stream import Stream

__all__ = ["VerdictdDoor"]

_log: Final = logging.getLogger(__name__)
_READ: Final = 16384
_TURN: Final = 16  # requests of one connection before others have their turn
_DEFAULT_LIMITS: Final = ConnectionLimits()
_RENEW_SECONDS: Final = 30 * 86400.0
_KEY_FILE_LIMIT: Final = 64 << 10
_NOT_JUDGED: Final = frozenset(("deadline", "closed"))  # stages at which nothing had been found out about the peer


class VerdictdDoor:
    """Serves guests from `start` to `close`, or as an asynchronous context manager.

    In: broker           judges, releases, records
        config           where to listen, with which key, how fresh evidence must be
        attester         makes evidence about the broker's own machine, for guests that want to know; asked here and at renewals
        identity         key and certificate in the place of config.key and attester; never renewed
        connections      how many, and how long they may do nothing
        request_bytes    of one request, at most
        request_seconds  from a request's first byte to its last
        challenge_seconds, fresh_seconds   to answer a challenge; how long an answer counts
        pad_replies      see protocol.json_reply
    StateError, FormatError: the key's file. ArgumentError: a key that does not fit the suites. What the attester raises.
    """

    def __init__(
        self,
        broker: Broker,
        config: VerdictdConfig,
        *,
        attester: Attester | None = None,
        identity: Identity | None = None,
        connections: ConnectionLimits = _DEFAULT_LIMITS,
        request_bytes: int = REQUEST_BYTES,
        request_seconds: float = 10.0,
        challenge_seconds: float = 60.0,
        fresh_seconds: float = 300.0,
        pad_replies: bool = True,
    ) -> None:
        if request_bytes < 1 or not request_seconds > 0:
            raise ArgumentError("request_bytes, request_seconds: expected more than 0")
        self.config: Final = config
        self.address = ""
        """Where the door listens, once it does."""
        self._broker: Final = broker
        self._attester: Final = attester
        self._key: Final = None if identity is not None else _load_key(config)
        self.identity = identity or self._own_identity()
        """What guests see; they pin identity.key.spki_sha256."""
        self._request_bytes: Final = request_bytes
        self._request_seconds: Final = request_seconds
        requirement = Requirement.attested(_SeenJudge(broker.judge(Door.VERDICTD)))
        self._commands: Final = Commands(
            broker,
            requirement,
            freshness=config.freshness,
            challenge_seconds=challenge_seconds,
            fresh_seconds=fresh_seconds,
            pad_replies=pad_replies,
        )
        self._server: Final = AttestedServer(
            self.identity,
            requirement,
            self._handle,
            limits=connections,
            options=TlsOptions("1.2" if config.tls12 else "1.3", config.suites),
            on_refusal=self._refused,
            admits=self._admits,
        )
        self._renewing: asyncio.Task[None] | None = None
        self._malformed = 0

    async def start(self) -> None:
        """Listens. StateError: the address cannot be had."""
        listen = self.config.listen
        try:
            if listen.path is not None:
                if await _answers(listen.path):  # asyncio would take its place without asking
                    raise StateError(f"{Door.VERDICTD}: cannot listen on {listen}: in use")
                await self._server.serve_unix(listen.path)
                self.address = str(listen)
            else:
                _host, port = await self._server.serve(listen.host, listen.port)
                self.address = str(replace(listen, port=port))
        except OSError as error:
            await self._server.close()
            raise StateError(f"{Door.VERDICTD}: cannot listen on {listen}: {error.strerror or error}") from None
        if self._key is not None:
            self._renewing = asyncio.create_task(self._keep_renewing())
        event(
            _log, logging.INFO, "listening", door=Door.VERDICTD, address=self.address, freshness=self.config.freshness,
            spki_sha256=self.identity.key.spki_sha256.hex(),
        )  # fmt: skip

    def _own_identity(self) -> Identity:
        assert self._key is not None
        if self._attester is None:
            return Identity(self._key, make_certificate(self._key, None))
        return Identity(self._key, attest_certificate(self._key, self._attester))

    async def _keep_renewing(self) -> None:
        """A certificate lasts a year, and brokers may run for longer; guests pin the key, which stays."""
        while True:
            await asyncio.sleep(_RENEW_SECONDS)
            try:
                await self._renew()
            except (CsvfastError, OSError) as error:
                event(_log, logging.ERROR, "certificate not renewed", door=Door.VERDICTD, reason=str(error))

    async def _renew(self) -> None:
        self.identity = await asyncio.to_thread(self._own_identity)
        self._server.renew(self.identity)

    def stats(self) -> dict[str, int]:
        """AttestedServer.stats, and requests, failures (replies that say so), malformed (connections closed for it) so far."""
        commands = self._commands
        counts = {"requests": commands.requests, "failures": commands.failures, "malformed": self._malformed}
        return self._server.stats() | counts

    async def close(self) -> None:
        """Stops listening and ends every connection. Idempotent."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait((self._renewing,))
            self._renewing = None
        await self._server.close()
        if self.config.listen.path is not None and self.address:
            self.config.listen.path.unlink(missing_ok=True)
        self.address = ""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.close()

    # ---- A connection

    async def _handle(self, stream: Stream) -> None:
        guest = Guest(stream.peer, self._broker.attestation_of(stream.peer))
        try:
            await self._converse(stream, guest)
        except RequestError as error:
            # Of the request's form. The original says nothing either.
            self._malformed += 1
            event(_log, logging.INFO, "malformed", door=Door.VERDICTD, address=guest.address, reason=str(error))

    async def _converse(self, stream: Stream, guest: Guest) -> None:
        frames = JsonFrames(self._request_bytes)
        deadline: float | None = None
        turn = 0
        while data := await self._receive(stream, deadline):
            frames.feed(data)
            answered = False
            while (message := frames.take()) is not None:
                answered = True
                reply = await self._commands.answer(guest, read_request(message, limit=self._request_bytes))
                await stream.send(reply)
                if guest.is_over:
                    return
                turn += 1
                if turn % _TURN == 0:  # nothing above waits when all is at hand
                    await asyncio.sleep(0)
            if answered and frames.is_empty:
                deadline = None
            elif answered or deadline is None:
                deadline = asyncio.get_running_loop().time() + self._request_seconds

    async def _receive(self, stream: Stream, deadline: float | None) -> bytes:
        if deadline is None:
            return await stream.receive(_READ)
        try:
            async with asyncio.timeout_at(deadline):
                return await stream.receive(_READ)
        except TimeoutError:
            raise RequestError(f"request: not complete after {self._request_seconds:g} seconds") from None

    def _admits(self, address: str) -> bool:
        try:
            self._broker.limits.check_identity(address)
        except LimitedError:
            return False
        return True

    def _refused(self, address: str, error: AttestedTlsError, certificate: AttestedCertificate | None) -> None:
        if error.stage not in _NOT_JUDGED:
            self._commands.record(address, error, certificate, new_correlation())


class _SeenJudge:
    """The broker's judge, and on top of it: no report with two keys."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._seen = SeenReports()

    @property
    def blocking(self) -> bool:
        return self._judge.blocking

    def verify(self, certificate: AttestedCertificate) -> Verified:
        return self._judge.verify(certificate)

    def appraise(self, verified: Verified, certificate: AttestedCertificate) -> Appraisal:
        appraisal = self._judge.appraise(verified, certificate)
        if appraisal.allowed:
            self._seen.check(verified, certificate.spki_sha256)
        return appraisal


def _load_key(config: VerdictdConfig) -> TlsKey:
    if config.key is None:
        return TlsKey.generate("sm2" if config.suites == "sm" else "p256")
    data = read_private_file(config.key.parent, config.key.name, _KEY_FILE_LIMIT)
    try:
        return TlsKey.load(data)
    finally:
        data[:] = bytes(len(data))


async def _answers(path: Path) -> bool:
    """True when somebody listens on a Unix socket."""
    try:
        _reader, writer = await asyncio.open_unix_connection(str(path))
    except OSError:
        return False
    writer.close()
    return True
