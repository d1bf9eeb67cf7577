"""What is left of the keys in the process's memory once a guest or the whole processor is gone.

The child works through a launch and its end. Each secret goes straight from its own buffer into a pipe, so that the child never
makes a copy for the sake of the test; then the parent searches all writable memory of the child for them, as long as the child
lives and again after each end. That the first search finds the keys is what gives the second its meaning.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from reference.sm4 import round_keys

from csvfast.certs.manufacturing import ManufacturingLine

CHILD = r"""
import gc, os, sys
import csvfast
from csvfast.certs.layout import CsvCertificate
from csvfast.processor import Options, Processor, make_session, pack_disk_password, seal_packet
from csvfast.processor.sealing import sealing_key
from csvfast.report import GuestPolicy, ReportRequest

home, layout, out, back = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def tell(name, secret):
    os.write(out, name.encode().ljust(16) + len(secret).to_bytes(4, "little"))
    os.write(out, memoryview(secret))

def wait():
    gc.collect()
    os.write(out, b"look".ljust(16) + bytes(4))
    assert os.read(back, 1)

def guest(processor, memory):
    policy = GuestPolicy.of(nodbg=True, es=True)
    pdh = CsvCertificate.parse(processor.pdh_cert_export()[0])
    if layout == "amd":
        from csvfast.processor.session_amd import make_amd_session
        session = make_amd_session(pdh, policy)
    else:
        session = make_session(pdh, policy)
    handle = processor.launch_start(policy, dh=session.certificate.encoded, session=session.blob)
    record = processor.guests[handle]
    processor.activate(handle, 1)
    memory.write(0x10000, bytes(range(256)) * 16, 0)
    processor.launch_update_data(handle, 0x10000, 4096)
    measure = processor.launch_measure(handle)[:32]
    for name in ("vek", "tek", "tik"):
        tell(name, getattr(record, name))
    table = pack_disk_password(password)
    header, sealed = seal_packet(1, session.tek, session.tik, table, iv=bytes(16), measure=measure)
    table[:] = bytes(len(table))
    processor.launch_secret(handle, header, 0x20000, len(sealed), sealed)
    processor.launch_finish(handle)
    memory.write(0x30000, ReportRequest.build(b"x"), 1)
    processor.attestation(handle, 0x30000, 4096)
    seal = sealing_key(processor.chip.root_secret, record)
    tell("sealing", seal)
    seal[:] = bytes(len(seal))
    memory.write(0x30000, ReportRequest.build(b"y")[:112], 1)
    processor.attestation(handle, 0x30000, 4096)
    return handle

password = bytearray(os.urandom(16).hex().encode())
tell("password", password)
memory = csvfast.EncryptedMemory(4 << 20, asid_max=4)
processor = Processor.open(home, memory, options=Options(session_layout=layout))
processor.init(es=True, tmr_address=3 << 20, tmr_length=1 << 20)
handle = guest(processor, memory)
identity = processor.identity
for name in ("pek", "pdh", "oca"):
    secret = getattr(identity, name + "_key").secret()
    tell(name, secret)
    secret.wipe()
del identity, secret
tell("root", processor.chip.root_secret)
password[:] = bytes(len(password))
wait()
processor.deactivate(handle)
processor.decommission(handle)
wait()
processor.close()
del processor
wait()
"""


def child_memory(process: int) -> list[bytes]:
    """All readable and writable memory of a child."""
    found = []
    with Path(f"/proc/{process}/maps").open() as maps, Path(f"/proc/{process}/mem").open("rb", buffering=0) as memory:
        for line in maps:
            fields = line.split()
            if not fields[1].startswith("rw") or fields[-1] in ("[vvar]", "[vsyscall]"):
                continue
            start, end = (int(part, 16) for part in fields[0].split("-"))
            memory.seek(start)
            try:
                found.append(memory.read(end - start))
            except OSError:
                continue
    return found


def forms(name: str, secret: bytes) -> list[bytes]:
    """The bytes as they are; private keys as little-endian words too; SM4 keys as their first expanded words."""
    shapes = [secret, secret[::-1]]
    for key in [secret[:16], secret[16:32]] if name == "vek" else [secret] if name == "tek" else []:
        words = round_keys(key)[:8]
        shapes += [b"".join(word.to_bytes(4, order) for word in words) for order in ("little", "big")]
        shapes += [key]
    return shapes


@pytest.mark.parametrize("layout", ["hygon", "amd"])
def test_keys_do_not_outlive_their_guest(layout: str, line: ManufacturingLine, tmp_path: Path) -> None:
    home = tmp_path / "chip"
    line.make_chip().save(home)
    told, tell = os.pipe()
    waits, go = os.pipe()
    secrets: dict[str, bytes] = {}
    left: list[set[str]] = []
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", CHILD, str(home), layout, str(tell), str(waits)], pass_fds=(tell, waits)
    )
    os.close(tell)
    os.close(waits)
    try:
        with os.fdopen(told, "rb") as answers, os.fdopen(go, "wb", buffering=0) as door:
            while head := answers.read(20):
                name = head[:16].decode().strip()
                if name != "look":
                    secrets[name] = answers.read(int.from_bytes(head[16:], "little"))
                    continue
                try:
                    areas = child_memory(process.pid)
                except PermissionError:
                    pytest.skip("the system does not let a parent read its child's memory")
                left.append(
                    {
                        name
                        for name, key in secrets.items()
                        if any(form in area for area in areas for form in forms(name, key))
                    }
                )
                door.write(b"1")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    running, decommissioned, closed = left
    print(left)
    assert {"vek", "pek", "pdh", "oca", "root"} <= running
    assert not decommissioned & {"vek", "tek", "tik", "sealing", "password"}, decommissioned
    assert closed == set(), closed
