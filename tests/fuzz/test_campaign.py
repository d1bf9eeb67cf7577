"""A short run of every fuzz target; long campaigns are run by hand (campaign.py)."""

from __future__ import annotations

from collections.abc import Hashable

import pytest

from fuzz import campaign, targets
from fuzz.targets import TARGETS, Target

INPUTS = {"fleet-list": 4000, "fleet-manifest": 4000}
INPUTS |= {"evidence-json": 3000, "mailbox": 3000, "mailbox-csv3": 2000, "image-layer": 3000, "image-registry": 3000}


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_short_run(name: str) -> None:
    inputs = INPUTS.get(name, 12000)
    done, answers, finding = campaign.run(name, inputs, seed=1)
    assert finding is None, finding.trace
    assert done == inputs
    assert answers >= 3, "the inputs all drew the same answer: the target is not being reached"


def test_a_defect_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Careless(Target):
        def __init__(self) -> None:
            super().__init__()
            self.seeds = [bytes(8)]

        def handle(self, data: bytes) -> Hashable:
            return data[7]

    monkeypatch.setitem(targets.TARGETS, "careless", Careless)
    _done, _answers, finding = campaign.run("careless", 10000, seed=1)
    assert finding is not None
    assert "IndexError" in finding.trace
    with pytest.raises(IndexError):
        Careless().answer(finding.data)


def test_a_hang_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(Target):
        def __init__(self) -> None:
            super().__init__()
            self.seeds = [bytes(8)]
            self.armed = False

        def handle(self, data: bytes) -> Hashable:
            while self.armed:
                pass
            self.armed = True
            return len(data)

    monkeypatch.setitem(targets.TARGETS, "endless", Endless)
    monkeypatch.setattr(campaign, "HANG_SECONDS", 0.2)
    _done, _answers, finding = campaign.run("endless", 10, seed=1)
    assert finding is not None
    assert "HangError" in finding.trace
