"""Block sizes of the TensorCore kernel, and why they are what they are."""

import dataclasses

LANES = 128
SUBLANES = 8
SLOTS = 3  # of chunk buffers: one arrives, one is computed, one leaves
VMEM_BUDGET = 8 * 2**20  # bytes; half of what v4, the smallest generation, has


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """Block sizes. They change speed, and the grouping in which a run is summed."""

    rows_per_chunk: int = 256
    dma_unroll: int = 16  # rows per iteration of a DMA loop; 8 costs 3 % more bundles

    def __post_init__(self) -> None:
        rows = self.rows_per_chunk
        if rows < SUBLANES or rows & (rows - 1):
            raise ValueError(f"rows_per_chunk={rows} must be a power of two >= 8")

    def vmem_bytes(self, dim: int) -> int:
        rows = self.rows_per_chunk
        buffers = SLOTS * 4 * rows * dim * 4  # gradient, w, m, v of every slot
        columns = 2 * rows * LANES * 4  # one value a row, spread over its lanes
        return buffers + columns

    @classmethod
    def choose(cls, num_ids: int, dim: int) -> "Config":
        """The largest chunk up to 256 rows that N fills and the budget holds.

        A chunk of 256 keeps 1,792 row DMAs in flight; half a microsecond of latency
        at v6e's 1,640 GB/s asks for 1,600 of 512 bytes.
        """
        rows = 256
        while rows > SUBLANES and (
            rows >= 2 * num_ids or cls(rows).vmem_bytes(dim) > VMEM_BUDGET
        ):
            rows //= 2
        return cls(rows)
