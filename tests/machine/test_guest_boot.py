"""A built initrd boots: Python and csvfast work in it, and the processor is asked over the channel and through the device."""

from __future__ import annotations

import base64
import shutil
import socket
import subprocess
import time

import pytest
from machine.guest_processor import ChannelHost, GuestProcessor, file_access

from csvfast import sm3
from csvfast.attest import verify
from csvfast.machine.initrd import boot_files, build_initrd
from csvfast.report import Evidence, Report

QEMU = shutil.which("qemu-system-x86_64")
SIZE = 384 << 20

pytestmark = [
    pytest.mark.skipif(QEMU is None, reason="qemu-system-x86_64 is not installed"),
    pytest.mark.skipif(not (boot_files() / "vmlinuz").is_file(), reason="no guest files: run tools/install-test-tools.sh"),
]

RUN = r"""
set -e
python3 -c 'import csvfast; print("word: sm3", csvfast.sm3(b"abc").hexdigest())'
guest='python3 -m csvfast.machine.guest'
echo "word: report $($guest report --data 00112233)"
$guest sealing-key --out /root/key
echo "word: mode $(stat -c %a /root/key)"
$guest rtmr 2>&1 | sed 's/^/word: rtmr /'
$guest serve >/tmp/served 2>&1 &
server=$!
while ! grep -q serving /tmp/served; do sleep 0.1; done
echo "word: serves $(cat /tmp/served) $(stat -c '%F %a' /dev/csv-guest)"
cat >/tmp/device.py <<'END'
from csvfast.errors import FirmwareError
from csvfast.machine.guest import GuestDevice
import base64, fcntl, os, sys
from csvfast import sm3
print("word: key", sm3(open("/root/key", "rb").read()).hexdigest())
print("word: numpy", "numpy" in sys.modules)
with GuestDevice.open() as device:
    print("word: device", device, base64.b64encode(device.report(b"through the device").emitted).decode())
    print("word: devicekey", sm3(device.sealing_key()).hexdigest())
    try:
        device.rtmr_status()
    except FirmwareError as refusal:
        print("word: devicertmr", refusal.status.name)
descriptor = os.open("/dev/csv-guest", os.O_RDWR)
for number, argument in ((0xC0104409, bytes(16)), (0xC0104401, bytes(8) + (5000).to_bytes(8, "little")),
                         (0xC0104401, (1 << 12).to_bytes(8, "little") + (4096).to_bytes(8, "little"))):
    try:
        fcntl.ioctl(descriptor, number, bytearray(argument))
    except OSError as problem:
        print("word: errno", problem.errno)
END
python3 /tmp/device.py
kill $server; wait $server; echo "word: ended $? $(ls /dev/csv-guest 2>&1)"
$guest serve --socket /run/csv-guest.sock &
while [ ! -S /run/csv-guest.sock ]; do sleep 0.1; done
echo "word: socket $($guest report --data 44)"
exit 42
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the guest said; "exit" holds its exit code. One boot for all tests."""
    folder = tmp_path_factory.mktemp("boot")
    initrd = build_initrd(folder / "initrd", run=RUN)
    ram, place = folder / "ram", folder / "socket"
    command = [
        str(QEMU), "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-monitor", "none",
        "-accel", "tcg", "-cpu", "max", "-m", f"{SIZE >> 20}M", "-no-reboot",
        "-object", f"memory-backend-file,id=ram,size={SIZE},mem-path={ram},share=on", "-machine", "q35,memory-backend=ram",
        "-device", "virtio-serial-pci", "-chardev", f"socket,id=channel,path={place},server=on,wait=off",
        "-device", "virtserialport,chardev=channel,name=org.csvfast.guest.0",
        "-kernel", str(boot_files() / "vmlinuz"), "-initrd", str(initrd.path),
        "-append", "console=ttyS0 quiet panic=-1",
    ]  # fmt: skip
    with GuestProcessor(folder / "firmware") as processor:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            end = time.monotonic() + 20
            while True:
                try:
                    connection.connect(str(place))
                    break
                except OSError:
                    assert time.monotonic() < end
                    time.sleep(0.02)
            host = ChannelHost(connection, processor.answer, *file_access(ram))
            output = process.communicate(timeout=240)[0].decode(errors="replace")
            host.close()
        finally:
            process.kill()
            process.communicate()
            ram.unlink(missing_ok=True)
        found: dict[str, str] = {"console": output, "digest": processor.digest.hex()}
        for line in output.splitlines():
            if line.startswith("word: "):
                name, _, rest = line.removeprefix("word: ").partition(" ")
                found[name] = f"{found[name]} {rest}" if name in found else rest
            elif line.startswith("guest: exit "):
                found["exit"] = line.removeprefix("guest: exit ").strip()
        found["expected key"] = sm3(Report.parse(processor.answer(_request())).sealing_key).hexdigest()
        for name in ("report", "device", "socket"):
            if name in found:
                report = Report.parse(base64.b64decode(found[name].split()[-1]))
                encoding = "rats-tls" if report.pek_is_masked else "page"
                verify(Evidence(report, hsk_cek=processor.chip.hsk_cek, encoding=encoding), roots=(processor.chip.root,))
                found[f"{name} data"] = report.report_data.rstrip(b"\0").hex()
                found[f"{name} measure"] = report.measure.hex()
                found[f"{name} key"] = report.sealing_key.hex()
        return found


def _request() -> bytes:
    from csvfast.report import ReportRequest

    return ReportRequest.build(b"")


def test_command_ran_and_its_exit_code_is_told(words: dict[str, str]) -> None:
    assert words.get("exit") == "42", words["console"]


def test_python_and_the_compiled_part(words: dict[str, str]) -> None:
    assert words["sm3"] == sm3(b"abc").hexdigest()
    assert words["numpy"] == "False"


@pytest.mark.parametrize(
    ("way", "data"), [("report", b"\x00\x11\x22\x33"), ("device", b"through the device"), ("socket", b"\x44")]
)
def test_reports_verify_outside(words: dict[str, str], way: str, data: bytes) -> None:
    assert words[f"{way} data"] == data.hex(), "verified where they were read"
    assert words[f"{way} measure"] == words["digest"]
    assert words[f"{way} key"] == bytes(32).hex(), "the sealing key stays in the guest"


def test_sealing_key_is_the_guests(words: dict[str, str]) -> None:
    assert words["mode"] == "600"
    assert words["key"] == words["devicekey"] == words["expected key"]


def test_device_in_user_space(words: dict[str, str]) -> None:
    assert words["serves"] == "serving /dev/csv-guest character special file 600"
    assert words["device"].startswith("<GuestDevice over DeviceTransport>")
    assert words["errno"] == "25 22 14", "no such ioctl; a length of 5000; an address that is not the caller's"
    assert words["ended"].startswith("0 ls: /dev/csv-guest: No such file"), "the device goes with its program"


def test_registers_are_refused(words: dict[str, str]) -> None:
    assert "UNSUPPORTED" in words["rtmr"]
    assert words["devicertmr"] == "UNSUPPORTED"
