"""PEK, PDH and OCA of one platform: keys, certificates, and who owns it.

Thread-safety: immutable once made; a change makes a new object.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from csvfast.certs.layout import CsvCertificate
    from csvfast.crypto import SM2PrivateKey

__all__ = ["PlatformIdentity"]


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class PlatformIdentity:
    """What INIT generates once and every later INIT finds again.

    Attributes:
        pek_key, pek: platform endorsement key and its certificate, signed by CEK (slot 1) and OCA (slot 2).
        pdh_key, pdh: Diffie-Hellman key and certificate, signed by PEK (slot 1).
        oca: certificate of the owner. oca_key: its key while the platform owns itself, None when somebody else does.
    """

    pek_key: SM2PrivateKey
    pek: CsvCertificate
    pdh_key: SM2PrivateKey
    pdh: CsvCertificate
    oca: CsvCertificate
    oca_key: SM2PrivateKey | None

    @property
    def externally_owned(self) -> bool:
        """True after PEK_CERT_IMPORT."""
        return self.oca_key is None

    def __repr__(self) -> str:
        return f"<PlatformIdentity {'externally' if self.externally_owned else 'self'} owned>"
