"""Discovery and manifests; tables, reference values, statements; the commands."""

from __future__ import annotations

import base64
import csv as csv_module
import hashlib
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from csvfast.broker.policy.references import parse_message
from csvfast.cli import main
from csvfast.crypto import SM2PrivateKey, dump_private_key, dump_public_key
from csvfast.errors import SignatureError
from csvfast.measure import Item, Job, Options, ParameterError, RecipeError, Row, Selection
from csvfast.measure.fleet.compare import compare, items_of, read_list
from csvfast.measure.fleet.discover import discover, read_manifest
from csvfast.measure.fleet.providers import Found, register_provider
from csvfast.measure.fleet.references import reference_message, reference_values
from csvfast.measure.fleet.statement import (
    load_signing_key,
    load_verifying_key,
    make_statement,
    open_statement,
    sign_statement,
)
from csvfast.measure.fleet.table import COLUMNS, read_csv, to_dataframe, write_csv, write_parquet

ABC = "66c7f0f462eeedd9d1f2d46bdc10e4e24167c4875cf2f7a2297da02b8f4ba8e0"


def tree(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"abc")


def names(sources: Any, **options: Any) -> list[str]:
    return [found.name for found in discover(sources, Selection(**options))]


def test_directories_and_patterns(tmp_path: Path) -> None:
    tree(tmp_path, "b.img", "a.img", "c/d.img", "c/e.txt", "c/f/g.img", ".hidden.img")
    at = str(tmp_path)
    every = [f"{at}/{name}" for name in (".hidden.img", "a.img", "b.img", "c/d.img", "c/e.txt", "c/f/g.img")]
    assert names([tmp_path]) == every
    assert names([f"{at}/"]) == every
    assert names([tmp_path, tmp_path / "a.img"]) == every
    assert names([tmp_path], patterns=("*.txt",)) == [f"{at}/c/e.txt"]
    assert names([tmp_path], patterns=("c/*.img",)) == [f"{at}/c/d.img", f"{at}/c/f/g.img"]
    assert names([tmp_path], patterns=("*.img",), exclude=("c", ".*")) == [f"{at}/a.img", f"{at}/b.img"]
    assert names([tmp_path / "a.img"], patterns=("*.txt",)) == [f"{at}/a.img"]
    (tmp_path / "link").symlink_to("c")
    assert f"{at}/link/d.img" in names([tmp_path])


def test_manifests(tmp_path: Path) -> None:
    tree(tmp_path, "a", "b c", "d/e")
    lines = ["# a comment", "", "a", "  b c  ", '{"source": "d", "name": "dir", "mode": "verity", "salt": "00FF"}',
             json.dumps({"source": "a", "name": "again", "expect": ABC, "content": "disk"})]  # fmt: skip
    (tmp_path / "manifest").write_text("\n".join(lines))
    items = read_manifest(tmp_path / "manifest", Selection())
    at = str(tmp_path)
    assert items == [
        Item(f"{at}/a", f"{at}/a"),
        Item(f"{at}/b c", f"{at}/b c"),
        Item("dir", f"{at}/d", "verity", options=Options("00ff")),
        Item("again", f"{at}/a", content="disk", expect=ABC),
    ]
    found = list(discover(items, Selection()))
    assert [one.name for one in found] == [f"{at}/a", f"{at}/b c", "dir/e", "again"]
    assert [one.key[3] for one in found] == ["", "", "salt=00ff block_bytes=4096", ""]
    with Job(manifest=tmp_path / "manifest") as job:
        list(job)
    assert [row.digest == ABC for row in job.table] == [True, True, False, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a\n{", "line 2, column 2: "),
        (b'a\n  {"source": 1}', "line 2, column 4: source is 1; expected text"),
        (b'{"source": "a", "size": 1}', "line 1, column 17: unknown member 'size'"),
        (b'{"name": "a"}', "line 1, column 1: has no source"),
        (b'{"source": "a", "mode": "x"}', "line 1, column 17: mode is 'x'"),
        (b'{"source": "a", "salt": "00"}', "line 1, column 17: mode 'linear' has no salt"),
        (b'{"source": "a", "expect": "00"}', "line 1, column 17: expect is '00'"),
        (b'{"source": "a\\u0000"}', "line 1, column 2: source holds a NUL"),
        (b"a\n\xff", "line 2, column 1: is no UTF-8"),
        (b"a\nb\na", "line 3, column 1: .*a again, as in line 1"),
        (b"s4://bucket/x", "line 1, column 1: .*nothing opens 's4' URLs"),
        (b"[" * 70_000, "line 1: has 70000 bytes"),
        (b'{"source":' + b"[" * 50_000, "line 1, column "),
    ],
)
def test_broken_manifests(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "manifest").write_bytes(text)
    with pytest.raises(RecipeError, match=message):
        read_manifest(tmp_path / "manifest", Selection())


