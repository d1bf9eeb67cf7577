"""The manufacturing line of simulated chips: a root of its own, an HSK, and as many chips as asked for.

Certificates have the layouts, usages and user ids of Hygon's. The root is not Hygon's, so that no verifier takes a simulated
chip for a real one unless it was told to trust that root.

Directory of a line, private like a chip's: line.json, root.cert, root.key, hsk.cert, hsk.key.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final

from csvfast.certs.chain import USER_IDS, verify_certificate, verify_root
from csvfast.certs.chip import ROOT_SECRET_BYTES, SIMULATED_PREFIX, ChipIdentity, read_key
from csvfast.certs.chip_id import checked_chip_id
from csvfast.certs.layout import CA_BYTES, CaCertificate, CsvCertificate, KeyAlgorithm, KeyUsage
from csvfast.certs.private import check_private_directory, read_description, read_private_file, write_private_directory
from csvfast.crypto import Secret, SM2PrivateKey
from csvfast.crypto.sm2 import dump_private_key
from csvfast.errors import ArgumentError, CsvfastError, StateError

__all__ = ["ManufacturingLine"]

_FORMAT: Final = "csvfast-line-1"
_CEK_API: Final = (1, 1)  # what real CEKs say, with version 2
_CEK_VERSION: Final = 2


class ManufacturingLine:
    """Root and HSK with their private keys. Made by :meth:`create` or :meth:`load`. Thread-safe.

    name   of the line, for people; it stands in no certificate
    root   the simulator's root certificate: what a verifier of its chips must be told to trust
    hsk    the certificate that signs chips
    """

    def __init__(
        self, name: str, root: CaCertificate, hsk: CaCertificate, root_key: SM2PrivateKey, hsk_key: SM2PrivateKey
    ) -> None:
        if root_key.public_key.point != root.point or hsk_key.public_key.point != hsk.point:
            raise ArgumentError("manufacturing line: a private key is not the key of its certificate")
        verify_root(root)
        verify_certificate(hsk, root, step="HSK")
        self.name = name
        self.root = root
        self.hsk = hsk
        self._root_key = root_key
        self._hsk_key = hsk_key

    @classmethod
    def create(cls, *, name: str = "simulator", key: SM2PrivateKey | None = None) -> ManufacturingLine:
        """A new line with random key ids. `key`: the root's private key; None = a new one."""
        root_key = SM2PrivateKey.generate() if key is None else key
        hsk_key = SM2PrivateKey.generate()
        root_id, hsk_id = os.urandom(16), os.urandom(16)
        root_user, hsk_user = USER_IDS[KeyUsage.HRK], USER_IDS[KeyUsage.HSK]
        root = CaCertificate.build(
            key_usage=KeyUsage.HRK, key_id=root_id, certifying_id=root_id, point=root_key.public_key.point, user_id=root_user
        )
        hsk = CaCertificate.build(
            key_usage=KeyUsage.HSK, key_id=hsk_id, certifying_id=root_id, point=hsk_key.public_key.point, user_id=hsk_user
        )
        return cls(
            name, root.with_signature(root_key, root_user), hsk.with_signature(root_key, root_user), root_key, hsk_key
        )

    def make_chip(self, chip_id: str | None = None) -> ChipIdentity:
        """A new chip with a CEK and a root secret of its own.

        In: chip_id   must begin with "SIM", or nobody could tell it from a real one; None = "SIM" and 10 random digits
        Raises ArgumentError.
        """
        if chip_id is None:
            chip_id = SIMULATED_PREFIX + os.urandom(5).hex().upper()
        if not checked_chip_id(chip_id).startswith(SIMULATED_PREFIX):
            raise ArgumentError(f"chip id {chip_id!r}: a simulated chip's must begin with {SIMULATED_PREFIX}")
        key = SM2PrivateKey.generate()
        cek = CsvCertificate.build(
            usage=KeyUsage.CEK,
            algorithm=KeyAlgorithm.SM2_SA,
            point=key.public_key.point,
            user_id=USER_IDS[KeyUsage.CEK],
            api=_CEK_API,
            version=_CEK_VERSION,
            issuer_id=self.hsk.key_id,
        ).with_signature(1, self._hsk_key, KeyUsage.HSK, self.hsk.user_id)
        return ChipIdentity(chip_id, self.root, self.hsk, cek, key, Secret.random(ROOT_SECRET_BYTES))

    def save(self, directory: Path | str) -> None:
        """Writes the directory, whole or not at all. Raises StateError when it exists and is not empty, OSError."""
        write_private_directory(
            Path(directory),
            {
                "line.json": json.dumps({"format": _FORMAT, "name": self.name}, indent=2).encode() + b"\n",
                "root.cert": self.root.encoded,
                "root.key": dump_private_key(self._root_key),
                "hsk.cert": self.hsk.encoded,
                "hsk.key": dump_private_key(self._hsk_key),
            },
        )

    @classmethod
    def load(cls, directory: Path | str) -> ManufacturingLine:
        """Reads what :meth:`save` wrote. Raises StateError: missing, damaged, open to other users, or mixed up."""
        directory = Path(directory)
        check_private_directory(directory)
        name = read_description(directory, "line.json", _FORMAT).get("name")
        if not isinstance(name, str):
            raise StateError(f"{directory / 'line.json'}: name is missing")
        try:
            return cls(
                name,
                CaCertificate.parse(read_private_file(directory, "root.cert", CA_BYTES)),
                CaCertificate.parse(read_private_file(directory, "hsk.cert", CA_BYTES)),
                read_key(directory, "root.key"),
                read_key(directory, "hsk.key"),
            )
        except StateError:
            raise
        except CsvfastError as error:
            raise StateError(f"{directory}: damaged: {error}") from None

    def __repr__(self) -> str:
        return f"ManufacturingLine({self.name!r}, root key_id={self.root.key_id.hex()})"
