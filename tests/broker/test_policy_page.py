"""docs/broker-policy.md: its policies, commands and Python run, what it shows as shipped is what csvfast ships."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from attest.simulated_evidence import MEASURE, REPORT_DATA, Platform

from csvfast.attest import verify
from csvfast.broker.policy import (
    Reference,
    References,
    appraisal_document,
    compile_policy,
    default_policies,
    dry_run,
    resource_document,
)
from csvfast.broker.policy.conditions import OPERATORS
from csvfast.broker.policy.decision import TRUST_CLAIMS
from csvfast.broker.policy.references import parse_message

PAGE = Path(__file__).parents[2] / "docs" / "broker-policy.md"
NOW = 1_800_000_000.0

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the tests stand outside a source tree")


def text() -> str:
    return PAGE.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text(), re.MULTILINE | re.DOTALL)


def document() -> dict[str, Any]:
    platform = Platform()
    return appraisal_document(verify(platform.evidence(), roots=platform.roots, report_data=REPORT_DATA))


def test_what_is_shipped_stands_there_in_full() -> None:
    shown = blocks("toml")
    assert [shipped for _kind, _id, _engine, shipped in default_policies()] == shown[2:]


def test_examples_of_rules() -> None:
    guests, prod = blocks("toml")[:2]
    appraisal = compile_policy("appraisal", "rules", guests)
    guest = document()
    references = References({"csv_measure": Reference([MEASURE.hex()]), "csv_vm_id": Reference([guest["csv"]["vm_id"]])})
    decision = appraisal.evaluate(guest, references, NOW)
    assert (decision.allowed, decision.status) == (True, "affirming")
    assert dict(decision.trust) == {"configuration": 2, "executables": 3}

    resource = compile_policy("resource", "rules", prod)

    def ask(path: str, **vector: int) -> bool:
        cpu = {
            "ear.status": "affirming",
            "ear.trustworthiness-vector": vector,
            "ear.veraison.annotated-evidence": {"csv": guest["csv"]},
        }
        request = resource_document(path.split("/"), "resource", {}, {"tee": "csv", "submods": {"cpu0": cpu}})
        return resource.evaluate(request, references, NOW).allowed

    assert ask("prod/key/a")
    assert not ask("prod/key/root")
    assert ask("prod/key/root", **{"instance-identity": 2})
    assert not ask("other/key/a")


def test_tables_are_complete() -> None:
    said = text()
    for operator in OPERATORS:
        assert f"| `{operator} = " in said or f"`, `{operator} = " in said, operator
    for claim in TRUST_CLAIMS:
        assert f"`{claim}`" in said, claim
    first, second = (part.partition("\n## ")[0] for part in said.split("| claim | |\n")[1:])
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", first, re.MULTILINE))))
    assert named == set(document())
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", second, re.MULTILINE))))
    assert named == set(resource_document(("a", "b", "c"), "resource", {}, {"tee": "csv"}))


def test_message() -> None:
    (message,) = blocks("json")
    found = parse_message(message.encode(), NOW)
    assert {name: one.values for name, one in found.items()} == {"csv_measure": ("ae2a",), "svn": ({"single": 3},)}


def test_rego() -> None:
    (policy,) = blocks("rego")
    compiled = compile_policy("appraisal", "rego", policy)
    references = References({"csv_measure": Reference([MEASURE.hex()])})
    assert compiled.evaluate(document(), references, NOW).allowed
    assert not compiled.evaluate({**document(), "bound": False}, references, NOW).allowed
    assert not compiled.evaluate(document(), References(), NOW).allowed


def test_dry_run() -> None:
    (shown,) = blocks("text")
    policy = compile_policy("appraisal", "rules", blocks("toml")[0])
    guest = {"tee": "csv", "measure": "ab", "policy": {"nodbg": 0, "es": 1, "csv3": 0}}
    assert dry_run(policy, guest, References(), NOW).replace(policy.digest, "DIGEST") == shown.strip()


def test_python() -> None:
    verdictd, whole = blocks("python")
    for block in (verdictd,):
        *lines, last = block.strip().splitlines()
        names: dict[str, Any] = {}
        exec("\n".join(lines), names)
        assert eval(last.partition("#")[0], names) is True
        assert last.endswith("# True")
    platform = Platform()
    names = {"evidence": platform.evidence(), "roots": platform.roots, "expected": REPORT_DATA, "now": NOW}
    exec(whole, names)
    decision = names["decision"]
    assert (decision.allowed, decision.status, decision.valid_until) == (True, "affirming", NOW + 3600)


def test_commands(tmp_path: Path) -> None:
    program = "\n".join(blocks("sh"))
    assert program.count("csvfast broker ") == 8
    measure = re.search(r"csv_measure ([0-9a-f]{64})", program)
    assert measure is not None
    guest = {**document(), "measure": measure[1]}
    (tmp_path / "guest.json").write_text(json.dumps(guest), encoding="utf-8")
    script = f'csvfast() {{ "{sys.executable}" -m csvfast "$@"; }}\n{program}'
    done = subprocess.run(
        ["bash", "-euc", script], cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "allowed, affirming" in done.stdout
    assert "csv_min_api" in done.stdout
