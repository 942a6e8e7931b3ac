"""What only the portable path has: two ways to sum runs, and blocks of all rows."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam import PackedTable, packed_adam_update, reference, sparse_adam_update
from sparse_adam.ops import xla
from tests import cases, helpers
from tests.cases import Case


@pytest.mark.parametrize("num_ids", [1, 2, 7, 64, 300])
@pytest.mark.parametrize("num_distinct", [1, 3, 50, 1000])
def test_a_gpus_sums_are_a_cpus(num_ids, num_distinct):
    rng = np.random.default_rng(num_ids + num_distinct)
    ids = np.sort(rng.integers(0, num_distinct, num_ids))
    is_start = np.append(True, ids[1:] != ids[:-1])
    run = np.cumsum(is_start) - 1
    # Integers, so that float32 adds them exactly in any order.
    gradients = rng.integers(-100, 100, (num_ids, 4)).astype(np.float32)
    gradients[rng.random(num_ids) < 0.05] = np.nan
    arguments = map(jnp.asarray, (gradients, is_start, run.astype(np.int32)))
    arguments = tuple(arguments)
    by_scan = xla._sums_by_scan(*arguments)
    by_scatter = xla._sums_by_scatter(*arguments)
    used = run[-1] + 1
    np.testing.assert_array_equal(by_scan[:used], by_scatter[:used])


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 8 rows of D = 8: for V = 20 the last begins within the second."""
    monkeypatch.setattr(xla, "_BLOCK_ELEMENTS", 64)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.parametrize("storage", ["plain", "packed"])
def test_rows_of_the_last_block_are_stepped_once(small_blocks, storage):
    state, ids, grads, _ = cases.arrays(Case("", 20, 8, 6, "padded"))
    options = {"lazy_adam": False, "weight_decay_factor": 0.5}
    expected = reference.sparse_adam_update(*state, ids, grads, **options)
    options["implementation"] = "xla"
    if storage == "plain":
        new = sparse_adam_update(*state, ids, grads, **options)
    else:
        packed = PackedTable.pack(*state)
        new = packed_adam_update(packed, ids, grads, **options).unpack()
    helpers.assert_close_states(new, state, expected)


def test_noise_does_not_depend_on_the_blocks(monkeypatch):
    """Decay by half is exact, so that a row rounded twice would show."""
    ones = jnp.full((20, 8), 1 + 2**-7, jnp.bfloat16)
    zeros = jnp.zeros((20, 8), jnp.bfloat16)
    ids, grads = np.array([3], np.int32), np.zeros((1, 8), np.float32)

    def tables():
        jax.clear_caches()
        return sparse_adam_update(
            *(ones, zeros, zeros, ids, grads),
            lazy_adam=False,
            weight_decay_factor=2**-10,
            rounding="stochastic",
            key=jax.random.key(0),
            implementation="xla",
        )

    whole = tables()
    monkeypatch.setattr(xla, "_BLOCK_ELEMENTS", 64)
    helpers.assert_states_bitwise_equal(tables(), whole)
    monkeypatch.undo()
    jax.clear_caches()
    # Of two neighbours in bfloat16, and of no third, as two steps would give.
    assert set(np.unique(whole.table.astype(np.float32))) == {1, 1 + 2**-7}


@pytest.mark.parametrize("each", [False, True])
def test_rows_that_do_not_ascend_are_not_said_to(each):
    """With a step for each occurrence rows stand between places that are none."""
    state, ids, grads, _ = cases.arrays(Case("", 20, 8, 6))
    update = functools.partial(
        sparse_adam_update, use_gradient_accumulation=not each, implementation="xla"
    )
    text = jax.jit(update).lower(*state, ids, grads).as_text()
    of_tables = (
        r"scatter\".*indices_are_sorted = (\w+)(?:.*\n){3} *\}\) : \(tensor<20x8xf32>"
    )
    assert re.findall(of_tables, text) == ["false" if each else "true"] * 3


def test_a_row_is_written_once():
    """Of equal indices a scatter keeps any one, though on a CPU the last."""
    case = Case("", 20, 8, 6, options={"use_gradient_accumulation": False})
    problem = helpers.spec(case, cases.arrays(case))
    ids = jnp.array([3, 3, 3, 7, 20, 20], jnp.int32)
    rows = tuple(jnp.zeros((6, 8)) for _ in range(3))
    numbers = problem.numbers(lambda i: jnp.float32(0.1))
    places, _ = xla._step_each_occurrence(rows, rows[0], ids, numbers, problem)
    np.testing.assert_array_equal(places < 20, [0, 0, 1, 1, 0, 0])
    assert np.unique(places).size == 6


@pytest.mark.parametrize("implementation", ["xla", None])
def test_sample_ids_of_none_add_zero_without_gains(implementation):
    """Not even a NaN in row 0 of the gradients, where -1 might point."""
    state, *_ = cases.arrays(Case("", 20, 8, 6))
    ids = np.array([3, 7, 3, -1, 9], np.int32)
    sample_ids = np.array([1, -1, 2, 0, 3], np.int32)
    grads = np.ones((3, 8), np.float32)
    grads[0] = np.nan
    kept: Any = {"sample_ids": sample_ids}
    new = sparse_adam_update(*state, ids, grads, implementation=implementation, **kept)
    assert np.isfinite(new.table).all()
    grads[0] = 0
    expected = reference.sparse_adam_update(*state, ids, grads, **kept)
    helpers.assert_close_states(new, state, expected)
