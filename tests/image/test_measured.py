"""Blobs of images as sources of measurements: from a layout and from a registry, checked against their digests."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from image.crypt_images import make_image

from csvfast.cli import main
from csvfast.image.copy import copy_image
from csvfast.image.layout import OciLayout
from csvfast.image.measured import provider
from csvfast.image.reference import parse_reference
from csvfast.image.registry import open_target
from csvfast.image.server import EmbeddedRegistry
from csvfast.measure import FormatError, Item, Job, ParameterError, Selection, batch
from csvfast.measure.fleet import providers


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_providers", {})
    for scheme in ("oci", "docker"):
        providers.register_provider(scheme, "csvfast.image.measured:provider")


def blobs(layout: Path) -> dict[str, bytes]:
    return {f"sha256:{path.name}": path.read_bytes() for path in (layout / "blobs" / "sha256").iterdir()}


def test_a_layout(tmp_path: Path) -> None:
    make_image(tmp_path / "app", "1")
    source = f"oci:{tmp_path / 'app'}"
    wanted = {digest: hashlib.new("sm3", data).hexdigest() for digest, data in blobs(tmp_path / "app").items()}
    for name in (f"{source}:1", source):
        rows = list(batch([name]))
        assert {row.name.removeprefix(f"{name}@"): row.digest for row in rows} == wanted
    ledger = tmp_path / "ledger"
    for kept in (0, len(wanted)):
        with Job([source], Selection("tree"), ledger=ledger) as job:
            assert all(row.ok for row in job)
        assert job.progress.kept == kept
    files = {row.name[-64:]: row.digest for row in batch([tmp_path / "app" / "blobs"], mode="tree")}
    assert {row.name[-64:]: row.digest for row in job.table} == files


def test_a_registry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = tmp_path / "app"
    make_image(layout, "1")
    with EmbeddedRegistry(tmp_path / "registry") as registry:
        host = registry.url.partition("://")[2].rstrip("/")
        name = f"docker://{host}/team/app:1"
        with open_target(parse_reference(name)) as target:  # type: ignore[union-attr]
            copy_image(OciLayout(layout), target, wanted="1", tag="1")
        there = {row.name.rpartition("@")[2]: row.digest for row in batch([name])}
        here = {row.name.rpartition("@")[2]: row.digest for row in batch([f"oci:{layout}:1"])}
        assert there == here
        assert len(there) >= 3
        assert main(["measure", "batch", name, "--json"]) == 0
        said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert {one["name"].rpartition("@")[2]: one["digest"] for one in said} == here
        rows = list(batch([f"docker://{host}/team/other:1"]))
        assert [row.error for row in rows] == ["not-found"]
    rows = list(batch([name]))
    assert [row.error for row in rows] == ["connection"]


def test_other_bytes_than_promised_are_an_error(tmp_path: Path) -> None:
    layout = tmp_path / "app"
    make_image(layout, "1")
    digest, data = max(blobs(layout).items(), key=lambda pair: len(pair[1]))
    path = layout / "blobs" / "sha256" / digest[7:]
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for mode in ("linear", "tree"):
        selection: Any = Selection(mode)  # type: ignore[arg-type]
        with Job([f"oci:{layout}:1"], selection) as job:
            list(job)
        wrong = [row for row in job.table if row.error]
        assert [(row.name[-71:], row.error) for row in wrong] == [(digest, "format")]
        assert "the bytes have the digest" in (wrong[0].message or "")


def test_reading_out_of_order_is_checked_too(tmp_path: Path) -> None:
    layout = tmp_path / "app"
    make_image(layout, "1")
    digest, data = max(blobs(layout).items(), key=lambda pair: len(pair[1]))
    location = f"oci:{layout}@{digest}#{len(data)}"
    for spoilt in (False, True):
        if spoilt:
            (layout / "blobs" / "sha256" / digest[7:]).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        source = provider.open(location)
        buffer = bytearray(10)
        for offset in (20, 5, len(data) - 10, 0):
            source.read_at(memoryview(buffer), offset)
            assert spoilt or bytes(buffer) == data[offset : offset + 10]
        if spoilt:
            with pytest.raises(FormatError, match="the bytes have the digest"):
                source.check_unchanged()
        else:
            source.check_unchanged()
        source.close()


def test_what_is_no_image(tmp_path: Path) -> None:
    rows = list(batch([f"oci:{tmp_path}/none", f"oci:{tmp_path}", "oci:", "docker://UPPER case/x"]))
    assert all(row.digest is None and row.error in ("not-found", "format", "option") for row in rows), rows
    assert len(rows) == 4
    for location in ("oci:x", f"oci:{tmp_path}:1#5", "oci:x@sha256:" + "0" * 64):
        with pytest.raises(ParameterError, match=r"names no blob|expected oci:"):
            provider.open(location)
    row = next(iter(batch([Item("x", "oci:x", provider="csvfast.image.measured:provider")])))
    assert row.error == "format"
