"""The parts of a route, each by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from sparse_adam.ops import routing
from sparse_adam.ops.routing import Placement, exchange
from sparse_adam.ops.routing.rounds import Quota, default_quota
from sparse_adam.ops.routing.unique import sum_equal, unique_rows
from sparse_adam.ops.sorting import sort_pairs
from tests.strategies import SEEDS


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("num_rows", "shards"), [(1, 1), (1, 4), (12, 4), (13, 4), (4, 8), (60, 7)]
)
def test_every_row_has_one_place(num_rows, shards, interleaved):
    placement = Placement(num_rows, shards, interleaved)
    ids = np.arange(-3, num_rows + 3, dtype=np.int32)
    places = np.asarray(placement.places(jnp.asarray(ids)))
    inside = (ids >= 0) & (ids < num_rows)
    assert (places[~inside] == placement.end).all()
    owner, local = np.divmod(places[inside], placement.rows_per_shard)
    if interleaved:
        np.testing.assert_array_equal(owner, ids[inside] % shards)
        np.testing.assert_array_equal(local, ids[inside] // shards)
    else:
        np.testing.assert_array_equal(owner, ids[inside] // placement.rows_per_shard)
    table = np.arange(2 * num_rows).reshape(num_rows, 2)
    for rows in (table, jnp.asarray(table)):
        shards_of = placement.spread(rows)
        assert shards_of.shape == (shards, placement.rows_per_shard, 2)
        np.testing.assert_array_equal(shards_of[owner, local], table)
        np.testing.assert_array_equal(placement.collect(shards_of), table)


def test_placements_that_cannot_be():
    with pytest.raises(ValueError, match=r"num_rows=0 must be at least 1"):
        Placement(0, 4)
    with pytest.raises(ValueError, match=r"num_shards=0 must be at least 1"):
        Placement(4, 0)
    with pytest.raises(ValueError, match="split the table"):
        Placement(2**31 - 1, 4)


@pytest.mark.parametrize(("end", "size"), [(40, 24), (2**31 - 1, 24), (2**30, 3)])
@given(SEEDS)
def test_unique_rows(end, size, seed):
    """In one word, and in two where a place and a position do not fit one."""
    rng = np.random.default_rng(seed)
    places = rng.choice([*rng.integers(0, end, 8), end], size).astype(np.int32)
    found = jax.jit(unique_rows, static_argnums=1)(places, end)
    distinct = np.unique(places)
    np.testing.assert_array_equal(found.places[: distinct.size], distinct)
    assert (np.asarray(found.places[distinct.size :]) == end).all()
    np.testing.assert_array_equal(found.order, np.argsort(places, stable=True))
    np.testing.assert_array_equal(distinct[found.inverse], places)
    np.testing.assert_array_equal(distinct[found.runs], places[found.order])


@given(SEEDS)
def test_sorted_pairs_do_not_depend_on_the_bounds(seed):
    rng = np.random.default_rng(seed)
    keys, values = (rng.integers(0, 5, 16).astype(np.int32) for _ in range(2))
    order = np.lexsort((values, keys))
    for bounds in ((5, 5), (2**31 - 1, 5), (5, 2**31 - 1)):
        found = sort_pairs(jnp.asarray(keys), jnp.asarray(values), *bounds)
        np.testing.assert_array_equal(found, (keys[order], values[order]))


def test_equal_rows_are_summed_and_strays_are_not():
    rows = jnp.array([3, -1, 3, 9, 0, 2**31 - 1], jnp.int32)
    grads = jnp.where(jnp.array([0, 1, 0, 1, 0, 1])[:, None] == 1, jnp.nan, 1.0)
    distinct, sums = sum_equal(rows, grads, 9)
    assert distinct.tolist() == [0, 3, 9, 9, 9, 9]
    assert sums[:2].tolist() == [[1], [2]]


@pytest.mark.parametrize("width", [1, 128, 300])
@given(st.lists(st.integers(0, 600), min_size=4, max_size=4))
def test_slices(width, begin):
    array = jnp.arange(601, dtype=jnp.int32)
    cut = jax.jit(exchange.slices, static_argnums=2)
    found = cut(array, jnp.array(begin, jnp.int32), width)
    for line, start in zip(np.asarray(found), begin, strict=True):
        inside = np.arange(start, min(start + width, 601))
        np.testing.assert_array_equal(line[: inside.size], inside)


@pytest.mark.parametrize("num_ids", [1, 7, 256, 4096, 65_536, 876_544])
def test_the_default_quota_has_room_for_uniform_ids(num_ids):
    for shards in (1, 4, 16, 64, 256, 1024):
        quota = default_quota(num_ids, shards)
        assert (
            shards <= quota.total <= max(shards, 1.125 * num_ids + 6 * num_ids**0.5 + 1)
        )
        mean = num_ids / shards
        assert quota.part >= min(num_ids, mean + 5.9 * mean**0.5)
        assert quota.total <= shards * quota.part
        assert (quota.part + 2) % 128 == 0 or quota.part == num_ids


def mesh(sizes=(8,), names=("x",)):
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))


def mapped(function, on=None, **specs):
    over_x = PartitionSpec("x")
    specs = {"mesh": on or mesh(), "in_specs": over_x, "out_specs": over_x} | specs
    return jax.jit(functools.partial(jax.shard_map, **specs)(function))


def test_a_route_may_be_made_apart():
    """It leaves one `shard_map` and enters others, and keeps the shape of the ids."""
    placement = Placement(50, 8, interleaved=True)
    table = np.arange(100, dtype=np.float32).reshape(50, 2)
    ids = np.random.default_rng(0).integers(-1, 50, (16, 3)).astype(np.int32)
    made = mapped(lambda ids: routing.route(ids, placement, "x"))(ids)
    assert made.shape == (2, 3)

    def look(route, shard):
        return routing.lookup(route, lambda rows: shard[0].at[rows].get(mode="clip"))

    found = mapped(look)(made, placement.spread(table))
    expected = np.where((ids >= 0)[..., None], table[np.maximum(ids, 0)], 0)
    np.testing.assert_array_equal(found, expected)

    def count(route, grads, shard):
        def add(shard, rows, grads):
            return shard.at[jnp.where(rows < 0, 7, rows)].add(grads, mode="drop")

        return routing.update(route, grads, shard[0], add)[None]

    grads = np.ones((16, 3, 2), np.float32)
    sums = mapped(count)(made, grads, placement.spread(np.zeros_like(table)))
    counted = np.bincount(ids[ids >= 0], minlength=50)
    np.testing.assert_array_equal(placement.collect(sums)[:, 0], counted)


@pytest.mark.parametrize("check_vma", [False, True])
def test_replicas_along_other_axes(check_vma):
    """Every replica gets the same ids and has the same rows, and JAX can see it."""
    placement = Placement(50, 4)
    table = np.arange(100, dtype=np.float32).reshape(50, 2)
    ids = np.random.default_rng(0).integers(0, 50, 32).astype(np.int32)

    def step(shard, ids):
        route = routing.route(ids, placement, ("x",), quota=Quota(8, 2))
        found = routing.lookup(route, lambda rows: shard[0].at[rows].get(mode="clip"))

        def add(shard, rows, grads):
            return shard.at[jnp.where(rows < 0, 13, rows)].add(grads, mode="drop")

        return found, routing.update(route, found * 0 + 1, shard[0], add)[None]

    on = mesh((2, 4), ("replica", "x"))
    found, new = mapped(step, on, check_vma=check_vma)(placement.spread(table), ids)
    np.testing.assert_array_equal(found, table[ids])
    counted = np.bincount(ids, minlength=50)
    np.testing.assert_array_equal(placement.collect(new), table + counted[:, None])


def test_refused():
    ids = np.zeros(16, np.int32)
    with pytest.raises(ValueError, match=r"num_shards=4 must be 8, the devices along"):
        mapped(lambda ids: routing.route(ids, Placement(50, 4), "x").first.rows)(ids)
    with pytest.raises(TypeError, match=r"ids.dtype=.* must be int32"):
        placement = Placement(50, 8)
        mapped(lambda ids: routing.route(ids, placement, "x"))(ids.astype(np.uint32))

    def update(ids, grads):
        return routing.update(
            routing.route(ids, Placement(50, 8), "x"), grads, grads, lambda x, *_: x
        )

    with pytest.raises(ValueError, match=r"grads.shape=\(3, 2\) must be \(2, 'D'\)"):
        mapped(update)(ids, np.zeros((24, 2), np.float32))


def test_kernels_are_traced_once():
    calls = []
    placement = Placement(50, 8)

    def step(shard, ids, grads):
        def update(shard, rows, grads):
            calls.append(rows.shape)
            return shard.at[rows].add(grads, mode="drop")

        route = routing.route(ids, placement, "x")
        return routing.update(route, grads, shard, update)

    arrays = np.zeros((56, 2), np.float32), np.zeros(16, np.int32)
    text = mapped(step).lower(*arrays, np.zeros((16, 2), np.float32)).as_text()
    assert len(calls) == 1
    assert "ragged_all_to_all" not in text and "all_to_all" in text
