"""Clients of Verdictd's door: csvfast's, and Verdictd itself.

    with VerdictdClient(("broker", 1234), attester, Requirement.pinned({spki_sha256})) as client:
        key = client.get_kek("0f8fad5b-d9cb-469f-a165-70867728950e")

The guest proves what it is; who the broker is must be known from somewhere: a pinned key (delivered in measured init data), or
evidence that the broker shows (Requirement.attested). With Requirement.unattested a man in the middle can hand out keys, policies
and keyrings of his own making, and a warning is logged.

A connection is made when it is needed, with the command `version`, whose answer shows that the broker accepts this guest. When
the broker has closed it meanwhile, a command is sent once more on a new one. A broker that wants fresh evidence gets it.

Source: csvfast.broker.verdictd.protocol; confidential-containers/attestation-agent src/kbc_modules/eaa_kbc, which shows itself to
anybody and asks for no proof.
Thread-safety: a VerdictdClient belongs to one thread at a time; an AsyncVerdictdClient to one event loop, whose tasks take turns.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TypeVar

from csvfast.broker.clients.verdictd_steps import Ask, Prover, Replies, Step, Steps
from csvfast.broker.verdictd.protocol import Blob
from csvfast.errors import AttestedTlsError, DeniedError, LimitedError, UnavailableError
from csvfast.ratstls.blocking import connect
from csvfast.ratstls.context import EndpointContext, Identity, TlsOptions
from csvfast.ratstls.peer import Requirement

if TYPE_CHECKING:
    import asyncio

    from csvfast._core import BytesLike
    from csvfast.crypto import Secret
    from csvfast.ratstls.attester import Attester
    from csvfast.ratstls.blocking import BlockingStream
    from csvfast.ratstls.certificate import Layout
    from csvfast.ratstls.peer import Peer
    from csvfast.ratstls.stream import Stream

__all__ = ["AsyncVerdictdClient", "Blob", "VerdictdClient"]

Address = tuple[str, int] | str | Path

ORIGINAL_REQUEST_BYTES: Final = 4096
"""What Verdictd's own server reads of a request."""

_log: Final = logging.getLogger(__name__)
_DEFAULT_OPTIONS: Final = TlsOptions()
_T = TypeVar("_T")
# What a broker has said in a whole reply. After anything else it is not known what comes next on a connection: it is closed.
_STILL_IN_STEP: Final = (DeniedError, LimitedError, UnavailableError)


class _Client:
    """What both clients are made of.

    In: address       host and port, or the path of a Unix socket
        attester      makes this guest's evidence; None: only with `identity`, and without challenges
        requirement   what the broker must show; None: nothing, as Requirement.unattested
        identity      key and certificate made before; None: new ones
        custom        claims bound into the evidence beside the key
        layout        of the evidence: "rats-tls" for Verdictd
        timeout       seconds to connect
        idle          seconds for each request
        request_bytes of one request; 4096 for Verdictd's own server
    """

    def __init__(
        self,
        address: Address,
        attester: Attester | None,
        requirement: Requirement | None = None,
        *,
        identity: Identity | None = None,
        custom: Mapping[str, BytesLike] | None = None,
        layout: Layout = "rats-tls",
        options: TlsOptions = _DEFAULT_OPTIONS,
        timeout: float = 10.0,
        idle: float = 60.0,
        request_bytes: int = ORIGINAL_REQUEST_BYTES,
    ) -> None:
        if requirement is None:
            requirement = Requirement.unattested()
        if requirement.is_open:
            _log.warning("nobody knows which broker this is: expected its pinned key, or its evidence")
        self._address = address
        self._requirement = requirement
        self._identity = identity
        self._attester = attester
        self._custom = custom
        self._layout = layout
        self._options = options
        self._timeout = timeout
        self._idle = idle
        self._request_bytes = request_bytes
        self._context: EndpointContext | None = None
        self._made: Steps | None = None

    @property
    def peer(self) -> Peer:
        """The broker, as it is connected. AttestedTlsError: it is not."""
        raise NotImplementedError

    def _prepared(self) -> EndpointContext:
        """Identity and context. May take long: it asks the attester."""
        if self._context is None:
            if self._identity is None:
                kind = "sm2" if self._options.suites == "sm" else "p256"
                self._identity = Identity.create(self._attester, kind=kind, custom=self._custom, layout=self._layout)
            self._context = EndpointContext.client(self._identity, self._requirement, self._options)
            prover = Prover(self._attester, self._identity, self._custom, self._layout)
            self._made = Steps(prover, lambda: self.peer, self._request_bytes)
        return self._context

    @property
    def _steps(self) -> Steps:
        self._prepared()
        assert self._made is not None
        return self._made


