"""One attested connection, without sockets: bytes from the network in, bytes for the network out.

    "handshake" ──advance()──> "judging" ──judge()──> "open" ──close()──> "closed"

    feed(bytes)    what came from the network          outgoing() -> bytes   what must go there, after every other call
    receive, send  application data: in no state but "open"

The handshake proves that the peer has the key of his certificate and checks what binds certificate, key and claims
(csvfast.ratstls.context). Then the evidence is judged, on this side's own terms, and before that no application byte moves in
either direction here. With TLS 1.3 the client's handshake ends before the server has judged the client: an open connection means
that *we* accept the peer. That he accepts us shows when his first answer is read; a refusal is an alert, or the connection's end.

When anything fails the connection is closed for good and the error is kept; `outgoing` still has the alert for the peer.

Source: pyOpenSSL's memory BIOs; RFC 8446, RFC 9266. Thread-safety: none; `judging` returns what may run in another thread.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final, Literal, NoReturn

from OpenSSL import SSL

from csvfast.errors import ArgumentError, AttestedTlsError
from csvfast.ratstls.context import Examination, bare, words_of
from csvfast.ratstls.peer import Judgement, Peer

if TYPE_CHECKING:
    from collections.abc import Callable

    from csvfast._core import BytesLike
    from csvfast.ratstls.certificate import AttestedCertificate
    from csvfast.ratstls.context import EndpointContext

__all__ = ["HANDSHAKE_LIMIT", "RECORD_BYTES", "AttestedConnection", "State", "octets", "shown_address"]

State = Literal["handshake", "judging", "open", "closed"]

HANDSHAKE_LIMIT: Final = 128 << 10
"""Bytes a peer may send before he has been accepted. His certificate is 7.5 kB of them."""
RECORD_BYTES: Final = 16384
"""Application data in one TLS record, at most; `receive` returns no more at once."""

_CHUNK: Final = 65536
_EXPORTER_LABEL: Final = b"EXPORTER-Channel-Binding"
_EXPORTER_BYTES: Final = 32
_END_OF_INPUT: Final = "the peer's end of the connection closed without close_notify"


class AttestedConnection:
    """See the module.

    In: context   of a server or a client
        address   where the peer is, for logs
    """

    __slots__ = ("_arrived", "_connection", "_context", "_error", "_examination", "_input_ended", "_peer", "_state", "address")

    def __init__(self, context: EndpointContext, address: str = "") -> None:
        self.address: Final = address
        self._context: Final = context
        self._examination: Final = Examination()
        self._connection: Final = SSL.Connection(context.context, None)
        self._connection.set_app_data(self._examination)
        if context.is_server:
            self._connection.set_accept_state()
        else:
            self._connection.set_connect_state()
        self._state: State = "handshake"
        self._arrived = 0
        self._input_ended = False
        self._peer: Peer | None = None
        self._error: AttestedTlsError | None = None

    @property
    def state(self) -> State:
        """ "handshake", "judging", "open" or "closed"."""
        return self._state

    @property
    def error(self) -> AttestedTlsError | None:
        """Why the connection was closed; None when it was not, or by `close`."""
        return self._error

    @property
    def certificate(self) -> AttestedCertificate | None:
        """The peer's, once it has been read and its binding checked. Showing it proves nothing yet: see `peer`."""
        return self._examination.certificate

    @property
    def peer(self) -> Peer:
        """Who was accepted. AttestedTlsError until then."""
        if self._peer is None:
            raise self.failure() if self._error else AttestedTlsError("handshake", "the peer has not been accepted yet")
        return self._peer

    # ---- The network's side

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Bytes that came from the peer, any number of them. AttestedTlsError: too many before he was accepted, or closed."""
        if self._state == "closed":
            raise self.failure()
        if self._state != "open":
            self._arrived += len(data)
            if self._arrived > HANDSHAKE_LIMIT:
                self._fail("handshake", f"{self._arrived} bytes before the peer was accepted; expected at most {HANDSHAKE_LIMIT}")
        if data:
            self._connection.bio_write(data)

    def feed_end(self) -> None:
        """Nothing more will come. `receive` returns what came before, and then tells whether the peer had said so."""
        self._input_ended = True

    def outgoing(self) -> bytes:
        """What must be sent to the peer now; b"": nothing. In every state."""
        pieces = []
        try:
            while True:
                piece = self._connection.bio_read(_CHUNK)
                pieces.append(piece)
                if len(piece) < _CHUNK:
                    break
        except SSL.WantReadError:
            pass
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    # ---- Handshake and judgement

    def advance(self) -> State:
        """Goes on with the handshake as far as what was fed allows. AttestedTlsError when it failed."""
        if self._state != "handshake":
            return self._state
        try:
            self._connection.do_handshake()
        except SSL.WantReadError:
            if self._input_ended:
                self._fail("closed", "the peer closed the connection during the handshake")
            return self._state
        except SSL.Error as error:
            refusal = self._examination.error
            if refusal is not None:
                self._closed_by(refusal)
            self._fail("handshake", _told(error))
        self._connection.set_app_data(None)
        if self._context.requirement.asks_certificate and self._examination.certificate is None:
            self._fail("certificate", "the peer has shown none")  # OpenSSL has refused him already; never rely on one check
        self._state = "judging"
        return self._state

    def judging(self) -> Callable[[], Judgement]:
        """What is to be called, in any thread, for the judgement that `settle` takes. AttestedTlsError unless "judging"."""
        self._expect("judging")
        requirement, certificate = self._context.requirement, self._examination.certificate
        return lambda: requirement.judge_certificate(certificate)

    def settle(self, judgement: Judgement | AttestedTlsError) -> Peer:
        """Ends "judging": with what `judging` returned the connection opens; what it raised is raised, and that is its end."""
        self._expect("judging")
        if isinstance(judgement, AttestedTlsError):
            self._closed_by(judgement)
        requirement, certificate = self._context.requirement, self._examination.certificate
        accepted = isinstance(judgement, Judgement)
        if accepted and requirement.judge is not None:
            verified, appraisal = judgement
            accepted = verified is not None and appraisal is not None and appraisal.allowed
        if not accepted:
            self._fail("appraise", "no judgement that allows the peer")
        if certificate is not None:
            self._context.known.keep(certificate.der, certificate)
        connection = self._connection
        self._peer = Peer(
            certificate,
            judgement.verified,
            judgement.appraisal,
            b"" if certificate is None else certificate.spki_sha256,
            connection.export_keying_material(_EXPORTER_LABEL, _EXPORTER_BYTES, b""),
            connection.get_protocol_version_name(),
            connection.get_cipher_name() or "",
            self.address,
        )
        self._state = "open"
        return self._peer

    def judge(self) -> Peer:
        """Judges the peer here and now. AttestedTlsError: he is refused, and the connection closed."""
        judging = self.judging()
        try:
            judgement = judging()
        except AttestedTlsError as error:
            return self.settle(error)
        return self.settle(judgement)

    # ---- The application's side

    def receive(self, maximum: int = RECORD_BYTES) -> bytes | None:
        """Application data: 1 .. `maximum` bytes of one record. None: nothing has come yet. b"": the peer has sent close_notify.

        AttestedTlsError: not open, an alert, damaged records, or the end of input without close_notify.
        """
        self._expect("open")
        if maximum < 1:
            raise ArgumentError(f"receive {maximum} bytes: expected 1 or more")
        try:
            return self._connection.recv(maximum if maximum < RECORD_BYTES else RECORD_BYTES)
        except SSL.WantReadError:
            if self._input_ended:
                self._fail("closed", _END_OF_INPUT)
            return None
        except SSL.ZeroReturnError:
            return b""
        except SSL.Error as error:
            self._fail("closed", _told(error))

    def send(self, data: BytesLike) -> None:
        """Application data, in records of at most 16384 bytes that end where `data` ends. AttestedTlsError: not open."""
        self._expect("open")
        try:
            self._connection.sendall(octets(data))
        except SSL.Error as error:
            self._fail("closed", _told(error))

    def close(self) -> None:
        """Sends close_notify, if there is somebody who could read it. Nothing works afterwards. Never raises."""
        if self._state != "closed":
            self._shut()

    def abort(self, error: AttestedTlsError) -> None:
        """Closes for a reason that the network's side knows, e.g. a deadline. Never raises."""
        if self._state != "closed":
            self._error = bare(error)
            self._shut()

    def _expect(self, state: State) -> None:
        if self._state != state:
            if self._state == "closed":
                raise self.failure()
            raise AttestedTlsError("handshake", f"connection {self._state}; expected {state}")

    def failure(self) -> AttestedTlsError:
        """To be raised by whoever wants to use a closed connection: why it cannot be used."""
        return bare(self._error) if self._error else AttestedTlsError("closed", "this end has closed the connection")

    def _fail(self, stage: str, message: str) -> NoReturn:
        self._closed_by(AttestedTlsError(stage, message))

    def _closed_by(self, error: AttestedTlsError) -> NoReturn:
        self._error = bare(error)
        self._shut()
        raise bare(error) from error.__cause__  # `error` itself would be a variable of a frame that it keeps: a cycle

    def _shut(self) -> None:
        was_handshake = self._state == "handshake"
        self._state = "closed"
        self._connection.set_app_data(None)
        if not was_handshake:  # an alert has been written already, or nobody is there who speaks TLS
            with contextlib.suppress(SSL.Error):
                self._connection.shutdown()


def octets(data: BytesLike) -> bytes | memoryview:
    """`data` as something of which a piece can be taken and whose length is its number of bytes. No copy."""
    return data if isinstance(data, bytes) else memoryview(data).cast("B")  # type: ignore[arg-type]  # numpy's arrays are buffers


def shown_address(name: object) -> str:
    """A socket's peer name for logs: host:port, [host]:port with IPv6, or that it is a Unix socket."""
    if isinstance(name, tuple):
        return f"[{name[0]}]:{name[1]}" if ":" in str(name[0]) else f"{name[0]}:{name[1]}"
    return "unix socket"


def _told(error: SSL.Error) -> str:
    if isinstance(error, SSL.SysCallError | SSL.ZeroReturnError):
        return _END_OF_INPUT
    return words_of(error)
