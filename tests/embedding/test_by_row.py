"""Gradients by rows, against dense differentiation and whole batches."""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sparse_adam.embedding import (
    SGD,
    Adam,
    FeatureConfig,
    RowGradients,
    TableConfig,
    TPUEmbedding,
    apply_gradients,
    apply_row_gradients,
    batch_stats,
    gradient_norm,
    init,
    join_row_gradients,
    lookup,
    row_gradients,
    to_logical,
)
from sparse_adam.embedding import norm as norm_module
from tests.embedding.golden import KEY, normal
from tests.embedding.test_stacks import CONFIG, D, batch
from tests.embedding.test_tpu_embedding import assert_same


def with_tables(state, tables):
    """The state, of plain tables that stand alone, with these weights."""
    places = [state.layout.place(name)[0] for name in tables]
    stacks = list(state.stacks)
    for place, table in zip(places, tables.values(), strict=True):
        stacks[place] = stacks[place]._replace(table=table)
    return type(state)(tuple(stacks), state.layout)


def dense_gradients(config, loss_of, ids, weights=None, key=KEY):
    """The gradients of a loss by whole tables, `[V, D]` each."""
    state = init(config, Adam(), key, stack=False, storage="plain")
    tables = {name: state.table(name) for name in state.tables}

    def loss(tables):
        return loss_of(lookup(with_tables(state, tables), ids, weights))

    return jax.jit(jax.grad(loss))(tables)


def loss_of(activations):
    return sum(jnp.sin(x).sum() for x in jax.tree.leaves(activations))


def norm_of(arrays):
    return np.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in arrays))


@functools.cache
def case():
    """A state, a batch, its gradients by activations, and those by whole tables."""
    ids, weights = batch()
    state = init(CONFIG, Adam(), KEY)
    gradients = jax.jit(jax.grad(loss_of))(jax.jit(lookup)(state, ids, weights))
    dense = dense_gradients(CONFIG, loss_of, ids, weights)
    return state, (ids, gradients, weights), dense


@pytest.mark.parametrize("chunk", [8192, 5])
def test_the_norm_is_that_of_dense_gradients(chunk, monkeypatch):
    monkeypatch.setattr(norm_module, "_CHUNK", chunk)
    state, update, dense = case()
    norm = jax.jit(lambda *arguments: gradient_norm(*arguments))(state, *update)
    assert norm.dtype == jnp.float32 and norm.shape == ()
    np.testing.assert_allclose(norm, norm_of(dense.values()), rtol=1e-6)
    # Of the activations it would be another number.
    assert abs(norm_of(jax.tree.leaves(update[1])) / norm - 1) > 0.1


def test_a_norm_of_nothing_and_of_what_is_ignored():
    config = {"a": FeatureConfig(TableConfig(4, 2, normal, name="a"))}
    state = init(config, Adam(), KEY)
    ids, nan = {"a": np.array([-1, 4, 2])}, np.full((3, 2), np.nan, np.float32)
    nan[2] = 3.0, 4.0
    assert jax.jit(gradient_norm)(state, ids, {"a": nan}) == 5
    assert gradient_norm(state, ids, {"a": None}) == 0
    empty = {"a": np.zeros((0,), np.int32)}, {"a": np.zeros((0, 2), np.float32)}
    assert gradient_norm(state, *empty) == 0
    found = row_gradients(state, *empty)
    assert [x.shape for x in found["a"]] == [(0,), (0, 2)]
    assert_same(apply_row_gradients(state, found), state, rtol=0)
    found = row_gradients(state, ids, {"a": nan})["a"]
    assert found.ids.tolist() == [2, 4, 4]
    assert found.rows.tolist() == [[3, 4], [0, 0], [0, 0]]
    # A row that was looked up is there also where its gradient is 0.
    found = row_gradients(state, ids, {"a": None})["a"]
    assert found.ids.tolist() == [2, 4, 4] and not found.rows.any()


def test_a_norm_makes_nothing_of_the_size_of_all_ids():
    state = init(FeatureConfig(TableConfig(1000, 16, normal)), Adam(), KEY)
    ids = jax.ShapeDtypeStruct((100, 1000), jnp.int32)  # of 100 samples
    gradients = jax.ShapeDtypeStruct((100, 16), jnp.float32)
    text = jax.jit(gradient_norm).lower(state, ids, gradients).as_text()
    assert "tensor<8192x16xf32>" in text  # those of one chunk
    assert "tensor<100000x16xf32>" not in text


