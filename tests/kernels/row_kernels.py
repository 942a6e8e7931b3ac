"""Runs a row kernel, under its own name and with a config, beside the reference."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_adam import PackedTable, plan_update, reference
from sparse_adam.kernels.spec import SortedBatch, StepScalars, UpdateSpec
from sparse_adam.ops.plan import indices_or
from sparse_adam.ops.xla import xla_update
from tests import cases, helpers
from tests.cases import Arrays, Case, State

RATE = 0.01


@functools.cache
def _jitted(
    update: Callable[..., Any], problem: UpdateSpec, config: Any
) -> Callable[..., Any]:
    """The kernel, interpreted; plain JAX code takes no config."""
    options = {} if update is xla_update else {"config": config, "interpret": True}
    return jax.jit(functools.partial(update, spec=problem, **options))


def scalars(seeds: jax.Array | None = None, decay: float = 0) -> StepScalars:
    """The numbers of a step with the rate `RATE`."""
    return StepScalars(jnp.float32([RATE, decay, 0]), seeds)


def plainly(f: Callable[..., Any], *args: Any) -> Any:
    """Runs a kernel in the plain interpreter."""
    return f(*args)


def run_stored(
    update: Callable[..., Any],
    run: Callable[..., Any],
    stored: tuple[jax.Array, ...],
    arrays: Arrays,
    case: Case,
    config: Any = None,
    *,
    packed: bool,
    seeds: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """What a kernel makes of a state in its storage; with seeds, rounded by them."""
    _, ids, grads, weights = arrays
    problem = helpers.changed(
        helpers.spec(case, arrays, packed), stochastic=seeds is not None
    )
    plan = plan_update(ids, problem.num_rows)
    sources, gains = plan.order, None
    if weights:
        samples = indices_or(weights["sample_ids"], problem.num_grads, fill=-1)
        sources, gains = samples[plan.order], weights["gains"][plan.order]
    decay = case.options.get("weight_decay_factor", 0)
    if case.options.get("multiply_weight_decay_factor_by_learning_rate"):
        decay = decay * RATE
    batch = SortedBatch(jnp.asarray(grads), plan.ids, sources, gains)
    step = scalars(seeds, decay)
    return run(_jitted(update, problem, config), stored, batch, step)


def run_kernel(
    update: Callable[..., Any],
    run: Callable[..., Any],
    arrays: Arrays,
    case: Case,
    config: Any,
    packed: bool = False,
) -> tuple[tuple[jax.Array, ...], State]:
    """The kernel's table and slots for a case, and the reference's.

    With `packed`, they are packed before and unpacked after.
    """
    state, ids, grads, weights = arrays
    stored = tuple(map(jnp.asarray, state))
    table = PackedTable.pack(*stored) if packed else None
    if table is not None:
        stored = (table.lines,)
    new = run_stored(update, run, stored, arrays, case, config, packed=packed)
    if table is not None:
        new = PackedTable(new[0], table.layout).unpack()
    expected = reference.sparse_adam_update(
        *(*helpers.as_float32(state), ids, grads),
        learning_rate=RATE,
        **weights,
        **case.options,
    )
    return new, expected


def check_kernel(
    update: Callable[..., Any],
    run: Callable[..., Any],
    case: Case,
    ids: Any,
    config: Any,
    packed: bool = False,
) -> None:
    """Compares it with the reference, and rows that are not in `ids` with themselves.

    The ids are the case's own where `ids` is None.
    """
    arrays = cases.arrays(case)
    if ids is not None:
        arrays = arrays._replace(ids=np.asarray(ids, np.int32))
    new, expected = run_kernel(update, run, arrays, case, config, packed)
    accumulate = case.options.get("use_gradient_accumulation", True)
    helpers.assert_close_states(
        new,
        arrays.state,
        expected,
        learning_rate=RATE,
        beta_2=case.options.get("beta_2", 0.999),
        steps=1 if accumulate else most_steps(arrays.ids, case.num_rows),
    )
    touched = np.isin(np.arange(case.num_rows), arrays.ids)
    for x, old in zip(new, arrays.state, strict=True):
        helpers.assert_bitwise_equal(np.asarray(x)[~touched], old[~touched])


def most_steps(ids: np.ndarray, num_rows: int) -> int:
    """Of one row, where each occurrence is a step; at least 1."""
    inside = ids[(ids >= 0) & (ids < num_rows)]
    return int(max([1, *np.unique(inside, return_counts=True)[1]]))
