"""The functional core: what it accepts, and what jit makes of it."""

import dataclasses
import warnings
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam.embedding import (
    Adam,
    FeatureConfig,
    Ragged,
    RuleOptimizer,
    TableConfig,
    apply_gradients,
    current_learning_rates,
    from_logical,
    init,
    lookup,
)
from sparse_adam.rules import Slot
from tests import programs
from tests.embedding import hlo
from tests.embedding.golden import KEY, golden_a, loss_of, normal, ramp, to_form


def test_a_table_has_one_update_a_step(monkeypatch):
    _, rows, state = golden_a()
    calls = []
    update = Adam.update

    def spy(self, state, ids, grads, **options):
        calls.append((ids.shape, grads.shape, options["sample_ids"].shape))
        return update(self, state, ids, grads, **options)

    monkeypatch.setattr(Adam, "update", spy)
    features, _ = to_form(rows, "padded")
    apply_gradients(state, features, jax.grad(loss_of)(lookup(state, features)))
    # 8 places of ids share 4 gradients of video; 6 share 2 of user.
    assert sorted(calls) == [((6,), (2, 2), (6,)), ((8,), (4, 4), (8,))]


def test_dense_ids_hand_their_gradients_over_as_they_are(monkeypatch):
    seen = {}

    def spy(self, state, ids, grads, *, learning_rate, **options):
        seen.update(options, grads=grads)
        return state

    monkeypatch.setattr(Adam, "update", spy)
    table = TableConfig(8, 4, name="t")
    state = init(FeatureConfig(table), Adam(), KEY)
    gradient = jnp.ones((3, 4))
    apply_gradients(state, jnp.array([1, 2, 9]), gradient)
    assert seen["sample_ids"] is None and seen["gains"] is None
    assert seen["grads"].shape == (3, 4)


def test_a_missing_gradient_counts_as_zero_with_a_warning():
    _, rows, state = golden_a()
    ones = {n: {"momenta": np.ones(x.table.shape)} for n, x in state.tables.items()}
    state = from_logical(state, ones)
    features, _ = to_form(rows, "ragged")
    gradients = jax.grad(loss_of)(lookup(state, features))
    zeros = jax.tree.map(jnp.zeros_like, gradients)
    for missing in ({"favorited"}, {"friends"}, set(gradients)):
        given = {n: None if n in missing else g for n, g in gradients.items()}
        filled = {n: zeros[n] if n in missing else g for n, g in gradients.items()}
        with pytest.warns(UserWarning, match="no gradient for feature") as caught:
            new = apply_gradients(state, features, given)
        assert len(caught) == len(missing)
        assert all(w.filename == __file__ for w in caught)
        with warnings.catch_warnings():
            want = apply_gradients(state, features, filled)
        jax.tree.map(np.testing.assert_array_equal, new, want)
    assert np.all(new.tables["user"].momenta[:4] != 1)
    assert np.all(new.tables["user"].momenta[4:] == 1)


def test_gradients_are_checked():
    _, rows, state = golden_a()
    features, _ = to_form(rows, "ragged")
    good = lookup(state, features)
    with pytest.raises(ValueError, match=r"'watched' has the shape \(2, 2\); it must"):
        apply_gradients(state, features, good | {"watched": jnp.ones((2, 2))})
    with pytest.raises(TypeError, match="'watched' is 'x'; it must be an array"):
        apply_gradients(state, features, good | {"watched": "x"})
    with pytest.raises(TypeError, match="must be an array of floats"):
        apply_gradients(state, features, good | {"watched": jnp.ones((2, 4), int)})
    with pytest.raises(ValueError, match="activation_gradients must be nested as feat"):
        apply_gradients(state, features, {"watched": good["watched"]})
    with pytest.raises(ValueError, match="features must be nested as feature_config"):
        lookup(state, [1, 2, 3])
    with pytest.raises(ValueError, match="weights must be nested as feature_config"):
        lookup(state, features, {"other": None})


def test_gradients_of_two_dtypes():
    _, rows, state = golden_a()
    features, _ = to_form(rows, "ragged")
    gradients = jax.grad(loss_of)(lookup(state, features))
    mixed = gradients | {"watched": gradients["watched"].astype(jnp.bfloat16)}
    new = apply_gradients(state, features, mixed)
    want = apply_gradients(state, features, gradients)
    np.testing.assert_allclose(
        new.tables["video"].momenta, want.tables["video"].momenta, rtol=1e-2
    )


