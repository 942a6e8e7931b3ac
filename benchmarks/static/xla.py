"""XLA's own programs for an update, in the forms that users write."""

from functools import partial

import jax
import jax.numpy as jnp

from benchmarks.static.attribution import KernelTotals
from benchmarks.static.bundles import Loop
from benchmarks.static.program import Built, Program, update_arguments

# Everything that libtpu can be told to give to the SparseCores.
_OFFLOAD = {
    "xla_tpu_enable_offloading_gather_to_sparsecore": "true",
    "xla_tpu_enable_offloading_scatter_to_sparsecore": "true",
    "xla_tpu_enable_offloading_sort_to_sparsecore": "true",
    "xla_tpu_offload_all_supported_gathers_to_sparsecore": "true",
}


def _xla_rows(
    rows: int, dim: int, ids: int, *, add: bool = False, promised: bool = False
) -> Built:
    """Sparse Adam as users write it, of distinct ids: no sum and no sort.

    With `add`, the difference is added to the old rows in place of a `set`. The ids may
    be `promised` to be sorted and unique.
    """

    def update(
        table: jax.Array, m: jax.Array, v: jax.Array, ids: jax.Array, grads: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        def rows_of(slot: jax.Array) -> jax.Array:
            return slot.at[ids].get(
                mode="clip", indices_are_sorted=promised, unique_indices=promised
            )

        def store(slot: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
            write = slot.at[ids].add if add else slot.at[ids].set
            return write(
                new - old if add else new,
                mode="drop",
                indices_are_sorted=promised,
                unique_indices=promised,
            )

        old_rows, old_m, old_v = rows_of(table), rows_of(m), rows_of(v)
        new_m = 0.9 * old_m + 0.1 * grads
        new_v = 0.999 * old_v + 0.001 * grads * grads
        new_rows = old_rows - 1e-3 * new_m * jax.lax.rsqrt(new_v + 1e-14)
        return (
            store(table, old_rows, new_rows),
            store(m, old_m, new_m),
            store(v, old_v, new_v),
        )

    return update, update_arguments(rows, dim, ids), (0, 1, 2)


def _xla_dense(rows: int, dim: int, ids: int) -> Built:
    """Adam on a gradient of the table's size, as a dense optimizer makes it."""

    def update(
        table: jax.Array, m: jax.Array, v: jax.Array, ids: jax.Array, grads: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        grad = jnp.zeros_like(table).at[ids].add(grads, mode="drop")
        m = 0.9 * m + 0.1 * grad
        v = 0.999 * v + 0.001 * grad * grad
        return table - 1e-3 * m * jax.lax.rsqrt(v + 1e-14), m, v

    return update, update_arguments(rows, dim, ids), (0, 1, 2)


def _applied_updates(loop: Loop, work: KernelTotals) -> float | None:
    """XLA's scatter applies a block of updates, one single-row store for each."""
    moves_a_window = set(loop.counts.dma) == {"hbm_to_vmem", "vmem_to_hbm"}
    if not moves_a_window or loop.counts.eup or loop.counts.vst < 128:
        return None
    return loop.counts.vst


def _gathered_rows(loop: Loop, work: KernelTotals) -> float | None:
    """XLA's gather fetches a block of rows by one DMA each."""
    fetched = loop.counts.dma.get("hbm_to_vmem", 0)
    return fetched - fetched % 128 if fetched >= 128 else None


def _one_row_in(loop: Loop, work: KernelTotals) -> float | None:
    """XLA's scatter on a SparseCore fetches a row by a stream of its own ..."""
    inner = loop.innermost and loop.depth == 3
    return 1.0 if inner and loop.counts.dma == {"linear.gather": 1} else None


def _one_row_out(loop: Loop, work: KernelTotals) -> float | None:
    """... adds to it, and writes it back by another, on one of two ways."""
    added = loop.innermost and loop.counts.vld >= work.dim / 16
    return 1.0 if added and set(loop.counts.dma) == {"linear.scatter"} else None


_XLA = {"gather": _gathered_rows, "apply": _applied_updates}

PROGRAMS = (
    Program("xla_sorted", partial(_xla_rows, promised=True), phases=_XLA),
    Program("xla_unsorted", _xla_rows, phases=_XLA),
    Program("xla_add", partial(_xla_rows, add=True), phases=_XLA),
    Program(
        "xla_unsorted_offloaded", _xla_rows, phases=_XLA, compiler_options=_OFFLOAD
    ),
    Program(
        "xla_add_offloaded",
        partial(_xla_rows, add=True),
        phases=_XLA | {"row in": _one_row_in, "row out": _one_row_out},
        tables=0,
        # Of each table: the update and the row in, and the row out.
        streamed_rows=9,
        compiler_options=_OFFLOAD,
    ),
    # The zeros out; then the gradient and three tables in, and those three out.
    Program("xla_dense", _xla_dense, phases=_XLA, passes=8),
)
