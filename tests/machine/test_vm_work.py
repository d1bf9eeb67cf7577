"""A real Linux guest at work on encrypted RAM: a report from inside, real programs with the right results, scans from outside.

CSVFAST_VM_WORK=100 works on 100 MB instead of 3 (minutes a window).
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import mmap
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from machine import qemu_guest, vm_platform
from machine.vm_platform import Platform

from csvfast import sm3
from csvfast.attest import verify
from csvfast.errors import VerificationError
from csvfast.machine.initrd import build_initrd
from csvfast.measure import launch_digest
from csvfast.report import Evidence, Report

pytestmark = pytest.mark.skipif(
    shutil.which(qemu_guest.QEMU) is None or not (qemu_guest.boot_files() / "vmlinuz").exists(),
    reason="QEMU or the guests' kernel is missing (tools/install-test-tools.sh)",
)

WORK = int(os.environ.get("CSVFAST_VM_WORK", "3")) * 1_000_000
MEMORY = (256 << 20) + WORK // (1 << 20) * (6 << 20)
LINES = WORK // 65
# What the host looks for. The guest puts it together from two halves: the script itself comes in the clear, in the initrd.
TEXT = b"The quick brown fox of the guest"

RUN = f"""
set -e
word() {{ echo "word: $*"; }}
cd /root
word report $(python3 -m csvfast.machine.guest report --data c0ffee)
cat >/root/make.py <<'END'
import hashlib
text = b"The quick brown " + b"fox of the guest"
held = bytearray().join(text for _ in range(100_000))
with open("/root/data", "wb") as file:
    for number in range({LINES}):
        file.write(hashlib.sha256(number.to_bytes(8, "little")).hexdigest().encode() + b"\\n")
import csvfast
print("word: sm3", csvfast.sm3_file("/root/data").hexdigest())
print("word: held", held.count(text))
END
python3 /root/make.py
word sha256 $(sha256sum <data)
word sorted $(sort data | sha256sum)
gzip -c data >data.gz
word packed $(gunzip -c data.gz | sha256sum)
word bytes $(stat -c %s data.gz)
"""


@dataclass
class Scanner:
    """Reads the whole DRAM again and again at random moments while the guest runs."""

    place: Platform
    scans: int = 0
    found: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        chance = random.Random(1)
        with mmap.mmap(self.place.descriptor, 0, prot=mmap.PROT_READ) as dram:
            while not self.stop.is_set():
                self.found += (dram.find(TEXT) >= 0) + (dram.find(qemu_guest.KERNEL_TEXT) >= 0)
                self.scans += 1
                time.sleep(chance.random() * 0.2)


@pytest.fixture(scope="module")
def initrd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_initrd(tmp_path_factory.mktemp("work") / "initrd", run=RUN).path


@pytest.fixture(scope="module")
def place() -> Iterator[Platform]:
    with vm_platform.platform(MEMORY + (32 << 20)) as made:
        yield made


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("window", ["1/4", "1/16", "1/64"])
def test_work(place: Platform, initrd: Path, tmp_path: Path, window: str) -> None:
    plan = vm_platform.plan(initrd, "", memory_size=MEMORY)
    scanner = Scanner(place)
    thread = threading.Thread(target=scanner.run)
    with vm_platform.make(place, plan, tmp_path, window=window, time_limit=1100.0) as machine:
        machine.launch()
        thread.start()
        try:
            code = machine.wait(1150)
        finally:
            scanner.stop.set()
            thread.join()
        console = machine.console()
        record = machine.status()["memory"]
        assert code == 0, console + machine.errors()
    words = dict(line.removeprefix("word: ").split(" ", 1) for line in console.splitlines() if line.startswith("word: "))
    lines = [hashlib.sha256(number.to_bytes(8, "little")).hexdigest().encode() + b"\n" for number in range(LINES)]
    data = b"".join(lines)
    assert words["sha256"].split()[0] == words["packed"].split()[0] == hashlib.sha256(data).hexdigest()
    assert words["sorted"].split()[0] == hashlib.sha256(b"".join(sorted(lines))).hexdigest()
    assert words["sm3"] == sm3(data).hexdigest()
    assert words["held"] == "100000"
    assert int(words["bytes"]) < len(data) * 0.65
    assert len(gzip.compress(data[:100_000])) < 65_000
    assert record is not None
    assert scanner.found == 0
    assert scanner.scans >= 10
    report = Report.parse(base64.b64decode(words["report"]))
    evidence = Evidence(report, hsk_cek=place.processor.chip.hsk_cek, encoding="rats-tls" if report.pek_is_masked else "page")
    verify(evidence, roots=(place.processor.chip.root,))
    with pytest.raises(VerificationError):
        verify(evidence)
    assert report.report_data.rstrip(b"\0").hex() == "c0ffee"
    predicted = launch_digest(
        plan.firmware, kernel=plan.kernel, initrd=plan.initrd, append=plan.append, force_hash_table=True
    )
    assert report.measure == predicted.digest
