"""The dataclass: TensorFlow's defaults and rules, slots, rates, equality."""

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam import Adam, AdamState, plan_update, sparse_adam_update

# Names and defaults of tf.tpu.experimental.embedding.Adam, in its order.
SEED = {
    "learning_rate": 0.001,
    "beta_1": 0.9,
    "beta_2": 0.999,
    "epsilon": 1e-07,
    "lazy_adam": True,
    "sum_inside_sqrt": True,
    "use_gradient_accumulation": True,
    "clip_weight_min": None,
    "clip_weight_max": None,
    "weight_decay_factor": None,
    "multiply_weight_decay_factor_by_learning_rate": None,
    "slot_variable_creation_fn": None,
    "clipvalue": None,
}


def test_arguments_are_the_seeds():
    fields = {f.name: f.default for f in dataclasses.fields(Adam)}
    # Some more of ours; in a call they stand behind those.
    assert fields.pop("bias_correction") is None
    assert fields.pop("amsgrad") is False
    assert fields.pop("catch_up") is False
    assert fields.pop("ema_decay") is None
    assert list(inspect.signature(Adam).parameters)[: len(SEED)] == list(SEED)
    assert fields == SEED
    assert list(fields) == list(SEED)
    assert Adam().slot_names == ("momenta", "velocities")


def test_defaults_are_the_ops():
    parameters = inspect.signature(sparse_adam_update).parameters
    for name, default in SEED.items():
        if name != "slot_variable_creation_fn":
            assert parameters[name].default == default, name


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"slot_variable_creation_fn": 3}, "slot_variable_creation_fn=3 must be"),
        (
            {"use_gradient_accumulation": False, "clipvalue": 0.0},
            "clipvalue=0.0 .* needs use_gradient_accumulation=True",
        ),
        (
            {"use_gradient_accumulation": False, "clipvalue": (None, 1.0)},
            "needs use_gradient_accumulation=True",
        ),
        ({"beta_1": 1.0}, "beta_1=1.0 must be >= 0 and < 1"),
        ({"beta_1": -0.1}, "beta_1=-0.1 must be"),
        ({"beta_1": float("nan")}, "beta_1=nan must be"),
        ({"beta_2": 1.5}, "beta_2=1.5 must be >= 0 and < 1"),
        ({"beta_2": 0.99999999}, "beta_2=0.99999999 is 1 in float32"),
        ({"epsilon": 0.0}, "epsilon=0.0 must be positive"),
        ({"epsilon": 1e-20}, r"epsilon\*\*2 underflows float32"),
        (
            {"use_gradient_accumulation": False, "lazy_adam": False},
            "lazy_adam=False, needs use_gradient_accumulation=True",
        ),
        (
            {"clip_weight_min": 1.0, "clip_weight_max": 0.0},
            "clip_weight_min=1.0 is abo",
        ),
        ({"clip_weight_max": float("nan")}, "clip_weight_max=nan"),
        ({"clipvalue": -2.0}, r"clipvalue=-2.0 must be >= 0"),
        ({"clipvalue": (1.0, -1.0)}, r"clipvalue\[0\]=1.0 is above"),
        ({"clipvalue": (1.0,)}, r"clipvalue=\(1.0,\) must be a number or a pair"),
        ({"weight_decay_factor": float("inf")}, "weight_decay_factor=inf must be"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be finite"),
    ],
)
def test_bad_values(arguments, text):
    with pytest.raises(ValueError, match=text):
        Adam(**arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"clipvalue": [-1.0, 1.0]}, r"clipvalue=\[-1.0, 1.0\] must be a number"),
        ({"lazy_adam": 1}, "lazy_adam=1 must be True or False"),
        ({"sum_inside_sqrt": None}, "sum_inside_sqrt=None must be True or False"),
        ({"learning_rate": "0.1"}, "learning_rate='0.1' must be a real number"),
        ({"beta_1": True}, "beta_1=True must be a number"),
    ],
)
def test_bad_types(arguments, text):
    with pytest.raises(TypeError, match=text):
        Adam(**arguments)


def test_accepted_as_tensorflow_does():
    Adam(clipvalue=0.0)
    Adam(clipvalue=(None, 1))
    Adam(weight_decay_factor=-0.1)
    Adam(multiply_weight_decay_factor_by_learning_rate=True)
    Adam(sum_inside_sqrt=False, epsilon=1e-30)


