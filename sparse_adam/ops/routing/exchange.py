"""One exchange between all devices: parts of different sizes, in buffers of one size.

Each device has an array of N rows in which the rows for each owner stand together. A
`Window` says which slice of them goes to which owner, and where in the owner's buffer
of C rows it arrives. `to_owners` sends slices there, and `to_senders` sends the answers
back to where the slices came from.

On a TPU both are `lax.ragged_all_to_all`: only what is in the slices travels, and the
slices stand one behind the other in the buffer. Other backends have no such collective.
There the buffer is cut into n equal parts, a part for each sender, and travels whole by
`lax.all_to_all`. The platform is known when the program is lowered, and the other path
is left out then. Nothing but the collectives is traced for both.

What a buffer holds where no slice was written is unknown: `covered` says where that is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from sparse_adam.ops.routing.varying import vary

Axes = tuple[str, ...]


class Window(NamedTuple):
    """The slices that travel in one round, as one device sees them.

    Attributes:
        begin: int32 `[n]`, where the slice for each owner begins in this device's rows.
        sent: int32 `[n]`, how many rows it has.
        offsets: int32 `[n]`, where it begins in the owner's buffer.
        starts: int32 `[n]`, where each sender's slice begins in this device's buffer.
        received: int32 `[n]`, how many rows it has.
        origins: int32 `[n]`, where it begins in the sender's rows.
    """

    begin: jax.Array
    sent: jax.Array
    offsets: jax.Array
    starts: jax.Array
    received: jax.Array
    origins: jax.Array


class Path(Protocol):
    """The ways that a round's rows can travel; see `Ragged` and `Equal`."""

    def load(self, sent: jax.Array, axes: Axes) -> jax.Array:
        """Returns how many rows of each owner's buffer `[n]` would be taken."""
        ...

    def starts(self, received: jax.Array, size: int) -> jax.Array:
        """Returns where each sender's slice begins in a buffer of `size` rows."""
        ...

    def to_owners(
        self, window: Window, rows: jax.Array, size: int, axes: Axes
    ) -> jax.Array:
        """Sends slices of rows `[N, ...]`; returns the buffer `[size, ...]`."""
        ...

    def to_senders(
        self, window: Window, buffer: jax.Array, size: int, axes: Axes
    ) -> jax.Array:
        """Sends a buffer's slices back; returns them in rows `[size, ...]`."""
        ...


class Ragged:
    """Slices one behind the other, by `lax.ragged_all_to_all`."""

    def load(self, sent: jax.Array, axes: Axes) -> jax.Array:
        """Returns how many rows of each owner's buffer `[n]` would be taken."""
        return lax.psum(sent, axes)

    def starts(self, received: jax.Array, size: int) -> jax.Array:
        """Returns where each sender's slice begins in a buffer of `size` rows."""
        del size
        return jnp.cumsum(received, dtype=jnp.int32) - received

    def to_owners(
        self, window: Window, rows: jax.Array, size: int, axes: Axes
    ) -> jax.Array:
        """Sends slices of rows `[N, ...]`; returns the buffer `[size, ...]`."""
        return lax.ragged_all_to_all(
            rows,
            _zeros(size, rows),
            input_offsets=window.begin,
            send_sizes=window.sent,
            output_offsets=window.offsets,
            recv_sizes=window.received,
            axis_name=axes,
        )

    def to_senders(
        self, window: Window, buffer: jax.Array, size: int, axes: Axes
    ) -> jax.Array:
        """Sends a buffer's slices back; returns them in rows `[size, ...]`."""
        return lax.ragged_all_to_all(
            buffer,
            _zeros(size, buffer),
            input_offsets=window.starts,
            send_sizes=window.received,
            output_offsets=window.origins,
            recv_sizes=window.sent,
            axis_name=axes,
        )


