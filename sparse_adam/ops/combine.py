"""Combining the rows that each sample looks up, weighted, into one row.

On a CPU the C++ library adds the rows where they are read, and so do SparseCores, so
that no row is written; those take the occurrences in the order of their samples, and
are given them so. Elsewhere, and for tables that are spread over devices, rows are
looked up first and added up by XLA.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad

from sparse_adam._types import Gains, Indices
from sparse_adam.kernels import cpu, sparsecore
from sparse_adam.kernels.layout import Layout
from sparse_adam.ops.integers import in_32_bits
from sparse_adam.ops.late import late_primitive
from sparse_adam.ops.lookup import lookup_stored
from sparse_adam.ops.reading import over_tables, read_rows
from sparse_adam.ops.shards import Shards, vary_alike
from sparse_adam.ops.sorting import sort_pairs


class Samples(NamedTuple):
    """The ids of samples: row s is `scales[s] * sum(gains[i] * table[ids[i]])`.

    Attributes:
        ids: int32 `[N]`; -1 for none, which adds nothing, whatever its gain.
        owners: int32 `[N]`, the sample of each id; one outside `[0, S)` adds nothing.
            None: each sample has as many ids, one behind the other.
        gains: float32 `[N]`; None for 1.
        scales: float32 `[S]`; None for 1.
    """

    ids: Indices
    owners: Indices | None
    gains: Gains | None
    scales: jax.Array | None


def sum_over_samples(
    x: jax.Array, owners: Indices | None, num_samples: int, *, ascending: bool = False
) -> jax.Array:
    """Returns `[S, ...]`: the sums of `x`, `[N, ...]`, over each sample."""
    if owners is None:
        places = x.shape[0] // max(num_samples, 1)
        return x.reshape(num_samples, places, *x.shape[1:]).sum(1)
    return jax.ops.segment_sum(x, owners, num_samples, indices_are_sorted=ascending)


@jax.named_scope("combine")  # `benchmarks step --static` sums by it
def combine_rows(
    rows: jax.Array,
    samples: Samples,
    num_samples: int,
    *,
    ascending: bool = False,
    zeros: bool = False,
) -> jax.Array:
    """Combines rows that were looked up, `[N, D]`: float32 `[S, D]`.

    `ascending` promises that the owners are; `zeros`, that the row of an id of -1 is.
    """
    rows = _weighed(rows, samples)
    if not zeros:
        # A select, since a row that is not asked for may hold anything.
        rows = jnp.where(samples.ids[:, None] >= 0, rows, 0)
    sums = sum_over_samples(rows, samples.owners, num_samples, ascending=ascending)
    return _scaled(sums, samples.scales)


def _weighed(rows: jax.Array, samples: Samples) -> jax.Array:
    """Returns the rows in float32, times their gains, which are 0 for none."""
    rows = rows.astype(jnp.float32)
    if samples.gains is None:
        return rows
    return jnp.where(samples.ids >= 0, samples.gains, 0)[:, None] * rows


def _scaled(sums: jax.Array, scales: jax.Array | None) -> jax.Array:
    """Returns the sums `[S, D]` times the scales of the samples.

    A sample without ids stays 0, even where its scale is infinite.
    """
    if scales is None:
        return sums
    unused = ~jnp.isfinite(scales)[:, None] & (sums == 0)
    return jnp.where(unused, 0, scales[:, None]) * sums


def combine(
    stored: jax.Array,
    samples: Samples,
    num_samples: int,
    *,
    layout: Layout,
    ascending: bool = False,
) -> jax.Array:
    """Returns `[S, D]`: the combined rows of each sample, in the table's dtype.

    Args:
        stored: a plain table `[V, D]`, or packed lines.
        samples: their ids.
        num_samples: S.
        layout: of the table.
        ascending: promises that `samples.owners` are.
    """
    spread = Shards.of("table", stored) is not None
    alone = samples.owners is None and samples.ids.size == num_samples
    as_stored = alone and samples.gains is None and samples.scales is None
    if spread or as_stored:
        rows = lookup_stored(stored, samples.ids, layout)
        combined = combine_rows(
            rows, samples, num_samples, ascending=ascending, zeros=True
        )
        return combined.astype(rows.dtype)
    stored, samples = vary_alike((stored, samples))
    options = {"num_samples": num_samples, "ascending": ascending}
    return _combine(stored, samples, layout=layout, **options)


@in_32_bits
@functools.partial(jax.jit, static_argnames=("layout", "num_samples", "ascending"))
def _combine(
    stored: jax.Array, samples: Samples, *, layout: Layout, **options: Any
) -> jax.Array:
    arrays, structure = jax.tree.flatten((stored, samples))
    return _combine_samples(*arrays, structure=structure, layout=layout, **options)[0]


def _run(
    platform: str | None,
    *arrays: jax.Array,
    structure: Any,
    layout: Layout,
    num_samples: int,
    ascending: bool,
) -> tuple[jax.Array]:
    """Combines where rows are read: on SparseCores, or in C++ on a CPU.

    Elsewhere rows are looked up before.
    """
    stored, samples = jax.tree.unflatten(structure, arrays)
    if platform == "tpu" and sparsecore.lookup.is_compiled(layout):
        if not ascending:
            samples = by_owner(samples, num_samples)
        combined = _on_sparsecores(stored, samples, num_samples, layout)
    elif platform == "cpu" and cpu.lookup.unsupported(layout) is None:
        combined = cpu.lookup.combine_rows(
            stored,
            samples.ids,
            num_samples=num_samples,
            samples=samples.owners,
            gains=samples.gains,
            scales=samples.scales,
            layout=layout,
        )
    elif samples.owners is None:
        combined = _by_places(stored, samples, num_samples, layout)
    else:
        rows = read_rows(stored, samples.ids, layout)
        combined = combine_rows(
            rows, samples, num_samples, ascending=ascending, zeros=True
        )
    return (combined.astype(layout.dtypes[0]),)


def by_owner(samples: Samples, num_samples: int) -> Samples:
    """Returns occurrences in the order of their samples, those of one as they came.

    A sort of N words costs a TPU less than writing the N rows and reading them again.

    Args:
        samples: in any order; without owners they are in it.
        num_samples: S. Occurrences of no sample come last, with the owner S.
    """
    owners, size = samples.owners, samples.ids.size
    if owners is None:
        return samples
    inside = (owners >= 0) & (owners < num_samples)
    gains = () if samples.gains is None else (samples.gains,)
    owners, _, ids, *gains = sort_pairs(
        jnp.where(inside, owners, num_samples),
        lax.iota(jnp.int32, size),
        num_samples + 1,
        max(size, 1),
        (samples.ids, *gains),
    )
    return Samples(ids, owners, gains[0] if gains else None, samples.scales)


def _on_sparsecores(
    stored: jax.Array, samples: Samples, num_samples: int, layout: Layout
) -> jax.Array:
    """Combines on SparseCores; XLA scales what comes out of them, a row a sample."""
    combined = sparsecore.lookup.combine_rows(
        *(stored, samples.ids, layout),
        num_samples=num_samples,
        owners=samples.owners,
        gains=samples.gains,
    )
    return _scaled(combined, samples.scales)


def _by_places(
    stored: jax.Array, samples: Samples, num_samples: int, layout: Layout
) -> jax.Array:
    """Combines samples of L ids each: looks up all first ones, then all second ones.

    A TPU adds up `[L, S, D]` over its first dimension tile by tile. `[S, L, D]` over
    its second one it would first lay out anew, L filled up to whole tiles.
    """
    places = samples.ids.size // max(num_samples, 1)

    def turned(x: jax.Array) -> jax.Array:
        return x.reshape(num_samples, places).T.reshape(-1)

    gains = None if samples.gains is None else turned(samples.gains)
    by_place = Samples(turned(samples.ids), None, gains, None)
    rows = _weighed(read_rows(stored, by_place.ids, layout), by_place)
    sums = rows.reshape(places, num_samples, layout.dim).sum(0)
    return _scaled(sums, samples.scales)


def _results(
    *types: Any, structure: Any, layout: Layout, num_samples: int, ascending: bool
) -> list[Any]:
    """Returns the type of `[S, D]` weights, which vary as the ids do."""
    del ascending
    _, samples = jax.tree.unflatten(structure, types)
    shape = num_samples, layout.dim
    return [samples.ids.update(shape=shape, dtype=layout.dtypes[0])]


def _over_tables(
    arrays: Any,
    axes: Any,
    *,
    structure: Any,
    layout: Layout,
    num_samples: int,
    ascending: bool,
) -> tuple[list[jax.Array], list[int]]:
    """Combines T batches under `jax.vmap`: of one table as one, of T tables in turn."""
    static = {"num_samples": num_samples, "ascending": ascending}

    def of_each(*arrays: jax.Array) -> jax.Array:
        one = functools.partial(
            _combine_samples, structure=structure, layout=layout, **static
        )
        return lax.map(lambda each: one(*each)[0], arrays)

    def bind(*arrays: jax.Array) -> jax.Array:
        stored, samples = jax.tree.unflatten(structure, arrays)
        size, owners = samples.ids.shape[0], samples.owners
        if owners is not None:
            number = lax.broadcasted_iota(jnp.int32, owners.shape, 0)
            inside = (owners >= 0) & (owners < num_samples)
            raised = owners + number * num_samples
            owners = jnp.where(inside, raised, size * num_samples)
        flat = jax.tree.map(lambda x: x.reshape(-1), samples._replace(owners=owners))
        (combined,) = _combine_samples(
            *jax.tree.leaves((stored, flat)),
            structure=structure,
            layout=layout,
            num_samples=size * num_samples,
            ascending=ascending and size == 1,
        )
        return combined.reshape(size, num_samples, layout.dim)

    return over_tables(bind, of_each, arrays, axes)


def _jvp(primals: Any, tangents: Any, **static: Any) -> tuple[list[Any], list[Any]]:
    """Differentiates rows that were looked up, by weights, gains and scales."""
    found = _combine_samples(*primals, **static)
    moving = [i for i, x in enumerate(tangents) if not isinstance(x, ad.Zero)]

    def portable(*given: jax.Array) -> jax.Array:
        arrays = list(primals)
        for i, x in zip(moving, given, strict=True):
            arrays[i] = x
        return _run(None, *arrays, **static)[0]

    _, tangent = jax.jvp(
        portable, [primals[i] for i in moving], [tangents[i] for i in moving]
    )
    return found, [tangent]


_combine_samples = late_primitive(
    "sparse_combine", _run, _results, _over_tables, jvp=_jvp
)
