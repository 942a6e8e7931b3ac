"""The tile that a TPU computes with, and loops over rows of tiles inside a kernel."""

from collections.abc import Callable

import jax
from jax import lax
from jax.experimental import pallas as pl

from sparse_adam._types import Ref

LANES = 128
SUBLANES = 8


def for_each(
    count: int | jax.Array, body: Callable[[jax.Array], None], unroll: int
) -> None:
    """Calls `body(i)` for i in [0, count), `unroll` to an iteration while they last."""
    done = 0
    if unroll > 1:
        groups = count // unroll if isinstance(count, int) else lax.div(count, unroll)
        done = groups * unroll

        def group(g: jax.Array, _: None) -> None:
            for i in range(unroll):
                body(g * unroll + i)

        lax.fori_loop(0, groups, group, None)
    lax.fori_loop(done, count, lambda i, _: body(i), None)


def for_each_tile(
    count: int | jax.Array, body: Callable[[pl.Slice], None], rows: int
) -> None:
    """Calls `body(rows)` for tiles of `rows` rows until `count` rows are covered."""
    tiles = pl.cdiv(count, rows)

    def tile(i: jax.Array, _: None) -> None:
        body(pl.Slice(pl.multiple_of(i * rows, rows), rows))

    lax.fori_loop(0, tiles, tile, None)


def spread(values: Ref, column: Ref) -> None:
    """Puts one value into all lanes of each row: [C] to [C, 128]."""
    column[...] = lax.broadcast_in_dim(values[...], column.shape, (0,))
