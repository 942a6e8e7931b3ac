"""`rounding="stochastic"`: bfloat16 tables that learn as float32 ones do."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam import AdamState, packed_adam_update, reference, sparse_adam_update
from tests import helpers, ways
from tests.cases import BFLOAT16, Case, State
from tests.helpers import assert_states_bitwise_equal
from tests.ways import Way

KEY = jax.random.key(7)
WAYS = tuple(
    way
    for way in ways.CONTRACT
    if way.supports(Case("", 40, way.dim, 24, dtypes=BFLOAT16))
)
each_way = pytest.mark.parametrize("way", WAYS, ids=str)


def bfloat16(way: Way, **fields: Any) -> tuple[State, np.ndarray, np.ndarray]:
    state, ids, grads, _ = way.arrays(dtypes=(*BFLOAT16[:3], "float32"), **fields)
    return state, ids, grads


def test_each_kind_of_implementation_is_here():
    assert {"plain-xla", "packed-xla"} <= set(map(str, WAYS))


@each_way
def test_a_key_gives_its_own_bits_every_time(way):
    state, ids, grads = bfloat16(way)
    new = way(*state, ids, grads, rounding="stochastic", key=KEY)
    again = way(*state, ids, grads, rounding="stochastic", key=KEY)
    assert_states_bitwise_equal(new, again)
    other = way(
        *state, ids, grads, rounding="stochastic", key=jax.random.fold_in(KEY, 1)
    )
    touched = np.isin(np.arange(40), ids)
    for x, y, old in zip(new, other, state, strict=True):
        assert (np.asarray(x) != np.asarray(y))[touched].mean() > 0.1
        helpers.assert_bitwise_equal(np.asarray(x)[~touched], old[~touched])


@each_way
def test_the_same_noise_whoever_adds_it(way):
    # What differs is what float32 left at one unit in its last place: few of them.
    state, ids, grads = bfloat16(way)
    options: Any = {"rounding": "stochastic", "key": KEY, "learning_rate": 0.1}
    new = way(*state, ids, grads, **options)
    expected = sparse_adam_update(*state, ids, grads, implementation="xla", **options)
    for x, y in zip(new, expected, strict=True):
        assert (np.asarray(x) != np.asarray(y)).mean() < 0.01


@each_way
@pytest.mark.parametrize("sign", [1, -1])
def test_the_mean_moves_as_float32_does(way, sign):
    # A weight of 1 moves by 1e-3, of which bfloat16 there has 1/8 of a unit.
    shape, ids = (40, way.dim), np.arange(40, dtype=np.int32)
    table = np.full(shape, sign, np.float32)
    slots = np.zeros(shape, np.float32)
    grads = np.full(shape, 1.0, np.float32)
    options: Any = {"learning_rate": 1e-3, "beta_1": 0.0, "beta_2": 0.0}
    expected, _, _ = reference.sparse_adam_update(
        table, slots, slots, ids, grads, **options
    )
    stored = [jnp.asarray(x, jnp.bfloat16) for x in (table, slots, slots)]
    nearest = way(*stored, ids, grads, **options).table
    assert (np.asarray(nearest, np.float32) == table).mean() in (0, 1)
    keys = jax.random.split(KEY, 16)
    means = [
        np.asarray(
            way(*stored, ids, grads, rounding="stochastic", key=key, **options).table
        )
        .astype(np.float64)
        .mean()
        for key in keys
    ]
    error = np.std(means, ddof=1) / np.sqrt(len(means))
    assert 0 < error < 1e-3 / 8
    assert abs(np.mean(means) - float(expected.mean())) < 4 * error


def test_many_steps_follow_float32():
    # To the nearest the weights stay where they are; with noise they go along.
    rng = np.random.default_rng(0)
    table = rng.uniform(1, 2, (50, 64)).astype(np.float32)
    start, zeros = jnp.asarray(table, jnp.bfloat16), jnp.zeros((50, 64))
    exact = AdamState(start.astype(jnp.float32), zeros, zeros)
    stochastic = nearest = AdamState(start, zeros, zeros)
    ids = jnp.arange(50)
    for step in range(60):
        grads = jnp.asarray(rng.standard_normal((50, 64)) + 1.0, jnp.float32)
        options: Any = {"learning_rate": 1e-4, "implementation": "xla"}
        exact = sparse_adam_update(*exact, ids, grads, **options)
        nearest = sparse_adam_update(*nearest, ids, grads, **options)
        key = jax.random.fold_in(KEY, step)
        stochastic = sparse_adam_update(
            *stochastic, ids, grads, rounding="stochastic", key=key, **options
        )
    moved = float((exact[0] - start.astype(jnp.float32)).mean())
    by_noise = float(
        (stochastic[0].astype(jnp.float32) - start.astype(jnp.float32)).mean()
    )
    by_nearest = float(
        (nearest[0].astype(jnp.float32) - start.astype(jnp.float32)).mean()
    )
    assert moved < -0.01
    assert abs(by_noise / moved - 1) < 0.05
    assert by_nearest == 0


def test_float32_arrays_are_not_rounded():
    way = WAYS[0]
    *state, ids, grads = way.inexact()
    new = way(*state, ids, grads, rounding="stochastic", key=KEY)
    assert_states_bitwise_equal(new, way(*state, ids, grads))


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_keys_of_both_kinds_and_traced(make):
    state, ids, grads = bfloat16(ways.Way("plain", "xla", 16))

    @jax.jit
    def update(key):
        return sparse_adam_update(*state, ids, grads, rounding="stochastic", key=key)

    expected = sparse_adam_update(
        *state, ids, grads, rounding="stochastic", key=jax.random.key(3)
    )
    assert_states_bitwise_equal(update(make(3)), expected)


def test_vmap_over_tables_draws_the_noise_of_each_alone():
    state, ids, grads = bfloat16(ways.Way("plain", "xla", 16))
    stacked = [jnp.stack([jnp.asarray(x)] * 2) for x in (*state, ids, grads)]

    def update(*arrays):
        return sparse_adam_update(*arrays, rounding="stochastic", key=KEY)

    alone = update(*(x[0] for x in stacked))
    for i in range(2):
        one = [x[i] for x in jax.vmap(update)(*stacked)]
        for x, y in zip(one, alone, strict=True):
            assert (np.asarray(x) != np.asarray(y)).mean() < 0.01


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rounding": "up"}, "rounding='up' must be 'nearest' or 'stochastic'"),
        ({"rounding": "stochastic"}, "needs a key: pass key=jax.random.fold_in"),
        ({"key": KEY}, "a key is of no use for rounding='nearest'"),
    ],
)
def test_errors(options, words):
    ones = jnp.ones((4, 2))
    arrays = (ones, ones, ones)
    with pytest.raises(ValueError, match=words):
        sparse_adam_update(*arrays, jnp.array([1]), jnp.ones((1, 2)), **options)
    packed = ways.PackedTable.pack(*arrays)
    with pytest.raises(ValueError, match=words):
        packed_adam_update(packed, jnp.array([1]), jnp.ones((1, 2)), **options)
