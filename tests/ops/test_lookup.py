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
