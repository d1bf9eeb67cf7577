"""A broker administered from another machine, by the calls of csvfast.broker.administration.Administration.

    with KbsAdministration("https://broker:8080", token, tls=Tls(ca=Path("ca.pem"))) as desk:
        desk.put_resource(LOCAL, ResourcePath("default", "key", "disk"), secret)

The methods have the same names, parameters, results and errors, so a command line needs to know only once where the broker is
(RequestError stands for FormatError and LengthError, too). Who is asking the server finds out from the token or certificate: the
first parameter is there to be ignored.

Thread-safety: an object belongs to one thread at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn, TypeVar
from urllib.parse import quote, urlencode

from csvfast import __version__
from csvfast.broker.clients.http import Answer, HttpConnection, Tls
from csvfast.broker.json_input import loads
from csvfast.broker.model import ResourcePath
from csvfast.broker.policy import Decision
from csvfast.broker.store import (
    AuditEntry,
    AuditRecord,
    AuditVerification,
    PolicyRow,
    ReferenceRow,
    Resource,
    ResourceRow,
    TokenRow,
)
from csvfast.crypto import Secret, SM2PublicKey
from csvfast.errors import (
    ConflictError,
    DeniedError,
    LimitedError,
    RequestError,
    UnavailableError,
    UnknownError,
)

if TYPE_CHECKING:
    from csvfast.broker.administration import Administrator

__all__ = ["KbsAdministration", "Tls"]

_T = TypeVar("_T")
_PAGE: Final = 1000
_LIMIT: Final = 64 << 20
_VERIFY_SECONDS: Final = 3600.0


class KbsAdministration:
    """Administrative calls to a broker.

    In: url        https://host:port; http://... for loopback
        token      of an administrator ("csvt_...", or a JWT); None: the client certificate in `tls` says who it is
        tls        for https
    Every method: DeniedError, LimitedError, UnavailableError, RequestError, AttestedTlsError; UnknownError where there is no such
    thing, ConflictError.
    """

    def __init__(
        self, url: str, token: Secret | None = None, *, tls: Tls | None = None, insecure: bool = False, timeout: float = 60.0
    ) -> None:
        self._http = HttpConnection(url, tls=tls, insecure=insecure, timeout=timeout)
        self._token = token

    def close(self) -> None:
        """Closes the connection."""
        self._http.close()

    def __enter__(self) -> KbsAdministration:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- keys

    def put_resource(self, who: Administrator, path: ResourcePath, content: bytes | Secret) -> int:  # noqa: ARG002
        """See Administration.put_resource."""
        return _version(self._send("POST", f"resource/{path}", memoryview(content), "application/octet-stream"))

    def rotate_resource(self, who: Administrator, path: ResourcePath) -> int:  # noqa: ARG002
        """See Administration.rotate_resource."""
        return _version(self._send("POST", f"rotate/{path}"))

    def create_key(self, who: Administrator, path: ResourcePath) -> int:  # noqa: ARG002
        """See Administration.create_key."""
        return _version(self._send("POST", f"create/{path}"))

    def read_resource(self, who: Administrator, path: ResourcePath, version: int | None = None) -> Resource:  # noqa: ARG002
        """See Administration.read_resource; the time of its creation is not told."""
        answer = self._send("POST", f"read/{path}", _json({} if version is None else {"version": version}))
        number = answer.headers.get("x-csvfast-version", "")
        if not number.isdigit() or not answer.body:
            raise RequestError("answer: no resource")
        return Resource(path, int(number), Secret(answer.body), "active", 0.0)

    def retire_resource(self, who: Administrator, path: ResourcePath, version: int) -> None:  # noqa: ARG002
        """See Administration.retire_resource."""
        self._send("POST", f"retire/{path}", _json({"version": version}))

    def delete_resource(self, who: Administrator, path: ResourcePath) -> None:  # noqa: ARG002
        """See Administration.delete_resource."""
        self._send("DELETE", f"resource/{path}")

    def list_resources(self, who: Administrator) -> list[ResourceRow]:  # noqa: ARG002
        """See Administration.list_resources."""
        return [_row(ResourceRow, row, path=ResourcePath.parse) for row in self._list("resources")]

    # ---- policy

    def put_policy(
        self,
        who: Administrator,  # noqa: ARG002
        kind: Literal["appraisal", "resource"],
        name: str,
        text: str,
        engine: Literal["rules", "rego"] = "rules",
    ) -> int:
        """See Administration.put_policy."""
        return _version(self._send("PUT", f"policies/{kind}/{_quoted(name)}", _json({"engine": engine, "text": text})))

    def get_policy(self, who: Administrator, kind: str, name: str, version: int | None = None) -> PolicyRow:  # noqa: ARG002
        """See Administration.get_policy."""
        query = "" if version is None else f"?version={version}"
        return _row(PolicyRow, self._object("GET", f"policies/{_quoted(kind)}/{_quoted(name)}{query}"))

    def list_policies(self, who: Administrator) -> list[PolicyRow]:  # noqa: ARG002
        """See Administration.list_policies."""
        return [_row(PolicyRow, row) for row in self._list("policies")]

    def delete_policy(self, who: Administrator, kind: str, name: str) -> None:  # noqa: ARG002
        """See Administration.delete_policy."""
        self._send("DELETE", f"policies/{_quoted(kind)}/{_quoted(name)}")

    def dry_run(
        self,
        who: Administrator,  # noqa: ARG002
        kind: Literal["appraisal", "resource"],
        document: Mapping[str, Any],
        *,
        name: str | None = None,
        text: str | None = None,
        engine: Literal["rules", "rego"] = "rules",
    ) -> tuple[Decision, str]:
        """See Administration.dry_run."""
        body: dict[str, Any] = {"kind": kind, "document": document, "engine": engine, "id": name, "text": text}
        answer = self._object("POST", "dry-run", _json({member: value for member, value in body.items() if value is not None}))
        return Decision.from_dict(answer["decision"]), str(answer["explanation"])

    def put_reference(self, who: Administrator, name: str, values: Sequence[Any], expires: float | None) -> None:  # noqa: ARG002
        """See Administration.put_reference."""
        self._send("PUT", f"references/{_quoted(name)}", _json({"values": list(values), "expires": expires}))

    def get_reference(self, who: Administrator, name: str) -> ReferenceRow:  # noqa: ARG002
        """See Administration.get_reference."""
        return _row(ReferenceRow, self._object("GET", f"references/{_quoted(name)}"), values=tuple)

    def list_references(self, who: Administrator) -> list[ReferenceRow]:  # noqa: ARG002
        """See Administration.list_references."""
        return [_row(ReferenceRow, row, values=tuple) for row in self._list("references")]

    def delete_reference(self, who: Administrator, name: str) -> None:  # noqa: ARG002
        """See Administration.delete_reference."""
        self._send("DELETE", f"references/{_quoted(name)}")

    # ---- tokens

    def create_token(
        self, who: Administrator, name: str, roles: Sequence[str], *, scope: str = "*", expires: float | None = None  # noqa: ARG002
    ) -> Secret:
        """See Administration.create_token."""
        body = {"name": name, "roles": list(roles), "scope": scope, "expires": expires}
        return Secret(str(self._object("POST", "tokens", _json(body))["token"]).encode("ascii"))

    def revoke_token(self, who: Administrator, name: str) -> None:  # noqa: ARG002
        """See Administration.revoke_token."""
        self._send("DELETE", f"tokens/{_quoted(name)}")

    def list_tokens(self, who: Administrator) -> list[TokenRow]:  # noqa: ARG002
        """See Administration.list_tokens."""
        return [_row(TokenRow, row, roles=tuple) for row in self._list("tokens")]

    # ---- audit

    def audit_records(
        self, who: Administrator, *, after: int = 0, limit: int | None = 100, **filters: str  # noqa: ARG002
    ) -> Iterator[AuditEntry]:
        """See Administration.audit_records; asks for them page by page."""
        left = limit
        while left is None or left > 0:
            count = _PAGE if left is None else min(left, _PAGE)
            query = urlencode({**filters, "after": after, "limit": count})
            rows = self._list("audit", f"audit?{query}", "records")
            for row in rows:
                after = row.pop("sequence")
                yield AuditEntry(after, _row(AuditRecord, row))
            if len(rows) < count:
                return
            left = None if left is None else left - len(rows)

    def verify_audit(
        self, who: Administrator, progress: Callable[[int], None] | None = None  # noqa: ARG002
    ) -> AuditVerification:
        """See Administration.verify_audit; the server does it, and `progress` is told nothing."""
        return _row(AuditVerification, self._object("GET", "audit/verification", timeout=_VERIFY_SECONDS))

    def audit_public_key(self) -> SM2PublicKey:
        """See Administration.audit_public_key."""
        return SM2PublicKey(bytes.fromhex(str(self._object("GET", "audit/key")["point"])))

    # ---- Behind it

    def _send(
        self, method: str, path: str, body: bytes | memoryview | None = None, kind: str = "application/json",
        timeout: float | None = None,
    ) -> Answer:  # fmt: skip
        headers = {"User-Agent": f"csvfast/{__version__}", "Content-Type": kind}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {bytes(memoryview(self._token)).decode('ascii')}"
        target = f"/csvfast/v0/{path}"
        answer = self._http.request(method, target, body, headers, repeatable=method == "GET", limit=_LIMIT, timeout=timeout)
        if answer.status not in (200, 201, 204):
            _raise(answer)
        return answer

    def _object(self, method: str, path: str, body: bytes | None = None, timeout: float | None = None) -> dict[str, Any]:
        document = loads(self._send(method, path, body, timeout=timeout).body, "answer", limit=_LIMIT)
        if type(document) is not dict:
            raise RequestError("answer: expected an object")
        return document

    def _list(self, name: str, path: str | None = None, member: str | None = None) -> list[dict[str, Any]]:
        rows = self._object("GET", path or name).get(member or name)
        if type(rows) is not list or not all(type(row) is dict for row in rows):
            raise RequestError(f"answer: expected a list of {member or name}")
        return rows


def _row(cls: Callable[..., _T], row: Mapping[str, Any], **readers: Callable[[Any], Any]) -> _T:
    try:
        return cls(**{name: readers[name](value) if name in readers else value for name, value in row.items()})
    except TypeError:
        raise RequestError("answer: of another release of the broker") from None


def _version(answer: Answer) -> int:
    document = loads(answer.body, "answer", limit=4096)
    if type(document) is not dict or type(document.get("version")) is not int:
        raise RequestError("answer: expected a version")
    return int(document["version"])


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _quoted(name: str) -> str:
    return quote(name, safe="")


def _raise(answer: Answer) -> NoReturn:
    try:
        document = loads(answer.body, "error", limit=64 << 10)
        detail, correlation = str(document["detail"])[:1000], str(document.get("correlation", ""))
        unknown = document.get("error") == "unknown"
    except (RequestError, KeyError, TypeError, AttributeError):
        detail, correlation = f"HTTP status {answer.status}", answer.headers.get("x-csvfast-correlation", "")
        unknown = False
    if answer.status in (401, 403):
        raise DeniedError(detail, correlation)
    if unknown:
        raise UnknownError(detail)
    if answer.status == 409:
        raise ConflictError(detail)
    if answer.status == 429:
        wait = answer.headers.get("retry-after", "1")
        raise LimitedError(detail, float(wait) if wait.isdigit() else 1.0)
    if answer.status >= 500:
        raise UnavailableError(detail)
    raise RequestError(detail)
