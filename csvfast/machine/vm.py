"""CsvVm: a virtual machine whose RAM is ciphertext in the platform's DRAM, under the key that the processor made for it.

    launch    boot files sealed; START, ACTIVATE, UPDATE_DATA, MEASURE, the owner's check, SECRET, FINISH: any mismatch, and the
              guest is decommissioned and QEMU never started
    run       QEMU, unmodified; the preload library maps the guest's frames of the DRAM and is the memory controller. It gets the
              key from the processor, by a pipe; neither argument nor environment nor log ever holds it
    end       however it ends: processes, sockets, files gone, the guest decommissioned, its key erased

Thread-safety: launch() once; everything else from any thread.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from csvfast._runtime import get_library
from csvfast.errors import AddressError, ArgumentError, StateError, VerificationError
from csvfast.machine.vm_channel import PORT_NAME, GuestChannel
from csvfast.machine.vm_control import MemoryControl
from csvfast.machine.vm_csv3 import check_policy
from csvfast.machine.vm_files import RunDirectory, check_kernel, check_room, seal_file
from csvfast.machine.vm_qemu import QemuProcess, choose_accelerator, find_qemu, ram_ranges
from csvfast.machine.vm_requests import GuestRequests
from csvfast.processor.commands import Command
from csvfast.processor.core import PAGE
from csvfast.processor.owner import check_measurement, seal_secret
from csvfast.processor.vmm import FORCED_TABLE_ADDRESS, GuestPlan, Host, LaunchedGuest
from csvfast.processor.vmm import Secret as PackedSecret

if TYPE_CHECKING:
    from types import TracebackType

    from csvfast._core import BytesLike
    from csvfast.processor.machine import LocalMachine
    from csvfast.processor.owner import OwnerKeys

__all__ = ["CsvVm"]

MEBIBYTE: Final = 1 << 20
MEMORY_MIN: Final = 32 * MEBIBYTE
WINDOW_MIN: Final = 64 << 10
START_SECONDS: Final = 60.0
COPY_BYTES: Final = 8 * MEBIBYTE
_EXIT_LINE: Final = re.compile(rb"^guest: exit (\d{1,3})\s*$", re.MULTILINE)
_PORT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,63}")
_WINDOW: Final = re.compile(r"(\d{1,9})/(\d{1,9})|(\d{1,15})([KMGT]?)")


class CsvVm:
    """One virtual machine.

    Args:
        platform: the machine, in this process, whose processor launches the guest. Its memory begins at address 0.
        dram: the file that memory stands on; /proc/self/fd/N for a descriptor, as of open_shared_memory().
        plan: the guest. With a firmware without an area for the hash table (SeaBIOS, Debian 12's OVMF) it needs force_hash_table.
        expected: launch digest that the owner demands; None: the one that the files predict.
        owner: keys of the session in the plan (or which the plan gets): the measurement is checked with them.
        secret: injected once the measurement is checked; needs `owner`. secret_address: guest physical; None: firmware's area.
        window: plaintext at most: a share ("1/4") or bytes ("64M"). accel: "tcg", "kvm", "auto".
        qemu: the program. arguments: more of its arguments, from whoever may run programs here. library: the preload library.
        ports: more virtio serial ports by name, each with its host's end, a stream socket that the caller closes after launch().
        time_limit: seconds, after which the machine is killed. output: gets the console's bytes as they come.
        name: of its run directory; None: a new one. root: of run directories.

    Attributes: launched: what LAUNCH_MEASURE gave, None before. stop_requested: by stop() or request_stop(). name; directory: its
        run directory.

    with CsvVm(platform=machine, dram=path, plan=GuestPlan(firmware="OVMF.amdsev.fd", kernel="vmlinuz", initrd="initrd")) as vm:
        vm.launch()
        vm.wait()
    """

    def __init__(
        self,
        *,
        platform: LocalMachine,
        dram: str | os.PathLike[str],
        plan: GuestPlan,
        expected: bytes | None = None,
        owner: OwnerKeys | None = None,
        secret: BytesLike | None = None,
        secret_address: int | None = None,
        window: str = "1/4",
        accel: str = "tcg",
        qemu: str | os.PathLike[str] | None = None,
        arguments: Sequence[str] = (),
        ports: Mapping[str, socket.socket] | None = None,
        library: str | os.PathLike[str] | None = None,
        time_limit: float | None = None,
        output: Callable[[bytes], object] | None = None,
        name: str | None = None,
        root: Path | None = None,
    ) -> None:
        check_policy(plan)
        if secret is not None and plan.policy.csv3:
            raise ArgumentError("a secret is given for a CSV3 guest; expected a CSV or CSV2 guest")
        if plan.memory_size < MEMORY_MIN or plan.memory_size % MEBIBYTE:
            raise ArgumentError(f"memory_size is {plan.memory_size}; expected whole MiB, at least 32")
        if expected is not None and len(expected) != 32:
            raise ArgumentError(f"expected has {len(expected)} bytes; expected a launch digest of 32")
        if secret is not None and owner is None:
            raise ArgumentError("a secret is given without the owner's keys, which alone can pack it")
        if time_limit is not None and not time_limit > 0:
            raise ArgumentError(f"time_limit is {time_limit}; expected more than 0 seconds")
        if platform.memory.base_address:
            raise ArgumentError(f"the memory begins at {platform.memory.base_address:#x}; expected address 0, as its file does")
        if owner is not None:
            if (plan.dh or plan.session) and (plan.dh, plan.session) != (owner.dh, owner.session):
                raise ArgumentError("the plan's session is not the owner's")
            plan = replace(plan, dh=owner.dh, session=owner.session)
            if plan.policy != owner.policy:
                raise ArgumentError(f"the plan's policy {plan.policy!r} is not the session's, {owner.policy!r}")
        _check_window(window, plan.memory_size)
        self.launched: LaunchedGuest | None = None
        self.stop_requested = False
        self._platform = platform
        self._dram_path = os.fspath(dram)
        self._plan = plan
        self._expected = expected
        self._owner = owner
        self._secret, self._secret_address = secret, secret_address
        self._window = window
        self._program = find_qemu(qemu)
        self._accelerator = choose_accelerator(accel, self._program)
        library = library or os.environ.get("CSVFAST_VMRAM_LIBRARY") or get_library("vmram-preload")
        self._library = str(Path(library).resolve(strict=True))
        self._arguments = tuple(arguments)
        self._ports = dict(ports or {})
        for port in self._ports:
            if not _PORT.fullmatch(port) or port == PORT_NAME:
                raise ArgumentError(f"port {port[:40]!r}: expected letters, digits, '.', '-', not the processor's name")
        self._time_limit = time_limit
        self._output = output
        self._host_lock = threading.Lock()
        self._close_lock = threading.Lock()
        self._exit = ExitStack()
        self._host: Host | None = None
        self._process: QemuProcess | None = None
        self._channel: GuestChannel | None = None
        self._control: MemoryControl | None = None
        self._dram = -1
        self._began = time.monotonic()
        self._final_statistics: dict[str, Any] = {}
        self._directory = RunDirectory(name, root)
        self._exit.callback(self._directory.close)
        self.name, self.directory = self._directory.name, self._directory.path

    # ---- Launch

    def launch(self) -> None:
        """Launches the guest, and once everything is checked starts QEMU.

        Raises: VerificationError, FirmwareError: the guest is not what it should be; it is gone, QEMU never ran. StateError: QEMU
            or its memory could not start, with their own words. ArgumentError: no Linux kernel. Those of Host.launch(), OSError.
        """
        if self._host is not None:
            raise StateError("this machine has been launched already")
        try:
            self._host = self._exit.enter_context(Host(self._platform))
            self._host.initialise(es=True)
            self._dram = os.open(self._dram_path, os.O_RDWR | os.O_CLOEXEC)
            self._exit.callback(os.close, self._dram)
            sealed = self._seal()
            written = self._launch_guest(self._host, sealed)
            self._start(sealed, written)
        except BaseException:
            self.close()
            raise

    def _seal(self) -> dict[str, int]:
        sealed: dict[str, int] = {}
        plan = self._plan
        for part, path in (("firmware", plan.firmware), ("kernel", plan.kernel), ("initrd", plan.initrd)):
            if path is not None:
                sealed[part] = seal_file(path, part)
                self._exit.callback(os.close, sealed[part])
        if "kernel" in sealed and self._plan.kernel is not None:
            check_kernel(sealed["kernel"], self._plan.kernel)
        return sealed

    def _launch_guest(self, host: Host, sealed: dict[str, int]) -> list[tuple[int, int]]:
        """START to FINISH. Returns: what was put into RAM: offset and length, whole pages."""
        plan = self._plan
        files = {part: f"/proc/self/fd/{descriptor}" for part, descriptor in sealed.items()}
        self.launched = launched = host.launch(
            replace(plan, firmware=files["firmware"], kernel=files.get("kernel"), initrd=files.get("initrd"))
        )
        self._exit.callback(self._decommission)
        predicted = launched.predicted
        if self._expected is not None and predicted.digest != self._expected:
            raise VerificationError(
                "launch digest", f"these files give {predicted.hexdigest}; expected {self._expected.hex()}"
            )
        if self._owner is not None:
            status = host.run(Command.PLATFORM_STATUS)
            api = (status["api_major"], status["api_minor"])
            check_measurement(
                self._owner.tik, launched.measurement, plan.policy, predicted.digest, api, status["config"] >> 1
            )
        measured = self._platform.processor.guest(launched.handle).measure
        if measured != predicted.digest:
            raise VerificationError(
                "launch digest", f"the firmware measured {(measured or b'').hex()}; expected {predicted.hexdigest}"
            )
        if plan.policy.csv3 and launched.secure_calls is None:
            raise ArgumentError("the firmware names no secure call pages; expected the plan's secure_calls")
        written = []
        for piece in predicted.pieces:
            if piece.name in ("hash table", "secure call pages"):
                written.append(_pages(FORCED_TABLE_ADDRESS if piece.address is None else piece.address, piece.size))
        if launched.secure_calls is not None:
            written.append((launched.secure_calls, PAGE))
        if self._secret is not None and self._owner is not None:
            place = self._secret_address
            if place is None:
                if launched.secret_area is None:
                    raise ArgumentError("the firmware has no secret area; expected secret_address")
                place = launched.secret_area[0]
            header, transport = seal_secret(self._owner, self._secret, launched.measurement)
            host.inject(launched.handle, PackedSecret(header, transport), place)
            written.append(_pages(place, len(transport)))
        host.finish(launched.handle)
        check_room(self._dram, launched.ram, plan.memory_size)
        for offset, length in written or [(0, PAGE)]:
            place = launched.ram + offset
            if os.pread(self._dram, length, place) != self._platform.read(place, length):
                raise StateError(f"{self._dram_path}: not the file that this platform's memory stands on")
        return written

    # ---- QEMU

    def _start(self, sealed: dict[str, int], written: list[tuple[int, int]]) -> None:
        launched, host = self.launched, self._host
        if launched is None or host is None:
            raise StateError("there is no guest")
        control = self._directory.path / "memory.sock"
        ours, theirs = socket.socketpair()
        ports = self._ports.values()
        self._control = MemoryControl(control)
        requests = GuestRequests(host, self._host_lock, self._control, self._plan, launched)
        self._channel = GuestChannel(ours, requests.attest, requests.info, requests.secure_call, requests.flush)
        key_out, key_in = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                ram = [(gpa, launched.ram + offset, size) for gpa, offset, size in ram_ranges(self._plan.memory_size)]
                self._platform.processor.key_memory_controller(launched.handle, key_in, ram)
            finally:
                os.close(key_in)
            environment = {
                "CSVFAST_VMRAM_PATH": os.fspath(Path(f"/proc/self/fd/{self._dram}").readlink()),
                "CSVFAST_VMRAM_OFFSET": str(launched.ram),
                "CSVFAST_VMRAM_WINDOW": self._window,
                "CSVFAST_VMRAM_KEY_FD": str(key_out),
                "CSVFAST_VMRAM_CONTROL": str(control),
            }
            self._channel.start()
            if written:
                environment["CSVFAST_VMRAM_WRITTEN"] = ",".join(f"{offset}+{length}" for offset, length in sorted(set(written)))
            self._process = QemuProcess(
                self._command(sealed, theirs.fileno()),
                environment=environment,
                preload=self._library,
                descriptors=[self._dram, key_out, theirs.fileno(), *sealed.values(), *(end.fileno() for end in ports)],
                output=self._output,
                seconds=self._time_limit,
                ended=self.close,
            )
        finally:
            os.close(key_out)
            theirs.close()
        self._wait_for_memory()
        with suppress(FileNotFoundError):  # it may have ended by now
            self._directory.write_state(self.status())

    def _wait_for_memory(self) -> None:
        """Until the memory is encrypted: a library that knows no control socket would have ignored its other settings as well."""
        process, control = self._process, self._control
        if process is None or control is None:
            raise StateError("there is no QEMU")
        end = time.monotonic() + START_SECONDS
        while not (control.path.exists() and control.ready()):
            if process.exit_code is not None:
                process.wait(30)
                if process.timed_out:
                    raise StateError(f"the time limit of {self._time_limit} s ended before QEMU had its memory")
                raise StateError(f"QEMU ended with {process.exit_code}: {process.reason()}")
            if time.monotonic() > end:
                process.kill()
                raise StateError(f"{self._library} opened no control socket within {START_SECONDS:.0f} s")
            time.sleep(0.01)

    def _command(self, sealed: dict[str, int], channel: int) -> list[str]:
        plan = self._plan
        files = {part: f"/proc/self/fd/{descriptor}" for part, descriptor in sealed.items()}
        command = [
            self._program, "-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none", "-no-reboot",
            "-name", "csvfast", "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
            "-accel", self._accelerator, "-cpu", "host" if self._accelerator == "kvm" else "max", "-smp", str(plan.vcpus),
            "-m", f"{plan.memory_size // MEBIBYTE}M", "-machine", "q35,memory-backend=ram",
            "-object", f"memory-backend-file,id=ram,size={plan.memory_size},mem-path=/proc/self/fd/{self._dram},share=on",
            "-device", "virtio-serial-pci", "-chardev", f"socket,id=processor,fd={channel}",
            "-device", f"virtserialport,chardev=processor,name={PORT_NAME}",
            "-device", "virtio-rng-pci", "-bios", files["firmware"],
        ]  # fmt: skip
        for number, (port, end) in enumerate(self._ports.items()):
            command += ["-chardev", f"socket,id=port{number},fd={end.fileno()}"]
            command += ["-device", f"virtserialport,chardev=port{number},name={port}"]
        for part in ("kernel", "initrd"):
            if part in files:
                command += [f"-{part}", files[part]]
        if plan.append is not None:
            command += ["-append", plan.append]
        return command + list(self._arguments)

    # ---- While it runs, and after

    @property
    def running(self) -> bool:
        """Whether QEMU runs."""
        return self._process is not None and self._process.running

    @property
    def exit_code(self) -> int | None:
        """What the guest's init reported; without that QEMU's own; None while it runs. QEMU's 0 says only that the guest switched
        off or was stopped, whatever happened in there: `reported` tells them apart.

        Negative: the signal that killed QEMU (time limit: -9)."""
        if self._process is None or self._process.running:
            return None
        reported = self.reported if self._process.exit_code == 0 else None
        return self._process.exit_code if reported is None else reported

    @property
    def reported(self) -> int | None:
        """The code of the last line `guest: exit N` on the console, which the guest's init writes; None without one."""
        found = [] if self._process is None else _EXIT_LINE.findall(self._process.console())
        return int(found[-1]) if found else None

    @property
    def timed_out(self) -> bool:
        """Whether the time limit ended it."""
        return self._process is not None and self._process.timed_out

    def console(self) -> str:
        """The console's text so far (the last 4 MiB)."""
        return "" if self._process is None else self._process.console().decode(errors="replace")

    def errors(self) -> str:
        """What QEMU and the preload library wrote to standard error."""
        return "" if self._process is None else self._process.errors()

    def status(self) -> dict[str, Any]:
        """For JSON; no secrets."""
        launched, process = self.launched, self._process
        record: dict[str, Any] = {
            "name": self.name,
            "state": "new" if process is None else "running" if process.running else "ended",
            "owner": os.getpid(),
            "qemu": None if process is None else process.pid,
            "accel": self._accelerator,
            "memory_size": self._plan.memory_size,
            "policy": f"{self._plan.policy.value:#010x}",
            "seconds": round(time.monotonic() - self._began, 3),
        }
        if launched is not None:
            record |= {"handle": launched.handle, "asid": launched.asid, "digest": launched.predicted.hexdigest}
        if process is not None and not process.running:
            record["exit_code"] = self.exit_code
        if self._channel is not None:
            record["requests"], record["refused"] = self._channel.requests, self._channel.refused
        if process is not None and process.running and self._control is not None:
            with suppress(StateError):
                self._final_statistics = self._control.stats()
        record["memory"] = self._final_statistics
        return record

    def dump(self, path: str | os.PathLike[str]) -> None:
        """Writes the RAM of the running guest as the DRAM holds it: ciphertext, from the page at system address `address` on.

        Raises: StateError: it does not run; FileExistsError, OSError.
        """
        control = self._control
        if control is None or not self.running:
            raise StateError("the machine does not run; expected a running one, whose memory is its own")
        control.flush()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            done = 0
            while done < self._plan.memory_size:
                chunk = os.pread(self._dram, min(COPY_BYTES, self._plan.memory_size - done), self.address + done)
                if not chunk:
                    raise StateError(f"{self._dram_path} ends within the guest's RAM")
                if chunk.count(0) != len(chunk):
                    os.pwrite(descriptor, chunk, done)
                done += len(chunk)
            os.ftruncate(descriptor, done)
            os.fsync(descriptor)
        except BaseException:
            with suppress(OSError):
                os.unlink(path)
            raise
        finally:
            os.close(descriptor)

    @property
    def address(self) -> int:
        """System physical address of the RAM; its page frame numbers are the data units of the cipher."""
        return 0 if self.launched is None else self.launched.ram

    def wait(self, seconds: float | None = None) -> int | None:
        """Waits for the end. Returns: exit_code; None: it still runs after `seconds`."""
        if self._process is None:
            raise StateError("the machine has not been launched")
        self._process.wait(seconds)
        return self.exit_code

    def request_stop(self) -> None:
        """Asks QEMU to end in order, and does not wait: for callers in threads that the end waits for."""
        self.stop_requested = True
        if self._process is not None:
            self._process.request_stop()

    def stop(self, seconds: float = 10.0) -> None:
        """Ends QEMU, by force after `seconds`, and puts everything away. Idempotent."""
        self.stop_requested = True
        if self._process is not None:
            self._process.stop(seconds)
        self.close()

    def close(self) -> None:
        """Kills QEMU if it still runs, decommissions the guest, removes sockets and files. Idempotent."""
        process = self._process
        if process is not None and process.exit_code is None:
            process.kill()  # its thread comes here again, and does the rest
        with self._close_lock:
            if self._channel is not None:
                self._channel.stop()
            if self._control is not None:
                self._control.close()
            with self._host_lock:
                self._exit.close()

    def _decommission(self) -> None:
        if self._host is not None and self.launched is not None:
            self._host.abandon(self.launched.handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<CsvVm {self.name}, {'running' if self.running else 'not running'}>"


def _pages(address: int, length: int) -> tuple[int, int]:
    """The whole pages around a range. Raises AddressError for none."""
    if length < 1:
        raise AddressError("nothing stands there")
    first = address // PAGE * PAGE
    return first, -(-(address + length) // PAGE) * PAGE - first


def _check_window(window: str, size: int) -> None:
    """Raises ArgumentError for what the preload library would refuse, before anything is launched."""
    found = _WINDOW.fullmatch(window)
    count = -1
    if found is not None and found[2] is not None:
        part, whole = int(found[1]), int(found[2])
        count = size * part // whole if part <= whole and whole else -1
    elif found is not None:
        count = int(found[3]) << (10 * " KMGT".index(found[4] or " "))
    if count < 0:
        raise ArgumentError(f"window is {window[:40]!r}; expected a share like '1/4' or bytes like '64M'")
    if count < WINDOW_MIN:
        raise ArgumentError(f"window is {window[:40]!r}, {count} bytes; expected at least {WINDOW_MIN}")
