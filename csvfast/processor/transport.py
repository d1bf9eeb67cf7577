"""What a migration carries besides packets: who the target and the source are, and whom the guest belongs to.

The target's chain is checked at SEND_START. AMD's protocol (publication 55766, which CSV's commands mirror) gives
RECEIVE_START only the source's bare DH certificate, so anybody could play the source. This project therefore lets
RECEIVE_START take the source's whole chain, in the order of a chain file, where the bare certificate would stand:

    PDH || PEK || OCA || CEK || HSK || HRK      4 x 2084 + 2 x 832 = 10000 bytes

With it, verified to a trusted root, the guest keeps its launch digest, owner key digest, vm_id, vm_version. Without
it the guest arrives as nobody: these fields are zero in its reports, so that no host can invent a guest with a measurement
of its choice (project-defined; what Hygon's firmware does is not public).

The session (session.py) is signed by the source's PDH key, as a guest owner signs with his DH key; its vm_digest is the
guest's launch digest, and its 148-byte field rnd_pub_key_data holds the record {"CSVFAST-MIGRATE1" 16, owner key
digest 32, zero} (project-defined: what real firmware puts there is not public).

Thread-safety: functions without state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

from csvfast.certs.chain import CertificateChain, verify_chain
from csvfast.certs.layout import CA_BYTES, CSV_BYTES, CaCertificate, CsvCertificate
from csvfast.errors import CsvfastError, FirmwareError, FirmwareStatus
from csvfast.processor.buffers import copy_of
from csvfast.processor.session import OpenedSession, OwnerSession, SessionBlob, make_session, open_session

if TYPE_CHECKING:
    from collections.abc import Callable

    from csvfast._core import BytesLike
    from csvfast.processor.guest import Guest
    from csvfast.processor.identity import PlatformIdentity
    from csvfast.report.policy import GuestPolicy

__all__ = [
    "CHAIN_FILE_BYTES",
    "PLATFORM_BYTES",
    "VENDOR_BYTES",
    "Identity",
    "check_target_policy",
    "make_migration_session",
    "open_migration_session",
    "source_chain",
    "target_chain",
]

PLATFORM_BYTES: Final = 3 * CSV_BYTES  # PEK || OCA || CEK, as PDH_CERT_EXPORT gives them
VENDOR_BYTES: Final = 2 * CA_BYTES  # HSK || HRK
CHAIN_FILE_BYTES: Final = CSV_BYTES + PLATFORM_BYTES + VENDOR_BYTES
# Oldest API of a part with CSV3 (inferred: certificates carry no build number and no CSV3 flag).
CSV3_API: Final = (1, 3)

_MAGIC: Final = b"CSVFAST-MIGRATE1"
_RECORD_BYTES: Final = 148
_DIGEST: Final = 32
_ZERO: Final = bytes(_DIGEST)


class Identity(NamedTuple):
    """What a guest's reports say of it; all zero for a guest whose source nobody vouches for."""

    measure: bytes = _ZERO
    user_pubkey_digest: bytes = _ZERO
    vm_id: bytes = bytes(16)
    vm_version: bytes = bytes(16)


class VerifiedChain(NamedTuple):
    """Certificates of a platform whose chain is genuine."""

    pdh: CsvCertificate
    pek: CsvCertificate
    oca: CsvCertificate
    cek: CsvCertificate
    hsk: CaCertificate


def target_chain(
    pdh: BytesLike, platform: BytesLike, vendor: BytesLike, roots: Sequence[CaCertificate]
) -> VerifiedChain:
    """Reads and verifies the certificates of a migration target: PDH; PEK || OCA || CEK; HSK || HRK.

    Raises FirmwareError: INVALID_LENGTH, INVALID_CERTIFICATE.
    """
    parts = []
    for name, data, size in (
        ("pdh", pdh, CSV_BYTES), ("platform", platform, PLATFORM_BYTES), ("vendor", vendor, VENDOR_BYTES)
    ):  # fmt: skip
        raw = copy_of(data)
        if len(raw) != size:
            raise FirmwareError(
                FirmwareStatus.INVALID_LENGTH, f"{name}: {len(raw)} bytes; expected {size}", {f"{name}_length": size}
            )
        parts.append(raw)
    return source_chain(b"".join(parts), roots)


