"""The least time that a row can take on a chip, and what sets it.

All three bounds count what the compiled program holds and nothing that happens when it
runs: no wait for memory, no stall. The time is above the largest of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.static.chips import SLOTS, AnalyzedChip

_FULL = 0.9  # of the bundles hold as much arithmetic as they can: then it is the limit


@dataclass(frozen=True, slots=True)
class Roofline:
    """Nanoseconds for one row of one device, at least."""

    issue_ns: float  # one bundle a cycle
    compute_ns: float  # the busiest kind of vector operation, packed perfectly
    hbm_ns: float  # bytes at the peak bandwidth

    @property
    def bound_ns(self) -> float:
        """The largest of them."""
        return max(self.issue_ns, self.compute_ns, self.hbm_ns)

    @property
    def limit(self) -> str:
        """Which one: "hbm", "issue", or "compute" where it fills the bundles."""
        if self.hbm_ns >= self.issue_ns:
            return "hbm"
        return "compute" if self.compute_ns >= _FULL * self.issue_ns else "issue"

    def to_json(self) -> dict[str, Any]:
        """The bounds, and what they come to."""
        return asdict(self) | {"bound_ns": self.bound_ns, "limit": self.limit}


def estimate(
    kernels: Sequence[tuple[str, float, Mapping[str, float]]],
    bytes_per_row: float,
    chip: AnalyzedChip,
    cores: int = 1,
) -> Roofline:
    """The bounds of a program from what it issues for each row.

    Args:
        kernels: of each its engine, its bundles and delays for a row, and its
            operations for a row by slot. The subcores of a chip share the rows; kernels
            run one after the other.
        bytes_per_row: between HBM and the chip.
        chip: whose clock and bandwidth count.
        cores: TensorCores that share the rows.
    """
    shares = {"tensorcore": cores, "subcore": max(1, chip.subcores)}
    issue = compute = 0.0
    for engine, cycles, used in kernels:
        busiest = max(
            used.get(slot, 0) / width for slot, width in SLOTS[engine].items()
        )
        issue += cycles / shares[engine]
        compute += busiest / shares[engine]
    return Roofline(
        issue / chip.clock, compute / chip.clock, bytes_per_row / chip.bandwidth
    )
