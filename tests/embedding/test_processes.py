"""Two processes that train one set of tables, held to one process with one device."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.embedding import process


def start(folder: Path) -> list[subprocess.Popen[str]]:
    """Starts both processes."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    return [
        subprocess.Popen(
            [sys.executable, "-m", process.__name__, number, "2", port, str(folder)],
            env=os.environ
            | {"JAX_PLATFORMS": "cpu"}
            | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},  # as in conftest
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in ("0", "1")
    ]


def stop(running: list[subprocess.Popen[str]]) -> None:
    for one in running:
        one.kill()
        one.communicate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote until one was killed, and after both were restarted."""
    folder = tmp_path_factory.mktemp("processes")
    running = start(folder)
    try:
        _, errors = running[1].communicate(timeout=200)
        assert running[1].returncode == -signal.SIGKILL, errors
        last, deadline = folder / "broken" / "1.npz", time.monotonic() + 60
        while not last.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        stop(running)
    assert sorted(x.name for x in last.parent.glob("*.npz")) == ["0.npz", "1.npz"]
    running = start(folder)
    try:
        for one in running:
            _, errors = one.communicate(timeout=200)
            assert one.returncode == 0, errors
    finally:
        stop(running)
    return folder


def check(folder: Path, expected: dict[str, Any]) -> None:
    for number in ("0", "1"):
        found = np.load(folder / number / "whole.npz")
        for table, arrays in expected.items():
            for name, x in arrays.items():
                np.testing.assert_allclose(found[f"{table}/{name}"], x, rtol=1e-5)


def test_steps_are_those_of_one_process(folder, tmp_path):
    check(folder, process.train(None, tmp_path))


def test_a_run_with_a_killed_process_ends_with_the_same_bits(folder):
    for number in ("0", "1"):
        whole = np.load(folder / number / "whole.npz")
        again = np.load(folder / number / "broken.npz")
        assert set(whole) == set(again)
        for name in whole:
            assert whole[name].tobytes() == again[name].tobytes()


def test_one_process_goes_on_from_a_checkpoint_of_two(folder, tmp_path):
    for name in ("0.npz", "1.npz"):
        (tmp_path / name).write_bytes((folder / "broken" / name).read_bytes())
    check(folder, process.train(None, tmp_path))
    assert len(list(tmp_path.iterdir())) == process.STEPS