def source_chain(data: bytes, roots: Sequence[CaCertificate]) -> VerifiedChain:
    """Reads and verifies a chain file of 10000 bytes. Raises FirmwareError(INVALID_CERTIFICATE)."""
    try:
        pdh, pek, oca, cek = (
            CsvCertificate.parse(data[start : start + CSV_BYTES]) for start in range(0, 4 * CSV_BYTES, CSV_BYTES)
        )
        hsk, hrk = (
            CaCertificate.parse(data[start : start + CA_BYTES])
            for start in range(4 * CSV_BYTES, CHAIN_FILE_BYTES, CA_BYTES)
        )
        verify_chain(CertificateChain(hsk=hsk, cek=cek, pek=pek, oca=oca, pdh=pdh, hrk=hrk), roots)
    except CsvfastError as problem:
        raise FirmwareError(FirmwareStatus.INVALID_CERTIFICATE, str(problem)) from None
    return VerifiedChain(pdh, pek, oca, cek, hsk)


def check_target_policy(policy: GuestPolicy, chain: VerifiedChain, own_oca: CsvCertificate) -> None:
    """Whether a guest's policy lets it go to a platform whose chain is genuine. Raises FirmwareError(POLICY_FAILURE).

    Bit CSV asks for a CSV-capable target: every platform with a genuine chain is one.
    """
    api = (chain.pek.api_major, chain.pek.api_minor)
    wanted = (policy.api_major, policy.api_minor)
    problem = None
    if policy.domain and chain.oca.point != own_oca.point:
        problem = "the target belongs to another owner's domain"
    elif policy.hsk_version > chain.hsk.version:
        problem = f"the target's HSK has version {chain.hsk.version}; the policy asks for {policy.hsk_version}"
    elif policy.cek_version > chain.cek.version:
        problem = f"the target's CEK has version {chain.cek.version}; the policy asks for {policy.cek_version}"
    elif wanted > api:
        problem = f"the target has API {api[0]}.{api[1]}; the policy asks for {wanted[0]}.{wanted[1]}"
    elif policy.csv3 and api < CSV3_API:
        problem = f"the target has API {api[0]}.{api[1]}, which has no CSV3"
    if problem is not None:
        raise FirmwareError(FirmwareStatus.POLICY_FAILURE, problem)


def make_migration_session(
    guest: Guest, target: CsvCertificate, identity: PlatformIdentity, random: Callable[[int], bytearray], layout: str
) -> OwnerSession:
    """The session towards the target's PDH, with new transport keys, signed by this platform's PDH key."""
    if layout == "amd":
        from csvfast.processor.session_amd import make_amd_session

        return make_amd_session(target, guest.policy, key=identity.pdh_key, user_id=identity.pdh.user_id)
    session = make_session(
        target,
        guest.policy,
        vm_id=guest.vm_id,
        vm_version=guest.vm_version,
        vm_digest=guest.measure or _ZERO,
        user_data=guest.user_data,
        key=identity.pdh_key,
        user_id=identity.pdh.user_id,
        _random=random,
    )
    record = (_MAGIC + guest.user_pubkey_digest).ljust(_RECORD_BYTES, b"\0")
    blob = replace(SessionBlob.parse(session.blob), rnd_pub_key_data=record)
    signature = identity.pdh_key.sign(blob.body, user_id=identity.pdh.user_id)
    session.blob = replace(blob, signature=signature).encode()
    return session


def open_migration_session(
    session: BytesLike, source: CsvCertificate, identity: PlatformIdentity, policy: GuestPolicy, layout: str
) -> tuple[OpenedSession, Identity]:
    """Opens a session made for this platform; the identity is to be believed only with the source's verified chain.

    Raises FirmwareError as open_session() and open_amd_session().
    """
    if layout == "amd":
        from csvfast.processor.session_amd import open_amd_session

        opened = open_amd_session(session, identity.pdh_key, identity.pdh.user_id, source, policy)
        return opened, Identity()
    opened = open_session(session, identity.pdh_key, source, policy)
    record = SessionBlob.parse(session).rnd_pub_key_data
    end = len(_MAGIC) + _DIGEST
    if record[: len(_MAGIC)] != _MAGIC or any(record[end:]):
        return opened, Identity()
    owner = record[len(_MAGIC) : end]
    return opened, Identity(opened.vm_digest or _ZERO, owner, opened.vm_id, opened.vm_version)
