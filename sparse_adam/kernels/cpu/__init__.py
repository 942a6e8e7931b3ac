"""Adam on the rows of a table, on a CPU, as a custom call in C++: every mode.

Why: XLA's CPU scatter makes the portable path some thirty times slower than the memory
is. This kernel sorts the ids itself, on only the bits that V needs, then touches what
the batch touched: each gradient row is read once, straight through the sort, and each
updated row of the three arrays is read once and written once, in place. Nothing is
materialised in between (`bytes_moved`).

Storage: the library knows neither plain arrays nor lines, only where the rows of w, m
and v begin, how far they are apart and how their numbers are encoded (`_places`). Plain
arrays are one group of V rows. So one code serves both storages, bit for bit alike.

Data flow (`update.cc`): the sorted occurrences are cut into blocks of 128, which
the threads of XLA's own pool share. A block sums its runs of equal ids in the
first-level cache and steps their rows at once, while the rows of the next occurrences
are being fetched. A run that several blocks share is summed in parts, and stepped by
the block where it begins: a hot row does not hold up one thread. Without accumulation
the block where a run begins makes all its steps, one after the other.

Order: the blocks depend on N, never on the threads. Within a block a run is added up in
the order of the batch, then block by block. Same call, same bits, on any number of
threads and, as no operation is contracted or reordered, with any instruction set.

Numerics: float32 between one read and one rounding per row and call, to the nearest or
with the noise of `rounding`; IEEE root and division. A lane sees no other, so a NaN
stays where it is.

The formula stands here a third time, in `loops.inc`: `adam_tile` is traced by JAX
and cannot be called from C++, and the NumPy loop is no program at all. The contract's
tests (`tests/ops/test_sparse_adam.py`) hold all three together, mode by mode.

Needs: what `unsupported` says, which is only that the library was built. It checks
every id and source itself and skips the wild ones; the ids need not be sorted, and are
not sorted again when they are. It is loaded when first asked for, and knows no Python.
"""

from sparse_adam.kernels.cpu.update import (
    ENCODINGS,
    LIBRARY,
    attributes,
    bytes_moved,
    cpu_update,
    unsupported,
)

__all__ = [
    "ENCODINGS",
    "LIBRARY",
    "attributes",
    "bytes_moved",
    "cpu_update",
    "unsupported",
]
