"""`jax.vmap` over tables for kernels that know only one: T tables are one tall table.

A Pallas kernel that moves rows by hand has no batching rule on a TPU. But the update of
T tables of V rows is the update of one table of T * V rows, with the ids of table t
raised by t * V: one call, in place, no slower than one table with as many ids. (On a
TPU the tall table is the same memory where V is a multiple of 8, else a copy.)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from sparse_adam.kernels.problem import Batch, Problem, State, Step
from sparse_adam.ops.integers import in_32_bits


def over_tables(update: Callable[..., State]) -> Callable[..., State]:
    """Gives a kernel's `update(state, batch, step, problem)` a rule for `vmap`.

    Under `vmap` the kernel sees ids that are grouped, equal ids side by side, rather
    than sorted: the padding of each table stands behind that table's ids.
    """

    def update_tables(
        state: State, batch: Batch, step: Step, problem: Problem, **config: Any
    ) -> State:
        @custom_vmap
        @in_32_bits
        def one_table(state: State, batch: Batch, step: Step) -> State:
            return update(state, batch, step, problem, **config)

        @one_table.def_vmap
        @in_32_bits
        def many_tables(
            size: int, batched: Any, state: State, batch: Batch, step: Step
        ) -> tuple[State, Any]:
            stacked_state, stacked_batch = jax.tree.map(
                lambda x, is_batched: x if is_batched else _repeat(x, size),
                (state, batch),
                tuple(batched[:2]),
            )
            too_tall = size * (_room(problem) + problem.num_ids) >= 2**31
            # The noise of an element depends on its place in the table.
            alone = too_tall or problem.stochastic
            if alone or any(jax.tree.leaves(batched[2])):
                steps = jax.tree.map(
                    lambda x, is_batched: x if is_batched else _repeat(x, size),
                    step,
                    batched[2],
                )
                new = lax.map(
                    lambda each: update_tables(
                        each[0], each[1], each[2], problem, **config
                    ),
                    (stacked_state, stacked_batch, steps),
                )
            else:
                tall_state, tall_batch, tall = _one_tall_table(
                    stacked_state, stacked_batch, problem
                )
                new = update_tables(tall_state, tall_batch, step, tall, **config)
                new = tuple(x.reshape(size, -1, x.shape[-1]) for x in new)
            return new, jax.tree.map(lambda _: True, new)

        return one_table(state, batch, step)

    return update_tables


def _room(problem: Problem) -> int:
    """Rows from one table to the next in a tall one."""
    if not problem.packed:
        return problem.num_rows
    return problem.layout.num_groups * problem.layout.rows_per_group


def _one_tall_table(
    state: State, batch: Batch, problem: Problem
) -> tuple[State, Batch, Problem]:
    size, room = state[0].shape[0], _room(problem)
    number = lax.broadcasted_iota(jnp.int32, batch.ids.shape, 0)
    padding = size * room
    ids = jnp.where(batch.ids < problem.num_rows, batch.ids + number * room, padding)
    sources = jnp.where(
        batch.sources < 0, -1, batch.sources + number * problem.num_grads
    )

    def rows(x: jax.Array) -> jax.Array:
        return x.reshape(-1, x.shape[-1])

    tall = Batch(
        rows(batch.grads),
        ids.reshape(-1),
        sources.reshape(-1),
        None if batch.gains is None else batch.gains.reshape(-1),
    )
    return (
        tuple(map(rows, state)),
        tall,
        dataclasses.replace(
            problem,
            num_rows=padding,
            num_ids=size * problem.num_ids,
            num_grads=size * problem.num_grads,
        ),
    )


def _repeat(x: jax.Array, size: int) -> jax.Array:
    return jnp.broadcast_to(x, (size, *x.shape))