class Equal:
    """A part of C / n rows for each sender, by `lax.all_to_all`."""

    def load(self, sent: jax.Array, axes: Axes) -> jax.Array:
        """Returns how many rows of each owner's buffer `[n]` would be taken."""
        return lax.pmax(sent, axes) * jnp.int32(sent.size)

    def starts(self, received: jax.Array, size: int) -> jax.Array:
        """Returns where each sender's slice begins in a buffer of `size` rows."""
        part = jnp.full_like(received, size // received.size)
        return jnp.cumsum(part, dtype=jnp.int32) - part

    def to_owners(
        self, window: Window, rows: jax.Array, size: int, axes: Axes
    ) -> jax.Array:
        """Sends slices of rows `[N, ...]`; returns the buffer `[size, ...]`."""
        part = lax.iota(jnp.int32, size // window.begin.size)
        index = (window.begin[:, None] + part[None]).reshape(-1)
        sent = rows.at[index].get(mode="clip")
        return lax.all_to_all(sent, axes, 0, 0, tiled=True)

    def to_senders(
        self, window: Window, buffer: jax.Array, size: int, axes: Axes
    ) -> jax.Array:
        """Sends a buffer's slices back; returns them in rows `[size, ...]`."""
        part = lax.iota(jnp.int32, buffer.shape[0] // window.begin.size)[None]
        index = jnp.where(
            part < window.sent[:, None], window.begin[:, None] + part, jnp.int32(size)
        )
        answers = lax.all_to_all(buffer, axes, 0, 0, tiled=True)
        rows = _zeros(size, buffer)
        return rows.at[index.reshape(-1)].set(answers, mode="drop")


def _zeros(size: int, like: jax.Array) -> jax.Array:
    """Returns `size` rows of zeros that vary over the mesh as `like` does."""
    return vary(jnp.zeros((size, *like.shape[1:]), like.dtype), like)


TPU: Path = Ragged()
OTHERS: Path = Equal()


def load(sent: jax.Array, axes: Axes) -> jax.Array:
    """Returns how many of C rows each owner's buffer needs, `[n]` on every device.

    A round fits if none of them is above C.
    """
    return _by_platform(lambda path, sent: path.load(sent, axes), sent)


def window(begin: jax.Array, sent: jax.Array, size: int, axes: Axes) -> Window:
    """Tells all devices of each other's slices, for buffers of `size` rows."""
    told = lax.all_to_all(jnp.stack((sent, begin), 1), axes, 0, 0, tiled=True)
    received, origins = told[:, 0], told[:, 1]
    starts = _by_platform(lambda path, received: path.starts(received, size), received)
    offsets = lax.all_to_all(starts, axes, 0, 0, tiled=True)
    return Window(begin, sent, offsets, starts, received, origins)


def to_owners(window: Window, rows: jax.Array, size: int, axes: Axes) -> jax.Array:
    """Sends slices of rows `[N, ...]` to their owners.

    Returns a buffer `[size, ...]` with the slices at `window.starts`.
    """
    return _by_platform(
        lambda path, window, rows: path.to_owners(window, rows, size, axes),
        window,
        rows,
    )


def to_senders(window: Window, buffer: jax.Array, size: int, axes: Axes) -> jax.Array:
    """Sends the slices of a buffer `[C, ...]` back to where they came from.

    Returns rows `[size, ...]` with the slices at `window.begin`.
    """
    return _by_platform(
        lambda path, window, buffer: path.to_senders(window, buffer, size, axes),
        window,
        buffer,
    )


def covered(starts: jax.Array, counts: jax.Array, size: int) -> jax.Array:
    """Returns bool `[size]`: which places lie in a slice that was written."""
    edges = jnp.zeros((size + 1,), jnp.int32).at[starts].add(1)
    edges = edges.at[starts + counts].add(-1)
    return jnp.cumsum(edges, dtype=jnp.int32)[:size] > 0


def _by_platform(call: Callable[..., Any], *arrays: Any) -> Any:
    """Calls `call(path, *arrays)` with the path of the platform compiled for."""
    return lax.platform_dependent(
        *arrays,
        tpu=lambda *arrays: call(TPU, *arrays),
        default=lambda *arrays: call(OTHERS, *arrays),
    )
