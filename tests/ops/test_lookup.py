"""The public lookup: plain and packed tables, and ids that are padding."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam import AdamState, PackedTable, lookup

TABLE = np.arange(21, dtype=np.float32).reshape(7, 3)
IDS = np.array([[6, -1], [0, 7], [2**31, -(2**40)]])
EXPECTED = np.where(((IDS >= 0) & (IDS < 7))[..., None], TABLE[np.clip(IDS, 0, 6)], 0)


@pytest.mark.parametrize("packed", [False, True])
def test_ids_outside_the_table_are_zeros(packed):
    table = jnp.asarray(TABLE)
    stored = PackedTable.pack(table, *[jnp.zeros_like(table)] * 2) if packed else table
    np.testing.assert_array_equal(lookup(stored, IDS), EXPECTED)


def test_a_nan_in_row_0_is_not_looked_up_by_padding():
    table = jnp.asarray(TABLE).at[0].set(jnp.nan)
    np.testing.assert_array_equal(lookup(table, jnp.array([-1])), np.zeros((1, 3)))


def test_it_differentiates_by_the_table_where_that_is_asked_for():
    ids = jnp.array([1, 1, -1])
    found = jax.grad(lambda table: lookup(table, ids).sum())(jnp.asarray(TABLE))
    expected = np.zeros((7, 3))
    expected[1] = 2
    np.testing.assert_array_equal(found, expected)


def test_what_is_no_table():
    state = AdamState(*[jnp.asarray(TABLE)] * 3)
    with pytest.raises(TypeError, match=r"pass state\[0\], or state.table"):
        lookup(cast(Any, state), IDS)
    with pytest.raises(ValueError, match=r"table.shape=\(7,\) must be \(V, D\)"):
        lookup(jnp.zeros(7), IDS)
    with pytest.raises(TypeError, match=r"ids.dtype=float64 must be an integer"):
        lookup(jnp.asarray(TABLE), np.array([1.0]))


def test_its_derivatives_are_those_of_a_gather():
    ids = jnp.array([[1, 1], [-1, 6]])
    table = jnp.asarray(TABLE)

    def gather(table):
        return jnp.where((ids >= 0)[..., None], table[ids], 0)

    found = jax.jacfwd(lambda x: lookup(x, ids))(table)
    np.testing.assert_array_equal(found, jax.jacfwd(gather)(table))
    square = jax.hessian(lambda x: (lookup(x, ids) ** 3).sum())(table)
    np.testing.assert_allclose(
        square, jax.hessian(lambda x: (gather(x) ** 3).sum())(table)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_a_table_keeps_its_dtype_and_bits(dtype):
    table = jnp.asarray(TABLE, dtype)
    found = jax.jit(lookup)(table, jnp.array([[6, -1], [0, 7]]))
    assert found.dtype == table.dtype
    np.testing.assert_array_equal(found, jnp.asarray(EXPECTED[:2], dtype))


@pytest.mark.parametrize("both", [False, True])
def test_tables_side_by_side(both):
    tables = jnp.stack([jnp.asarray(TABLE), 100 + jnp.asarray(TABLE)], axis=1)
    ids = jnp.array([[6, -1], [0, 7]])
    found = jax.vmap(lookup, in_axes=(1, 0 if both else None))(
        tables, ids if both else ids[0]
    )
    right = [lookup(tables[:, t], ids[t if both else 0]) for t in range(2)]
    np.testing.assert_array_equal(found, jnp.stack(right))
