"""The functional core's numbers: TensorFlow's own test, and many steps of a model."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.sparse import BCOO

from sparse_adam import AdamState
from sparse_adam.embedding import (
    Adam,
    FeatureConfig,
    Ragged,
    Sparse,
    TableConfig,
    apply_gradients,
    init,
    lookup,
)
from tests.embedding import model
from tests.embedding.golden import KEY, golden_a, loss_of, normal, to_form
from tests.embedding.model import FORMS, Rows


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inside", [True, False])
def test_golden_a(form, inside):
    _, rows, state = golden_a(sum_inside_sqrt=inside)
    features, _ = to_form(rows, form)

    @jax.jit
    def step(state, features):
        activations = lookup(state, features)
        loss, gradients = jax.value_and_grad(loss_of)(activations)
        return activations, loss, apply_gradients(state, features, gradients)

    activations, loss, new = step(state, features)
    expected = {
        "watched": [[0, 1, 2, 3], [4, 6, 8, 10]],
        "favorited": [[4, 6, 8, 10], [4, 5, 6, 7]],
        "friends": [[6, 7], [2, 3]],
    }
    for name, value in expected.items():
        np.testing.assert_allclose(activations[name], value, rtol=1e-6)
    assert loss == pytest.approx(335)

    table = {name: np.array(state.tables[name].table) for name in ("video", "user")}
    m, v = ({n: np.zeros_like(x) for n, x in table.items()} for _ in range(2))
    m["video"][:2] = [0.8, 1.3, 1.8, 2.3], [1.2, 1.7, 2.2, 2.7]
    v["video"][:2] = [0.064, 0.169, 0.324, 0.529], [0.144, 0.289, 0.484, 0.729]
    m["user"][:4] = [[1 / 15, 0.1]] * 3 + [[0.6, 0.7]]
    v["user"][:4] = [[4.44444e-4, 1e-3]] * 3 + [[0.036, 0.049]]
    if inside:
        for name, count in (("video", 2), ("user", 4)):
            table[name][:count] -= 0.316227766
    else:
        table["video"][:2] = (
            [-0.316227641, 0.683772311, 1.683772290, 2.683772277],
            [3.683772317, 4.683772293, 5.683772279, 6.683772271],
        )
        table["user"][:4] = (
            [-0.316226266, 0.683773234],
            [1.683773734, 2.683773234],
            [3.683773734, 4.683773234],
            [5.683772401, 6.683772377],
        )
    for name in table:
        # The golden numbers have 1 - 0.999 in float64: 1.3e-5 apart from float32.
        got = AdamState(*new.tables[name])
        np.testing.assert_allclose(got.table, table[name], rtol=1e-6, atol=3e-6)
        np.testing.assert_allclose(got.momenta, m[name], rtol=1e-6)
        np.testing.assert_allclose(got.velocities, v[name], rtol=2e-5)
        count = {"video": 2, "user": 4}[name]
        for new_array, old in zip(got, state.tables[name], strict=True):
            np.testing.assert_array_equal(new_array[count:], old[count:])


# Rows of (ids, weights) of three steps: repeated ids, empty samples, padding, zero
# weights and a weight that makes a sum 0; batches of one size, and lengths of many.
def random_rows(rng, num_rows, batch, weighted, longest=4):
    ids, weights = [], []
    for _ in range(batch):
        length = rng.integers(0, longest + 1)
        ids.append(rng.integers(-1, num_rows, length).tolist())
        weights.append(rng.choice([-1, 0, 0.5, 1, 2], length).tolist())
    ids[0], weights[0] = [1, 2], [1.0, -1.0]
    return Rows(ids, weights if weighted else None)


# Of each feature its table, and its length if it is a sequence.
MODEL_FEATURES = {
    "watched": ("video", 0),
    "favorited": ("video", 0),
    "history": ("video", 3),
    "friends": ("user", 0),
    "place": ("place", 0),
}
MODEL_TABLES = {"video": (11, 4), "user": (7, 2), "place": (5, 4)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("combiner", "lazy", "inside", "storage", "stack"),
    [
        ("sum", True, True, "plain", True),
        ("mean", True, False, "packed", True),
        ("sqrtn", True, True, "plain", False),
        ("sqrtn", False, True, "plain", True),
    ],
)
def test_several_steps_against_the_model(form, combiner, lazy, inside, storage, stack):
    tables = {
        name: TableConfig(*shape, normal, combiner=combiner, name=name)
        for name, shape in MODEL_TABLES.items()
    }
    config = {
        name: FeatureConfig(tables[table], max_sequence_length=length)
        for name, (table, length) in MODEL_FEATURES.items()
    }
    adam = Adam(0.05, lazy_adam=lazy, sum_inside_sqrt=inside)
    state = init(config, adam, KEY, storage=storage, stack=stack)
    assert len(state.stacks) == (2 if stack and lazy else 3)  # video, place; user
    expected = {
        name: tuple(np.asarray(x, np.float64) for x in state.tables[name])
        for name in tables
    }

    @jax.jit
    def step(state, features, weights):
        activations = lookup(state, features, weights)
        gradients = jax.grad(loss_of)(activations)
        return activations, apply_gradients(state, features, gradients, weights)

    rng = np.random.default_rng(7)
    for number in range(3):
        rows = {
            name: random_rows(rng, MODEL_TABLES[table][0], 5, not length)
            for name, (table, length) in MODEL_FEATURES.items()
        }
        rows["place"] = Rows([[i] for i in rng.integers(0, 5, 5).tolist()])  # dense
        features, weights = to_form(rows, form)
        features["place"] = np.array(rows["place"].ids)[:, 0]
        if form in ("ragged", "sparse", "bcoo"):  # a static size
            features, weights = fixed_size(features), fixed_size(weights)
        activations, state = step(state, features, weights)

        of_table = {name: [] for name in tables}
        for name, (table, length) in MODEL_FEATURES.items():
            want = model.lookup(expected[table][0], rows[name], combiner, length)
            np.testing.assert_allclose(activations[name], want, rtol=1e-4, atol=1e-5)
            gradient = 2 * want / len(want)
            of_table[table].append((rows[name], gradient, combiner, length))
        for name, used in of_table.items():
            touched = model.row_gradients(*MODEL_TABLES[name], used)
            new = model.adam(expected[name], touched, 0.05, lazy, inside)
            got = state.tables[name]
            for got_array, want, rtol in zip(got, new, (2e-4, 1e-4, 1e-4), strict=True):
                np.testing.assert_allclose(
                    got_array, want, rtol=rtol, atol=1e-5, err_msg=f"{name} {number}"
                )
            for i in set(range(MODEL_TABLES[name][0])) - set(touched):
                if lazy:  # bit for bit
                    for array, old in zip(got, expected[name], strict=True):
                        np.testing.assert_array_equal(array[i], old[i])
            # The next step starts from the same bits.
            expected[name] = tuple(np.asarray(x, np.float64) for x in got)
    if form != "padded":
        assert cast(Any, step)._cache_size() == 1


def fixed_size(features, size=40):
    """Fills ragged and sparse values up to one size with what nobody owns."""

    def fill(x):
        if isinstance(x, Ragged):
            missing = size - np.size(x.values)
            return Ragged(np.pad(x.values, (0, missing)), x.row_splits)
        if isinstance(x, Sparse):
            missing = size - np.size(x.values)
            indices = np.pad(x.indices, ((0, missing), (0, 0)), constant_values=99)
            return Sparse(indices, np.pad(x.values, (0, missing)), (5, 4))
        if isinstance(x, BCOO):
            missing = size - len(x.data)
            indices = jnp.pad(x.indices, ((0, missing), (0, 0)), constant_values=99)
            return BCOO((jnp.pad(x.data, (0, missing)), indices), shape=(5, 4))
        return x

    return {name: fill(x) for name, x in features.items()}
