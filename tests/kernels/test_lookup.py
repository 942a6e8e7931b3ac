"""The lookup kernel, in both interpreters, beside the rows that were packed."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from sparse_adam import PackedTable
from sparse_adam.kernels import lookup
from sparse_adam.kernels.layout import PackedLayout
from sparse_adam.ops.lookup import lookup_packed
from tests import helpers

SIZES = ((1, 16), (3, 40), (16, 40), (20, 7), (64, 40), (100, 1), (128, 40), (300, 40))
V = 150
DTYPES = (jnp.float32, jnp.bfloat16)


@functools.cache
def packed(dim, dtype, seed=0):
    # Neighbours in lines and halves of words are there to be taken by mistake.
    rng = np.random.default_rng(seed)
    table, slots = (jnp.asarray(rng.standard_normal((V, dim))) for _ in range(2))
    slots = slots.astype(jnp.bfloat16)
    return PackedTable.pack(table.astype(dtype), slots, slots)


@functools.cache
def jitted(layout):
    return jax.jit(functools.partial(lookup.lookup, layout=layout, interpret=True))


def expected(table, ids):
    weights = np.asarray(table.unpack()[0])
    return np.where((ids >= 0)[..., None], weights[ids], np.zeros((), weights.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "count"), SIZES)
def test_any_ids(dim, count, dtype):
    table = packed(dim, dtype)

    @hypothesis.settings(max_examples=10)
    @hypothesis.given(st.lists(st.integers(-1, V - 1), min_size=count, max_size=count))
    def check(ids):
        ids = np.int32(ids)
        found = jitted(table.layout)(table.lines, ids)
        helpers.assert_bitwise_equal(found, expected(table, ids))

    check()


def test_nan_and_infinity_are_nobody_elses():
    weights = np.ones((V, 16), np.float32)
    weights[::2] = np.nan
    weights[1::4] = np.inf
    table = PackedTable.pack(weights, np.zeros_like(weights), weights)
    ids = np.array([*range(40), -1, -1], np.int32)
    found = jitted(table.layout)(table.lines, ids)
    helpers.assert_bitwise_equal(found, expected(table, ids))


@pytest.mark.parametrize(("dim", "dtype"), [(16, jnp.bfloat16), (200, jnp.float32)])
def test_in_the_tpu_interpreter(run_in_tpu_interpreter, dim, dtype):
    table = packed(dim, dtype)
    ids = np.random.default_rng(0).integers(-1, V, 150).astype(np.int32)
    assert len(ids) > 2 * lookup.rows_per_chunk(20, table.layout)
    run = functools.partial(lookup.lookup, layout=table.layout)
    found = run_in_tpu_interpreter(run, table.lines, jnp.asarray(ids))
    helpers.assert_bitwise_equal(found, expected(table, ids))


@pytest.mark.parametrize("count", [1, 150])
def test_two_cores(run_on_two_cores, count):
    table = packed(16, jnp.float32)
    ids = np.random.default_rng(0).integers(-1, V, count).astype(np.int32)
    run = functools.partial(lookup.lookup, layout=table.layout, cores=2)
    found = run_on_two_cores(run, table.lines, jnp.asarray(ids))
    helpers.assert_bitwise_equal(found, expected(table, ids))


@pytest.mark.parametrize("axes", [(0, 0), (None, 0), (0, None)])
def test_vmap_of_the_op(axes):
    # Over tables and batches, over batches for one table, over tables for one batch.
    tables = [packed(20, jnp.float32, seed) for seed in range(3)]
    ids = np.random.default_rng(0).integers(-1, V, (3, 11)).astype(np.int32)
    lines = jnp.stack([table.lines for table in tables])
    run = functools.partial(lookup_packed, layout=tables[0].layout)
    operands = [x if a == 0 else x[0] for x, a in zip((lines, ids), axes, strict=True)]
    found = jax.jit(jax.vmap(run, in_axes=axes))(*operands)
    for t in range(3):
        table = tables[t if axes[0] == 0 else 0]
        batch = ids[t if axes[1] == 0 else 0]
        helpers.assert_bitwise_equal(found[t], expected(table, batch))


def test_within_a_function_that_is_differentiated():
    table, ids = packed(16, jnp.float32), np.array([3, 5, -1, 5], np.int32)

    def loss(scale):
        rows = lookup_packed(table.lines, ids, table.layout)
        return (scale[None] * rows).sum()

    gradient = jax.jit(jax.grad(loss))(jnp.ones(16))
    np.testing.assert_allclose(gradient, expected(table, ids).sum(0), rtol=1e-6)


@pytest.mark.parametrize("dim", [1, 16, 128, 4096])
def test_chunks_fit_and_are_no_larger_than_the_batch(dim):
    layout = PackedLayout(V, dim)
    for count in (1, 16, 17, 1000):
        size = lookup.rows_per_chunk(count, layout)
        assert size in (16, 32, 64, 128, 256)
        assert size < 2 * count or size == 16
        assert size * (4 * layout.blocks + 1) * 512 <= 8 * 2**20
    if dim <= 128:
        assert size == 256


def test_bytes_moved():
    # One line in and one out, and an id's group and place.
    assert lookup.bytes_moved(10, PackedLayout(V, 16)) == 10 * (512 + 512 + 8)
