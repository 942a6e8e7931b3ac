"""What the program of a vector subcore works on: in HBM, and in its own memory."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from sparse_adam.kernels.config import LANES, SLOTS
from sparse_adam.kernels.sparsecore_config import MARGIN, WINDOW, WORD_SLOTS, Config
from sparse_adam.kernels.sparsecore_work import Work


class Operands(NamedTuple):
    """Refs in HBM. Tables are seen as `lines` of 128 lanes."""

    work: Work
    rate: Any  # [WINDOW]: the learning rate, repeated
    grads: Any  # [B * D / 128, 128]
    state: tuple[Any, Any, Any]  # [V * D / 128, 128]: w, m, v, updated in place
    sums: Any  # [2 * workers * D]: lines of each worker's head and tail


class Scratch(NamedTuple):
    """Refs in the subcore's own memory. A slot's words lie together, as `Words` says.

    Rows are 128 lanes wide whatever D is: a wider row is handled in blocks.
    """

    words: Any  # [WORD_SLOTS * words] int32
    gains: Any  # [WORD_SLOTS * C + WINDOW] float32
    shares: Any  # [WINDOW] int32
    edge: Any  # [2 * WINDOW] int32: ids around this worker's first one
    rate: Any  # [WINDOW] float32
    open_sum: Any  # [D] float32, of the run with which the last chunk ended
    grads: Any  # [SLOTS * C, 128] float32
    state: tuple[Any, Any, Any]  # [SLOTS * C, 128] float32 each
    words_arrived: Any  # DMA semaphores, one a slot
    rows_arrived: Any
    rows_left: Any

    @classmethod
    def types(cls, config: Config, dim: int) -> "Scratch":
        """What to allocate."""
        rows = pltpu.VMEM((SLOTS * config.chunk, LANES), jnp.float32)
        words = WORD_SLOTS * Words(config.chunk).size
        return cls(
            words=pltpu.VMEM((words,), jnp.int32),
            gains=pltpu.VMEM((WORD_SLOTS * config.chunk + WINDOW,), jnp.float32),
            shares=pltpu.VMEM((WINDOW,), jnp.int32),
            edge=pltpu.VMEM((2 * WINDOW,), jnp.int32),
            rate=pltpu.VMEM((WINDOW,), jnp.float32),
            open_sum=pltpu.VMEM((dim,), jnp.float32),
            grads=rows,
            state=(rows, rows, rows),
            words_arrived=pltpu.SemaphoreType.DMA((WORD_SLOTS,)),
            rows_arrived=pltpu.SemaphoreType.DMA((SLOTS,)),
            rows_left=pltpu.SemaphoreType.DMA((SLOTS,)),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Words:
    """Where the int32 words of a chunk of C occurrences stand in their slot."""

    chunk: int

    ids = 0  # MARGIN earlier ids, C ids, MARGIN later ids

    @property
    def sources(self) -> int:
        """C gradient rows."""
        return self.chunk + 2 * MARGIN

    @property
    def rows(self) -> int:
        """C table rows to update, of which the first `count` are real."""
        return self.sources + self.chunk

    @property
    def ends(self) -> int:
        """C rows of `grads` in scratch memory: the sum for each of those rows."""
        return self.rows + self.chunk

    @property
    def count(self) -> int:
        """WINDOW words, all the same."""
        return self.ends + self.chunk

    @property
    def size(self) -> int:
        """Of a slot."""
        return self.count + WINDOW


@dataclasses.dataclass(frozen=True, slots=True)
class Unit:
    """128 lanes of one chunk: what a subcore does at a time."""

    chunk: Any  # number in the worker's range
    block: Any  # which 128 lanes of the row
    words: Any  # where its slot of words begins
    word_slot: Any
    row: Any  # first row of its slot of rows
    row_slot: Any
