"""What the certificate tests share: one genuine chain of a simulated chip."""

from __future__ import annotations

import pytest

from csvfast.certs.factory import ChainFactory


@pytest.fixture(scope="session")
def factory() -> ChainFactory:
    return ChainFactory()
