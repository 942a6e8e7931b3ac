"""TensorFlow's other optimizers: its arguments and defaults, and what they update."""

import dataclasses
import inspect
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam import reference
from sparse_adam.embedding import (
    FTRL,
    SGD,
    Adagrad,
    AdagradMomentum,
    Adam,
    FeatureConfig,
    Optimizer,
    RowWiseAdagrad,
    TableConfig,
    TPUEmbedding,
    apply_gradients,
    init,
)

SHARED = {
    "use_gradient_accumulation": True,
    "clip_weight_min": None,
    "clip_weight_max": None,
    "weight_decay_factor": None,
    "multiply_weight_decay_factor_by_learning_rate": None,
    "slot_variable_creation_fn": None,
    "clipvalue": None,
}
# Of TensorFlow 2.21; the order counts but for what follows `clipvalue`.
DEFAULTS = {
    SGD: {
        "learning_rate": 0.01,
        **{k: v for k, v in SHARED.items() if k != "slot_variable_creation_fn"},
    },
    Adagrad: {"learning_rate": 0.001, "initial_accumulator_value": 0.1, **SHARED},
    AdagradMomentum: {
        "learning_rate": 0.001,
        "momentum": 0.0,
        "use_nesterov": False,
        "exponent": 2,
        "beta2": 1,
        "epsilon": 1e-10,
        **SHARED,
    },
    FTRL: {
        "learning_rate": 0.001,
        "learning_rate_power": -0.5,
        "l1_regularization_strength": 0.0,
        "l2_regularization_strength": 0.0,
        "beta": 0.0,
        "initial_accumulator_value": 0.1,
        **SHARED,
        "multiply_linear_by_learning_rate": False,
        "allow_zero_accumulator": False,
    },
}
STEPS = {
    SGD(0.1): reference.sgd(),
    Adagrad(0.1): reference.adagrad(),
    AdagradMomentum(0.1, momentum=0.5): reference.adagrad_momentum(momentum=0.5),
    FTRL(0.1, l1_regularization_strength=0.01): reference.ftrl(
        l1_regularization_strength=0.01
    ),
    RowWiseAdagrad(0.1): reference.row_wise_adagrad(),
    Adam(0.1, bias_correction="row"): reference.adam(bias_correction="row"),
}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_arguments_and_defaults_are_tensorflows(kind):
    fields = {f.name: f.default for f in dataclasses.fields(kind)}
    assert fields.pop("ema_decay") is None  # of ours, and by keyword alone
    assert list(inspect.signature(kind).parameters)[-1] == "ema_decay"
    assert fields == DEFAULTS[kind]
    assert list(fields) == list(DEFAULTS[kind])


@pytest.mark.parametrize("storage", ["plain", "packed"])
@pytest.mark.parametrize("optimizer", STEPS, ids=lambda o: type(o).__name__)
def test_several_steps_of_the_embedding_api(optimizer, storage):
    if storage == "packed" and any(s.per == "row" for s in optimizer.rule.slots):
        with pytest.raises(ValueError, match="slots"):
            optimizer.init(jnp.ones((8, 4)), storage="packed")
        return
    table = TableConfig(8, 4, optimizer=optimizer, name="t", combiner="sum")
    state = init(FeatureConfig(table), None, jax.random.key(1), storage=storage)
    expected = tuple(map(np.asarray, state.tables["t"]))
    rng = np.random.default_rng(0)
    step = jax.jit(apply_gradients)
    for _ in range(3):
        ids = rng.integers(-1, 8, 12)
        grads = (rng.integers(-8, 9, (12, 4)) / 4).astype(np.float32)
        state = step(state, ids, grads)
        expected = reference.sparse_update(
            expected, ids, grads, STEPS[optimizer], learning_rate=0.1
        )
    for x, right in zip(state.tables["t"], expected, strict=True):
        np.testing.assert_allclose(x, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("optimizer", STEPS, ids=lambda o: type(o).__name__)
def test_retrieve_and_load_by_slot_name(optimizer):
    table = TableConfig(8, 4, optimizer=optimizer, name="t")
    embedding = TPUEmbedding(FeatureConfig(table), batch_size=2)
    embedding.enqueue(np.array([1, 2]))
    embedding.apply_gradients(jnp.ones_like(embedding.dequeue()))
    found = embedding.retrieve()
    assert list(found["t"]) == ["parameters", *optimizer.slot_names]
    other = TPUEmbedding(FeatureConfig(table), batch_size=2)
    other.load(found)
    for name, array in other.retrieve()["t"].items():
        np.testing.assert_array_equal(array, found["t"][name])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Adagrad(initial_accumulator_value=0.0), "initial_accumulator_value"),
        (lambda: FTRL(initial_accumulator_value=-1.0), "initial_accumulator_value"),
        (lambda: FTRL(learning_rate_power=0.5), "learning_rate_power=0.5 must be <= 0"),
        (lambda: AdagradMomentum(epsilon=0.0), "epsilon=0.0 must be positive"),
        (lambda: AdagradMomentum(exponent=0.0), "exponent=0.0 must be positive"),
        (
            lambda: SGD(use_gradient_accumulation=False, clipvalue=1.0),
            "needs use_gradient_accumulation=True",
        ),
        (lambda: SGD(clip_weight_min=1.0, clip_weight_max=0.0), "is above"),
    ],
)
def test_bad_values(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_all_are_optimizers_and_hash_by_value():
    for optimizer in STEPS:
        assert isinstance(optimizer, Optimizer)
        same = dataclasses.replace(cast(Any, optimizer))
        assert same == optimizer
        assert hash(same) == hash(optimizer)
