"""How the registry client says who it is: auth.json, Basic, token servers."""

from __future__ import annotations

import base64
import json
import socket
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image.scripted_server import Request, ScriptedServer, answer

from csvfast.crypto import Secret
from csvfast.errors import ImageError, RegistryError
from csvfast.image import registry_auth as module
from csvfast.image.descriptor import MANIFEST_TYPE, Descriptor
from csvfast.image.reference import parse_reference
from csvfast.image.registry import RegistryClient
from csvfast.image.registry_auth import Credentials, find_credentials, parse_challenges

MANIFEST = b'{"schemaVersion":2,"config":{},"layers":[]}'
TYPE = f"Content-Type: {MANIFEST_TYPE}"
USER = Credentials("user", Secret(b"pass:word"))
BASIC = "Basic " + base64.b64encode(b"user:pass:word").decode()


class TokenRegistry:
    """A registry and its token server, in one."""

    def __init__(self, **members: Any) -> None:
        self.members = members
        self.server: ScriptedServer | None = None
        self.fetched: list[Request] = []
        self.valid: set[str] = set()
        self.realm = ""

    def __call__(self, request: Request, _connection: socket.socket) -> bytes:
        if request.target.startswith("/token"):
            self.fetched.append(request)
            token = f"token-{len(self.fetched)}"
            self.valid = {f"Bearer {token}"}
            return answer(200, json.dumps(self.members or {"token": token}).encode())
        if request.headers.get("authorization") in self.valid:
            return answer(201 if request.method == "POST" else 200, MANIFEST, TYPE)
        assert self.server is not None
        realm = self.realm or f"http://{self.server.address}/token"
        return answer(401, b"", f'WWW-Authenticate: Bearer realm="{realm}",service="the service",scope="ignored"')

    def __enter__(self) -> ScriptedServer:
        self.server = ScriptedServer(self)
        return self.server.__enter__()

    def __exit__(self, *error: object) -> None:
        assert self.server is not None
        self.server.__exit__(*error)


def client(server: ScriptedServer, credentials: Credentials | None = USER) -> RegistryClient:
    return RegistryClient(parse_reference(f"docker://{server.address}/team/app"), credentials=credentials, timeout=5, retries=0)


def test_tokens() -> None:
    kept = TokenRegistry()
    with kept as server, client(server) as registry:
        for _ in range(3):
            assert registry.resolve("1")[1] == MANIFEST
        assert len(kept.fetched) == 1  # kept
        kept.valid.clear()
        assert registry.resolve("1")[1] == MANIFEST  # a new one
        assert registry.mount(Descriptor.of(b"x", "a/b"), "other")
    assert [request.headers["authorization"] for request in kept.fetched] == [BASIC] * 3
    queries = [parse_qs(urlsplit(request.target).query) for request in kept.fetched]
    assert queries[0] == {"service": ["the service"], "scope": ["repository:team/app:pull"]}
    assert queries[2]["scope"] == ["repository:team/app:pull,push", "repository:other:pull"]


def test_strangers() -> None:
    kept = TokenRegistry()
    with kept as server, client(server, None) as registry:
        assert registry.resolve("1")[1] == MANIFEST
    assert "authorization" not in kept.fetched[0].headers


def test_identity_tokens() -> None:
    kept = TokenRegistry(access_token="token-1", expires_in=300)
    with kept as server, client(server, Credentials(identity_token=Secret(b"refresh&"))) as registry:
        assert registry.resolve("1")[1] == MANIFEST
    (request,) = kept.fetched
    assert request.method == "POST"
    assert parse_qs(request.body.decode()) == {
        "grant_type": ["refresh_token"], "client_id": ["csvfast"], "refresh_token": ["refresh&"], "service": ["the service"],
        "scope": ["repository:team/app:pull"],
    }  # fmt: skip


def test_tokens_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    transport, sent = object(), []

    class Fetching(module.Authorizer):
        def _fetch(self, bearer: Any, scope: str) -> tuple[Secret, float]:
            sent.append(scope)
            return self._token(b'{"token":"t","expires_in":100}', "server")

    base = module.Url.parse("http://127.0.0.1/", "x")
    authorizer = Fetching(transport, base, "app", None, subject="x", user_agent="y")  # type: ignore[arg-type]
    assert authorizer.header("s") is None
    assert authorizer.challenged(['Bearer realm="http://127.0.0.1/t"'], "s")
    assert [authorizer.header("s"), authorizer.header("s")] == ["Bearer t"] * 2
    now = 94.0
    authorizer.header("s")
    assert sent == ["s"]
    now = 96.0
    authorizer.header("s")
    assert sent == ["s", "s"]


@pytest.mark.parametrize(
    "members", [{"no": "token"}, {"token": 7}, {"token": "a b"}, {"token": "a\r\nX: y"}, {"token": "x" * 200000}, {"token": ""}]
)
def test_no_tokens(members: dict[str, Any]) -> None:
    with TokenRegistry(**members) as server, client(server) as registry, pytest.raises(RegistryError, match="no token in"):
        registry.resolve("1")


def test_token_servers_that_refuse() -> None:
    def script(request: Request, _connection: socket.socket) -> bytes:
        if request.target.startswith("/token"):
            return answer(403)
        return answer(401, b"", f'WWW-Authenticate: Bearer realm="http://{server.address}/token"')

    with ScriptedServer(script) as server:
        with client(server) as registry, pytest.raises(RegistryError, match=r"token server 127.0.0.1: status 403$"):
            registry.ping()
        with client(server, None) as registry, pytest.raises(RegistryError, match="status 403; no credentials are known"):
            registry.ping()


