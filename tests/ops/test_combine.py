"""Combined rows: one sum a sample, in C++ on a CPU, by rows elsewhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparse_adam import PackedTable, lookup
from sparse_adam.kernels.cpu import library
from sparse_adam.kernels.layout import PlainLayout
from sparse_adam.ops.combine import Samples, by_owner, combine, combine_rows
from tests import programs

V, D, S, PLACES = 8, 5, 4, 3
RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((V, D)).astype(np.float32)
IDS = np.array([0, 7, 2, -1, -1, -1, 7, 7, -1, 3, 0, 1], np.int32)
OWNERS = np.array([2, 0, 1, 0, 3, S, 2, 2, 0, S, 0, 1], np.int32)
GAINS = RNG.standard_normal(S * PLACES).astype(np.float32)
SCALES = RNG.standard_normal(S).astype(np.float32)
MESHED = [AxisType.Auto, AxisType.Explicit]


def samples(owned=False):
    """The batch of most tests, padded or with owners."""
    owners = jnp.asarray(OWNERS) if owned else None
    return Samples(jnp.asarray(IDS), owners, jnp.asarray(GAINS), jnp.asarray(SCALES))


def expected(batch, table=TABLE):
    """The sums in float64, one occurrence after the other."""
    owners = np.repeat(np.arange(S), PLACES) if batch.owners is None else batch.owners
    sums = np.zeros((S, table.shape[1]))
    for i, (row, owner) in enumerate(zip(batch.ids, owners, strict=True)):
        if row >= 0 and 0 <= owner < S:
            gain = 1 if batch.gains is None else float(batch.gains[i])
            sums[owner] += gain * table[row].astype(np.float64)
    return sums if batch.scales is None else np.asarray(batch.scales)[:, None] * sums


def stored(kind):
    """The table in some storage, and its layout."""
    table = jnp.asarray(TABLE)
    if kind == "packed":
        packed = PackedTable.pack(table, *[jnp.zeros_like(table)] * 2)
        return packed.lines, packed.layout
    table = table.astype(kind)
    return table, PlainLayout.of_weights(table)


def run(array, batch, layout=None):
    """`combine` of S samples."""
    layout = layout or PlainLayout.of_weights(array)
    return combine(array, batch, S, layout=layout)


def has_kernel(function, *args):
    """Whether the program for a CPU combines in C++."""
    compiled = jax.jit(function).lower(*args).compile()
    return library.COMBINE in programs.text(compiled)


@pytest.mark.parametrize("owned", [False, True], ids=["padded", "owned"])
@pytest.mark.parametrize("kind", ["float32", "packed"])
@pytest.mark.parametrize("bare", [(), ("gains",), ("scales",), ("gains", "scales")])
def test_values(kind, owned, bare):
    batch = samples(owned)._replace(**dict.fromkeys(bare))
    array, layout = stored(kind)
    found = run(array, batch, layout)
    np.testing.assert_allclose(found, expected(batch), rtol=1e-6, atol=1e-6)
    by_rows = combine_rows(lookup(jnp.asarray(TABLE), IDS), batch, S)
    np.testing.assert_allclose(found, by_rows, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cpp", [True, False])
def test_what_is_not_there_is_zero_whatever_its_numbers(cpp, monkeypatch):
    if not cpp:
        monkeypatch.setattr(library, "load", lambda: "it was not built")
    strange = jnp.array([jnp.inf, jnp.nan])
    batch = Samples(jnp.array([-1, -1]), None, strange, strange)
    found = jax.jit(lambda x: combine(x, batch, 2, layout=PlainLayout.of_weights(x)))
    assert not found(jnp.asarray(TABLE)).any()


@pytest.mark.parametrize("weighted", [False, True])
def test_samples_are_put_in_order_with_what_belongs_to_them(weighted):
    batch = samples(owned=True)
    if not weighted:
        batch = batch._replace(gains=None)
    found = jax.jit(by_owner, static_argnums=1)(batch, S)
    right = np.argsort(np.where(OWNERS < 0, S, OWNERS), kind="stable")
    assert found.owners.tolist() == OWNERS[right].tolist()
    assert found.ids.tolist() == IDS[right].tolist()
    assert (found.gains is None) == (batch.gains is None)
    if weighted:
        np.testing.assert_array_equal(found.gains, GAINS[right])
    np.testing.assert_allclose(
        run(jnp.asarray(TABLE), found), expected(batch), rtol=1e-6, atol=1e-6
    )
    assert by_owner(samples(), S).owners is None


def test_a_table_of_bfloat16_is_added_in_float32_and_rounded_once():
    table, layout = stored("bfloat16")
    found = run(table, samples(), layout)
    right = expected(samples(), np.asarray(table))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(found), right, rtol=2.0**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_runs_on_a_cpu(dtype):
    table, _ = stored(dtype)
    there = library.missing() is None and dtype == "float32"
    assert has_kernel(run, table, samples()) == there


def test_without_the_library_xla_adds(monkeypatch):
    right = run(jnp.asarray(TABLE), samples())
    monkeypatch.setattr(library, "load", lambda: "it was not built")
    # Another shape of the batch, since programs are kept.
    batch = jax.tree.map(lambda x: jnp.concatenate([x, x]), samples())
    found = combine(
        jnp.asarray(TABLE),
        batch,
        2 * S,
        layout=PlainLayout(V, D, (np.dtype("f4"),), (False,)),
    )
    np.testing.assert_allclose(
        found, jnp.concatenate([right] * 2), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["float32", "packed"])
def test_other_platforms_know_nothing_of_the_library(kind):
    array, layout = stored(kind)
    traced = jax.jit(functools.partial(run, layout=layout)).trace(array, samples())
    for platform in ("tpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "sparse_adam_cpu" not in text
        by_pallas = platform == "tpu" and kind == "packed"
        assert ("tpu_custom_call" in text) == by_pallas


@pytest.mark.parametrize("owned", [False, True], ids=["padded", "owned"])
@pytest.mark.parametrize("kind", ["float32", "packed"])
@pytest.mark.parametrize(
    ("many_tables", "many_batches"), [(True, True), (True, False), (False, True)]
)
def test_under_vmap(kind, owned, many_tables, many_batches):
    array, layout = stored(kind)
    batch = samples(owned)
    tables, batches = [array, array], [batch, batch]
    if many_tables:
        other = jnp.asarray(TABLE[::-1].copy())
        if kind == "packed":
            other = PackedTable.pack(other, *[jnp.zeros_like(other)] * 2).lines
        tables[1] = other
    if many_batches:
        batches[1] = batch._replace(ids=batch.ids[::-1])
    right = [run(x, y, layout) for x, y in zip(tables, batches, strict=True)]

    def stack(each, many):
        return jax.tree.map(lambda *x: jnp.stack(x), *each) if many else each[0]

    mapped = jax.vmap(
        functools.partial(run, layout=layout),
        in_axes=(0 if many_tables else None, 0 if many_batches else None),
    )
    found = mapped(stack(tables, many_tables), stack(batches, many_batches))
    np.testing.assert_array_equal(found, jnp.stack(right))


@pytest.mark.parametrize("varying", ["table", "batch"])
def test_under_shard_map_its_type_varies_as_what_it_is_made_of(varying):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    each, whole = PartitionSpec("x"), PartitionSpec()
    tables, batches = [jnp.asarray(TABLE)] * 2, [samples()] * 2
    if varying == "table":
        tables[1] = tables[1][::-1]
        table, batch, specs = jnp.concatenate(tables), batches[0], (each, whole)
    else:
        batches[1] = jax.tree.map(lambda x: x[::-1], batches[1])
        batch = jax.tree.map(lambda *x: jnp.concatenate(x), *batches)
        table, specs = tables[0], (whole, each)
    mapped = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=each))
    right = [run(*given) for given in zip(tables, batches, strict=True)]
    np.testing.assert_array_equal(mapped(table, batch), jnp.concatenate(right))
    if library.missing() is None:
        assert has_kernel(mapped, table, batch)
    # A result that varies is no replica.
    with pytest.raises(ValueError, match="out_specs"):
        jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=whole)(table, batch)


@pytest.mark.parametrize("axis_type", MESHED, ids=str)
def test_a_spread_table_stays_where_it_is(axis_type):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(axis_type,))
    spread = jax.device_put(TABLE, NamedSharding(mesh, PartitionSpec("x")))
    batch = samples(owned=True)
    compiled = jax.jit(run).lower(spread, batch).compile()
    np.testing.assert_allclose(
        compiled(spread, batch), expected(batch), rtol=1e-6, atol=1e-6
    )
    # XLA cannot cut the kernel in two: it would send the table to every device.
    assert "all-gather" not in programs.text(compiled)
    looked_up = jax.jit(lookup).lower(spread, jnp.asarray(IDS)).compile()
    assert "all-gather" not in programs.text(looked_up)


@pytest.mark.parametrize("owned", [False, True], ids=["padded", "owned"])
def test_derivatives_are_those_of_rows_that_are_looked_up(owned):
    batch = samples(owned)
    cotangent = jnp.asarray(RNG.standard_normal((S, D)), jnp.float32)

    def by(combined):
        def loss(table, gains, scales):
            return (
                combined(table, batch._replace(gains=gains, scales=scales)) * cotangent
            ).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(
            jnp.asarray(TABLE), batch.gains, batch.scales
        )

    found = by(run)
    right = by(lambda table, given: combine_rows(table[given.ids], given, S))
    for one, other in zip(found, right, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
