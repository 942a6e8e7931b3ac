"""What the tests of the CPU kernels share."""

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

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
    sources = UPDATE_SOURCES
    return _shared(tmp_path_factory, request.param, "driver.cc", sources)


@pytest.fixture(scope="session", params=SANITIZERS)
def lookup_driver(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Driver:
    """The driver of lookups, sanitized if this machine can."""
    sources = LOOKUP_SOURCES
    return _shared(tmp_path_factory, request.param, "lookup_driver.cc", sources)


def _shared(
    factory: pytest.TempPathFactory, sanitizer: str, main: str, sources: Sequence[Path]
) -> Driver:
    """Builds a driver, or waits for the process of this run that builds it."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / f"{main}-{sanitizer}"
    folder.mkdir(exist_ok=True)
    with Path(folder, "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        built = Path(folder, "built")
        if not built.exists():
            Driver.build(folder, sanitizer, main, sources).binary.rename(built)
    return Driver(built)
