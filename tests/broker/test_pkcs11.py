"""A master key in a PKCS#11 token, with SoftHSM2 as the token."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pkcs11
import pytest
from broker.services import SoftHsmToken
from pkcs11 import Attribute, KeyType, Mechanism, MechanismFlag, TokenFlag

from csvfast.broker import master_pkcs11 as module
from csvfast.broker.master import create_master, open_master
from csvfast.broker.master_pkcs11 import Pkcs11Master
from csvfast.broker.sealing import KeyRing
from csvfast.crypto import Secret
from csvfast.errors import (
    ArgumentError,
    AuthenticationError,
    ClosedError,
    LengthError,
    StateError,
    UnavailableError,
)

LABEL = "csvfast master"


def pin_of(token: SoftHsmToken) -> Secret:
    return Secret(token.pin.encode())


def create(token: SoftHsmToken, label: str = LABEL) -> Pkcs11Master:
    return Pkcs11Master.create(token.module, token.label, pin_of(token), label)


def reopen(token: SoftHsmToken, label: str = LABEL) -> Pkcs11Master:
    return Pkcs11Master(token.module, token.label, pin_of(token), label)


@pytest.fixture
def master(softhsm_token: SoftHsmToken) -> Iterator[Pkcs11Master]:
    made = create(softhsm_token)
    yield made
    made.close()


@pytest.fixture
def without_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE", 0.0)


@pytest.fixture(autouse=True)
def _no_login_is_left() -> Iterator[None]:
    yield
    assert all(not found.logins for found in module._modules.values()), "a test left a token logged in"


class Session:
    """A session of the test's own on a token, beside the product's log-in."""

    def __init__(self, token: SoftHsmToken) -> None:
        found = pkcs11.lib(token.module).get_token(token_label=token.label)
        try:
            self.session = found.open(rw=True, user_pin=token.pin)
        except pkcs11.UserAlreadyLoggedIn:
            self.session = found.open(rw=True)

    def __enter__(self) -> Any:
        return self.session

    def __exit__(self, *_: object) -> None:
        self.session.close()


# -- the key ---------------------------------------------------------------------------------------------------------


def test_key_wraps_and_unwraps(master: Pkcs11Master, softhsm_token: SoftHsmToken) -> None:
    key = Secret.random(32)
    wrapped = master.wrap(key, b"place")
    assert bytes(key) not in wrapped
    assert master.unwrap(wrapped, b"place") == key
    second = reopen(softhsm_token)
    assert second.identity == master.identity
    assert second.unwrap(bytearray(wrapped), b"place") == key
    second.close()
    assert master.unwrap(wrapped, b"place") == key, "closing one user must not log the others out"
    assert wrapped != master.wrap(key, b"place")


def test_key_cannot_be_read_or_wrapped_out(master: Pkcs11Master, softhsm_token: SoftHsmToken) -> None:
    with Session(softhsm_token) as session:
        key = session.get_key(label=LABEL)
        for attribute, value in {
            "SENSITIVE": True,
            "EXTRACTABLE": False,
            "ALWAYS_SENSITIVE": True,
            "NEVER_EXTRACTABLE": True,
            "LOCAL": True,
            "MODIFIABLE": False,
            "PRIVATE": True,
            "TOKEN": True,
            "WRAP": False,
            "UNWRAP": False,
            "DERIVE": False,
            "VALUE_LEN": 32,
        }.items():
            assert key[getattr(Attribute, attribute)] == value, attribute
        assert f"pkcs11:{key[Attribute.ID].hex()}" == master.identity
        with pytest.raises(pkcs11.AttributeSensitive):
            key[Attribute.VALUE]
        wrapping = session.generate_key(KeyType.AES, 256, capabilities=MechanismFlag.WRAP)
        with pytest.raises(pkcs11.PKCS11Error):
            wrapping.wrap_key(key, mechanism=Mechanism.AES_KEY_WRAP)


def test_record_is_one_of_sealing(master: Pkcs11Master, softhsm_token: SoftHsmToken) -> None:
    key = Secret.random(32)
    wrapped = master.wrap(key, b"place")
    assert wrapped[:5] == b"csvk\x01"
    assert len(wrapped) == 5 + 12 + 32 + 16
    with Session(softhsm_token) as session:
        parameters = pkcs11.GCMParams(wrapped[5:17], b"csvk\x01place", 128)
        plain = session.get_key(label=LABEL).decrypt(wrapped[17:], mechanism=Mechanism.AES_GCM, mechanism_param=parameters)
    assert key == plain


def test_every_altered_byte_is_found(master: Pkcs11Master) -> None:
    key = Secret.random(32)
    wrapped = master.wrap(key, b"place")
    for position in range(len(wrapped)):
        altered = bytearray(wrapped)
        altered[position] ^= 1
        with pytest.raises(AuthenticationError):
            master.unwrap(altered, b"place")
    for length in (0, 1, 5, 17, 33, len(wrapped) - 1):
        with pytest.raises(AuthenticationError):
            master.unwrap(wrapped[:length], b"place")
    with pytest.raises(AuthenticationError, match="does not authenticate"):
        master.unwrap(wrapped, b"plaza")
    assert master.unwrap(wrapped, b"place") == key


def test_another_key_of_the_token_is_found(master: Pkcs11Master, softhsm_token: SoftHsmToken) -> None:
    other = create(softhsm_token, "second")
    assert other.identity != master.identity
    with pytest.raises(AuthenticationError):
        other.unwrap(master.wrap(Secret.random(32), b""), b"")
    ring = KeyRing.create(master)
    sealed = ring.seal("default/key/1", 1, b"content")
    moved = ring.under(other)
    assert KeyRing.open(moved.rows, other).unseal("default/key/1", 1, sealed) == b"content"
    with pytest.raises(AuthenticationError, match="was wrapped by master key"):
        KeyRing.open(moved.rows, master)
    other.close()


def test_key_is_not_made_twice(master: Pkcs11Master, softhsm_token: SoftHsmToken) -> None:
    with pytest.raises(StateError, match=f"has a key '{LABEL}'; nothing was changed"):
        create(softhsm_token)
    assert reopen_identity(softhsm_token) == master.identity


def reopen_identity(token: SoftHsmToken) -> str:
    again = reopen(token)
    again.close()
    return again.identity


def test_no_key(softhsm_token: SoftHsmToken) -> None:
    with pytest.raises(StateError, match="has 0 keys of this label; expected one"):
        reopen(softhsm_token)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ({"id": b"1", "template": {Attribute.EXTRACTABLE: True}}, "can be read out of the token"),
        ({"id": b"1", "template": {Attribute.SENSITIVE: False}}, "can be read out of the token"),
        ({"id": b"1", "key_length": 128}, "is no AES-256 key"),
        ({"id": b"1", "capabilities": MechanismFlag.ENCRYPT}, "is not allowed to encrypt and decrypt"),
        ({}, r"has no id \(CKA_ID\)"),
    ],
)
def test_unfit_key_is_refused(softhsm_token: SoftHsmToken, template: dict[str, Any], words: str) -> None:
    pkcs11.lib(softhsm_token.module).reinitialize()
    with Session(softhsm_token) as session:
        safe = {Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False}
        arguments = {"key_length": 256, "capabilities": MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT, **template}
        arguments["template"] = safe | arguments.get("template", {})
        session.generate_key(KeyType.AES, label=LABEL, store=True, **arguments)
    with pytest.raises(StateError, match=words):
        reopen(softhsm_token)


def test_two_keys_of_one_label_are_refused(master: Pkcs11Master, softhsm_token: SoftHsmToken) -> None:
    with Session(softhsm_token) as session:
        session.generate_key(KeyType.AES, 256, label=LABEL, id=b"other", store=True)
    with pytest.raises(StateError, match="has 2 keys of this label"):
        reopen(softhsm_token)


def test_generic_secret_is_no_master_key(softhsm_token: SoftHsmToken) -> None:
    pkcs11.lib(softhsm_token.module).reinitialize()
    with Session(softhsm_token) as session:
        session.generate_key(KeyType.GENERIC_SECRET, 256, label=LABEL, id=b"1", store=True)
    with pytest.raises(StateError):
        reopen(softhsm_token)


# -- PINs ------------------------------------------------------------------------------------------------------------


def count_logins(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Labels of the tokens that are logged in to from now on."""
    tried: list[str] = []
    real = module._Module._log_in

    def log_in(self: Any, token: Any, label: str, pin: Secret) -> Any:
        tried.append(label)
        return real(self, token, label, pin)

    monkeypatch.setattr(module._Module, "_log_in", log_in)
    return tried


