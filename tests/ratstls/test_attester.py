"""Attesters: the simulated platform's socket for real, the guest's device with its ioctl played by the simulated firmware."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attest.simulated_evidence import SEALING_KEY, Platform
from ratstls.attested import PlatformAttester
from reference import ovmf_images as ovmf
from reference.served import Served

from csvfast.attest import verify
from csvfast.certs import CertificateStore
from csvfast.errors import FirmwareError, LengthError, VerificationError
from csvfast.processor.ioctl import CSV_GUEST_GET_REPORT, ReportArgument
from csvfast.processor.vmm import GuestPlan, Host
from csvfast.ratstls import attester as module
from csvfast.ratstls.attester import Attester, DeviceAttester, SocketAttester
from csvfast.ratstls.certificate import attest_certificate, check_binding, read_certificate
from csvfast.ratstls.keys import TlsKey
from csvfast.report import ReportRequest

DATA = bytes(range(64))


@pytest.fixture(scope="module")
def platform() -> Platform:
    return Platform()


class Firmware:
    """What is behind /dev/csv-guest: it reads the request at the address it is given, and answers there.

    `fields` are changed fields of the report; `alter` changes the finished page; `error` is what ioctl() fails with.
    """

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.fields: dict[str, Any] = {}
        self.alter: Callable[[bytearray], None] = lambda page: None
        self.error = 0
        self.mnonces: list[bytes] = []
        self.addresses: list[int] = []

    def ioctl(self, descriptor: int, number: int, argument: bytes) -> bytes:
        assert os.fstat(descriptor)
        assert number == CSV_GUEST_GET_REPORT == 0xC0104401
        address, length = ReportArgument.unpack(argument)
        assert length == 4096
        assert address % 4096 == 0
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        request = ReportRequest.parse(ctypes.string_at(address, length))
        assert request.hash_is_valid
        assert not request.extended
        self.mnonces.append(request.mnonce)
        self.addresses.append(address)
        fields = {"report_data": request.data, "mnonce": request.mnonce} | self.fields
        page = bytearray(self.platform.page_v1(**fields))
        self.alter(page)
        ctypes.memmove(address, bytes(page), length)
        return argument


@pytest.fixture
def firmware(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> Firmware:
    made = Firmware(platform)
    monkeypatch.setattr(fcntl, "ioctl", made.ioctl)
    return made


@pytest.fixture
def device(tmp_path: Path, firmware: Firmware) -> DeviceAttester:
    (tmp_path / "csv-guest").touch()
    return DeviceAttester(tmp_path / "csv-guest", firmware.platform.store(tmp_path))


def test_device(device: DeviceAttester, firmware: Firmware, platform: Platform) -> None:
    evidence = device.evidence(DATA)
    assert evidence.report.report_data == DATA
    assert evidence.report.mnonce == firmware.mnonces[0]
    assert evidence.hsk_cek == platform.hsk_cek
    assert (evidence.report.version, evidence.report.pek_is_masked, evidence.report.padding) == (1, True, bytes(1548))
    verified = verify(evidence, roots=platform.roots, report_data=DATA, mnonce=firmware.mnonces[0])
    assert verified.complete
    for written in (evidence.to_rats_tls(), evidence.to_librats(), evidence.to_json(), evidence.to_raw()):
        assert SEALING_KEY not in written
    assert not evidence.report.sealing_key_is_present


def test_mnonces_are_fresh_and_random(device: DeviceAttester, firmware: Firmware) -> None:
    for _ in range(8):
        device.evidence(DATA)
    assert len(set(firmware.mnonces)) == 8
    assert len({byte for mnonce in firmware.mnonces for byte in mnonce}) > 40


def test_certificate_from_the_device(device: DeviceAttester, platform: Platform) -> None:
    found = read_certificate(attest_certificate(TlsKey.generate(), device))
    check_binding(found)
    assert found.evidence is not None
    assert verify(found.evidence, roots=platform.roots).complete


def test_the_page_is_wiped(device: DeviceAttester, firmware: Firmware, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the answer nor the sealing key stands in the page when it is given back, also when the answer is refused."""
    pages: list[bytes] = []

    class Watched(module.mmap.mmap):
        def close(self) -> None:
            pages.append(self[:])
            super().close()

        def __exit__(self, *_: object) -> None:
            self.close()

    monkeypatch.setattr(module.mmap, "mmap", Watched)
    device.evidence(DATA)
    firmware.alter = lambda page: page.__setitem__(2547, page[2547] ^ 1)
    with pytest.raises(VerificationError):
        device.evidence(DATA)
    assert pages == [bytes(4096)] * 2


def flip(at: int) -> Callable[[bytearray], None]:
    return lambda page: page.__setitem__(at, page[at] ^ 1)


@pytest.mark.parametrize(
    ("alter", "step"),
    [
        (flip(0x150), "report MAC"),  # PEK certificate
        (flip(0x150 + 2083), "report MAC"),
        (flip(0x974), "report MAC"),  # chip id
        (flip(0x9B4), "report MAC"),  # sealing key
        (flip(0x9D4), "report MAC"),
        (flip(0x9F3), "report MAC"),
        (flip(0x80), "report mnonce"),
        (flip(0x8F), "report mnonce"),
        (flip(0x40), "report data"),
        (flip(0x7F), "report data"),
        (lambda page: page.__setitem__(slice(None), bytes(4096)), "report MAC"),
    ],
)
def test_altered_answers(device: DeviceAttester, firmware: Firmware, alter: Any, step: str) -> None:
    firmware.alter = alter
    with pytest.raises(VerificationError) as caught:
        device.evidence(DATA)
    assert caught.value.step == step


