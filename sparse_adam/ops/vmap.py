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

from sparse_adam.kernels.problem import Problem


def over_tables(update: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a kernel's `update(*arrays, problem)` a rule for `vmap`.

    Under `vmap` the kernel sees ids that are grouped, equal ids side by side, rather
    than sorted: the padding of each table stands behind that table's ids.
    """

    def update_tables(*arrays: Any, problem: Problem) -> Any:
        @custom_vmap
        def one_table(*arrays: Any) -> Any:
            return update(*arrays, problem=problem)

        @one_table.def_vmap
        def many_tables(size: int, batched: Any, *arrays: Any) -> Any:
            *stacked, rates = jax.tree.map(
                lambda x, is_batched: x if is_batched else _repeat(x, size),
                arrays,
                tuple(batched),
            )
            if batched[-1] or size * (problem.num_rows + problem.num_ids) >= 2**31:
                new = lax.map(
                    lambda each: update_tables(*each, problem=problem),
                    (*stacked, rates),
                )
            else:
                tall, tall_problem = _one_tall_table(*stacked, problem=problem)
                new = update_tables(*tall, arrays[-1], problem=tall_problem)
                new = tuple(x.reshape(size, -1, problem.dim) for x in new)
            return new, jax.tree.map(lambda _: True, new)

        return one_table(*arrays)

    return update_tables


def _one_tall_table(
    table: jax.Array,
    momenta: jax.Array,
    velocities: jax.Array,
    grads: jax.Array,
    ids: jax.Array,
    sources: jax.Array,
    gains: jax.Array | None,
    *,
    problem: Problem,
) -> tuple[tuple[Any, ...], Problem]:
    size = table.shape[0]
    number = lax.broadcasted_iota(jnp.int32, ids.shape, 0)
    num_rows = problem.num_rows
    padding = size * num_rows
    ids = jnp.where(ids < num_rows, ids + number * num_rows, padding)
    sources = jnp.where(sources < 0, -1, sources + number * problem.num_grads)

    def rows(x: jax.Array) -> jax.Array:
        return x.reshape(-1, problem.dim)

    tall = (
        *map(rows, (table, momenta, velocities, grads)),
        ids.reshape(-1),
        sources.reshape(-1),
        None if gains is None else gains.reshape(-1),
    )
    return tall, dataclasses.replace(
        problem,
        num_rows=padding,
        num_ids=size * problem.num_ids,
        num_grads=size * problem.num_grads,
    )


def _repeat(x: jax.Array, size: int) -> jax.Array:
    return jnp.broadcast_to(x, (size, *x.shape))