def test_wrong_pin_is_tried_once(softhsm_token: SoftHsmToken, monkeypatch: pytest.MonkeyPatch) -> None:
    create(softhsm_token).close()
    tried = count_logins(monkeypatch)
    wrong = Secret(b"not the PIN")
    with pytest.raises(AuthenticationError, match="refused the PIN; it is not tried again, because tokens lock") as caught:
        Pkcs11Master(softhsm_token.module, softhsm_token.label, wrong, LABEL)
    assert "not the PIN" not in str(caught.value)
    assert tried == [softhsm_token.label]
    for _ in range(3):
        with pytest.raises(AuthenticationError, match="has refused this PIN; it is not tried again"):
            Pkcs11Master(softhsm_token.module, softhsm_token.label, wrong, LABEL)
    assert tried == [softhsm_token.label]
    right = reopen(softhsm_token)
    assert len(tried) == 2
    right.close()


def test_pin_changed_meanwhile_is_tried_once(
    softhsm_token: SoftHsmToken, monkeypatch: pytest.MonkeyPatch, without_pause: None
) -> None:
    made = create(softhsm_token)
    with Session(softhsm_token) as session:
        session.set_pin(softhsm_token.pin, "a new PIN")
    pkcs11.lib(softhsm_token.module).reinitialize()  # ends the sessions, as a reset of the token does
    tried = count_logins(monkeypatch)
    for _ in range(5):
        with pytest.raises(AuthenticationError):
            made.wrap(Secret.random(32), b"")
    assert tried == [softhsm_token.label]
    made.close()
    again = Pkcs11Master(softhsm_token.module, softhsm_token.label, Secret(b"a new PIN"), LABEL)
    assert again.identity == made.identity
    again.close()


