"""What the tests of the CPU kernels share."""

import pytest

from tests.kernels.cpu.driver import (
    LOOKUP_SOURCES,
    SANITIZERS,
    UPDATE_SOURCES,
    Driver,
)


@pytest.fixture(scope="session", params=SANITIZERS)
def driver(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Driver:
    """The driver of updates, sanitized if this machine can."""
    folder = tmp_path_factory.mktemp("driver")
    return Driver.build(folder, request.param, "driver.cc", UPDATE_SOURCES)


@pytest.fixture(scope="session", params=SANITIZERS)
def lookup_driver(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Driver:
    """The driver of lookups, sanitized if this machine can."""
    folder = tmp_path_factory.mktemp("lookup_driver")
    return Driver.build(folder, request.param, "lookup_driver.cc", LOOKUP_SOURCES)
