"""From which share of looked-up rows on the sweep is faster than a row kernel.

The time of a row kernel grows with the batch. That of the sweep begins at reading and
writing the whole table, and grows more slowly. Per row of the table, with s occurrences
of ids for each, it is the larger of what has to be issued and what has to be moved:

    row kernel:  t groups of rows fetched, updated and written; s gradients fetched, of
                 which s - t are added to others
    sweep:       the table read, updated and written;           s gradients added

Of ids drawn at random, t = (1 - exp(-s P)) / P groups of P rows are met.

Instructions are bundles of the compiled programs over the clock. They are in the file
`bundles.json`, which `python -m benchmarks bundles` writes, and with `--check` compares
with the programs of the libtpu at hand. Bytes are divided by what a stream through the
core attains of the bandwidth. No TPU was at hand to measure a time.
"""

import functools
import json
import math
from importlib import resources
from typing import NamedTuple

from sparse_adam.kernels import chips
from sparse_adam.kernels.layout import Layout
from sparse_adam.kernels.spec import UpdateSpec
from sparse_adam.kernels.tiles import LANES

_FILE = resources.files("sparse_adam.kernels.sweep").joinpath("bundles.json")
_ATTAINABLE = 0.8  # of the peak, in XLA's own estimates of such streams


class _RowKernelBundles(NamedTuple):
    """Bundles of the TensorCore's row kernel."""

    plain: tuple[float, float]  # fetch, update and write back a row
    packed: tuple[float, float]  # and a group of rows
    gradient: tuple[float, float]  # fetch a gradient
    gradient_shared: float  # and put it into its place, where rows share lines
    repeated: tuple[float, float]  # add it to another one
    repeated_shared: float  # the same where rows share lines


class _SweepBundles(NamedTuple):
    """Bundles of the sweep."""

    added: tuple[float, float]  # fetch and add a gradient
    shared: float  # the same where rows share lines
    line: float  # update 128 weights with their slots; of bfloat16 the packed ones


@functools.cache
def _bundles() -> tuple[dict[str, _RowKernelBundles], dict[str, _SweepBundles]]:
    """Reads the bundles of both kernels, by chip.

    Two numbers are for D up to 128 and for wider rows, whose gradients, and in plain
    storage rows, are not contiguous; beyond, the bytes grow. The file is read when a
    choice needs it, so that the kernels can be compiled and counted without it.
    """
    found = json.loads(_FILE.read_text())
    rows = {
        chip: _RowKernelBundles(
            plain=tuple(each["plain"]),
            packed=tuple(each["packed"]),
            gradient=tuple(each["gradient"]),
            gradient_shared=each["gradient_shared"],
            repeated=tuple(each["repeated"]),
            repeated_shared=each["repeated_shared"],
        )
        for chip, each in found["row_kernel"].items()
    }
    sweep = {
        chip: _SweepBundles(
            added=(
                each["fetched"][0] + each["added"][0],
                each["fetched"][1] + each["added"][1],
            ),
            shared=each["fetched"][0] + each["added_shared"],
            line=each["updated_packed_bfloat16"],
        )
        for chip, each in found["sweep"].items()
    }
    return rows, sweep


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
    return _crossover(spec.layout, rows, chips.in_scope())


@functools.lru_cache(maxsize=1024)
def _crossover(layout: Layout, rows: str, chip: chips.Chip) -> float:
    """Returns the same for a layout and a chip: users call updates one by one."""
    for percent in range(1, 101):
        share = percent / 100
        if _sweep(layout, chip, share) <= _row_kernel(layout, chip, rows, share):
            return share
    return math.inf


def _sweep(layout: Layout, chip: chips.Chip, share: float) -> float:
    """Nanoseconds for each row of the table."""
    _, found = _bundles()
    bundles = found.get(chip.name, found[_SLOWEST])
    per_group, blocks = layout.rows_per_group, layout.blocks
    added = bundles.shared if per_group > 1 else bundles.added[blocks > 1]
    return _time(
        chip,
        (bundles.line * blocks / per_group + share * added) / chip.cores,
        2 * layout.group_bytes / per_group + share * 4 * LANES * blocks,
    )


def _row_kernel(layout: Layout, chip: chips.Chip, rows: str, share: float) -> float:
    """Nanoseconds for each row of the table."""
    found, _ = _bundles()
    bundles = found.get(chip.name, found[_SLOWEST])
    per_group, blocks = layout.rows_per_group, layout.blocks
    gradient_bytes = 4 * LANES * blocks
    if rows == "sparsecore":
        # It moves single rows. The clock of its subcores is not published, so that only
        # its bytes are known.
        touched = -math.expm1(-share)
        moved = touched * 2 * layout.group_bytes + share * gradient_bytes
        return _time(chip, 0.0, moved / per_group)
    touched = -math.expm1(-share * per_group) / per_group
    group = getattr(bundles, layout.storage)
    if per_group > 1:
        fetched, added = bundles.gradient_shared, bundles.repeated_shared
    else:
        fetched, added = bundles.gradient[blocks > 1], bundles.repeated[blocks > 1]
    issued = touched * group[blocks > 1] + share * fetched + (share - touched) * added
    moved = touched * 2 * layout.group_bytes + share * gradient_bytes
    return _time(chip, issued / chip.cores, moved)


def _time(chip: chips.Chip, bundles: float, num_bytes: float) -> float:
    """Nanoseconds at least."""
    moving = num_bytes / (_ATTAINABLE * chip.hbm_gb_per_s)
    return max(bundles / chip.clock_ghz, moving)