def test_without_accumulation_occurrences_step_in_the_order_of_the_features():
    table = TableConfig(4, 2, ramp, combiner="sum", name="t")
    config = {"b": FeatureConfig(table), "a": FeatureConfig(table)}
    adam = Adam(0.1, use_gradient_accumulation=False)
    state = init(config, adam, KEY)
    features = {"a": jnp.array([[1, 2]]), "b": jnp.array([1, 1])}
    gradients = {"a": jnp.full((1, 2), 3.0), "b": jnp.array([[1.0, 1], [-5, 2]])}
    new = apply_gradients(state, features, gradients)
    by_id = jnp.array([[3.0, 3], [3, 3], [1, 1], [-5, 2]])
    want = adam.update(
        adam.init(ramp(KEY, (4, 2), "f")), jnp.array([1, 2, 1, 1]), by_id
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), new.tables["t"], want
    )


def test_init_may_be_compiled():
    config = {"a": FeatureConfig(TableConfig(7, 3, name="t"))}
    state = jax.jit(lambda key: init(config, Adam(), key))(KEY)
    want = init(config, Adam(), KEY)
    assert state.layout == want.layout
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), state, want)


def test_nested_structures():
    table = TableConfig(4, 2, ramp, combiner="sum", name="t")
    config = {"a": (FeatureConfig(table), [FeatureConfig(table)]), "b": {}}
    state = init(config, Adam(0.1), KEY)
    features = {"a": (jnp.array([1]), [np.array([[0, 3]])]), "b": {}}
    got = lookup(state, features, {"a": (None, [np.array([[2.0, 1.0]])]), "b": {}})
    assert jax.tree.structure(got) == jax.tree.structure(features)
    np.testing.assert_array_equal(got["a"][0], [[2, 3]])
    np.testing.assert_array_equal(got["a"][1][0], [[6, 9]])
    single = init(FeatureConfig(table), Adam(0.1), KEY)
    np.testing.assert_array_equal(lookup(single, jnp.array([2])), [[4, 5]])


def test_rates_by_table_and_callables():
    rates = iter([0.1, 0.2, 0.4])
    calls = []

    def schedule():
        calls.append(next(rates))
        return calls[-1]

    tables = [
        TableConfig(4, 2, ramp, optimizer=Adam(schedule), name="a"),
        TableConfig(4, 2, ramp, optimizer=Adam(schedule, beta_1=0.5), name="b"),
        TableConfig(4, 2, ramp, optimizer=Adam(0.05), name="c"),
    ]
    state = init([FeatureConfig(t) for t in tables], None, KEY)
    ids, ones = [jnp.array([1])] * 3, [jnp.ones((1, 2))] * 3
    rates_now = current_learning_rates(state)
    assert rates_now == {"a": 0.1, "b": 0.1, "c": 0.05}
    assert calls == [0.1]  # the two tables share one callable

    def moved(new):
        return {
            n: float(ramp(0, (4, 2), float)[1, 0] - s.table[1, 0])
            for n, s in new.tables.items()
        }

    by_callable = moved(apply_gradients(state, ids, ones))
    assert calls == [0.1, 0.2]
    # Adam's first step from zero slots: rate * (1 - beta_1) / sqrt(1 - beta_2).
    first = {"a": 0.2 * 3.16228, "b": 0.2 * 5 * 3.16228, "c": 0.05 * 3.16228}
    assert by_callable == pytest.approx(first, rel=1e-4)

    traces = []

    @jax.jit
    def step(*args, **options):
        new = apply_gradients(*args, **options)
        traces.append(new)
        return new

    with pytest.raises(
        TypeError, match=r"tables \['a', 'b'\] are callables.*learning_r"
    ):
        step(state, ids, ones)
    with pytest.raises(TypeError, match=r"tables \['b'\] are callables"):
        step(state, ids, ones, learning_rates={"a": 0.1})
    for rate in (0.1, 0.3, 0.5):
        new = step(state, ids, ones, learning_rates={"a": rate, "b": rate})
        assert moved(new)["a"] == pytest.approx(rate * 3.16228, rel=1e-4)
    assert len(traces) == 1
    assert calls == [0.1, 0.2]
    with pytest.raises(ValueError, match=r"learning_rates has \['z'\], but the tables"):
        apply_gradients(state, ids, ones, learning_rates={"z": 0.1})


def test_state_is_a_plain_pytree():
    _, _, state = golden_a()
    assert len(jax.tree.leaves(state)) == 6
    doubled = jax.tree.map(lambda x: x * 2, state)
    np.testing.assert_array_equal(doubled.tables["user"].table[1], [4, 6])
    paths = [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(state)
    ]
    assert paths[0] == ".stacks[0].table"
    _, _, again = golden_a()  # made anew, of equal configurations
    assert jax.tree.structure(state) == jax.tree.structure(again)


def big_model(num_rows=50_000, combiner: Any = "mean"):
    table = TableConfig(num_rows, 8, combiner=combiner, name="big")
    config = {"a": FeatureConfig(table), "b": FeatureConfig(table)}
    state = init(config, Adam(0.1), KEY)
    features = {
        "a": jnp.arange(12).reshape(4, 3),
        "b": Ragged.from_rows([[1], [], [2, 2], [70_000]]),
    }
    return state, features


