"""A simulated chip's identity: its certificates and the two secrets a real one has in its fuses.

Directory, all files 0600 in a directory 0700 that only its owner can enter:

    chip.json         {"format": "csvfast-chip-1", "chip_id": "SIM..."}
    root.cert         the simulator's HRK, 832 bytes           hsk.cert    832 bytes
    cek.cert          2084 bytes                               cek.key     PKCS#8 PEM
    root-secret.bin   32 bytes, from which sealing keys derive
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from csvfast.certs.chain import CertificateChain, verify_chain
from csvfast.certs.chip_id import checked_chip_id
from csvfast.certs.layout import CA_BYTES, CSV_BYTES, CaCertificate, CsvCertificate
from csvfast.certs.private import check_private_directory, read_description, read_private_file, write_private_directory
from csvfast.certs.roots import hygon_root
from csvfast.crypto import Secret, SM2PrivateKey
from csvfast.crypto.sm2 import dump_private_key, load_private_key
from csvfast.errors import CsvfastError, StateError

__all__ = ["ROOT_SECRET_BYTES", "SIMULATED_PREFIX", "ChipIdentity", "read_key"]

SIMULATED_PREFIX: Final = "SIM"
"""Every simulated chip id begins with it; no real one does."""

ROOT_SECRET_BYTES: Final = 32
_FORMAT: Final = "csvfast-chip-1"
_KEY_LIMIT: Final = 4096


@dataclass(frozen=True, eq=False)
class ChipIdentity:
    """What a chip is born with. The secrets wipe themselves when they die, and neither shows in repr nor can be pickled.

    chip_id       "SIM" and 10 hexadecimal digits, unless chosen otherwise
    root, hsk     the line's certificates
    cek, cek_key  this chip's endorsement certificate and its private key
    root_secret   32 bytes
    """

    chip_id: str
    root: CaCertificate = field(repr=False)
    hsk: CaCertificate = field(repr=False)
    cek: CsvCertificate = field(repr=False)
    cek_key: SM2PrivateKey = field(repr=False)
    root_secret: Secret = field(repr=False)

    @property
    def hsk_cek(self) -> bytes:
        """HSK||CEK, 2916 bytes: what a key server would answer for this chip."""
        return self.hsk.encoded + self.cek.encoded

    def save(self, directory: Path | str) -> None:
        """Writes the directory, whole or not at all. Raises StateError when it exists and is not empty, OSError."""
        description = {"format": _FORMAT, "chip_id": self.chip_id}
        write_private_directory(
            Path(directory),
            {
                "chip.json": json.dumps(description, indent=2).encode() + b"\n",
                "root.cert": self.root.encoded,
                "hsk.cert": self.hsk.encoded,
                "cek.cert": self.cek.encoded,
                "cek.key": dump_private_key(self.cek_key),
                "root-secret.bin": memoryview(self.root_secret),
            },
        )

    @classmethod
    def load(cls, directory: Path | str) -> ChipIdentity:
        """Reads what :meth:`save` wrote; other files in the directory are left alone.

        Raises StateError: missing, damaged, open to other users, or pieces that do not belong together.
        """
        directory = Path(directory)
        check_private_directory(directory)
        chip_id = read_description(directory, "chip.json", _FORMAT).get("chip_id")
        if not isinstance(chip_id, str) or not chip_id.startswith(SIMULATED_PREFIX):
            raise StateError(f"{directory / 'chip.json'}: chip_id {str(chip_id)[:80]!r}; expected {SIMULATED_PREFIX}...")
        try:
            checked_chip_id(chip_id)
            root = CaCertificate.parse(read_private_file(directory, "root.cert", CA_BYTES))
            hsk = CaCertificate.parse(read_private_file(directory, "hsk.cert", CA_BYTES))
            cek = CsvCertificate.parse(read_private_file(directory, "cek.cert", CSV_BYTES))
            cek_key = read_key(directory, "cek.key")
            secret = read_private_file(directory, "root-secret.bin", ROOT_SECRET_BYTES)
            root_secret = Secret(secret)
            secret[:] = bytes(len(secret))
            verify_chain(CertificateChain(hsk=hsk, cek=cek), [root])
        except StateError:
            raise
        except CsvfastError as error:
            raise StateError(f"{directory}: damaged: {error}") from None
        if len(root_secret) != ROOT_SECRET_BYTES:
            raise StateError(f"{directory / 'root-secret.bin'}: {len(root_secret)} bytes; expected {ROOT_SECRET_BYTES}")
        if cek_key.public_key.point != cek.point:
            raise StateError(f"{directory}: cek.key is not the key of cek.cert")
        if root == hygon_root():
            raise StateError(f"{directory / 'root.cert'}: is Hygon's; a simulated chip cannot hang from it")
        return cls(chip_id, root, hsk, cek, cek_key, root_secret)


def read_key(directory: Path, name: str) -> SM2PrivateKey:
    """A private key from a private directory. Raises StateError, and what load_private_key raises for damaged PEM."""
    data = read_private_file(directory, name, _KEY_LIMIT)
    try:
        return load_private_key(bytes(data))
    finally:
        data[:] = bytes(len(data))
