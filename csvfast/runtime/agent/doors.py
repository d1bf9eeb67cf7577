"""The way to a broker's keys: Verdictd's door or the KBS, behind one interface.

    with Door(configuration, attester, timed) as door:
        private = door.unwrap(layer)                   # a layer's private options, out of its packets

The TLS key is made here, the report is about it, the certificate holds both; the broker decides. A connection is made with the
first layer; keys are wiped when the door is closed. The parts of "attest to the broker" are timed, too: "load libraries", which
takes a guest longest by far, "TLS key", "report and certificate", "handshake".

Thread-safety: any thread; requests follow one another.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from csvfast.errors import AttestedTlsError, BrokerError, ContainerError, CsvfastError, ImageError
from csvfast.runtime.agent.attest import CertifiedAttester

if TYPE_CHECKING:
    from csvfast.crypto import Secret
    from csvfast.image.descriptor import Descriptor
    from csvfast.ratstls.attester import Attester
    from csvfast.runtime.agent.configuration import AgentConfiguration

__all__ = ["Door"]


class Door:
    """See the module. In: timed   gets steps and their seconds"""

    def __init__(
        self, configuration: AgentConfiguration, attester: Attester, timed: Callable[[str, float], None] = lambda *_: None
    ) -> None:
        self._configuration = configuration
        self._attester = attester
        self._timed = timed
        self._lock = threading.Lock()
        self._client: Any = None
        self._wrapper: Any = None

    def unwrap(self, layer: Descriptor) -> Secret:
        """Private options of an encrypted layer.

        ContainerError: "attestation", "broker": no proof, or no key; ImageError: its packets are none that a broker opens.
        """
        from csvfast.image.keys import unwrap_any

        with self._lock:
            if self._wrapper is None:
                self._connect()
            begin = time.monotonic()
            try:
                return unwrap_any(layer, [self._wrapper])
            except ImageError as problem:
                cause = problem.__cause__
                of_broker = (BrokerError, AttestedTlsError, OSError)
                if isinstance(cause, ExceptionGroup) and any(isinstance(one, of_broker) for one in cause.exceptions):
                    raise ContainerError("broker", str(problem)) from problem
                raise
            finally:
                self._timed("open a layer's packet", time.monotonic() - begin)

    def close(self) -> None:
        """Wipes keys, ends the connection. Idempotent."""
        with self._lock:
            wrapper, client, self._wrapper, self._client = self._wrapper, self._client, None, None
        if hasattr(wrapper, "close"):
            wrapper.close()
        if client is not None:
            client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self) -> None:
        broker = self._configuration.broker
        begin = time.monotonic()
        try:
            if broker["door"] == "verdictd":
                self._verdictd(broker)
            elif broker["door"] == "kbs":
                self._kbs(broker)
            else:
                raise ContainerError("broker", "the image is encrypted, and the agent's configuration names no broker")
        except ContainerError:
            raise
        except (CsvfastError, OSError) as problem:
            place = broker.get("address") or broker.get("url")
            raise ContainerError("broker", f"{place}: {problem}") from problem
        finally:
            self._timed("attest to the broker", time.monotonic() - begin)

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self._timed(name, time.monotonic() - begin)

    def _prepare(self) -> None:
        if isinstance(self._attester, CertifiedAttester):
            self._attester.prepare()

    def _verdictd(self, broker: dict[str, Any]) -> None:
        with self._step("load libraries"):
            from csvfast.broker.clients.verdictd import VerdictdClient
            from csvfast.image.wrappers import VerdictdDecrypt, VerdictdKeks
            from csvfast.ratstls.certificate import attest_certificate
            from csvfast.ratstls.context import Identity
            from csvfast.ratstls.keys import TlsKey
            from csvfast.ratstls.peer import Requirement

            self._prepare()

        host, _, port = broker["address"].rpartition(":")
        if not host or not port.isascii() or not port.isdigit():
            raise ContainerError("broker", f"{broker['address'][:80]!r}: expected host:port")
        known = Requirement.pinned([bytes.fromhex(broker["pin"])]) if "pin" in broker else Requirement.unattested()
        with self._step("TLS key"):
            key = TlsKey.generate("p256")
        with self._step("report and certificate"):
            identity = Identity(key, attest_certificate(key, self._attester, custom={}, layout="rats-tls"))
        client = self._client = VerdictdClient((host.strip("[]"), int(port)), self._attester, known, identity=identity)
        with self._step("handshake"):
            client.connect()
        self._wrapper = VerdictdDecrypt(client) if broker.get("decrypt") else VerdictdKeks(self._mapped(client))

    def _kbs(self, broker: dict[str, Any]) -> None:
        with self._step("load libraries"):
            from csvfast.broker.clients.kbs import KbsClient
            from csvfast.image.wrappers import KbsKeks

            self._prepare()

        url = broker["url"]
        if url.startswith("https:"):
            with _tls(broker) as tls:
                client = KbsClient(url, self._attester, tls=tls)
        else:
            client = KbsClient(url, self._attester, insecure=True)
        self._client = client
        with self._step("handshake"):
            client.handshake()  # once: a refusal stays one
        self._wrapper = KbsKeks(self._mapped(client))

    def _mapped(self, client: Any) -> Any:
        return _Mapped(client, self._configuration.keys) if self._configuration.keys else client


class _Mapped:
    """A client whose keys are found elsewhere than their ids say."""

    def __init__(self, client: Any, keys: dict[str, str]) -> None:
        self._client, self._keys = client, keys

    def get_kek(self, kid: str) -> Secret:
        return self._client.get_kek(self._keys.get(kid, kid))  # type: ignore[no-any-return]

    def get_resource(self, path: Any) -> Secret:
        return self._client.get_resource(self._keys.get(str(path), path))  # type: ignore[no-any-return]

    def decrypt(self, blobs: Sequence[Any]) -> list[Secret]:
        return self._client.decrypt(blobs)  # type: ignore[no-any-return]


@contextmanager
def _tls(broker: dict[str, Any]) -> Iterator[Any]:
    """Its certificates of authorities are a file for as long as the block runs: the ssl module reads files."""
    from csvfast.broker.clients.http import Tls

    if "ca" not in broker:
        yield Tls(pin=broker.get("pin"))
        return
    memory = os.memfd_create("csvfast-ca", os.MFD_CLOEXEC)
    try:
        os.write(memory, broker["ca"].encode())
        yield Tls(ca=Path(f"/proc/self/fd/{memory}"), pin=broker.get("pin"))
    finally:
        os.close(memory)
