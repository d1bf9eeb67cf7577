"""A process that changes the platform's keys all the time is killed a hundred times; no key is lost or half-written."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import csvfast
from csvfast.certs.chain import CertificateChain, verify_chain
from csvfast.certs.layout import CsvCertificate
from csvfast.certs.manufacturing import ManufacturingLine
from csvfast.processor import Processor

ROUNDS = 100

# One process forks the children that are killed: starting Python a hundred times would take most of the time. Each child says
# on its pipe before every change which PDH is the stored one and what comes next: afterwards it must be that one or a new one.
CHILD = """
import os, random, sys
import csvfast
from csvfast.certs.layout import CsvCertificate, KeyAlgorithm, KeyUsage
from csvfast.crypto import SM2PrivateKey
from csvfast.processor import Processor

directory = sys.argv[1]

def own(processor):
    key = SM2PrivateKey.generate()
    oca = CsvCertificate.build(usage=KeyUsage.OCA, algorithm=KeyAlgorithm.SM2_SA, point=key.public_key.point,
                               user_id=b"HYGON-SSD-OCA").with_signature(1, key, KeyUsage.OCA, b"HYGON-SSD-OCA")
    csr = CsvCertificate.parse(processor.pek_csr())
    processor.pek_cert_import(csr.with_signature(2, key, KeyUsage.OCA, b"HYGON-SSD-OCA").encoded, oca.encoded)

def work(seed):
    choose = random.Random(seed)
    with csvfast.EncryptedMemory(1 << 20) as memory, Processor.open(directory, memory) as processor:
        processor.init()
        while True:
            step = choose.choice(("reset", "pek", "own", "pdh", "pdh"))
            # The PDH changes with every command, so it names the state.
            os.write(1, (processor.identity.pdh.point[:8].hex() + " " + step + "\\n").encode())
            if step == "reset":
                processor.shutdown()
                processor.factory_reset()
                os.write(1, b"gone reset\\n")
                processor.init()
            elif step == "pek":
                processor.pek_gen()
            elif step == "own" and not processor.platform_status().owner:
                own(processor)
            else:
                processor.pdh_gen()

for line in sys.stdin:
    child = os.fork()
    if not child:
        work(int(line))
    os.write(1, b"child %d\\n" % child)
    os.waitpid(child, 0)
    os.write(1, b"dead\\n")
"""


def test_a_hundred_kills(line: ManufacturingLine, tmp_path: Path) -> None:
    home = tmp_path / "chip"
    chip = line.make_chip()
    chip.save(home)
    chooser = random.Random(20)
    counts = {"changes": 0, "resets": 0, "owned": 0, "absent": 0, "between": 0, "leftovers": 0}
    parent = subprocess.Popen(
        [sys.executable, "-P", "-c", CHILD, str(home)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    memory = csvfast.EncryptedMemory(1 << 20)
    try:
        for number in range(ROUNDS):
            parent.stdin.write(f"{number}\n")
            parent.stdin.flush()
            said: list[str] = []
            child, heard, gap = 0, time.monotonic(), 0.0
            wanted = chooser.choice((1, 2, 2, 3))
            while not child or len(said) < wanted:
                word = parent.stdout.readline().strip()
                assert word, "the process that forks has died"
                gap, heard = time.monotonic() - heard, time.monotonic()
                if word.startswith("child "):
                    child = int(word[6:])
                else:
                    said.append(word)
            # Somewhere in the next change, however fast or slow this machine's disk is.
            time.sleep(chooser.uniform(0, min(max(gap, 0.002), 0.2)))
            os.kill(child, signal.SIGKILL)
            while (word := parent.stdout.readline().strip()) != "dead":
                assert word
                said.append(word)
            counts["changes"] += len(said)
            counts["resets"] += said.count("gone reset")
            counts["leftovers"] += bool(list(home.glob(".platform*")))
            check(home, memory, chip.root, said, counts)
    finally:
        parent.stdin.close()
        parent.stdout.close()
        parent.wait(timeout=30)
        memory.close()
    # The rounds were no formality: changes happened, and kills fell before and after them.
    assert counts["changes"] > 1.5 * ROUNDS, counts
    assert counts["resets"] > 5, counts
    assert counts["owned"] > 5, counts
    assert counts["between"] > 3, counts
    assert counts["leftovers"] > 5, counts


def check(home: Path, memory: csvfast.EncryptedMemory, root: object, said: list[str], counts: dict[str, int]) -> None:
    """The directory opens, keys and certificates belong together and chain, and the state is one that was stored."""
    with Processor.open(home, memory) as processor:
        assert processor.storage is not None
        stored = processor.storage.load()  # checks keys against certificates and every signature
        if stored is None:  # killed after a reset, or in its middle
            assert said[-1].endswith(" reset")
            counts["absent"] += 1
            return
        name = stored.pdh.point[:8].hex()
        if name != said[-1].split()[0]:
            # The change after the last word had been stored when the kill came; nothing older may come back.
            assert name not in [word.split()[0] for word in said]
            counts["between"] += 1
        counts["owned"] += stored.externally_owned
        processor.init()
        pdh, chain = processor.pdh_cert_export()
        pek, oca, cek = (CsvCertificate.parse(chain[start : start + 2084]) for start in (0, 2084, 4168))
        whole = CertificateChain(hsk=processor.chip.hsk, cek=cek, pek=pek, oca=oca, pdh=CsvCertificate.parse(pdh))
        verify_chain(whole, [root])  # type: ignore[list-item]
        for key, certificate in ((stored.pek_key, stored.pek), (stored.pdh_key, stored.pdh)):
            certificate.public_key.verify(key.sign(b"x"), b"x")
