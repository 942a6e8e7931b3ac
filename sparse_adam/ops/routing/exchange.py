"""One exchange between all devices: slices of different sizes, buffers of one size.

Each device has an array in which the rows for each other device stand together. A
`Window` says which slice of them goes to whom, and where in the receiver's buffer it
arrives. `send` sends them; with `window.reversed()` it sends the answers back.

On a TPU that is `lax.ragged_all_to_all`: only what is in the slices travels. Other
backends have no such collective. There a slice is padded to a fixed number of rows and
all travel by `lax.all_to_all`. The platform is known when the program is lowered, and
the other way is left out then. Nothing but the collective is traced for both.

XLA for TPUs pads what travels to lines of 128 lanes, so a ragged exchange of single ids
would send 512 bytes for each. `swap`, which is for ids, sends messages of many.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparse_adam.ops.routing.varying import vary

Axes = tuple[str, ...]
LANES = 128


class Window(NamedTuple):
    """The slices that travel in one round, as one device sees them; all int32 `[n]`.

    Attributes:
        begin: where the slice for each device begins in this device's array.
        sent: how many rows it has.
        offsets: where it begins in the receiver's buffer.
        starts: where the slice from each device begins in this device's buffer.
        received: how many rows it has.
        origins: where it begins in the sender's array.
    """

    begin: jax.Array
    sent: jax.Array
    offsets: jax.Array
    starts: jax.Array
    received: jax.Array
    origins: jax.Array

    def reversed(self) -> "Window":
        """Returns the window by which answers go back to where the slices were."""
        return Window(
            begin=self.starts,
            sent=self.received,
            offsets=self.origins,
            starts=self.begin,
            received=self.sent,
            origins=self.offsets,
        )


def swap(messages: jax.Array, axes: Axes) -> jax.Array:
    """Sends message i of `[n, ...]` to device i; returns one from each, `[n, ...]`."""
    return lax.all_to_all(messages, axes, 0, 0, tiled=True)


def send(
    window: Window, rows: jax.Array, size: int, longest: int, axes: Axes
) -> jax.Array:
    """Sends the slices of an array to the devices along `axes`.

    Args:
        window: the slices.
        rows: `[N, ...]`, the array.
        size: the rows of the receiver's buffer.
        longest: the most rows that a slice can have.
        axes: of the mesh.

    Returns:
        The buffer `[size, ...]`. Where no slice was written it is zero.
    """

    def ragged(window: Window, rows: jax.Array) -> jax.Array:
        return by_ragged(window, rows, size, axes)

    def equal(window: Window, rows: jax.Array) -> jax.Array:
        return by_equal(window, rows, size, longest, axes)

    arrived = lax.platform_dependent(window, rows, tpu=ragged, default=equal)
    # JAX says that the ragged exchange keeps what it does not write. Do not rely on it.
    written = covered(window.starts, window.received, size)
    return jnp.where(written.reshape(-1, *(1,) * (rows.ndim - 1)), arrived, 0)


def by_ragged(window: Window, rows: jax.Array, size: int, axes: Axes) -> jax.Array:
    """Sends slices as they are. Rows outside of those received hold anything.

    Rows of D up to 64 travel several to a line of 128 lanes, to which XLA would pad
    each of them. For that, slice i is moved on so that it begins with a line: row r of
    it goes from `begin + r` to `(begin // rows_per_line + i) * rows_per_line + r`. Both
    sides can tell that from the window, and no two slices meet.
    """
    together = LANES // rows.shape[1] if rows.ndim == 2 and rows.shape[1] else 1
    if together < 2:
        return _ragged(window, rows, size, axes)
    count, width = window.begin.size, jnp.int32(together)
    slice_, me = lax.iota(jnp.int32, count), lax.axis_index(axes)
    lines = Window(
        begin=lax.div(window.begin, width) + slice_,
        sent=lax.div(window.sent + width - 1, width),
        offsets=lax.div(window.offsets, width) + me,
        starts=lax.div(window.starts, width) + slice_,
        received=lax.div(window.received + width - 1, width),
        origins=lax.div(window.origins, width) + me,
    )
    used = (rows.shape[0] // together + count) * together
    begin, starts = lines.begin * width, lines.starts * width
    index = _moved(begin, window.begin - begin, used)
    packed = rows.at[index].get(mode="clip").reshape(-1, together * rows.shape[1])
    arrived = _ragged(lines, packed, size // together + count, axes)
    index = _moved(window.starts, starts - window.starts, size)
    return arrived.reshape(-1, rows.shape[1]).at[index].get(mode="clip")


def _moved(edges: jax.Array, by: jax.Array, size: int) -> jax.Array:
    """Returns `i + by[j]` for each i below `size`, where j is the last edge up to i."""
    steps = by - jnp.append(jnp.zeros((1,), by.dtype), by[:-1])
    moves = jnp.zeros((size,), jnp.int32).at[edges].add(steps, mode="drop")
    return lax.iota(jnp.int32, size) + jnp.cumsum(moves, dtype=jnp.int32)


def _ragged(window: Window, rows: jax.Array, size: int, axes: Axes) -> jax.Array:
    return lax.ragged_all_to_all(
        rows,
        vary(jnp.zeros((size, *rows.shape[1:]), rows.dtype), rows),
        input_offsets=window.begin,
        send_sizes=window.sent,
        output_offsets=window.offsets,
        recv_sizes=window.received,
        axis_name=axes,
    )


def by_equal(
    window: Window, rows: jax.Array, size: int, longest: int, axes: Axes
) -> jax.Array:
    """Sends slices padded to `longest` rows."""
    part = lax.iota(jnp.int32, longest)[None]
    chosen = (window.begin[:, None] + part).reshape(-1)
    arrived = swap(rows.at[chosen].get(mode="clip"), axes)
    places = jnp.where(
        part < window.received[:, None], window.starts[:, None] + part, jnp.int32(size)
    )
    buffer = vary(jnp.zeros((size, *rows.shape[1:]), rows.dtype), rows)
    return buffer.at[places.reshape(-1)].set(arrived, mode="drop")


def covered(starts: jax.Array, counts: jax.Array, size: int) -> jax.Array:
    """Returns bool `[size]`: which places lie in one of the slices."""
    edges = jnp.zeros((size + 1,), jnp.int32).at[starts].add(1)
    edges = edges.at[starts + counts].add(-1)
    return jnp.cumsum(edges, dtype=jnp.int32)[:size] > 0


def slices(array: jax.Array, begin: jax.Array, width: int) -> jax.Array:
    """Returns `array[b : b + width]` for each b of `begin`, `[n, width]`.

    Whole lines of 128 are gathered, then each is moved into place bit by bit: a TPU
    gathers a line as fast as a scalar. What lies behind the array is arbitrary.
    """
    array = jnp.pad(array, (0, -array.size % LANES)).reshape(-1, LANES)
    span = lax.iota(jnp.int32, -(-width // LANES) + 1)
    lines = lax.div(begin, jnp.int32(LANES))[:, None] + span[None]
    found = array.at[lines].get(mode="clip").reshape(begin.size, -1)
    shift = lax.rem(begin, jnp.int32(LANES))[:, None]
    for bit in range(LANES.bit_length() - 1):
        moved = jnp.roll(found, -(2**bit), axis=1)
        found = jnp.where((shift >> bit) & 1 == 1, moved, found)
    return found[:, :width]
