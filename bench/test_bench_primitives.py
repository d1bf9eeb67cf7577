"""The set of `csvfast bench` under pytest-benchmark: one group per name, csvfast's kernels and the peers side by side.

    pytest bench/                                  all, short
    pytest bench/ -k "xts and gfni" --buffer-mib 64
    pytest bench/ --benchmark-autosave; pytest bench/ --benchmark-compare
"""

from __future__ import annotations

from typing import Any

import pytest

from csvfast.benchmark import NAMES, Case, Plan, make_cases

# Small buffers here: which cases there are does not depend on their size, and making them checks every answer.
CASES = [case for case in make_cases(Plan(buffer_bytes=1 << 20)) if case.peer != "gmssl"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label.replace(" ", "-"))
def test_primitive(benchmark: Any, case: Case, buffer_bytes: int) -> None:
    sized = next(
        again
        for again in make_cases(Plan(buffer_bytes=buffer_bytes, names=(case.name,)))
        if (again.label, again.variant) == (case.label, case.variant)
    )
    benchmark.group = case.name
    with sized.setup():
        work = sized.make()
        benchmark(work)
    if benchmark.stats is not None:  # None with --benchmark-disable
        unit = "ops_per_second" if sized.operations else "bytes_per_second"
        benchmark.extra_info[unit] = (sized.operations or sized.bytes) / benchmark.stats.stats.median
        benchmark.extra_info["kernel"] = case.kernel


def test_every_name_has_a_case() -> None:
    assert {case.name for case in CASES} == set(NAMES)
