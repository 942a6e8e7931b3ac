"""Moving averages of tables: only the rows of a batch, and what is served of them."""

import dataclasses
import pickle
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam import PackedTable, reference
from sparse_adam.embedding import (
    SGD,
    Adam,
    FeatureConfig,
    RowWiseAdagrad,
    RuleOptimizer,
    TableConfig,
    TPUEmbedding,
    apply_gradients,
    from_logical,
    init,
    lookup,
    to_logical,
    weights_only,
)
from sparse_adam.rules import AdamRule, Slot, WithEMA
from tests.embedding.golden import KEY, normal
from tests.embedding.test_tpu_embedding import assert_same

V, D = 9, 4


def features_of(*optimizers: Any, **options: Any) -> list[FeatureConfig]:
    tables = [
        TableConfig(V, D, normal, optimizer, "sum", f"t{number}", **options)
        for number, optimizer in enumerate(optimizers)
    ]
    return [FeatureConfig(table) for table in tables]


def test_by_hand():
    """A gradient of 1 at a rate of 1 takes 1 from the weights; d is 3/4."""
    ones = jax.nn.initializers.ones
    table = TableConfig(4, 1, ones, SGD(1.0, ema_decay=0.75), name="t")
    state = init(FeatureConfig(table), None, KEY)
    averages = [1.0]
    for weights in (0.0, -1.0, -2.0):
        state = apply_gradients(state, jnp.array([2]), jnp.ones((1, 1)))
        averages.append(0.75 * averages[-1] + 0.25 * weights)
        assert state.table("t").ravel().tolist() == [1, 1, weights, 1]
        assert state.slots("t")["ema"].ravel().tolist() == [1, 1, averages[-1], 1]
    assert averages[1:] == [0.75, 0.3125, -0.265625]
    assert type(state.tables["t"]).__name__ == "SGDStateWithEMA"
    assert state.tables["t"]._fields == ("table", "ema")
    served = lookup(weights_only(state, ema=True), jnp.array([2, 0]))
    assert served.ravel().tolist() == [-0.265625, 1]


STEPS = {
    "adam": (
        Adam(0.1, ema_decay=0.9, clip_weight_max=0.5, weight_decay_factor=0.1),
        reference.adam(),
    ),
    "per_row": (RowWiseAdagrad(0.1, ema_decay=0.9), reference.row_wise_adagrad()),
    "each": (
        SGD(0.1, use_gradient_accumulation=False, ema_decay=0.9),
        reference.sgd(),
    ),
    "all_rows": (Adam(0.1, lazy_adam=False, ema_decay=0.9), reference.adam()),
}


# A packed table has no place for a number of a row.
@pytest.mark.parametrize(
    ("name", "storage"),
    [
        *((name, "plain") for name in STEPS),
        *((name, "packed") for name in STEPS if name != "per_row"),
    ],
)
def test_several_steps_are_those_of_the_reference(name, storage):
    optimizer, step = STEPS[name]
    state = init(features_of(optimizer), None, KEY, storage=storage)
    expected = tuple(map(np.asarray, state.tables["t0"]))
    assert_same(expected[0], expected[-1], rtol=0)
    assert expected[0] is not expected[-1]
    rng = np.random.default_rng(0)
    update = jax.jit(apply_gradients, donate_argnums=0)
    for _ in range(3):
        ids = rng.integers(-1, V - 2, 6)
        grads = (rng.integers(-8, 9, (6, D)) / 4).astype(np.float32)
        state = update(state, [ids], [grads])
        expected = reference.sparse_update(
            expected,
            ids,
            grads,
            reference.WithEMA(step, 0.9),
            learning_rate=0.1,
            lazy=name != "all_rows",
            use_gradient_accumulation=name != "each",
            clip_weight_max=optimizer.clip_weight_max,
            weight_decay_factor=optimizer.weight_decay_factor,
        )
    for x, right in zip(state.tables["t0"], expected, strict=True):
        np.testing.assert_allclose(x, right, rtol=1e-5, atol=1e-6)
    if name == "adam":  # weights were clipped before they were averaged
        assert (expected[0] == 0.5).any()


def step(state: Any, number: int) -> Any:
    rng = np.random.default_rng(number)
    ids = [rng.integers(-1, V, 8) for _ in state.layout.features]
    grads = [rng.standard_normal((8, D)).astype(np.float32) for _ in ids]
    return apply_gradients(state, ids, grads)


@pytest.mark.parametrize("how", [{"storage": "packed"}, {"stack": False}], ids=str)
def test_stacks_and_storages_average_alike(how):
    adam = Adam(0.1, ema_decay=0.8)
    config = features_of(adam, adam, SGD(0.1))
    want, got = init(config, None, KEY), init(config, None, KEY, **how)
    for number in range(2):
        want, got = step(want, number), step(got, number)
    assert_same(to_logical(got), to_logical(want))
    averages = to_logical(want)["t1"]["ema"]
    assert np.any(averages != want.table("t1"))
    # What is served: averages where there are some, and weights elsewhere.
    served = weights_only(got, ema=True)
    assert list(to_logical(served)["t1"]) == ["parameters"]
    assert_same(served.table("t1"), averages)
    assert_same(served.table("t2"), want.table("t2"))
    assert_same(weights_only(got).table("t1"), want.table("t1"))
    ids = [jnp.array([3, -1])] * 3
    assert_same(lookup(served, ids)[1], np.stack([averages[3], 0 * averages[3]]))