def _no_peer() -> AttestedTlsError:
    return AttestedTlsError("closed", "not connected")


class VerdictdClient(_Client):
    """Blocking. A context manager that connects when it is entered.

    Commands raise DeniedError (not allowed; .correlation is for the broker's operator), LimitedError, UnavailableError,
    RequestError (anything else the broker says, or is no reply), AttestedTlsError, OSError (nobody is there).
    """

    _stream: BlockingStream | None = None

    @property
    def peer(self) -> Peer:
        """See _Client."""
        if self._stream is None:
            raise _no_peer()
        return self._stream.peer

    def connect(self) -> None:
        """Connects, unless connected; the broker accepts this guest then."""
        self._connect()

    def close(self) -> None:
        """Idempotent; the next command would connect again."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def version(self) -> str:
        """Version of the protocol, "v1"."""
        return self._run(lambda steps: steps.version())

    def echo(self, data: str) -> str:
        """Sends a text there and back. The connection ends."""
        return self._run(lambda steps: steps.echo(data))

    def challenge(self) -> float:
        """Proves what this guest is now. Out: for how many seconds that counts. Others do it when the broker wants it."""
        return self._run(lambda steps: steps.challenge())

    def get_kek(self, kid: str) -> Secret:
        """One key. In: kid   a plain name, repository/type/tag, or kbs:///repository/type/tag"""
        return self.get_keks([kid])[kid]

    def get_keks(self, kids: Iterable[str]) -> dict[str, Secret]:
        """Keys by their ids, all of them or an error."""
        wanted = list(kids)
        return self._run(lambda steps: steps.get_keks(wanted))

    def decrypt(self, blobs: Sequence[Blob]) -> list[Secret]:
        """Plaintexts of blobs whose keys stay with the broker, in their order; all of them or an error."""
        return self._run(lambda steps: steps.decrypt(blobs))

    def get_resource(self, path: str) -> Secret:
        """A resource. Verdictd's own server has no such command. In: path   repository/type/tag, or kbs:///repository/type/tag"""
        return self._run(lambda steps: steps.get_resource(path))

    def get_policy(self) -> Secret:
        """containers-policy.json(5)."""
        return self._run(lambda steps: steps.get_named("Policy"))

    def get_sigstore_config(self) -> Secret:
        """sigstore.yaml of containers-registries.d(5)."""
        return self._run(lambda steps: steps.get_named("Sigstore Config"))

    def get_gpg_keyring(self) -> Secret:
        """OpenPGP public keys."""
        return self._run(lambda steps: steps.get_named("GPG Keyring"))

    def get_cosign_key(self) -> Secret:
        """Public key of cosign."""
        return self._run(lambda steps: steps.get_named("Cosign Key"))

    def get_credential(self) -> Secret:
        """auth.json of containers-auth.json(5)."""
        return self._run(lambda steps: steps.get_named("Credential"))

    # ---- Behind it

    def _run(self, start: Callable[[Steps], Step[_T]]) -> _T:
        is_new = self._connect()
        try:
            return self._drive(start(self._steps))
        except AttestedTlsError as error:
            if is_new or error.stage != "closed":
                raise
        self._connect()
        return self._drive(start(self._steps))

    def _connect(self) -> bool:
        if self._stream is not None:
            return False
        context = self._prepared()
        self._stream = connect(
            self._address, self._identity, self._requirement, timeout=self._timeout, idle=self._idle, context=context
        )
        try:
            self._drive(self._steps.version())
        except BaseException:
            self.close()
            raise
        return True

    def _drive(self, steps: Step[_T]) -> _T:
        outcome = None
        asked = False
        try:
            while True:
                step = steps.send(outcome)
                if isinstance(step, Ask):
                    asked = True
                    outcome = self._exchange(step)
                else:
                    outcome = step.call()
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]  # what the generator's type says
        except _STILL_IN_STEP:
            raise
        except BaseException:
            if asked:
                self.close()
            raise
        finally:
            steps.close()

    def _exchange(self, ask: Ask) -> bytes:
        stream = self._stream
        if stream is None:
            raise _no_peer()
        stream.send(ask.request)
        replies = Replies(ask)
        while (reply := replies.feed(stream.receive())) is None:
            pass
        if ask.size == -1:
            self.close()
        return reply


