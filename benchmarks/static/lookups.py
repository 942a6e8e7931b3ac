"""Lookups to analyse: rows of ids, or one row of each sample's ids."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.static.attribution import KernelTotals, RowRule
from benchmarks.static.bundles import Loop
from benchmarks.static.program import Built, Program

FLOAT32, BFLOAT16 = (jnp.float32,) * 3, (jnp.bfloat16,) * 3
PLACES = (1, 3, 20)  # ids of a sample


def packed_shape(rows: int, dim: int, dtypes: Sequence[Any]) -> Any:
    """The packed table of V rows, without its values."""
    from sparse_adam import PackedTable

    tables = [jax.ShapeDtypeStruct((rows, dim), dtype) for dtype in dtypes]
    return jax.eval_shape(PackedTable.pack, *tables)


def _by_tensorcore(
    rows: int, dim: int, ids: int, *, dtypes: Sequence[Any] = FLOAT32
) -> Built:
    """Rows of a packed table by the TensorCore's kernel, whatever else the chip has."""
    from sparse_adam.kernels.lookup import lookup
    from sparse_adam.ops.integers import in_32_bits

    packed = packed_shape(rows, dim, dtypes)
    arguments = (packed.lines, jax.ShapeDtypeStruct((ids,), jnp.int32))
    return in_32_bits(partial(lookup, layout=packed.layout)), arguments, ()


def combined(
    rows: int,
    dim: int,
    ids: int,
    *,
    places: int = 1,
    dtypes: Sequence[Any] | None = None,
    weighted: bool = False,
    owned: bool = False,
    ascending: bool = True,
) -> Built:
    """Samples of so many ids each, or on average; of a plain table without `dtypes`.

    With `owned` each id names its sample: in their order, or in any if not `ascending`.
    """
    from sparse_adam.kernels.layout import PlainLayout
    from sparse_adam.ops.combine import Samples, combine

    if dtypes is None:
        stored: Any = jax.ShapeDtypeStruct((rows, dim), jnp.float32)
        layout: Any = PlainLayout.of_weights(stored)
    else:
        packed = packed_shape(rows, dim, dtypes)
        stored, layout = packed.lines, packed.layout
    size = ids // places

    def run(
        stored: jax.Array, ids: jax.Array, owners: jax.Array, gains: jax.Array
    ) -> jax.Array:
        samples = Samples(
            ids, owners if owned else None, gains if weighted else None, None
        )
        return combine(stored, samples, size, layout=layout, ascending=ascending)

    batch = jax.ShapeDtypeStruct((size * places,), jnp.int32)
    gains = jax.ShapeDtypeStruct(batch.shape, jnp.float32)
    return run, (stored, batch, batch, gains), ()


def in_by(*planes: int) -> RowRule:
    """Loops that fetch by DMAs of so many planes each: one for a row."""

    def rule(loop: Loop, work: KernelTotals) -> float | None:
        count = loop.counts.dma.get("hbm_to_vmem", 0)
        if not count or len(loop.counts.dma) > 1:
            return None
        blocks = -(-work.dim // 128)
        lines = loop.counts.dma_granules.get("hbm_to_vmem", 0) / count / blocks
        # A line is 1 granule of 512 bytes, or 16 of 32.
        return count if lines in (*planes, *(16 * each for each in planes)) else None

    return rule


def _rows_put(loop: Loop, work: KernelTotals) -> float | None:
    """The loop of a TensorCore's lookup that puts 16 rows into place."""
    return 16.0 if loop.innermost and loop.counts.vst and not loop.counts.dma else None


def _occurrences_listed(loop: Loop, work: KernelTotals) -> float | None:
    """A subcore's loop over vectors of ids, of 8 at least: four loads, three stores."""
    lists = (loop.counts.vld, loop.counts.vst) == (4, 3) and loop.counts.valu > 16
    return 8.0 if loop.innermost and lists else None


def _row_added(loop: Loop, work: KernelTotals) -> float | None:
    """Its loop over occurrences: it loads a word, or two, more than it stores."""
    adds = 0 < loop.counts.vst < loop.counts.vld <= loop.counts.vst + 2
    return 1.0 if loop.innermost and adds and not loop.counts.dma else None


_SUBCORE = {"list": _occurrences_listed, "add": _row_added}
PROGRAMS = (
    *(
        Program(
            f"lookup{name}",
            partial(_by_tensorcore, dtypes=dtypes),
            kernels="^sparse_adam_lookup",
            shared=True,
            phases={"fetch": in_by(1), "put": _rows_put},
            tables=1,
        )
        for name, dtypes in (("", FLOAT32), ("_bfloat16", BFLOAT16))
    ),
    *(
        Program(
            f"{storage}combine_{places}{name}",
            partial(combined, places=places, dtypes=dtypes, **options),
            kernels="^sparse_adam_combine",
            phases=_SUBCORE,
            streamed_rows=1 + 1 / places,
        )
        for storage, dtypes in (("", None), ("packed_", FLOAT32))
        for places in PLACES
        for name, options in (
            ("", {}),
            ("_weighted", {"weighted": True}),
            ("_ragged", {"owned": True}),
            ("_sparse", {"owned": True, "weighted": True, "ascending": False}),
        )
    ),
)