class Provided:
    """A provider of two things and of a thing that is not there."""

    def expand(self, source: str) -> list[Found]:
        if source == "test:bad":
            raise ZeroDivisionError("a library's defect")
        return [Found("test:1", "/etc/hostname"), Found("test:2", "/nowhere")]

    def open(self, location: str) -> Any:
        from csvfast.measure.fleet.providers import FileSource

        return FileSource(location)


provided = Provided()


def test_providers(monkeypatch: pytest.MonkeyPatch) -> None:
    from csvfast.measure.fleet import providers

    monkeypatch.setattr(providers, "_providers", {})
    monkeypatch.setattr(providers.importlib, "import_module", lambda _name: SimpleNamespace(provided=provided))
    register_provider("test", "somewhere.module:provided")
    with Job(["test:x", "test:bad"]) as job:
        rows = {row.name: row for row in job}
    assert rows["test:1"].digest == hashlib.new("sm3", Path("/etc/hostname").read_bytes()).hexdigest()
    assert (rows["test:2"].error, rows["test:bad"].error) == ("not-found", "internal")
    with pytest.raises(ParameterError, match="expected a scheme"):
        register_provider("Test", "module")


ROWS = [
    Row("a\udcff,\n\"b", "linear", digest=ABC, size=3, started=1.5, seconds=0.5),
    Row("=c", "verity", "file", "salt=00 block_bytes=4096", digest="0" * 64, size=0, uncovered=7, expect="0" * 64),
    Row("d", "tree", "disk", error="changed", message="it did"),
]


def test_csv(tmp_path: Path) -> None:
    write_csv(ROWS, tmp_path / "table.csv")
    data = (tmp_path / "table.csv").read_bytes()
    assert data.startswith(b"name,mode,content,options,digest,size,")
    assert b'"a\xff,\n""b",linear' in data
    back = read_csv(data.decode("utf-8", "surrogateescape"), "table.csv")
    assert [replace(row, identity=ROWS[0].identity).facts for row in back] == [row.facts for row in ROWS]
    assert read_list(tmp_path / "table.csv") == back
    for text, message in (
        ("name,mode\n", "line 1: has no columns digest"),
        ("name,mode,digest\na,linear,00\n", "line 2: a row's digest"),
    ):
        with pytest.raises(RecipeError, match=message):
            read_csv(text, "x")


def test_parquet_and_dataframe(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    write_parquet(ROWS, tmp_path / "table.parquet")
    table = parquet.read_table(tmp_path / "table.parquet").to_pylist()
    assert [row["digest"] for row in table] == [ABC, "0" * 64, None]
    assert table[0]["name"] == 'a\\xff,\n"b'
    pytest.importorskip("pandas")
    frame = to_dataframe(ROWS)
    assert list(frame.columns) == list(COLUMNS)
    assert frame["size"].sum() == 3
    assert frame[frame.error.notna()].name.tolist() == ["d"]


def test_reference_values() -> None:
    rows = [Row("images/a b.img", "linear", digest=ABC), Row("x.toml", "launch", digest="1" * 64),
            Row("y.toml", "launch", digest="2" * 64), Row("z", "tree", error="kind", message="no"),
            Row("w", "linear", digest=ABC, expect="0" * 64)]  # fmt: skip
    assert reference_values(rows) == {"images_a_b.img": [ABC], "csv_measure": ["1" * 64, "2" * 64]}
    taken = parse_message(reference_message(rows), 0.0)
    assert taken["csv_measure"].items == ("1" * 64, "2" * 64)
    assert reference_values(rows, "all") == {"all": [ABC, "1" * 64, "2" * 64]}
    with pytest.raises(ParameterError, match="would both be"):
        reference_values([Row("a b", "linear", digest=ABC), Row("a_b", "linear", digest=ABC)])
    with pytest.raises(ParameterError, match="reference name is"):
        reference_values(rows, "a b")
    with pytest.raises(ParameterError, match="nothing was measured"):
        reference_message(rows[3:])


@pytest.fixture(params=["sm2", "p256"])
def pair(request: pytest.FixtureRequest) -> tuple[bytes, bytes]:
    if request.param == "sm2":
        key = SM2PrivateKey.generate()
        return bytes(dump_private_key(key)), bytes(dump_public_key(key.public_key))
    other = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    return (
        other.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        other.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo),
    )


