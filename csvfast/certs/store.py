"""Where the HSK and CEK of a chip lie on this machine: the real tools' directories, an offline cache, then the key server.

    /opt/hygon/csv/hsk_cek/<chip id>/hsk_cek.cert                    confidential-containers/trustee
    /opt/csv/hsk_cek/<chip id>/hsk_cek.cert                          rats-tls, librats
    $HSK_CEK_CERT_PATH, /opt/dcu/certs/<chip id>_hsk_cek.cert        csv-rs, for the DCU
    $CSV_CHAIN, ~/.cache/hygon-csv/chain, /var/cache/hygon-csv/chain csv-rs: the chain of "this" machine, whichever chip it has
    $XDG_CACHE_HOME/csvfast/certs/<chip id>/hsk_cek.cert             csvfast's cache: what was imported or fetched
    https://cert.hygon.cn                                            only through a client that the caller gives

A CEK does not say whose it is: the file's name does. Files that are not named after a chip are used only for a PEK that their
CEK signed. Finding is no verifying: whoever can write a directory can put anything there, and verify_chain refuses it.

Thread-safe; several processes may share a cache.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from csvfast.certs.bundle import BUNDLE_LIMIT, CertificateBundle, parse_bundle
from csvfast.certs.chain import CertificateChain, verify_certificate, verify_chain
from csvfast.certs.chip_id import checked_chip_id
from csvfast.certs.flight import SingleFlight
from csvfast.certs.layout import CA_BYTES, CSV_BYTES, CaCertificate, CsvCertificate
from csvfast.certs.private import write_private_file
from csvfast.errors import FormatError, StateError, VerificationError

if TYPE_CHECKING:
    from csvfast.certs.key_server import KeyServerClient

__all__ = ["CertificateStore", "checked_chip_id", "default_cache", "default_directories", "read_bundle"]

FILE_NAME: Final = "hsk_cek.cert"
_SUFFIX: Final = "_hsk_cek.cert"
_TOOL_DIRECTORIES: Final = ("/opt/hygon/csv/hsk_cek", "/opt/csv/hsk_cek")
_DCU_DIRECTORY: Final = "/opt/dcu/certs"
_CHAIN_FILES: Final = ("~/.cache/hygon-csv/chain", "/var/cache/hygon-csv/chain")

Pair = tuple[CaCertificate, CsvCertificate]


def default_directories() -> tuple[Path, ...]:
    """The real tools' places on this machine, in the module's order; a path may be a directory, a file, or missing."""
    dcu = os.environ.get("HSK_CEK_CERT_PATH")
    chain = os.environ.get("CSV_CHAIN")
    places = [*_TOOL_DIRECTORIES, *([dcu] if dcu else []), _DCU_DIRECTORY, *([chain] if chain else []), *_CHAIN_FILES]
    return tuple(path for place in places if (path := _expanded(place)) is not None)


def default_cache() -> Path | None:
    """$XDG_CACHE_HOME/csvfast/certs, or ~/.cache/csvfast/certs; None for a user whose home nobody knows."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    directory = Path(base) if base.startswith("/") else _expanded("~/.cache")
    return None if directory is None else directory / "csvfast" / "certs"


