from collections.abc import Iterator

import pytest

from mnemos import _native


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        levels = _native.available_isas()
        metafunc.parametrize("isa", levels[-1:] if metafunc.config.getoption("--one-level") else levels, indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every level of kernels that this machine can run; objects created during the test keep it."""
    _native.select_isa(request.param)
    yield request.param
    _native.select_isa("")
