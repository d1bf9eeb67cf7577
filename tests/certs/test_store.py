"""The local directories of the real tools, the cache, and chip ids that are attacks."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from csvfast.certs import CertificateStore, CsvCertificate, ManufacturingLine, checked_chip_id, parse_bundle
from csvfast.certs.chip import ChipIdentity
from csvfast.certs.factory import ChainFactory
from csvfast.certs.store import default_cache, default_directories, read_bundle
from csvfast.errors import FormatError, StateError, VerificationError

HOSTILE = [
    "", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "a\0b", "a\nb", "a b", "a%2e", "KPA?x=1", "KPA#", "é", "K" * 65,
    ".hidden", "-rf", "_x", "\u202eKPA", "KPA\n", "a&b", "$(id)", "٣", "K" * 100_000,
]  # fmt: skip


@pytest.fixture(scope="module")
def line() -> ManufacturingLine:
    return ManufacturingLine.create()


@pytest.fixture(scope="module")
def chip(line: ManufacturingLine) -> ChipIdentity:
    return line.make_chip("SIM0000000001")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, so that nobody's cache is read or written."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("XDG_CACHE_HOME", "CSV_CHAIN", "HSK_CEK_CERT_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


@pytest.mark.parametrize("chip_id", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_chip_ids(tmp_path: Path, chip: ChipIdentity, chip_id: str) -> None:
    store = CertificateStore([tmp_path], cache=tmp_path / "cache")
    for call in (lambda: store.find(chip_id), lambda: store.add(chip_id, chip.hsk, chip.cek), lambda: checked_chip_id(chip_id)):
        with pytest.raises(FormatError, match="chip id") as caught:
            call()
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1000
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("chip_id", ["KPA64911240507", "SIM0000000001", "a", "A.b-c_d", "9" * 64])
def test_chip_ids(chip_id: str) -> None:
    assert checked_chip_id(chip_id) == chip_id


def test_default_places(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = home / ".cache/hygon-csv/chain"
    places = ["/opt/hygon/csv/hsk_cek", "/opt/csv/hsk_cek", "/opt/dcu/certs", str(chain), "/var/cache/hygon-csv/chain"]
    assert [str(path) for path in default_directories()] == places
    assert default_cache() == home / ".cache/csvfast/certs"
    monkeypatch.setenv("CSV_CHAIN", "/a/chain")
    monkeypatch.setenv("HSK_CEK_CERT_PATH", "/b/certs")
    assert [str(path) for path in default_directories()] == [
        *places[:2], "/b/certs", "/opt/dcu/certs", "/a/chain", *places[3:],
    ]  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert default_cache() == Path("/c/csvfast/certs")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the XDG specification says to ignore it
    assert default_cache() == home / ".cache/csvfast/certs"
    store = CertificateStore()
    assert store.directories == default_directories()
    assert store.cache == default_cache()
    assert store.client is None


@pytest.mark.parametrize("home", [None, "relative"])
def test_nothing_is_written_below_a_home_that_nobody_knows(
    tmp_path: Path, chip: ChipIdentity, monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    def nobody(_user: int) -> None:
        raise KeyError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    for name in ("XDG_CACHE_HOME", "CSV_CHAIN", "HSK_CEK_CERT_PATH", "HOME"):
        monkeypatch.delenv(name, raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    assert default_cache() is None
    assert all(path.is_absolute() for path in default_directories())
    store = CertificateStore()
    assert store.find(chip.chip_id) is None
    with pytest.raises(StateError, match="no cache"):
        store.add(chip.chip_id, chip.hsk, chip.cek)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert CertificateStore().add(chip.chip_id, chip.hsk, chip.cek).is_relative_to(tmp_path / "cache")


@pytest.mark.parametrize("form", ["{0}/hsk_cek.cert", "{0}_hsk_cek.cert", "{0}.cert"])
def test_layouts_of_the_real_tools(tmp_path: Path, chip: ChipIdentity, line: ManufacturingLine, form: str) -> None:
    path = tmp_path / "certs" / form.format(chip.chip_id)
    path.parent.mkdir(parents=True)
    path.write_bytes(chip.hsk_cek)
    store = CertificateStore([tmp_path / "missing", tmp_path / "certs"], cache=False)
    assert store.find(chip.chip_id) == (chip.hsk, chip.cek)
    assert store.find("SIM0000000002") is None


def test_first_directory_wins(tmp_path: Path, line: ManufacturingLine) -> None:
    first, second = line.make_chip("SIM1"), line.make_chip("SIM1")
    for name, chip in (("a", first), ("b", second)):
        (tmp_path / name / "SIM1").mkdir(parents=True)
        (tmp_path / name / "SIM1" / "hsk_cek.cert").write_bytes(chip.hsk_cek)
    assert CertificateStore([tmp_path / "a", tmp_path / "b"], cache=False).find("SIM1") == (first.hsk, first.cek)
    assert CertificateStore([tmp_path / "b", tmp_path / "a"], cache=False).find("SIM1") == (second.hsk, second.cek)
    cached = CertificateStore([tmp_path / "a"], cache=tmp_path / "b")
    assert cached.find("SIM1") == (first.hsk, first.cek)
    assert CertificateStore([], cache=tmp_path / "b").find("SIM1") == (second.hsk, second.cek)


def test_chain_file_of_csv_rs(home: Path, factory: ChainFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names no chip: only a PEK that its CEK signed finds it."""
    chain = home / ".cache/hygon-csv/chain"
    chain.parent.mkdir(parents=True)
    chain.write_bytes(b"".join(factory.encodings[role] for role in ("PDH", "PEK", "OCA", "CEK", "HSK", "HRK")))
    pek = CsvCertificate.parse(factory.encodings["PEK"])
    stranger = CsvCertificate.parse(ChainFactory().encodings["PEK"])
    store = CertificateStore()
    assert store.find("KPA64911240507") is None
    assert store.find("KPA64911240507", pek=stranger) is None
    found = store.find("KPA64911240507", pek=pek)
    assert found is not None
    assert found[1].encoded == factory.encodings["CEK"]
    monkeypatch.setenv("CSV_CHAIN", str(chain.rename(home / "elsewhere")))
    assert CertificateStore().find("KPA64911240507", pek=pek) == found