class CertificateStore:
    """Looks up the HSK and CEK of chips.

    In: directories  looked through in this order; None = default_directories(). In a directory, <chip id>/hsk_cek.cert,
                     <chip id>_hsk_cek.cert and <chip id>.cert belong to a chip; hsk_cek.cert, and an entry that is a file, to
                     any
        cache        where add() and the key server's answers are kept; None = default_cache(), False = nowhere
        client       asked when nothing is found; None = nobody is asked
    """

    def __init__(
        self,
        directories: Sequence[Path | str] | None = None,
        cache: Path | str | Literal[False] | None = None,
        client: KeyServerClient | None = None,
    ) -> None:
        self._may_skip = directories is None
        self.directories = default_directories() if directories is None else tuple(Path(one) for one in directories)
        self.cache = default_cache() if cache is None else None if cache is False else Path(cache)
        self.client = client
        self._fetches: SingleFlight[Pair] = SingleFlight()

    def find(self, chip_id: str, *, pek: CsvCertificate | None = None) -> Pair | None:
        """HSK and CEK of a chip, or None.

        In: pek   a PEK of the chip: then files that name no chip are looked at too, and used when their CEK signed it
        Raises FormatError for a chip id that cannot be one and for a file that is damaged; OSError for one that cannot be read
        (among default_directories(), those closed to this user are passed over); what the client raises when it is asked.
        """
        checked_chip_id(chip_id)
        for path in self._named_files(chip_id):
            pair = self._read(path)
            if pair is not None:
                return pair
        if pek is not None:
            for path in self._nameless_files():
                pair = self._read(path)
                if pair is not None and _signed(pair[1], pek):
                    return pair
        if self.client is None:
            return None
        client = self.client
        return self._fetches.run(chip_id, lambda: self._fetch(chip_id, client))

    def _fetch(self, chip_id: str, client: KeyServerClient) -> Pair:
        if self.cache is None:
            return client.hsk_cek(chip_id)
        # Another thread may have fetched them since this one looked.
        pair = _read_pair(self.cache / chip_id / FILE_NAME)
        if pair is None:
            pair = client.hsk_cek(chip_id)
            self._write(chip_id, pair)
        return pair

    def add(self, chip_id: str, hsk: CaCertificate, cek: CsvCertificate) -> Path:
        """Puts a chip's certificates into the cache, in place of older ones, and says where.

        That the HSK signed the CEK is checked here, the root when they are used.
        Raises FormatError for the chip id, VerificationError, OSError; StateError when the store has no cache.
        """
        checked_chip_id(chip_id)
        verify_certificate(cek, hsk, step="CEK")
        return self._write(chip_id, (hsk, cek))

    def import_bundle(
        self, path: Path | str, chip_id: str | None = None, *, roots: Sequence[CaCertificate] | None = None
    ) -> list[str]:
        """Verifies certificates from a file or directory and puts them into the cache.

        In:  path     a file with HSK and CEK (and more), or a directory laid out as one of the real tools' (see the class)
             chip_id  whose they are, for a file; None = what the file's or its directory's name says
             roots    None = Hygon's
        Out: chip ids, in the order of their names. Files of a directory that are not named after a chip are left out.
        Raises FormatError, VerificationError (nothing has been imported then), StateError (no cache), OSError.
        """
        path = Path(path)
        files = _chip_files(path) if path.is_dir() else [(chip_id or _chip_of(path), path)]
        pairs: list[tuple[str, Pair]] = []
        for name, file in files:
            chain = read_bundle(file).chain()
            verify_chain(CertificateChain(hsk=chain.hsk, cek=chain.cek, hrk=chain.hrk), roots)
            pairs.append((checked_chip_id(name), (chain.hsk, chain.cek)))
        if not pairs:
            raise FormatError(str(path), "directory", None, "no certificates", f"<chip id>/{FILE_NAME} or <chip id>{_SUFFIX}")
        for name, pair in pairs:
            self._write(name, pair)
        return [name for name, _ in pairs]

    def _read(self, path: Path) -> Pair | None:
        try:
            return _read_pair(path)
        except PermissionError:
            # A tool's own directory may be closed to this user; a directory that the caller named may not.
            if self._may_skip:
                return None
            raise

    def _write(self, chip_id: str, pair: Pair) -> Path:
        if self.cache is None:
            raise StateError("this store has no cache to keep certificates in")
        path = self.cache / chip_id / FILE_NAME
        write_private_file(path, pair[0].encoded + pair[1].encoded)
        return path

    def _named_files(self, chip_id: str) -> Iterator[Path]:
        caches = () if self.cache is None else (self.cache,)
        for directory in (*self.directories, *caches):
            yield directory / chip_id / FILE_NAME
            yield directory / f"{chip_id}{_SUFFIX}"
            yield directory / f"{chip_id}.cert"

    def _nameless_files(self) -> Iterator[Path]:
        for directory in self.directories:
            yield directory
            yield directory / FILE_NAME


def read_bundle(path: Path) -> CertificateBundle:
    """The certificates of a file, of which no more is read than certificates can be. Raises FormatError naming it, OSError."""
    data = _read(path)
    if data is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    try:
        return parse_bundle(data)
    except FormatError as error:
        raise FormatError(f"{path}: {error.structure}", error.field, error.offset, error.found, error.expected) from None


def _read(path: Path) -> bytes | None:
    """A regular file's bytes; None when there is no such file, or it is none."""
    try:
        # O_NONBLOCK: a pipe in the file's place must not hang the program.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            return None
        raise
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return None
        data = bytearray()
        while piece := os.read(handle, BUNDLE_LIMIT + 1 - len(data)):
            data += piece
        return bytes(data)
    finally:
        os.close(handle)


def _read_pair(path: Path) -> Pair | None:
    """HSK and CEK of a file; None when there is no file. Raises FormatError naming it, OSError."""
    try:
        bundle = read_bundle(path)
    except FileNotFoundError:
        return None
    if bundle.hsk is None or bundle.cek is None:
        missing = "HSK" if bundle.hsk is None else "CEK"
        raise FormatError(str(path), missing, None, "none", f"HSK and CEK, {CA_BYTES} and {CSV_BYTES} bytes")
    return bundle.hsk, bundle.cek


def _signed(cek: CsvCertificate, pek: CsvCertificate) -> bool:
    try:
        verify_certificate(pek, cek, strict=False, step="PEK")
    except VerificationError:
        return False
    return True


def _chip_files(directory: Path) -> list[tuple[str, Path]]:
    found = []
    for entry in sorted(directory.iterdir()):
        if entry.name.endswith(_SUFFIX) and entry.is_file():
            found.append((entry.name.removesuffix(_SUFFIX), entry))
        elif (entry / FILE_NAME).is_file():
            found.append((entry.name, entry / FILE_NAME))
    if not found and (directory / FILE_NAME).is_file():  # the directory of one chip
        found.append((_chip_of(directory / FILE_NAME), directory / FILE_NAME))
    return found


def _chip_of(path: Path) -> str:
    if path.name == FILE_NAME:
        return path.absolute().parent.name
    return path.name.removesuffix(_SUFFIX).removesuffix(".cert")


def _expanded(place: str) -> Path | None:
    """None below a home that is not known, or that would be another one in each working directory."""
    try:
        path = Path(place).expanduser()
    except RuntimeError:
        return None
    return path if path.is_absolute() or not place.startswith("~") else None
