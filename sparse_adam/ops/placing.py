"""From the logical order of a table's rows to where they stand on devices, and back.

In logical order each of n devices has `ceil(V / n)` rows of a table, one range behind
the other; where tables are stored, row R of an array is on device R mod n. Both ways
take one all-to-all of what a device has. The functions here are called on each device,
in a `jax.shard_map`. None of them makes an array of more than a part and 2 n rows.
"""

import jax
import jax.numpy as jnp
from jax import lax

Axes = tuple[str, ...]


def write(
    own: jax.Array, part: jax.Array, axes: Axes, start: int, num_rows: int
) -> jax.Array:
    """Writes the rows of a table into an array whose rows are interleaved.

    Args:
        own: `[size, ...]`, this device's rows of the array.
        part: `[ceil(V / n), ...]`, its range of the rows of the table.
        axes: of the mesh, over which both are spread.
        start: the row of the array where the table begins.
        num_rows: V.

    Returns:
        The new `own`.
    """
    count, me, size = lax.axis_size(axes), lax.axis_index(axes), part.shape[0]
    width = _width(size, count)
    aligned = lax.dynamic_update_slice_in_dim(
        jnp.zeros((width * count, *part.shape[1:]), part.dtype),
        part,
        lax.rem(me * size + start, count),
        0,
    )
    hands = aligned.reshape(width, count, *part.shape[1:])
    arrived = lax.all_to_all(hands, axes, 1, 0).reshape(aligned.shape)
    first, end = start // count, -(-(start + num_rows) // count)
    local = lax.iota(jnp.int32, end - first) + first
    row = local * count + me - start
    source = jnp.clip(lax.div(row, size), 0, count - 1)
    place = source * width + local - lax.div(source * size + start, count)
    found = arrived.at[place].get(mode="clip")
    there = ((row >= 0) & (row < num_rows)).reshape(-1, *(1,) * (part.ndim - 1))
    new = jnp.where(there, found, own[first:end])
    return lax.dynamic_update_slice_in_dim(own, new, first, 0)


def write_constant(
    own: jax.Array, value: float, axes: Axes, start: int, num_rows: int
) -> jax.Array:
    """Writes one number into the rows of a table, by the arguments of `write`."""
    row = lax.iota(jnp.int32, own.shape[0]) * lax.axis_size(axes) + lax.axis_index(axes)
    there = (row >= start) & (row < start + num_rows)
    there = there.reshape(-1, *(1,) * (own.ndim - 1))
    return jnp.where(there, jnp.asarray(value, own.dtype), own)


def read(own: jax.Array, axes: Axes, start: int, num_rows: int) -> jax.Array:
    """Returns this device's range of the rows of a table, `[ceil(V / n), ...]`.

    It undoes `write`, and takes its arguments. Behind the last row are zeros.
    """
    count, me = lax.axis_size(axes), lax.axis_index(axes)
    size = -(-num_rows // count)
    width = _width(size, count)
    begins = lax.div(lax.iota(jnp.int32, count) * size + start, count)
    local = begins[:, None] + lax.iota(jnp.int32, width)[None]
    arrived = lax.all_to_all(own.at[local].get(mode="clip"), axes, 0, 0)
    row = lax.iota(jnp.int32, size) + me * size + start
    place = lax.rem(row, count) * width + lax.div(row, count) - begins[me]
    found = arrived.reshape(-1, *own.shape[1:]).at[place].get(mode="clip")
    there = (row < start + num_rows).reshape(-1, *(1,) * (own.ndim - 1))
    return jnp.where(there, found, jnp.zeros_like(found))


def _width(size: int, count: int) -> int:
    """Returns the rows that one device can have for another one, of `size` in a row."""
    return -(-(size + count - 1) // count)