def train_step(state, features):
    activations = lookup(state, features)
    loss, gradients = jax.value_and_grad(loss_of)(activations)
    return apply_gradients(state, features, gradients), loss


def test_donated_tables_are_updated_in_place():
    state, features = big_model()
    compiled = programs.as_for_users(
        jax.jit(train_step, donate_argnums=0).lower(state, features)
    )
    assert hlo.dense_work(programs.text(compiled), 50_000) == set()
    memory = programs.memory(compiled)
    assert memory.alias_size_in_bytes == 3 * 50_000 * 8 * 4
    assert memory.temp_size_in_bytes < 100_000
    kept = programs.as_for_users(jax.jit(train_step).lower(state, features))
    assert "copy" in hlo.dense_work(programs.text(kept), 50_000)


def test_scan_and_jit_agree():
    state, features = big_model(100)
    batches = jax.tree.map(lambda x: jnp.stack([x, (x * 3) % 50, x]), features)
    batches["b"] = jax.tree.map(lambda x: jnp.stack([x] * 3), features["b"])
    last, losses = jax.jit(lambda s, b: jax.lax.scan(train_step, s, b))(state, batches)
    assert losses[2] < losses[0]
    for i in range(3):
        batch = jax.tree.map(lambda x, i=i: x[i], batches)
        state, loss = train_step(state, batch)
        assert loss == pytest.approx(float(losses[i]), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), last, state
    )


def test_tables_may_be_sharded_by_rows():
    state, features = big_model(100)
    want, loss = jax.jit(train_step)(state, features)
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    state = jax.tree.map(lambda x: jax.device_put(x, rows), state)
    step = jax.jit(
        train_step, out_shardings=(jax.tree.map(lambda _: rows, state), None)
    )
    got, sharded_loss = step(state, features)
    assert got.table("big").sharding == rows
    assert sharded_loss == pytest.approx(float(loss), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want
    )


def test_the_gradient_by_the_table_is_the_one_that_is_applied():
    _, rows, state = golden_a(normal)
    features, _ = to_form(rows, "ragged")

    def loss_of_state(state):
        return loss_of(lookup(state, features))

    dense = jax.grad(loss_of_state, allow_int=False)(state)
    gradients = jax.grad(loss_of)(lookup(state, features))
    new = apply_gradients(state, features, gradients)
    for name in ("video", "user"):
        np.testing.assert_allclose(
            new.tables[name].momenta, 0.1 * dense.tables[name].table, rtol=1e-5
        )


def test_implementation_is_passed_on():
    table = TableConfig(8, 128, combiner="sum", name="t")
    state = init(FeatureConfig(table), Adam(0.1), KEY)
    ids, gradient = jnp.array([[1, 3], [1, -1]]), jnp.ones((2, 128))
    with pytest.raises(ValueError, match="implementation='no' must be None or one of"):
        apply_gradients(state, ids, gradient, implementation=cast(Any, "no"))
    got, want = (
        apply_gradients(state, ids, gradient, implementation=name)
        for name in ("tensorcore", "xla")
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want
    )


@dataclasses.dataclass(frozen=True)
class SignDescent:
    """Another rule, to show the seam."""

    @property
    def slots(self) -> tuple[Slot, ...]:
        return ()

    def step(self, values, gradient, rate):
        (w,) = values
        return (w - rate * jnp.sign(gradient),)


def test_another_optimizer_fits_the_seam():
    optimizer = RuleOptimizer(SignDescent(), 0.5)
    table = TableConfig(4, 2, ramp, optimizer=optimizer, name="t")
    state = init(FeatureConfig(table), None, KEY)
    ids = jnp.array([[1, 1], [3, -1]])
    state = apply_gradients(state, ids, jnp.ones((2, 2)))
    want = [[0, 1], [1.5, 2.5], [4, 5], [5.5, 6.5]]
    np.testing.assert_array_equal(state.tables["t"][0], want)


def test_a_given_rate_goes_before_a_tables_own_number():
    tables = [TableConfig(4, 2, ramp, name=name) for name in "ab"]
    state = init([FeatureConfig(t) for t in tables], Adam(0.1), KEY)
    ids, ones = [jnp.array([1])] * 2, [jnp.ones((1, 2))] * 2
    new = apply_gradients(state, ids, ones, learning_rates={"a": 0.4})
    for name, rate in (("a", 0.4), ("b", 0.1)):
        moved = state.tables[name].table[1] - new.tables[name].table[1]
        np.testing.assert_allclose(moved, rate * 3.16228, rtol=1e-4)


def test_a_gradient_of_the_right_size_and_another_shape_is_refused():
    state, features = big_model(100)
    activations = lookup(state, features)
    gradients = activations | {"a": activations["a"].T}
    with pytest.raises(ValueError, match=r"'a' has the shape \(8, 4\); .*\(4, 8\)"):
        apply_gradients(state, features, gradients)
