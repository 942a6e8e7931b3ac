"""Batches that are spread over the devices that share a table: ids travel to owners.

Where every device has some of the rows and some of the ids, `routing` sends each id to
the device that has its row. The bytes that a device receives, and its work, then do not
grow with the number of devices. That is done where types tell of it: where ids are
spread over explicit axes, the very ones that the rows are spread over. Every other
batch is whole on each device (`shards`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sparse_adam._types import Indices
from sparse_adam.kernels.spec import UpdateSpec
from sparse_adam.ops import routing
from sparse_adam.ops.options import UpdateInputs
from sparse_adam.ops.routing import Placement
from sparse_adam.ops.shards import Shards, explicit_sharding


@dataclasses.dataclass(frozen=True, slots=True)
class Routed:
    """How a batch travels to the owners of its rows.

    Attributes:
        shards: the devices that share the rows, two at least.
        ids: how the ids are spread over these devices, and over no others.
        num_rows: V, of all devices together; each has as many as the next one.
    """

    shards: Shards
    ids: PartitionSpec
    num_rows: int

    @classmethod
    def of(cls, shards: Shards | None, ids: Any, num_rows: int) -> "Routed | None":
        """Returns the way of these ids; None where they are not to be routed.

        Args:
            shards: the devices that share the rows, if there are any.
            ids: `[...]`, as they came.
            num_rows: V.
        """
        sharding = explicit_sharding(ids)
        if shards is None or sharding is None or sharding.mesh != shards.mesh:
            return None
        sizes = shards.mesh.shape
        rows = {axis for axis in shards.axes if sizes[axis] > 1}
        parts = (x if isinstance(x, tuple) else (x,) for x in sharding.spec)
        batch = {axis for part in parts for axis in part if axis and sizes[axis] > 1}
        if not rows or rows != batch:
            return None
        return cls(shards, PartitionSpec(*sharding.spec), num_rows)

    @classmethod
    def of_update(
        cls, shards: Shards | None, inputs: UpdateInputs, spec: UpdateSpec
    ) -> "Routed | None":
        """Returns the way of an update's batch; None where it is not to be routed.

        What travels is one sum for each row of a device's ids. A step for each
        occurrence, gradients that occurrences share, a plan, and a step for each row of
        the table need the whole batch.
        """
        one_each = inputs.sample_ids is None and inputs.plan is None
        if not (one_each and spec.lazy and spec.accumulate):
            return None
        return cls.of(shards, inputs.ids, spec.num_rows)

    def part(self, spec: UpdateSpec) -> UpdateSpec:
        """Returns the update that an owner makes in each round of a whole update."""
        count = self.shards.count
        quota = routing.default_quota(spec.num_ids // count, count)
        return spec.replace(
            layout=spec.layout.divided(count),
            num_ids=quota.total,
            num_grads=quota.total,
            grads_dtype=np.dtype(np.float32),
            weighted=False,
        )

    def spread(self, batch: jax.Array) -> jax.Array:
        """Spreads an array as the ids are, whose dimensions are its first ones."""
        return jax.reshard(batch, NamedSharding(self.shards.mesh, self.ids))

    def zeros(self, dim: int) -> jax.Array:
        """Returns float32 zeros `[V, dim]`, spread as the rows are."""
        place = NamedSharding(self.shards.mesh, self.shards.rows)
        return jnp.zeros((self.num_rows, dim), jnp.float32, out_sharding=place)

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
            return routing.lookup(self._route(ids), functools.partial(function, tables))

        operands = self.shards.rows, self.ids
        return self.shards.map(look_up_own, operands, self.ids)(tables, ids)

    def update(
        self,
        function: Callable[..., Any],
        tables: Any,
        ids: Indices,
        grads: jax.Array,
        *others: Any,
    ) -> Any:
        """Returns tables that their owners have updated by summed gradients.

        Args:
            function: `function(tables, rows, grads, *others)` of a device's part of the
                tables, of rows of it, -1 for none, `[C]`, and of their gradients in
                float32, `[C, D]`: the new part. It sums those of equal rows.
            tables: spread by their rows.
            ids: int32; outside `[0, V)` for padding.
            grads: `ids.shape + (D,)`, spread as the ids are.
            *others: what every device has whole.
        """

        def update_own(
            tables: Any, ids: Indices, grads: jax.Array, *others: Any
        ) -> Any:
            def step(tables: Any, rows: Indices, grads: jax.Array) -> Any:
                return function(tables, rows, grads, *others)

            return routing.update(self._route(ids), grads, tables, step)

        rows, whole = self.shards.rows, (PartitionSpec(),) * len(others)
        operands = rows, self.ids, self.ids, *whole
        return self.shards.map(update_own, operands, rows)(tables, ids, grads, *others)

    def _route(self, ids: Indices) -> routing.Route:
        placement = Placement(self.num_rows, self.shards.count)
        return routing.route(ids, placement, self.shards.axes)
