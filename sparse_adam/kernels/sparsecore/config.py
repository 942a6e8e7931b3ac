"""Sizes of the SparseCore kernel, and why they are what they are."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_adam.kernels import chips
from sparse_adam.kernels.costs import check_fits, unsupported_rows
from sparse_adam.kernels.forms import SafeForms
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
GRANULE = 8  # words that a stream moves at least, on the TPUs that are known here
ALIGNED = 128  # words: where lists of indices begin in kernels that are known to run
# So that the lists of indices are as short as any that is known to work, and that a
# subcore's share of 65,536 ids is still 16 chunks.
MAX_CHUNK = 128
MAX_DIM = 1024
MAX_BYTES = 2**34  # of an array; the compiler refuses more


@dataclasses.dataclass(frozen=True, slots=True)
class WordOffsets:
    """Where the int32 words of a chunk of C occurrences stand in their slot."""

    chunk: int
    lists: int  # of numbers of records: the planes of one array have one each
    alignment: int = MARGIN  # of each list

    ids = 0  # MARGIN earlier ids, C ids, MARGIN later ids

    @property
    def step(self) -> int:
        """Returns the words from one list to the next."""
        return self._aligned(self.chunk)

    @property
    def sources(self) -> int:
        """Returns where the numbers of the C records of gradients to fetch begin."""
        return self._aligned(self.chunk + 2 * MARGIN)

    @property
    def fetched(self) -> int:
        """Returns where the lists of C records of the state to fetch begin."""
        return self.sources + self.step

    @property
    def second(self) -> int:
        """Returns where as many more begin: a word for each, as a pipeline says."""
        return self.fetched + self.lists * self.step

    @property
    def count(self) -> int:
        """Returns where WINDOW equal words begin: how many records are listed."""
        return self.second + self.lists * self.step

    @property
    def size(self) -> int:
        """Returns how many words a chunk takes: where the next slot begins."""
        return self._aligned(self.count + WINDOW)

    def each(self, begin: int) -> list[int]:
        """Returns where the lists begin of which the first one begins here."""
        return [begin + at * self.step for at in range(self.lists)]

    def _aligned(self, words: int) -> int:
        return self.alignment * pl.cdiv(words, self.alignment)


@dataclasses.dataclass(frozen=True, slots=True)
class Config(SafeForms):
    """How the work is cut. Changes speed, and the grouping in which a run is summed.

    The fields from `streams` on are for a TPU that does not do what its compiler
    promises: each has a value in `SAFE_FORMS` that does without one feature, by a form
    that other kernels are known to have run. `docs/sparsecore.md` says what each costs.

    Attributes:
        cores: of the device; 0 leaves this and the next three to the update.
        subcores: of each core.
        lanes: of a vector.
        chunk: C, occurrences that a subcore handles at a time.
        streams: for each buffer; 2 make 8 gathers and 6 scatters in flight.
        semaphores: that the gathers of a chunk share. 4 give each array of Adam its
            own, and 3 to the scatters: in all 25, of 27 that the compiler has.
        aligned_lists: whether lists of indices begin at multiples of 128 words, not of
            8. A list of up to 128 is then one stream, whatever `streams` says.
        fixed_loops: whether the loop over the rows of a chunk always makes C rounds,
            some for nothing where ids repeat.
        filled_lists: whether the list of rows to write repeats its first row, with the
            same new words, where it would have an index to be passed over. It makes
            loops fixed, too. Only for sums of gradients: the rows of a step for each
            occurrence are not written side by side.
        plain_loops: whether the iterations of loops run one after the other.
        row_copies: whether each record is moved by a copy of its own, by none of the
            indirect streams, and none of their lists.
    """

    cores: int = 0
    subcores: int = 0
    lanes: int = 0
    chunk: int = 0
    streams: int = 2
    semaphores: int = 1
    aligned_lists: bool = False
    fixed_loops: bool = False
    filled_lists: bool = False
    plain_loops: bool = False
    row_copies: bool = False

    # The cheapest first: a check tries them in this order.
    SAFE_FORMS: ClassVar[dict[str, Any]] = {
        "streams": 1,
        "semaphores": 4,
        "aligned_lists": True,
        "fixed_loops": True,
        "filled_lists": True,
        "plain_loops": True,
        "row_copies": True,
    }

    def __post_init__(self) -> None:
        sizes = self.cores, self.subcores, self.lanes, self.chunk
        for name in ("streams", "semaphores"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not any(sizes):
            return
        if not all(sizes):
            raise ValueError(
                f"cores={self.cores}, subcores={self.subcores}, lanes={self.lanes}, "
                f"chunk={self.chunk}: give all four, or none"
            )
        step = max(MARGIN, min(self.lanes, self.chunk, WINDOW))
        if self.chunk < MARGIN or self.chunk % step:
            raise ValueError(
                f"chunk={self.chunk} must be a positive multiple of {MARGIN}, and of "
                f"the {self.lanes} lanes of a vector, or of {WINDOW} if they are more"
            )

    def completed(self, spec: UpdateSpec) -> "Config":
        """Returns it with what it leaves to the update."""
        return self if self.chunk else type(self).choose(spec, **self.forms)

    @property
    def alignment(self) -> int:
        """Words whose multiples the lists of indices begin at."""
        return ALIGNED if self.aligned_lists else MARGIN

    @property
    def stream_length(self) -> int:
        """The records that a stream moves, but for the last one of a chunk."""
        return self.alignment * pl.cdiv(self.chunk, self.alignment * self.streams)

    @property
    def all_rounds(self) -> bool:
        """Whether the loop over the rows of a chunk always makes C rounds."""
        return self.fixed_loops or self.filled_lists

    def offsets(self, lists: int) -> WordOffsets:
        """Where words stand in a slot that has so many lists of records."""
        return WordOffsets(self.chunk, lists, self.alignment)

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
        if not self.chunk:
            return self.completed(spec).vmem_bytes(spec)
        records = records_of(spec.layout)
        opened = 1 if spec.accumulate else len(spec.layout.dtypes)
        return self._bytes(records, 1 + records.planes, opened, len(records.shifts))

    def lookup_bytes(self, layout: Layout) -> int:
        """What a lookup keeps there: the rows of one plane."""
        return self._bytes(records_of(layout), 1, 1, 1)

    def _bytes(self, records: RowRecords, tiles: int, opened: int, lists: int) -> int:
        """Counts the tiles of rows, the words, and the rows of an open run."""
        buffers = tiles * SLOTS * self.chunk * records.width
        words = WORD_SLOTS * (self.offsets(lists).size + self.chunk + WINDOW)
        opened *= records.blocks * records.width
        return 4 * (buffers + words + opened + 3 * self.share_words + 5 * WINDOW)

    @classmethod
    def interpreted(cls, num_ids: int, **forms: Any) -> "Config":
        """Whole records as vectors, which is quick; few workers, but more than one."""
        chunk = 16 if num_ids <= 1024 else 64
        forms["streams"] = 1
        return cls(1, 4, LANES, chunk, **forms)

    @classmethod
    def choose(cls, spec: UpdateSpec, **forms: Any) -> "Config":
        """The largest chunk that each subcore's share of N fills and its memory holds.

        A long chunk costs less: what happens once a chunk is spread over more rows.
        For rows of 128 words that makes 40 on v6e, and 80 on v5p and 7x, which have
        twice the memory. Where there is nothing to compile for it is `interpreted`.

        Args:
            spec: of the update.
            forms: fields of `SAFE_FORMS`.
        """
        if absent() is not None:
            return cls.interpreted(spec.num_ids, **forms)
        return cls._longest(
            spec.num_ids, lambda config: config.vmem_bytes(spec), **forms
        )

    @classmethod
    def for_lookup(cls, num_ids: int, layout: Layout) -> "Config":
        """The same for a lookup, whose chunk is 128."""
        return cls._longest(num_ids, lambda config: config.lookup_bytes(layout))

    @classmethod
    def _longest(
        cls, num_ids: int, needs: Callable[["Config"], int], **forms: Any
    ) -> "Config":
        info = chips.in_scope().sparse_core
        step = max(info.num_lanes, MARGIN)
        workers = info.num_cores * info.num_subcores
        chunk = step * pl.cdiv(max(pl.cdiv(num_ids, workers), WINDOW), step)
        chunk = min(chunk, MAX_CHUNK)
        while True:
            config = cls(
                info.num_cores, info.num_subcores, info.num_lanes, chunk, **forms
            )
            if needs(config) <= _capacity():
                return config
            chunk -= step

    def check(self, spec: UpdateSpec) -> None:
        """Raises a ValueError if it does not fit the update or the TPU in scope."""
        if self.filled_lists and not (spec.accumulate or self.row_copies):
            raise ValueError(
                "filled_lists=True needs use_gradient_accumulation=True, which writes "
                "the rows of a chunk side by side: pass row_copies=True instead"
            )
        needed, chosen = self.vmem_bytes(spec), type(self).choose(spec, **self.forms)
        check_fits(self, needed, _capacity(), "each subcore", chosen)


def _capacity() -> int:
    """Bytes of a subcore of the TPU in scope; the compiler wants some for itself."""
    return chips.in_scope().sparse_core.vmem_capacity_bytes - 1024


def least_width() -> int:
    """Returns the words of the narrowest record: a vector, or a granule if larger."""
    info = chips.in_scope().sparse_core
    if info is None:
        return GRANULE
    return max(GRANULE, info.num_lanes, info.dma_granule_size_bytes // 4)


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
