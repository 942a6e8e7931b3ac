"""Stacks: which tables share an array, and that nobody can tell but by the counts."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam import PackedTable
from sparse_adam.embedding import (
    SGD,
    Adam,
    FeatureConfig,
    QuantizationConfig,
    Ragged,
    RowWiseAdagrad,
    TableConfig,
    TPUEmbedding,
    apply_gradients,
    current_learning_rates,
    from_logical,
    init,
    lookup,
    map_arrays,
    to_logical,
)
from sparse_adam.embedding import stacks as stacks_module
from sparse_adam.embedding.tables import make_layout
from tests.embedding.golden import KEY, normal
from tests.embedding.test_tpu_embedding import assert_same

D = 4
QUANTIZED = QuantizationConfig(5, -1.0, 1.0)
TABLES = [
    TableConfig(300, D, normal, combiner="mean", name="a"),
    TableConfig(7, D, normal, combiner="sum", name="b"),
    TableConfig(5, D, normal, combiner="sqrtn", name="c"),
    TableConfig(9, D, normal, quantization_config=QUANTIZED, name="d"),
]
CONFIG = {
    "one": FeatureConfig(TABLES[1]),
    "other": FeatureConfig(TABLES[2]),
    "bags": FeatureConfig(TABLES[0]),
    "more": FeatureConfig(TABLES[2]),
    "ragged": FeatureConfig(TABLES[1]),
    "words": FeatureConfig(TABLES[2]),
    "seen": FeatureConfig(TABLES[0], max_sequence_length=2),
    "rounded": FeatureConfig(TABLES[3]),
}
SAMPLES = 4


def batch():
    """Ids beyond the table of each feature, some of them rows of the next table."""
    rng = np.random.default_rng(0)
    ids = {
        "one": rng.integers(-2, 12, SAMPLES),
        "other": rng.integers(-2, 12, SAMPLES),
        "bags": rng.integers(-2, 400, (SAMPLES, 3)),
        "more": rng.integers(-2, 12, (SAMPLES, 3)),
        "ragged": Ragged.from_rows([[1, 9], [], [6, 7, 6], [0]], size=8),
        "words": Ragged.from_rows([[4], [5, 2], [], [1, 0]], size=9),
        "seen": Ragged.from_rows([[299, 300], [], [2, 3, 4], [1]], size=7),
        "rounded": rng.integers(-2, 12, (SAMPLES, 3)),
    }
    splits = ids["words"].row_splits
    weights: dict[str, Any] = dict.fromkeys(ids)
    weights["words"] = Ragged(np.linspace(-1, 1, 9, dtype=np.float32), splits)
    return ids, weights


@jax.jit
def train_step(state, ids, weights):
    activations = lookup(state, ids, weights)
    gradients = jax.tree.map(jnp.cos, activations)
    return activations, apply_gradients(state, ids, gradients, weights)


def made(optimizer=None, config=CONFIG, **options):
    return init(config, optimizer or Adam(0.1), KEY, **options)


@functools.cache
def step_of_tables_apart():
    """The state before, the activations, and the state after."""
    state = made(stack=False, storage="plain")
    return state, *train_step(state, *batch())


@pytest.mark.parametrize("storage", ["plain", "packed"])
def test_nobody_can_tell(storage):
    apart, wanted, new_apart = step_of_tables_apart()
    state = made(storage=storage)
    assert (len(apart.stacks), len(state.stacks)) == (4, 1)
    assert_same(to_logical(state), to_logical(apart), rtol=0)
    activations, new = train_step(state, *batch())
    assert_same(activations, wanted)
    assert_same(to_logical(new), to_logical(new_apart))
    old, ids = to_logical(state), batch()[0]
    for name, given in {
        "b": np.append(ids["one"], ids["ragged"].values[:6]),
        "d": ids["rounded"],
    }.items():
        moved = np.any(new.table(name) != old[name]["parameters"], axis=1)
        rows = {int(i) for i in given.ravel() if 0 <= i < len(moved)}
        assert set(np.flatnonzero(moved)) == rows


def test_a_stack_has_one_update_and_a_lookup_for_each_kind(monkeypatch):
    from sparse_adam.embedding import combine

    state, (ids, weights) = made(), batch()
    calls = []
    update, combined_rows = Adam.update, combine.combined_rows

    def spy_update(self, state, ids, grads, **options):
        calls.append(("update", ids.shape[0], grads.shape[0]))
        return update(self, state, ids, grads, **options)

    def spy_rows(stored, samples, size, **options):
        calls.append(("rows", samples.ids.shape[0], size))
        return combined_rows(stored, samples, size, **options)

    monkeypatch.setattr(Adam, "update", spy_update)
    monkeypatch.setattr(combine, "combined_rows", spy_rows)
    del ids["seen"], ids["rounded"], weights["seen"], weights["rounded"]
    config = {name: CONFIG[name] for name in ids}
    state = made(config=config)
    activations = jax.eval_shape(lookup, state, ids, weights)
    # Bags of 3; dense ids; a ragged feature; one with weights and divisors.
    bags, dense, ragged, weighted = 2 * 3 * SAMPLES, 2 * SAMPLES, 8, 9
    assert calls == [
        ("rows", bags, 2 * SAMPLES),
        ("rows", dense, 2 * SAMPLES),
        ("rows", ragged, SAMPLES),
        ("rows", weighted, SAMPLES),
    ]
    calls.clear()
    jax.eval_shape(apply_gradients, state, ids, activations, weights)
    assert calls == [("update", bags + dense + ragged + weighted, 6 * SAMPLES)]


def test_what_shares_an_array():
    def stacks(*tables, optimizer=None, **options):
        config = [FeatureConfig(table) for table in tables]
        layout = make_layout(config, optimizer or Adam(0.1), **options)
        return [[table.name for table in stack.tables] for stack in layout.stacks]

    def table(name, dim=D, **options):
        return TableConfig(6, dim, name=name, **options)

    a, b = table("a"), table("b", combiner="sum", quantization_config=QUANTIZED)
    assert stacks(a, b) == [["a", "b"]]
    assert stacks(a, b, stack=False) == [["a"], ["b"]]
    assert stacks(a, b, optimizer=RowWiseAdagrad()) == [["a", "b"]]
    # Each differs in one thing, and the last one is like the first.
    others = [
        table("b", dim=2),
        table("b", dtype=jnp.bfloat16),
        table("b", slot_dtype=jnp.bfloat16),
        table("b", optimizer=Adam(0.2)),
        table("b", optimizer=Adam(lambda: 0.1)),
        table("b", optimizer=SGD(0.1)),
    ]
    for other in others:
        assert stacks(a, other, table("c", optimizer=Adam(0.1))) == [["a", "c"], ["b"]]
    # All rows move at each step, by the rate of their own table.
    assert stacks(a, b, optimizer=Adam(lazy_adam=False)) == [["a"], ["b"]]
    with pytest.raises(TypeError, match="stack='no' must be True or False"):
        stacks(a, b, stack="no")


def test_optimizers_whose_rates_are_traced_are_told_apart():
    def numbers(one, other):
        tables = [TableConfig(4, 2, optimizer=x) for x in (one, other)]
        return len(make_layout([*map(FeatureConfig, tables)], None).stacks)

    def trace(rate):
        adam = Adam(rate)
        found.extend(
            [numbers(adam, adam), numbers(adam, Adam(rate)), numbers(adam, Adam())]
        )

    found: list[int] = []
    jax.eval_shape(trace, jnp.float32(0.1))
    assert found == [1, 2, 2]


def test_a_stack_that_would_be_too_tall_is_cut(monkeypatch):
    monkeypatch.setattr(stacks_module, "MAX_STACK_ROWS", 600)
    state = made()
    stacks = state.layout.stacks
    names = [[table.name for table in stack.tables] for stack in stacks]
    assert names == [["a", "c"], ["b", "d"]]
    # Tables begin at multiples of 256 rows: 8 groups of the 32 that share lines.
    assert [stack.offsets for stack in stacks] == [(0, 512), (0, 256)]
    assert [stack.num_rows for stack in stacks] == [512 + 5, 256 + 9]
    for name, array in to_logical(made(stack=False)).items():
        np.testing.assert_array_equal(state.table(name), array["parameters"])


def test_checkpoints_fit_any_stacking_and_storage():
    _, state = train_step(made(storage="packed"), *batch())
    saved = jax.tree.map(np.asarray, to_logical(state))
    assert saved.keys() == state.tables.keys()
    for storage in ("plain", "packed"):
        other = init(CONFIG, Adam(0.1), jax.random.key(5), storage=storage, stack=False)
        other = from_logical(other, saved)
        assert_same(to_logical(other), saved, rtol=0)
        assert all(
            isinstance(x, PackedTable) == (storage == "packed") for x in other.stacks
        )
        again = from_logical(state.layout, to_logical(other), storage=storage)
        assert again.layout == state.layout and len(again.stacks) == 1
        assert_same(to_logical(again), saved, rtol=0)
    part = from_logical(state, {"b": {"momenta": np.ones((7, D))}})
    saved["b"]["momenta"] = np.ones((7, D))
    assert_same(to_logical(part), saved, rtol=0)
    assert_same(
        to_logical(map_arrays(lambda x: 2 * x, part)),
        jax.tree.map(lambda x: 2 * x, saved),
    )


def test_what_from_logical_refuses():
    state = made()
    saved = to_logical(state)
    del saved["b"]["momenta"]
    with pytest.raises(ValueError, match=r"arrays has no \['momenta'\] of table 'b'"):
        from_logical(state.layout, saved)
    with pytest.raises(
        ValueError, match="storage='packed' must be None, since a state"
    ):
        from_logical(state, saved, storage="packed")
    with pytest.raises(KeyError, match="'z' is none of the tables"):
        state.table("z")


def test_the_tables_of_a_state_by_name():
    state = made(storage="packed")
    assert dict(state.tables).keys() == {"a", "b", "c", "d"}
    found = state.tables["b"]
    np.testing.assert_array_equal(found.table, state.table("b"))
    np.testing.assert_array_equal(found.momenta, state.slots("b")["momenta"])


def test_tables_that_turn_out_to_differ_are_told_how_to_stay_apart():
    def halves(table, names, initializers):
        dtype = jnp.bfloat16 if len(table) == 7 else jnp.float32
        return {name: jnp.zeros(table.shape, dtype) for name in names}

    adam = Adam(0.1, slot_variable_creation_fn=halves)
    with pytest.raises(ValueError, match=r"tables 'a' and 'b' would .*stack=False"):
        made(adam)
    assert made(adam, stack=False).slots("b")["momenta"].dtype == jnp.bfloat16


def three_tables():
    tables = [TableConfig(4, 2, jax.nn.initializers.zeros, name=name) for name in "abc"]
    return [FeatureConfig(table) for table in tables]


IDS, ONES = [jnp.array([1])] * 3, [jnp.ones((1, 2))] * 3


def moved(new):
    return [float(-new.table(name)[1, 0]) for name in "abc"]


def updates(monkeypatch):
    calls = []
    update = SGD.update

    def spy(self, *args, **options):
        calls.append(options["learning_rate"])
        return update(self, *args, **options)

    monkeypatch.setattr(SGD, "update", spy)
    return calls


def test_tables_of_one_rate_share_an_update(monkeypatch):
    state = init(three_tables(), SGD(0.5), KEY)
    calls = updates(monkeypatch)
    for rates, values, count in (
        (None, [0.5, 0.5, 0.5], 1),
        ({"b": 0.25}, [0.5, 0.25, 0.5], 2),
        ({"b": 0.5, "c": np.float32(0.5)}, [0.5, 0.5, 0.5], 1),
        (dict(zip("abc", [1.0, 2.0, 3.0], strict=True)), [1, 2, 3], 3),
    ):
        calls.clear()
        assert moved(apply_gradients(state, IDS, ONES, learning_rates=rates)) == values
        assert len(calls) == count
    calls.clear()

    def step(rate, other):
        rates = {"a": rate, "b": other, "c": rate}
        return apply_gradients(state, IDS, ONES, learning_rates=rates)

    assert moved(jax.jit(step)(1.0, 1.0)) == [1, 1, 1]
    assert len(calls) == 2  # nobody can tell, while tracing, that two rates are equal


def test_rates_stay_shared_on_their_way_into_compiled_code(monkeypatch):
    values = iter([0.5, 0.25])
    state = init(three_tables(), SGD(lambda: next(values)), KEY)
    calls = updates(monkeypatch)
    step = jax.jit(
        lambda rates: apply_gradients(state, IDS, ONES, learning_rates=rates)
    )
    for value in (0.5, 0.25):
        rates = current_learning_rates(state)
        assert rates == dict.fromkeys("abc", value)
        assert moved(step(rates)) == [value] * 3
    assert len(calls) == 1
    rates["b"] = 2.0
    assert moved(step(rates)) == [0.25, 2.0, 0.25]


def test_the_object_shares_too(monkeypatch):
    values = iter([0.5, 0.25])
    embedding = TPUEmbedding(three_tables(), SGD(lambda: next(values)))
    apart = TPUEmbedding(three_tables(), SGD(0.5), stack=False)
    assert (len(embedding.state.stacks), len(apart.state.stacks)) == (1, 3)
    calls = updates(monkeypatch)
    for one in (embedding, apart):
        one.enqueue(IDS)
        one.dequeue()
        one.apply_gradients(ONES)
    assert len(calls) == 1 + 3
    assert moved(embedding.state) == moved(apart.state) == [0.5] * 3
    with pytest.raises(ValueError, match="stack=, mesh= and axes=, or load"):
        embedding.state = dataclasses.replace(apart.state)


def test_no_gather_of_scalars_in_a_step():
    """Gathers of single numbers, one an id, cost more than the update on a TPU."""
    state, (ids, weights) = made(storage="packed"), batch()
    text = str(jax.make_jaxpr(train_step)(state, ids, weights))
    assert "sparse_combine" in text and "sparse_update" in text
    assert " gather[" not in text


def test_as_many_updates_as_stacks():
    tables = [TableConfig(64, 128, name=name) for name in "abcd"]
    config = [FeatureConfig(table) for table in tables]
    ids, gradients = [jnp.arange(8)] * 4, [jnp.ones((8, 128))] * 4
    counts = []
    for stack in (True, False):
        state = init(config, Adam(0.1), KEY, storage="packed", stack=stack)
        text = str(jax.make_jaxpr(apply_gradients)(state, ids, gradients))
        counts.append(text.count("name=run_update"))
    assert counts == [1, 4]


@pytest.mark.parametrize("storage", ["plain", "packed"])
def test_tables_of_a_stack_that_is_spread(storage):
    # Rows of 7 do not make two equal parts; those of the stack, 8 + 8, do.
    tables = [TableConfig(rows, 128, normal, name=f"t{rows}") for rows in (7, 8)]
    state = init([*map(FeatureConfig, tables)], SGD(0.5), KEY, storage=storage)
    mesh = jax.make_mesh((2,), ("rows",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    spread = jax.device_put(state, rows)
    assert_same(to_logical(spread), to_logical(state), rtol=0)
    ids, ones = [jnp.array([6, 7]), jnp.array([0, 7])], [jnp.ones((2, 128))] * 2
    assert_same(lookup(spread, ids), lookup(state, ids), rtol=0)
    new, want = (apply_gradients(s, ids, ones) for s in (spread, state))
    assert_same(to_logical(new), to_logical(want))
    weights = np.ones((7, 128), np.float32)
    loaded = from_logical(new, {"t7": {"parameters": weights}})
    np.testing.assert_array_equal(loaded.table("t7"), weights)
    np.testing.assert_array_equal(loaded.table("t8"), new.table("t8"))
    for array in jax.tree.leaves(loaded):
        assert array.sharding.is_equivalent_to(rows, 2)
