"""csvfast: HaiGuang (Hygon) CSV confidential computing in software.

The names most people need stand here; :mod:`csvfast.crypto` holds SM2, SM3 and SM4, :mod:`csvfast.memory` the encrypted memory,
:mod:`csvfast.measure` the measurement of images, :mod:`csvfast.errors` every exception.

    >>> import csvfast
    >>> csvfast.sm3(b"abc").hexdigest()
    '66c7f0f462eeedd9d1f2d46bdc10e4e24167c4875cf2f7a2297da02b8f4ba8e0'
    >>> with csvfast.EncryptedMemory(1 << 20) as memory:
    ...     _ = memory.install(1)
    ...     memory.write(0x1000, b"secret", asid=1)
    ...     memory.read(0x1000, 6, asid=1)
    b'secret'
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from csvfast import errors
from csvfast._lazy import lazy

try:
    from csvfast._core import (
        Secret,
        SM2PrivateKey,
        SM2PublicKey,
        WorkerPool,
        hmac_sm3,
        sm2_verify_many,
        sm3,
        sm3_blocks,
        sm3_kdf,
        sm3_many,
    )
except ModuleNotFoundError as error:  # the checkout lies before the installed package on the path
    if error.name != "csvfast._core":
        raise
    raise ImportError(
        f"csvfast in {__path__[0]} is source code without its compiled part. Install it (pip install .), then run from "
        "another folder or with PYTHONSAFEPATH=1, so that the installed package is found first"
    ) from None
from csvfast._runtime import force_kernel, get_include, get_library, info
from csvfast._runtime import version as _version
from csvfast.crypto import SM4CTR, SM4GCM, SM4XTS, sm3_file
from csvfast.errors import CsvfastError

if TYPE_CHECKING:
    from csvfast.memory import EncryptedMemory
else:
    __getattr__ = lazy(__name__, {"EncryptedMemory": "memory", "memory": ""})

__version__ = _version()

__all__ = [
    "SM4CTR",
    "SM4GCM",
    "SM4XTS",
    "CsvfastError",
    "EncryptedMemory",
    "SM2PrivateKey",
    "SM2PublicKey",
    "Secret",
    "WorkerPool",
    "__version__",
    "errors",
    "force_kernel",
    "get_include",
    "get_library",
    "hmac_sm3",
    "info",
    "sm2_verify_many",
    "sm3",
    "sm3_blocks",
    "sm3_file",
    "sm3_kdf",
    "sm3_many",
]
