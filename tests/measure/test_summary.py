"""The page about a job: whole, self-contained, nothing from a name becomes markup, and a browser draws it."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from csvfast.cli import main
from csvfast.measure import Row, TargetError
from csvfast.measure.fleet.summary import summary_page, write_summary

A, B = "a" * 64, "b" * 64


class Tags(HTMLParser):
    """Every tag with its attributes; those that are open must be closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def rows() -> list[Row]:
    return [
        Row("first.img", "linear", digest=A, size=3 << 20, started=1_700_000_000.0, seconds=2.0, worker="one/1/1"),
        Row("second.img", "linear", digest=A, size=3 << 20, started=1_700_000_001.0, seconds=1.0, worker="two/1/1"),
        Row("third.img", "tree", digest=B, size=5 << 30, started=1_700_000_002.0, seconds=8.0, worker="one/1/1"),
        Row("other.img", "linear", digest=B, size=12, expect=A, started=1_700_000_003.0, seconds=0.001),
        Row("gone.img", "linear", error="not-found", message="gone.img: no such file"),
    ]


def test_a_page_says_what_happened() -> None:
    page = Tags(summary_page(rows(), title="Nightly"))
    assert page.open == []
    for said in (
        "Nightly",
        "2023-11-14 22:13:20 to 2023-11-14 22:13:30 UTC",
        "2 of 5 failed",
        "1 unexpected, 1 not-found",
        "gone.img: no such file",
        f"is {B}, expected {A}",
        "3.0 MiB more than once",
        "5.0 GiB",
        "10.0 s",
    ):
        assert said in page.text, said
    bars = [attributes for tag, attributes in page.tags if tag == "rect"]
    assert len(bars) == 60
    assert max(float(bar["height"] or 0) for bar in bars) == 200
    assert all(0 <= float(bar["height"] or 0) <= 200 for bar in bars)


def test_throughput_accounts_for_every_byte() -> None:
    """The bars' areas are the bytes."""
    one = Row("a", "linear", digest=A, size=1 << 30, started=100.0, seconds=9.0)
    two = Row("b", "linear", digest=B, size=1 << 29, started=104.0, seconds=6.0)
    page = summary_page([one, two])
    said = [float(rate) * {"B": 1, "KiB": 1024, "MiB": 1 << 20}[unit] for rate, unit in re.findall(r": ([\d.]+) (\w+)/s,", page)]
    assert sum(said) * 10 / 60 == pytest.approx((1 << 30) + (1 << 29), rel=0.01)


def test_it_needs_nothing_from_elsewhere_and_believes_no_name() -> None:
    evil = "</td><script>alert(1)</script><img src=x onerror='alert(2)'>\"&\n\x1b[31m\udcff\u202e"
    bad = [
        Row(evil, "linear", digest=A, size=1, started=1.0, seconds=1.0),
        Row("b", "linear", digest=A, size=1, started=1.0, seconds=1.0),
        Row(evil, "tree", error="format", message=evil),
    ]
    text = summary_page(bad, title=evil)
    page = Tags(text)
    assert page.open == []
    assert not {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "object"}
    assert not any(name.startswith("on") or name in ("src", "href") for _, one in page.tags for name in one)
    assert not re.search(r"url\(|@import|https?:", text)
    assert not set("\x1b\u202e\udcff") & set(text)


@pytest.mark.parametrize("some", [[], rows()[4:], [Row("a", "linear", digest=A, size=0)]])
def test_little_is_no_reason_to_fail(some: list[Row]) -> None:
    assert Tags(summary_page(some)).open == []


def test_long_lists_end(tmp_path: Path) -> None:
    many = [Row(f"{number}.img", "linear", error="lost", message="lost") for number in range(20_000)]
    write_summary(many, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "and 19,950 more" in text
    assert len(text) < 50_000
    with pytest.raises(TargetError, match="cannot be written"):
        write_summary(many, tmp_path / "no" / "page.html")


def test_the_command_writes_it_and_a_browser_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(9):
        (images / f"{number}.img").write_bytes(bytes([number % 3]) * 200_000)
    page = tmp_path / "page.html"
    assert main(["measure", "batch", str(images), str(tmp_path / "gone"), "--summary", str(page)]) == 1
    assert "1 of 10 failed" in Tags(page.read_text()).text
    capsys.readouterr()
    browser = shutil.which("chromium")
    if browser is None:  # the page itself has been checked
        return
    picture = tmp_path / "page.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += ["--window-size=1000,1400", f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000
