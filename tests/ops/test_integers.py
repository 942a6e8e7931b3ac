"""Programs that set `jax_enable_x64`, as those with 64-bit ids do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.static import StaticCase, count_all
from sparse_adam import PackedTable, plan_update
from sparse_adam.ops.integers import in_32_bits
from tests import ways
from tests.helpers import assert_bitwise_equal, assert_states_bitwise_equal

STRAYS = np.array([2**32 + 3, -(2**32) + 3, 2**40, 2**63 - 1])


def call(way):
    """Three arrays, 64-bit ids of which some would wrap into the table, gradients."""
    *state, ids, grads = way.inexact("zipf")
    ids = ids.astype(np.int64)
    ids[: len(STRAYS)] = STRAYS
    return *state, ids, grads


def narrow(ids):
    return np.where((ids >= 0) & (ids < 40), ids, -1).astype(np.int32)


@pytest.mark.parametrize("way", ways.ALL, ids=str)
def test_updates_are_the_same_with_64_bits(way):
    *state, ids, grads = call(way)
    expected = jax.jit(lambda *arrays: way(*arrays))(*state, narrow(ids), grads)
    with jax.enable_x64(True):
        wide = jnp.asarray(ids), jnp.asarray(grads, jnp.float64)
        assert (wide[0].dtype, wide[1].dtype) == (jnp.int64, jnp.float64)
        new = jax.jit(lambda *arrays: way(*arrays))(*state, *wide)
        assert_states_bitwise_equal(new, expected)


# The rule for vmap is one for all; where it is applied depends on the order.
@pytest.mark.parametrize("order", ["jit of vmap", "vmap of jit"])
@pytest.mark.parametrize("way", ways.LAZY[:2], ids=str)
def test_vmap_is_the_same_with_64_bits(way, order):
    *state, ids, grads = (np.stack([x, x[::-1]]) for x in call(way))

    def update(*arrays):
        if order == "jit of vmap":
            return jax.jit(jax.vmap(lambda *one: way(*one)))(*arrays)
        return jax.vmap(jax.jit(lambda *one: way(*one)))(*arrays)

    expected = update(*state, narrow(ids), grads)
    with jax.enable_x64(True):
        new = update(*map(jnp.asarray, (*state, ids, grads)))
        assert_states_bitwise_equal(new, expected)


def test_plans_and_lookups_are_the_same_with_64_bits():
    ids = np.array([3, *STRAYS, 0, -1])
    arrays = [np.arange(40, dtype=np.float32).reshape(5, 8)] * 3
    plan = plan_update(ids, 5)
    rows = PackedTable.pack(*arrays).lookup(ids)
    with jax.enable_x64(True):
        on_device = jnp.asarray(ids)
        for new, old in (
            *zip(
                jax.tree.leaves(plan_update(on_device, 5)),
                jax.tree.leaves(plan),
                strict=True,
            ),
            (
                jax.jit(lambda *x: PackedTable.pack(*x[:3]).lookup(x[3]))(
                    *arrays, on_device
                ),
                rows,
            ),
        ):
            assert new.dtype == old.dtype
            assert_bitwise_equal(new, old)


def test_32_bits_inside_only():
    with jax.enable_x64(True):
        assert in_32_bits(lambda: jnp.arange(3).dtype)() == jnp.int32
        assert jnp.arange(3).dtype == jnp.int64


def test_kernels_compile_in_such_programs(monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    cases = [
        StaticCase(program, "v6e", 100_000, 128, 1000)
        for program in (
            *("sparsecore", "tensorcore", "sweep", "lookup"),
            *("packed_sparsecore", "packed_tensorcore_stochastic", "packed_sweep"),
            *("combine_3", "packed_combine_3_ragged"),
        )
    ]
    for case, report in zip(cases, count_all(cases), strict=True):
        assert report.error is None, f"{case}: {report.error}"
