"""A master key that never leaves its PKCS#11 token (OASIS PKCS#11 3.1): smart card, hardware security module, SoftHSM.

The key is AES-256, made in the token, sensitive and not extractable. The token does AES-GCM itself (CKM_AES_GCM) on the 32 bytes
of a key-encryption key, with nonces from this machine's generator; the result is a sealed record of csvfast.broker.sealing.

Log-in belongs to a process and token, not to a session: keys of one token share one log-in here. A token that is gone or was
reset gives UnavailableError, and a later call looks for it again. A PIN that a token refused is not tried again by this process,
because tokens lock after a few wrong ones; and a token that says it has one try left is not asked at all.

What libraries keep: the PIN is a Secret here, kept to log in again; python-pkcs11 wants it as text and encodes it, and that text
and the key-encryption key as bytes, on its way to and from the token, are freed without being wiped. What the module itself keeps
is its maker's affair.

Thread-safety: one lock for each PKCS#11 module; calls of several threads wait for each other, also for a token that hangs. Not
across fork: open the key in the process that uses it.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

from csvfast._extras import need
from csvfast.broker.sealing import KEY_BYTES, join_record, record_data, split_record
from csvfast.crypto import Secret
from csvfast.errors import ArgumentError, AuthenticationError, ClosedError, StateError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

need("pkcs11", "pkcs11")

import pkcs11  # noqa: E402  an error that says what to install comes first
from pkcs11 import Attribute, KeyType, Mechanism, MechanismFlag, ObjectClass, PKCS11Error, TokenFlag  # noqa: E402

__all__ = ["Pkcs11Master"]

_Result = TypeVar("_Result")

_PAUSE: Final = 1.0
"""Seconds in which a token that could not be reached is not looked for again."""
_WRONG_PIN: Final = (pkcs11.PinIncorrect, pkcs11.PinInvalid, pkcs11.PinLenRange)


class _Login:
    """One token of a module, as this process is logged in to it."""

    def __init__(self, pin: Secret) -> None:
        self.pin: Final = pin
        self.session: Any = None
        self.users = 0


class _Module:
    """A PKCS#11 module of this process and the tokens logged in to. Its members are used under `lock` only."""

    def __init__(self, path: str) -> None:
        self.path: Final = path
        self.process: Final = os.getpid()
        self.lock: Final = threading.RLock()
        self.logins: Final[dict[str, _Login]] = {}
        self.refused: Final[dict[str, Secret]] = {}
        self._library: Any = None

    def library(self) -> Any:
        if self._library is None:
            try:
                library = pkcs11.lib(self.path)
                if any(path == self.path and process != self.process for process, path in _modules):
                    library.reinitialize()  # a child of a fork must not use what its parent initialized (PKCS#11, 5.4.1)
            except (PKCS11Error, OSError) as error:
                raise StateError(f"{self.path}: cannot be loaded as a PKCS#11 module: {_text(error)}") from None
            self._library = library
        return self._library

    def join(self, label: str, pin: Secret) -> _Login:
        """The login that keys of a token share, for one more of them; nothing is asked of the token yet."""
        with self.lock:
            login = self.logins.get(label)
            if login is None:
                login = self.logins[label] = _Login(Secret(pin))
            elif not login.pin.equals(pin):
                raise AuthenticationError(f"token {label!r}: another PIN than the one that this process uses for it")
            login.users += 1
            return login

    def leave(self, label: str, login: _Login) -> None:
        """One key fewer. The last one logs out and wipes the PIN."""
        login.users -= 1
        if login.users == 0:
            session, login.session = login.session, None
            if session is not None:
                _close_session(session)
            self.logins.pop(label, None)
            if self.refused.get(label) is not login.pin:
                login.pin.wipe()

    def reinitialize(self) -> None:
        """Many modules see tokens only that were there when they were initialized. Ends all sessions of the module."""
        for login in self.logins.values():
            login.session = None
        self.library().reinitialize()

    def find(self, label: str) -> Any:
        library = self.library()
        try:
            try:
                return library.get_token(token_label=label)
            except pkcs11.MultipleTokensReturned:
                raise
            except PKCS11Error:
                self.reinitialize()
                return library.get_token(token_label=label)
        except pkcs11.MultipleTokensReturned:
            raise StateError(f"{self.path}: several tokens have the label {label!r}; expected one") from None

    def session(self, label: str, login: _Login) -> Any:
        """The session of a login, opened when there is none. Raises as `Pkcs11Master`; PKCS11Error."""
        if login.session is None:
            refused = self.refused.get(label)
            if refused is not None and refused.equals(login.pin):
                raise AuthenticationError(f"token {label!r} has refused this PIN; it is not tried again")
            token = self.find(label)
            if Mechanism.AES_GCM not in token.slot.get_mechanisms():
                raise StateError(f"token {label!r}: does not do AES-GCM (CKM_AES_GCM)")
            if TokenFlag.USER_PIN_LOCKED in token.flags:
                raise AuthenticationError(f"token {label!r}: its PIN is locked; the security officer can set a new one")
            if TokenFlag.USER_PIN_FINAL_TRY in token.flags:
                raise AuthenticationError(f"token {label!r}: one try left before its PIN locks; log in with the token's own tool")
            login.session = self._log_in(token, label, login.pin)
        return login.session

    def _log_in(self, token: Any, label: str, pin: Secret) -> Any:
        try:
            return token.open(user_pin=bytes(pin).decode())
        except pkcs11.UserAlreadyLoggedIn:
            return token.open()  # another part of the process did; the log-in holds for all its sessions
        except _WRONG_PIN:
            self.refused[label] = pin
            raise AuthenticationError(f"token {label!r} refused the PIN; it is not tried again, because tokens lock") from None
        except pkcs11.PinLocked:
            raise AuthenticationError(f"token {label!r}: its PIN is locked; the security officer can set a new one") from None
        except (pkcs11.UserPinNotInitialized, pkcs11.PinExpired) as error:
            raise StateError(f"token {label!r}: {_text(error)}; set a user PIN with the token's own tool") from None