def test_statements(pair: tuple[bytes, bytes]) -> None:
    statement = make_statement(ROWS)
    envelope = sign_statement(statement, load_signing_key(pair[0]))
    public = load_verifying_key(pair[1])
    assert [row.facts for row in open_statement(envelope, public)] == [row.facts for row in ROWS[:2]]
    document = json.loads(statement)
    assert document["_type"] == "https://in-toto.io/Statement/v1"
    assert document["subject"][0] == {"name": ROWS[0].name, "digest": {"sm3": ABC}}
    assert document["predicate"]["failures"] == [{"name": "d", "mode": "tree", "error": "changed"}]
    other = SM2PrivateKey.generate().public_key
    with pytest.raises(SignatureError, match="no signature is valid"):
        open_statement(envelope, other)
    outer = json.loads(envelope)
    for changed in (
        outer | {"payload": base64.b64encode(statement.replace(ABC.encode(), b"7" * 64)).decode()},
        outer | {"signatures": [{"sig": base64.b64encode(bytes(70)).decode()}]},
    ):
        with pytest.raises(SignatureError):
            open_statement(json.dumps(changed).encode(), public)
    for changed in (outer | {"payloadType": "text"}, outer | {"signatures": []}, outer | {"payload": "*"}, [], "x"):
        with pytest.raises(RecipeError):
            open_statement(json.dumps(changed).encode(), public)
    for inner in (
        document | {"predicateType": "x"},
        document | {"subject": document["subject"][:1]},
        document | {"predicate": {"rows": [{"name": "a"}]}},
        document | {"predicate": []},
    ):
        with pytest.raises(RecipeError):
            open_statement(sign_statement(json.dumps(inner).encode(), load_signing_key(pair[0])), public)


def test_openssl_takes_the_signature(tmp_path: Path, pair: tuple[bytes, bytes]) -> None:
    """The envelope's signature over "DSSEv1 ...", checked with the key's PEM alone."""
    envelope = json.loads(sign_statement(make_statement(ROWS), load_signing_key(pair[0])))
    payload = base64.b64decode(envelope["payload"])
    kind = envelope["payloadType"].encode()
    signed = b"DSSEv1 " + str(len(kind)).encode() + b" " + kind + b" " + str(len(payload)).encode() + b" " + payload
    (tmp_path / "signed").write_bytes(signed)
    (tmp_path / "key").write_bytes(pair[1])
    signature = base64.b64decode(envelope["signatures"][0]["sig"])
    (tmp_path / "sig").write_bytes(signature)
    public = load_verifying_key(pair[1])
    if isinstance(public, ec.EllipticCurvePublicKey):
        public.verify(signature, signed, ec.ECDSA(hashes.SHA256()))
        return
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "key", "-in", "signed", "-rawin", "-digest", "sm3",
               "-sigfile", "sig", "-pkeyopt", "distid:1234567812345678"]  # fmt: skip
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 0


def test_keys_of_other_kinds() -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    for load, data in (
        (load_signing_key, private),
        (load_verifying_key, public),
        (load_signing_key, b"x"),
        (load_verifying_key, b""),
    ):
        with pytest.raises(ParameterError, match="the key is"):
            load(data)


