"""The plan: which rows a batch of ids touches, and in which order to visit them.

The sort is all of it. It needs the ids only, so it can be made before the forward
pass, off the critical path, and handed to `sparse_adam_update(..., plan=plan)`.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from sparse_adam._types import Indices
from sparse_adam.ops.integers import in_32_bits, integers, to_array
from sparse_adam.ops.sorting import sort_pairs


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("ids", "order"),
    meta_fields=("num_rows",),
)
@dataclasses.dataclass(frozen=True, slots=True)
class UpdatePlan:
    """A batch's occurrences, sorted by id. A pytree: it passes through jit and scan.

    Attributes:
        ids: int32 `[N]`, ascending. Every id outside `[0, num_rows)` is `num_rows`,
            so they stand together at the end.
        order: int32 `[N]`, where in the flattened batch each of them came from. Equal
            ids keep the order of the batch.
        num_rows: V, the rows of the table that the plan is for.
    """

    ids: jax.Array
    order: jax.Array
    num_rows: int

    def is_of(self, ids: ArrayLike) -> jax.Array:
        """Returns whether this is the plan of these ids, a bool `[]`, traced or not.

        Examples:
            >>> import jax.numpy as jnp
            >>> plan = plan_update(jnp.array([7, 2]), num_rows=10)
            >>> print(plan.is_of(jnp.array([7, 2])), plan.is_of(jnp.array([2, 7])))
            True False
        """
        ids = to_array("ids", ids)
        rows = indices_or(ids, self.num_rows, fill=self.num_rows)
        return jnp.all(rows[self.order] == self.ids)


def plan_update(ids: ArrayLike, num_rows: int) -> UpdatePlan:
    """Sorts a batch of ids for updates of a table of `num_rows` rows.

    Args:
        ids: any integer dtype and shape; flattened to `[N]`. An id outside
            `[0, num_rows)` is padding and is ignored by the update.
        num_rows: V, the number of rows of the table.

    Returns:
        The `UpdatePlan` to pass as `plan=` with the same ids, once or, for tables
        that share their ids, as often as there are tables.

    **A plan of other ids updates other rows.** An update that is called eagerly, with
    ids and a plan on a CPU, compares them and raises a `ValueError`. Under `jax.jit`,
    and on other devices, nothing is compared, since that would cost time. To find such
    an error there, use `checkify.check(plan.is_of(ids), "another plan")` of
    `jax.experimental`.

    Raises:
        TypeError: `ids` are not integers.
        ValueError: `num_rows` is not in `[1, 2**31 - N)`.

    Examples:
        >>> import numpy as np
        >>> plan = plan_update(np.array([7, 2, -1, 7]), num_rows=10)
        >>> plan.ids.tolist(), plan.order.tolist()
        ([2, 7, 7, 10], [1, 0, 3, 2])
    """
    ids = to_array("ids", ids)
    num_ids = math.prod(integers("ids", ids))
    if not 1 <= num_rows < 2**31 - num_ids:
        raise ValueError(
            f"{num_rows=} must be at least 1 and below 2**31 - {num_ids} (ids are "
            "int32 in the update): split the table"
        )
    ids = indices_or(ids, num_rows, fill=num_rows)
    plan, _ = sort_occurrences(ids, (), num_rows=num_rows)
    return plan


@in_32_bits
@functools.partial(jax.jit, static_argnames=("num_rows",))
@jax.named_scope("plan")  # `benchmarks step --static` sums by it
def sort_occurrences(
    ids: Indices, payload: Sequence[jax.Array], *, num_rows: int
) -> tuple[UpdatePlan, list[jax.Array]]:
    """Plans the update of ids in `[0, num_rows]`, and sorts other arrays with them.

    Args:
        ids: int32 `[N]`; `num_rows` for none.
        payload: 32-bit arrays `[N]`.
        num_rows: V.

    Returns:
        The plan, and `x[plan.order]` of each array, without the cost of a gather.
    """
    order = lax.iota(jnp.int32, ids.size)
    ids, order, *payload = sort_pairs(ids, order, num_rows + 1, ids.size, payload)
    return UpdatePlan(ids, order, num_rows), payload


def check_plan(ids: Any, plan: UpdatePlan) -> None:
    """Refuses a plan of other ids, where that is cheap: of arrays in a CPU's memory.

    Raises:
        ValueError: it is of others.
    """
    if not all(map(_in_host_memory, (ids, plan.ids, plan.order))):
        return
    planned = np.asarray(plan.ids)
    rows = np.asarray(ids).reshape(-1).take(np.asarray(plan.order), mode="clip")
    if rows.dtype == planned.dtype and rows.tobytes() == planned.tobytes():
        return  # a fifth of the time of what follows
    wrong = rows != planned
    inside = (rows >= 0) & (rows < plan.num_rows)
    wrong &= inside | (planned != plan.num_rows)
    if wrong.any():
        place = int(wrong.argmax())
        raise ValueError(
            f"plan.ids[{place}]={planned[place]}, but the plan's order finds "
            f"{rows[place]} there in ids: it is a plan of other ids. Pass "
            f"plan_update(ids, {plan.num_rows}) of these very ids"
        )


def _in_host_memory(x: Any) -> bool:
    if not isinstance(x, jax.Array):
        return True
    if isinstance(x, jax.core.Tracer):
        return False
    devices = x.sharding.device_set
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def indices_or(indices: Any, bound: int, *, fill: int) -> Indices:
    """Flattens to int32, with `fill` where an index is outside `[0, bound)`.

    The test is made in the indices' own dtype: a 64-bit id must not wrap into the
    table on its way to int32, not even where JAX would narrow a NumPy array silently.
    """
    return jnp.asarray(inside_or(indices, bound, fill=fill).reshape(-1))


def inside_or(indices: Any, bound: int, *, fill: int) -> Any:
    """Does what `indices_or` does in the shape at hand, of NumPy's arrays in NumPy."""
    xp = jnp if isinstance(indices, jax.Array) else np
    indices = xp.asarray(indices)
    largest = min(bound - 1, int(np.iinfo(indices.dtype).max))
    inside = (indices >= 0) & (indices <= largest)
    return xp.where(inside, indices.astype(xp.int32), xp.int32(fill))
