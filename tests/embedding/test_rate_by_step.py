"""Learning rates that are functions of the step, which the state counts."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from sparse_adam.embedding import (
    SGD,
    Adam,
    EmbeddingState,
    FeatureConfig,
    RuleOptimizer,
    TableConfig,
    TPUEmbedding,
    apply_gradients,
    apply_row_gradients,
    current_learning_rates,
    from_logical,
    init,
    join_row_gradients,
    lookup,
    map_arrays,
    row_gradients,
    to_logical,
    weights_only,
)
from sparse_adam.embedding.step import next_step
from sparse_adam.rules import Slot

KEY = jax.random.key(0)
FALLING = optax.linear_schedule(1.0, 0.0, 4)  # 1, 3/4, 1/2, 1/4, 0, 0, ...
# What a row of zeros is after so many steps with a gradient of 1.
WEIGHTS = (0, -1, -1.75, -2.25, -2.5, -2.5)


def features_of(optimizer: Any) -> dict[str, FeatureConfig]:
    """Two tables of one optimizer, which share a stack, and one of a constant rate."""
    zeros = jax.nn.initializers.zeros
    user, item = (TableConfig(9, 2, zeros, optimizer, name=n) for n in ("user", "item"))
    fixed = TableConfig(9, 2, zeros, SGD(0.5), name="fixed")
    return {table.name or "": FeatureConfig(table) for table in (user, item, fixed)}


FEATURES = features_of(SGD(FALLING))
IDS = {name: jnp.array([3, 8]) for name in FEATURES}
ONES = {name: jnp.ones((2, 2)) for name in FEATURES}


def start(**options: Any) -> EmbeddingState:
    return init(FEATURES, None, KEY, **options)


def step(state: EmbeddingState) -> EmbeddingState:
    return apply_gradients(state, IDS, ONES)


def check(state: EmbeddingState, count: int) -> None:
    """Holds a state after `count` steps to numbers worked by hand."""
    for name in ("user", "item"):
        table = np.asarray(state.table(name))
        np.testing.assert_array_equal(table[[3, 8]], np.full((2, 2), WEIGHTS[count]))
        assert not table[[0, 1, 2, 4, 5, 6, 7]].any()
    assert state.table("fixed")[3, 0] == -0.5 * count
    assert state.step.dtype == jnp.int32
    assert state.step.shape == ()
    assert state.step == count


@pytest.mark.parametrize("storage", ["plain", "packed"])
def test_a_schedule_of_optax_by_hand(storage):
    state = start(storage=storage)
    check(state, 0)
    compiled = jax.jit(lambda state: step(state), donate_argnums=0)
    for count in range(1, 6):
        old, state = state, compiled(state)
        check(state, count)
        assert all(x.is_deleted() for x in jax.tree.leaves(old))
    assert cast(Any, compiled)._cache_size() == 1
    check(step(step(start(storage=storage))), 2)
    scanned, _ = jax.lax.scan(lambda s, _: (step(s), None), start(), length=3)
    check(scanned, 3)


def test_tables_of_one_schedule_have_one_update():
    text = str(jax.make_jaxpr(step)(start()))
    assert text.count("sparse_update[") == 2  # of user and item, and of fixed


def test_rates_that_are_given_count_as_well():
    state = step(start())
    rates = current_learning_rates(state)
    assert rates == {"user": 0.75, "item": 0.75, "fixed": 0.5}
    assert rates["user"] is rates["item"]
    check(apply_gradients(state, IDS, ONES, learning_rates=rates), 2)
    other = apply_gradients(state, IDS, ONES, learning_rates={"user": 0.25})
    assert other.table("user")[3, 0] == -1.25
    assert other.table("item")[3, 0] == -1.75
    assert other.step == 2


def test_what_is_a_function_of_the_step():
    for by_step in (FALLING, lambda step: 0.1, lambda step, scale=2: 0.1):
        assert Adam(by_step).rate_is_by_step
    for other in (lambda: 0.1, lambda rate=0.1: rate, iter([0.1]).__next__, 0.1):
        optimizer = Adam(other)
        assert not optimizer.rate_is_by_step
        config = FeatureConfig(TableConfig(4, 2, optimizer=optimizer, name="t"))
        state = init(config, None, KEY)
        assert state.step is None
        assert current_learning_rates(state) == {"t": 0.1}
    with pytest.raises(ValueError, match="number, a function of one argument"):
        Adam(lambda step, rate: 0.1)
    adam = Adam(lambda step: 0.1)
    alone = adam.init(jnp.ones((4, 2)))
    with pytest.raises(TypeError, match=r"counts and this state does not: pass update"):
        adam.update(alone, jnp.array([1]), jnp.ones((1, 2)))


@pytest.mark.parametrize("pipelined", [False, True])
def test_the_object_counts_its_updates(pipelined):
    embedding = TPUEmbedding(FEATURES, None, pipelined)
    for _ in range(3):
        embedding.enqueue(IDS)
        embedding.dequeue()
        embedding.apply_gradients(ONES)
    check(embedding.state, 3)
    saved = embedding.retrieve()
    assert saved["user"]["step"] == 3
    assert "step" not in saved["fixed"]
    other = TPUEmbedding(FEATURES, storage="packed", stack=False)
    other.load(saved)
    check(other.state, 3)
    other.state = jax.tree.map(np.asarray, start(storage="packed", stack=False))
    check(other.state, 0)
    with pytest.raises(ValueError, match=r"state.step is None, but .*\['item', 'user'"):
        other.state = dataclasses.replace(other.state, step=None)


@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit])
def test_devices_count_alike(types):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(types,))
    ids = {name: jnp.array([3, *[-1] * 6, 8]) for name in FEATURES}
    ones = {name: jnp.ones((8, 2)) for name in FEATURES}

    def step(state: EmbeddingState, ids: Any, ones: Any) -> EmbeddingState:
        return apply_gradients(state, ids, ones)

    compiled = jax.jit(step, donate_argnums=0)
    state = start(mesh=mesh)
    for count in range(1, 3):
        state = compiled(state, ids, ones)
        check(state, count)
    assert cast(Any, compiled)._cache_size() == 1
    assert state.step.sharding.is_fully_replicated
    check(from_logical(start(), to_logical(state)), 2)
    state = from_logical(state, to_logical(step(start(), ids, ones)))
    check(compiled(state, ids, ones), 2)
    if types == AxisType.Auto:
        rows = PartitionSpec("data")
        specs = jax.tree.map(lambda x: rows if x.ndim else PartitionSpec(), state)
        mapped = jax.shard_map(
            step, mesh=mesh, in_specs=(specs, rows, rows), out_specs=specs
        )
        state = start(mesh=mesh)
        check(jax.jit(mapped)(state, ids, ones), 1)


def test_microbatches_are_one_step():
    state = step(start())
    parts = []
    for ids in (3, 8):
        batch = {name: jnp.array([ids]) for name in IDS}
        parts.append(row_gradients(state, batch, {n: jnp.ones((1, 2)) for n in IDS}))
    joined = join_row_gradients(state, *parts)
    state = apply_row_gradients(state, joined)
    check(state, 2)
    assert apply_row_gradients(state, {}).step == 3


def test_checkpoints_have_the_step():
    state = step(step(start()))
    saved = jax.tree.map(np.asarray, to_logical(state))
    assert {name: int(own["step"]) for name, own in saved.items() if "step" in own} == {
        "user": 2,
        "item": 2,
    }
    check(from_logical(start(storage="packed", stack=False), saved), 2)
    check(step(from_logical(state.layout, saved, storage="packed")), 3)
    # Of a table the step of all, and without a step that of the state, or 0.
    old = {n: {k: x for k, x in own.items() if k != "step"} for n, own in saved.items()}
    assert from_logical(start(), {"item": saved["item"]}).step == 2
    assert from_logical(state, old).step == 2
    assert from_logical(start(), old).step == 0
    assert from_logical(state.layout, old).step == 0
    one = {"item": old["item"] | {"step": np.int32(7)}}
    with pytest.raises(ValueError, match=r"different steps, \{'item': 7, 'user': 2\}"):
        from_logical(state, saved | one)
    assert from_logical(state, old | one).step == 7
    # A model of constant rates takes no notice.
    constant = init(features_of(SGD(1.0)), None, KEY)
    assert jax.tree.structure(from_logical(constant, saved)) == (
        jax.tree.structure(constant)
    )
    with pytest.raises(ValueError, match=r"'step' of shape \(1,\) for table 'item'"):
        from_logical(state, {"item": {"step": np.zeros(1, np.int32)}})
    assert weights_only(state).step is None
    for name in ("step", "parameters"):
        with pytest.raises(ValueError, match=rf"has slots called \['{name}'\]"):
            RuleOptimizer(WithSlot(name))


@dataclasses.dataclass(frozen=True)
class WithSlot:
    name: str

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (Slot(self.name),)

    def step(self, values: Any, gradient: Any, rate: Any) -> Any:
        return values


def test_a_state_has_a_step_only_where_a_rate_needs_it():
    constant = init(features_of(SGD(1.0)), None, KEY)
    assert constant.step is None
    assert len(jax.tree.leaves(constant)) == len(constant.stacks)
    assert step(constant).step is None
    frozen = {
        "t": FeatureConfig(TableConfig(4, 2, None, SGD(FALLING), trainable=False))
    }
    assert init(frozen, None, KEY).step is None
    state = dataclasses.replace(start(), step=None)
    for use in (step, to_logical, current_learning_rates):
        with pytest.raises(ValueError, match=r"state.step is None, .*init made, or"):
            use(state)
    lookup(state, IDS)  # which needs none


def test_a_step_that_was_computed_with_is_refused():
    state = step(start())
    average = jax.tree.map(lambda a, b: (a + b) / 2, state, state)
    np.testing.assert_array_equal(lookup(average, IDS)["user"], -np.ones((2, 2)))
    for use in (step, to_logical):
        with pytest.raises(TypeError, match=r"state.step is float32\[\]; it must be"):
            use(average)
    halved = map_arrays(lambda a, b: (a + b) / 2, state, start())
    assert halved.step == 1
    assert halved.table("user")[3, 0] == -0.5


def test_the_last_step_of_int32_is_not_left():
    last = np.int32(2**31 - 1)
    for number in (last - 1, last):
        found = next_step(jnp.int32(number))
        assert found == last
        assert found is not None
        assert found.dtype == jnp.int32
