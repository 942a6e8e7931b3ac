"""The programs to analyse, by name."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.static.attribution import RowRule, Work, dmas_per_row
from benchmarks.static.bundles import Loop

# A jittable function, its arguments, and which of them it updates in place.
Built = tuple[Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Program:
    """A function to compile, and how to read its kernels.

    `kernels` is a regular expression: the kernels that make up the cost of a row.
    `phases` names loops and says how many rows one iteration covers; a loop that no
    rule claims gets its rows from trip counts, or from its DMAs: one for a row of each
    of the `tables`.
    """

    name: str
    build: Callable[[int, int, int], Built]
    kernels: str = r"^(?!TLP$|<)"
    phases: Mapping[str, RowRule] = field(default_factory=dict)
    tables: int = 3
    compiler_options: Mapping[str, str] = field(default_factory=dict)


def find(name: str) -> Program:
    """A registered program, or `module:attribute`: a Program, or its build function."""
    if name in PROGRAMS:
        return PROGRAMS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(
            f"program {name!r} is not one of {', '.join(PROGRAMS)}; "
            "a program of your own is module:attribute"
        )
    found = getattr(importlib.import_module(module), attribute)
    return found if isinstance(found, Program) else Program(name, found)


def _arguments(rows: int, dim: int, ids: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    table = jax.ShapeDtypeStruct((rows, dim), jnp.float32)
    return (
        table,
        table,
        table,
        jax.ShapeDtypeStruct((ids,), jnp.int32),
        jax.ShapeDtypeStruct((ids, dim), jnp.float32),
    )


def _xla_scatter_set(rows: int, dim: int, ids: int) -> Built:
    """Sparse Adam as users write it, with the kindest hints: sorted, unique ids."""

    def update(
        table: jax.Array, m: jax.Array, v: jax.Array, ids: jax.Array, grads: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        def rows_of(slot: jax.Array) -> jax.Array:
            return slot.at[ids].get(
                mode="clip", indices_are_sorted=True, unique_indices=True
            )

        def store(slot: jax.Array, rows: jax.Array) -> jax.Array:
            return slot.at[ids].set(
                rows, mode="drop", indices_are_sorted=True, unique_indices=True
            )

        new_m = 0.9 * rows_of(m) + 0.1 * grads
        new_v = 0.999 * rows_of(v) + 0.001 * grads * grads
        new_rows = rows_of(table) - 1e-3 * new_m * jax.lax.rsqrt(new_v + 1e-14)
        return store(table, new_rows), store(m, new_m), store(v, new_v)

    return update, _arguments(rows, dim, ids), (0, 1, 2)


def _sparse_adam(implementation: str, rows: int, dim: int, ids: int) -> Built:
    """The update with its plan made before: XLA's sort takes minutes to compile."""
    from sparse_adam import UpdatePlan, sparse_adam_update

    def update(
        table: jax.Array,
        m: jax.Array,
        v: jax.Array,
        ids: jax.Array,
        grads: jax.Array,
        sorted_ids: jax.Array,
        order: jax.Array,
        learning_rate: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        return sparse_adam_update(
            table,
            m,
            v,
            ids,
            grads,
            learning_rate=learning_rate,
            plan=UpdatePlan(sorted_ids, order, rows),
            implementation=implementation,
        )

    arguments = _arguments(rows, dim, ids)
    batch = jax.ShapeDtypeStruct((ids,), jnp.int32)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    return update, (*arguments, batch, batch, rate), (0, 1, 2)


def _applied_updates(loop: Loop, work: Work) -> float | None:
    """XLA's scatter applies a block of updates, one single-row store for each."""
    moves_a_window = set(loop.counts.dma) == {"hbm_to_vmem", "vmem_to_hbm"}
    return loop.counts.vst if moves_a_window and loop.counts.vst >= 128 else None


def _gathered_rows(loop: Loop, work: Work) -> float | None:
    """XLA's gather fetches a block of rows by one DMA each."""
    fetched = loop.counts.dma.get("hbm_to_vmem", 0)
    return fetched - fetched % 128 if fetched >= 128 else None


def _adam_tiles(loop: Loop, work: Work) -> float | None:
    """Adam takes one reciprocal root for each register of 8 by 128 elements."""
    elements = loop.counts.eup * 8 * 128 if loop.innermost else 0
    return elements / work.dim or None


def _one_row_updated(loop: Loop, work: Work) -> float | None:
    """A vector subcore's loop over rows: the one with roots and no streams."""
    return 1.0 if loop.innermost and loop.counts.eup and not loop.counts.dma else None


def _one_gradient_added(loop: Loop, work: Work) -> float | None:
    """Its loop over occurrences: loads and stores, no root and no stream."""
    adds = loop.counts.vld and loop.counts.vst and not loop.counts.eup
    return 1.0 if loop.innermost and adds and not loop.counts.dma else None


PROGRAMS = {
    program.name: program
    for program in (
        Program(
            "xla_scatter_set",
            _xla_scatter_set,
            phases={"gather": _gathered_rows, "apply": _applied_updates},
        ),
        Program(
            "sparsecore",
            partial(_sparse_adam, "sparsecore"),
            kernels="^sparse_adam_sparsecore",
            phases={"update": _one_row_updated, "run sums": _one_gradient_added},
        ),
        Program(
            "tensorcore",
            partial(_sparse_adam, "tensorcore"),
            kernels="^sparse_adam_tensorcore",
            phases={
                "fetch rows": dmas_per_row(hbm_to_vmem=3),
                "gradients": dmas_per_row(hbm_to_vmem=1),
                "write back": dmas_per_row(vmem_to_hbm=3),
                "update": _adam_tiles,
            },
        ),
    )
}
