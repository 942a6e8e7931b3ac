"""From which share of looked-up rows on the sweep is faster than a row kernel.

The time of a row kernel grows with the batch. That of the sweep begins at reading and
writing the whole table, and grows more slowly. Per row of the table, with s occurrences
of ids for each, it is the larger of what has to be issued and what has to be moved:

    row kernel:  t groups of rows fetched, updated and written; s gradients summed
    sweep:       the table read, updated and written;           s gradients added

Of ids drawn at random, t = (1 - exp(-s P)) / P groups of P rows are met.

Instructions are bundles of the compiled programs over the clock; those of the tests
`tests/kernels/*/test_compiled.py`, which pin most of them.
Bytes are divided by what a stream through the core attains of the bandwidth. No TPU was
at hand to measure a time.
"""

import math
from typing import NamedTuple

from sparse_adam.kernels import chips
from sparse_adam.kernels.spec import UpdateSpec
from sparse_adam.kernels.tiles import LANES

_ATTAINABLE = 0.8  # of the peak, in XLA's own estimates of such streams


class _RowKernel(NamedTuple):
    """Bundles of the TensorCore's row kernel."""

    plain: tuple[float, float]  # fetch, update and write back a row
    packed: tuple[float, float]  # and a group of rows
    summed: tuple[float, float]  # fetch and sum a gradient
    shared: float  # the same where rows share lines


class _Sweep(NamedTuple):
    """Bundles of the sweep."""

    added: tuple[float, float]  # fetch and add a gradient
    shared: float  # the same where rows share lines
    line: float  # update 128 weights with their slots; of bfloat16 the packed ones


# jax 0.10.2, libtpu 0.0.42.1. Two numbers are for D up to 128 and for wider rows, whose
# gradients, and in plain storage rows, are not contiguous; beyond, the bytes grow.
_ROW_KERNEL = {
    "v4": _RowKernel((17.1, 36.6), (10.1, 11.1), (11.9, 24.5), 18.7),
    "v5e": _RowKernel((23.4, 42.1), (12.1, 12.8), (12.1, 22.0), 16.6),
    "v5p": _RowKernel((21.0, 38.9), (11.1, 11.9), (12.2, 21.7), 16.7),
    "v6e": _RowKernel((20.2, 38.2), (10.5, 11.2), (12.0, 21.4), 16.2),
    "7x": _RowKernel((19.9, 38.1), (10.4, 11.1), (12.3, 21.5), 16.7),
}
_SWEEP = {
    "v4": _Sweep((12.1, 31.0), 14.1, 1.7),
    "v5e": _Sweep((12.2, 26.6), 14.9, 0.9),
    "v5p": _Sweep((12.4, 25.7), 14.5, 0.9),
    "v6e": _Sweep((12.4, 27.2), 14.4, 0.6),
    "7x": _Sweep((12.2, 27.1), 14.2, 0.6),
}
_SLOWEST = "v4"  # for a TPU that nobody has named


def crossover(spec: UpdateSpec, rows: str) -> float:
    """The share N / V from which on the sweep is faster than a row kernel, in percents
    of the table; infinity if that is not so even where N = V.

    Where ids repeat more often than random ones do, the batch touches fewer rows and
    the row kernel may still be faster: name it then.

    Args:
        spec: what to update; its number of ids does not matter.
        rows: the row kernel, "tensorcore" or "sparsecore".
    """
    if rows not in ("tensorcore", "sparsecore"):
        raise ValueError(f"{rows=} must be 'tensorcore' or 'sparsecore'")
    for percent in range(1, 101):
        share = percent / 100
        if _sweep(spec, share) <= _row_kernel(spec, rows, share):
            return share
    return math.inf


def _sweep(spec: UpdateSpec, share: float) -> float:
    """Nanoseconds for each row of the table."""
    bundles = _SWEEP.get(chips.in_scope().name, _SWEEP[_SLOWEST])
    per_group, blocks = spec.layout.rows_per_group, spec.layout.blocks
    added = bundles.shared if per_group > 1 else bundles.added[blocks > 1]
    return _time(
        bundles.line * blocks / per_group + share * added,
        2 * spec.layout.group_bytes / per_group + share * 4 * LANES * blocks,
    )


def _row_kernel(spec: UpdateSpec, rows: str, share: float) -> float:
    """Nanoseconds for each row of the table."""
    bundles = _ROW_KERNEL.get(chips.in_scope().name, _ROW_KERNEL[_SLOWEST])
    per_group, blocks = spec.layout.rows_per_group, spec.layout.blocks
    gradient = 4 * LANES * blocks
    if rows == "sparsecore":
        # It moves single rows. The clock of its subcores is not published, so that only
        # its bytes are known.
        touched = -math.expm1(-share)
        moved = touched * 2 * spec.layout.group_bytes + share * gradient
        return _time(0.0, moved / per_group)
    touched = -math.expm1(-share * per_group) / per_group
    group = getattr(bundles, spec.layout.storage)
    summed = bundles.shared if per_group > 1 else bundles.summed[blocks > 1]
    return _time(
        touched * group[blocks > 1] + share * summed,
        touched * 2 * spec.layout.group_bytes + share * gradient,
    )


def _time(bundles: float, num_bytes: float) -> float:
    """Nanoseconds at least."""
    chip = chips.in_scope()
    moving = num_bytes / (_ATTAINABLE * chip.hbm_gb_per_s)
    return max(bundles / chip.clock_ghz, moving)
