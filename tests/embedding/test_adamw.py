"""AdamW, AMSGrad and rows that catch up, in the embedding API."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam import PackedTable, reference
from sparse_adam.embedding import (
    SGD,
    Adam,
    AdamW,
    FeatureConfig,
    TableConfig,
    apply_gradients,
    apply_row_gradients,
    init,
    row_gradients,
)
from sparse_adam.rules import AdamRule
from tests.ops.test_bias_correction import adamw
from tests.peers import PEERS

# Of torch.optim.AdamW in torch 2, with our names for its betas and eps.
TORCH_DEFAULTS = {
    "learning_rate": 1e-3,
    "beta_1": 0.9,
    "beta_2": 0.999,
    "epsilon": 1e-8,
    "weight_decay": 1e-2,
    "amsgrad": False,
}


def test_defaults_are_those_of_torch():
    fields = {f.name: f.default for f in dataclasses.fields(AdamW)}
    assert {name: fields[name] for name in TORCH_DEFAULTS} == TORCH_DEFAULTS
    assert AdamW().rule == AdamRule(
        epsilon=1e-8, sum_inside_sqrt=False, bias_correction="row", epsilon_hat=False
    )
    assert AdamW() == AdamW(1e-3, weight_decay=0.01)
    assert hash(AdamW()) != hash(AdamW(weight_decay=0.02))


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("torch_adamw", AdamW(0.125, 0.5, 0.75, 1e-30, weight_decay=0.5)),
        ("torch_adamw_amsgrad", AdamW(0.125, amsgrad=True)),
    ],
)
def test_equals_what_torch_computed(name, optimizer):
    peer = next(peer for peer in PEERS if peer.name == name)

    def update(state, ids, grads, **of_the_peer):
        del of_the_peer
        return optimizer.update(optimizer.state_of(state), ids, grads)

    peer.check(update, np.float32, rtol=2e-6)


@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_rows_in_every_batch_equal_the_loop_of_torch(size):
    """Also where gradients are so small that it shows where epsilon stands."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(4, 3)).astype(np.float32)
    grads = (size * rng.normal(size=(9, 4, 3))).astype(np.float32)
    optimizer = AdamW(weight_decay=0.5)
    update = jax.jit(optimizer.update)
    state = optimizer.init(table, storage="plain")
    rates = np.float32(0.1) / np.arange(1, 10, dtype=np.float32)
    for g, rate in zip(grads, rates, strict=True):
        state = update(state, np.arange(4), g, learning_rate=rate)
    right = adamw(table, grads, rates, 0.5, 1e-8)
    np.testing.assert_allclose(state[0], right, atol=2e-5 * np.abs(right - table).max())


