"""Shared by the benchmark suites: options, buffers and kernels forced by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import csvfast


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("csvfast")
    group.addoption("--buffer-mib", type=int, default=8, help="buffer in MiB (default 8; 64 is outside every cache)")
    group.addoption("--records", type=int, default=100_000, help="audit records in the large store (default 100000)")


def pytest_configure(config: pytest.Config) -> None:
    # Short unless asked otherwise: the suites are for comparing two builds, `csvfast bench` for statements.
    options: Any = config.option
    if getattr(options, "benchmark_max_time", None) == 1.0:
        options.benchmark_max_time = 0.25
        options.benchmark_min_rounds = 3


@pytest.fixture(scope="session")
def buffer_bytes(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--buffer-mib")) << 20


@pytest.fixture(autouse=True)
def restored_kernels() -> Iterator[None]:
    yield
    for primitive in csvfast.info()["kernels"]:
        csvfast.force_kernel(primitive, None)
