"""What a VMM does with the processor, by raw command buffers only: initialise it, launch a guest, ask for its report, stop it.

Works on any Machine, in this process (LocalMachine) or behind a socket (RemoteMachine). The order of commands is QEMU's
(specification section 4.12): firmware, hash table, vCPU state, measurement, secret, finish. Guest memory is the firmware at the
end of the first 4 GiB and RAM from 0; kernel and initrd are not put there, since a direct boot reads them from the VMM and checks
their hashes.

CSV3's launch has commands of its own: vmm_csv3.py.

Thread-safety: one thread per Host; any number of Hosts on one machine.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, Self
from uuid import UUID

from csvfast.errors import (
    AddressError,
    ArgumentError,
    CsvfastError,
    FirmwareError,
    FirmwareStatus,
    UnknownAsidError,
    VerificationError,
)
from csvfast.measure.launch import FORCED_TABLE_ADDRESS, LaunchDigest, Vmsa, hash_table, launch_digest
from csvfast.measure.ovmf import GuidTable
from csvfast.measure.source import AnyPath, Progress, Source
from csvfast.measure.vmsa import BSP_ADDRESS, DEFAULT_CPU_SIGNATURE, vmsa_page
from csvfast.processor.commands import LAYOUTS, Command, ParameterBlock
from csvfast.processor.core import C_BIT, PAGE, GuestState, PlatformState
from csvfast.processor.mailbox_guest import VM_ATTESTATION
from csvfast.report.layout import Report
from csvfast.report.policy import GuestPolicy
from csvfast.report.request import ReportRequest

if TYPE_CHECKING:
    from types import TracebackType

    from csvfast._core import BytesLike
    from csvfast.processor.frames import GuestRange
    from csvfast.processor.machine import Machine

__all__ = ["FORCED_TABLE_ADDRESS", "GuestPlan", "Host", "LaunchedGuest", "Secret"]

FOUR_GIB: Final = 1 << 32
TMR_BYTES: Final = 1 << 20
ASID_MAX: Final = 0xFFFF
SECRET_AREA: Final = UUID("4c2eb361-7d9b-4cc3-8081-127c90d3d294")
MEASURE_BYTES: Final = 48


class Secret(NamedTuple):
    """A packed secret: header (52 bytes) and ciphertext."""

    header: bytes
    transport: bytes


@dataclass(frozen=True, kw_only=True)
class GuestPlan:
    """A guest to launch.

    Args:
        firmware: OVMF image. kernel, initrd, append: of a direct boot; their hashes are measured.
        policy: guest policy; with ES (bit 2) each vCPU's save area is encrypted too.
        dh, session: the owner's certificate and session blob, both or neither.
        memory_size: RAM of the guest, in bytes. vcpus, cpu_signature: for the save areas.
        vmsa: "amd" when the processor measures save areas, so that the prediction does too.
        force_hash_table: the hash table although the firmware has no area for it (experiments).
        secure_calls: of a CSV3 guest whose firmware names no secure call pages: guest address of a page that names them; they are
            the two behind it, and the guest's kernel must keep off all three.
    """

    firmware: AnyPath
    kernel: AnyPath | None = None
    initrd: AnyPath | None = None
    append: str | None = None
    policy: GuestPolicy = GuestPolicy(1)  # noqa: RUF009  (immutable)
    dh: bytes = b""
    session: bytes = b""
    memory_size: int = 16 << 20
    vmsa: Vmsa = "none"
    vcpus: int = 1
    cpu_signature: int = DEFAULT_CPU_SIGNATURE
    force_hash_table: bool = False
    secure_calls: int | None = None


@dataclass(frozen=True)
class LaunchedGuest:
    """A guest after LAUNCH_MEASURE.

    Attributes: handle, asid; predicted: the digest computed from the files, before the launch; measurement: the 48 bytes of
        LAUNCH_MEASURE (HMAC, mnonce); secret_area: guest physical base and size that the firmware names, or None;
        secure_calls: guest address of a CSV3 guest's two secure call pages, or None. ram: system address of the guest's RAM.
    """

    handle: int
    asid: int
    predicted: LaunchDigest
    measurement: bytes
    secret_area: tuple[int, int] | None
    secure_calls: int | None = None
    ram: int = 0


class Host:
    """Drives a machine.

    Attributes: machine. unfinished: handle of a guest that abandon() could not stop, since the connection is gone; else None.

    with Host(machine) as host:
        host.initialise(es=True)
        guest = host.launch(GuestPlan(firmware="OVMF.fd"))
        host.finish(guest.handle)
        report = host.report(guest.handle, b"challenge")
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.unfinished: int | None = None
        self._block = machine.allocate(PAGE)

    def close(self) -> None:
        """Gives the parameter block's page back. Idempotent."""
        if self._block:
            self.machine.free(self._block)
            self._block = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The server takes the page back itself when the connection is gone.
        with suppress(CsvfastError, OSError):
            self.close()

    def run(self, command: Command, **fields: int | bytes) -> ParameterBlock:
        """One command. Returns its block as the firmware left it. Raises FirmwareError."""
        layout = LAYOUTS[command]
        if layout.size:
            self.machine.write(self._block, layout.encode(**fields))
        status = self.machine.command(command, self._block)
        if status is not FirmwareStatus.SUCCESS:
            raise FirmwareError(status, f"{command.name}: {_reason(self.machine.problem, status)}")
        return layout.decode(self.machine.read(self._block, layout.size) if layout.size else b"")

    # ---- Platform

    def initialise(self, *, es: bool = True) -> None:
        """INIT, unless the platform is initialised already. The TMR stays the firmware's for good."""
        if self.run(Command.PLATFORM_STATUS)["state"] != PlatformState.UNINIT:
            return
        address = self.machine.allocate(TMR_BYTES, TMR_BYTES) if es else 0
        try:
            self.run(Command.INIT, flags=int(es), tmr_address=address, tmr_length=TMR_BYTES if es else 0)
        except BaseException:
            if address:
                self.machine.free(address)
            raise

    # ---- Launch

    def launch(self, plan: GuestPlan, *, progress: Progress | None = None) -> LaunchedGuest:
        """LAUNCH_START to LAUNCH_MEASURE. On any failure the guest is gone again.

        Raises: FirmwareError; those of launch_digest(); VerificationError("launch digest") cannot happen here: only the report
            carries the digest. AddressError when an area the firmware names lies outside the RAM.
        """
        predicted = launch_digest(
            plan.firmware,
            kernel=plan.kernel,
            initrd=plan.initrd,
            append=plan.append,
            vmsa=plan.vmsa,
            vcpus=plan.vcpus,
            cpu_signature=plan.cpu_signature,
            force_hash_table=plan.force_hash_table,
            csv3=plan.policy.csv3,
            secure_calls=plan.secure_calls,
            progress=progress,
        )
        if plan.memory_size < PAGE or plan.memory_size % PAGE:
            raise ArgumentError(f"memory_size is {plan.memory_size}; expected a positive multiple of {PAGE}")
        csv3 = None
        if plan.policy.csv3:
            from csvfast.processor.vmm_csv3 import Csv3Launch

            csv3 = Csv3Launch(self, plan, predicted)
        handle = self._start(plan)
        secure_calls = secret_area = None
        try:
            asid = self._activate(handle)
            if csv3 is not None:
                ram, secure_calls = csv3.load(handle)
            else:
                ram = self.give(handle, plan.memory_size, 0)
                secret_area = self._load(plan, predicted, handle, ram)
                if plan.policy.es:
                    self._save_areas(plan, handle)
            measurement = self.with_buffer(
                MEASURE_BYTES,
                lambda place: self.run(Command.LAUNCH_MEASURE, handle=handle, address=place, length=MEASURE_BYTES),
            )
        except BaseException:
            self.abandon(handle)
            raise
        return LaunchedGuest(handle, asid, predicted, measurement, secret_area, secure_calls, ram)

    def inject(self, handle: int, secret: Secret, guest_physical: int) -> None:
        """LAUNCH_SECRET at a place in the guest's RAM. Raises FirmwareError, AddressError."""
        place = self._system_address(handle, guest_physical, len(secret.transport))
        size = max(len(secret.header) + len(secret.transport), 1)

        def send(buffer: int) -> None:
            self.machine.write(buffer, secret.header + secret.transport)
            self.run(
                Command.LAUNCH_SECRET,
                handle=handle,
                header_address=buffer,
                header_length=len(secret.header),
                guest_address=place,
                guest_length=len(secret.transport),
                transport_address=buffer + len(secret.header),
                transport_length=len(secret.transport),
            )

        self.with_buffer(size, send)

    def finish(self, handle: int) -> None:
        """LAUNCH_FINISH."""
        self.run(Command.LAUNCH_FINISH, handle=handle)

    def _start(self, plan: GuestPlan) -> int:
        def start(buffer: int) -> ParameterBlock:
            self.machine.write(buffer, plan.dh + plan.session)
            return self.run(
                Command.LAUNCH_START,
                policy=plan.policy.value,
                dh_address=buffer,
                dh_length=len(plan.dh),
                session_address=buffer + len(plan.dh),
                session_length=len(plan.session),
            )

        size = max(len(plan.dh) + len(plan.session), 1)
        place = self.machine.allocate(size)
        try:
            return start(place)["handle"]
        finally:
            self.machine.free(place)

    def _activate(self, handle: int) -> int:
        """Binds the first ASID that is free for this guest; released ones are flushed when there is no other."""
        for flushed in (False, True):
            dirty = False
            for asid in range(1, ASID_MAX + 1):
                try:
                    self.run(Command.ACTIVATE, handle=handle, asid=asid)
                except FirmwareError as refusal:
                    if refusal.status is FirmwareStatus.DFFLUSH_REQUIRED:
                        dirty = True
                    elif refusal.status is FirmwareStatus.INVALID_ASID and asid > self.machine.asid_max:
                        break
                    elif refusal.status not in (FirmwareStatus.ASID_OWNED, FirmwareStatus.INVALID_ASID):
                        raise
                else:
                    return asid
            if flushed or not dirty:
                break
            self.machine.wbinvd()
            self.run(Command.DF_FLUSH)
        raise UnknownAsidError("every ASID that this kind of guest may use belongs to another guest")

    def give(self, handle: int, size: int, guest_physical: int, alignment: int = PAGE) -> int:
        """Frames that are a guest's until it is gone. Returns: their system address."""
        place = self.machine.allocate(size, alignment)
        try:
            self.machine.assign(place, handle, guest_physical)
        except BaseException:
            self.machine.free(place)
            raise
        return place

    def _load(self, plan: GuestPlan, predicted: LaunchDigest, handle: int, ram: int) -> tuple[int, int] | None:
        with Source(plan.firmware) as source:
            size = source.size or 0
            table = GuidTable.read(source) if plan.kernel is not None and not plan.force_hash_table else None
            place = self.give(handle, size, FOUR_GIB - -(-size // PAGE) * PAGE)
            done = 0
            for chunk in source.chunks():
                if done + len(chunk) > size:
                    raise ArgumentError(f"{source.path} grew while it was read")
                self.machine.write(place + done, chunk)
                done += len(chunk)
            area = _secret_area(table or _table_or_none(source))
        self.run(Command.LAUNCH_UPDATE_DATA, handle=handle, address=place, length=size)
        if plan.kernel is not None:
            content = hash_table(*(item.sha256 for item in predicted.inputs))
            base = FORCED_TABLE_ADDRESS
            if table is not None:
                base = table.hash_table_area().base
            if base + len(content) > plan.memory_size:
                raise AddressError(
                    f"the hash table at {base:#x} lies outside the guest's RAM of {plan.memory_size} bytes"
                )
            self.machine.write(ram + base, content)
            self.run(Command.LAUNCH_UPDATE_DATA, handle=handle, address=ram + base, length=len(content))
        return area

    def _save_areas(self, plan: GuestPlan, handle: int) -> None:
        other = BSP_ADDRESS
        if plan.vcpus > 1:
            with Source(plan.firmware) as source:
                other = GuidTable.read(source).reset_address()
        for index in range(plan.vcpus):
            place = self.give(handle, PAGE, _SAVE_AREAS + index * PAGE)
            self.machine.write(place, vmsa_page(BSP_ADDRESS if index == 0 else other, plan.cpu_signature))
            self.run(Command.LAUNCH_UPDATE_VMSA, handle=handle, address=place, length=PAGE)

    # ---- A running guest

    def status(self, handle: int) -> tuple[GuestPolicy, int, GuestState]:
        """Policy, ASID (0 = not active) and state. Raises FirmwareError."""
        block = self.run(Command.GUEST_STATUS, handle=handle)
        return GuestPolicy(block["policy"]), block["asid"], GuestState(block["state"])

    def report(self, handle: int, data: BytesLike = b"", *, extended: bool = False) -> Report:
        """What a program in the guest does: writes a request page with a fresh mnonce, has it answered, checks MAC and mnonce.

        The page is the last one of the guest's RAM. Raises: FirmwareError; VerificationError: the answer is not for this request;
            FormatError.
        """
        mnonce = secrets.token_bytes(16)
        ram = self._ram(handle)
        place = (ram.address + ram.size - PAGE) | C_BIT
        self.machine.guest_write(handle, place, ReportRequest.build(data, mnonce, extended=extended))
        self.run(Command.ATTESTATION, handle=handle, address=place, mnonce=VM_ATTESTATION, length=PAGE)
        report = Report.parse(self.machine.guest_read(handle, place, PAGE))
        if report.mnonce != mnonce:
            raise VerificationError("report mnonce", "the report answers another request")
        if not report.mac_is_valid(mnonce):
            raise VerificationError("report MAC", "the MAC over PEK and serial number does not match")
        return report

    def stop(self, handle: int) -> None:
        """DEACTIVATE and DECOMMISSION; the guest's frames are free afterwards."""
        self.run(Command.DEACTIVATE, handle=handle)
        self.run(Command.DECOMMISSION, handle=handle)

    def abandon(self, handle: int) -> None:
        """stop() in the course of another failure, which it must not hide: what cannot be stopped is noted in `unfinished`."""
        try:
            self.stop(handle)
        except (CsvfastError, OSError):
            self.unfinished = handle

    # ---- Behind it

    def _ram(self, handle: int) -> GuestRange:
        for found in self.machine.guest_ranges(handle):
            if found.guest_physical == 0:
                return found
        raise ArgumentError(f"guest {handle} has no RAM that this machine knows of")

    def _system_address(self, handle: int, guest_physical: int, length: int) -> int:
        for found in self.machine.guest_ranges(handle):
            offset = guest_physical - found.guest_physical
            if 0 <= offset <= found.size - length:
                return found.address + offset
        raise AddressError(f"{length} bytes at {guest_physical:#x} lie outside guest {handle}'s memory")

    def with_buffer(self, size: int, use: Callable[[int], object]) -> bytes:
        """Runs `use` with a host buffer and returns what stands in it afterwards."""
        place = self.machine.allocate(size)
        try:
            use(place)
            return self.machine.read(place, size)
        finally:
            self.machine.free(place)


# Save areas are no guest memory; they get numbers above it so that they are freed with the guest.
_SAVE_AREAS: Final = 1 << 46


def _reason(problem: str | None, status: FirmwareStatus) -> str:
    return (problem or status.name).removeprefix(f"{status.name} ({status:#04x}): ")


def _table_or_none(source: Source) -> GuidTable | None:
    try:
        return GuidTable.read(source)
    except (CsvfastError, OSError, ValueError):
        return None  # a firmware without tables: nothing to inject secrets into


def _secret_area(table: GuidTable | None) -> tuple[int, int] | None:
    """Base and size of the firmware's secret area; None without one (some builds publish zeros)."""
    data = None if table is None else table.entries.get(SECRET_AREA)
    if data is None or len(data) != 8:
        return None
    base, size = int.from_bytes(data[:4], "little"), int.from_bytes(data[4:], "little")
    return (base, size) if base and size else None
