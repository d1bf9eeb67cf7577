"""Registries: images over the distribution API, version 2.

    with RegistryClient(parse_reference("docker://registry.example/team/app:1")) as registry:
        descriptor, manifest = resolve_manifest(registry, "1")
        with VerifiedReader(registry.open_blob(layer), layer) as reader: ...

A registry is believed nothing: manifests are hashed here, blobs by their readers, every answer has a limit, and waiting ends.
Downloads that are cut off go on where they were. Plain HTTP is spoken to this machine alone, unless told otherwise; proxies are
not used.

Source: opencontainers/distribution-spec spec.md.
Thread-safety: RegistryClient from several threads; a reader belongs to one thread at a time.
"""

from __future__ import annotations

import http.client
import re
import ssl
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, Self
from urllib.parse import quote

from csvfast.errors import ArgumentError, ImageError, IntegrityError, RegistryError
from csvfast.image.descriptor import Descriptor, digest_of, is_digest, is_index, is_manifest, new_hash
from csvfast.image.manifest import MANIFEST_LIMIT, media_type_of, parse_json
from csvfast.image.reference import DOCKER_HUB, Reference, is_repository, is_tag
from csvfast.image.registry_auth import Authorizer, Credentials, find_credentials
from csvfast.image.registry_http import REDIRECT_LIMIT, Answer, Transport, Url, is_loopback

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from csvfast.image.layout import OciLayout

__all__ = ["Credentials", "RegistryBlob", "RegistryClient", "open_source", "open_target"]

MANIFEST_TYPES: Final = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
PAGE_LIMIT: Final = 100
PROGRESS_BYTES: Final = 1 << 20
"""What must arrive between two cuts for the first not to count any more."""

_ERROR_LIMIT: Final = 64 << 10
_HUB_HOST: Final = "registry-1.docker.io"
_AGAIN: Final = frozenset({408, 429, 500, 502, 503, 504})
_FIRST_PAUSE: Final = 0.2
_LONGEST_PAUSE: Final = 10.0
_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)\Z", re.ASCII)
_NEXT: Final = re.compile(r'<([^<>]{1,4096})>\s*;\s*rel="?next"?', re.ASCII)