def test_file_beside_the_report(tmp_path: Path, factory: ChainFactory) -> None:
    (tmp_path / "hsk_cek.cert").write_bytes(factory.encodings["HSK"] + factory.encodings["CEK"])
    pek = CsvCertificate.parse(factory.encodings["PEK"])
    for places in ([tmp_path], [tmp_path / "hsk_cek.cert"]):
        store = CertificateStore(places, cache=False)
        assert store.find("KPA1") is None
        assert store.find("KPA1", pek=pek) is not None


def test_damaged_files_are_named(tmp_path: Path, chip: ChipIdentity) -> None:
    store = CertificateStore([tmp_path], cache=False)
    path = tmp_path / f"{chip.chip_id}.cert"
    for data, words in (
        (b"", "0 bytes"),
        (chip.hsk_cek[:-1], "2083 bytes that are left"),
        (bytes(2916), "found 0x00000000"),
        (chip.hsk.encoded, "CEK"),
        (chip.cek.encoded, "HSK"),
        (bytes(1 << 20), "10001 bytes"),  # not a byte more is read than makes it too long
    ):
        path.write_bytes(data)
        with pytest.raises(FormatError, match=words) as caught:
            store.find(chip.chip_id)
        assert str(path) in str(caught.value)


def test_odd_files_are_not_there(tmp_path: Path, chip: ChipIdentity, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / f"{chip.chip_id}.cert")
    (tmp_path / f"{chip.chip_id}_hsk_cek.cert").mkdir()
    (tmp_path / chip.chip_id).write_bytes(b"a file where a directory should be")
    assert CertificateStore([tmp_path], cache=False).find(chip.chip_id) is None
    (tmp_path / f"{chip.chip_id}.cert").unlink()
    monkeypatch.chdir(tmp_path)  # the path of a socket has 107 bytes at most
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(f"{chip.chip_id}.cert")
        assert CertificateStore([tmp_path], cache=False).find(chip.chip_id) is None
    (tmp_path / f"{chip.chip_id}.cert").unlink()
    (tmp_path / f"{chip.chip_id}.cert").symlink_to(f"{chip.chip_id}.cert")
    with pytest.raises(OSError, match="symbolic links"):
        CertificateStore([tmp_path], cache=False).find(chip.chip_id)