def test_equal_by_value_and_hashable():
    def rate():
        return 0.1

    assert Adam(0.1) == Adam(0.1)
    assert hash(Adam(0.1)) == hash(Adam(0.1))
    assert Adam(0.1) != Adam(0.2)
    assert Adam(rate) == Adam(rate)
    assert Adam(lambda: 0.1) != Adam(lambda: 0.1)
    of_numpy: Any = np.float32(0.5)
    assert Adam(0.5) == Adam(jnp.float32(0.5)) == Adam(of_numpy)
    assert len({Adam(jnp.float32(0.5)), Adam(0.5)}) == 1
    adam: Any = Adam()
    with pytest.raises(dataclasses.FrozenInstanceError):
        adam.beta_1 = 0.5


def batch():
    return jnp.array([2, 0, 2, -1]), jnp.ones((4, 3))


def test_update_passes_every_argument_on():
    options = {
        "beta_1": 0.8,
        "beta_2": 0.9,
        "epsilon": 1e-3,
        "lazy_adam": False,
        "sum_inside_sqrt": False,
        "clip_weight_min": -0.5,
        "clip_weight_max": 0.8,
        "weight_decay_factor": 0.1,
        "multiply_weight_decay_factor_by_learning_rate": True,
        "clipvalue": (None, 1.5),
    }
    adam = Adam(0.1, **options)
    state, (ids, grads) = AdamState(*adam.init(jnp.ones((4, 3)))), batch()
    got = adam.update(
        state,
        ids,
        grads,
        gains=jnp.ones(4),
        sample_ids=jnp.arange(4),
        plan=plan_update(ids, 4),
        implementation="xla",
    )
    want = sparse_adam_update(*state, ids, grads, learning_rate=0.1, **options)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    step_each = Adam(0.1, use_gradient_accumulation=False)
    assert np.any(step_each.update(state, ids, grads).table != got.table)


def test_callable_rate_is_called_at_each_update():
    rates = iter([0.1, 0.0])
    adam = Adam(lambda: next(rates))
    state, (ids, grads) = adam.init(jnp.ones((4, 3))), batch()
    first = adam.update(state, ids, grads)
    second = adam.update(first, ids, grads)
    assert np.any(first.table != state.table)
    np.testing.assert_array_equal(second.table, first.table)  # a rate of 0
    assert np.any(second.momenta != first.momenta)


def test_callable_rate_would_freeze_under_tracing():
    adam = Adam(lambda: 0.1)
    state, (ids, grads) = adam.init(jnp.ones((4, 3))), batch()
    with pytest.raises(TypeError, match=r"update\(\.\.\., learning_rate=rate\)"):
        jax.jit(adam.update)(state, ids, grads)
    traced = jax.jit(lambda s, rate: adam.update(s, ids, grads, learning_rate=rate))
    want = adam.update(state, ids, grads)
    for a, b in zip(traced(state, 0.1), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_traced_rate_in_the_dataclass():
    ids, grads = batch()
    state = Adam().init(jnp.ones((4, 3)))
    got = jax.jit(lambda s, rate: Adam(rate).update(s, ids, grads))(state, 0.1)
    want = Adam(0.1).update(state, ids, grads)
    np.testing.assert_allclose(got.table, want.table, rtol=1e-6)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_slots_are_float32_zeros_unless_asked_otherwise(dtype):
    kind = {} if dtype is None else {"slot_dtype": dtype}
    slots = Adam().init_slots(jnp.ones((4, 3), jnp.bfloat16), **kind)
    assert set(slots) == {"momenta", "velocities"}
    for slot in slots.values():
        assert slot.shape == (4, 3)
        assert slot.dtype == (dtype or jnp.float32)
        assert not np.any(slot)


def test_slot_variable_creation_fn_decides():
    seen = {}

    def create(table, names, initializers):
        seen.update(shape=table.shape, names=names)
        return {
            name: initialize(jax.random.key(1), table.shape, jnp.float32) + i
            for i, (name, initialize) in enumerate(
                zip(names, initializers, strict=True)
            )
        }

    state = Adam(slot_variable_creation_fn=create).init(jnp.ones((4, 3)))
    assert seen == {"shape": (4, 3), "names": ["momenta", "velocities"]}
    assert isinstance(state, AdamState)
    assert np.all(state.momenta == 0)
    assert np.all(state.velocities == 1)


@pytest.mark.parametrize(
    ("slots", "text"),
    [
        ({"momenta": np.zeros((4, 3))}, "with the keys"),
        (
            {"momenta": np.zeros((4, 3)), "velocities": np.zeros((4, 2))},
            r"velocities of shape \(4, 2\); it must have \(4, 3\)",
        ),
        ([1, 2], "it must return a dict"),
    ],
)
def test_slot_variable_creation_fn_is_checked(slots, text):
    adam = Adam(slot_variable_creation_fn=lambda *_: slots)
    with pytest.raises(ValueError, match=text):
        adam.init_slots(jnp.ones((4, 3)))
