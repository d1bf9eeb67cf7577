"""Verdictd's door over real sockets: every command, to guests on simulated chips; who gets what, and what is on record."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from attest.simulated_evidence import MEASURE, Platform
from broker.verdictd_rig import KEY, Rig, ask, ended, new_guest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from OpenSSL import SSL
from ratstls.simulated_peers import SimulatedAttester, attested, plain

from csvfast.broker.administration import LOCAL
from csvfast.broker.clients.verdictd import AsyncVerdictdClient, Blob
from csvfast.broker.config import Address, BrokerConfig
from csvfast.broker.model import ResourcePath
from csvfast.broker.service import Service
from csvfast.broker.store import Job
from csvfast.broker.verdictd import VerdictdDoor
from csvfast.certs.private import write_private_file
from csvfast.errors import (
    ArgumentError,
    AttestedTlsError,
    DeniedError,
    LimitedError,
    RequestError,
    StateError,
    UnavailableError,
)
from csvfast.ratstls.asynchronous import open_connection
from csvfast.ratstls.context import EndpointContext, TlsOptions, sm_is_available
from csvfast.ratstls.keys import TlsKey
from csvfast.ratstls.peer import Requirement
from csvfast.report import GuestPolicy


@pytest.fixture(scope="module")
def platform() -> Platform:
    return Platform()


@pytest.fixture
def rig(tmp_path: Path, platform: Platform) -> Iterator[Rig]:
    with Rig(tmp_path, platform) as made:
        yield made


def blob(kid: str = "disk", plaintext: bytes = b"layer key", key: bytes = KEY, algorithm: str = "AES") -> Blob:
    nonce = os.urandom(12)
    sealed = AESGCM(key).encrypt(nonce, plaintext, None)
    return Blob(kid, base64.b64encode(sealed).decode(), algorithm, 256, base64.b64encode(nonce).decode())


# ---- Replies as they are on the wire


def test_the_commands_of_a_client_of_verdictd(rig: Rig) -> None:
    """Requests as eaa_kbc writes them, replies compared byte by byte."""
    rig.put("verdictd/image/policy", b'{"default":[{"type":"reject"}]}')
    secret = blob()

    async def work() -> None:
        stream = await rig.connect()
        assert await ask(stream, b'{"command":"version"}') == b'{"status":"OK","version":"v1"}'
        key = base64.b64encode(KEY)
        assert await ask(stream, b'{"command":"Get KEK","kids":["disk"]}') == b'{"status":"OK","data":{"disk":"%b"}}' % key
        for kid in ("default/key/disk", "kbs:///default/key/disk"):
            reply = await ask(stream, {"command": "Get KEK", "kids": [kid]})
            assert reply == b'{"status":"OK","data":{"%b":"%b"}}' % (kid.encode(), key)
        reply = await ask(stream, {"command": "Decrypt", "blobs": [secret._asdict()]})
        assert reply == b'{"status":"OK","data":{"%b":"bGF5ZXIga2V5"}}' % secret.encrypted_data.encode()
        info = await ask(stream, b'{"command":"Get Resource Info","name":"Policy"}')
        assert info == b'{"status":"OK","data":{"base64size":"44"}}'
        policy = base64.b64encode(b'{"default":[{"type":"reject"}]}')
        assert await ask(stream, b'{"command":"Get Policy","optional":{}}') == policy
        request = {"command": "Get Resource", "optional": {"resource_path": "verdictd/image/policy"}}
        assert await ask(stream, request) == policy
        assert await ask(stream, b'{ "command": "echo", "data": "Hello and welcome to RATS-TLS!\\n" }') == (
            b"Hello and welcome to RATS-TLS!\n"
        )
        assert await ended(stream)

    rig.run(work)


def test_refusals_on_the_wire(rig: Rig) -> None:
    async def work() -> list[bytes]:
        with closing(await rig.connect()) as stream:
            return [
                await ask(stream, {"command": "Get KEK", "kids": ["none"]}),
                await ask(stream, {"command": "Decrypt", "blobs": [blob("none")._asdict()]}),
                await ask(stream, {"command": "Get Resource Info", "name": "Policy"}),
                await ask(stream, {"command": "Get Policy", "optional": {}}),
                await ask(stream, {"command": "Get Resource", "optional": {"resource_path": "a/b/c"}}),
            ]

    replies = rig.run(work)
    denied = rig.records(outcome="denied")
    assert [record.action for record in denied] == ["release", "unwrap", "inspect", "release", "release"]
    words = [f"not allowed ({record.correlation})" for record in denied]
    assert replies[0] == b'{"status":"Fail","data":{},"error":"%b"}' % words[0].encode()
    assert replies[1] == b'{"status":"Fail","data":{},"error":"%b"}' % words[1].encode()
    assert replies[2] == b'{"status":"Fail","error":"%b"}' % words[2].encode()
    assert base64.b64decode(replies[3]) == b'{"status":"Fail","error":"%b"}' % words[3].encode()
    assert base64.b64decode(replies[4]) == b'{"status":"Fail","error":"%b"}' % words[4].encode()
    assert all("no such resource" in record.reason for record in denied)


@pytest.mark.parametrize(
    "request_",
    [
        b"{}", b'{"command":"shutdown"}', b'{"command":"Get KEK"}', b"GET / HTTP/1.1\r\n\r\n", b"[]", b'{"command":"version"]',
        b'{"a":\xff}',
    ],
)  # fmt: skip
def test_malformed_requests_end_the_connection(rig: Rig, request_: bytes) -> None:
    async def work() -> None:
        stream = await rig.connect()
        await stream.send(b'{"command":"version"}' + request_)
        assert await stream.receive() == b'{"status":"OK","version":"v1"}'
        assert await ended(stream)
        assert rig.door.stats()["malformed"] == 1

    rig.run(work)


def test_a_request_in_many_writes_and_many_in_one(rig: Rig) -> None:
    async def work() -> None:
        with closing(await rig.connect()) as stream:
            for byte in b'{"command":"version"} \r\n\t':
                await stream.send(bytes([byte]))
                await asyncio.sleep(0)
            assert await stream.receive() == b'{"status":"OK","version":"v1"}'
            await stream.send(b'{"command":"version"}\n' * 3 + b'{"command":"Get KEK",')
            replies = b""
            while len(replies) < 3 * 30:
                replies += await stream.receive()
            assert replies == b'{"status":"OK","version":"v1"}' * 3
            await stream.send(b'"kids":["disk"]}')
            assert json.loads(await stream.receive())["status"] == "OK"

    rig.run(work)


def test_a_reply_to_what_was_asked_before_half_closing(rig: Rig) -> None:
    async def work() -> None:
        stream = await rig.connect()
        await stream.send(b'{"command":"version"}')
        stream._link.connection._connection.shutdown()  # close_notify, and still reading
        stream._link._flush()
        assert await stream.receive() == b'{"status":"OK","version":"v1"}'
        assert await ended(stream)

    rig.run(work)


def test_sizes_at_which_a_short_read_is_no_end(rig: Rig) -> None:
    """JSON is padded; base64 cannot be, so its end is the connection's, unless the client knows the size."""
    rig.put("default/key/even", b"x" * 12288)
    rig.put("default/key/odd", b"x" * 12289)

    async def work() -> None:
        stream = await rig.connect()
        odd = {"command": "Get Resource", "optional": {"resource_path": "default/key/odd"}}
        even = {"command": "Get Resource", "optional": {"resource_path": "default/key/even"}}
        assert len(await ask(stream, odd)) == 16384
        assert len(await stream.receive()) == 4
        assert len(await ask(stream, even)) == 16384
        assert await ended(stream)
        stream = await rig.connect()
        info = await ask(stream, {"command": "Get Resource Info", "name": "default/key/even"})
        assert info == b'{"status":"OK","data":{"base64size":"16384"}}'
        assert len(await ask(stream, even)) == 16384
        assert await ask(stream, {"command": "version"}) == b'{"status":"OK","version":"v1"}'
        stream.close()
        async with rig.client() as client:
            assert bytes(await client.get_resource("default/key/even")) == b"x" * 12288
            assert bytes(await client.get_resource("kbs:///default/key/odd")) == b"x" * 12289

    rig.run(work)


