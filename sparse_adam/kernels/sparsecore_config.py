"""Sizes of the SparseCore kernel, and why they are what they are."""

import dataclasses

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_adam.kernels.config import LANES, SLOTS

WINDOW = 16  # words that a scalar is read with: the most lanes of any generation
MARGIN = 8  # ids before and after a chunk's own; the alignment of slices
TILE = 8  # rows that lie together in a table of more than 128 lanes
WORD_SLOTS = SLOTS + 1  # one more: a chunk's words arrive before its rows
MAX_DIM = 1024
MAX_BYTES = 2**34  # of an array; the compiler refuses more

# The kernel has been compiled for these; a new generation is to be tried first.
CHIPS = {
    pltpu.ChipVersion.TPU_V5P: "v5p",
    pltpu.ChipVersion.TPU_V6E: "v6e",
    pltpu.ChipVersion.TPU_7X: "7x",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """How the work is cut. Changes speed, and the grouping in which a run is summed."""

    cores: int
    subcores: int  # of each core
    lanes: int  # of a vector
    chunk: int  # C, occurrences that a subcore handles at a time
    streams: int = 2  # for each buffer; makes 8 gathers and 6 scatters in flight

    def __post_init__(self) -> None:
        step = max(MARGIN, min(self.lanes, self.chunk, WINDOW))
        if self.chunk < MARGIN or self.chunk % step:
            raise ValueError(
                f"chunk={self.chunk} must be a positive multiple of {MARGIN}, and of "
                f"the {self.lanes} lanes of a vector, or of {WINDOW} if they are more"
            )

    @property
    def workers(self) -> int:
        """The vector subcores of the device."""
        return self.cores * self.subcores

    def vmem_words(self, dim: int) -> int:
        """Words of a subcore's memory that the kernel takes."""
        buffers = SLOTS * 4 * self.chunk * LANES  # gradient, w, m, v of every slot
        words = WORD_SLOTS * (5 * self.chunk + 3 * WINDOW)
        return buffers + words + dim + 4 * WINDOW

    @classmethod
    def interpreted(cls, num_ids: int) -> "Config":
        """Whole lines as vectors, which is quick; few workers, but more than one."""
        chunk = 16 if num_ids <= 1024 else 64
        return cls(cores=1, subcores=4, lanes=LANES, chunk=chunk, streams=1)

    @classmethod
    def choose(cls, num_ids: int, dim: int) -> "Config":
        """The largest chunk that each subcore's share of N fills and its memory holds.

        A long chunk costs less: what happens once a chunk is spread over more rows.
        That makes 40 rows on v6e, and 80 on v5p and 7x, which have twice the memory.
        """
        info = pltpu.get_tpu_info().sparse_core
        assert info is not None
        step = max(info.num_lanes, MARGIN)
        workers = info.num_cores * info.num_subcores
        chunk = step * pl.cdiv(max(pl.cdiv(num_ids, workers), WINDOW), step)
        while True:
            config = cls(info.num_cores, info.num_subcores, info.num_lanes, chunk)
            if 4 * config.vmem_words(dim) <= info.vmem_capacity_bytes - 1024:
                return config
            chunk -= step


def absent() -> str | None:
    """Says why there is nothing to compile the kernel for, or None.

    The TPU in scope is, as everywhere in Pallas, that of the mesh which `jax.set_mesh`
    has set, or else the default device.
    """
    if pltpu.is_tpu_device():
        return wrong_chip()
    return (
        "no TPU is in scope while tracing, and so its generation is not known: "
        "set its mesh by jax.set_mesh"
    )


def wrong_chip() -> str | None:
    """Says why the TPU in scope, if there is one, cannot run the kernel, or None."""
    if not pltpu.is_tpu_device():
        return None
    version = pltpu.get_tpu_info().chip_version
    if version in CHIPS:
        return None
    return f"{version} has no SparseCore as on {', '.join(CHIPS.values())}"
