"""What the tests of the CPU kernel share."""

import pytest

from tests.kernels.cpu.driver import SANITIZERS, Driver


@pytest.fixture(scope="session", params=SANITIZERS)
def driver(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Driver:
    """The driver, sanitized if this machine can."""
    return Driver.build(tmp_path_factory.mktemp("driver"), request.param)