def test_padding_of_json_replies(rig: Rig) -> None:
    wanted = 3 * 16384
    kids = [f"{index:02}" for index in range(9)]
    for kid in kids[:-1]:
        rig.put(f"default/key/{kid}", b"k" * 4096)
    frame = json.dumps({"status": "OK", "data": dict.fromkeys(kids, "")}, separators=(",", ":"))
    # The last key's base64 has a multiple of four characters; its id makes up the rest.
    fours, rest = divmod(wanted - len(frame) - 8 * 5464, 4)
    kids[-1] += "x" * rest
    rig.put(f"default/key/{kids[-1]}", b"k" * (3 * fours))

    async def work() -> bytes:
        with closing(await rig.connect()) as stream:
            reply = await ask(stream, {"command": "Get KEK", "kids": kids})
            while len(reply) < wanted:
                reply += await stream.receive()
            await stream.send(b'{"command":"version"}')
            return reply + await stream.receive()

    reply = rig.run(work)
    assert reply[wanted - 2 :] == b"}} "  # the pad has a record of its own
    assert json.loads(reply)["status"] == "OK"
    rig.door_arguments = {"pad_replies": False}
    assert rig.run(work)[wanted:] == b'{"status":"OK","version":"v1"}'


# ---- Keys and blobs


def test_keys_through_both_clients(rig: Rig) -> None:
    rig.put("tenant-a/disk/one", b"another key")

    def threads() -> None:
        with rig.blocking_client() as client:
            assert client.version() == "v1"
            assert client.get_kek("disk").equals(KEY)
            found = client.get_keks(["disk", "tenant-a/disk/one", "kbs:///tenant-a/disk/one"])
            assert {name: bytes(key) for name, key in found.items()} == {
                "disk": KEY, "tenant-a/disk/one": b"another key", "kbs:///tenant-a/disk/one": b"another key",
            }  # fmt: skip
            assert client.get_keks([]) == {}
            assert [bytes(one) for one in client.decrypt([blob(), blob("default/key/disk", b"x", algorithm="A256GCM")])] == [
                b"layer key", b"x",
            ]  # fmt: skip
            assert client.echo("1 \N{GRINNING FACE}") == "1 \N{GRINNING FACE}"
            assert client.get_kek("disk").equals(KEY)  # on a new connection

    async def work() -> None:
        await asyncio.to_thread(threads)
        async with rig.client() as client:
            assert await client.version() == "v1"
            assert (await client.get_kek("disk")).equals(KEY)
            assert [bytes(one) for one in await client.decrypt([blob()])] == [b"layer key"]
            assert await client.echo("x") == "x"
            found = await asyncio.gather(*(client.get_kek("disk") for _ in range(10)))
            assert all(key.equals(KEY) for key in found)

    rig.run(work)
    allowed = rig.records(outcome="allowed")
    assert {record.action for record in allowed} == {"release", "unwrap"}
    record = allowed[0]
    assert record.resource == "default/key/disk"
    assert record.resource_version == 1
    assert record.subject["measure"] == MEASURE.hex()
    assert record.subject["chip_id"] == rig.platform.chip.chip_id
    assert len(record.subject["key"]) == 64
    assert record.policy["appraisal"] == "default_cpu"
    assert rig.store.verify_audit().intact


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("policy", "policy"), ("sigstore_config", "sigstore"), ("gpg_keyring", "gpg-keyring"), ("cosign_key", "cosign-key"),
        ("credential", "credential"),
    ],
)  # fmt: skip
def test_named_resources(rig: Rig, name: str, path: str) -> None:
    content = os.urandom(40_000)
    rig.put(f"verdictd/image/{path}", content)

    async def work(client: AsyncVerdictdClient) -> None:
        assert (await getattr(client, f"get_{name}")()).equals(content)
        with pytest.raises(ArgumentError):
            await client._run(lambda steps: steps.get_named("Nothing"))  # type: ignore[arg-type]

    rig.converse(work)


