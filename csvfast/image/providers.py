"""Key providers as key wrappers: over gRPC, or commands that read JSON and write JSON.

    {"key-providers": {"attestation-agent": {"grpc": "unix:///run/csvfast/keyprovider.sock"},
                       "other": {"cmd": {"path": "/usr/bin/provider", "args": ["a"]}}}}

That is the configuration that $OCICRYPT_KEYPROVIDER_CONFIG names for skopeo and others, and for csvfast.

Source: containers/ocicrypt config/keyprovider-config/config.go, keywrap/keyprovider/keyprovider.go.
Thread-safety: threads may share a provider.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from csvfast.errors import ImageError, RequestError
from csvfast.image.annotations import check_scheme

if TYPE_CHECKING:
    from csvfast.broker.clients.keyprovider import ChannelTls, KeyProviderClient
    from csvfast.crypto import Secret

__all__ = ["CONFIGURATION", "CommandProvider", "GrpcProvider", "Provider", "make_provider", "read_configuration"]

CONFIGURATION: Final = "OCICRYPT_KEYPROVIDER_CONFIG"
"""Environment variable: path of the configuration."""

_CONFIGURATION_BYTES: Final = 1 << 20
_ANSWER_BYTES: Final = 4 << 20
_TIMEOUT: Final = 60.0


class Provider:
    """What both kinds have in common. In: parameters   what stands behind provider:NAME: unless a call brings its own."""

    def __init__(self, provider: str, parameters: str = "") -> None:
        self.name: str = f"provider {provider}"
        self.scheme: str = check_scheme(f"provider.{provider}")
        self._provider = provider
        self._parameters = parameters

    def opens(self, scheme: str) -> bool:
        """Its own, and no other provider's, as ocicrypt has it."""
        return scheme == self.scheme

    def wrap(self, private: Secret, parameters: str = "") -> bytes:
        """As KeyWrapper."""
        raise NotImplementedError

    def unwrap(self, packet: bytes, parameters: str = "") -> Secret:
        """As KeyWrapper."""
        raise NotImplementedError

    def close(self) -> None:
        """Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


class GrpcProvider(Provider):
    """A provider behind gRPC.

    In: address     "host:port" or "unix:///path"
        token, tls  as KeyProviderClient
    MissingExtraError: gRPC is not installed.
    """

    def __init__(
        self,
        provider: str,
        address: str,
        parameters: str = "",
        *,
        token: Secret | str | None = None,
        tls: ChannelTls | None = None,
        timeout: float = _TIMEOUT,
    ) -> None:
        from csvfast._extras import need

        need("broker", "grpc", "google.protobuf")
        from csvfast.broker.clients.keyprovider import KeyProviderClient

        super().__init__(provider, parameters)
        self._client: KeyProviderClient = KeyProviderClient(
            address, token=token, tls=tls, provider=provider, timeout=timeout
        )  # fmt: skip

    def wrap(self, private: Secret, parameters: str = "") -> bytes:
        """As KeyWrapper."""
        return self._client.wrap(private, parameters or self._parameters)

    def unwrap(self, packet: bytes, parameters: str = "") -> Secret:
        """As KeyWrapper."""
        return self._client.unwrap(packet, parameters or self._parameters)

    def close(self) -> None:
        """Closes the channel."""
        self._client.close()


class CommandProvider(Provider):
    """A provider that is a program: a request on its standard input, the answer on its standard output, exit status 0."""

    def __init__(
        self, provider: str, path: str, arguments: Sequence[str] = (), parameters: str = "", *, timeout: float = _TIMEOUT
    ) -> None:
        super().__init__(provider, parameters)
        self._command = [path, *arguments]
        self._timeout = timeout

    def wrap(self, private: Secret, parameters: str = "") -> bytes:
        """As KeyWrapper."""
        from csvfast.broker.keyprovider.messages import read_wrap_reply, wrap_request

        given = [(parameters or self._parameters).encode()]
        return read_wrap_reply(self._run(wrap_request(self._provider, given, private)))

    def unwrap(self, packet: bytes, parameters: str = "") -> Secret:
        """As KeyWrapper."""
        from csvfast.broker.keyprovider.messages import read_unwrap_reply, unwrap_request

        given = [(parameters or self._parameters).encode()]
        return read_unwrap_reply(self._run(unwrap_request(self._provider, given, packet)))

    def _run(self, request: bytes) -> bytes:
        pipe = subprocess.PIPE
        with subprocess.Popen(self._command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True) as process:
            late = threading.Event()

            def stop() -> None:
                late.set()
                process.kill()

            timer = threading.Timer(self._timeout, stop)
            said: list[bytes] = []
            writer = threading.Thread(target=_write, args=(process.stdin, request))
            listener = threading.Thread(target=_read, args=(process.stderr, said))
            for thread in (timer, writer, listener):
                thread.start()
            try:
                assert process.stdout is not None
                answer = process.stdout.read(_ANSWER_BYTES + 1)
                if len(answer) > _ANSWER_BYTES:
                    process.kill()
                status = process.wait()
            finally:
                process.kill()
                timer.cancel()
                for thread in (timer, writer, listener):
                    thread.join()
        if late.is_set():
            raise ImageError(self.name, f"{self._command[0]} did not answer within {self._timeout:g} seconds")
        if len(answer) > _ANSWER_BYTES:
            raise ImageError(self.name, f"{self._command[0]} answered more than {_ANSWER_BYTES} bytes")
        if status:
            text = " ".join(b"".join(said).decode(errors="replace").split())[-300:]
            raise ImageError(self.name, f"{self._command[0]} ended with status {status}{': ' if text else ''}{text}")
        return answer


def _write(stream: Any, data: bytes) -> None:
    try:
        with stream:
            stream.write(data)
    except OSError:  # it does not read its input, or has ended: the answer and the status tell
        pass


def _read(stream: Any, into: list[bytes]) -> None:
    # What it says beyond the first 64 KiB is read, so that it does not wait, and forgotten.
    kept = 0
    while block := stream.read1(64 << 10):
        if kept < 64 << 10:
            into.append(block)
            kept += len(block)


def read_configuration(path: Path | None = None) -> dict[str, dict[str, Any]]:
    """The providers of a configuration by their names. In: path   None: what $OCICRYPT_KEYPROVIDER_CONFIG names.

    ImageError: nothing is named there, or it is no configuration. OSError: it cannot be read.
    """
    from csvfast.broker.json_input import loads

    if path is None:
        named = os.environ.get(CONFIGURATION)
        if not named:
            raise ImageError("key providers", f"no configuration; expected {CONFIGURATION} to name one")
        path = Path(named)
    subject = f"key providers in {path}"
    with path.open("rb") as file:
        data = file.read(_CONFIGURATION_BYTES + 1)
    try:
        document = loads(data, "configuration", limit=_CONFIGURATION_BYTES)
    except RequestError as error:
        raise ImageError(subject, str(error)) from None
    providers = document.get("key-providers") if type(document) is dict else None
    if type(providers) is not dict or not all(type(one) is dict for one in providers.values()):
        raise ImageError(subject, 'expected {"key-providers": {"NAME": {"grpc": "host:port"} or {"cmd": {"path": "..."}}}}')
    return providers


def make_provider(name: str, attributes: Mapping[str, Any], parameters: str = "") -> Provider:
    """A provider from its part of the configuration. ImageError: neither grpc nor cmd."""
    subject = f"key provider {ascii(name)[:60]}"
    command, address = attributes.get("cmd"), attributes.get("grpc")
    if type(command) is dict:
        path, arguments = command.get("path"), command.get("args") or []
        if type(path) is not str or not path or type(arguments) is not list or not all(type(one) is str for one in arguments):
            raise ImageError(subject, 'cmd; expected {"path": "...", "args": ["...", ...]}')
        return CommandProvider(name, path, arguments, parameters)
    if type(address) is str and address:
        if attributes.get("grpc-tls") is not None:
            raise ImageError(subject, "grpc-tls; expected grpc without it, or a provider made by GrpcProvider(tls=...)")
        return GrpcProvider(name, address, parameters)
    raise ImageError(subject, f"{', '.join(map(ascii, attributes))[:100] or 'nothing'}; expected grpc or cmd")
