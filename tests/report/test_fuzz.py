"""A short campaign per parser; `python tests/report/fuzz_evidence.py TARGET` runs long ones."""

from __future__ import annotations

import pytest
from report.fuzz_evidence import TARGETS, campaign


@pytest.mark.parametrize("target", TARGETS)
def test_parsers(target: str) -> None:
    read, refused, slowest = campaign(target, 300 if target == "evidence-json" else 2000, 1)
    assert refused > 20
    assert read > 20 or target == "evidence-json"
    assert slowest < 1
