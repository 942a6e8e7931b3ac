"""Runs a validated update: in both storages, by whichever implementation was chosen."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from sparse_adam._types import Gains, Grads, Indices
from sparse_adam.kernels.problem import Batch, Problem, State, Step
from sparse_adam.kernels.rounding import noise
from sparse_adam.ops import dispatch, validate
from sparse_adam.ops.integers import in_32_bits
from sparse_adam.ops.plan import UpdatePlan, indices_or, plan_update
from sparse_adam.ops.shards import Shards, everywhere, vary_alike


class Occurrences(NamedTuple):
    """What a user says of a batch, checked."""

    ids: ArrayLike
    grads: ArrayLike
    sample_ids: ArrayLike | None
    gains: ArrayLike | None
    plan: UpdatePlan | None


class _Batch(NamedTuple):
    """Occurrences: as they came, or by `order`, which a plan has made.

    An id outside `[0, V)` is V.
    """

    ids: Indices
    order: Indices | None
    grads: Grads
    sample_ids: Indices | None
    gains: Gains | None


def make_step(
    learning_rate: ArrayLike, key: jax.Array | None, problem: Problem
) -> Step:
    """The traced numbers of an update; one seed for each array that is rounded."""
    seeds = None
    if problem.stochastic and key is not None:
        bits = jax.random.bits(key, (3,), jnp.uint32)
        seeds = lax.bitcast_convert_type(bits, jnp.int32)
    return Step(validate.learning_rate(learning_rate), seeds)


def update_rows(
    state: tuple[ArrayLike, ...],
    occurrences: Occurrences,
    step: Step,
    problem: Problem,
    implementation: str | None,
    config: dispatch.Config | None,
) -> State:
    """Updates the arrays of a storage; returns as many.

    Raises:
        ValueError: an implementation cannot do it; rows are spread in vain.
    """
    arrays = tuple(map(jnp.asarray, state))
    own, shards = of_one_device(problem, arrays[0])
    chosen = dispatch.choices(own, implementation, config)
    if problem.num_ids == 0 and problem.lazy:
        return arrays
    batch = _flatten(occurrences, problem)
    arrays, batch, step = vary_alike((arrays, batch, step))
    return _update(arrays, batch, step, problem=own, chosen=chosen, shards=shards)


def of_one_device(problem: Problem, array: Any) -> tuple[Problem, Shards | None]:
    """The problem that a device has, where the first array of the state is spread.

    Raises:
        ValueError: its rows are spread in vain.
    """
    shards = Shards.of("table", array)
    if shards is None:
        return problem, None
    if problem.packed:
        own_rows = shards.own_layout(problem.layout).num_rows
    else:
        own_rows = problem.num_rows // shards.count
    return dataclasses.replace(problem, num_rows=own_rows), shards


def _flatten(occurrences: Occurrences, problem: Problem) -> _Batch:
    """As arrays `[N]` and `[B, D]`, 32 bits wide."""
    ids, grads, sample_ids, gains, plan = everywhere(occurrences)
    if plan is None:
        ids, order = indices_or(ids, problem.num_rows, fill=problem.num_rows), None
    else:
        ids, order = plan.ids, plan.order
    if sample_ids is not None:
        sample_ids = indices_or(sample_ids, problem.num_grads, fill=-1)
    if gains is not None:
        gains = jnp.asarray(gains, jnp.float32).reshape(-1)
    grads = jnp.asarray(grads).reshape(problem.num_grads, problem.dim)
    if grads.dtype == np.float64:
        grads = grads.astype(jnp.float32)
    return _Batch(ids, order, grads, sample_ids, gains)


@in_32_bits
@functools.partial(jax.jit, static_argnames=("problem", "chosen", "shards"))
def _update(
    state: State,
    batch: _Batch,
    step: Step,
    *,
    problem: Problem,
    chosen: dispatch.Choices,
    shards: Shards | None,
) -> State:
    update = functools.partial(_update_table, problem=problem, chosen=chosen)
    if shards is None:
        return update(state, batch, step)

    def update_own(state: State, batch: _Batch, step: Step) -> State:
        batch = _own(batch, shards, problem.num_rows)
        seeds = step.seeds
        if seeds is not None and shards.axes:
            # Rows of one number on several devices must not share their noise.
            seeds = noise(seeds, lax.axis_index(shards.axes)[None])
        return update(state, batch, step._replace(seeds=seeds))

    return shards.on_each(update_own, state, batch, step)


def _own(batch: _Batch, shards: Shards, num_rows: int) -> _Batch:
    """The batch as a device sees it, whose rows are `num_rows` of all."""
    ids = shards.own(batch.ids, num_rows)
    ids = jnp.where(ids < 0, num_rows, ids)
    if batch.order is None:
        return batch._replace(ids=ids)
    # What is sorted stays sorted: its own stand together, and come first.
    before = -jnp.argmax(ids < num_rows)
    return batch._replace(
        ids=jnp.roll(ids, before), order=jnp.roll(batch.order, before)
    )


def _update_table(
    state: State,
    batch: _Batch,
    step: Step,
    *,
    problem: Problem,
    chosen: dispatch.Choices,
) -> State:
    def run(choice: dispatch.Choice) -> Callable[..., State]:
        def update(state: State, batch: _Batch, step: Step) -> State:
            ids, order, grads, sources, gains = batch
            if problem.weighted and gains is None:
                gains = jnp.ones(ids.shape, jnp.float32)
            if order is None and not choice.implementation.sorts:
                plan = plan_update(ids, problem.num_rows)
                ids, order = plan.ids, plan.order
            if order is not None:
                sources = order if sources is None else sources[order]
                gains = None if gains is None else gains[order]
            elif sources is None:
                sources = lax.iota(jnp.int32, ids.size)
            return choice.update(
                state, Batch(grads, ids, sources, gains), step, problem
            )

        return update

    on_tpu, on_cpu, elsewhere = chosen
    if on_tpu == on_cpu == elsewhere:
        return run(elsewhere)(state, batch, step)
    return lax.platform_dependent(
        *(state, batch, step), tpu=run(on_tpu), cpu=run(on_cpu), default=run(elsewhere)
    )