class AsyncVerdictdClient(_Client):
    """For asyncio; an asynchronous context manager. Commands are those of VerdictdClient and raise the same."""

    _stream: Stream | None = None

    @property
    def peer(self) -> Peer:
        """See _Client."""
        if self._stream is None:
            raise _no_peer()
        return self._stream.peer

    async def connect(self) -> None:
        """Connects, unless connected; the broker accepts this guest then."""
        async with self._turn:
            await self._connect()

    def close(self) -> None:
        """Idempotent; the next command would connect again."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    async def version(self) -> str:
        """See VerdictdClient, here and below."""
        return await self._run(lambda steps: steps.version())

    async def echo(self, data: str) -> str:
        """A text there and back; the connection ends."""
        return await self._run(lambda steps: steps.echo(data))

    async def challenge(self) -> float:
        """Fresh evidence. Out: for how many seconds it counts."""
        return await self._run(lambda steps: steps.challenge())

    async def get_kek(self, kid: str) -> Secret:
        """One key."""
        return (await self.get_keks([kid]))[kid]

    async def get_keks(self, kids: Iterable[str]) -> dict[str, Secret]:
        """Keys by their ids."""
        wanted = list(kids)
        return await self._run(lambda steps: steps.get_keks(wanted))

    async def decrypt(self, blobs: Sequence[Blob]) -> list[Secret]:
        """Plaintexts of blobs."""
        return await self._run(lambda steps: steps.decrypt(blobs))

    async def get_resource(self, path: str) -> Secret:
        """A resource by its path."""
        return await self._run(lambda steps: steps.get_resource(path))

    async def get_policy(self) -> Secret:
        """containers-policy.json(5)."""
        return await self._run(lambda steps: steps.get_named("Policy"))

    async def get_sigstore_config(self) -> Secret:
        """sigstore.yaml of containers-registries.d(5)."""
        return await self._run(lambda steps: steps.get_named("Sigstore Config"))

    async def get_gpg_keyring(self) -> Secret:
        """OpenPGP public keys."""
        return await self._run(lambda steps: steps.get_named("GPG Keyring"))

    async def get_cosign_key(self) -> Secret:
        """Public key of cosign."""
        return await self._run(lambda steps: steps.get_named("Cosign Key"))

    async def get_credential(self) -> Secret:
        """auth.json of containers-auth.json(5)."""
        return await self._run(lambda steps: steps.get_named("Credential"))

    # ---- Behind it

    @cached_property
    def _turn(self) -> asyncio.Lock:
        import asyncio  # here and below: a guest that waits in a thread does without

        return asyncio.Lock()

    async def _run(self, start: Callable[[Steps], Step[_T]]) -> _T:
        async with self._turn:
            is_new = await self._connect()
            try:
                return await self._drive(start(self._steps))
            except AttestedTlsError as error:
                if is_new or error.stage != "closed":
                    raise
            await self._connect()
            return await self._drive(start(self._steps))

    async def _connect(self) -> bool:
        if self._stream is not None:
            return False
        import asyncio

        from csvfast.ratstls.asynchronous import open_connection

        context = await asyncio.to_thread(self._prepared)
        self._stream = await open_connection(
            self._address, self._identity, self._requirement, timeout=self._timeout, context=context
        )
        try:
            await self._drive(self._steps.version())
        except BaseException:
            self.close()
            raise
        return True

    async def _drive(self, steps: Step[_T]) -> _T:
        import asyncio

        outcome = None
        asked = False
        try:
            while True:
                step = steps.send(outcome)
                if isinstance(step, Ask):
                    asked = True
                    outcome = await self._exchange(step)
                else:
                    outcome = await asyncio.to_thread(step.call)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]  # what the generator's type says
        except _STILL_IN_STEP:
            raise
        except BaseException:
            if asked:
                self.close()
            raise
        finally:
            steps.close()

    async def _exchange(self, ask: Ask) -> bytes:
        stream = self._stream
        if stream is None:
            raise _no_peer()
        import asyncio

        try:
            async with asyncio.timeout(self._idle):
                await stream.send(ask.request)
                replies = Replies(ask)
                while (reply := replies.feed(await stream.receive())) is None:
                    pass
        except TimeoutError:
            raise AttestedTlsError("deadline", f"the broker did not answer within {self._idle:g} seconds") from None
        if ask.size == -1:
            self.close()
        return reply