def test_lists_longer_than_one_request(rig: Rig) -> None:
    kids = [f"key-{index:03}" for index in range(300)]
    for kid in kids[:: len(kids) - 1]:
        rig.put(f"default/key/{kid}", kid.encode())

    async def work(client: AsyncVerdictdClient) -> None:
        blobs = [blob(plaintext=b"%d" % index * 100) for index in range(70)]
        blobs.append(blobs[0])
        found = await client.decrypt(blobs)
        assert [bytes(one) for one in found] == [b"%d" % index * 100 for index in [*range(70), 0]]
        assert {name: bytes(key) for name, key in (await client.get_keks([kids[0], kids[-1]])).items()} == {
            kids[0]: kids[0].encode(), kids[-1]: kids[-1].encode(),
        }  # fmt: skip
        requests = rig.door.stats()["requests"]
        with pytest.raises(DeniedError):
            await client.get_keks(kids)  # most are not there
        assert rig.door.stats()["requests"] == requests + 1
        with pytest.raises(RequestError, match="4096"):
            await client.decrypt([blob(plaintext=bytes(8000))])
        client._steps._request_bytes = 65536  # type: ignore[misc]  # what csvfast's door reads
        assert [len(one) for one in await client.decrypt([blob(plaintext=bytes(8000))])] == [8000]

    rig.converse(work)


