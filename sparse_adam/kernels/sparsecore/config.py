"""Sizes of the SparseCore kernel, and why they are what they are."""

import dataclasses
from collections.abc import Callable, Sequence

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_adam.kernels import chips
from sparse_adam.kernels.costs import check_fits, unsupported_rows
from sparse_adam.kernels.layout import Layout, PackedLayout
from sparse_adam.kernels.sparsecore.records import RowRecords, records_of
from sparse_adam.kernels.spec import UpdateSpec
from sparse_adam.kernels.tiles import LANES, SUBLANES

SLOTS = 3  # of rows of a chunk: they arrive, are computed, leave
WINDOW = 16  # words that a scalar is read with: the most lanes of any generation
MARGIN = 8  # ids before and after a chunk's own; the alignment of slices
WORD_SLOTS = SLOTS + 1  # one more: a chunk's words arrive before its rows
# Vectors to a loop over rows that draws random bits or carries rows: for more of them
# there are not the registers to overlap its iterations, which costs up to half again.
FEW = 4
GRANULE = 8  # words that a stream moves at least
# So that the lists of indices are as short as any that is known to work, and that a
# subcore's share of 65,536 ids is still 16 chunks.
MAX_CHUNK = 128
MAX_DIM = 1024
MAX_BYTES = 2**34  # of an array; the compiler refuses more


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

    @property
    def share_words(self) -> int:
        """Words for one number of each worker and one more, read a window at a time."""
        return MARGIN * pl.cdiv(self.workers + WINDOW, MARGIN)

    def vmem_bytes(self, spec: UpdateSpec) -> int:
        """What the kernel keeps in the memory of each subcore."""
        records = records_of(spec.layout)
        opened = 1 if spec.accumulate else len(spec.layout.dtypes)
        return self._bytes(records, 1 + records.planes, opened)

    def lookup_bytes(self, layout: Layout) -> int:
        """What a lookup keeps there: the rows of one plane."""
        return self._bytes(records_of(layout), 1, 1)

    def _bytes(self, records: RowRecords, tiles: int, opened: int) -> int:
        """Counts the tiles of rows, the words, and the rows of an open run."""
        buffers = tiles * SLOTS * self.chunk * records.width
        words = WORD_SLOTS * (5 * self.chunk + 3 * WINDOW)
        opened *= records.blocks * records.width
        return 4 * (buffers + words + opened + 3 * self.share_words + 5 * WINDOW)

    @classmethod
    def interpreted(cls, num_ids: int) -> "Config":
        """Whole records as vectors, which is quick; few workers, but more than one."""
        chunk = 16 if num_ids <= 1024 else 64
        return cls(cores=1, subcores=4, lanes=LANES, chunk=chunk, streams=1)

    @classmethod
    def choose(cls, spec: UpdateSpec) -> "Config":
        """The largest chunk that each subcore's share of N fills and its memory holds.

        A long chunk costs less: what happens once a chunk is spread over more rows.
        For rows of 128 words that makes 40 on v6e, and 80 on v5p and 7x, which have
        twice the memory.
        """
        return cls._longest(spec.num_ids, lambda config: config.vmem_bytes(spec))

    @classmethod
    def for_lookup(cls, num_ids: int, layout: Layout) -> "Config":
        """The same for a lookup, whose chunk is 128."""
        return cls._longest(num_ids, lambda config: config.lookup_bytes(layout))

    @classmethod
    def _longest(cls, num_ids: int, needs: Callable[["Config"], int]) -> "Config":
        info = chips.in_scope().sparse_core
        step = max(info.num_lanes, MARGIN)
        workers = info.num_cores * info.num_subcores
        chunk = step * pl.cdiv(max(pl.cdiv(num_ids, workers), WINDOW), step)
        chunk = min(chunk, MAX_CHUNK)
        while True:
            config = cls(info.num_cores, info.num_subcores, info.num_lanes, chunk)
            if needs(config) <= _capacity():
                return config
            chunk -= step

    def check(self, spec: UpdateSpec) -> None:
        """Raises a ValueError if a chunk does not fit a subcore of the TPU in scope."""
        needed, chosen = self.vmem_bytes(spec), type(self).choose(spec)
        check_fits(self, needed, _capacity(), "each subcore", chosen)


def _capacity() -> int:
    """Bytes of a subcore of the TPU in scope; the compiler wants some for itself."""
    return chips.in_scope().sparse_core.vmem_capacity_bytes - 1024


def least_width() -> int:
    """Returns the words of the narrowest record: a vector, or a granule if larger."""
    info = chips.in_scope().sparse_core
    return GRANULE if info is None else max(GRANULE, info.num_lanes)


def unsupported_layout(layout: Layout, names: Sequence[str]) -> str | None:
    """Says why streams cannot move the rows of these arrays, or returns None."""
    num_rows, dim = layout.num_rows, layout.dim
    if layout.num_bytes // len(layout.shapes) > MAX_BYTES:
        return f"V={num_rows} rows of D={dim} are more than 16 GiB an array"
    if isinstance(layout, PackedLayout):
        stride, least = layout.stride, least_width()
        if LANES % stride:
            return (
                f"packed rows of D={dim} stand {stride} words apart, which does not "
                f"divide the {LANES} of a line, so no stream can fetch one alone"
            )
        if stride < least:
            return (
                f"packed rows of D={dim} stand {stride} words apart, fewer than the "
                f"{least} that streams and vectors take"
            )
        return None
    if dim > MAX_DIM:
        return f"D={dim} is above {MAX_DIM}: pack the table, or use another kernel"
    if dim > LANES and num_rows % SUBLANES:
        return (
            f"V={num_rows} is not a multiple of {SUBLANES}, so rows of D={dim} > "
            f"{LANES} cannot be seen as lines of {LANES} lanes"
        )
    return unsupported_rows(layout, names)


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
    if chips.in_scope().sparse_core is not None:
        return None
    version = pltpu.get_tpu_info().chip_version
    known = [name for name, chip in chips.CHIPS.items() if chip.sparse_core]
    return f"{version} has no SparseCore as on {', '.join(known)}"
