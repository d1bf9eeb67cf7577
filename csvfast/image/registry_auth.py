"""How a registry is told who asks: names and passwords from auth.json, Basic, and tokens of a token server.

    $REGISTRY_AUTH_FILE, $XDG_RUNTIME_DIR/containers/auth.json, ~/.config/containers/auth.json, ~/.docker/config.json
    {"auths": {"registry.example/team": {"auth": base64 of user:password}, "other.example": {"identitytoken": ...}}}

The longest entry that a repository begins with is its. Helper programs (credHelpers) are not run.

Source: containers/image docs/containers-auth.json.5.md; distribution/distribution docs/content/spec/auth/token.md, oauth.md;
RFC 9110 section 11.
Thread-safety: Authorizer from several threads.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import os
import re
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

from csvfast.crypto import Secret
from csvfast.errors import ImageError, RegistryError
from csvfast.image.manifest import parse_json
from csvfast.image.registry_http import Transport, Url

__all__ = ["Authorizer", "Credentials", "auth_files", "find_credentials", "parse_challenges"]

_FILE_LIMIT: Final = 1 << 20
_TOKEN_ANSWER_LIMIT: Final = 256 << 10
_TOKEN_SECONDS: Final = 60
_TOKEN_MARGIN: Final = 5
_TOKEN: Final = re.compile(r"[\x21-\x7e]{1,131072}\Z", re.ASCII)
_CHALLENGE_LIMIT: Final = 8192
_WORD: Final = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"
_PART: Final = re.compile(rf'\s*({_WORD})(?:\s*=\s*(?:"((?:[^"\\]|\\.)*)"|({_WORD}))|(?=\s|,|\Z))\s*(,?)', re.DOTALL)
_HUB_ALIASES: Final = ("https://index.docker.io/v1", "index.docker.io", "registry-1.docker.io")


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user of a registry. Nothing of it is in its repr.

    user             name; "" with an identity token
    password         or a personal token
    identity_token   instead of both: OAuth 2's refresh token
    """

    user: str = field(default="", repr=False)
    password: Secret | None = field(default=None, repr=False)
    identity_token: Secret | None = field(default=None, repr=False)

    def basic(self) -> str | None:
        """The header's value, or None without a password."""
        if self.password is None:
            return None
        return "Basic " + base64.b64encode(self.user.encode() + b":" + bytes(memoryview(self.password))).decode("ascii")


def auth_files() -> tuple[Path, ...]:
    """Where credentials are looked for; some may be missing."""
    explicit = os.environ.get("REGISTRY_AUTH_FILE")
    if explicit:
        return (Path(explicit),)
    found = []
    if (runtime := os.environ.get("XDG_RUNTIME_DIR", "")).startswith("/"):
        found.append(Path(runtime) / "containers" / "auth.json")
    try:
        home = Path.home()
    except RuntimeError:  # a user whose home nobody knows
        return tuple(found)
    configuration = os.environ.get("XDG_CONFIG_HOME", "")
    found.append((Path(configuration) if configuration.startswith("/") else home / ".config") / "containers" / "auth.json")
    return (*found, home / ".docker" / "config.json")


def find_credentials(host: str, name: str, files: Iterable[Path] | None = None) -> Credentials | None:
    """Those for a repository, or None.

    In: host    with its port
        files   None: auth_files()
    ImageError: a file that is no such file; it is named, its content is not. OSError.
    """
    for path in auth_files() if files is None else files:
        try:
            with path.open("rb") as file:
                data = file.read(_FILE_LIMIT + 1)
        except (FileNotFoundError, NotADirectoryError):
            continue
        entries = parse_json(data, str(path), _FILE_LIMIT).get("auths", {})
        if type(entries) is not dict:
            raise ImageError(str(path), "auths: expected an object")
        for key in _keys(host, name):
            for spelling in (key, f"https://{key}", f"https://{key}/", f"https://{key}/v1/", f"{key}/"):
                entry = entries.get(spelling)
                if type(entry) is dict and entry:
                    return _credentials(entry, path)
    return None


def parse_challenges(headers: Iterable[str]) -> list[tuple[str, dict[str, str]]]:
    """(scheme, parameters) of WWW-Authenticate headers, both in lower case but for the values. What is none is left out."""
    found: list[tuple[str, dict[str, str]]] = []
    for header in headers:
        at = 0
        while at < len(header) <= _CHALLENGE_LIMIT and (part := _PART.match(header, at)) is not None and part.end() > at:
            at = part.end()
            name, quoted, word = part[1].lower(), part[2], part[3]
            if quoted is None and word is None:
                found.append((name, {}))
            elif found:
                found[-1][1][name] = re.sub(r"\\(.)", r"\1", quoted, flags=re.DOTALL) if quoted is not None else word
    return found