@pytest.mark.parametrize("realm", ["http://192.0.2.1/token", "file:///etc/passwd", "relative"])
def test_token_servers_elsewhere(realm: str) -> None:
    kept = TokenRegistry()
    kept.realm = realm
    with kept as server, client(server) as registry, pytest.raises(RegistryError, match=r"is not allowed|expected a URL"):
        registry.resolve("1")


def test_a_registry_that_is_never_content() -> None:
    """A new challenge each time is answered once."""
    kept = TokenRegistry(token="another")
    with kept as server, client(server) as registry, pytest.raises(RegistryError, match="status 401"):
        registry.resolve("1")
    assert len(kept.fetched) == 1


def test_secrets_are_not_shown() -> None:
    assert "pass" not in repr(USER)
    assert "user" not in repr(USER)
    said = answer(401, b"", 'WWW-Authenticate: Basic realm="x"')
    with (
        ScriptedServer(lambda *_: said) as server,
        client(server) as registry,
        pytest.raises(RegistryError, match=r"status 401$") as caught,
    ):
        registry.ping()
    assert [request.headers.get("authorization") for request in server.requests] == [None, BASIC]
    assert "pass" not in str(caught.value)


# ---- Challenges


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ('Bearer realm="https://a/t",service="s t",scope="repository:a:pull,push"',
         [("bearer", {"realm": "https://a/t", "service": "s t", "scope": "repository:a:pull,push"})]),
        ('Basic realm="a \\"b\\" c", Bearer realm=x', [("basic", {"realm": 'a "b" c'}), ("bearer", {"realm": "x"})]),
        ("Negotiate", [("negotiate", {})]),
        ("BASIC Realm = x", [("basic", {"realm": "x"})]),
        ("", []), ('="', []), ('realm="x"', []),
    ],
)  # fmt: skip
def test_challenges(header: str, expected: list[Any]) -> None:
    assert parse_challenges([header]) == expected


@given(st.lists(st.text('Basic Bearer="\\, \t', max_size=60)))
def test_challenges_from_anybody(headers: list[str]) -> None:
    for scheme, parameters in parse_challenges(headers):
        assert scheme == scheme.lower()
        assert all(name == name.lower() for name in parameters)


# ---- auth.json


def auth_file(path: Path, entries: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"auths": entries}))
    return path


def entry(text: str) -> dict[str, str]:
    return {"auth": base64.b64encode(text.encode()).decode()}


@pytest.mark.parametrize(
    ("host", "name", "expected"),
    [
        ("r.example", "team/app", "app:3"),
        ("r.example", "team/other", "team:2"),
        ("r.example", "teams/other", "all:1"),
        ("r.example:5000", "team/app", "port:4"),
        ("other.example", "a", None),
        ("helper.example", "a", None),
        ("docker.io", "library/busybox", "hub:5"),
        ("old.example", "a", "old:6"),
    ],
)
def test_credentials_of_a_repository(tmp_path: Path, host: str, name: str, expected: str | None) -> None:
    entries = {
        "r.example": entry("all:1"), "r.example/team": entry("team:2"), "r.example/team/app": entry("app:3"),
        "r.example:5000": entry("port:4"), "https://index.docker.io/v1/": entry("hub:5"),
        "https://old.example/v1/": entry("old:6"), "helper.example": {},
    }  # fmt: skip
    found = find_credentials(host, name, [tmp_path / "missing", auth_file(tmp_path / "auth.json", entries)])
    assert (found and found.basic()) == (expected and f"Basic {base64.b64encode(expected.encode()).decode()}")


def test_identity_token_in_the_file(tmp_path: Path) -> None:
    found = find_credentials("r.example", "a", [auth_file(tmp_path / "a", {"r.example": {"identitytoken": "x"}})])
    assert found is not None
    assert found.identity_token == Secret(b"x")
    assert found.basic() is None


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "no JSON"), ('{"auths":[]}', "expected an object"), ('{"auths":{"r.example":{"auth":"!"}}}', "base64 of user"),
        ('{"auths":{"r.example":{"auth":"dXNlcg=="}}}', "base64 of user:password"), (" " * (2 << 20), "expected at most"),
    ],
)  # fmt: skip
def test_broken_files(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "auth.json").write_text(content)
    with pytest.raises(ImageError, match=problem) as caught:
        find_credentials("r.example", "a", [tmp_path / "auth.json"])
    assert "auth.json" in str(caught.value)
    assert "dXNlcg" not in str(caught.value)


def test_where_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/configuration")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert [str(path) for path in module.auth_files()] == [
        "/run/user/1/containers/auth.json", "/configuration/containers/auth.json", "/home/somebody/.docker/config.json",
    ]  # fmt: skip
    monkeypatch.setenv("REGISTRY_AUTH_FILE", "/only/this")
    assert module.auth_files() == (Path("/only/this"),)


def test_found_for_this_machine_and_for_tls_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A password in auth.json does not go over a network in the clear."""
    path = auth_file(tmp_path / "a", {"127.0.0.1": entry("u:p"), "r.example": entry("u:p")})
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(path))
    for host, plain, stranger in (("127.0.0.1", None, False), ("r.example", None, False), ("r.example", True, True)):
        with RegistryClient(parse_reference(f"docker://{host}/a"), plain_http=plain) as registry:
            assert registry._authorizer.stranger == stranger
