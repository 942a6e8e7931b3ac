"""The programs to analyse, by name."""

import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.static import lookups, xla
from benchmarks.static.attribution import KernelTotals, dmas_per_row
from benchmarks.static.bundles import Loop
from benchmarks.static.lookups import BFLOAT16, FLOAT32, in_by, packed_shape
from benchmarks.static.program import Built, Program, update_arguments


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


def _sparse_adam(
    implementation: Any,
    rows: int,
    dim: int,
    ids: int,
    *,
    dtype: Any = jnp.float32,
    **options: Any,
) -> Built:
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
            **options,
        )

    arguments = update_arguments(rows, dim, ids, dtype)
    batch = jax.ShapeDtypeStruct((ids,), jnp.int32)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    return update, (*arguments, batch, batch, rate), (0, 1, 2)


def _packed(
    implementation: Any,
    rows: int,
    dim: int,
    ids: int,
    *,
    dtypes: Sequence[Any] = (jnp.float32,) * 3,
    **options: Any,
) -> Built:
    """The same on a packed table, whose one array is updated in place.

    With options of the update; rounding may be stochastic, with some key or other.
    """
    from sparse_adam import PackedTable, UpdatePlan, packed_adam_update

    *_, batch, grads = update_arguments(rows, dim, ids)
    packed = packed_shape(rows, dim, dtypes)
    stochastic = options.get("rounding") == "stochastic"

    def update(
        lines: jax.Array,
        ids: jax.Array,
        grads: jax.Array,
        sorted_ids: jax.Array,
        order: jax.Array,
        learning_rate: jax.Array,
    ) -> jax.Array:
        return packed_adam_update(
            PackedTable(lines, packed.layout),
            ids,
            grads,
            learning_rate=learning_rate,
            plan=UpdatePlan(sorted_ids, order, rows),
            implementation=implementation,
            key=jax.random.key(0) if stochastic else None,
            **options,
        ).lines

    rate = jax.ShapeDtypeStruct((), jnp.float32)
    return update, (packed.lines, batch, grads, batch, batch, rate), (0,)


def _adam_tiles(loop: Loop, work: KernelTotals) -> float | None:
    """Adam takes one reciprocal root for each register of 8 by 128 elements."""
    elements = loop.counts.eup * 8 * 128 if loop.innermost else 0
    return elements / work.dim or None


def _adam_groups(loop: Loop, work: KernelTotals) -> float | None:
    """On packed tables one for each block of 8 groups of rows."""
    registers = loop.counts.eup if loop.innermost else 0
    return registers * 8 / _blocks(work) or None


def _groups_of_all(loop: Loop, work: KernelTotals) -> float | None:
    """A sweep updates every group of the table: so many for each looked-up row."""
    groups = _adam_groups(loop, work)
    return groups and groups * _rows_per_group(work) * work.rows / work.table_rows


def _rows_per_group(work: KernelTotals) -> int:
    """Counts the rows that share lines of 128 words in a packed table, if it is large.

    Plain rows that fill whole lines share none, and such packed rows do not either.
    """
    lines, _ = packed_shape(work.table_rows, work.dim, FLOAT32).lines.shape
    # A group takes a line, or as many as its rows need, for each of the three arrays.
    return max(1, round(work.table_rows * 3 * _blocks(work) / lines))


