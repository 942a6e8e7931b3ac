"""Block sizes of the TensorCore kernel, and why they are what they are."""

import dataclasses
from typing import Any, ClassVar

from sparse_adam.kernels import chips
from sparse_adam.kernels.chips import VMEM_BUDGET
from sparse_adam.kernels.costs import check_fits
from sparse_adam.kernels.forms import SafeForms
from sparse_adam.kernels.spec import UpdateSpec
from sparse_adam.kernels.tiles import LANES, SUBLANES

SLOTS = 3  # of chunk buffers: one arrives, one is computed, one leaves


@dataclasses.dataclass(frozen=True, slots=True)
class Config(SafeForms):
    """Block sizes. They change speed, and the grouping in which a run is summed.

    Attributes:
        rows_per_chunk: occurrences in a chunk, a power of two from 8 on.
        dma_unroll: rows per iteration of a DMA loop; 8 costs 3 % more bundles than 16.
        cores: TensorCores that share the occurrences, 1 or 2; None for those of the TPU
            in scope.
        checks: whether the compiler adds its checks of addresses and of semaphores.
            A row then takes three (packed) to five times as many bundles. In
            `SAFE_FORMS`, for a TPU that does not do what its compiler promises.
    """

    rows_per_chunk: int = 256
    dma_unroll: int = 16
    cores: int | None = None
    checks: bool = False

    SAFE_FORMS: ClassVar[dict[str, Any]] = {"checks": True}

    def __post_init__(self) -> None:
        rows, unroll = self.rows_per_chunk, self.dma_unroll
        if rows < SUBLANES or rows & (rows - 1):
            raise ValueError(f"rows_per_chunk={rows} must be a power of two >= 8")
        if unroll < 1:
            raise ValueError(f"dma_unroll={unroll} must be at least 1")
        if self.cores not in (None, 1, 2):
            raise ValueError(f"cores={self.cores} must be 1, 2 or None")

    def vmem_bytes(self, spec: UpdateSpec) -> int:
        """Returns what the kernel keeps in VMEM."""
        rows, layout = self.rows_per_chunk, spec.layout
        gradient, state = layout.blocks * LANES, layout.group_bytes // 4
        # Of one value a row, spread over 128 lanes: two for sums, one to mark rows
        # that share lines, and three for each slot that is per row (in, out twice).
        columns = 2 + (spec.accumulate and layout.rows_per_group > 1)
        columns += 3 * sum(layout.per_row)
        buffers = SLOTS * (gradient + state) + columns * LANES
        # A run that chunks share, at most.
        carried = SUBLANES * (len(layout.dtypes) * gradient + state)
        return 4 * (rows * buffers + carried)

    def check(self, spec: UpdateSpec) -> None:
        """Raises a ValueError if a chunk does not fit the TPU in scope."""
        chip, needed = chips.in_scope(), self.vmem_bytes(spec)
        memory = f"VMEM of {chip.name}"
        chosen = type(self).choose(spec, **self.forms)
        check_fits(self, needed, chip.vmem_bytes, memory, chosen)

    @classmethod
    def choose(cls, spec: UpdateSpec, **forms: Any) -> "Config":
        """Returns the largest chunk up to 256 rows that N fills and the budget holds.

        A chunk of 256 keeps 1,792 row DMAs of three plain tables in flight, or 512 of
        4 lines packed; half a microsecond of latency at v6e's 1,640 GB/s asks for 1,600
        lines of 512 bytes.

        Args:
            spec: of the update.
            forms: fields of `SAFE_FORMS`.
        """
        rows = 256
        while rows > SUBLANES and (
            rows >= 2 * spec.num_ids or cls(rows).vmem_bytes(spec) > VMEM_BUDGET
        ):
            rows //= 2
        return cls(rows, **forms)
