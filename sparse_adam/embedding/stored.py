"""A table with its slots, as it is stored: three arrays, or one packed one.

Everything outside sees logical arrays `[V, D]`; here is the only place that knows both.
"""

from collections.abc import Sequence
from typing import Any

import jax

from sparse_adam.kernels.layout import PlainLayout
from sparse_adam.ops.combine import Samples, combine
from sparse_adam.ops.lookup import lookup_plain
from sparse_adam.ops.packed import PackedTable


def rows(stored: Any, ids: jax.Array) -> jax.Array:
    """Returns the weights of rows: `[N, D]`, zeros where an id is below 0."""
    if isinstance(stored, PackedTable):
        return stored.lookup(ids)
    return lookup_plain(stored[0], ids)


def combined_rows(
    stored: Any, samples: Samples, num_samples: int, *, ascending: bool
) -> jax.Array:
    """Returns the combined rows of each sample: `[S, D]`; see `Samples`."""
    if isinstance(stored, PackedTable):
        array, layout = stored.lines, stored.layout
    else:
        array = stored[0]
        layout = PlainLayout.of_weights(array)
    return combine(array, samples, num_samples, layout=layout, ascending=ascending)


def arrays(stored: Any) -> tuple[jax.Array, ...]:
    """Returns the table and its slots, `[V, D]` each."""
    return stored.unpack() if isinstance(stored, PackedTable) else tuple(stored)


def weights(stored: Any) -> jax.Array:
    """Returns the weights `[V, D]` of a stored table, without its slots."""
    return arrays(stored)[0]


def with_arrays(stored: Any, new: Sequence[jax.Array]) -> Any:
    """Returns the like of `stored` with these arrays, sharded as it is."""
    if isinstance(stored, PackedTable):
        packed = PackedTable.pack(*new)
        return PackedTable(
            jax.device_put(packed.lines, stored.lines.sharding), packed.layout
        )
    placed = [
        jax.device_put(x, old.sharding) for x, old in zip(new, stored, strict=True)
    ]
    make = getattr(stored, "_make", tuple)
    return make(placed)