_modules: Final[dict[tuple[int, str], _Module]] = {}
_modules_lock: Final = threading.Lock()


def _module(path: str) -> _Module:
    with _modules_lock:
        # A child of a fork starts afresh; its parent's sessions are not its own.
        return _modules.setdefault((os.getpid(), path), _Module(path))


class Pkcs11Master:
    """A master key inside a token.

    In: module   path of the PKCS#11 library
        token    label of the token
        pin      of its user, UTF-8; a copy is kept until `close`
        key      label of the AES-256 key in it, which must be sensitive, not extractable, and have an id
        create   make the key first: see `create`
    Raises: AuthenticationError (PIN refused or locked); StateError (no such key, several, or one that is not fit; a module that
        cannot be loaded); UnavailableError (no such token, or it fails); ArgumentError (PIN is no UTF-8); MissingExtraError.
    """

    def __init__(self, module: str, token: str, pin: Secret, key: str, *, create: bool = False) -> None:
        _check_text(pin)
        self._token: Final = token
        self._label: Final = key
        self._key: Any = None
        self._key_session: Any = None
        self._closed = False
        self._pause_until = 0.0
        self._module: Final = _module(module)
        self._login: Final = self._module.join(token, pin)
        try:
            if create:
                self._reach(self._make_key)
            identity = self._reach(self._identify)
        except BaseException:
            self.close()
            raise
        self.identity: Final = identity

    @classmethod
    def create(cls, module: str, token: str, pin: Secret, key: str) -> Pkcs11Master:
        """Makes the key in the token: AES-256, sensitive, not extractable, not modifiable, with a random id.

        Raises as the constructor; StateError when the token has a key of that label.
        """
        return cls(module, token, pin, key, create=True)

    def _make_key(self) -> None:
        session = self._module.session(self._token, self._login)
        if list(session.get_objects({Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.LABEL: self._label})):
            raise StateError(f"token {self._token!r} has a key {self._label!r}; nothing was changed")
        writer = session.token.open(rw=True)  # logged in with the process
        try:
            writer.generate_key(
                KeyType.AES,
                8 * KEY_BYTES,
                id=secrets.token_bytes(16),
                label=self._label,
                store=True,
                capabilities=MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT,
                template={
                    Attribute.PRIVATE: True,
                    Attribute.SENSITIVE: True,
                    Attribute.EXTRACTABLE: False,
                    Attribute.MODIFIABLE: False,
                },
            )
        finally:
            _close_session(writer)

    def _identify(self) -> str:
        return _check_key(self._find_key(), f"token {self._token!r}, key {self._label!r}")

    def _find_key(self) -> Any:
        """The key in the token; the same one as before, when there was one."""
        session = self._module.session(self._token, self._login)
        # Handles are numbers: under another session the same number may be another key.
        if self._key is None or self._key_session is not session:
            found = list(session.get_objects({Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.LABEL: self._label}))
            where = f"token {self._token!r}, key {self._label!r}"
            known = getattr(self, "identity", None)
            if len(found) != 1:
                text = f"{where}: the token has {len(found)} keys of this label; expected one"
                raise UnavailableError(text) if known else StateError(text)
            key = found[0]
            identity = _check_key(key, where)
            if known not in (None, identity):
                raise UnavailableError(f"{where}: is now another key, {identity}; expected {known}")
            self._key, self._key_session = key, session
        return self._key

    def wrap(self, key: Secret, associated: bytes) -> bytes:
        """See MasterKey. The token encrypts. Raises: UnavailableError, AuthenticationError (PIN), StateError, ClosedError."""
        nonce = os.urandom(12)
        mechanism = pkcs11.GCMParams(nonce, record_data(associated), 128)

        def encrypt() -> bytes:
            return bytes(self._find_key().encrypt(bytes(key), mechanism=Mechanism.AES_GCM, mechanism_param=mechanism))

        sealed = self._reach(encrypt)
        if len(sealed) != len(key) + 16:
            raise UnavailableError(f"token {self._token!r} encrypted {len(key)} bytes to {len(sealed)}; expected {len(key) + 16}")
        return join_record(nonce, sealed)

    def unwrap(self, data: Buffer, associated: bytes) -> Secret:
        """See MasterKey. The token decrypts and checks the tag. Raises as `wrap`."""
        what = f"key wrapped by master key {self.identity}"
        nonce, sealed = split_record(data, what)
        mechanism = pkcs11.GCMParams(nonce, record_data(associated), 128)

        def decrypt() -> Secret:
            key = self._find_key()
            try:
                return Secret(key.decrypt(sealed, mechanism=Mechanism.AES_GCM, mechanism_param=mechanism))
            except PKCS11Error:
                # Modules tell a wrong tag from a broken token with whatever code they like (SoftHSM: CKR_GENERAL_ERROR). One that
                # still does the key's work has judged the record.
                if not self._works(key):
                    raise
                raise AuthenticationError(
                    f"{what}: does not authenticate: another key, another place than it was sealed for, or altered"
                ) from None

        return self._reach(decrypt)

    def _works(self, key: Any) -> bool:
        """Whether the token encrypts and decrypts a record of its own."""
        plain = os.urandom(KEY_BYTES)
        mechanism = pkcs11.GCMParams(os.urandom(12), b"csvfast self-test", 128)
        try:
            sealed = key.encrypt(plain, mechanism=Mechanism.AES_GCM, mechanism_param=mechanism)
            return bool(key.decrypt(sealed, mechanism=Mechanism.AES_GCM, mechanism_param=mechanism) == plain)
        except PKCS11Error:
            return False

    def _reach(self, action: Callable[[], _Result]) -> _Result:
        """Does something with the token under the module's lock; when that fails, once more with a new session."""
        if self._module.process != os.getpid():
            raise UnavailableError(f"{self._module.path}: opened before a fork; open the master key in the process that uses it")
        with self._module.lock:
            if self._closed:
                raise ClosedError("this master key has been closed")
            if time.monotonic() < self._pause_until:
                raise UnavailableError(f"token {self._token!r} could not be reached a moment ago")
            try:
                return action()
            except PKCS11Error:
                self._forget()
            try:
                return action()
            except PKCS11Error as error:
                self._forget()
                self._pause_until = time.monotonic() + _PAUSE
                raise UnavailableError(f"token {self._token!r} of {self._module.path}: {_text(error)}") from None

    def _forget(self) -> None:
        """Drops the key's handle and the session, which may be dead."""
        self._key = None
        session, self._login.session = self._login.session, None
        if session is not None:
            _close_session(session)

    def close(self) -> None:
        """Leaves the token: logs out when no other master key of this process uses it, and wipes the PIN then."""
        if self._module.process != os.getpid():
            return
        with self._module.lock:
            if self._closed:
                return
            self._closed = True
            self._key = None
            self._module.leave(self._token, self._login)

    def __repr__(self) -> str:
        return f"<Pkcs11Master {getattr(self, 'identity', 'not open')}>"


