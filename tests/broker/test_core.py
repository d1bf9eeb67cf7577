"""The broker behind its doors: what it releases, what it refuses, what is on record, and that nothing outlives its revocation."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
from broker.simulated_guest import DEBUGGABLE, SimulatedGuest, SimulatedMachine

from csvfast.broker.administration import LOCAL, Administration, Administrator
from csvfast.broker.attestation import Attestation, Trust
from csvfast.broker.core import Broker
from csvfast.broker.limits import Limits, LimitsConfig
from csvfast.broker.master import FileMaster
from csvfast.broker.model import ResourcePath
from csvfast.broker.policy import default_policies
from csvfast.broker.store import Job, Store
from csvfast.errors import (
    DeniedError,
    LengthError,
    LimitedError,
    RequestError,
    UnavailableError,
    UnknownError,
    VerificationError,
)
from csvfast.ratstls.certificate import AttestedCertificate, attest_certificate, read_certificate, read_raw_evidence
from csvfast.ratstls.keys import TlsKey
from csvfast.report import Evidence

PATH = ResourcePath("default", "key", "disk")
NONCE = bytes(range(64))


@pytest.fixture(scope="module")
def machine() -> Iterator[SimulatedMachine]:
    with SimulatedMachine() as machine:
        yield machine


@pytest.fixture(scope="module")
def guest(machine: SimulatedMachine, tmp_path_factory: pytest.TempPathFactory) -> SimulatedGuest:
    firmware = tmp_path_factory.mktemp("guest") / "firmware"
    firmware.write_bytes(bytes(range(256)) * 256)
    return machine.launch(firmware)


class Setting:
    """A broker with one key, one reference value, and a clock."""

    def __init__(self, directory: Path, roots: tuple[Any, ...], measure: bytes, **limits: Any) -> None:
        self.now = 1_800_000_000.0
        self.store = Store.open(
            f"sqlite:///{directory}/broker.db", FileMaster.create(directory / "master.key"), create=True, clock=lambda: self.now
        )
        self.limits = Limits(LimitsConfig(**limits), clock=lambda: self.now)
        self.broker = Broker(self.store, Trust(roots), self.limits, clock=lambda: self.now)
        self.administration = Administration(self.store, clock=lambda: self.now)
        self.administration.put_resource(LOCAL, PATH, b"the key of a disk, 32 bytes long")
        self.administration.put_reference(LOCAL, "csv_measure", [measure.hex()], self.now + 1000)

    def attest(self, guest: Any, report_data: bytes = NONCE, expected: bytes = NONCE) -> Attestation:
        evidence = guest if isinstance(guest, bytes) else guest.evidence(report_data).to_rats_tls()
        return asyncio.run(
            self.broker.attest(evidence, expected, encoded=evidence, door="kbs", address="192.0.2.1", correlation="c0ffee")
        )

    def release(self, attestation: Attestation, path: ResourcePath = PATH, **more: Any) -> bytes:
        found = asyncio.run(
            self.broker.release(attestation, path, door="kbs", address="192.0.2.1", correlation="c0ffee", **more)
        )
        return bytes(found.content)


@pytest.fixture
def setting(tmp_path: Path, machine: SimulatedMachine, guest: SimulatedGuest) -> Iterator[Setting]:
    setting = Setting(tmp_path, machine.roots, guest.measure)
    yield setting
    setting.store.close()


def last(setting: Setting) -> Any:
    return list(setting.store.iterate_audit())[-1].record


def test_a_key_for_a_guest_that_proves_itself(setting: Setting, guest: SimulatedGuest, machine: SimulatedMachine) -> None:
    attestation = setting.attest(guest)
    assert attestation.decision.status == "affirming"
    assert last(setting).action == "attest"
    assert setting.release(attestation) == b"the key of a disk, 32 bytes long"
    record = last(setting)
    assert (record.action, record.outcome, record.resource, record.resource_version) == ("release", "allowed", str(PATH), 1)
    assert record.subject["chip_id"] == machine.chip.chip_id
    assert record.subject["measure"] == guest.measure.hex()
    assert record.policy["appraisal"] == "default_cpu"
    assert len(record.policy["resource_digest"]) == 64
    assert record.correlation == "c0ffee"
    assert setting.store.verify_audit().intact
    text = "".join(str(entry.record) for entry in setting.store.iterate_audit())
    assert "key of a disk" not in text
    assert b"key of a disk".hex() not in text


def denied(setting: Setting, call: Any, word: str) -> None:
    count = len(list(setting.store.iterate_audit()))
    with pytest.raises(DeniedError) as refusal:
        call()
    assert word in refusal.value.reason
    assert str(refusal.value) == "not allowed (c0ffee)"
    record = last(setting)
    assert len(list(setting.store.iterate_audit())) == count + 1
    assert record.outcome == "denied"
    assert word in record.reason


def test_wrong_measurement(setting: Setting, machine: SimulatedMachine, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(bytes(65536))
    denied(setting, lambda: setting.attest(machine.launch(tmp_path / "other")), "measure")


def test_debuggable_guest(setting: Setting, machine: SimulatedMachine, tmp_path: Path) -> None:
    (tmp_path / "firmware").write_bytes(bytes(range(256)) * 256)
    denied(setting, lambda: setting.attest(machine.launch(tmp_path / "firmware", DEBUGGABLE)), "nodbg")


def test_stale_nonce(setting: Setting, guest: SimulatedGuest) -> None:
    denied(setting, lambda: setting.attest(guest, bytes(64)), "report data")


def test_evidence_of_another_chip(setting: Setting, guest: SimulatedGuest) -> None:
    with SimulatedMachine() as other:
        pieces = bytearray(guest.evidence(NONCE).to_rats_tls())
        pieces[4096:7012] = other.chip.hsk_cek
        denied(setting, lambda: setting.attest(bytes(pieces)), "genuine")


def test_chips_that_are_not_on_the_list(setting: Setting, guest: SimulatedGuest) -> None:
    setting.administration.put_reference(LOCAL, "csv_cek_fingerprint", ["00" * 32], None)
    denied(setting, lambda: setting.attest(guest), "cek_fingerprint")


def test_a_simulated_chip_under_hygons_root(tmp_path: Path, guest: SimulatedGuest) -> None:
    from csvfast.certs import hygon_root

    setting = Setting(tmp_path, (hygon_root(),), guest.measure)
    denied(setting, lambda: setting.attest(guest), "genuine")
    setting.store.close()


def test_no_roots_no_broker(setting: Setting) -> None:
    with pytest.raises(VerificationError, match="no trusted root"):
        Broker(setting.store, Trust(()), setting.limits)


def test_an_expired_reference(setting: Setting, guest: SimulatedGuest) -> None:
    attestation = setting.attest(guest)
    setting.now += 999
    assert setting.release(attestation)
    setting.now += 2
    denied(setting, lambda: setting.release(attestation), "csv_measure")
    denied(setting, lambda: setting.attest(guest), "csv_measure")


def test_a_withdrawn_reference(setting: Setting, guest: SimulatedGuest) -> None:
    attestation = setting.attest(guest)
    setting.administration.delete_reference(LOCAL, "csv_measure")
    denied(setting, lambda: setting.release(attestation), "csv_measure")


def test_a_deleted_key(setting: Setting, guest: SimulatedGuest) -> None:
    attestation = setting.attest(guest)
    assert setting.release(attestation)
    setting.administration.delete_resource(LOCAL, PATH)
    denied(setting, lambda: setting.release(attestation), "no such resource")


def test_versions(setting: Setting, guest: SimulatedGuest) -> None:
    attestation = setting.attest(guest)
    first = setting.release(attestation)
    assert setting.administration.rotate_resource(LOCAL, PATH) == 2
    second = setting.release(attestation)
    assert second != first
    assert len(second) == len(first)
    assert setting.release(attestation, query={"version": "1"}) == first
    setting.administration.retire_resource(LOCAL, PATH, 1)
    denied(setting, lambda: setting.release(attestation, query={"version": "1"}), "no such resource")
    assert setting.release(attestation) == second
    for wrong in ("", "-1", "x", "1" * 10, "1.0"):
        with pytest.raises(RequestError, match="version"):
            setting.release(attestation, query={"version": wrong})


def test_a_resource_policy_of_the_repository(setting: Setting, guest: SimulatedGuest) -> None:
    attestation = setting.attest(guest)
    shipped = next(text for kind, _id, _engine, text in default_policies() if kind == "resource")
    assert 'resource = "*' in shipped
    setting.administration.put_policy(LOCAL, "resource", "other", shipped.replace('resource = "*', 'resource = "nothing*'))
    assert setting.release(attestation)
    setting.administration.put_policy(LOCAL, "resource", "default", shipped.replace('resource = "*', 'resource = "nothing*'))
    denied(setting, lambda: setting.release(attestation), "resource policy")


def test_what_another_process_changes_counts_at_once(setting: Setting, guest: SimulatedGuest, tmp_path: Path) -> None:
    attestation = setting.attest(guest)
    assert setting.release(attestation)
    with Store.open(f"sqlite:///{tmp_path}/broker.db", FileMaster(tmp_path / "master.key")) as elsewhere:
        Administration(elsewhere).delete_resource(LOCAL, PATH)
    denied(setting, lambda: setting.release(attestation), "no such resource")


def test_what_another_process_allows_counts_at_once(setting: Setting, guest: SimulatedGuest, tmp_path: Path) -> None:
    setting.administration.delete_reference(LOCAL, "csv_measure")
    denied(setting, lambda: setting.attest(guest), "csv_measure")
    with Store.open(f"sqlite:///{tmp_path}/broker.db", FileMaster(tmp_path / "master.key")) as elsewhere:
        Administration(elsewhere).put_reference(LOCAL, "csv_measure", [guest.measure.hex()], None)
    assert setting.attest(guest).allowed


def test_an_attestation_survives_the_session_store(setting: Setting, guest: SimulatedGuest) -> None:
    attestation = setting.attest(guest)
    again = Attestation.from_json(attestation.to_json())
    assert again == attestation
    assert again.token_claims() == attestation.token_claims()
    assert setting.release(again)


def test_no_record_no_release(setting: Setting, guest: SimulatedGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    attestation = setting.attest(guest)

    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("csvfast.broker.store.committer.Committer._transact", full)
        with pytest.raises(UnavailableError):
            setting.release(attestation)
    assert setting.release(attestation)


def test_limits(tmp_path: Path, machine: SimulatedMachine, guest: SimulatedGuest) -> None:
    setting = Setting(tmp_path, machine.roots, guest.measure)
    attestation = setting.attest(guest)
    with pytest.raises(LimitedError) as limit:  # noqa: PT012
        for _ in range(1_000_000):
            setting.limits.check_release(attestation.key or attestation.evidence_digest, str(PATH))
    assert limit.value.retry_after > 0
    with pytest.raises(LimitedError):
        setting.release(attestation)
    assert last(setting).outcome == "denied"
    setting.store.close()


def test_an_expired_token_is_on_record(setting: Setting, guest: SimulatedGuest) -> None:
    """A guest known by another issuer's token alone: nothing is left to appraise."""
    attestation = replace(setting.attest(guest), document={}, generation=-1, valid_until=setting.now + 10)
    assert setting.release(attestation)
    setting.now += 11
    denied(setting, lambda: setting.release(attestation), "expired")


