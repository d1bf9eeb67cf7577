"""Mailbox handlers of the platform's commands: from a parameter block to a method of Processor and back.

Thread-safety: called under the processor's lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from csvfast.certs.layout import CSV_BYTES
from csvfast.errors import FirmwareStatus
from csvfast.processor.commands import LAYOUTS, Command
from csvfast.processor.core import PlatformState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from csvfast.processor.commands import ParameterBlock
    from csvfast.processor.dma import Dma

__all__ = ["PLATFORM_HANDLERS"]

FIRMWARE_IMAGE_MAX: Final = 0x80000  # CSV_FW_MAX_SIZE of Hygon's driver
CERTIFICATES_MAX: Final = 0x10000  # no chain of certificates is longer; a cap before anything is read
FLAG_ES: Final = 1


def _flags(dma: Dma, block: ParameterBlock) -> bool:
    flags = block["flags"]
    if flags & ~FLAG_ES:
        dma.processor.refuse(FirmwareStatus.INVALID_PARAM, f"flags are {flags:#x}; expected 0 or 1")
    return bool(flags & FLAG_ES)


def _init(dma: Dma, block: ParameterBlock) -> None:
    dma.processor.require_platform(PlatformState.UNINIT)
    es = _flags(dma, block)
    dma.processor.init(es=es, tmr_address=block["tmr_address"], tmr_length=block["tmr_length"])


def _init_ex(dma: Dma, block: ParameterBlock) -> None:
    """INIT with the block's own length in front and the NV area's place behind."""
    dma.processor.require_platform(PlatformState.UNINIT)
    size = LAYOUTS[Command.INIT_EX].size
    if block["length"] != size:
        dma.processor.refuse(FirmwareStatus.INVALID_LENGTH, f"length is {block['length']}; expected {size}")
    dma.processor.init_ex(
        nv_address=block["nv_address"],
        nv_length=block["nv_length"],
        es=_flags(dma, block),
        tmr_address=block["tmr_address"],
        tmr_length=block["tmr_length"],
    )


def _platform_status(dma: Dma, block: ParameterBlock) -> None:
    encoded = dma.processor.platform_status().encode()
    for field in block.layout.written:
        block[field.name] = int.from_bytes(encoded[field.offset : field.offset + field.size], "little")


def _deliver(dma: Dma, block: ParameterBlock, data: bytes) -> None:
    dma.require_room(block, length=len(data))
    dma.write(block["address"], data)
    block["length"] = len(data)


def _pek_csr(dma: Dma, block: ParameterBlock) -> None:
    _deliver(dma, block, dma.processor.pek_csr())


def _get_id(dma: Dma, block: ParameterBlock) -> None:
    _deliver(dma, block, dma.processor.get_id())


def _pek_cert_import(dma: Dma, block: ParameterBlock) -> None:
    dma.processor.require_platform(PlatformState.INIT)
    for name in ("pek", "oca"):
        dma.check_length(block, name, exactly=CSV_BYTES)
    pek = dma.fetch(block, "pek", exactly=CSV_BYTES)
    oca = dma.fetch(block, "oca", exactly=CSV_BYTES)
    dma.processor.pek_cert_import(pek, oca)


def _pdh_cert_export(dma: Dma, block: ParameterBlock) -> None:
    processor = dma.processor
    pdh, chain = processor.pdh_cert_export()
    dma.require_room(block, pdh_length=len(pdh), chain_length=len(chain))
    # Both places are checked before either is written.
    processor.physical(block["pdh_address"], len(pdh))
    processor.physical(block["chain_address"], len(chain))
    dma.write(block["pdh_address"], pdh)
    dma.write(block["chain_address"], chain)
    block["pdh_length"] = len(pdh)
    block["chain_length"] = len(chain)


def _download_firmware(dma: Dma, block: ParameterBlock) -> None:
    later = (PlatformState.INIT,) if dma.processor.profile.runtime_download else ()
    dma.processor.require_platform(PlatformState.UNINIT, *later)
    length = block["length"]
    if not 0 < length <= FIRMWARE_IMAGE_MAX:
        dma.processor.refuse(
            FirmwareStatus.INVALID_LENGTH, f"image has {length} bytes; expected 1 .. {FIRMWARE_IMAGE_MAX}"
        )
    dma.processor.download_firmware(dma.read(block["address"], length))


def _hgsc_cert_import(dma: Dma, block: ParameterBlock) -> None:
    dma.processor.require_platform(PlatformState.INIT)
    for name in ("hgscsk", "hgsc"):
        dma.check_length(block, name, most=CERTIFICATES_MAX)
    dma.processor.hgsc_cert_import(
        dma.fetch(block, "hgscsk", most=CERTIFICATES_MAX), dma.fetch(block, "hgsc", most=CERTIFICATES_MAX)
    )


PLATFORM_HANDLERS: Final[Mapping[Command, Callable[[Dma, ParameterBlock], None]]] = {
    Command.NOP: lambda _dma, _block: None,
    Command.INIT: _init,
    Command.INIT_EX: _init_ex,
    Command.SHUTDOWN: lambda dma, _block: dma.processor.shutdown(),
    Command.FACTORY_RESET: lambda dma, _block: dma.processor.factory_reset(),
    Command.PLATFORM_STATUS: _platform_status,
    Command.PEK_GEN: lambda dma, _block: dma.processor.pek_gen(),
    Command.PEK_CSR: _pek_csr,
    Command.PEK_CERT_IMPORT: _pek_cert_import,
    Command.PDH_GEN: lambda dma, _block: dma.processor.pdh_gen(),
    Command.PDH_CERT_EXPORT: _pdh_cert_export,
    Command.GET_ID: _get_id,
    Command.DF_FLUSH: lambda dma, _block: dma.processor.df_flush(),
    Command.DOWNLOAD_FIRMWARE: _download_firmware,
    Command.HGSC_CERT_IMPORT: _hgsc_cert_import,
}
