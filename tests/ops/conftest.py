from collections.abc import Iterator

import pytest

from mnemos import _native


@pytest.fixture(params=_native.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every level of kernels that this machine can run; objects created during the test keep it."""
    _native.select_isa(request.param)
    yield request.param
    _native.select_isa("")
