"""A KBS door on 127.0.0.1 before a real broker, store and audit log, in a thread of its own; and guests of simulated chips."""

from __future__ import annotations

import asyncio
import datetime
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Self, TypeVar

from broker.simulated_guest import SimulatedGuest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_der_private_key
from cryptography.x509.oid import NameOID

from csvfast.broker.administration import LOCAL, Administration, Administrator
from csvfast.broker.attestation import Trust
from csvfast.broker.config import Address
from csvfast.broker.core import Broker
from csvfast.broker.kbs.admin import Administrators
from csvfast.broker.kbs.admin_tokens import AdministratorKey
from csvfast.broker.kbs.app import KbsApp
from csvfast.broker.kbs.ear import TokenIssuer
from csvfast.broker.kbs.metrics import Metrics
from csvfast.broker.kbs.server import HttpLimits, KbsServer, tls_context
from csvfast.broker.limits import Limits, LimitsConfig
from csvfast.broker.master import FileMaster
from csvfast.broker.model import ResourcePath
from csvfast.broker.store import Store
from csvfast.crypto import Secret

PATH = ResourcePath("default", "key", "disk")
CONTENT = b"the key of a disk, 32 bytes long"
T = TypeVar("T")


class LoopThread:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T], seconds: float = 30) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(seconds)

    def close(self) -> None:
        self.run(self.loop.shutdown_default_executor())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


class KbsRig:
    """Store, broker, application and server. A context manager; `url` is where it listens."""

    def __init__(
        self,
        directory: Path,
        roots: tuple[Any, ...],
        *,
        url: str | None = None,
        tls: Certificates | None = None,
        http_limits: HttpLimits | None = None,
        keys: tuple[AdministratorKey, ...] = (),
        certificates: dict[str, Administrator] | None = None,
        app: Any = None,
        **limits: Any,
    ) -> None:
        self.skew = 0.0
        master = directory / "master.key"
        self.store = Store.open(
            url or f"sqlite:///{directory}/broker.db",
            FileMaster(master) if master.exists() else FileMaster.create(master),
            create=True,
            clock=self.clock,
        )
        self.limits = Limits(LimitsConfig(**{"failures": 0, "request_rate": 0, "release_rate": 0, "subject_rate": 0, **limits}))
        self.broker = Broker(self.store, Trust(roots), self.limits, clock=self.clock)
        self.administration = Administration(self.store, limits=self.limits, certificates=certificates, clock=self.clock)
        key = load_der_private_key(bytes(self.store.internal_key("token issuer", _new_key)), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self.issuer = TokenIssuer(key, clock=self.clock)
        self.metrics = Metrics()
        administrators = Administrators(self.administration, self.limits, keys)
        self.app = KbsApp(self.broker, self.issuer, administrators=administrators, metrics=self.metrics)
        self.thread = LoopThread()
        context = None if tls is None else tls_context(tls.certificate, tls.key, tls.client_ca)
        self.server = KbsServer(
            app or self.app, Address("127.0.0.1", 0), tls=context, limits=http_limits, metrics=self.metrics
        )
        self.thread.run(self.server.start())
        self.port = self.server.address.port
        self.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{self.port}"

    def clock(self) -> float:
        import time

        return time.time() + self.skew

    def register(self, guest: SimulatedGuest, content: bytes = CONTENT, path: ResourcePath = PATH) -> None:
        """One key, and the guest's measurement as a reference."""
        self.administration.put_resource(LOCAL, path, content)
        self.administration.put_reference(LOCAL, "csv_measure", [guest.measure.hex()], self.clock() + 3600)

    def token(self, *roles: str, name: str = "admin", scope: str = "*") -> str:
        secret = self.administration.create_token(LOCAL, name, roles or ("audit", "keys", "policy"), scope=scope)
        return bytes(secret).decode()

    def records(self, **filters: str) -> list[Any]:
        return [entry.record for entry in self.store.iterate_audit(**filters)]

    def close(self) -> None:
        self.thread.run(self.server.stop())
        self.thread.close()
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _new_key() -> Secret:
    key = ec.generate_private_key(ec.SECP256R1())
    return Secret(key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()))


class Certificates:
    """A CA, a server's certificate for 127.0.0.1 and a client's, as PEM files."""

    def __init__(self, directory: Path, *, clients: bool = False) -> None:
        ca_key = ec.generate_private_key(ec.SECP256R1())
        self.ca = directory / "ca.pem"
        ca = _certificate("ca", ca_key, None, None)
        self.ca.write_bytes(ca.public_bytes(Encoding.PEM))
        self.certificate, self.key, self.der = self._issue(directory, "server", ca, ca_key)
        self.client, self.client_key, self.client_der = self._issue(directory, "client", ca, ca_key)
        self.client_ca = self.ca if clients else None

    @staticmethod
    def _issue(directory: Path, name: str, ca: x509.Certificate, ca_key: Any) -> tuple[Path, Path, bytes]:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _certificate(name, key, ca, ca_key)
        paths = directory / f"{name}.pem", directory / f"{name}.key"
        paths[0].write_bytes(certificate.public_bytes(Encoding.PEM))
        paths[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        paths[1].chmod(0o600)
        return *paths, certificate.public_bytes(Encoding.DER)


def _certificate(name: str, key: Any, ca: x509.Certificate | None, ca_key: Any) -> x509.Certificate:
    import ipaddress

    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if ca is None else ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=ca is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if ca is not None:
        names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
    else:
        usage = dict.fromkeys(
            ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
             "encipher_only", "decipher_only"), False,
        )  # fmt: skip
        builder = builder.add_extension(x509.KeyUsage(**usage, key_cert_sign=True, crl_sign=True), critical=True)
    return builder.sign(key if ca is None else ca_key, hashes.SHA256())
