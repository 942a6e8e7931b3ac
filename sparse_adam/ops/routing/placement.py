"""Where the rows of a table are: which device owns a row, and as which local row."""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_Rows = TypeVar("_Rows", jax.Array, np.ndarray)


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """Spreads V rows over n shards of `ceil(V / n)` rows each.

    The last shards end in rows that no id names where n does not divide V. The *place*
    of a row is its index in all shards laid one behind the other, `owner *
    rows_per_shard + local row`: in ascending order of places, the rows of one owner
    stand together.

    Attributes:
        num_rows: V, the rows of the table. An id outside `[0, V)` is padding.
        num_shards: n, the devices that share the rows.
        interleaved: if False, shard s has the rows from `s * rows_per_shard` on; if
            True, shard s has the rows s, s + n, s + 2 n and so on. Choose the latter
            where ids are sorted by frequency, so that no shard has all popular rows.
    """

    num_rows: int
    num_shards: int
    interleaved: bool = False

    def __post_init__(self) -> None:
        """Checks the sizes.

        Raises:
            ValueError: a size is not positive, or places do not fit int32.
        """
        if self.num_rows < 1:
            raise ValueError(f"num_rows={self.num_rows} must be at least 1")
        if self.num_shards < 1:
            raise ValueError(f"num_shards={self.num_shards} must be at least 1")
        if self.end > 2**31 - 1:
            raise ValueError(
                f"num_rows={self.num_rows} on num_shards={self.num_shards} makes "
                f"{self.end} places, which int32 cannot hold: split the table"
            )

    @property
    def rows_per_shard(self) -> int:
        """Returns how many rows each shard has."""
        return -(-self.num_rows // self.num_shards)

    @property
    def end(self) -> int:
        """Returns the number of places, which is also the place of padding."""
        return self.num_shards * self.rows_per_shard

    def places(self, ids: jax.Array) -> jax.Array:
        """Returns the place of each id; `end` for an id outside `[0, V)`."""
        inside = (ids >= 0) & (ids < self.num_rows)
        found = ids
        if self.interleaved:
            n = jnp.int32(self.num_shards)
            found = lax.rem(ids, n) * jnp.int32(self.rows_per_shard) + lax.div(ids, n)
        return jnp.where(inside, found, jnp.int32(self.end))

    def spread(self, rows: _Rows) -> _Rows:
        """Returns a table `[V, ...]` as shards `[n, rows_per_shard, ...]`."""
        xp = jnp if isinstance(rows, jax.Array) else np
        missing = self.end - self.num_rows
        padded: Any = xp.pad(rows, [(0, missing), *[(0, 0)] * (rows.ndim - 1)])
        if self.interleaved:
            shape = (self.rows_per_shard, self.num_shards, *rows.shape[1:])
            return padded.reshape(shape).swapaxes(0, 1)
        return padded.reshape(self.num_shards, self.rows_per_shard, *rows.shape[1:])

    def collect(self, shards: _Rows) -> _Rows:
        """Returns the table `[V, ...]` that `spread` made into `shards`."""
        ordered: Any = shards.swapaxes(0, 1) if self.interleaved else shards
        return ordered.reshape(self.end, *shards.shape[2:])[: self.num_rows]
