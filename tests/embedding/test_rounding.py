"""bfloat16 tables: they learn if their rounding is stochastic."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam.embedding import (
    Adam,
    FeatureConfig,
    TableConfig,
    TPUEmbedding,
    apply_gradients,
    init,
    lookup,
)

KEY = jax.random.key(0)
IDS, ONES = jnp.arange(32), jnp.ones((32, 32))
STEPS, RATE = 200, 1e-4


def config_of(dtype, slot_dtype=jnp.float32):
    ones = jax.nn.initializers.ones
    return FeatureConfig(
        TableConfig(32, 32, ones, dtype=dtype, slot_dtype=slot_dtype, name="t")
    )


def mean_after(dtype, slot_dtype=jnp.float32, **options):
    state = init(config_of(dtype, slot_dtype), Adam(RATE), KEY, storage="plain")

    def step(state, number):
        own: Any = {"key": jax.random.fold_in(KEY, number)} if options else {}
        return apply_gradients(state, IDS, ONES, **options, **own), None

    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(STEPS)))(state)
    return float(lookup(state, IDS).astype(jnp.float32).mean())


def test_a_bfloat16_table_learns_on_average():
    want = 1 - mean_after(jnp.float32)
    assert want > 0.02
    assert mean_after(jnp.bfloat16) == 1  # to the nearest every update is lost
    moved = 1 - mean_after(jnp.bfloat16, rounding="stochastic")
    assert moved == pytest.approx(want, rel=0.05)


@pytest.mark.parametrize("pipelined", [False, True])
def test_the_object_takes_a_new_key_for_each_update(pipelined):
    def trained(dtype, steps, **options):
        embedding = TPUEmbedding(
            config_of(dtype), Adam(RATE), pipelined, storage="plain", **options
        )
        means = []
        for _ in range(steps):
            embedding.enqueue(IDS)
            embedding.dequeue()
            embedding.apply_gradients(ONES)
            means.append(embedding.retrieve()["t"]["parameters"].astype(np.float32))
        return np.stack(means)

    exact = trained(jnp.float32, STEPS)
    rounded = trained(jnp.bfloat16, STEPS, rounding="stochastic")
    # The first step is the smallest: with one key for all steps, what falls in it would
    # fall in the second one, too.
    fell = np.diff(rounded[:2], axis=0, prepend=1) < 0
    assert np.any(fell[0] & ~fell[1])
    assert 1 - rounded[-1].mean() == pytest.approx(1 - exact[-1].mean(), rel=0.05)
    again = trained(jnp.bfloat16, 20, rounding="stochastic")
    other = trained(jnp.bfloat16, 20, rounding="stochastic", seed=1)
    np.testing.assert_array_equal(again, rounded[:20])
    assert np.any(other != again)
    assert np.all(trained(jnp.bfloat16, 20) == 1)


@pytest.mark.parametrize("stack", [False, True])
def test_tables_of_one_step_are_rounded_by_their_own_keys(stack):
    config = [config_of(jnp.bfloat16).table, TableConfig(32, 32)]
    config[1] = TableConfig(32, 32, config[0].initializer, dtype=jnp.bfloat16)
    features = [*map(FeatureConfig, config)]
    state = init(features, Adam(1e-3), KEY, storage="plain", stack=stack)
    new = apply_gradients(
        state, [IDS] * 2, [ONES] * 2, rounding="stochastic", key=KEY
    ).tables
    one, two = (np.asarray(stored.table, np.float32) for stored in new.values())
    assert np.any(one != two)


def test_keys_are_checked():
    state = init(config_of(jnp.bfloat16), Adam(), KEY)
    for options, error, text in (
        ({"rounding": "stochastic"}, ValueError, "needs a key: pass key=jax.random.fo"),
        ({"key": KEY}, ValueError, "a key is of no use for rounding='nearest'"),
        ({"rounding": "up"}, ValueError, "rounding='up' must be 'nearest' or"),
        (
            {"rounding": "stochastic", "key": 3},
            TypeError,
            r"pass jax.random.key\(3\)",
        ),
    ):
        with pytest.raises(error, match=text):
            apply_gradients(state, IDS, ONES, **cast(Any, options))
