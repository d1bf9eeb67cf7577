"""The agent's policy and configuration: default deny, exact bytes, nothing half understood."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csvfast.errors import ContainerError
from csvfast.runtime.agent.configuration import AgentConfiguration
from csvfast.runtime.agent_policy import CAPABILITIES, DEFAULT_CAPABILITIES, AgentPolicy

DIGEST = "sha256:" + "ab" * 32
OWN = ("/entry", "command")


def test_nothing_is_allowed_by_default() -> None:
    policy = AgentPolicy()
    for ask in (
        lambda: policy.check_image("x"),
        lambda: policy.check_manifest(DIGEST, 1),
        lambda: policy.check_command(OWN, OWN),
        lambda: policy.check_command(OWN, OWN, executions=True),
        lambda: policy.check_environment(["A=b"]),
        lambda: policy.check_user(None),
        lambda: policy.check_user("0"),
        lambda: policy.check_directory("/"),
        lambda: policy.check_volume("a", "/b"),
        lambda: policy.check_flag("signals"),
        lambda: policy.check_flag("stdin"),
        lambda: policy.check_flag("network"),
    ):
        with pytest.raises(ContainerError) as refused:
            ask()
        assert refused.value.kind == "policy"
    assert policy.capabilities == ()
    assert policy.document() == {}
    policy.check_manifest(DIGEST, 0)
    policy.check_environment([])


@pytest.mark.parametrize(
    ("rules", "arguments", "allowed"),
    [
        (["image"], OWN, True),
        (["image"], ("/entry", "other"), False),
        (["image"], ("/entry",), False),
        ([["/bin/sh", "-c", "*"]], ("/bin/sh", "-c", "anything; at all"), True),
        ([["/bin/sh", "-c", "*"]], ("/bin/sh", "-c", "a", "b"), False),
        ([["/bin/sh", "**"]], ("/bin/sh",), True),
        ([["/bin/sh", "**"]], ("/bin/sh", "a", "b"), True),
        ([["/bin/sh", "**"]], ("/bin/bash",), False),
        ([["**"]], ("anything",), True),
        ([["/bin/[[]", "x"]], ("/bin/[", "x"), True),
        ([["image"]], OWN, False),
        ([["a"], "image"], OWN, True),
    ],
)
def test_commands(rules: list[Any], arguments: tuple[str, ...], allowed: bool) -> None:
    for policy in (AgentPolicy(commands=rules), AgentPolicy.parse({"commands": rules})):
        if allowed:
            policy.check_command(arguments, OWN)
        else:
            with pytest.raises(ContainerError, match="policy: command"):
                policy.check_command(arguments, OWN)


def test_manifests() -> None:
    pinned = AgentPolicy(manifests=[DIGEST])
    pinned.check_manifest(DIGEST, 3)  # the owner has said which one it is
    with pytest.raises(ContainerError, match="manifests"):
        pinned.check_manifest(DIGEST.replace("ab", "cd"), 0)
    with pytest.raises(ContainerError, match="3 layers are not encrypted"):
        AgentPolicy().check_manifest(DIGEST, 3)
    AgentPolicy(unencrypted=True).check_manifest(DIGEST, 3)


def test_users_and_directories() -> None:
    policy = AgentPolicy(users=["image", "1000:*"], directories=["/srv/*"], volumes=["shared:/data"], environment=["A=*"])
    policy.check_user(None)
    policy.check_user("1000:1000")
    policy.check_directory("/srv/a")
    policy.check_volume("shared", "/data")
    policy.check_environment(["A=1", "A="])
    for ask in (
        lambda: policy.check_user("image"),  # a user of that name is none of the image's
        lambda: policy.check_user("0"),
        lambda: policy.check_directory("/etc"),
        lambda: policy.check_volume("shared", "/data2"),
        lambda: policy.check_environment(["A=1", "B=1"]),
    ):
        with pytest.raises(ContainerError, match="policy"):
            ask()


def test_capabilities() -> None:
    assert AgentPolicy(capabilities=["default", "CAP_NET_RAW"]).capabilities == (*DEFAULT_CAPABILITIES, "CAP_NET_RAW")
    assert CAPABILITIES[21] == "CAP_SYS_ADMIN"
    assert CAPABILITIES[40] == "CAP_CHECKPOINT_RESTORE"
    with pytest.raises(ContainerError, match="capability 'CAP_ALL' is unknown"):
        AgentPolicy(capabilities=["CAP_ALL"])


@pytest.mark.parametrize(
    "document",
    [[], None, {"image": ["*"]}, {"images": "*"}, {"images": [1]}, {"signals": 1}, {"signals": "true"}, {"containers": True},
     {"containers": 0}, {"containers": 1000}, {"commands": ["anything"]}, {"commands": [[]]}, {"commands": [[1]]},
     {"executions": [["a"], "b"]}, {"capabilities": ["CAP_ALL"]}],
)  # fmt: skip
def test_half_understood_is_not_understood(document: object) -> None:
    with pytest.raises(ContainerError) as refused:
        AgentPolicy.parse(document)
    assert refused.value.kind == "policy"


texts = st.text(max_size=8)
policies = st.fixed_dictionaries(
    {},
    optional={
        "images": st.lists(texts, max_size=3), "manifests": st.lists(texts, max_size=3), "unencrypted": st.booleans(),
        "commands": st.lists(st.just("image") | st.lists(texts, min_size=1, max_size=3), max_size=3), "signals": st.booleans(),
        "capabilities": st.lists(st.sampled_from(CAPABILITIES), max_size=3), "containers": st.integers(1, 64),
    },
)  # fmt: skip


@given(policies)
def test_documents_come_back(document: dict[str, Any]) -> None:
    policy = AgentPolicy.parse(document)
    again = AgentPolicy.parse(policy.document())
    assert again.document() == policy.document()
    configuration = AgentConfiguration(policy=policy, keys={"a": "b/c/d"}, limits={"entries": 5})
    encoded = configuration.encode()
    assert AgentConfiguration.parse(encoded).encode() == encoded


def test_configuration() -> None:
    configuration = AgentConfiguration(
        policy=AgentPolicy.for_one_image("a/b:c"),
        broker={"door": "verdictd", "address": "10.0.2.2:1", "pin": "ab" * 32},
        registries=[{"host": "10.0.2.2:*", "plain_http": True}, {"host": "*"}],
    )
    again = AgentConfiguration.parse(configuration.encode())
    assert again.broker == configuration.broker
    assert again.plain_http("10.0.2.2:5000") is True
    assert again.plain_http("example.org") is False
    assert AgentConfiguration(policy=AgentPolicy()).plain_http("example.org") is None
    assert again.policy.document() == configuration.policy.document()


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2}, {"more": 1}, {"policy": []}, {"policy": {"x": 1}}, {"broker": {}}, {"broker": {"door": "other"}},
        {"broker": {"door": "none", "address": "x"}}, {"broker": {"door": "verdictd", "address": "x:1"}},
        {"broker": {"door": "verdictd", "pin": "ab" * 32}}, {"broker": {"door": "verdictd", "address": "x:1", "pin": "AB" * 32}},
        {"broker": {"door": "kbs", "url": "http://x"}}, {"broker": {"door": "kbs", "url": 1, "unattested": True}},
        {"broker": {"door": "kbs", "url": "http://x", "unattested": "yes"}}, {"registries": [1]}, {"registries": [{}]},
        {"registries": [{"host": "x", "plain_http": 1}]}, {"keys": {"a": 1}}, {"limits": {"x": 1}}, {"limits": {"entries": 0}},
        {"limits": {"entries": True}},
    ],
    ids=lambda change: json.dumps(change),
)  # fmt: skip
def test_configurations_that_are_none(change: dict[str, Any]) -> None:
    document = json.loads(AgentConfiguration(policy=AgentPolicy()).encode()) | change
    with pytest.raises(ContainerError):
        AgentConfiguration.parse(json.dumps(document).encode())


def test_configuration_that_is_no_json() -> None:
    for data in (b"", b"[]", b'{"version":1,"version":1}', b"x" * (1 << 21)):
        with pytest.raises(ContainerError):
            AgentConfiguration.parse(data)


def test_the_documentations_example() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "agent.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(block, {})
    for name in ("images", "manifests", "unencrypted", "commands", "executions", "environment", "users", "volumes"):
        assert f"| `{name}` |" in page


def test_a_pin_needs_something_to_compare_it_with() -> None:
    policy = AgentPolicy()
    for url in ("http://127.0.0.1:1", "HTTPS://127.0.0.1:1", "127.0.0.1:1"):
        for trust in ({"pin": "ab" * 32}, {"ca": "x"}, {"pin": "ab" * 32, "unattested": True}):
            with pytest.raises(ContainerError, match="https://"):
                AgentConfiguration(policy=policy, broker={"door": "kbs", "url": url, **trust})
    AgentConfiguration(policy=policy, broker={"door": "kbs", "url": "https://127.0.0.1:1", "pin": "ab" * 32})
    AgentConfiguration(policy=policy, broker={"door": "kbs", "url": "http://127.0.0.1:1", "unattested": True})