def test_comparing() -> None:
    left = [Row("a", "linear", digest=ABC), Row("b", "linear", digest=ABC), Row("c", "linear", error="kind", message="x")]
    right = [Row("c", "linear", error="kind", message="y"), Row("b", "linear", digest="0" * 64), Row("a", "tree", digest=ABC)]
    found = compare(left, right)
    assert (found.added, found.removed, found.changed, found.same) == ((right[2],), (left[0],), ((left[1], right[1]),), 1)
    assert compare(left, reversed(left)).equal


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    tree(tmp_path, "images/a", "images/b\nc", "images/d")
    key = SM2PrivateKey.generate()
    (tmp_path / "key.pem").write_bytes(bytes(dump_private_key(key, password=b"open")))
    (tmp_path / "key.pub").write_bytes(bytes(dump_public_key(key.public_key)))
    (tmp_path / "password").write_bytes(b"open\n")

    def run(*arguments: str, code: int = 0) -> tuple[str, str]:
        assert main(["measure", *arguments]) == code, capsys.readouterr()
        shown = capsys.readouterr()
        return shown.out, shown.err

    outputs = ["--ledger", "ledger", "--csv", "t.csv", "--parquet", "t.parquet", "--references", "r.json"]
    signing = ["--statement", "s.json", "--sign-key", "key.pem", "--password-file", "password"]
    out, err = run("batch", "images", *outputs, "--reference-name", "image", *signing)
    assert (sorted(out.splitlines()), err) == ([f"{ABC}  images/a", f"{ABC}  images/b\\nc", f"{ABC}  images/d"], "")
    assert parse_message((tmp_path / "r.json").read_bytes(), 0.0)["image"].items == (ABC,)
    with (tmp_path / "t.csv").open(newline="") as file:
        assert [row["name"] for row in csv_module.DictReader(file)] == ["images/a", "images/b\nc", "images/d"]
    assert run("diff", "ledger", "t.csv") == ("", "")
    assert run("diff", "ledger", "s.json", "--key", "key.pub") == ("", "")
    assert run("verify", "s.json", "--key", "key.pub")[1] == ""
    assert "expected the public key" in run("verify", "s.json", code=2)[1]
    assert "is not signed" in run("verify", "ledger", "--key", "key.pub", code=2)[1]
    (tmp_path / "images" / "a").write_bytes(b"other")
    (tmp_path / "images" / "d").unlink()
    out, err = run("verify", "ledger", code=1)
    assert "images/a: is " in err
    assert f"expected {ABC}" in err
    assert "not-found: images/d" in err
    assert "2 of 3 failed" in err
    run("batch", "images", "--csv", "u.csv", "--quiet", "--executor", "processes", "--jobs", "1")
    out, err = run("diff", "t.csv", "u.csv", code=1)
    assert (out.splitlines()[0], "0 added, 1 removed, 1 changed, 1 the same" in err) == (f"- {ABC}  images/d", True)
    out, _ = run("diff", "t.csv", "u.csv", "--json", code=1)
    assert json.loads(out)["same"] == 1
    out, _ = run("batch", "images/a", "--json")
    assert json.loads(out)["name"] == "images/a"
    os.mkfifo("images/pipe")
    out, err = run("batch", "images", code=1)
    assert "kind: images/pipe: is a pipe" in err
    (tmp_path / "sums").write_text(f"{ABC}  images/d\n\\{ABC}  images/b\\nc\n")
    assert "1 of 2 failed" in run("verify", "sums", code=1)[1]
    for arguments, message in (
        (("batch",), "nothing to measure"),
        (("batch", "images", "--fresh"), "--fresh: given without"),
        (("batch", "images", "--statement", "x"), "expected both or neither"),
        (("batch", "images", "--reference-name", "x"), "given without --references"),
        (("batch", "images", "--salt", "00"), "expected mode 'verity'"),
        (("batch", "--manifest", "sums"), None),
    ):
        assert message is None or message in run(*arguments, code=2)[1]


def test_lists_that_are_none(tmp_path: Path) -> None:
    for data, message in (
        (b"", "is empty"),
        (b"hello\n", "line 1, column 1"),
        (b'{"csvfast":1}\n', "is no ledger"),
        (b"\xff\xfe", "line 1"),
    ):
        (tmp_path / "list").write_bytes(data)
        with pytest.raises(RecipeError, match=message):
            read_list(tmp_path / "list")
    assert items_of([Row("a", "linear", error="kind", message="x")]) == []
