"""The sealing key that a report's page carries into the guest.

It is the same for every report of one guest identity on one chip. Hygon's derivation is not public; this one is the project's:
HMAC-SM3(chip root secret; "csvfast-seal" || measure || policy || user_pubkey_digest || vm_id) (inferred).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from csvfast.crypto import hmac_sm3

if TYPE_CHECKING:
    from csvfast.crypto import Secret
    from csvfast.processor.guest import Guest

__all__ = ["sealing_key"]

_LABEL = b"csvfast-seal"


def sealing_key(root_secret: Secret, guest: Guest) -> bytearray:
    """32 bytes, for the caller to wipe. The guest's launch digest must be final. Thread-safety: as the guest's."""
    if guest.measure is None:
        raise ValueError("the guest has no final launch digest")
    mac = hmac_sm3(
        root_secret, _LABEL + guest.measure + guest.policy.to_bytes() + guest.user_pubkey_digest + guest.vm_id
    )
    return bytearray(mac.digest())
