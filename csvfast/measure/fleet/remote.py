"""Sources with a URL: s3, http and whatever else fsspec and its packages open (extra "s3").

    csvfast measure batch s3://bucket/images https://example.org/disk.img

A source is read in ranges of BLOCK_BYTES, the next ones while this one is hashed. A connection that is reset costs the range it
was in: that one is asked for again, and what was read before stays. A version is known by its etag: an object that is replaced
while it is read is "changed", and the next run measures only objects whose etag is another one. Credentials come from where the
packages look for them (environment, their files), on each machine; a URL with a password in it is refused: ledgers show URLs.

Source: filesystem-spec.readthedocs.io (AbstractFileSystem, AbstractBufferedFile), s3fs.readthedocs.io, RFC 9110 (8.8.3, 14).
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, Final, TypeVar

from csvfast._extras import need
from csvfast.measure.errors import (
    ParameterError,
    SourceChangedError,
    SourceError,
    SourceKindError,
    SourceNotFoundError,
    SourceTruncatedError,
    SourceUnreadableError,
)
from csvfast.measure.fleet.providers import CredentialsError, Found, SourceConnectionError
from csvfast.measure.fleet.rows import Identity

__all__ = ["RemoteProvider", "RemoteSource", "knows", "provider"]

BLOCK_BYTES: Final = 1 << 20
AHEAD_BLOCKS: Final = 16
"""Read ahead by all open sources together; at least one by each."""
ATTEMPTS: Final = 5
PAUSE_SECONDS: Final = 0.1
WAIT_SECONDS: Final = 20.0
"""For a server that says nothing."""

_Answer = TypeVar("_Answer")


_LOCAL: Final = ("file", "local", "memory", "data")


def knows(scheme: str) -> bool:
    """Whether fsspec is there and has heard of a scheme; the package that opens it may be missing all the same."""
    try:
        from fsspec.registry import available_protocols  # type: ignore[import-untyped]
    except ImportError:
        return scheme in ("s3", "http", "https")
    return scheme in available_protocols() and scheme not in _LOCAL


class RemoteProvider:
    """See SourceProvider. Thread-safety: safe from any thread."""

    def expand(self, source: str) -> Iterator[Found]:
        """An object; or everything below a prefix or that fits a pattern with "*", sorted."""
        files, path = _filesystem(source)
        try:
            found = _expand(files, path)
        except Exception as error:
            raise _translated(source, error, files, path) from error
        if not found:
            raise SourceNotFoundError(f"{source}: no such object, and nothing below it")
        for name, info in found:
            url = source if name == path else files.unstrip_protocol(name)
            yield Found(url, url, _identity(info))

    def open(self, location: str) -> RemoteSource:
        """An object, by its URL."""
        return RemoteSource(location)


provider: Final = RemoteProvider()


class RemoteSource:
    """An object that is open: see Readable.

    Raises: SourceError of the kind that fits, MissingExtraError, ParameterError (a scheme nobody knows).
    Thread-safety: used by one thread at a time.
    """

    def __init__(self, url: str) -> None:
        self.path: Final = url
        self._files, self._place = _filesystem(url)
        try:
            if "http" in self._files.protocol:  # whose open files know nothing but their size
                info = self._files.info(self._place)
                same = {"If-Match": info["ETag"]} if _identity(info).etag and "ETag" in info else {}
                self._file = self._files.open(self._place, "rb", cache_type="none", size=info["size"], headers=same)
            else:
                self._file = self._files.open(self._place, "rb", cache_type="none")
                info = self._file.details
        except Exception as error:
            raise _translated(url, error, self._files, self._place) from error
        self._identity = _identity(info)
        if self._identity.size is None:
            self._file.close()
            raise SourceKindError(f"{url}: the server does not say its size; expected an object of known size")
        self.size: Final = self._identity.size
        self._blocks: dict[int, Future[bytes]] = {}
        _opened.add(1)
        self._open = True

    @property
    def identity(self) -> Identity:
        """Size and etag."""
        return self._identity

    def read_at(self, buffer: memoryview, offset: int) -> None:
        """Fills the buffer. Raises SourceError."""
        done = 0
        while done < len(buffer):
            number, start = divmod(offset + done, BLOCK_BYTES)
            piece = memoryview(self._block(number))[start : start + len(buffer) - done]
            if not piece:
                raise SourceTruncatedError(f"{self.path}: ended at byte {offset + done}; expected {self.size} bytes")
            buffer[done : done + len(piece)] = piece
            done += len(piece)

    def check_unchanged(self) -> None:
        """Asks the server. Raises SourceChangedError, SourceNotFoundError."""

        def look() -> Identity:
            self._files.invalidate_cache()
            return _identity(self._files.info(self._place))

        now = self._tried(look)
        if now != self._identity:
            was = self._identity.to_json()
            raise SourceChangedError(f"{self.path}: changed while it was measured: was {was}, is {now.to_json()}")

    def close(self) -> None:
        """Forgets what was read ahead."""
        if self._open:
            self._open = False
            _opened.add(-1)
            for future in self._blocks.values():
                future.cancel()
            self._blocks.clear()
            self._file.close()

    def _block(self, number: int) -> bytes:
        for old in [one for one in self._blocks if one < number or one > number + AHEAD_BLOCKS]:
            self._blocks.pop(old).cancel()
        last = (self.size - 1) // BLOCK_BYTES
        for one in range(number, min(number + max(AHEAD_BLOCKS // _opened.count, 1), last) + 1):
            if one not in self._blocks:
                self._blocks[one] = _readers().submit(self._fetch, one)
        return self._blocks[number].result()

    def _fetch(self, number: int) -> bytes:
        start = number * BLOCK_BYTES
        stop = min(start + BLOCK_BYTES, self.size)

        def read() -> bytes:
            data = bytes(self._file._fetch_range(start, stop))
            if len(data) != stop - start:
                raise SourceConnectionError(f"{self.path}: {len(data)} bytes from byte {start} on; expected {stop - start}")
            return data

        return self._tried(read)

    def _tried(self, ask: Callable[[], _Answer]) -> _Answer:
        """What `ask` gives, asked again after a connection has failed."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return ask()
            except Exception as error:
                problem = _translated(self.path, error, self._files, self._place)
                if not isinstance(problem, SourceConnectionError) or attempt == ATTEMPTS or not self._open:
                    raise problem from error
            time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
        raise AssertionError


