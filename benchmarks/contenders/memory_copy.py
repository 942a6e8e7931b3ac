"""The yardstick: how fast this machine copies memory."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.workload import Rows

COPIED = 2**29  # bytes; they are read and written


class HostCopy:
    """NumPy's copy of a large array, in as many parts as there are cores.

    It is the C library's `memcpy`, whose stores pass the caches by: the fastest copy
    that was found here.
    """

    compile_seconds = 0.0

    def __init__(self) -> None:
        parts = os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(parts)
        self._source = np.array_split(np.ones(COPIED // 4, np.float32), parts)
        self._target = np.array_split(np.zeros(COPIED // 4, np.float32), parts)

    def step(self, turn: int) -> Callable[[], Any]:
        """One copy of the whole."""
        del turn
        return lambda: list(self._pool.map(np.copyto, self._target, self._source))

    def rows(self, turn: int, rows: np.ndarray) -> Rows:
        """Nothing is updated."""
        del turn, rows
        return ()


class DeviceCopy:
    """A copy in the memory of an accelerator."""

    def __init__(self) -> None:
        self._source = jnp.ones(COPIED // 4)
        self._copy = jax.jit(jnp.copy).lower(self._source).compile()
        self.compile_seconds = 0.0

    def step(self, turn: int) -> Callable[[], Any]:
        """One copy of the whole."""
        del turn
        return lambda: jax.block_until_ready(self._copy(self._source))

    def rows(self, turn: int, rows: np.ndarray) -> Rows:
        """Nothing is updated."""
        del turn, rows
        return ()


def start() -> HostCopy | DeviceCopy:
    """The copy of the memory where the tables are."""
    return HostCopy() if jax.default_backend() == "cpu" else DeviceCopy()
