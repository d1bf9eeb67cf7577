"""A registry in this process: the distribution API over an OCI layout, for tests, demonstrations, and guests on this machine.

    with EmbeddedRegistry(directory) as registry:
        f"docker://{registry.address}/team/app:1"

The layout's tags are whole names: what is pushed as team/app:1 is also oci:DIRECTORY:team/app:1. A tag without a name, as other
tools write it into layouts, is offered in the repository `image`. All repositories share their blobs. Plain HTTP: it listens on
loopback addresses alone, unless told otherwise.

Source: opencontainers/distribution-spec spec.md.
Thread-safety: the server runs in a thread of its own; start and stop it from one thread.
"""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from csvfast._extras import need

need("broker", "starlette", "uvicorn")

import uvicorn  # noqa: E402 - it may be missing

from csvfast.crypto import Secret  # noqa: E402
from csvfast.errors import ArgumentError, RegistryError  # noqa: E402
from csvfast.image.layout import OciLayout  # noqa: E402
from csvfast.image.registry_http import is_loopback  # noqa: E402
from csvfast.image.server_app import RegistryApplication  # noqa: E402

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["EmbeddedRegistry"]

_START_SECONDS: Final = 30.0
_STOP_SECONDS: Final = 5
_CONNECTIONS: Final = 256
_BACKLOG: Final = 128
_PAUSE: Final = 0.005


class EmbeddedRegistry:
    """The server: `start` and `stop`, or a context manager.

    In: directory       of an OCI layout, which is made if it is missing (unless read_only)
        host, port      0: any free one
        read_only       nothing can be pushed or deleted
        token           who asks must show it, as bearer or as anybody's password
        insecure_http   listen elsewhere than on a loopback address, too
    ArgumentError: no loopback address. ImageError: no layout. OSError.
    """

    def __init__(
        self,
        directory: Path | str,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        read_only: bool = False,
        token: Secret | Buffer | None = None,
        insecure_http: bool = False,
    ) -> None:
        if not (insecure_http or is_loopback(host)):
            raise ArgumentError(f"{ascii(host)[:80]}: plain HTTP; expected a loopback address, or insecure_http")
        self.layout: Final = OciLayout(directory, create=not read_only)
        self.host: Final = host
        self.port = port
        self._application = RegistryApplication(
            self.layout, read_only=read_only, token=token if token is None or isinstance(token, Secret) else Secret(token)
        )
        self._listener: socket.socket | None = None
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> str:
        """host:port, as references have it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """http://host:port."""
        return f"http://{self.address}"

    def start(self) -> None:
        """Listens; when it returns, requests are answered. OSError: the address is taken. RegistryError: it does not start."""
        if self._thread is not None:
            raise ArgumentError("this registry is running already")
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listener = socket.create_server((self.host, self.port), family=family, backlog=_BACKLOG)
        config = uvicorn.Config(
            self._application, lifespan="off", ws="none", log_config=None, log_level="error", access_log=False,
            server_header=False, limit_concurrency=_CONNECTIONS, timeout_graceful_shutdown=_STOP_SECONDS,
        )  # fmt: skip
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), name="csvfast-registry", daemon=True)
        self.port = listener.getsockname()[1]
        self._listener, self._server, self._thread = listener, server, thread
        thread.start()
        until = time.monotonic() + _START_SECONDS
        while not server.started:
            if not thread.is_alive() or time.monotonic() > until:
                self.stop()
                raise RegistryError(self.address, "the registry does not start")
            time.sleep(_PAUSE)

    def stop(self) -> None:
        """Ends it; uploads that are not complete leave nothing. May be called twice."""
        server, thread, listener = self._server, self._thread, self._listener
        self._server = self._thread = self._listener = None
        if server is not None and thread is not None:
            server.should_exit = True
            thread.join(2 * _STOP_SECONDS)
            if thread.is_alive():
                server.force_exit = True
                thread.join(_STOP_SECONDS)
        if listener is not None:
            listener.close()
        self._application.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.stop()