def test_rows_that_do_not_occur():
    """Lazy ones keep their bits; `lazy=False` gives all rows the step of torch."""
    rng = np.random.default_rng(1)
    table = rng.normal(size=(3, 2)).astype(np.float32)
    grads = rng.normal(size=(6, 3, 2)).astype(np.float32)
    grads[3:, 2] = 0
    new = {}
    for lazy in (True, False):
        optimizer = AdamW(0.1, weight_decay=0.5, lazy=lazy)
        new[lazy] = [optimizer.init(table, storage="plain")]
        for number, g in enumerate(grads):
            ids = np.arange(3 if number < 3 else 2)
            new[lazy].append(optimizer.update(new[lazy][-1], ids, g[: ids.size]))
    right = adamw(table, grads, np.full(6, np.float32(0.1)), 0.5, 1e-8)
    np.testing.assert_allclose(new[False][-1].table, right, rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(new[True][-1].table[2], new[True][3].table[2])
    assert (np.abs(right[2] - np.asarray(new[True][3].table[2])) > 0.05).all()


@pytest.mark.parametrize(
    ("optimizer", "names"),
    [
        (AdamW(bias_correction=None), ()),
        (Adam(amsgrad=True), ("maxima",)),
        (AdamW(bias_correction=None, amsgrad=True), ("maxima",)),
        (Adam(bias_correction="row"), ("steps",)),
        (AdamW(amsgrad=True), ("maxima", "steps")),
        (AdamW(catch_up=True, bias_correction=None), ("steps",)),
    ],
)
def test_states_and_storage(optimizer, names):
    state = optimizer.init(jnp.ones((4, 2)), storage="plain")
    assert state._fields == ("table", "momenta", "velocities", *names)
    assert optimizer.slot_names == state._fields[1:]
    if "steps" in names:
        with pytest.raises(ValueError, match="has no place"):
            optimizer.init(jnp.ones((4, 2)), storage="packed")
        return
    packed = optimizer.init(jnp.ones((4, 2)), storage="packed")
    assert isinstance(packed, PackedTable)
    ids, grads = np.array([1, 1, 3]), np.ones((3, 2), np.float32)
    plain = optimizer.update(state, ids, grads)
    packed = optimizer.update(packed, ids, grads)
    for x, right in zip(packed.unpack(), plain, strict=True):
        np.testing.assert_allclose(x, right, rtol=1e-6)


@pytest.mark.parametrize("weight_decay", [-0.1, float("nan")])
def test_a_bad_decay(weight_decay):
    with pytest.raises(ValueError, match=f"weight_decay={weight_decay} must be"):
        AdamW(weight_decay=weight_decay)


@pytest.mark.parametrize("by_row", [False, True])
def test_rows_catch_up_in_the_embedding_api(by_row):
    optimizer = AdamW(0.125, 0.75, 0.875, 0.25, weight_decay=0.5, catch_up=True)
    slow = TableConfig(8, 4, optimizer=optimizer, name="slow")
    other = TableConfig(8, 4, optimizer=SGD(0.1), name="other")
    config = {"slow": FeatureConfig(slow), "other": FeatureConfig(other)}
    state = init(config, None, jax.random.key(0), storage="plain")

    @jax.jit
    def update(state, features, gradients):
        if by_row:
            rows = row_gradients(state, features, gradients)
            return apply_row_gradients(state, rows)
        return apply_gradients(state, features, gradients)

    right: Any = [np.asarray(x, np.float64) for x in state.tables["slow"]]
    step = reference.adam(0.75, 0.875, 0.25, False, "row", epsilon_hat=False)
    for number, row in ((1, 3), (2, 5), (7, 3), (8, 5)):
        features = {"slow": np.array([row]), "other": np.array([row])}
        gradients = {name: np.full((1, 4), 0.5, np.float32) for name in features}
        # Steps without these rows only count.
        state = dataclasses.replace(state, step=jnp.int32(number - 1))
        state = update(state, features, gradients)
        decays: dict[str, Any] = {
            "weight_decay_factor": 0.5,
            "multiply_weight_decay_factor_by_learning_rate": True,
        }
        right = reference.caught_up(
            right, [row], number, beta_1=0.75, beta_2=0.875, decay=0.0625
        )
        ids, grads = features["slow"], gradients["slow"]
        right = reference.sparse_update(
            right, ids, grads, step, learning_rate=0.125, **decays
        )
    for x, exact in zip(state.tables["slow"], right, strict=True):
        np.testing.assert_allclose(x, exact, rtol=2e-6, atol=1e-7)
    assert state.step == 8
    state = dataclasses.replace(state, step=None)
    with pytest.raises(ValueError, match=r"state.step is None, .* \['slow'\] depend"):
        apply_gradients(state, features, gradients)


def test_rows_catch_up_on_a_mesh():
    optimizer = AdamW(0.125, weight_decay=0.5, catch_up=True)
    config = FeatureConfig(TableConfig(10, 4, name="user"))
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    update = jax.jit(apply_gradients)
    new = []
    for where in (None, mesh):
        state = init(config, optimizer, jax.random.key(0), storage="plain", mesh=where)
        for step, ids in ((1, [3, 4]), (2, [5, 3]), (9, [4, 4])):
            grads = np.full((2, 4), 0.5, np.float32)
            state = dataclasses.replace(state, step=jnp.int32(step - 1))
            state = update(state, np.array(ids), grads)
        new.append(state.tables["user"])
    for spread, alone in zip(*new, strict=True):
        np.testing.assert_allclose(spread, alone, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(new[0].steps[3:6], [2, 9, 2])
