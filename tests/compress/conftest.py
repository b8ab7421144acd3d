"""Fixtures shared by the tests of compression."""

from __future__ import annotations

import pytest

from tests.models.conftest import HAS_NATIVE, reference

__all__ = ["backend", "reference"]


@pytest.fixture(
    params=["numpy", pytest.param("native", marks=pytest.mark.skipif(not HAS_NATIVE, reason="it is not built"))]
)
def backend(request: pytest.FixtureRequest) -> str:
    """The backends that calibrate."""
    return str(request.param)