def test_guests_that_wait_for_a_key_server_keep_nobody_else_waiting(
    setting: Setting, guest: SimulatedGuest, machine: SimulatedMachine
) -> None:
    """Strangers' evidence without certificates, and a key server that does not answer: no thread of others is taken."""
    answers = threading.Event()

    class Silent:
        def find(self, _chip: str, **_more: Any) -> None:
            answers.wait(30)

    broker = Broker(setting.store, Trust(machine.roots, Silent()), setting.limits, clock=lambda: setting.now)  # type: ignore[arg-type]
    report = guest.evidence(NONCE).report

    def ask() -> Any:
        return broker.attest(
            Evidence(report), NONCE, encoded=b"", door="kbs", address="192.0.2.9", correlation="c0ffee"
        )

    async def main() -> list[BaseException | Any]:
        waiting = [asyncio.ensure_future(ask()) for _ in range(128)]
        await asyncio.sleep(0)
        try:
            with pytest.raises(LimitedError, match="wait to be verified"):
                await ask()
            async with asyncio.timeout(5):
                await asyncio.to_thread(setting.store.look)
        finally:
            answers.set()
        return await asyncio.gather(*waiting, return_exceptions=True)

    assert {type(outcome) for outcome in asyncio.run(main())} == {DeniedError}