class _Count:
    """How many sources are open in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.count = 0

    def add(self, more: int) -> None:
        with self._lock:
            self.count += more


_opened: Final = _Count()


@cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(16, thread_name_prefix="csvfast-remote")


def _filesystem(url: str) -> tuple[Any, str]:
    need("s3", "fsspec")
    import fsspec  # type: ignore[import-untyped]

    scheme, _, rest = url.partition("://")
    if re.match(r"[^/?#]*@", rest) and "@" in rest.split("/", 1)[0]:
        shown = f"{scheme}://...@{rest.split('/', 1)[0].rpartition('@')[2]}"
        raise ParameterError(f"{shown}: has a user or a password in it; expected them where {scheme} looks for credentials")
    try:
        files = _files_of(scheme)
    except ImportError as error:
        need("s3", "s3fs") if scheme == "s3" else need("s3", "aiohttp")
        raise SourceUnreadableError(f"{url}: needs another package: {_one_line(error)}") from error
    except ValueError as error:
        known = "s3, http, https"
        raise ParameterError(f"{url}: nothing opens {scheme!r} URLs; expected a path or one of the schemes: {known}") from error
    try:
        return files, files._strip_protocol(url)
    except fsspec.exceptions.FSTimeoutError as error:  # pragma: no cover - some look things up here
        raise SourceConnectionError(f"{url}: does not answer in time") from error


@cache
def _files_of(scheme: str) -> Any:
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme == "s3":
        options["config_kwargs"] = {"retries": {"max_attempts": 1}, "read_timeout": WAIT_SECONDS}
    if scheme in ("http", "https"):
        need("s3", "aiohttp")
        from aiohttp import ClientTimeout

        options["client_kwargs"] = {"timeout": ClientTimeout(total=None, sock_connect=WAIT_SECONDS, sock_read=WAIT_SECONDS)}
    files = fsspec.filesystem(scheme, **options)
    if scheme == "s3":
        files.retries = 1  # this module asks again, and knows what for
    return files


def _expand(files: Any, path: str) -> list[tuple[str, dict[str, Any]]]:
    if "*" in path and not path.startswith(("http://", "https://")):
        found = files.glob(path, detail=True)
        return sorted((name, info) for name, info in found.items() if info["type"] == "file")
    info = files.info(path)
    if info["type"] == "file":
        return [(path, info)]
    return sorted((name, one) for name, one in files.find(path, detail=True).items() if one["type"] == "file")


def _identity(info: dict[str, Any]) -> Identity:
    etag = next((str(info[key]).strip('"') for key in ("ETag", "etag") if info.get(key)), None)
    if etag is not None and etag.startswith("W/"):  # a weak one promises the same meaning, not the same bytes
        etag = None
    if etag is None:
        times = ("LastModified", "last_modified", "Last-Modified", "updated", "mtime", "modify")
        etag = next((f"modified {info[key]}" for key in times if info.get(key)), None)
    size = info.get("size")
    return Identity(None if size is None else int(size), etag=etag)


_CONNECTION: Final = {
    "ClientConnectionError",
    "ClientPayloadError",
    "ConnectionError",
    "FSTimeoutError",
    "HTTPClientError",
    "IncompleteRead",
    "ResponseParserError",
    "ServerDisconnectedError",
    "TimeoutError",
}
_CREDENTIALS: Final = {"CredentialRetrievalError", "NoCredentialsError", "PartialCredentialsError", "PermissionError", "SSOError"}
_REFUSALS: Final = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired", "RequestExpired"}


def _translated(url: str, error: BaseException, files: Any, path: str) -> SourceError:
    """The error of this package that says what happened, without anything secret."""
    if isinstance(error, SourceError):
        return error
    chain = list(_chain(error))
    if "s3" in files.protocol and any(map(_is_dumb, chain)):
        # HEAD has no body, so the server could not say why: a GET can.
        try:
            files.cat_file(path, start=0, end=1)
        except Exception as better:
            chain = list(_chain(better))
    for one in chain:
        names = {kind.__name__ for kind in type(one).__mro__}
        status = getattr(one, "status", None)
        response = getattr(one, "response", None)
        code = response.get("Error", {}).get("Code", "") if isinstance(response, dict) else ""
        if names & _CREDENTIALS or code in _REFUSALS or status in (401, 403):
            why = "not authorized" if status else _one_line(one)
            return CredentialsError(f"{url}: refused: {why}; expected credentials that are valid there")
        if "FileExpired" in names or code == "PreconditionFailed" or status == 412:
            return SourceChangedError(f"{url}: changed while it was measured: another version has taken its place")
        if status == 404:
            return SourceNotFoundError(f"{url}: no such object")
        if names & _CONNECTION or (status is not None and status >= 500) or code in ("InternalError", "SlowDown", "503", "500"):
            why = f"status {status}" if status else _one_line(one)
            return SourceConnectionError(f"{url}: the connection failed: {why}")
    if isinstance(error, FileNotFoundError):
        return SourceNotFoundError(f"{url}: no such object")
    if isinstance(error, IsADirectoryError):
        return SourceKindError(f"{url}: is a directory; expected an object")
    if isinstance(error, ValueError) and "range" in str(error):
        return SourceUnreadableError(f"{url}: the server gives no ranges; expected one that does")
    return SourceUnreadableError(f"{url}: cannot be read: {_one_line(error)}")


def _is_dumb(error: BaseException) -> bool:
    return "Bad Request" in str(error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from, innermost first: libraries say "not found" for whatever they met."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__
    return reversed(seen)


def _one_line(error: BaseException) -> str:
    response = getattr(error, "response", None)
    said = response.get("Error", {}).get("Message") if isinstance(response, dict) else None
    return " ".join(str(said or error).split())[:200].rstrip(".") or type(error).__name__
