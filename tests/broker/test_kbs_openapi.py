"""The published document against the server: schemathesis sends what it allows and what it does not, as an administrator and as
nobody, and compares the answers with what it promises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from broker.kbs_rig import PATH, KbsRig
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.generation import GenerationMode

from csvfast.broker.administration import LOCAL
from csvfast.broker.kbs.openapi import openapi
from csvfast.certs import ManufacturingLine

load_all_checks()
SCHEMA = schemathesis.openapi.from_dict(openapi())
OPERATIONS = [
    f"{method.upper()} {path}" for path, item in openapi()["paths"].items() for method in item if method != "parameters"
]
ALWAYS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
    "response_schema_conformance", "allow_header_conformance", "ignored_auth",
)  # fmt: skip
BOUNDED = settings(
    max_examples=10, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KbsRig]:
    with KbsRig(tmp_path_factory.mktemp("kbs"), (ManufacturingLine.create().root,)) as rig:
        rig.administration.put_resource(LOCAL, PATH, b"content")
        rig.administration.put_reference(LOCAL, "csv_measure", ["00"], None)
        yield rig


@pytest.fixture(scope="module")
def token(rig: KbsRig) -> str:
    return rig.token()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("label", OPERATIONS)
def test_operation(rig: KbsRig, token: str, label: str, mode: GenerationMode) -> None:
    method, path = label.split(" ")
    operation = SCHEMA[path][method]
    strategy = operation.as_strategy(generation_mode=mode)
    names = (*ALWAYS, "negative_data_rejection") if mode is GenerationMode.NEGATIVE else ALWAYS
    checks = CHECKS.get_by_names(names)

    @given(case=strategy)
    @BOUNDED
    def answers(case: Any) -> None:
        for headers in ({"Authorization": f"Bearer {token}"}, {}):
            case.call_and_validate(base_url=rig.url, headers=headers, checks=checks, timeout=20)

    try:
        answers()
    except Exception as error:
        if mode is GenerationMode.NEGATIVE and type(error).__name__ in ("Unsatisfiable", "SkipTest"):
            return  # nothing about this operation can be wrong
        raise


def test_it_is_published(rig: KbsRig) -> None:
    answer = httpx.get(f"{rig.url}/kbs/v0/openapi.json")
    assert answer.status_code == 200
    assert answer.json() == openapi()


def test_every_route_is_described(rig: KbsRig) -> None:
    described = set(openapi()["paths"])
    for route in rig.app._router.routes:
        path = route.path.replace("{path:path}", "{repository}/{type}/{tag}")  # type: ignore[attr-defined]
        assert path in described, path
        table = route.app  # type: ignore[attr-defined]
        found = {method.lower() for method in table._endpoints} | ({"get"} if path.startswith("/kbs/v0/resource/") else set())
        assert found == openapi()["paths"][path].keys() - {"parameters"}, path
    assert len(described) == len(rig.app._router.routes)