def test_clipping_by_global_norm_is_that_of_optax_on_a_dense_program():
    clip, rate = 0.5, 0.1
    ids, weights = batch()
    state = init(CONFIG, SGD(rate), KEY, stack=False, storage="plain")
    params = {
        "tables": {name: state.table(name) for name in state.tables},
        "tower": jnp.linspace(-1.0, 1.0, D),
    }

    def loss_of(activations, tower):
        return sum(jnp.sin(x @ tower).sum() for x in jax.tree.leaves(activations))

    @jax.jit
    def dense_step(params):
        def loss(params):
            tables = with_tables(state, params["tables"])
            return loss_of(lookup(tables, ids, weights), params["tower"])

        optimizer = optax.chain(optax.clip_by_global_norm(clip), optax.sgd(rate))
        gradients = jax.grad(loss)(params)
        updates, _ = optimizer.update(gradients, optimizer.init(params))
        return optax.apply_updates(params, updates), optax.tree.norm(gradients)

    @jax.jit
    def sparse_step(state, tower):
        activations = lookup(state, ids, weights)
        gradients, dense = jax.grad(loss_of, (0, 1))(activations, tower)
        norm = optax.tree.norm([dense, gradient_norm(state, ids, gradients, weights)])
        scale = jnp.minimum(1.0, clip / norm)
        state = apply_gradients(state, ids, gradients, weights, gradient_scale=scale)
        return state, tower - rate * scale * dense, norm

    wanted, wanted_norm = dense_step(params)
    state, tower, norm = sparse_step(init(CONFIG, SGD(rate), KEY), params["tower"])
    np.testing.assert_allclose(norm, wanted_norm, rtol=1e-6)
    assert norm > 10 * clip
    np.testing.assert_allclose(tower, wanted["tower"], rtol=1e-5, atol=1e-7)
    for name, table in wanted["tables"].items():
        np.testing.assert_allclose(state.table(name), table, rtol=1e-5, atol=1e-7)


def test_the_object_takes_a_scale():
    config = {"a": FeatureConfig(TableConfig(4, 2, normal, name="a"))}
    embedding = TPUEmbedding(config, SGD(1.0), storage="plain")
    before = embedding.retrieve()["a"]["parameters"]
    for scale in (0.5, jnp.float32(0.25)):
        embedding.enqueue({"a": np.array([1])})
        gradients = jax.tree.map(jnp.ones_like, embedding.dequeue())
        with pytest.raises(ValueError, match="gradient_scale has shape"):
            embedding.apply_gradients(gradients, gradient_scale=np.ones(2))
        embedding.apply_gradients(gradients, gradient_scale=scale)
    moved = before - embedding.retrieve()["a"]["parameters"]
    np.testing.assert_allclose(moved[1], 0.75, rtol=1e-6)


def test_row_gradients_are_the_rows_of_dense_ones():
    state, update, dense = case()
    found = jax.jit(row_gradients)(state, *update)
    assert found.keys() == dense.keys()
    for name, (ids, rows) in found.items():
        num_rows = len(dense[name])
        assert (ids.dtype, rows.dtype) == (jnp.int32, jnp.float32)
        there = np.asarray(ids) < num_rows
        assert np.all(np.diff(ids)[there[1:]] > 0) and np.all(ids[~there] == num_rows)
        assert not np.any(np.asarray(rows)[~there])
        touched = np.flatnonzero(np.any(dense[name] != 0, axis=1))
        assert set(touched) <= set(np.asarray(ids)[there].tolist())
        np.testing.assert_allclose(
            np.asarray(rows)[there], dense[name][np.asarray(ids)[there]], atol=1e-6
        )


def test_applied_they_make_the_update_of_apply_gradients():
    state, update, _ = case()
    options = {"learning_rates": {"a": 0.1, "b": 0.1, "c": 0.5}, "gradient_scale": 0.5}

    @jax.jit
    def both(state):
        found = row_gradients(state, *update)
        by_rows = apply_row_gradients(state, found, **options)
        part = apply_row_gradients(state, {"b": found["b"]}, **options)
        return apply_gradients(state, *update, **options), by_rows, part

    wanted, by_rows, part = map(to_logical, both(state))
    assert_same(by_rows, wanted)
    assert_same(part["b"], wanted["b"])
    assert_same({**part, "b": 0}, {**to_logical(state), "b": 0}, rtol=0)


def test_places_without_a_row_move_no_other_table():
    """Twice the same id leaves a place, whose V is not row 0 of the next table."""
    tables = TableConfig(256, D, normal, name="a"), TableConfig(8, D, normal, name="b")
    config = {table.name: FeatureConfig(table) for table in tables}
    state = init(config, SGD(0.1, weight_decay_factor=0.5), KEY)
    assert state.layout.stacks[0].offsets == (0, 256)
    ids = {"a": jnp.array([3, 3, -1]), "b": jnp.array([1])}
    ones = {name: jnp.ones((*x.shape, D)) for name, x in ids.items()}
    found = row_gradients(state, ids, ones)
    new = apply_row_gradients(state, {"a": found["a"]})
    assert_same(new.table("b"), state.table("b"), rtol=0)
    moved = np.any(new.table("a") != state.table("a"), axis=1)
    assert np.flatnonzero(moved).tolist() == [3]


