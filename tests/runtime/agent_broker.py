"""A broker in this process with the agent's images' key, for guests of one chip."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
import threading
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509 import load_pem_x509_certificate
from cryptography.x509.oid import NameOID
from runtime.agent_images import KEK

from csvfast.broker.administration import LOCAL, Administration
from csvfast.broker.config import BrokerConfig
from csvfast.broker.master import FileMaster
from csvfast.broker.model import ResourcePath
from csvfast.broker.service import Service
from csvfast.broker.store import AuditRecord, Store

CONFIGURATION = """
[store]
url = "sqlite:///broker.db"
[master]
kind = "file"
path = "master.key"
[trust]
roots = ["root.cert"]
[limits]
exempt = ["127.0.0.1"]
[verdictd]
listen = "127.0.0.1:0"
freshness = "certificate"
[kbs]
listen = "127.0.0.1:0"
"""


class RunningBroker:
    """Both doors. Attributes: doors: addresses by name. pin: of Verdictd's door, hexadecimal."""

    def __init__(self, directory: Path, root: bytes) -> None:
        directory.mkdir(mode=0o700, exist_ok=True)
        (directory / "root.cert").write_bytes(root)
        config = BrokerConfig.parse(CONFIGURATION.encode(), directory)
        self.store = Store.open(config.store_url, FileMaster.create(directory / "master.key"), create=True)
        self.administration = Administration(self.store)
        self.administration.put_resource(LOCAL, ResourcePath("default", "key", "images"), KEK)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._service = Service(config, self.store)
        self._run(self._service.__aenter__())
        self.doors = self._service.addresses

    @property
    def pin(self) -> str:
        """SHA-256 of the public key that Verdictd's door shows."""
        host, port = self.doors["verdictd"].rsplit(":", 1)
        certificate = load_pem_x509_certificate(ssl.get_server_certificate((host, int(port))).encode())
        return sha256(certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()

    def measured(self, *measures: bytes) -> None:
        self.administration.put_reference(LOCAL, "csv_measure", [measure.hex() for measure in measures], None)

    def records(self) -> list[AuditRecord]:
        return [entry.record for entry in self.store.iterate_audit()]

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._service.__aexit__())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()
        self.store.close()


def make_certificate() -> tuple[bytes, bytes]:
    """Of 127.0.0.1, signed by itself. Out: key and certificate, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "broker")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return private, certificate.public_bytes(Encoding.PEM)