def test_all_or_nothing(rig: Rig) -> None:
    async def work() -> None:
        with closing(await rig.connect()) as stream:
            reply = json.loads(await ask(stream, {"command": "Get KEK", "kids": ["disk", "none"]}))
            assert reply["data"] == {}
            assert reply["error"].startswith("not allowed (")
            good, bad, foreign = blob(), blob(key=bytes(32)), blob("none")
            odd = blob()._replace(algorithm="A256CTR")
            twice = good._replace(iv=bad.iv)
            blobs = [one._asdict() for one in (good, bad, foreign, odd, good, twice)]
            reply = json.loads(await ask(stream, {"command": "Decrypt", "blobs": blobs}))
            assert reply["status"] == "Fail"
            assert reply["data"] == {}
            texts = reply["error"].split("; ")
            assert [text.partition(":")[0] for text in texts] == ["blob 1", "blob 2", "blob 3", "blob 5"]
            assert "does not open" in texts[0]
            assert "not allowed (" in texts[1]
            assert "algorithm" in texts[2]
            assert "another blob" in texts[3]
            reply = json.loads(await ask(stream, {"command": "Decrypt", "blobs": [bad._asdict()]}))
            assert reply["error"] == "does not open with its key"

    rig.run(work)
    # Of one list, each key is asked for once.
    assert [record.resource for record in rig.records(action="unwrap", outcome="denied")] == ["default/key/none"]
    assert len(rig.records(action="unwrap", outcome="allowed")) == 2


def test_limits_of_lists(rig: Rig) -> None:
    async def work() -> None:
        with closing(await rig.connect()) as stream:
            reply = json.loads(await ask(stream, {"command": "Get KEK", "kids": ["disk"] * 129}))
            assert "at most 128" in reply["error"]
            reply = json.loads(await ask(stream, {"command": "Decrypt", "blobs": [blob()._asdict()] * 65}))
            assert "at most 64" in reply["error"]
            assert await ask(stream, {"command": "Get KEK", "kids": []}) == b'{"status":"OK","data":{}}'
            assert await ask(stream, {"command": "Decrypt", "blobs": []}) == b'{"status":"OK","data":{}}'
            reply = json.loads(await ask(stream, {"command": "Get KEK", "kids": ["../../../etc/shadow"]}))
            assert reply["status"] == "Fail"

    rig.run(work)
    assert not rig.records()


def test_what_is_no_key(rig: Rig) -> None:
    rig.put("default/key/big", bytes(4097))
    rig.put("default/key/short", bytes(16))

    async def work(client: AsyncVerdictdClient) -> None:
        with pytest.raises(RequestError, match="no key but 4097 bytes"):
            await client.get_kek("big")
        with pytest.raises(RequestError, match="key of 16 bytes"):
            await client.decrypt([blob("short")])

    rig.converse(work)


def test_older_versions_of_a_key_open_what_they_sealed(rig: Rig) -> None:
    old = [KEY, *(bytes([index]) * 32 for index in range(1, 4))]
    for key in old[1:]:
        rig.put("default/key/disk", key)

    async def work(client: AsyncVerdictdClient) -> None:
        assert (await client.get_kek("disk")).equals(old[-1])
        blobs = [blob(plaintext=b"%d" % index, key=key) for index, key in enumerate(old)]
        assert [bytes(one) for one in await client.decrypt(blobs)] == [b"0", b"1", b"2", b"3"]
        path = ResourcePath.parse("default/key/disk")
        await asyncio.to_thread(rig.administration.retire_resource, LOCAL, path, 2)
        assert [bytes(one) for one in await client.decrypt(blobs[2:])] == [b"2", b"3"]
        with pytest.raises(RequestError, match="does not open"):
            await client.decrypt([blobs[1]])

    rig.converse(work)
    versions = [record.resource_version for record in rig.records(action="unwrap", outcome="allowed")]
    assert versions[:4] == [4, 3, 2, 1]


