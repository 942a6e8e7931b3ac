"""Tables of a stack whose rows are spread, out of it and into it, never whole.

Row s of an interleaved stack is on device s mod n, at place s // n of its part. Here
a table [start, start + V) of the stack is in logical order: device d has the L rows
from d * L on, L = ceil(V / n), and zeros behind row V.

Between the two, device d and device e have the rows s = e (mod n) of the range that
begins at d * L in common: every n-th one from place `_first(...)` of e's part on, at
most ceil(L / n) of them. One all-to-all of equal parts moves them.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from sparse_adam.ops.spread import Spread


def logical_rows(spread: Spread, num_rows: int) -> int:
    """Returns n * L: the rows of a table of V rows that is spread in logical order."""
    return spread.count * -(-num_rows // spread.count)


def cut_out(
    stored: jax.Array, *, spread: Spread, start: int, num_rows: int
) -> jax.Array:
    """Returns rows of a stack in logical order, spread: `[n * L, ...]`.

    Args:
        stored: a stack, `[n * part, ...]`, interleaved.
        spread: its devices.
        start: the row of the stack where the table begins.
        num_rows: V.
    """
    count = spread.count
    size = logical_rows(spread, num_rows) // count
    places = jnp.arange(-(-size // count))[None]

    def collect(own: jax.Array) -> jax.Array:
        here, others = lax.axis_index(spread.axes), jnp.arange(count)[:, None]
        sent = _first(count, here, start + size * others) + places
        own = own.at[sent].get(mode="fill", fill_value=0)
        own = lax.all_to_all(own, spread.axes, 0, 0)
        rows = size * here + jnp.arange(size)
        owner = (start + rows) % count
        place = (start + rows) // count - _first(count, owner, start + size * here)
        place = jnp.where(rows < num_rows, place, places.size)
        return own.at[owner, place].get(mode="fill", fill_value=0)

    return spread.map(collect, (spread.spec,), spread.spec)(stored)


def join(
    tables: Sequence[jax.Array],
    *,
    spread: Spread,
    starts: tuple[int, ...],
    sizes: tuple[int, ...],
    part_rows: int,
) -> jax.Array:
    """Returns the stack that `cut_out` cuts these tables out of.

    Args:
        tables: in logical order, spread: `[n * L, ...]` each.
        spread: the devices.
        starts: the row of the stack where each begins.
        sizes: V of each.
        part_rows: rows of a device's part of the stack; zeros where no table is.
    """
    count = spread.count

    def interleave(parts: Sequence[jax.Array]) -> jax.Array:
        here, others = lax.axis_index(spread.axes), jnp.arange(count)[:, None]
        joined = jnp.zeros((part_rows, *parts[0].shape[1:]), parts[0].dtype)
        for own, start, num_rows in zip(parts, starts, sizes, strict=True):
            size = len(own)
            places = jnp.arange(-(-size // count))[None]
            begin = start + size * here
            sent = others + count * (_first(count, others, begin) + places) - begin
            own = own.at[jnp.where(sent < 0, size, sent)].get(mode="fill", fill_value=0)
            own = lax.all_to_all(own, spread.axes, 0, 0)
            rows = here + count * jnp.arange(part_rows) - start
            source = rows // size
            place = jnp.arange(part_rows) - _first(count, here, start + size * source)
            inside = (rows >= 0) & (rows < num_rows)
            found = own.at[source, jnp.where(inside, place, places.size)].get(
                mode="fill", fill_value=0
            )
            inside = inside.reshape(-1, *[1] * (joined.ndim - 1))
            joined = jnp.where(inside, found, joined)
        return joined

    return spread.map(interleave, ([spread.spec] * len(tables),), spread.spec)(
        list(tables)
    )


def _first(count: int, device: jax.Array, row: jax.Array) -> jax.Array:
    """Returns the place of the first row on a device that is not before `row`."""
    return (row - device + count - 1) // count