@pytest.mark.parametrize("stacked", [True, False])
def test_microbatches_make_the_update_of_the_whole_batch(stacked):
    tables = TableConfig(20, D, normal, name="a"), TableConfig(9, D, normal, name="b")
    config = {table.name: FeatureConfig(table) for table in tables}
    rng = np.random.default_rng(1)
    ids = {"a": rng.integers(0, 21, (8, 3)), "b": rng.integers(0, 9, (8, 1))}
    state = init(config, Adam(0.1), KEY)

    def loss_of(activations):
        return jnp.mean(jnp.sin(activations["a"] * activations["b"]))

    def gradients_of(state, ids):
        return jax.grad(loss_of)(lookup(state, ids))

    @jax.jit
    def by_parts(state, ids):
        def part_of(_, ids):
            return None, row_gradients(state, ids, gradients_of(state, ids))

        halves = jax.tree.map(lambda x: x.reshape(2, 4, -1), ids)
        _, parts = jax.lax.scan(part_of, None, halves)
        half = [jax.tree.map(operator.itemgetter(i), parts) for i in (0, 1)]
        each = [parts] if stacked else half
        joined = join_row_gradients(state, *each)
        return joined, apply_row_gradients(state, joined, gradient_scale=1 / 2)

    @jax.jit
    def whole(state, ids):
        gradients = gradients_of(state, ids)
        return row_gradients(state, ids, gradients), apply_gradients(
            state, ids, gradients
        )

    joined, state_by_parts = by_parts(state, ids)
    once, wanted = whole(state, ids)
    for name, (rows, gradients) in joined.items():
        np.testing.assert_array_equal(rows, once[name].ids)
        np.testing.assert_allclose(gradients / 2, once[name].rows, atol=1e-7)
    assert_same(to_logical(state_by_parts), to_logical(wanted))


def test_spread_tables_have_the_same_norm_rows_and_updates():
    mesh = jax.make_mesh((2,), ("rows",))
    config = FeatureConfig(TableConfig(8, D, normal, name="a"))
    ids, gradients = np.array([[1, 1], [7, 3]]), np.ones((2, D), np.float32)

    @jax.jit
    def step(state, ids, gradients):
        found = row_gradients(state, ids, gradients)
        norm = gradient_norm(state, ids, gradients)
        stats = batch_stats(state, ids)
        return norm, found, stats, apply_row_gradients(state, found)

    wanted = step(init(config, Adam(), KEY), ids, gradients)

    def spread(tree, *axes):
        return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axes)))

    state = spread(init(config, Adam(), KEY), "rows")
    for batch_axes in ((), ("rows",)):
        given = spread((ids, gradients), *batch_axes)
        assert_same(jax.device_get(step(state, *given)), jax.device_get(wanted))


def test_row_gradients_that_do_not_fit():
    table = TableConfig(4, 2, name="a")
    frozen = TableConfig(4, 2, name="b", trainable=False)
    config = [FeatureConfig(table), FeatureConfig(frozen)]
    state = init(config, Adam(), KEY)
    good = RowGradients(jnp.array([1]), jnp.ones((1, 2)))
    wrong: Any
    for wrong, error, text in (
        ([good], TypeError, "is a list; it must be a dict by table name"),
        ({"b": good}, ValueError, r"has 'b', which is none of the trainable .*'a'"),
        ({"a": (1, 2)}, TypeError, "is a tuple; it must be RowGradients"),
        ({"a": good._replace(ids=jnp.ones(1))}, TypeError, "must be an integer dtype"),
        (
            {"a": good._replace(rows=jnp.ones(2))},
            ValueError,
            r"must be floats .*\(1, 2\)",
        ),
    ):
        for function in (apply_row_gradients, join_row_gradients):
            with pytest.raises(error, match=text):
                function(state, wrong)
    state = init(config, Adam(use_gradient_accumulation=False), KEY)
    with pytest.raises(ValueError, match="a step for each occurrence"):
        apply_row_gradients(state, {"a": good})


def test_a_part_of_a_batch_is_refused():
    def function(state, ids):
        return row_gradients(state, ids, jnp.ones((2, 4)))

    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    state = init(FeatureConfig(TableConfig(8, 4)), Adam(), KEY, mesh=mesh)
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(PartitionSpec("data"), PartitionSpec("data")),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    spread = NamedSharding(mesh, PartitionSpec("data"))
    ids = jax.device_put(jnp.array([1, 2, 3, 4]), spread)
    with pytest.raises(ValueError, match="call it outside, with the whole batch"):
        jax.eval_shape(mapped, state, ids)