def test_another_pin_than_the_one_in_use_is_refused(master: Pkcs11Master, softhsm_token: SoftHsmToken) -> None:
    with pytest.raises(AuthenticationError, match="another PIN than the one that this process uses"):
        Pkcs11Master(softhsm_token.module, softhsm_token.label, Secret(b"not the PIN"), LABEL)
    assert master.unwrap(master.wrap(Secret.random(32), b""), b"")


@pytest.mark.parametrize(
    ("flag", "words"),
    [(TokenFlag.USER_PIN_LOCKED, "its PIN is locked"), (TokenFlag.USER_PIN_FINAL_TRY, "one try left before its PIN locks")],
)
def test_pin_in_danger_is_not_tried(
    softhsm_token: SoftHsmToken, flag: TokenFlag, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SoftHSM never sets these flags, so the token that `find` gives wears them here."""
    create(softhsm_token).close()
    real = module._Module.find

    class Worn:
        def __init__(self, token: Any) -> None:
            self.token, self.flags, self.slot = token, token.flags | flag, token.slot

    monkeypatch.setattr(module._Module, "find", lambda self, label: Worn(real(self, label)))
    tried = count_logins(monkeypatch)
    with pytest.raises(AuthenticationError, match=words):
        reopen(softhsm_token)
    assert tried == []


def test_pin_must_be_text(softhsm_token: SoftHsmToken) -> None:
    with pytest.raises(ArgumentError, match="PIN: is no UTF-8 text"):
        Pkcs11Master(softhsm_token.module, softhsm_token.label, Secret(b"\xff\xff\xff\xff"), LABEL)


def test_pin_that_the_token_finds_too_short(softhsm_token: SoftHsmToken) -> None:
    with pytest.raises(AuthenticationError, match="refused the PIN"):
        Pkcs11Master(softhsm_token.module, softhsm_token.label, Secret(b"1"), LABEL)


def test_pin_is_wiped_at_close(softhsm_token: SoftHsmToken) -> None:
    made = create(softhsm_token)
    pin = made._login.pin
    made.close()
    with pytest.raises(ClosedError):
        bytes(pin)


# -- tokens that come and go -----------------------------------------------------------------------------------------


def test_no_such_token(softhsm_token: SoftHsmToken) -> None:
    with pytest.raises(UnavailableError, match=r"token 'another' of .*NoSuchToken"):
        Pkcs11Master(softhsm_token.module, "another", pin_of(softhsm_token), LABEL)


@pytest.mark.parametrize("path", ["/nonexistent/module.so", "/etc/passwd", "libc.so.6"])
def test_no_such_module(path: str) -> None:
    with pytest.raises(StateError, match=f"^{path}: cannot be loaded as a PKCS#11 module"):
        Pkcs11Master(path, "token", Secret(b"1234"), LABEL)


def test_sessions_that_died_are_made_anew(master: Pkcs11Master, softhsm_token: SoftHsmToken) -> None:
    wrapped = master.wrap(Secret.random(32), b"")
    for _ in range(3):
        pkcs11.lib(softhsm_token.module).reinitialize()
        master.unwrap(wrapped, b"")


def test_log_out_by_somebody_else_is_healed(master: Pkcs11Master, softhsm_token: SoftHsmToken) -> None:
    wrapped = master.wrap(Secret.random(32), b"")
    master._login.session.close()
    master.unwrap(wrapped, b"")


def test_token_made_by_another_process_is_seen(softhsm_token: SoftHsmToken) -> None:
    pkcs11.lib(softhsm_token.module).reinitialize()
    later = softhsm_token._replace(label=softhsm_token.label + " later")
    later.initialize()
    create(later).close()
    later.delete()


def test_token_that_is_pulled_out(softhsm_token: SoftHsmToken, without_pause: None) -> None:
    made = create(softhsm_token)
    wrapped = made.wrap(Secret.random(32), b"")
    softhsm_token.delete()
    for _ in range(2):
        with pytest.raises(UnavailableError, match=f"token '{softhsm_token.label}'"):
            made.unwrap(wrapped, b"")
        with pytest.raises(UnavailableError):
            made.wrap(Secret.random(32), b"")
    softhsm_token.initialize()
    with pytest.raises(UnavailableError, match="has 0 keys of this label"):
        made.unwrap(wrapped, b"")
    # A key of the same name is not the same key.
    stranger = create(softhsm_token)
    with pytest.raises(UnavailableError, match=rf"is now another key, {stranger.identity}; expected {made.identity}"):
        made.unwrap(wrapped, b"")
    stranger.close()
    made.close()


def test_token_that_comes_back(softhsm_token: SoftHsmToken, without_pause: None) -> None:
    made = create(softhsm_token)
    wrapped = made.wrap(Secret.random(32), b"")
    tokens = Path(os.environ["SOFTHSM2_CONF"]).with_name("tokens")
    away = tokens.rename(tokens.with_name("away"))
    tokens.mkdir()
    with pytest.raises(UnavailableError):
        made.unwrap(wrapped, b"")
    tokens.rmdir()
    away.rename(tokens)
    assert len(made.unwrap(wrapped, b"")) == 32
    made.close()


def test_absent_token_is_not_looked_for_at_each_call(softhsm_token: SoftHsmToken, monkeypatch: pytest.MonkeyPatch) -> None:
    made = create(softhsm_token)
    softhsm_token.delete()
    with pytest.raises(UnavailableError):
        made.wrap(Secret.random(32), b"")
    looked: list[str] = []
    monkeypatch.setattr(module._Module, "find", lambda self, label: looked.append(label))
    before = time.monotonic()
    for _ in range(100):
        with pytest.raises(UnavailableError, match="could not be reached a moment ago"):
            made.wrap(Secret.random(32), b"")
    assert time.monotonic() - before < 0.9
    assert looked == []
    made.close()


def test_handles_of_an_ended_session_are_not_used(master: Pkcs11Master, softhsm_token: SoftHsmToken) -> None:
    """After a reset the same number may be another key's handle: two keys whose handles change places must not be mixed up."""
    second = create(softhsm_token, "second")
    wrapped = {found: found.wrap(Secret.random(32), b"") for found in (master, second)}
    for order in ((master, second), (second, master)) * 3:
        pkcs11.lib(softhsm_token.module).reinitialize()
        for found in order:
            found.unwrap(wrapped[found], b"")
            assert found.unwrap(found.wrap(Secret.random(32), b"new"), b"new")
    second.close()


def test_closed_master_is_refused(softhsm_token: SoftHsmToken) -> None:
    made = create(softhsm_token)
    made.close()
    made.close()
    with pytest.raises(ClosedError):
        made.wrap(Secret.random(32), b"")
    with pytest.raises(ClosedError):
        made.unwrap(b"csvk\x01" + bytes(60), b"")


def test_threads_share_a_token(softhsm_token: SoftHsmToken) -> None:
    made = [create(softhsm_token, f"key {number}") for number in range(2)]
    wrong: list[object] = []
    stop = threading.Event()

    def work(own: Pkcs11Master) -> None:
        try:
            for number in range(60):
                key = Secret.random(32)
                place = str(number).encode()
                assert own.unwrap(own.wrap(key, place), place) == key
                with pytest.raises(AuthenticationError):
                    own.unwrap(own.wrap(key, place), b"elsewhere")
        except BaseException as error:
            wrong.append(error)

    def disturb() -> None:
        while not stop.wait(0.05):
            with made[0]._module.lock:
                pkcs11.lib(softhsm_token.module).reinitialize()

    threads = [threading.Thread(target=work, args=(made[number % 2],)) for number in range(6)]
    disturber = threading.Thread(target=disturb)
    for thread in (*threads, disturber):
        thread.start()
    for thread in threads:
        thread.join(60)
    stop.set()
    disturber.join(60)
    for found in made:
        found.close()
    assert wrong == []


def test_child_of_a_fork_must_open_its_own(master: Pkcs11Master, softhsm_token: SoftHsmToken) -> None:
    program = """
import os, sys
from csvfast.broker.master_pkcs11 import Pkcs11Master
from csvfast.crypto import Secret
from csvfast.errors import UnavailableError
module, token, key = sys.argv[1:]
pin = Secret(sys.stdin.buffer.read())
parent = Pkcs11Master(module, token, pin, key)
wrapped = parent.wrap(Secret(b"k" * 32), b"")
child = os.fork()
if child == 0:
    try:
        parent.unwrap(wrapped, b"")
    except UnavailableError as error:
        print(str(error).partition(": ")[2])
    parent.close()
    own = Pkcs11Master(module, token, pin, key)
    print(own.unwrap(wrapped, b"") == b"k" * 32)
    own.close()
    sys.stdout.flush()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(parent.unwrap(wrapped, b"") == b"k" * 32)
parent.close()
"""
    arguments = [sys.executable, "-c", program, softhsm_token.module, softhsm_token.label, LABEL]
    ended = subprocess.run(arguments, input=softhsm_token.pin.encode(), capture_output=True, timeout=60, check=False)
    assert ended.stdout.decode().splitlines() == [
        "opened before a fork; open the master key in the process that uses it",
        "True",
        "True",
    ], ended.stderr.decode()


# -- configuration ---------------------------------------------------------------------------------------------------


def test_configured_token(softhsm_token: SoftHsmToken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pin").write_text(softhsm_token.pin + "\n")
    (tmp_path / "pin").chmod(0o600)
    config: dict[str, Any] = {
        "kind": "pkcs11",
        "module": softhsm_token.module,
        "token": softhsm_token.label,
        "key": LABEL,
        "pin": {"file": "pin"},
    }
    made = create_master(config, base=tmp_path)
    monkeypatch.setenv("CSVFAST_TEST_PIN", softhsm_token.pin)
    again = open_master({**config, "pin": {"environment": "CSVFAST_TEST_PIN"}})
    assert again.identity == made.identity
    assert repr(again) == f"<Pkcs11Master {made.identity}>"
    assert softhsm_token.pin not in repr(vars(again))
    made.close()
    again.close()
    (tmp_path / "pin").write_text("123\n")
    with pytest.raises(LengthError, match=r"PIN: 3 bytes; expected 4 .. 1024"):
        open_master(config, base=tmp_path)