def test_refusals_without_end_are_on_record_and_lock_out(setting: Setting, guest: SimulatedGuest) -> None:
    for _ in range(200):
        setting.broker.record_refusal(door="verdictd", address="192.0.2.66", reason="no certificate")
    with pytest.raises(LimitedError):
        setting.limits.check_request("192.0.2.66")
    assert setting.attest(guest).allowed
    assert sum(entry.record.address == "192.0.2.66" for entry in setting.store.iterate_audit()) == 200


# ---- Guests that come back


def certificate_of(guest: SimulatedGuest) -> AttestedCertificate:
    return read_certificate(attest_certificate(TlsKey.generate(), guest))


def test_what_was_proved_holds_for_the_same_bytes_alone(
    setting: Setting, guest: SimulatedGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = setting.broker.judge("verdictd")
    certificate = certificate_of(guest)
    verified = judge.verify(certificate)
    first = judge.appraise(verified, certificate)
    assert first.allowed
    again = read_certificate(certificate.der)
    assert judge.verify(again) is verified
    assert judge.appraise(verified, again).attestation is first.attestation
    # Fresh evidence on the same connection comes with the same certificate: it must be looked at.
    buffer = certificate.buffer
    assert buffer is not None
    at = 0xC0  # the report's signature
    forged = buffer.raw[:at] + bytes([buffer.raw[at] ^ 1]) + buffer.raw[at + 1 :]
    for changed in (
        replace(certificate, buffer=replace(buffer, raw=forged), evidence=read_raw_evidence(forged)),
        replace(certificate, buffer=replace(buffer, claims=buffer.claims[:-1] + bytes([buffer.claims[-1] ^ 1]))),
    ):
        with pytest.raises(VerificationError):
            judge.verify(changed)
    monkeypatch.setattr("csvfast.broker.core.verify_guest", lambda *_arguments: 1 / 0)
    assert judge.verify(again) is verified
    with pytest.raises(ZeroDivisionError):
        judge.verify(certificate_of(guest))


def test_what_it_is_worth_is_decided_anew(setting: Setting, guest: SimulatedGuest) -> None:
    judge = setting.broker.judge("verdictd")
    certificate = certificate_of(guest)
    verified = judge.verify(certificate)
    assert judge.appraise(verified, certificate).allowed
    setting.administration.put_reference(LOCAL, "csv_measure", ["00" * 32], None)
    assert not judge.appraise(verified, certificate).allowed
    setting.administration.put_reference(LOCAL, "csv_measure", [guest.measure.hex()], setting.now + 10)
    assert judge.appraise(verified, certificate).allowed
    setting.now += 11
    assert not judge.appraise(verified, certificate).allowed


# ---- Administration


def test_roles_are_separate(setting: Setting) -> None:
    administration = setting.administration
    keys, policy, audit = (Administrator(name, frozenset([name]), "*") for name in ("keys", "policy", "audit"))
    administration.create_key(keys, ResourcePath("a", "b", "c"))
    administration.put_reference(policy, "x", ["y"], None)
    assert list(administration.audit_records(audit))
    for call in (
        lambda: administration.create_key(policy, PATH),
        lambda: administration.read_resource(audit, PATH),
        lambda: administration.put_policy(keys, "resource", "default", ""),
        lambda: administration.put_reference(audit, "x", ["y"], None),
        lambda: administration.delete_resource(policy, PATH),
        lambda: list(administration.audit_records(keys)),
        lambda: administration.verify_audit(policy),
        lambda: administration.create_token(keys, "t", ["policy"]),
    ):
        with pytest.raises(DeniedError, match="not allowed") as refusal:
            call()
        assert "role" in refusal.value.reason
    setting.store.committer.run(Job())
    assert last(setting).outcome == "denied"


def test_scopes(setting: Setting) -> None:
    administration = setting.administration
    who = Administrator("tenant", frozenset(["keys"]), "tenant/*")
    administration.create_key(who, ResourcePath("tenant", "key", "1"))
    with pytest.raises(DeniedError) as refusal:
        administration.read_resource(who, PATH)
    assert "scope" in refusal.value.reason
    assert [str(row.path) for row in administration.list_resources(who)] == ["tenant/key/1"]
    with pytest.raises(DeniedError):
        administration.create_token(who, "t", ["keys"], scope="*")
    administration.create_token(who, "t", ["keys"], scope="tenant/*")
    administration.create_token(LOCAL, "all", ["keys"])
    with pytest.raises(DeniedError, match="not allowed") as refusal:
        administration.revoke_token(who, "all")
    assert "scope" in refusal.value.reason
    assert [row.name for row in administration.list_tokens(who)] == ["t"]
    administration.revoke_token(who, "t")


ALLOW: Final = '[[allow]]\nresource = "*/*/*"\n[[allow.rule]]\nname = "csv"\nclaim = "tee"\nequals = "csv"\n'


def test_a_tenant_decides_about_himself_alone(setting: Setting) -> None:
    administration = setting.administration
    text = f'name = "t"\n{ALLOW}'
    for scope in ("tenant/*", "tenant/*/*", "ten*/*"):
        who = Administrator("tenant", frozenset(["policy"]), scope)
        administration.put_policy(who, "resource", "tenant", text)
        refused: list[Callable[[], object]] = [
            lambda who=who: administration.put_policy(who, "resource", "default", text),  # type: ignore[misc]
            lambda who=who: administration.put_policy(who, "resource", "other", text),  # type: ignore[misc]
            lambda who=who: administration.put_policy(who, "appraisal", "tenant", text),  # type: ignore[misc]
            lambda who=who: administration.delete_policy(who, "resource", "default"),  # type: ignore[misc]
            lambda who=who: administration.put_reference(who, "csv_measure", ["a"], None),  # type: ignore[misc]
            lambda who=who: administration.delete_reference(who, "csv_measure"),  # type: ignore[misc]
        ]
        for call in refused:
            with pytest.raises(DeniedError):
                call()
        administration.delete_policy(who, "resource", "tenant")
    for scope in ("tenant/key/*", "tenant", "tenant*", "*/key/*", "*/*"):
        with pytest.raises(DeniedError):
            administration.put_policy(Administrator("x", frozenset(["policy"]), scope), "resource", "default", text)
        if scope != "*/*":
            with pytest.raises(DeniedError):
                administration.put_policy(Administrator("x", frozenset(["policy"]), scope), "resource", "tenant", text)


def test_an_auditor_of_one_tenant(setting: Setting) -> None:
    administration = setting.administration
    for path in ("tenant/key/2", "other/key/2", "tenant/key/3"):
        administration.create_key(LOCAL, ResourcePath.parse(path))
    who = Administrator("tenant", frozenset(["audit"]), "tenant/*")
    found = list(administration.audit_records(who, limit=1000))
    assert {one.record.resource.partition("/")[0] for one in found} == {"tenant"}
    assert len(list(administration.audit_records(who, limit=1))) == 1


def test_what_another_process_deletes_is_not_read_from_memory(setting: Setting, tmp_path: Path) -> None:
    assert setting.administration.read_resource(LOCAL, PATH)
    with Store.open(f"sqlite:///{tmp_path}/broker.db", FileMaster(tmp_path / "master.key")) as elsewhere:
        Administration(elsewhere).delete_resource(LOCAL, PATH)
    assert setting.store.cached_resource(PATH) is not None  # nothing has been heard of it yet
    with pytest.raises(UnknownError):
        setting.administration.read_resource(LOCAL, PATH)
    assert last(setting).action == "delete resource"


def test_tokens(setting: Setting) -> None:
    administration = setting.administration
    text = bytes(administration.create_token(LOCAL, "alice", ["keys"], scope="a/*", expires=setting.now + 10)).decode()
    who = administration.authenticate(text, address="192.0.2.7")
    assert (who.name, who.roles, who.scope, who.address) == ("alice", frozenset(["keys"]), "a/*", "192.0.2.7")
    for wrong in (text[:-1], text + "A", "", "csvt_", text.upper(), "csvt_" + "A" * 43):
        with pytest.raises(DeniedError):
            administration.authenticate(wrong)
    with pytest.raises(DeniedError):
        administration.authenticate(None)
    setting.now += 11
    with pytest.raises(DeniedError):
        administration.authenticate(text)
    administration.create_token(LOCAL, "bob", ["keys"])
    administration.revoke_token(LOCAL, "bob")


def test_a_token_gives_none_that_outlives_it(setting: Setting) -> None:
    administration = setting.administration
    text = bytes(administration.create_token(LOCAL, "alice", ["keys"], expires=setting.now + 10)).decode()
    alice = administration.authenticate(text)
    for name, wanted in (("child", None), ("other", setting.now + 1000)):
        given = bytes(administration.create_token(alice, name, ["keys"], expires=wanted)).decode()
        assert administration.authenticate(given).expires == setting.now + 10
    for name in ("local", "guest", "nobody"):
        with pytest.raises(RequestError, match="another name"):
            administration.create_token(LOCAL, name, ["keys"])


def test_certificates_of_administrators(setting: Setting) -> None:
    known = Administrator("carol", frozenset(["audit"]))
    administration = Administration(setting.store, certificates={"ab" * 32: known})
    assert administration.authenticate(None, "AB" * 32).name == "carol"
    with pytest.raises(DeniedError):
        administration.authenticate(None, "cd" * 32)
    with pytest.raises(DeniedError):
        administration.authenticate("csvt_wrong", "ab" * 32)  # a token that is wrong is no reason to look further


def test_contents(setting: Setting) -> None:
    for content in (b"", bytes((2 << 20) + 1)):
        with pytest.raises(LengthError):
            setting.administration.put_resource(LOCAL, PATH, content)