# ---- Who is let in


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"measure": bytes(32)}, "measure"),
        ({"policy": GuestPolicy.of(es=True, csv=True, api_major=1, api_minor=3)}, "nodbg"),
    ],
)
def test_guests_that_are_refused(rig: Rig, changes: dict[str, Any], word: str) -> None:
    async def work() -> None:
        with pytest.raises((AttestedTlsError, OSError)):
            async with rig.client(identity=new_guest(rig.platform, **changes)):
                pass

    rig.run(work)
    (record,) = rig.records()
    assert (record.action, record.outcome) == ("attest", "denied")
    assert word in record.reason
    assert record.subject["chip_id"] == rig.platform.chip.chip_id
    assert record.address.startswith("127.0.0.1:")


def test_chips_of_somebody_else_and_guests_without_evidence(rig: Rig) -> None:
    async def work() -> None:
        for identity in (new_guest(Platform()), plain()):
            with pytest.raises((AttestedTlsError, OSError)):
                async with rig.client(identity=identity):
                    pass

    rig.run(work)
    foreign, without = rig.records()
    assert foreign.reason.startswith("verify:")
    assert "chip_id" not in foreign.subject  # nobody vouches for what that report says
    assert "no evidence" in without.reason


def test_what_comes_and_goes_is_not_held_against_anybody(rig: Rig) -> None:
    async def work() -> None:
        host, port = rig.address  # type: ignore[misc]
        for _ in range(50):
            _reader, writer = await asyncio.open_connection(host, port)
            writer.close()
            await writer.wait_closed()
        async with rig.client() as client:
            assert (await client.get_kek("disk")).equals(KEY)

    rig.run(work)
    assert not rig.records(outcome="denied")


def test_a_reference_withdrawn_while_a_connection_lasts(rig: Rig) -> None:
    async def work(client: AsyncVerdictdClient) -> None:
        assert (await client.get_kek("disk")).equals(KEY)
        await asyncio.to_thread(rig.administration.put_reference, LOCAL, "csv_measure", ["00" * 32], None)
        with pytest.raises(DeniedError) as refusal:
            await client.get_kek("disk")
        assert rig.records(outcome="denied")[-1].correlation == refusal.value.correlation
        await asyncio.to_thread(rig.administration.put_reference, LOCAL, "csv_measure", [MEASURE.hex()], None)
        assert (await client.get_kek("disk")).equals(KEY)

    rig.converse(work)


def test_nothing_is_released_when_it_cannot_be_recorded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(_job: Job[Any]) -> None:
        raise UnavailableError("disk full")

    async def work(client: AsyncVerdictdClient) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(rig.store.committer, "commit", broken)
            for call in (client.get_kek("disk"), client.decrypt([blob()]), client.get_resource("default/key/disk")):
                with pytest.raises(UnavailableError) as refusal:
                    await call
                assert "disk full" not in str(refusal.value)
        assert (await client.get_kek("disk")).equals(KEY)

    rig.converse(work)


def test_requests_are_limited(tmp_path: Path, platform: Platform) -> None:
    limits = {"request_rate": 0.5, "request_burst": 3, "release_rate": 0.5, "release_burst": 1}
    with Rig(tmp_path, platform, limits=limits) as rig:

        async def work(client: AsyncVerdictdClient) -> None:  # version was the first request
            assert (await client.get_kek("disk")).equals(KEY)
            with pytest.raises(LimitedError):
                await client.get_kek("disk")  # of the release
            before = asyncio.get_running_loop().time()
            with pytest.raises(LimitedError):
                await client.version()
            assert asyncio.get_running_loop().time() - before > 0.5

        rig.converse(work)


def test_a_client_that_is_told_to_wait_leaves_nothing_open(tmp_path: Path, platform: Platform) -> None:
    with Rig(tmp_path, platform, limits={"request_rate": 0.01, "request_burst": 1}) as rig:

        def threads() -> None:
            with pytest.raises(LimitedError), rig.blocking_client():
                pass

        async def work() -> None:
            async with rig.client():
                pass
            with pytest.raises(LimitedError):
                async with rig.client():
                    pass
            await asyncio.to_thread(threads)

        rig.run(work)


# ---- Freshness


