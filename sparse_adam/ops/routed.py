"""Batches that are spread over the devices that share a table: ids travel to owners.

Where every device has some of the rows and some of the ids, `routing` sends each id to
the device that has its row. The bytes that a device receives, and its work, then do not
grow with the number of devices. That is done

- on explicit axes, where types tell that ids are spread over the very axes of the rows;
- on automatic ones, where nothing tells how ids are spread: then a batch is cut into
  equal parts, which sends nothing where it was spread like that;
- in a `jax.shard_map` over the axes of the rows, where each device has its own ids.

Every other batch is whole on each device (`shards`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from sparse_adam._types import Indices
from sparse_adam.kernels.layout import Layout
from sparse_adam.kernels.spec import UpdateSpec
from sparse_adam.ops import routing
from sparse_adam.ops.options import UpdateInputs
from sparse_adam.ops.routing import Placement
from sparse_adam.ops.shards import (
    Shards,
    everywhere,
    explicit_sharding,
    known_sharding,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Routed:
    """How a batch travels to the owners of its rows.

    Attributes:
        shards: the devices that share the rows, two at least.
        ids: how the ids are spread over these devices, and over no others; None where
            they are cut into equal parts, or a device passes its own.
        num_rows: V, of all devices together; each has as many as the next one.
    """

    shards: Shards
    ids: PartitionSpec | None
    num_rows: int

    @classmethod
    def of(cls, shards: Shards | None, ids: Any, num_rows: int) -> "Routed | None":
        """Returns the way of these ids; None where they are not to be routed.

        Args:
            shards: the devices that share the rows, if there are any.
            ids: `[...]`, as they came.
            num_rows: of the table at hand: V, or what one device has of it in a
                `jax.shard_map`.
        """
        if shards is None or shards.count == 1:
            return None
        if shards.is_inside:
            return cls(shards, None, num_rows * shards.count)
        sharding = explicit_sharding(ids) or known_sharding(ids)
        if sharding is None:
            unknown = isinstance(ids, jax.core.Tracer)
            cut = unknown and shards.mesh.are_all_axes_auto
            return cls(shards, None, num_rows) if cut else None
        if sharding.mesh != shards.mesh:
            return None
        sizes = shards.mesh.shape
        rows = {axis for axis in shards.axes if sizes[axis] > 1}
        parts = (x if isinstance(x, tuple) else (x,) for x in sharding.spec)
        batch = {axis for part in parts for axis in part if axis and sizes[axis] > 1}
        if rows != batch:
            return None
        return cls(shards, PartitionSpec(*sharding.spec), num_rows)

    @classmethod
    def of_update(
        cls, shards: Shards | None, inputs: UpdateInputs, spec: UpdateSpec
    ) -> "Routed | None":
        """Returns the way of an update's batch; None where it is not to be routed.

        What travels is one sum for each row of a device's ids. A step for each
        occurrence and a plan need the whole batch.

        Raises:
            ValueError: they do in a `jax.shard_map`, where a device has its part only.
        """
        if inputs.plan is None and spec.accumulate:
            return cls.of(shards, inputs.ids, spec.num_rows)
        if shards is not None and shards.is_inside:
            what = "use_gradient_accumulation=False" if inputs.plan is None else "plan="
            raise ValueError(
                f"{what} needs the whole batch, but with sharding= within "
                "jax.shard_map each device passes its own part: leave one of the two "
                "out, or call this outside of jax.shard_map"
            )
        return None

    def own(self, layout: Layout) -> Layout:
        """Returns the layout of what one device has, given that of what is at hand."""
        return layout if self.shards.is_inside else layout.divided(self.shards.count)

    def part(self, spec: UpdateSpec) -> UpdateSpec:
        """Returns the update that an owner makes in each round of a whole update.

        One that steps every row is made once, of all sums that have arrived.
        """
        count, own = self.shards.count, self.own(spec.layout)
        num_ids = spec.num_ids if self.shards.is_inside else -(-spec.num_ids // count)
        size = own.num_rows
        if spec.lazy:
            size = routing.default_quota(num_ids, count).total
        return spec.replace(
            layout=own,
            num_ids=size,
            num_grads=size,
            grads_dtype=np.dtype(np.float32),
            weighted=False,
        )

    @property
    def place(self) -> PartitionSpec:
        """Returns how arrays are spread that `spread` returns."""
        return self.shards.rows if self.ids is None else self.ids

    def spread(self, x: jax.Array, dims: int, value: int = 0) -> jax.Array:
        """Spreads an array as the ids are.

        Args:
            x: its first dimensions are those of the ids.
            dims: how many the ids have.
            value: to fill it up, where it is cut into parts that must be equal.
        """
        if self.ids is None:
            return self.cut(x.reshape(-1, *x.shape[dims:]), value)
        return self._move(x, self.ids)

    def cut(self, x: jax.Array, value: int = 0) -> jax.Array:
        """Cuts an array into equal parts, the last ones filled up with a number."""
        if self.shards.is_inside:
            return x
        missing = -x.shape[0] % self.shards.count
        if missing:
            fill = np.dtype(x.dtype).type(value)
            widths = ((0, missing), *((0, 0),) * (x.ndim - 1))
            x = jnp.pad(everywhere(x), widths, constant_values=fill)
        return self._move(x, self.shards.rows)

    def _move(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        if self.shards.is_inside or not self.shards.mesh.are_all_axes_explicit:
            return x  # `map` does it
        return jax.reshard(x, NamedSharding(self.shards.mesh, spec))

    def zeros(self, dim: int) -> jax.Array:
        """Returns float32 zeros `[V, dim]`, spread as the rows are."""
        shards, shape = self.shards, (self.num_rows, dim)
        if shards.is_inside:
            return jnp.zeros((self.num_rows // shards.count, dim), jnp.float32)
        place = NamedSharding(shards.mesh, shards.rows)
        if shards.mesh.are_all_axes_explicit:
            return jnp.zeros(shape, jnp.float32, out_sharding=place)
        return lax.with_sharding_constraint(jnp.zeros(shape, jnp.float32), place)

    def route(self, ids: Indices) -> routing.Route:
        """Returns the route of a device's ids; it is called on each of them."""
        return routing.route(ids, self.placement, self.shards.axes)

    @property
    def placement(self) -> Placement:
        """Returns where the rows are."""
        return Placement(self.num_rows, self.shards.count)

    def look_up(
        self,
        function: Callable[[Any, Indices], jax.Array],
        tables: Any,
        ids: Indices,
    ) -> jax.Array:
        """Returns a row for each id, spread as the ids are; zeros for padding.

        Args:
            function: of a device's part of the tables and of rows of it, -1 for none,
                `[C]`: the weights of these rows, `[C, D]`.
            tables: spread by their rows.
            ids: int32; outside `[0, V)` for padding.
        """

        def look_up_own(tables: Any, ids: Indices) -> jax.Array:
            return routing.lookup(self.route(ids), functools.partial(function, tables))

        operands = self.shards.rows, self.place
        mapped = self.shards.map(look_up_own, operands, self.place)
        found = mapped(tables, self.spread(ids, ids.ndim, -1))
        if self.ids is None:
            found = found[: ids.size].reshape(*ids.shape, found.shape[-1])
        return found

    def add_up(self, ids: Indices, terms: jax.Array) -> jax.Array:
        """Returns float32 `[V, D]`: of each row the sum of its terms.

        Args:
            ids: int32; outside `[0, V)` for padding.
            terms: `ids.shape + (D,)`.
        """

        def add(sums: jax.Array, rows: Indices, terms: jax.Array) -> jax.Array:
            rows = jnp.where(rows < 0, sums.shape[0], rows)
            return sums.at[rows].add(terms, mode="drop")

        def add_own(sums: jax.Array, ids: Indices, terms: jax.Array) -> jax.Array:
            return routing.update(self.route(ids), terms, sums, add)

        operands = self.shards.rows, self.place, self.place
        mapped = self.shards.map(add_own, operands, self.shards.rows)
        ids, terms = self.spread(ids, ids.ndim, -1), self.spread(terms, ids.ndim)
        return mapped(self.zeros(terms.shape[-1]), ids, terms)