def _close_session(session: Any) -> None:
    with suppress(PKCS11Error):  # the token may be gone, and its sessions with it
        session.close()


def _check_key(key: Any, where: str) -> str:
    """The identity of a key that is fit to be a master key. Raises: StateError, PKCS11Error."""
    if key[Attribute.KEY_TYPE] != KeyType.AES or key[Attribute.VALUE_LEN] != KEY_BYTES:
        raise StateError(f"{where}: is no AES-256 key")
    if not key[Attribute.SENSITIVE] or key[Attribute.EXTRACTABLE]:
        raise StateError(f"{where}: can be read out of the token; expected a sensitive key that is not extractable")
    if not key[Attribute.ENCRYPT] or not key[Attribute.DECRYPT]:
        raise StateError(f"{where}: is not allowed to encrypt and decrypt")
    name = bytes(key[Attribute.ID])
    if not name:
        raise StateError(f"{where}: has no id (CKA_ID), by which records name it")
    return f"pkcs11:{name.hex()[:128]}"


def _check_text(pin: Secret) -> None:
    try:
        bytes(pin).decode()
    except UnicodeDecodeError:
        raise ArgumentError("PIN: is no UTF-8 text") from None


def _text(error: Exception) -> str:
    """A PKCS#11 error's name and text; they hold codes and labels, never a PIN."""
    return f"{type(error).__name__} {error}".strip()