class Authorizer:
    """The Authorization header of one repository's requests, once the registry has said what it wants.

    In: base          of the registry; the header goes nowhere else
        name          of the repository
        credentials   None: as a stranger
        user_agent    for the token server, too
    """

    def __init__(
        self, transport: Transport, base: Url, name: str, credentials: Credentials | None, *, subject: str, user_agent: str
    ) -> None:
        self._transport = transport
        self._base = base
        self._name = name
        self._credentials = credentials
        self._subject = subject
        self._user_agent = user_agent
        self._basic = False
        self._bearer: Mapping[str, str] | None = None
        self._tokens: dict[str, tuple[Secret, float]] = {}
        self._lock = threading.Lock()

    @property
    def stranger(self) -> bool:
        """Whether no credentials are known."""
        return self._credentials is None

    def header(self, scope: str) -> str | None:
        """The header's value for a request, or None as long as nothing was asked for. RegistryError, OSError.

        In: scope   what the request needs, e.g. "repository:app:pull"
        """
        if self._basic:
            return None if self._credentials is None else self._credentials.basic()
        if self._bearer is None:
            return None
        with self._lock:
            found = self._tokens.get(scope)
            if found is None or found[1] <= time.monotonic():
                found = self._tokens[scope] = self._fetch(self._bearer, scope)
        return f"Bearer {bytes(memoryview(found[0])).decode('ascii')}"

    def challenged(self, headers: Iterable[str], scope: str) -> bool:
        """After status 401: whether another header may do better. In: headers   WWW-Authenticate."""
        challenges = dict(reversed(parse_challenges(headers)))  # the first of each scheme
        bearer = challenges.get("bearer")
        with self._lock:
            if bearer is not None and bearer.get("realm"):
                self._tokens.pop(scope, None)
                self._bearer, self._basic = bearer, False
                return True
            if "basic" in challenges and not self._basic and self._credentials is not None and self._credentials.password:
                self._bearer, self._basic = None, True
                return True
            return False

    def _fetch(self, bearer: Mapping[str, str], scope: str) -> tuple[Secret, float]:
        realm = Url.parse(bearer["realm"], self._subject)
        if self._base.scheme == "https" and realm.scheme == "http":
            raise RegistryError(self._subject, f"the token server {realm.host} is offered over http; expected https")
        headers = {"User-Agent": self._user_agent, "Accept": "application/json"}
        fields = [("service", bearer["service"])] if "service" in bearer else []
        fields += [("scope", one) for one in scope.split(" ")]
        credentials, body, method = self._credentials, None, "GET"
        if credentials is not None and credentials.identity_token is not None:
            token = bytes(memoryview(credentials.identity_token)).decode("utf-8")
            fields = [("grant_type", "refresh_token"), ("client_id", "csvfast"), ("refresh_token", token), *fields]
            body, method = urlencode(fields).encode(), "POST"
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        else:
            realm = realm.with_query(urlencode(fields))
            if credentials is not None and (basic := credentials.basic()) is not None:
                headers["Authorization"] = basic
        try:
            with self._transport.send(method, realm, headers, body, subject=self._subject, redirects=0) as answer:
                data = answer.body(_TOKEN_ANSWER_LIMIT, self._subject)
        except http.client.HTTPException as error:
            raise RegistryError(self._subject, f"token server {realm.host}: no HTTP answer ({type(error).__name__})") from None
        if answer.status != 200:
            hint = "" if credentials is not None else "; no credentials are known"
            raise RegistryError(self._subject, f"token server {realm.host}: status {answer.status}{hint}", status=answer.status)
        return self._token(data, realm.host)

    def _token(self, data: bytes, server: str) -> tuple[Secret, float]:
        try:
            document = parse_json(data, f"token server {server}", _TOKEN_ANSWER_LIMIT)
        except ImageError as error:
            raise RegistryError(self._subject, str(error), status=200) from None
        token = document.get("token") or document.get("access_token")
        if type(token) is not str or not _TOKEN.match(token):
            raise RegistryError(self._subject, f"token server {server}: no token in its answer", status=200)
        seconds = document.get("expires_in")
        valid = seconds if type(seconds) is int and 0 < seconds <= 86400 else _TOKEN_SECONDS
        return Secret(token.encode("ascii")), time.monotonic() + max(valid - _TOKEN_MARGIN, 1)


def _keys(host: str, name: str) -> list[str]:
    parts = name.split("/") if name else []
    keys = ["/".join([host, *parts[:count]]) for count in range(len(parts), -1, -1)]
    return [*keys, *_HUB_ALIASES] if host == "docker.io" else keys


def _credentials(entry: Mapping[str, Any], path: Path) -> Credentials:
    token, text = entry.get("identitytoken"), entry.get("auth")
    if type(token) is str and token:
        return Credentials(identity_token=Secret(token.encode()))
    if type(text) is str:
        try:
            user, colon, password = base64.b64decode(text, validate=True).partition(b":")
            if colon and password.rstrip(b"\0"):
                return Credentials(user.decode(), Secret(password.rstrip(b"\0")))
        except (binascii.Error, ValueError):
            pass
    raise ImageError(str(path), "an entry of auths has no auth that is base64 of user:password; helper programs are not run")