@pytest.mark.parametrize(
    ("fields", "step"), [({"mnonce": bytes(16)}, "report MAC"), ({"report_data": bytes(64)}, "report data")]
)
def test_answers_to_other_requests(device: DeviceAttester, firmware: Firmware, fields: Any, step: str) -> None:
    firmware.fields = fields
    with pytest.raises(VerificationError) as caught:
        device.evidence(DATA)
    assert caught.value.step == step


def test_an_answer_with_another_mnonce_under_the_right_mac(device: DeviceAttester, firmware: Firmware) -> None:
    """The request left as it was is no answer; nor is a report whose MAC alone was made anew."""
    firmware.alter = lambda page: page.__setitem__(slice(None), ReportRequest.build(DATA, firmware.mnonces[-1]))
    with pytest.raises(VerificationError, match="MAC"):
        device.evidence(DATA)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOTTY, errno.EFAULT])
def test_the_kernel_refuses(device: DeviceAttester, firmware: Firmware, number: int) -> None:
    firmware.error = number
    with pytest.raises(OSError, match="csv-guest") as caught:
        device.evidence(DATA)
    assert (caught.value.errno, caught.value.filename) == (number, device.path)


def test_a_real_ioctl_on_what_is_no_device(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file") as caught:
        DeviceAttester(tmp_path / "file").evidence(DATA)
    assert caught.value.errno == errno.ENOTTY
    with pytest.raises(FileNotFoundError, match="no-device"):
        DeviceAttester(tmp_path / "no-device").evidence(DATA)


def test_descriptors_are_closed(device: DeviceAttester, firmware: Firmware) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    device.evidence(DATA)
    firmware.error = errno.EIO
    with pytest.raises(OSError, match="csv-guest"):
        device.evidence(DATA)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("size", [0, 32, 63, 65])
def test_report_data_is_64_bytes(device: DeviceAttester, tmp_path: Path, size: int) -> None:
    for attester in (device, SocketAttester(tmp_path / "none", 1)):
        with pytest.raises(LengthError, match="64"):
            attester.evidence(bytes(size))


def test_without_certificates(device: DeviceAttester, firmware: Firmware, tmp_path: Path) -> None:
    assert DeviceAttester(device.path).evidence(DATA).hsk_cek is None
    empty = CertificateStore([], tmp_path / "empty")
    assert DeviceAttester(device.path, empty).evidence(DATA).hsk_cek is None


def test_many_threads(device: DeviceAttester, firmware: Firmware) -> None:
    failures: list[BaseException] = []

    def work(index: int) -> None:
        data = bytes([index]) * 64
        try:
            for _ in range(5):
                assert device.evidence(data).report.report_data == data
        except BaseException as problem:  # reported below
            failures.append(problem)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures


# ---- A guest of the simulated platform


@pytest.fixture(params=[False, True], ids=["one socket", "vCPUs apart"])
def served(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    made = Served(tmp_path, vcpu=request.param)
    yield made
    made.close()


def launch(served: Served, directory: Path) -> int:
    (directory / "firmware").write_bytes(ovmf.good(size=65536))
    with Host(served.machine) as host:
        host.initialise()
        handle = host.launch(GuestPlan(firmware=directory / "firmware", memory_size=1 << 20)).handle
        host.finish(handle)
    return handle


def test_socket(served: Served, tmp_path: Path) -> None:
    handle = launch(served, tmp_path)
    chip = served.processor.chip
    store = CertificateStore([], tmp_path / "cache")
    store.add(chip.chip_id, chip.hsk, chip.cek)
    attester = SocketAttester(served.path, handle, vcpu_path=served.vcpu_path, certificates=store)
    evidence = attester.evidence(DATA)
    assert evidence.report.report_data == DATA
    assert not evidence.report.sealing_key_is_present
    assert verify(evidence, roots=[chip.root], report_data=DATA).complete
    with pytest.raises(VerificationError):
        verify(evidence)  # a simulated chip is not Hygon's
    found = read_certificate(attest_certificate(TlsKey.generate("sm2"), attester, layout="librats"))
    check_binding(found)
    assert found.evidence is not None
    assert verify(found.evidence, roots=[chip.root]).complete
    assert found.evidence.report.mnonce != evidence.report.mnonce


def test_socket_refusals(served: Served, tmp_path: Path) -> None:
    handle = launch(served, tmp_path)
    with pytest.raises((FirmwareError, ValueError)):
        SocketAttester(served.path, handle + 1, vcpu_path=served.vcpu_path).evidence(DATA)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        SocketAttester(tmp_path / "nowhere", handle).evidence(DATA)
    assert SocketAttester(served.path, handle, vcpu_path=served.vcpu_path).evidence(DATA).hsk_cek is None


def test_attesters_are_attesters(platform: Platform, tmp_path: Path) -> None:
    made: list[Attester] = [DeviceAttester(tmp_path), SocketAttester(tmp_path, 7), PlatformAttester(platform)]
    assert str(tmp_path) in repr(made[0])
    assert repr(made[1]) == f"<SocketAttester {tmp_path}, guest 7>"