def _blocks(work: KernelTotals) -> int:
    return -(-work.dim // 128)


def _repeats_added(loop: Loop, work: KernelTotals) -> float | None:
    """The row kernel's loop that adds 8 gradients, each where an index says."""
    adds = loop.innermost and loop.counts.vst and loop.counts.sld >= 8
    return 8.0 if adds and not (loop.counts.eup or loop.counts.dma) else None


def _lines_marked(loop: Loop, work: KernelTotals) -> float | None:
    """Its loop that puts 8 gradients where in their line their rows stand."""
    marks = loop.innermost and loop.counts.vst >= 2 and loop.counts.xlu
    other = loop.counts.eup or loop.counts.dma or loop.counts.sld >= 8
    return 8.0 if marks and not other else None


def _batch_added(loop: Loop, work: KernelTotals) -> float | None:
    """The sweep's loop that adds a batch of 16 gradients to the sums of a block."""
    adds = loop.counts.valu >= 16 and loop.counts.vst and not loop.counts.eup
    return 16.0 if loop.innermost and adds and not loop.counts.dma else None


def _one_row_updated(loop: Loop, work: KernelTotals) -> float | None:
    """A vector subcore's loop over rows: the one with roots and no streams."""
    return 1.0 if loop.innermost and loop.counts.eup and not loop.counts.dma else None


def _one_gradient_added(loop: Loop, work: KernelTotals) -> float | None:
    """Its loop over occurrences: it loads two ids more than it stores vectors."""
    adds = loop.counts.vld > loop.counts.vst > 0 and not loop.counts.eup
    return 1.0 if loop.innermost and adds and not loop.counts.dma else None


def _rows_listed(loop: Loop, work: KernelTotals) -> float | None:
    """Its loop over vectors of ids, of 8 at least: two loads, and stores of lists."""
    lists = loop.counts.vld == 2 <= loop.counts.vst and not loop.counts.eup
    return 8.0 if loop.innermost and lists and not loop.counts.dma else None


_BFLOAT16_SLOTS = (jnp.float32, jnp.bfloat16, jnp.bfloat16)
_PACKED_PHASES = {
    "fetch rows": in_by(2, 3),
    "gradients": in_by(1),
    "write back": dmas_per_row(vmem_to_hbm=1),
    "update": _adam_groups,
    "mark": _lines_marked,
    "sums": _repeats_added,
}
_SWEEP_PHASES = {"gradients": in_by(1), "add": _batch_added, "update": _groups_of_all}
_SPARSECORE = {
    "update": _one_row_updated,
    "run sums": _one_gradient_added,
    "list": _rows_listed,
}
PROGRAMS = {
    program.name: program
    for program in (
        *xla.PROGRAMS,
        *lookups.PROGRAMS,
        Program(
            "sparsecore",
            partial(_sparse_adam, "sparsecore"),
            kernels="^sparse_adam_sparsecore",
            phases=_SPARSECORE,
            streamed_rows=7,  # three and the gradient in, three out
            repeats=("run sums",),
        ),
        *(
            Program(
                f"packed_sparsecore{name}",
                partial(_packed, "sparsecore", **options),
                kernels="^sparse_adam_sparsecore",
                phases=_SPARSECORE,
                streamed_rows=1 + 2 * planes,
                repeats=("run sums",),
            )
            for name, planes, options in (
                ("", 3, {}),
                ("_bfloat16_slots", 2, {"dtypes": _BFLOAT16_SLOTS}),
                ("_bfloat16", 2, {"dtypes": BFLOAT16}),
                ("_stochastic", 2, {"dtypes": BFLOAT16, "rounding": "stochastic"}),
                ("_steps", 3, {"use_gradient_accumulation": False}),
            )
        ),
        Program(
            "tensorcore",
            partial(_sparse_adam, "tensorcore"),
            kernels="^sparse_adam_tensorcore",
            shared=True,
            phases={
                "fetch rows": dmas_per_row(hbm_to_vmem=3),
                "gradients": dmas_per_row(hbm_to_vmem=1),
                "write back": dmas_per_row(vmem_to_hbm=3),
                "update": _adam_tiles,
                "sums": _repeats_added,
            },
            repeats=("sums",),
        ),
        Program(
            "packed_tensorcore",
            partial(_packed, "tensorcore"),
            kernels="^sparse_adam_tensorcore",
            shared=True,
            phases=_PACKED_PHASES,
            tables=1,
            repeats=("sums",),
        ),
        *(
            Program(
                f"packed_tensorcore_{name}",
                partial(_packed, "tensorcore", **options),
                kernels="^sparse_adam_tensorcore",
                shared=True,
                phases=_PACKED_PHASES,
                tables=1,
                repeats=("sums",),
            )
            for name, options in (
                ("bfloat16_slots", {"dtypes": _BFLOAT16_SLOTS}),
                ("bfloat16", {"dtypes": BFLOAT16}),
                ("stochastic", {"dtypes": BFLOAT16, "rounding": "stochastic"}),
                ("steps", {"use_gradient_accumulation": False}),
            )
        ),
        *(
            Program(
                name,
                build,
                kernels="^sparse_adam_sweep",
                shared=True,
                phases=_SWEEP_PHASES,
                tables=0,
                passes=2 * arrays,  # in and out
                block_bytes=2**16,
            )
            for name, arrays, build in (
                ("sweep", 3, partial(_sparse_adam, "sweep")),
                (
                    *("sweep_bfloat16", 3),
                    partial(_sparse_adam, "sweep", dtype=jnp.bfloat16),
                ),
                ("packed_sweep", 1, partial(_packed, "sweep")),
                (
                    *("packed_sweep_bfloat16", 1),
                    partial(_packed, "sweep", dtypes=BFLOAT16),
                ),
            )
        ),
    )
}
