"""Key providers as key wrappers: over gRPC, or commands that read JSON and write JSON.

    {"key-providers": {"attestation-agent": {"grpc": "unix:///run/csvfast/keyprovider.sock"},
                       "other": {"cmd": {"path": "/usr/bin/provider", "args": ["a"]}}}}

That is the configuration that $OCICRYPT_KEYPROVIDER_CONFIG names for skopeo and others, and for csvfast.

Source: containers/ocicrypt config/keyprovider-config/config.go, keywrap/keyprovider/keyprovider.go.
Thread-safety: threads may share a provider.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Self, cast

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
_PAUSE: Final = 0.01


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
        with subprocess.Popen(
            self._command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, start_new_session=True
        ) as process:  # fmt: skip
            try:
                answer, said = self._exchange(process, memoryview(request))
            except BaseException:
                # It has not been waited for, so that the number is still its own and its children's.
                os.killpg(process.pid, signal.SIGKILL)
                raise
            status = process.wait()
        if status:
            text = "".join(one if one.isprintable() else " " for one in said.decode(errors="replace"))
            text = " ".join(text.split())[-300:]
            raise ImageError(self.name, f"{self._command[0]} ended with status {status}{': ' if text else ''}{text}")
        return bytes(answer)

    def _exchange(self, process: subprocess.Popen[bytes], request: memoryview) -> tuple[bytearray, bytearray]:
        """What it writes and what it says beside that, when it has ended.

        ImageError: too much, or too late, be it for a child that outlives it and holds its output.
        """
        until = time.monotonic() + self._timeout
        given, out, beside = process.stdin, process.stdout, process.stderr
        assert given is not None
        assert out is not None
        assert beside is not None
        answer, said = bytearray(), bytearray()
        with selectors.DefaultSelector() as selector:
            for stream, event in ((given, selectors.EVENT_WRITE), (out, selectors.EVENT_READ), (beside, selectors.EVENT_READ)):
                os.set_blocking(stream.fileno(), False)
                selector.register(stream, event)
            while not out.closed or os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                left = until - time.monotonic()
                if left <= 0:
                    raise ImageError(self.name, f"{self._command[0]} did not answer within {self._timeout:g} seconds")
                for key, _events in selector.select(min(left, _PAUSE) if out.closed else left):
                    if key.fileobj is given:
                        request = _written(given, request)
                        more = len(request) > 0
                    else:
                        more = _read(out, answer) if key.fileobj is out else _read(beside, said)
                    if len(answer) > _ANSWER_BYTES:
                        raise ImageError(self.name, f"{self._command[0]} answered more than {_ANSWER_BYTES} bytes")
                    del said[: -64 << 10]  # what it says last tells why it fails
                    if not more:
                        selector.unregister(key.fileobj)
                        cast(IO[bytes], key.fileobj).close()
            while not beside.closed and len(said) < 128 << 10 and _read(beside, said):
                pass
        return answer, said


def _written(stream: IO[bytes], data: memoryview) -> memoryview:
    """What is left to be written."""
    try:
        return data[os.write(stream.fileno(), data) :]
    except BlockingIOError:
        return data
    except OSError:  # it does not read its input, or has ended: the answer and the status tell
        return data[:0]


def _read(stream: IO[bytes], into: bytearray) -> bool:
    """More of a stream that has some; False at its end, and where there is nothing yet."""
    try:
        data = os.read(stream.fileno(), 64 << 10)
    except BlockingIOError:
        return False
    into += data
    return len(data) > 0


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