def test_directories_closed_to_this_user(
    home: Path, chip: ChipIdentity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another tool's closed directory hides nothing of ours; one that the caller named is an error."""
    closed = tmp_path / "closed"
    (closed / chip.chip_id).mkdir(parents=True)
    (closed / chip.chip_id / "hsk_cek.cert").write_bytes(chip.hsk_cek)
    real = os.open

    def denying(path: Path | str, *arguments: int, **options: int) -> int:
        if str(path).startswith(str(closed)):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", denying)
    monkeypatch.setenv("HSK_CEK_CERT_PATH", str(closed))
    store = CertificateStore()
    assert store.find(chip.chip_id) is None
    store.add(chip.chip_id, chip.hsk, chip.cek)
    assert store.find(chip.chip_id) == (chip.hsk, chip.cek)
    with pytest.raises(PermissionError):
        CertificateStore([closed]).find(chip.chip_id)


# ---- Cache ----------------------------------------------------------------------------------------------------------


def test_adding(home: Path, chip: ChipIdentity, line: ManufacturingLine) -> None:
    store = CertificateStore()
    path = store.add(chip.chip_id, chip.hsk, chip.cek)
    assert path == home / ".cache/csvfast/certs" / chip.chip_id / "hsk_cek.cert"
    assert path.read_bytes() == chip.hsk_cek
    assert path.stat().st_mode & 0o777 == 0o600
    assert all(parent.stat().st_mode & 0o777 == 0o700 for parent in (path.parent, path.parent.parent, home / ".cache/csvfast"))
    assert CertificateStore().find(chip.chip_id) == (chip.hsk, chip.cek)
    newer = line.make_chip()
    store.add(chip.chip_id, newer.hsk, newer.cek)
    assert store.find(chip.chip_id) == (newer.hsk, newer.cek)
    assert [entry.name for entry in path.parent.iterdir()] == ["hsk_cek.cert"]
    other = ManufacturingLine.create()
    with pytest.raises(VerificationError) as caught:
        store.add(chip.chip_id, other.hsk, chip.cek)
    assert caught.value.step == "CEK"
    with pytest.raises(StateError, match="no cache"):
        CertificateStore(cache=False).add(chip.chip_id, chip.hsk, chip.cek)


def test_importing_a_file(tmp_path: Path, chip: ChipIdentity, line: ManufacturingLine) -> None:
    store = CertificateStore([], cache=tmp_path / "cache")
    source = tmp_path / "in" / chip.chip_id / "hsk_cek.cert"
    source.parent.mkdir(parents=True)
    source.write_bytes(chip.hsk_cek)
    with pytest.raises(VerificationError, match="not a trusted root"):
        store.import_bundle(source)
    assert not (tmp_path / "cache").exists()
    assert store.import_bundle(source, roots=[line.root]) == [chip.chip_id]
    assert store.import_bundle(source, "SIM7", roots=[line.root]) == ["SIM7"]
    assert store.find("SIM7") == store.find(chip.chip_id) == (chip.hsk, chip.cek)
    with pytest.raises(FileNotFoundError):
        store.import_bundle(tmp_path / "missing.cert", roots=[line.root])


def test_importing_a_file_with_a_strange_root_in_it(tmp_path: Path, chip: ChipIdentity, line: ManufacturingLine) -> None:
    """HSK and CEK would hang from the trusted root; what else the file holds must be genuine, too."""
    store = CertificateStore([], cache=tmp_path / "cache")
    file = tmp_path / f"{chip.chip_id}_hsk_cek.cert"
    file.write_bytes(ManufacturingLine.create().root.encoded + chip.hsk_cek)
    with pytest.raises(VerificationError, match="is not trusted"):
        store.import_bundle(file, roots=[line.root])
    assert not (tmp_path / "cache").exists()
    file.write_bytes(line.root.encoded + chip.hsk_cek)
    assert store.import_bundle(file, roots=[line.root]) == [chip.chip_id]


def test_importing_a_directory(tmp_path: Path, line: ManufacturingLine) -> None:
    chips = [line.make_chip(f"SIM{number}") for number in range(4)]
    source = tmp_path / "in"
    for chip in chips[:2]:
        (source / chip.chip_id).mkdir(parents=True)
        (source / chip.chip_id / "hsk_cek.cert").write_bytes(chip.hsk_cek)
    for chip in chips[2:]:
        (source / f"{chip.chip_id}_hsk_cek.cert").write_bytes(chip.hsk_cek)
    (source / "README").write_text("no certificate")
    store = CertificateStore([], cache=tmp_path / "cache")
    assert store.import_bundle(source, roots=[line.root]) == ["SIM0", "SIM1", "SIM2", "SIM3"]
    assert all(store.find(chip.chip_id) == (chip.hsk, chip.cek) for chip in chips)
    assert CertificateStore([], cache=tmp_path / "other").import_bundle(source / "SIM1", roots=[line.root]) == ["SIM1"]
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FormatError, match="no certificates"):
        store.import_bundle(tmp_path / "nothing", roots=[line.root])


def test_one_bad_file_and_nothing_is_imported(tmp_path: Path, line: ManufacturingLine) -> None:
    for number in range(3):
        (tmp_path / "in" / f"SIM{number}").mkdir(parents=True)
        data = bytearray(line.make_chip(f"SIM{number}").hsk_cek)
        data[1000] ^= number == 2
        (tmp_path / "in" / f"SIM{number}" / "hsk_cek.cert").write_bytes(data)
    store = CertificateStore([], cache=tmp_path / "cache")
    with pytest.raises(VerificationError):
        store.import_bundle(tmp_path / "in", roots=[line.root])
    assert not (tmp_path / "cache").exists()


def test_readers_never_see_half_a_file(tmp_path: Path, line: ManufacturingLine) -> None:
    store = CertificateStore([], cache=tmp_path)
    chips = [line.make_chip("SIM1") for _ in range(2)]
    store.add("SIM1", chips[0].hsk, chips[0].cek)
    stop = threading.Event()
    failures: list[BaseException] = []
    allowed = {chip.cek for chip in chips}

    def read() -> None:
        while not stop.is_set():
            try:
                found = store.find("SIM1")
                assert found is not None
                assert found[1] in allowed
            except BaseException as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(60):
        store.add("SIM1", chips[number % 2].hsk, chips[number % 2].cek)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []


def test_reading_a_bundle_names_the_file(tmp_path: Path, chip: ChipIdentity) -> None:
    (tmp_path / "good").write_bytes(chip.hsk_cek)
    assert read_bundle(tmp_path / "good") == parse_bundle(chip.hsk_cek)
    with pytest.raises(FileNotFoundError):
        read_bundle(tmp_path / "missing")
    (tmp_path / "bad").write_bytes(b"x")
    with pytest.raises(FormatError, match=r"bad"):
        read_bundle(tmp_path / "bad")