def test_a_challenge_is_answered_when_it_is_asked_for(tmp_path: Path, platform: Platform) -> None:
    with Rig(tmp_path, platform, config={"freshness": "challenge"}) as rig:
        rig.put("verdictd/image/policy", b"{}")

        def threads() -> None:
            with rig.blocking_client() as client:
                assert client.get_kek("disk").equals(KEY)
                assert bytes(client.get_policy()) == b"{}"
                assert client.challenge() == 300

        async def work() -> None:
            await asyncio.to_thread(threads)
            async with rig.client() as client:
                assert bytes(await client.get_policy()) == b"{}"
                assert [bytes(one) for one in await client.decrypt([blob()])] == [b"layer key"]
            async with rig.client(attester=None, identity=new_guest(platform)) as client:
                with pytest.raises(DeniedError) as refusal:
                    await client.get_kek("disk")
                assert "fresh attestation required" in refusal.value.reason

        rig.run(work)
        # Fresh evidence is other evidence, and it is what the records name.
        assert len({record.subject["evidence"] for record in rig.records(action="release")}) >= 2


def test_before_a_challenge_nothing_is_told(tmp_path: Path, platform: Platform) -> None:
    with Rig(tmp_path, platform, config={"freshness": "challenge"}) as rig:
        needed = b'{"status":"Fail","error":"fresh attestation required"}'
        with_data = b'{"status":"Fail","data":{},"error":"fresh attestation required"}'

        async def work() -> None:
            with closing(await rig.connect()) as stream:
                assert await ask(stream, {"command": "version"}) == b'{"status":"OK","version":"v1"}'
                assert await ask(stream, {"command": "Get KEK", "kids": ["disk"]}) == with_data
                assert await ask(stream, {"command": "Decrypt", "blobs": []}) == with_data
                assert await ask(stream, {"command": "Get Resource Info", "name": "Policy"}) == needed
                assert base64.b64decode(await ask(stream, {"command": "Get Policy"})) == needed
                challenge = json.loads(await ask(stream, {"command": "Challenge"}))
                assert challenge["status"] == "OK"
                assert len(base64.b64decode(challenge["nonce"])) == 32
                assert challenge["ttl"] == 60
                assert await ask(stream, {"command": "Get KEK", "kids": ["disk"]}) == with_data
                assert json.loads(await ask(stream, {"command": "Attest", "evidence": "AAAA"}))["status"] == "Fail"
                assert await ask(stream, {"command": "Get KEK", "kids": ["disk"]}) == with_data
                assert json.loads(await ask(stream, {"command": "Attest", "evidence": "AAAA"}))["status"] == "Fail"

        rig.run(work)
        assert not rig.records()


def test_fresh_evidence_that_is_refused_ends_the_connection(tmp_path: Path, platform: Platform) -> None:
    """A guest that was fine in the handshake, and is something else now."""
    with Rig(tmp_path, platform) as rig:

        async def work() -> None:
            client = rig.client(identity=new_guest(platform), attester=rig.attester(measure=bytes(32)))
            async with client:
                assert (await client.get_kek("disk")).equals(KEY)
                with pytest.raises(DeniedError) as refusal:
                    await client.challenge()
                assert client._stream is not None
                assert await client._stream.receive() == b""
                (record,) = rig.records(outcome="denied")
                assert record.correlation == refusal.value.correlation
                assert "measure" in record.reason

        rig.run(work)


def test_an_answer_counts_for_a_while(tmp_path: Path, platform: Platform) -> None:
    with Rig(tmp_path, platform, config={"freshness": "challenge"}, fresh_seconds=1.0) as rig:

        async def work() -> None:
            async with rig.client() as client:
                assert (await client.get_kek("disk")).equals(KEY)
                requests = rig.door.stats()["requests"]
                assert (await client.get_kek("disk")).equals(KEY)
                assert rig.door.stats()["requests"] == requests + 1
                await asyncio.sleep(1.1)
                assert (await client.get_kek("disk")).equals(KEY)
                assert rig.door.stats()["requests"] == requests + 5  # refused, Challenge, Attest, again

        rig.run(work)


def test_judging_that_may_wait_has_a_thread(tmp_path: Path, platform: Platform) -> None:
    with Rig(tmp_path, platform, config={"freshness": "challenge"}) as rig:
        rig.broker._remote_store = True  # as with a database elsewhere
        assert rig.broker.judge("verdictd").blocking
        assert rig.converse(lambda client: client.get_kek("disk")).equals(KEY)

        async def work() -> None:
            with pytest.raises((AttestedTlsError, OSError)):
                async with rig.client(identity=new_guest(platform, measure=bytes(32))):
                    pass

        rig.run(work)
        assert "measure" in rig.records(outcome="denied")[0].reason


