"""Loops over rows inside a kernel."""

from collections.abc import Callable
from typing import TypeAlias

import jax
from jax import lax
from jax.experimental import pallas as pl

Rows: TypeAlias = slice | pl.Slice  # of a Ref, as `pl.ds` makes it


def for_each(
    count: int | jax.Array, body: Callable[[jax.Array], None], unroll: int
) -> None:
    """Calls `body(i)` for i in [0, count), `unroll` to an iteration while they last."""
    groups = count // unroll if isinstance(count, int) else lax.div(count, unroll)

    def group(g: jax.Array, _: None) -> None:
        for i in range(unroll):
            body(g * unroll + i)

    lax.fori_loop(0, groups, group, None)
    lax.fori_loop(groups * unroll, count, lambda i, _: body(i), None)


def for_each_tile(
    count: int | jax.Array, body: Callable[[Rows], None], rows: int
) -> None:
    """Calls `body(slice)` for tiles of `rows` rows until `count` rows are covered."""
    tiles = pl.cdiv(count, rows)

    def tile(i: jax.Array, _: None) -> None:
        body(pl.ds(pl.multiple_of(i * rows, rows), rows))

    lax.fori_loop(0, tiles, tile, None)
