"""The step of a state: how many updates it has had, for what depends on it.

That is a rate that is a function of the step, and rows that catch up. Only a state of
such tables has a step. Any other stays a pytree of tables and nothing
else, which one sharding spreads over devices and `jax.tree.map` averages.
"""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from sparse_adam.ops.spread import Spread

STEP = "step"  # what a checkpoint calls it, among the arrays of each table
_LAST = np.int32(np.iinfo(np.int32).max)


def step_at(number: Any, spread: Spread | None) -> jax.Array:
    """Returns a step, an int32 scalar of its own: all devices of `spread` have it."""
    step = jnp.array(number, jnp.int32)
    if spread is None:
        return step
    everywhere = PartitionSpec()
    return jax.jit(spread.map(lambda x: x, (everywhere,), everywhere))(step)


def next_step(step: Any) -> jax.Array | None:
    """Returns the step after an update; the last of int32 is not left."""
    return None if step is None else jnp.where(step < _LAST, step + 1, _LAST)


def check_step(step: Any, names: list[str]) -> None:
    """Checks the step of a state.

    Args:
        step: of the state.
        names: of the tables whose updates depend on it.

    Raises:
        TypeError: it is no int32 scalar.
        ValueError: there is none, but a table needs it.
    """
    if step is None and names:
        raise ValueError(
            f"state.step is None, but the updates of the tables {names} depend on it "
            "(a rate that is a function of the step, or catch_up=True): pass a state "
            "that init made, or "
            "dataclasses.replace(state, step=jnp.int32(number of updates so far))"
        )
    if step is None:
        return
    dtype = getattr(step, "dtype", type(step).__name__)
    if dtype != np.int32 or np.shape(step) != ():
        raise TypeError(
            f"state.step is {dtype}{list(np.shape(step))}; it must be an int32 scalar. "
            "If jax.tree.map computed with it, call map_arrays(function, state), which "
            "leaves it as it is"
        )


def given_step(steps: dict[str, Any]) -> Any:
    """Returns the one step of checkpoints of several tables; None if there is none.

    Args:
        steps: by table name.

    Raises:
        ValueError: they differ.
    """
    traced = any(isinstance(step, jax.core.Tracer) for step in steps.values())
    if not traced and len({int(step) for step in steps.values()}) > 1:
        raise ValueError(
            f"arrays has different steps, { {k: int(v) for k, v in steps.items()} }, "
            f"but a state has one: leave {STEP!r} out of all tables but one"
        )
    return next(iter(steps.values()), None)
