"""Two processes that train one set of tables, held to one process with one device."""

import os
import socket
import subprocess
import sys

import numpy as np

from tests.embedding import process


def test_steps_are_those_of_one_process(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", process.__name__]
    files = [str(tmp_path / f"{number}.npz") for number in range(2)]
    running = [
        subprocess.Popen(
            [*command, str(number), "2", port, file],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, file in enumerate(files)
    ]
    try:
        for one in running:
            _, errors = one.communicate(timeout=200)
            assert one.returncode == 0, errors
    finally:
        for one in running:
            one.kill()
    expected = process.train(None)
    for file in files:
        found = np.load(file)
        for table, arrays in expected.items():
            for name, x in arrays.items():
                np.testing.assert_allclose(found[f"{table}/{name}"], x, rtol=1e-5)