def test_a_database_that_is_down_is_held_against_nobody(tmp_path: Path, platform: Platform) -> None:
    with Rig(tmp_path, platform, limits={"failures": 1, "failure_window": 60.0}) as rig:

        async def work() -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(rig.broker, "grounds", down)
                with pytest.raises((AttestedTlsError, OSError)):
                    async with rig.client():
                        pass
            async with rig.client() as client:
                assert (await client.get_kek("disk")).equals(KEY)

        def down(**_how: bool) -> None:
            raise UnavailableError("the server is gone")

        rig.run(work)
        assert not rig.records(outcome="denied")


def test_a_report_with_two_keys(rig: Rig) -> None:
    """Nobody can make the second certificate; should a report ever verify with it, it is refused all the same."""
    mnonce = os.urandom(16)

    async def work() -> None:
        first = new_guest(rig.platform, mnonce=mnonce)
        for _ in range(2):
            async with rig.client(identity=first) as client:
                assert (await client.get_kek("disk")).equals(KEY)
        with pytest.raises((AttestedTlsError, OSError)):
            async with rig.client(identity=new_guest(rig.platform, mnonce=mnonce)):
                pass

    rig.run(work)
    (record,) = rig.records(outcome="denied")
    assert "another key" in record.reason


# ---- Who the broker is


def test_another_broker_is_not_spoken_to(rig: Rig) -> None:
    async def work() -> None:
        with pytest.raises(AttestedTlsError, match="pinned"):
            async with rig.client(requirement=Requirement.pinned({bytes(32)})):
                pass
        with pytest.raises(AttestedTlsError, match="no evidence"):
            async with rig.client(requirement=attested(rig.platform)):
                pass

    rig.run(work)


def test_a_broker_that_is_a_guest_itself(tmp_path: Path, platform: Platform) -> None:
    attester = SimulatedAttester(platform)
    (tmp_path / "given").mkdir()
    with (
        Rig(tmp_path, platform, attester=attester) as rig,
        Rig(tmp_path / "given", platform, identity=new_guest(platform)) as given,
    ):

        async def work(client: AsyncVerdictdClient) -> None:
            assert (await client.get_kek("disk")).equals(KEY)
            await rig.door._renew()
            client.close()
            assert (await client.get_kek("disk")).equals(KEY)

        rig.converse(work, requirement=attested(platform))
        assert given.converse(lambda client: client.get_kek("disk"), requirement=attested(platform)).equals(KEY)