def test_devices_average_alike():
    config = features_of(Adam(0.1, ema_decay=0.8))
    want = init(config, None, KEY)
    mesh = jax.make_mesh((8,), ("data",))
    got = init(config, None, KEY, mesh=mesh, storage="packed")
    want, got = step(want, 0), jax.jit(step, static_argnums=1)(got, 0)
    assert_same(to_logical(got), to_logical(want))
    served = weights_only(got, ema=True)
    assert_same(served.table("t0"), want.slots("t0")["ema"])


def test_what_a_checkpoint_lacks_begins_as_the_weights():
    old = step(init(features_of(Adam(0.1)), None, KEY), 0)
    saved = jax.tree.map(np.asarray, to_logical(old))
    config = features_of(Adam(0.1, ema_decay=0.9))
    for like in (init(config, None, KEY), init(config, None, KEY).layout):
        state = from_logical(like, saved)
        assert_same(state.slots("t0")["ema"], old.table("t0"), rtol=0)
        assert_same(state.slots("t0")["momenta"], old.slots("t0")["momenta"], rtol=0)
    state = step(state, 1)
    part = {"t0": {"momenta": np.zeros((V, D))}}
    kept = from_logical(state, part).slots("t0")["ema"]
    assert_same(kept, state.slots("t0")["ema"], rtol=0)
    again = from_logical(state.layout, to_logical(state), storage="packed")
    assert_same(to_logical(again), to_logical(state), rtol=0)


def test_half_precision_averages_what_was_not_rounded():
    """To bfloat16 the weights lose each update of 1/1024; their average has them."""
    ones = jax.nn.initializers.ones
    table = TableConfig(
        4, 2, ones, SGD(1.0, ema_decay=0.5), name="t", dtype=jnp.bfloat16
    )
    state = init(FeatureConfig(table), None, KEY)
    gradient = jnp.full((1, 2), 2.0**-10)
    state = apply_gradients(state, jnp.array([1]), gradient)
    assert state.table("t")[1, 0] == 1
    assert state.slots("t")["ema"][1, 0] == 1 - 2.0**-11
    assert state.slots("t")["ema"].dtype == jnp.float32
    served = weights_only(state, ema=True)
    assert served.table("t").dtype == lookup(served, jnp.array([1])).dtype
    assert served.table("t").dtype == jnp.bfloat16


def test_the_object_and_a_rule_of_ones_own():
    optimizer = RuleOptimizer(AdamRule(), 0.1, ema_decay=0.9)
    embedding = TPUEmbedding(features_of(optimizer))
    before = embedding.retrieve()
    embedding.enqueue([np.array([3, 3])])
    embedding.apply_gradients(jax.tree.map(jnp.ones_like, embedding.dequeue()))
    found = embedding.retrieve()["t0"]
    assert list(found) == ["parameters", "momenta", "velocities", "ema"]
    moved = (np.asarray(found["ema"]) != before["t0"]["ema"]).any(axis=1)
    assert moved.tolist() == [row == 3 for row in range(V)]
    assert len(embedding.state.tables["t0"]) == 4


def test_other_tables_of_a_stack_stay_as_they_are():
    adam = Adam(0.1)
    config = features_of(adam, dataclasses.replace(adam, ema_decay=0.9))
    state = init(config, None, KEY)
    assert len(state.stacks) == 2  # other slots, so other arrays
    assert list(state.slots("t0")) == ["momenta", "velocities"]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda: Adam(ema_decay=1.0),
            ValueError,
            r"ema_decay=1.0 must be >= 0 and < 1",
        ),
        (
            lambda: Adam(ema_decay=cast(Any, "0.9")),
            TypeError,
            "='0.9' must be",
        ),
        (lambda: WithEMA(AdamRule(), -0.5), ValueError, r"decay=-0.5 must be >= 0"),
        (
            lambda: WithEMA(cast(Any, 3), 0.5),
            TypeError,
            "rule=3 must be an",
        ),
        (
            lambda: RuleOptimizer(WithEMA(AdamRule(), 0.5), ema_decay=0.5),
            ValueError,
            r"\['momenta', 'velocities', 'ema', 'ema'\]: they must differ",
        ),
        (
            lambda: weights_only(init(features_of(SGD()), None, KEY), ema=True),
            ValueError,
            "no table keeps an average: pass ema_decay=",
        ),
        (
            lambda: Slot("sum", initial="weights", per="row"),
            ValueError,
            "initial='weights' of slot 'sum' needs per='element'",
        ),
        (
            lambda: Slot("sum", initial=cast(Any, "zero")),
            TypeError,
            "='zero' must be",
        ),
    ],
)
def test_what_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_slots_that_a_user_makes():
    def create(table: Any, names: Any, initializers: Any) -> Any:
        made = zip(names, initializers, strict=True)
        return {name: make(None, table.shape) for name, make in made}

    adam = Adam(0.1, ema_decay=0.5, slot_variable_creation_fn=create)
    table = jnp.full((4, 2), 3.0)
    for storage in ("plain", "packed"):
        state = adam.init(table, storage)
        arrays = state.unpack() if isinstance(state, PackedTable) else state
        assert (arrays[3] == 3).all()
        assert not arrays[1].any()
    packed = PackedTable.init(KEY, 4, 2, normal, rule=adam.rule)
    assert (packed.unpack()[0] == packed.unpack()[3]).all()


def test_a_state_with_an_average_is_pickled():
    state = Adam(0.1, ema_decay=0.5).init(np.ones((3, 2), np.float32), "plain")
    again = pickle.loads(pickle.dumps(state))
    assert type(again) is type(state) and again._fields[-1] == "ema"
    assert_same(again, state)
