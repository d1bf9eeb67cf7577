"""A nightly job: a directory of images is measured, interrupted, resumed, compared with yesterday, stated and verified."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from csvfast.crypto import SM2PrivateKey
from csvfast.measure import Job, Selection
from csvfast.measure.fleet.compare import compare, items_of
from csvfast.measure.fleet.references import reference_values
from csvfast.measure.fleet.statement import make_statement, open_statement, sign_statement


def night(folder: Path, ledger: Path, *, stop_after: int | None = None) -> Job:
    """Measures what the ledger does not know yet. stop_after: as if somebody had pulled the plug after so many rows."""
    with Job([folder], Selection(patterns=("*.img",)), ledger=ledger, jobs=2) as job:
        for number, _row in enumerate(job, 1):
            if number == stop_after:
                break
    return job


with tempfile.TemporaryDirectory() as temporary:
    images, ledger = Path(temporary, "images"), Path(temporary, "ledger.jsonl")
    images.mkdir()
    for number in range(200):
        image = images / f"{number:03}.img"
        image.write_bytes(number.to_bytes(2, "big") * 20_000)
        os.utime(image, (1_700_000_000, 1_700_000_000))
    (images / "gone.img").symlink_to("nowhere")

    night(images, ledger, stop_after=50)
    monday = night(images, ledger)
    failed = [row for row in monday.table if not row.ok]
    print(f"Monday:  {len(monday.table)} rows, {len(failed)} failed ({failed[0].error}: {Path(failed[0].name).name})")

    (images / "007.img").write_bytes(b"patched")
    (images / "200.img").write_bytes(b"new")
    tuesday = night(images, ledger)
    changes = compare(monday.table, tuesday.table)
    print(f"Tuesday: {len(changes.added)} added, {len(changes.changed)} changed, {changes.same} the same")

    key = SM2PrivateKey.generate()
    envelope = sign_statement(make_statement(tuesday.table), key)
    stated = open_statement(envelope, key.public_key)
    print(f"a statement of {len(stated)} digests, {len(envelope)} bytes, signed with SM2")
    print(f"reference values: {len(reference_values(stated, 'images')['images'])} digests")

    with Job(items_of(stated)) as check:
        print(f"verified again: {sum(row.ok for row in check)} of {len(stated)}")
