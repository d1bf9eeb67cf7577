"""What every test shares: the skip guard, shared vectors, kernels forced by name, hypothesis profiles."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

import csvfast

pytest_plugins = ["skips"]

# Programs the tests start must find the installed package, not the checkout they are started in.
os.environ["PYTHONSAFEPATH"] = "1"

VECTORS = Path(__file__).with_name("vectors")

settings.register_profile("dev", max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("dev"), derandomize=True)
settings.register_profile("nightly", parent=settings.get_profile("dev"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `sm4_kernel`, `sm3_many_kernel`, `sm2_kernel` and so on runs once for each compiled-in one."""
    for primitive in csvfast.info()["kernels"]:
        name = primitive.replace("-", "_") + "_kernel"
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, csvfast.info()["kernels"][primitive]["compiled"], indirect=True)


def _forced(primitive: str, name: str) -> Iterator[str]:
    if name not in csvfast.info()["kernels"][primitive]["available"]:
        pytest.skip(f"this CPU cannot run {primitive} kernel {name}")
    csvfast.force_kernel(primitive, name)
    assert csvfast.info()["kernels"][primitive]["chosen"] == name
    yield name
    csvfast.force_kernel(primitive, None)


@pytest.fixture
def sm4_kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from _forced("sm4", request.param)


@pytest.fixture
def sm3_kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from _forced("sm3", request.param)


@pytest.fixture
def sm3_many_kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from _forced("sm3-many", request.param)


@pytest.fixture
def ghash_kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from _forced("ghash", request.param)


@pytest.fixture
def sm2_kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from _forced("sm2", request.param)


@pytest.fixture
def sm2_many_kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from _forced("sm2-many", request.param)


@pytest.fixture(scope="session")
def hygon_data() -> Path:
    """Folder of what real chips and Hygon's tools produced: $CSVFAST_DATA/hygon, else ../shared/data/hygon."""
    given = os.environ.get("CSVFAST_DATA")
    folder = Path(given) if given else Path(__file__).parents[2] / "shared" / "data"
    if not (folder / "hygon").is_dir():
        pytest.skip("evidence of real chips is absent: set CSVFAST_DATA to the folder that holds hygon/")
    return folder / "hygon"


@pytest.fixture(scope="session")
def real_evidence(hygon_data: Path) -> bytes:
    """Evidence of a real chip in the JSON encoding, as published with trustee."""
    return (hygon_data / "csv_evidence.json").read_bytes()


@pytest.fixture
def key() -> bytes:
    """The key of the specification's page vectors: 00 01 .. 1f."""
    return bytes(range(32))


@pytest.fixture(scope="session")
def vectors() -> Callable[[str], Any]:
    """Reads tests/vectors/<name>.json, which the C tests share."""

    def read(name: str) -> Any:
        return json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))

    return read
