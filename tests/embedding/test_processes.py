"""Processes that train one set of tables, held to one process with one device."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.embedding import by_orbax, process
from tests.xla_flags import QUICKLY


def start(folder: Path, count: int, *runs: str) -> list[subprocess.Popen[str]]:
    """Starts so many processes, which train together."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", process.__name__]
    return [
        subprocess.Popen(
            [*command, str(number), str(count), port, str(folder), *runs],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICKLY},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]


def stop(running: list[subprocess.Popen[str]]) -> None:
    for one in running:
        one.kill()
        one.communicate()


def finish(folder: Path, count: int, *runs: str) -> None:
    """Makes the runs from beginning to end."""
    running = start(folder, count, *runs)
    try:
        for one in running:
            _, errors = one.communicate(timeout=200)
            assert one.returncode == 0, errors
    finally:
        stop(running)


def kill_one(folder: Path, count: int, *runs: str, killed: str) -> None:
    """Makes the runs, then another one until a process is killed, and ends all."""
    before = process.STEPS - 1
    running = start(folder, count, *runs, f"{killed}:{before}")
    last, deadline = folder / killed / f"{before - 1}.npz", time.monotonic() + 200
    try:
        _, errors = running[-1].communicate(timeout=200)
        assert running[-1].returncode == -signal.SIGKILL, errors
        while not last.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        stop(running)
    assert sorted(last.parent.iterdir()) == [last.with_name("0.npz"), last]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one process, of two and of four.

    "whole" was never broken. Of "killed" one of four processes was killed, and all were
    started again; "on_two" and "on_one" went on from its checkpoint with fewer.
    "uneven" is of two, with one batch more. So is "one", with one device. "restored" is
    what two read of the Orbax checkpoint of "on_one", after which is a broken one.
    """
    folder = tmp_path_factory.mktemp("processes")
    kill_one(folder, 4, "whole", killed="killed")
    for fewer in ("on_two", "on_one"):
        shutil.copytree(folder / "killed", folder / fewer)
    finish(folder, 4, "killed")
    process.train(None, folder / "one", process.STEPS + 1)
    process.train(None, folder / "on_one", process.STEPS, orbax=True)
    add_broken(folder / "on_one" / "orbax")
    finish(folder, 2, "uneven", "on_two+orbax", "restored=on_one")
    return folder


def add_broken(folder: Path) -> None:
    """Adds a later checkpoint in which Orbax finds no array, and that has no list."""
    later = shutil.copytree(folder / f"{process.STEPS}", folder / "9")
    for file in [*later.glob("tables/**/d/*"), later / "tables" / "files.json"]:
        file.unlink()


def found(folder: Path, run: str, count: int) -> list[Any]:
    """The tables as each process of a run saw them at the end."""
    files = [folder / run / "found" / f"{number}.npz" for number in range(count)]
    return [arrays(file) for file in files]


def after(folder: Path, run: str, steps: int) -> Any:
    """The checkpoint of a run after so many steps."""
    return arrays(folder / run / f"{steps - 1}.npz")


def arrays(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a file of NumPy."""
    with np.load(file) as saved:
        return dict(saved)


def check(tables: Any, expected: Any) -> None:
    assert set(tables) == set(expected)
    for name, x in expected.items():
        np.testing.assert_allclose(tables[name], x, rtol=1e-5)


@pytest.mark.parametrize(("run", "count"), [("whole", 4), ("on_two", 2)])
def test_steps_are_those_of_one_process(folder, run, count):
    """One of the four has no ids; `on_two` began with four."""
    for tables in found(folder, run, count):
        check(tables, after(folder, "one", process.STEPS))


def test_an_uneven_last_batch_of_two_processes(folder):
    check(after(folder, "uneven", process.STEPS), after(folder, "one", process.STEPS))
    for tables in found(folder, "uneven", 2):
        check(tables, after(folder, "one", process.STEPS + 1))


def test_a_run_with_a_killed_process_ends_with_the_same_bits(folder):
    whole, *others = found(folder, "whole", 4)
    for tables in (*others, *found(folder, "killed", 4)):
        assert set(tables) == set(whole)
        for name, x in whole.items():
            assert tables[name].tobytes() == x.tobytes()


def test_one_process_goes_on_from_a_checkpoint_of_four(folder):
    check(after(folder, "on_one", process.STEPS), after(folder, "one", process.STEPS))


def test_two_processes_restore_by_orbax_what_one_has_saved(folder):
    expected = after(folder, "on_one", process.STEPS)
    for tables in found(folder, "restored", 2):
        assert {name: x.tobytes() for name, x in tables.items()} == {
            name: x.tobytes() for name, x in expected.items()
        }


def test_one_process_restores_by_orbax_what_two_have_saved(folder):
    expected = after(folder, "on_two", process.STEPS)
    for table, own in by_orbax.restored(folder / "on_two", None).items():
        for name, x in own.items():
            assert x.tobytes() == expected.pop(f"{table}/{name}").tobytes()
    assert not expected
