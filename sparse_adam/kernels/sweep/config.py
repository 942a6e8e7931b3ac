"""Block sizes of the sweep kernel, and why they are what they are."""

import dataclasses
from typing import Any, ClassVar

from sparse_adam.kernels import chips
from sparse_adam.kernels.costs import check_fits
from sparse_adam.kernels.forms import SafeForms
from sparse_adam.kernels.spec import UpdateSpec
from sparse_adam.kernels.tiles import LANES, SUBLANES

STATE_SLOTS = 3  # of table blocks: one arrives, one is updated, one leaves
GRADIENT_SLOTS = 2  # of gradient chunks: one arrives, one is added
INDEX_SLOTS = 3  # of their indices: one arrives, one says what to fetch, one where to
TILE = 4 * SUBLANES  # groups computed together; 8 * SUBLANES costs 5 % more on v4
TILES = 16  # updated in one iteration; one each costs 12 % (v4) to 74 % (7x) more
BATCH = 2 * SUBLANES  # occurrences added at a time; 1 * SUBLANES costs 20 % more
_BLOCK_BYTES = 3 * 2**19  # of all arrays of a block
_CHUNK_BYTES = 2**17  # of the gradients of a chunk
_COMPILER_BYTES = 2**20  # what the compiler may want for itself
_COMPILER_LIMIT = 2**24  # what it allows a kernel on every TPU


@dataclasses.dataclass(frozen=True, slots=True)
class Config(SafeForms):
    """Block sizes. They change speed and nothing else: not one bit of the result.

    A group is a row of plain arrays, or the rows of a packed table that share lines.

    Attributes:
        groups_per_block: a power of two from 16 on.
        occurrences_per_chunk: gradients fetched ahead, a power of two from 16 on.
        unroll: occurrences in one iteration of a loop over them, up to 16.
        cores: TensorCores that share the blocks; None for those of the TPU in scope.
        checks: whether the compiler adds its checks of addresses and of semaphores.
            A gradient then takes twice as many bundles. In `SAFE_FORMS`, for a TPU that
            does not do what its compiler promises.
    """

    groups_per_block: int = 1024
    occurrences_per_chunk: int = 256
    unroll: int = BATCH
    cores: int | None = None
    checks: bool = False

    SAFE_FORMS: ClassVar[dict[str, Any]] = {"checks": True}

    def __post_init__(self) -> None:
        for name in ("groups_per_block", "occurrences_per_chunk"):
            size = getattr(self, name)
            if size < BATCH or size & (size - 1):
                raise ValueError(f"{name}={size} must be a power of two >= {BATCH}")
        if not 1 <= self.unroll <= BATCH:
            raise ValueError(f"unroll={self.unroll} must be 1 to {BATCH}")
        if self.cores is not None and self.cores < 1:
            raise ValueError(f"cores={self.cores} must be at least 1, or None")

    @property
    def index_line(self) -> int:
        """Places for the indices of a chunk: a DMA moves whole lines of 128 words."""
        return max(self.occurrences_per_chunk, LANES)

    def vmem_bytes(self, spec: UpdateSpec) -> int:
        """What the kernel keeps in VMEM."""
        groups, chunk = self.groups_per_block, self.occurrences_per_chunk
        state = STATE_SLOTS * groups * spec.layout.group_bytes
        # The sums of a block and a row for what is of other blocks; gradients.
        rows = groups + SUBLANES + GRADIENT_SLOTS * chunk
        return state + 4 * rows * spec.layout.blocks * LANES

    def needed_bytes(self, spec: UpdateSpec) -> int:
        """That, and what the compiler wants for itself."""
        return self.vmem_bytes(spec) + _COMPILER_BYTES

    def vmem_limit(self, spec: UpdateSpec) -> int | None:
        """What the compiler must be told to allow for, if its own limit is too low."""
        needed = self.needed_bytes(spec)
        return needed if needed > _COMPILER_LIMIT else None

    def check(self, spec: UpdateSpec) -> None:
        """Raises a ValueError if a block does not fit the TPU in scope."""
        chip, needed = chips.in_scope(), self.needed_bytes(spec)
        memory = f"VMEM of {chip.name}"
        chosen = type(self).choose(spec, **self.forms)
        check_fits(self, needed, chip.vmem_bytes, memory, chosen)

    @classmethod
    def choose(cls, spec: UpdateSpec, **forms: Any) -> "Config":
        """Blocks of up to 1.5 MiB and chunks of up to 128 KiB, none larger than needed.

        A block arrives while the one before it leaves: 3 MiB in flight. Half a
        microsecond of latency at 7x's 3,690 GB/s asks for 1.8 MB.

        Args:
            spec: of the update.
            forms: fields of `SAFE_FORMS`.
        """
        layout = spec.layout
        block = _BLOCK_BYTES // layout.group_bytes
        chunk = _CHUNK_BYTES // (4 * layout.blocks * LANES)
        return cls(
            _power_of_two(min(block, 2 * layout.num_groups - 1)),
            _power_of_two(min(chunk, 2 * spec.num_ids - 1)),
            **forms,
        )


def _power_of_two(bound: int) -> int:
    """The largest up to `bound`, but not less than a batch."""
    return max(BATCH, 1 << (max(bound, 1).bit_length() - 1))
