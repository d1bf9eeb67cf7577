"""Hygon's root key certificate (HRK), the trust anchor of every real chip, as constants in the source.

The 832 bytes are put together from the key id, the point and the self-signature; their SM3 is compared with the fingerprint
that Hygon's devkit pins (csv-attestation.py) before anyone gets them. The same certificate is published at
https://cert.hygon.cn/hrk, in openanolis/csv-rs and in confidential-containers/trustee (deps/verifier/src/csv/hrk.cert).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from csvfast.certs.layout import CaCertificate, KeyUsage
from csvfast.crypto import sm3
from csvfast.errors import InternalError

__all__ = ["HYGON_ROOT_FINGERPRINT", "fingerprint", "hygon_root"]

HYGON_ROOT_FINGERPRINT: Final = "f5a46663059fdb4cdd06d097ed21782142923bb3430b3b938f23d54292094e3a"
"""SM3 of the 832 bytes, lower-case hexadecimal."""

_KEY_ID: Final = "3ae86a9701355cce333a589de21583d7"
_X: Final = "be62e14d62a4f14cf3d702db09563a75c80935e785cd1f502af5f21d92c2f62d"
_Y: Final = "3bab123a57bb7015584f8b97164e95384a640c10b9be884738744d68b41eb946"
_R: Final = "b1b6daa440bec84708e6f78d6233940958b7cee63b0b8ecba048e08ceeff6529"
_S: Final = "8e4321de8e79d346b5c9a1c6492554ab81d523f351a3567c852bbb4fe36bd750"


@lru_cache(maxsize=1)
def hygon_root() -> CaCertificate:
    """Hygon's root, always the same object. Raises InternalError when the constants are not the pinned certificate."""
    root = CaCertificate.build(
        key_usage=KeyUsage.HRK,
        key_id=bytes.fromhex(_KEY_ID),
        certifying_id=bytes.fromhex(_KEY_ID),
        point=bytes.fromhex(_X + _Y),
        user_id=b"HYGON-SSD-HRK",
        signature=bytes.fromhex(_R + _S),
    )
    if fingerprint(root) != HYGON_ROOT_FINGERPRINT:
        raise InternalError("the constants of Hygon's root certificate do not have the pinned fingerprint")
    return root


def fingerprint(root: CaCertificate) -> str:
    """SM3 of a root's 832 bytes, lower-case hexadecimal: what people compare."""
    return sm3(root.encoded).hexdigest()