def test_a_broker_in_a_guest_looks_for_certificates_where_it_was_told(
    rig: Rig, platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without HSK and CEK beside the report there would be no certificate, and no broker."""
    (tmp_path / "root.cert").write_bytes(platform.roots[0].encoded)
    text = b'''
        store.url = "sqlite:///broker.db"
        master.kind = "file"
        trust = { roots = ["root.cert"], certificates = ["certificates"] }
        verdictd = { listen = "127.0.0.1:0", attester = "device" }
    '''
    given: list[Any] = []

    def device(certificates: Any = None) -> SimulatedAttester:
        given.append(certificates)
        return SimulatedAttester(platform)

    monkeypatch.setattr("csvfast.broker.service.DeviceAttester", device)

    async def main() -> None:
        async with asyncio.timeout(30), Service(BrokerConfig.parse(text, tmp_path), rig.store) as service:
            assert given == [service.broker.trust.certificates]
            assert given != [None]

    asyncio.run(main())


def test_a_client_that_knows_no_broker_warns(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "csvfast"):
        assert rig.converse(lambda client: client.get_kek("disk"), requirement=None).equals(KEY)
    assert any("nobody knows which broker" in record.message for record in caplog.records)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "csvfast"):
        rig.converse(lambda client: client.version())
    assert not caplog.records


def test_the_key_stays_when_the_certificate_is_renewed(tmp_path: Path, platform: Platform) -> None:
    write_private_file(tmp_path / "tls.key", TlsKey.generate("p256").dump())
    with Rig(tmp_path, platform, config={"key": tmp_path / "tls.key"}) as rig:

        async def work() -> bytes:
            before = rig.door.identity
            await rig.door._renew()
            assert rig.door.identity.key.spki_sha256 == before.key.spki_sha256
            async with rig.client() as client:
                assert (await client.get_kek("disk")).equals(KEY)
            return before.key.spki_sha256

        assert rig.run(work) == rig.run(work)  # after a restart, too
    (tmp_path / "tls.key").chmod(0o644)
    with pytest.raises(StateError, match=r"tls\.key"):
        VerdictdDoor(rig.broker, rig.config)


# ---- Transport


def test_a_connection_that_was_closed_meanwhile(rig: Rig) -> None:
    async def work(client: AsyncVerdictdClient) -> None:
        assert (await client.get_kek("disk")).equals(KEY)
        for link in tuple(rig.door._server._active):
            link.close()
        await asyncio.sleep(0.05)
        assert (await client.get_kek("disk")).equals(KEY)

    rig.converse(work)


def test_a_unix_socket(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "door.sock"
    rig.config = replace(rig.config, listen=Address(path=path))

    async def work(client: AsyncVerdictdClient) -> None:
        assert (await client.get_kek("disk")).equals(KEY)
        with pytest.raises(StateError, match="in use"):
            await VerdictdDoor(rig.broker, rig.config).start()
        assert (await client.version()) == "v1"

    rig.converse(work)
    assert not path.exists()


def test_an_address_that_is_taken(rig: Rig) -> None:
    async def work() -> None:
        listen = Address.parse(rig.door.address)
        with pytest.raises(StateError, match="cannot listen"):
            await VerdictdDoor(rig.broker, replace(rig.config, listen=listen)).start()

    rig.run(work)


def test_tls_1_2_is_an_option(tmp_path: Path, platform: Platform) -> None:
    async def work() -> None:
        identity = new_guest(platform)
        context = EndpointContext.client(identity, rig.pinned, TlsOptions("1.2"))
        context.context.set_max_proto_version(SSL.TLS1_2_VERSION)
        if not rig.config.tls12:
            with pytest.raises(AttestedTlsError, match="version"):
                await open_connection(rig.address, identity, rig.pinned, context=context)
            return
        with closing(await open_connection(rig.address, identity, rig.pinned, context=context)) as stream:
            assert stream.peer.tls_version == "TLSv1.2"
            assert json.loads(await ask(stream, {"command": "Get KEK", "kids": ["disk"]}))["status"] == "OK"
            # Its exporter does not name one connection, so no evidence can be bound to it.
            assert "TLS 1.3" in json.loads(await ask(stream, {"command": "Challenge"}))["error"]

    for allowed in (True, False):
        (tmp_path / str(allowed)).mkdir()
        with Rig(tmp_path / str(allowed), platform, config={"tls12": allowed}) as rig:
            rig.run(work)


@pytest.mark.skipif(not sm_is_available(), reason="the installed OpenSSL has no SM suites")
def test_suites_of_gm_t(tmp_path: Path, platform: Platform) -> None:
    with Rig(tmp_path, platform, config={"suites": "sm"}) as rig:

        async def work(client: AsyncVerdictdClient) -> None:
            assert (await client.get_kek("disk")).equals(KEY)
            assert client.peer.cipher == "TLS_SM4_GCM_SM3"
            assert await client.challenge() == 300

        rig.converse(work, options=TlsOptions(suites="sm"))


# ---- Secrets


def test_no_secret_in_logs_records_or_errors(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.put("verdictd/image/credential", b"hunter2hunter2")

    async def work(client: AsyncVerdictdClient) -> None:
        assert (await client.get_kek("disk")).equals(KEY)
        assert (await client.get_credential()).equals(b"hunter2hunter2")
        secret = blob(plaintext=b"plaintext of a layer")
        await client.decrypt([secret])
        with pytest.raises(RequestError) as refusal:
            await client.decrypt([secret, blob(key=bytes(32))])
        errors.append(str(refusal.value))

    errors: list[str] = []
    with caplog.at_level(logging.DEBUG):
        rig.converse(work)
    logged = [json.dumps([record.getMessage(), str(getattr(record, "fields", ""))]) for record in caplog.records]
    recorded = [json.dumps(entry.record.to_dict()) for entry in rig.store.iterate_audit()]
    text = "\n".join(errors + logged + recorded)
    for secret in (KEY, b"hunter2hunter2", b"plaintext of a layer"):
        for form in (secret.decode(), base64.b64encode(secret).decode(), secret.hex()):
            assert form not in text