class RegistryClient:
    """One repository of a registry: a BlobSource and a BlobTarget. A context manager.

    In: reference     host and name; its tag and digest are not used
        plain_http    True: http, to this host and wherever it redirects to; False: https; None: http to loopback addresses alone
        credentials   "find": those of auth.json (over https and to loopback addresses); None: as a stranger
        timeout       seconds for an answer, and for every 64 KiB of a blob
        retries       how often a request is repeated, and a download continued, without progress in between
        tls           for https; None: the system's CAs
    ArgumentError: a reference to a layout. ImageError: a broken auth.json.
    """

    def __init__(
        self,
        reference: Reference,
        *,
        plain_http: bool | None = None,
        credentials: Credentials | Literal["find"] | None = "find",
        timeout: float = 60.0,
        retries: int = 3,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        if reference.host is None:
            raise ArgumentError(f"image {reference}: expected one in a registry")
        self.reference: Final = reference
        self.retries: Final = retries
        self.subject: Final = f"{reference.host}/{reference.name}"
        self.name: Final = reference.name
        host = _HUB_HOST if reference.host == DOCKER_HUB else reference.host
        secure = Url.parse(f"https://{host}/v2/", self.subject)
        local = is_loopback(secure.host)
        plain = local if plain_http is None else plain_http
        self.base: Final = Url.parse(f"http://{host}/v2/", self.subject) if plain else secure
        self._transport = Transport(
            tls=tls, timeout=timeout, may_be_plain=lambda host: plain and (bool(plain_http) or is_loopback(host))
        )
        if credentials == "find":
            credentials = find_credentials(reference.host, reference.name) if local or not plain else None
        from csvfast import __version__

        self._agent = f"csvfast/{__version__}"
        self._authorizer = Authorizer(
            self._transport, self.base, self.name, credentials, subject=self.subject, user_agent=self._agent
        )
        self.pull: Final = f"repository:{self.name}:pull"
        self.push: Final = f"repository:{self.name}:pull,push"

    # ---- Reading

    def ping(self) -> None:
        """RegistryError: there is no registry, or it lets nobody in."""
        self._whole("GET", "/v2/", self.pull, what="/v2/")

    def resolve(self, wanted: str | None = None, /) -> tuple[Descriptor, bytes]:
        """See BlobSource. RegistryError: no such manifest, or one of more than 4 MiB. IntegrityError: other bytes."""
        wanted = "latest" if wanted is None else wanted
        self._check_wanted(wanted)
        headers = {"Accept": ", ".join(MANIFEST_TYPES)}
        for attempt in range(self.retries + 1):
            with self.request("GET", self.path(f"manifests/{wanted}"), self.pull, headers, redirects=REDIRECT_LIMIT) as answer:
                if answer.status != 200:
                    raise self.error(answer, f"manifest {wanted}")
                try:
                    data = answer.body(MANIFEST_LIMIT, self.subject)
                    break
                except (OSError, http.client.HTTPException) as error:
                    self.pause(attempt, error)
        kind = (answer.header("Content-Type") or "").partition(";")[0].strip()
        if not (is_manifest(kind) or is_index(kind)):
            kind = media_type_of(data)
        digest = wanted if is_digest(wanted) else digest_of(data)
        for promised in (digest, answer.header("Docker-Content-Digest")):
            if promised is not None and is_digest(promised):
                check = new_hash(promised)
                check.update(data)
                if promised.partition(":")[2] != check.hexdigest():
                    problem = f"manifest {wanted}: the bytes do not have the digest {promised}"
                    raise IntegrityError(self.subject, problem)
        return Descriptor(kind, digest, len(data)), data

    def open_blob(self, descriptor: Descriptor, offset: int = 0, /) -> RegistryBlob:
        """See BlobSource. RegistryError: no such blob. IntegrityError: one of another size."""
        return RegistryBlob(self, descriptor, offset)

    def tags(self) -> list[str]:
        """All tags of the repository, in the registry's order. RegistryError."""
        found: list[str] = []
        url = self.path("tags/list?n=1000")
        for _ in range(PAGE_LIMIT):
            answer, data = self._whole("GET", url, self.pull, what="tags")
            tags = parse_json(data, "tags", MANIFEST_LIMIT).get("tags") or []
            if type(tags) is not list or not all(type(one) is str and is_tag(one) for one in tags):
                raise RegistryError(self.subject, "tags: expected an array of tags", status=200)
            found += tags
            following = _NEXT.search(answer.header("Link") or "")
            if following is None:
                return found
            url = answer.url.join(following[1], self.subject)
        raise RegistryError(self.subject, f"more than {PAGE_LIMIT} pages of tags")

    # ---- Writing

    def has_blob(self, descriptor: Descriptor, /) -> bool:
        """See BlobTarget."""
        url, headers = self.place(descriptor)
        with self.request("HEAD", url, self.push, headers, redirects=REDIRECT_LIMIT) as answer:
            if answer.status == 404:
                return False
            if answer.status != 200:
                raise self.error(answer, f"blob {descriptor.digest}")
            return answer.header("Content-Length") in (None, str(descriptor.size))

    def put_blob(self, descriptor: Descriptor | None, chunks: Iterable[Buffer], /) -> Descriptor:
        """See BlobTarget. Sent in pieces of 8 MiB; a piece that is cut off goes on where it was."""
        from csvfast.image.registry_upload import upload

        return upload(self, descriptor, chunks)

    def mount(self, descriptor: Descriptor, name: str) -> bool:
        """Takes a blob over from another repository of the same registry, if the registry can; whether it did.

        In: name   of the other repository
        """
        if not is_repository(name):
            raise ArgumentError(f"repository {ascii(name)[:80]}: no such name")
        scope = f"{self.push} repository:{name}:pull"
        query = f"mount={quote(descriptor.digest, safe='')}&from={quote(name, safe='')}"
        with self.request("POST", self.path(f"blobs/uploads/?{query}"), scope, body=b"") as answer:
            if answer.status == 201:
                return True
            location = answer.header("Location")
        if answer.status == 202 and location is not None:  # an upload was begun instead
            self.request("DELETE", answer.url.join(location, self.subject), self.push).close()
        return False

    def put_manifest(self, data: bytes, media_type: str, tag: str | None = None, /) -> Descriptor:
        """See BlobTarget. RegistryError."""
        made = Descriptor.of(data, media_type)
        wanted = made.digest if tag is None else tag
        self._check_wanted(wanted)
        headers = {"Content-Type": media_type}
        with self.request("PUT", self.path(f"manifests/{wanted}"), self.push, headers, bytes(data)) as answer:
            if answer.status != 201:
                raise self.error(answer, f"manifest {wanted}")
            given = answer.header("Docker-Content-Digest")
        if given is not None and given.startswith("sha256:") and given != made.digest:
            problem = f"manifest {wanted}: stored as {ascii(given)[:80]}; expected {made.digest}"
            raise IntegrityError(self.subject, problem)
        return made

    def close(self) -> None:
        """Closes the connections; readers that are open keep theirs."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- Requests

    def path(self, rest: str) -> Url:
        """Of something in the repository."""
        return self.base._replace(target=f"/v2/{self.name}/{rest}")

    def place(self, descriptor: Descriptor) -> tuple[Url, dict[str, str]]:
        """Where a blob is, and the headers to ask for it: registries keep manifests apart."""
        if is_manifest(descriptor.media_type) or is_index(descriptor.media_type):
            return self.path(f"manifests/{descriptor.digest}"), {"Accept": ", ".join(MANIFEST_TYPES)}
        return self.path(f"blobs/{descriptor.digest}"), {}

    def request(
        self, method: str, url: Url, scope: str, headers: Mapping[str, str] | None = None, body: bytes | memoryview | None = None,
        *, redirects: int = 0, repeatable: bool = True,
    ) -> Answer:  # fmt: skip
        """One request with authorization; repeated, if it may be, while the registry is not there or too busy.

        Out: the answer, whatever its status. RegistryError: none.
        """
        for attempt in range(self.retries + 1):
            try:
                answer = self._authorized(method, url, scope, headers or {}, body, redirects, repeatable)
            except OSError as error:
                if not repeatable:
                    raise self.unreachable(error) from None
                self.pause(attempt, error)
                continue
            after = answer.header("Retry-After") or ""
            seconds = int(after) if re.fullmatch("[0-9]{1,6}", after) else 0
            if answer.status not in _AGAIN or not repeatable or attempt == self.retries or seconds > _LONGEST_PAUSE:
                return answer
            answer.close()
            self.pause(attempt, TimeoutError(f"status {answer.status}"), seconds)
        raise AssertionError  # pause() has raised

    def pause(self, attempt: int, error: Exception, least: float = 0.0) -> None:
        """Waits before the next attempt. RegistryError: there is none, or trying again is no use.

        In: attempt   of `retries`, the first is 0
            least     seconds that the registry asks for
        """
        if attempt >= self.retries or isinstance(error, ssl.SSLCertVerificationError):
            raise self.unreachable(error) from None
        time.sleep(max(min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE), least))

    def unreachable(self, error: Exception) -> RegistryError:
        """The error without an answer's status."""
        if isinstance(error, RegistryError):
            return error
        if isinstance(error, ssl.SSLCertVerificationError):
            return RegistryError(self.subject, f"certificate: {error.verify_message}")
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return RegistryError(self.subject, f"{self.base.host}:{self.base.port}: {ascii(text)[1:-1][:200]}")

    def error(self, answer: Answer, what: str) -> RegistryError:
        """What an answer with an unexpected status means. In: what   was asked for."""
        code = message = ""
        try:
            with answer:
                first = parse_json(answer.body(_ERROR_LIMIT, self.subject), "errors", _ERROR_LIMIT)["errors"][0]
            code, message = (ascii(first.get(name) or "")[1:-1][:limit] for name, limit in (("code", 64), ("message", 200)))
        except (ImageError, OSError, http.client.HTTPException, LookupError, TypeError, AttributeError):
            pass  # what it said is no error of the API's: the status is all there is
        said = f" {code}" if code else ""
        said += f": {message}" if message else ""
        if answer.status == 401 and self._authorizer.stranger:
            said += "; no credentials are known"
        return RegistryError(self.subject, f"{what}: status {answer.status}{said}", status=answer.status, code=code)

    def _authorized(
        self, method: str, url: Url, scope: str, headers: Mapping[str, str], body: bytes | memoryview | None, redirects: int,
        repeatable: bool,
    ) -> Answer:  # fmt: skip
        for last in (False, True):
            sent = {"User-Agent": self._agent, **headers}
            # An upload may go on at another host, which has no business with the token.
            if url.origin == self.base.origin and (authorization := self._authorizer.header(scope)) is not None:
                sent["Authorization"] = authorization
            answer = self._transport.send(
                method, url, sent, body, subject=self.subject, repeatable=repeatable, redirects=redirects
            )
            if last or answer.status != 401 or answer.url.origin != self.base.origin:
                return answer
            if not self._authorizer.challenged(answer.headers("WWW-Authenticate"), scope):
                return answer
            answer.close()
        raise AssertionError  # the second answer is returned

    def _whole(self, method: str, url: Url | str, scope: str, *, what: str) -> tuple[Answer, bytes]:
        target = self.base._replace(target=url) if isinstance(url, str) else url
        with self.request(method, target, scope, redirects=REDIRECT_LIMIT) as answer:
            if answer.status != 200:
                raise self.error(answer, what)
            try:
                return answer, answer.body(MANIFEST_LIMIT, self.subject)
            except (OSError, http.client.HTTPException) as error:
                raise self.unreachable(error) from None

    def _check_wanted(self, wanted: str) -> None:
        if not (is_digest(wanted) or is_tag(wanted)):
            raise ImageError(self.subject, f"{ascii(wanted)[:140]} is neither a tag nor a digest")


class RegistryBlob:
    """A blob that comes from a registry: a BlobReader that goes on after a cut. A context manager.

    Reads raise RegistryError: the registry is gone or too slow. IntegrityError: it has more or fewer bytes than promised.
    """

    def __init__(self, client: RegistryClient, descriptor: Descriptor, offset: int) -> None:
        if not 0 <= offset <= descriptor.size:
            raise ArgumentError(f"offset {offset} of a blob of {descriptor.size} bytes")
        self._client = client
        self._descriptor = descriptor
        self._what = f"blob {descriptor.digest}"
        self._at = self._cut_at = offset
        self._cuts = 0
        self._answer: Answer | None = None
        if offset < descriptor.size or not descriptor.size:
            try:
                self._open()
            except (OSError, http.client.HTTPException) as error:
                self._cut(error)

    def read(self, size: int = PROGRESS_BYTES, /) -> bytes:
        """See BlobReader."""
        # At the end, one byte is asked for, so that a surplus is seen.
        wanted = min(size, self._descriptor.size - self._at or 1) if size >= 0 else PROGRESS_BYTES
        buffer = bytearray(wanted)
        count = self.readinto(buffer) if buffer else 0
        return bytes(memoryview(buffer)[:count])

    def readinto(self, buffer: Buffer, /) -> int:
        """See BlobReader."""
        left = self._descriptor.size - self._at
        view = memoryview(buffer).cast("B")
        if not left:
            self._end()
            return 0
        view = view[:left]
        while view:
            try:
                if self._answer is None:
                    self._open()
                assert self._answer is not None
                count = self._answer.readinto(view)
                if count:
                    self._at += count
                    return count
                raise ConnectionAbortedError(f"{left} bytes are missing")
            except (OSError, http.client.HTTPException) as error:
                self._cut(error)
        return 0

    def close(self) -> None:
        """See BlobReader."""
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self) -> None:
        client, size = self._client, self._descriptor.size
        url, headers = client.place(self._descriptor)
        if self._at:
            headers["Range"] = f"bytes={self._at}-"
        self._answer = answer = client.request("GET", url, client.pull, headers, redirects=REDIRECT_LIMIT)
        try:
            if answer.status not in (200, 206):
                raise client.error(answer, self._what)
            skip, expected = self._at, size
            if answer.status == 206:
                found = _CONTENT_RANGE.match(answer.header("Content-Range") or "")
                if found is None or int(found[1]) != self._at or found[3] not in ("*", str(size)):
                    raise self._error(f"another range than the one from byte {self._at} of {size}")
                skip, expected = 0, size - self._at
            if answer.length not in (None, expected):
                raise self._other_bytes(f"{answer.length} bytes; expected {expected}")
            answer.stream()
            scrap = memoryview(bytearray(min(skip, 1 << 16)))
            while skip:  # a server that knows no ranges
                count = answer.readinto(scrap[:skip])
                if not count:
                    raise ConnectionAbortedError("the answer was cut off")
                skip -= count
        except BaseException:
            self.close()
            raise

    def _cut(self, error: Exception) -> None:
        self.close()
        if self._at - self._cut_at >= PROGRESS_BYTES:
            self._cuts = 0
        self._cut_at = self._at
        try:
            self._client.pause(self._cuts, error)
        except RegistryError as last:
            raise self._error(f"cut off at byte {self._at} of {self._descriptor.size}: {last.problem}") from None
        self._cuts += 1

    def _end(self) -> None:
        """All bytes are here: nothing may follow."""
        answer = self._answer
        if answer is None:
            return
        try:
            surplus = answer.readinto(bytearray(1))
        except (OSError, http.client.HTTPException):
            surplus = 0  # what is missing is no byte of the blob's
        self.close()
        if surplus:
            raise self._other_bytes(f"more than {self._descriptor.size} bytes; expected exactly these")

    def _other_bytes(self, problem: str) -> IntegrityError:
        return IntegrityError(self._client.subject, f"{self._what}: {problem}")

    def _error(self, problem: str) -> RegistryError:
        return RegistryError(self._client.subject, f"{self._what}: {problem}", status=0)


def open_source(reference: Reference, **options: Any) -> OciLayout | RegistryClient:
    """Where an image is read from. In: options   of RegistryClient, for registries. ImageError: there is no such layout."""
    return _open(reference, False, options)


def open_target(reference: Reference, **options: Any) -> OciLayout | RegistryClient:
    """Where an image is written to; a layout is made. In: options   of RegistryClient, for registries. ImageError, OSError."""
    return _open(reference, True, options)


def _open(reference: Reference, create: bool, options: Mapping[str, Any]) -> OciLayout | RegistryClient:
    if reference.directory is None:
        return RegistryClient(reference, **options)
    from csvfast.image.layout import OciLayout

    return OciLayout(reference.directory, create=create)
