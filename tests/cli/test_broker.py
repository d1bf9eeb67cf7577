"""`csvfast broker` for its owner: what is made, kept, shown and refused. Serving is in tests/broker."""

from __future__ import annotations

import json
import re
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def broker(csvfast_here: Run, tmp_path: Path) -> Run:
    """run("key", "create", ...) on a broker of its own in tmp_path/broker."""
    done = csvfast_here("broker", "init", "broker")
    assert (done.returncode, done.stderr) == (0, "")

    def run(*arguments: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
        done = csvfast_here("broker", *arguments, environment={"CSVFAST_BROKER": str(tmp_path / "broker")})
        assert done.returncode == expect, done.stderr
        return done

    return run


def test_init_makes_a_private_directory(broker: Run, tmp_path: Path) -> None:
    directory = tmp_path / "broker"
    assert {path.name for path in directory.iterdir()} >= {"broker.toml", "broker.db", "master.key", "tls.key", "admin.token"}
    for path in [directory, *directory.iterdir()]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    assert (directory / "admin.token").read_text().startswith("csvt_")
    assert 'roots = ["hygon"]' in (directory / "broker.toml").read_text()


def test_init_leaves_what_is_there_alone(csvfast_here: Run, tmp_path: Path) -> None:
    (tmp_path / "broker").mkdir()
    (tmp_path / "broker" / "mine").write_text("mine")
    done = csvfast_here("broker", "init", "broker")
    assert done.returncode == 3
    assert "nothing was overwritten" in done.stderr
    assert [path.name for path in (tmp_path / "broker").iterdir()] == ["mine"]


def test_init_that_fails_leaves_nothing(csvfast_here: Run, tmp_path: Path) -> None:
    done = csvfast_here("broker", "init", "broker", "--store", "sqlite:////proc/nowhere/broker.db")
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--root", "nothing"), "nothing"),
        (("--verdictd", "everywhere"), "host:port"),
        (("--master", "passphrase"), "--secret-file"),
        (("--master", "pkcs11", "--secret-variable", "PIN"), "--pkcs11-module"),
        (("--secret-variable", "X"), "has none"),
        (("--store", "mysql://x"), "mysql"),
    ],
)
def test_init_refuses(csvfast_here: Run, tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    done = csvfast_here("broker", "init", "broker", *options)
    assert done.returncode in (2, 3)
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_passphrase(csvfast_here: Run, tmp_path: Path) -> None:
    right = {"SECRET": "correct horse battery staple", "CSVFAST_BROKER": str(tmp_path / "broker")}
    done = csvfast_here(
        "broker", "init", "broker", "--master", "passphrase", "--secret-variable", "SECRET", environment=right
    )
    assert done.returncode == 0, done.stderr
    assert csvfast_here("broker", "key", "create", "k", environment=right).returncode == 0
    wrong = csvfast_here("broker", "key", "list", environment=right | {"SECRET": "incorrect horse battery staple"})
    assert wrong.returncode == 1
    assert "wrong passphrase" in wrong.stderr
    assert "incorrect" not in wrong.stderr
    missing = csvfast_here("broker", "key", "list", environment={"CSVFAST_BROKER": str(tmp_path / "broker")})
    assert missing.returncode == 3
    assert "SECRET" in missing.stderr
    everything = b"".join(path.read_bytes() for path in (tmp_path / "broker").iterdir())
    assert b"battery staple" not in everything


def test_keys_by_version(broker: Run, tmp_path: Path) -> None:
    assert "version 1" in broker("key", "create", "disk").stdout
    broker("key", "export", "disk", "--output", "first.bin")
    first = (tmp_path / "first.bin").read_bytes()
    assert len(first) == 32
    assert stat.S_IMODE((tmp_path / "first.bin").stat().st_mode) == 0o600
    assert "version 2" in broker("key", "rotate", "kbs:///default/key/disk").stdout
    broker("key", "export", "disk", "--output", "second.bin")
    assert (tmp_path / "second.bin").read_bytes() != first
    broker("key", "export", "disk", "--version", "1", "--output", "again.bin")
    assert (tmp_path / "again.bin").read_bytes() == first
    broker("key", "retire", "disk", "1")
    rows = json.loads(broker("key", "list", "--json").stdout)["resources"]
    assert [(row["path"], row["version"], row["state"]) for row in rows] == [
        ("default/key/disk", 1, "retired"), ("default/key/disk", 2, "active"),
    ]  # fmt: skip
    broker("key", "delete", "disk", "--yes")
    assert "there is no resource" in broker("key", "export", "disk", "--output", "x", expect=2).stderr
    assert not (tmp_path / "x").exists()


def test_nothing_is_overwritten(broker: Run, tmp_path: Path) -> None:
    broker("key", "create", "disk")
    (tmp_path / "there").write_bytes(b"mine")
    (tmp_path / "link").symlink_to("there")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("there", "link", "dangling"):
        assert "exists" in broker("key", "export", "disk", "--output", name, expect=2).stderr
        done = broker("token", "create", "carol", "--role", "keys", "--output", name, expect=2)
        assert "exists" in done.stderr
    assert (tmp_path / "there").read_bytes() == b"mine"
    assert (tmp_path / "link").is_symlink()
    assert "carol" not in broker("token", "list").stdout, "a token that nobody has would be left behind"
    assert "read resource" not in broker("audit", "show").stdout


def test_resources(broker: Run, tmp_path: Path) -> None:
    (tmp_path / "policy.json").write_bytes(b'{"default": []}')
    broker("resource", "put", "verdictd/image/policy", "policy.json")
    broker("resource", "export", "verdictd/image/policy", "--output", "back")
    assert (tmp_path / "back").read_bytes() == b'{"default": []}'
    stored = b"".join(path.read_bytes() for path in (tmp_path / "broker").glob("broker.db*"))
    assert b'{"default"' not in stored
    (tmp_path / "empty").touch()
    assert "empty" in broker("resource", "put", "a/b/c", "empty", expect=2).stderr
    (tmp_path / "big").write_bytes(bytes((2 << 20) + 1))
    assert "more than" in broker("resource", "put", "a/b/c", "big", expect=2).stderr
    for path in ("../../etc", "a/b", "a/b/c/d", "a/../c", "a/b/.c", "a//c", "kbs://host", ""):
        assert "expected" in broker("resource", "put", path, "policy.json", expect=2).stderr
    assert broker("resource", "put", "a/b/c", "nothing", expect=3).stderr.startswith("csvfast: error: nothing:")


def test_a_key_is_not_shown_on_a_terminal(broker: Run) -> None:
    broker("key", "create", "k")
    done = broker("key", "export", "k", "--output", "-")
    assert len(done.stdout.encode("utf-8", "surrogateescape")) > 0


def test_policies_and_dry_run(broker: Run, tmp_path: Path) -> None:
    shown = broker("policy", "show", "appraisal", "default_cpu").stdout
    assert "csv_measure" in shown
    (tmp_path / "policy.toml").write_text(shown)
    assert "version 1" in broker("policy", "set", "appraisal", "default_cpu", "policy.toml").stdout
    (tmp_path / "wrong.toml").write_text("[[rule]]\nname = 'x'\nclaim = 'y'\n")
    broker("policy", "set", "appraisal", "default_cpu", "wrong.toml", expect=2)
    (tmp_path / "document.json").write_text(json.dumps({"tee": "csv", "policy": {"nodbg": 0}}))
    done = broker("policy", "dry-run", "appraisal", "document.json", "--id", "default_cpu", "--json", expect=1)
    decision = json.loads(done.stdout)
    assert decision["allowed"] is False
    assert decision["rule"]
    (tmp_path / "document.json").write_text('{"tee": "csv", "tee": "csv"}')
    assert "twice" in broker("policy", "dry-run", "appraisal", "document.json", "--id", "default_cpu", expect=2).stderr
    rows = json.loads(broker("policy", "list", "--json").stdout)["policies"]
    assert ("appraisal", "default_cpu", 1) in [(row["kind"], row["id"], row["version"]) for row in rows]
    broker("policy", "delete", "appraisal", "default_cpu")
    broker("policy", "delete", "appraisal", "default_cpu", expect=2)


def test_references(broker: Run) -> None:
    broker("reference", "set", "csv_measure", "aa", "bb", "--expires", "1d")
    (row,) = json.loads(broker("reference", "list", "--json").stdout)["references"]
    assert (row["name"], row["values"]) == ("csv_measure", ["aa", "bb"])
    for when in ("soon", "1y", "-1d", "2027-13-01"):
        assert "--expires" in broker("reference", "set", "x", "1", f"--expires={when}", expect=2).stderr
    broker("reference", "delete", "csv_measure")
    broker("reference", "delete", "csv_measure", expect=2)


def test_tokens(broker: Run, tmp_path: Path) -> None:
    broker("token", "create", "alice", "--role", "policy", "--output", "alice.token")
    text = (tmp_path / "alice.token").read_text()
    assert re.fullmatch(r"csvt_[A-Za-z0-9_-]{20,}", text)
    stored = b"".join(path.read_bytes() for path in (tmp_path / "broker").glob("broker.db*"))
    assert text.encode() not in stored
    names = [row["name"] for row in json.loads(broker("token", "list", "--json").stdout)["tokens"]]
    assert sorted(names) == ["admin", "alice"]
    broker("token", "create", "alice", "--role", "policy", "--output", "again.token", expect=2)
    broker("token", "create", "bob", "--role", "king", "--output", "bob.token", expect=2)
    broker("token", "revoke", "alice")
    broker("token", "revoke", "alice", expect=2)


def test_audit(broker: Run, tmp_path: Path) -> None:
    broker("key", "create", "k")
    broker("key", "export", "k", "--output", "k.bin")
    records = json.loads(broker("audit", "show", "--json").stdout)["records"]
    assert [record["action"] for record in records][-2:] == ["put resource", "read resource"]
    assert [record["sequence"] for record in records] == list(range(1, len(records) + 1))
    assert (tmp_path / "k.bin").read_bytes().hex() not in json.dumps(records)
    assert broker("audit", "show", "--resource", "default/key/k", "--limit", "1").stdout.count("default/key/k") == 1
    verified = json.loads(broker("audit", "verify", "--json").stdout)
    assert verified["intact"] is True
    assert verified["count"] == len(records)
    assert broker("audit", "public-key").stdout.startswith("-----BEGIN PUBLIC KEY-----")


def test_an_altered_log_is_found(broker: Run, tmp_path: Path) -> None:
    import sqlite3

    broker("key", "create", "k")
    broker("key", "create", "l")
    database = sqlite3.connect(tmp_path / "broker" / "broker.db")
    database.execute("UPDATE audit SET record = replace(record, 'put resource', 'get resource') WHERE sequence = 2")
    database.commit()
    database.close()
    done = broker("audit", "verify", expect=1)
    assert "record 2" in done.stdout


def test_master_rotation(broker: Run, tmp_path: Path) -> None:
    broker("key", "create", "k")
    broker("key", "export", "k", "--output", "before")
    done = broker("master", "rotate")
    assert 'path = "master-2.key"' in done.stdout
    broker("key", "list", expect=1)  # broker.toml names the old one still
    config = tmp_path / "broker" / "broker.toml"
    config.write_text(config.read_text().replace('"master.key"', '"master-2.key"'))
    broker("key", "export", "k", "--output", "after")
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()


def test_configuration_with_a_typing_error(broker: Run, tmp_path: Path) -> None:
    config = tmp_path / "broker" / "broker.toml"
    text = config.read_text()
    for old, new, word in (
        ("[trust]", "[trusts]", "trusts"),
        ("roots", "root", "trust.root"),
        ("[kbs]", "[kbs]\ninsecure_http = 1", "kbs.insecure_http"),
        ("[store]", "[store", "syntax"),
    ):
        config.write_text(text.replace(old, new))
        assert word in broker("key", "list", expect=2).stderr


def test_no_broker_there(csvfast_here: Run, tmp_path: Path) -> None:
    done = csvfast_here("broker", "key", "list", "--config", tmp_path / "nowhere")
    assert done.returncode == 3
    assert "nowhere" in done.stderr
    done = csvfast_here("broker", "key", "list")
    assert done.returncode == 2
