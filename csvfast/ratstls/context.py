"""What a TLS endpoint is set up with, and the one callback in which OpenSSL asks about a peer's certificate.

    minimum version   TLS 1.3; 1.2 by option, with ECDHE and AEAD suites only
    resumption        never: no tickets, no session cache. A resumed session would skip the certificate
    renegotiation     never, and no compression
    suites            "default": OpenSSL's; "sm": TLS_SM4_GCM_SM3 with SM2 certificates on both sides (RFC 8998), TLS 1.3 only

In the callback a certificate is read, its signature, validity and binding to its key and claims are checked, and it is compared
with the pins: cheap things whose failure the peer sees as an alert. Any exception there is a refusal. Whether the evidence is
genuine and allowed is judged after the handshake, when the peer has proved that the key is his (csvfast.ratstls.connection).

A context is immutable once it has made a connection, so an endpoint that gets a new certificate makes a new context.

Source: inclavare-containers/rats-tls src/tls_wrappers/openssl/{init,negotiate}.c; pyOpenSSL; RFC 8446, RFC 8998.
Thread-safety: a context may be used by several threads, one connection by one at a time.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from cryptography import x509
from OpenSSL import SSL, crypto

from csvfast.errors import ArgumentError, AttestedTlsError, FormatError, MissingExtraError
from csvfast.ratstls.certificate import (
    CERTIFICATE_LIMIT,
    SKEW,
    attest_certificate,
    check_binding,
    check_validity,
    make_certificate,
    read_certificate,
)
from csvfast.ratstls.keys import TlsKey
from csvfast.ratstls.recent import Recent

if TYPE_CHECKING:
    from collections.abc import Mapping

    from csvfast._core import BytesLike
    from csvfast.ratstls.attester import Attester
    from csvfast.ratstls.certificate import AttestedCertificate, Layout
    from csvfast.ratstls.peer import Requirement

__all__ = ["EndpointContext", "Examination", "Identity", "TlsOptions", "bare", "sm_is_available", "words_of"]

_log: Final = logging.getLogger(__name__)

_SM_SUITE: Final = b"TLS_SM4_GCM_SM3"
_TLS12_CIPHERS: Final = b"ECDHE+AESGCM:ECDHE+CHACHA20"
_OPTIONS: Final = SSL.OP_NO_TICKET | SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_COMPRESSION

# X509_V_ERR_*: what OpenSSL may find and we judge ourselves. Dates are compared by check_binding with the configured skew; every
# certificate is self-signed; a critical evidence extension is one that OpenSSL does not know.
_TOLERATED: Final = frozenset((0, 9, 10, 18, 34))


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """Of an endpoint.

    minimum_version   "1.3" or "1.2"
    suites            "default" or "sm"
    skew              seconds by which the peer's clock may differ from ours
    """

    minimum_version: Literal["1.3", "1.2"] = "1.3"
    suites: Literal["default", "sm"] = "default"
    skew: float = SKEW

    def __post_init__(self) -> None:
        if self.minimum_version not in ("1.3", "1.2"):
            raise ArgumentError(f"minimum TLS version {self.minimum_version!r}: expected '1.3' or '1.2'")
        if self.suites not in ("default", "sm"):
            raise ArgumentError(f"suites {self.suites!r}: expected 'default' or 'sm'")
        if self.suites == "sm" and self.minimum_version != "1.3":
            raise ArgumentError("suites 'sm': RFC 8998 defines them for TLS 1.3 only")
        if not self.skew >= 0:
            raise ArgumentError(f"skew {self.skew}: expected 0 or more seconds")


_DEFAULT_OPTIONS: Final = TlsOptions()


@dataclass(frozen=True, slots=True)
class Identity:
    """Who we are: a key and the certificate about it.

    key           made in memory for the life of one process
    certificate   DER, self-signed, evidence inside or not
    """

    key: TlsKey
    certificate: bytes

    @classmethod
    def create(
        cls,
        attester: Attester | None,
        *,
        kind: str = "p256",
        custom: Mapping[str, BytesLike] | None = None,
        layout: Layout = "rats-tls",
    ) -> Identity:
        """A new key and its certificate.

        In: attester   gets the report; None: a certificate without evidence, for ends that run outside a guest
            kind       of the key: "p256", "rsa3072" or "sm2"
            custom     claims for the peer, bound into the report
            layout     of the evidence: what the peer's library reads
        """
        key = TlsKey.generate(kind)
        if attester is None:
            if custom:
                raise ArgumentError("claims without an attester: nothing would vouch for them")
            return cls(key, make_certificate(key, None))
        return cls(key, attest_certificate(key, attester, custom=custom or {}, layout=layout))

    def __repr__(self) -> str:
        return f"<Identity {self.key!r}, certificate of {len(self.certificate)} bytes>"


class Examination:
    """What the callback found on one connection: `certificate` when all is well, else `error`."""

    __slots__ = ("_seen", "certificate", "error")

    def __init__(self) -> None:
        self.certificate: AttestedCertificate | None = None
        self.error: AttestedTlsError | None = None
        self._seen = False

    def examine(
        self,
        x509_object: crypto.X509,
        errno: int,
        depth: int,
        requirement: Requirement,
        options: TlsOptions,
        known: Recent[AttestedCertificate],
    ) -> bool:
        """One call of the callback. OpenSSL calls for each of its findings, then once more: the certificate is read once."""
        if self.error is not None:
            return False
        if depth or errno not in _TOLERATED:
            raise AttestedTlsError("certificate", f"X.509 verification error {errno} at depth {depth}; expected one, self-signed")
        if self._seen:
            return self.certificate is not None
        self._seen = True
        encoded = crypto.dump_certificate(crypto.FILETYPE_ASN1, x509_object)
        certificate = known.find(encoded)
        if certificate is not None:
            check_validity(certificate, skew=options.skew)
        else:
            try:
                certificate = read_certificate(encoded)
            except FormatError as error:
                raise AttestedTlsError("certificate", str(error)) from None
            check_binding(certificate, skew=options.skew)
        if options.suites == "sm" and certificate.key_kind != "sm2":
            raise AttestedTlsError("certificate", f"a {certificate.key_kind} key; expected an SM2 key")
        requirement.check_shown(certificate)
        self.certificate = certificate
        return True


class EndpointContext:
    """One endpoint's TLS context. Made by `server` or `client`; AttestedConnection makes connections of it.

    known   certificates of peers that were accepted: the same bytes are read and their binding is checked once. Their validity is
            looked at, and the peer is judged, each time
    """

    __slots__ = ("context", "identity", "is_server", "known", "options", "requirement")

    def __init__(self, identity: Identity | None, requirement: Requirement, options: TlsOptions, is_server: bool) -> None:
        self.identity: Final = identity
        self.requirement: Final = requirement
        self.options: Final = options
        self.is_server: Final = is_server
        self.known: Final[Recent[AttestedCertificate]] = Recent()
        self.context: Final = self._build()
        if requirement.is_open:
            _log.warning("peers of this TLS %s are not attested: anybody is accepted", "server" if is_server else "client")

    @classmethod
    def server(cls, identity: Identity, requirement: Requirement, options: TlsOptions = _DEFAULT_OPTIONS) -> EndpointContext:
        """For a server. ArgumentError: the certificate is not of the key; MissingExtraError: no "sm" suites."""
        return cls(identity, requirement, options, True)

    @classmethod
    def client(
        cls, identity: Identity | None, requirement: Requirement, options: TlsOptions = _DEFAULT_OPTIONS
    ) -> EndpointContext:
        """For a client; None: it shows no certificate. Raises as `server` does."""
        if not requirement.asks_certificate:
            raise ArgumentError("a client always sees the server's certificate: expected unattested()")
        return cls(identity, requirement, options, False)

    @property
    def ends_silently(self) -> bool:
        """True when nothing of the handshake is left to be sent once `advance` has ended it: what there is waits for the answer.

        With TLS 1.3 the client has the last word. What OpenSSL's server still writes are tickets that it does not remember: they
        cannot be switched off through pyOpenSSL.
        """
        return self.is_server and self.options.minimum_version == "1.3"

    def _build(self) -> SSL.Context:
        context = SSL.Context(SSL.TLS_SERVER_METHOD if self.is_server else SSL.TLS_CLIENT_METHOD)
        context.set_min_proto_version(SSL.TLS1_3_VERSION if self.options.minimum_version == "1.3" else SSL.TLS1_2_VERSION)
        context.set_options(_OPTIONS)
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        context.set_mode(SSL.MODE_RELEASE_BUFFERS)  # thousands of connections wait; buffers of 34 KB each would wait with them
        context.set_cipher_list(_TLS12_CIPHERS)
        if self.options.suites == "sm":
            _need_sm(context)
            if self.identity is not None and self.identity.key.kind != "sm2":
                raise ArgumentError(f"suites 'sm' with a {self.identity.key.kind} key: expected an SM2 key")
        if self.identity is not None:
            self._use(context, self.identity)
        mode = SSL.VERIFY_NONE
        if self.requirement.asks_certificate:
            mode = SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT
        requirement, options, known = self.requirement, self.options, self.known

        def examine(connection: SSL.Connection, x509_object: crypto.X509, errno: int, depth: int, _ok: int) -> bool:
            examination = connection.get_app_data()
            if not isinstance(examination, Examination):
                return False
            try:
                return examination.examine(x509_object, errno, depth, requirement, options, known)
            except AttestedTlsError as error:
                examination.error = bare(error)
            except Exception as error:
                examination.error = AttestedTlsError("certificate", f"{type(error).__name__}: {error}")
            examination.certificate = None
            return False

        context.set_verify(mode, examine)
        return context

    @staticmethod
    def _use(context: SSL.Context, identity: Identity) -> None:
        try:
            context.use_certificate(x509.load_der_x509_certificate(identity.certificate))
            identity.key.use_in(context)
            context.check_privatekey()
        except (SSL.Error, ValueError) as error:
            raise ArgumentError(f"identity: key and certificate do not fit each other ({words_of(error)})") from error


def bare(error: AttestedTlsError) -> AttestedTlsError:
    """The same error without the calls it went through, which would keep a connection in memory that keeps the error."""
    return AttestedTlsError(error.stage, str(error).removeprefix(f"{error.stage}: "))


def words_of(error: Exception) -> str:
    """What OpenSSL has to say, without numbers and function names."""
    if isinstance(error, SSL.Error) and error.args and isinstance(error.args[0], list):
        return ", ".join(str(entry[-1]) for entry in error.args[0]) or "no reason given"
    return str(error) or type(error).__name__


def sm_is_available() -> bool:
    """True when the installed OpenSSL has TLS_SM4_GCM_SM3 and SM2 signatures. Found out by a handshake, once."""
    global _sm_available
    if _sm_available is None:
        _sm_available = _try_sm()
    return _sm_available


_sm_available: bool | None = None


def _try_sm() -> bool:
    try:
        key = TlsKey.generate("sm2")
        identity = Identity(key, make_certificate(key, None))
        ends = []
        for method in (SSL.TLS_SERVER_METHOD, SSL.TLS_CLIENT_METHOD):
            context = SSL.Context(method)
            context.set_tls13_ciphersuites(_SM_SUITE)
            EndpointContext._use(context, identity)
            ends.append(SSL.Connection(context, None))
        ends[0].set_accept_state()
        ends[1].set_connect_state()
        for _ in range(4):
            for near, far in (ends, ends[::-1]):
                with contextlib.suppress(SSL.WantReadError):
                    near.do_handshake()
                with contextlib.suppress(SSL.WantReadError):
                    far.bio_write(near.bio_read(CERTIFICATE_LIMIT))
    except (SSL.Error, ArgumentError, AttributeError):
        return False
    return ends[1].get_cipher_name() == _SM_SUITE.decode()


def _need_sm(context: SSL.Context) -> None:
    if not sm_is_available():
        raise MissingExtraError(
            "the installed OpenSSL has no TLS_SM4_GCM_SM3 or no SM2 signatures in TLS: pip install -U 'csvfast[ratstls]'"
        )
    context.set_tls13_ciphersuites(_SM_SUITE)
