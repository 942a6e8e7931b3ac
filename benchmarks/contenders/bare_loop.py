"""A yardstick: how fast this machine reads and writes the rows of a batch."""

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import Case
from benchmarks.contenders.base import plain_only
from benchmarks.workload import Rows, TimedBatch, Workload, valid

SOURCE = Path(__file__).with_suffix(".cc")


class BareLoop:
    """A loop in C++ that touches the memory of an update and computes nothing.

    It reads each gradient, and reads and writes the three rows of each id, with the
    ids sorted beforehand, on as many threads as there are cores. An update cannot be
    faster by more than what stays in the caches.
    """

    def __init__(self, workload: Workload) -> None:
        started = time.perf_counter()
        self._touch = _compiled()
        self.compile_seconds = time.perf_counter() - started
        parts = os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(parts)
        self.states = [workload.first_state() for _ in range(workload.copies)]
        self._batches = [
            _sorted(batch, workload.case, parts) for batch in workload.batches
        ]

    def step(self, turn: int) -> Callable[[], Any]:
        """Touches the rows of a batch."""
        state = self.states[turn % len(self.states)]
        grads, ids, positions, cuts = self._batches[turn % len(self._batches)]
        arrays = [x.ctypes.data for x in (*state, grads, ids, positions)]
        dim = grads.shape[1]

        def touch(begin: int, end: int) -> None:
            self._touch(*arrays, begin, end, dim)

        return lambda: list(self._pool.map(touch, cuts[:-1], cuts[1:]))

    def rows(self, turn: int, rows: np.ndarray) -> Rows:
        """Nothing is updated."""
        del turn, rows
        return ()


def _sorted(
    batch: TimedBatch, case: Case, parts: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Returns gradients, sorted ids, their positions, and where the parts begin.

    No row is in two parts, since two threads would write it.
    """
    positions = np.flatnonzero(valid(batch.ids, case))
    positions = positions[np.argsort(batch.ids[positions], kind="stable")]
    ids = batch.ids[positions]
    starts = np.append(np.flatnonzero(np.diff(ids, prepend=-1)), ids.size)
    even = np.linspace(0, ids.size, parts + 1)
    cuts = starts[np.searchsorted(starts, even)]
    return (
        np.ascontiguousarray(batch.grads),
        ids.astype(np.int32),
        positions.astype(np.int32),
        cuts.tolist(),
    )


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def _compiled() -> Callable[..., None]:
    """Returns the loop, compiled for this machine."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "bare_loop.so")
        flags = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC")
        subprocess.run(
            [*_compiler(), *flags, str(SOURCE), "-o", str(library)],
            check=True,
            capture_output=True,
        )
        touch = ctypes.CDLL(str(library)).Touch
    touch.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 3
    touch.restype = None
    return touch


def unsupported(case: Case) -> str | None:
    """Returns why a case is left out, or None."""
    if shutil.which(_compiler()[0]) is None:
        return f"there is no C++ compiler {_compiler()[0]}"
    return plain_only(case)
