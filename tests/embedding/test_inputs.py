"""Ids in every form: combiners, edge cases, sequences, shapes, and what is refused."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.sparse import BCOO

from sparse_adam.embedding import (
    Adam,
    FeatureConfig,
    Ragged,
    Sparse,
    TableConfig,
    TPUEmbedding,
    apply_gradients,
    from_logical,
    init,
    lookup,
    serving_embedding_lookup,
)
from tests.embedding import model
from tests.embedding.model import FORMS, Rows

each_form = pytest.mark.parametrize("form", FORMS)


def one_to_eight(key, shape, dtype):
    return jnp.arange(1, 9, dtype=dtype).reshape(shape)


def state_of(combiner: Any = "mean", **options):
    """One feature of the table [[1, 2], [3, 4], [5, 6], [7, 8]]."""
    table = TableConfig(4, 2, one_to_eight, combiner=combiner, name="t")
    config = FeatureConfig(table, name="f", **options)
    return init(config, Adam(0.1), jax.random.key(0))


# Golden case D: samples [1, 3], [], [0, 0, 2], []; weights; then sum, mean, sqrtn of
# the samples 0 and 2 by the formulae, and, if TensorFlow's safe lookup differs, by it.
IDS = [[1, 3], [], [0, 0, 2], []]
GOLDEN_D = {
    "no_weights": (
        None,
        [
            ([10, 12], [7, 10]),
            ([5, 6], [2.3333, 3.3333]),
            ([7.0710678, 8.4852810], [4.0414520, 5.7735026]),
        ],
        None,
    ),
    "a_negative_weight": (
        [[2, 0.5], [], [1, 3, -1], []],
        [
            ([9.5, 12], [-1, 2]),
            ([3.8, 4.8], [-0.3333333, 0.6666667]),
            ([4.6081772, 5.8208551], [-0.3015113, 0.6030227]),
        ],
        [
            ([9.5, 12], [-1, 2]),
            ([3.8, 4.8], [1, 2]),
            ([4.6081772, 5.8208551], [1.2649111, 2.5298221]),
        ],
    ),
    "sums_of_zero": (
        [[1, -1], [], [0, 0, 0], []],
        [
            ([-4, -4], [0, 0]),
            ([0, 0], [0, 0]),
            ([-2.8284271, -2.8284271], [0, 0]),
        ],
        [([-4, -4], [0, 0]), ([3, 4], [0, 0]), ([3, 4], [0, 0])],
    ),
}


@each_form
@pytest.mark.parametrize("golden", GOLDEN_D.values(), ids=GOLDEN_D.keys())
def test_golden_d(form, golden):
    weights, trained, safe = golden
    ids, weights = FORMS[form](Rows(IDS, weights))
    for number, combiner in enumerate(("sum", "mean", "sqrtn")):
        state = state_of(combiner)
        unsafe = state_of(combiner, validate_weights_and_indices=False)
        served = safe or trained
        if form == "ragged":
            served = trained  # TensorFlow drops no ragged id
        for got, expected in (
            (lookup(state, ids, weights), trained),
            (serving_embedding_lookup(state, ids, weights), served),
            (serving_embedding_lookup(unsafe, ids, weights), trained),
        ):
            want = np.zeros((4, 2))
            want[[0, 2]] = expected[number]
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


@each_form
@pytest.mark.parametrize("lost", [-1, 4, 2**31 - 1, -(2**31)])
def test_an_id_outside_the_table_is_no_id(form, lost):
    ids, _ = FORMS[form](Rows([[1, lost], [], [0, 0, 2], [lost]]))
    got = lookup(state_of("mean"), ids)
    expected = [[3, 4], [0, 0], [7 / 3, 10 / 3], [0, 0]]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_64_bit_id_does_not_wrap_into_the_table():
    ids = np.array([[2**32 + 1, 1], [-(2**32), 0]])
    expected = [[3, 4], [1, 2]]
    np.testing.assert_array_equal(lookup(state_of("sum"), ids), expected)
    ragged = Ragged(ids.reshape(-1), np.array([0, 2, 4]))
    np.testing.assert_array_equal(lookup(state_of("sum"), ragged), expected)


@each_form
def test_golden_d_as_a_sequence(form):
    ids, _ = FORMS[form](Rows(IDS))
    want = [[[3, 4], [7, 8]], [[0, 0], [0, 0]], [[1, 2], [1, 2]], [[0, 0], [0, 0]]]
    got = lookup(state_of("sum", max_sequence_length=2), ids)
    np.testing.assert_array_equal(got, want)
    served = serving_embedding_lookup(state_of(max_sequence_length=2), ids)
    np.testing.assert_array_equal(served, want)
    longer = lookup(state_of(max_sequence_length=5), ids)
    assert longer.shape == (4, 5, 2)
    np.testing.assert_array_equal(longer[2, :3], [[1, 2], [1, 2], [5, 6]])
    assert not np.any(longer[:, 3:])


def test_a_hole_in_a_sparse_sequence_stays_zero():
    ids = Sparse(np.array([[0, 1], [1, 0]]), np.array([3, 0]), (2, 4))
    got = lookup(state_of(max_sequence_length=2), ids)
    np.testing.assert_array_equal(got, [[[0, 0], [7, 8]], [[1, 2], [0, 0]]])


def moved_rows(new, old):
    return np.flatnonzero(np.any(np.asarray(new[0] != old[0]), axis=1)).tolist()


@each_form
def test_only_what_a_sequence_shows_is_updated(form):
    state = state_of(max_sequence_length=2)
    ids, _ = FORMS[form](Rows([[0, 1, 3], [2], []]))
    gradients = jnp.arange(1.0, 13).reshape(3, 2, 2)
    new = apply_gradients(state, ids, gradients).tables["t"]
    old = state.tables["t"]
    assert moved_rows(new, old) == [0, 1, 2]  # 3 was cut off; no padding moved a row
    shown = gradients[jnp.array([0, 0, 1]), jnp.array([0, 1, 0])]
    np.testing.assert_allclose(new.momenta[:3], 0.1 * shown, rtol=1e-6)


def test_dense_ids_keep_their_shape_and_padded_ones_are_combined():
    state = state_of("sum")
    np.testing.assert_array_equal(lookup(state, jnp.array([3, 0])), [[7, 8], [1, 2]])
    column = lookup(state, jnp.array([[3], [0]]))
    np.testing.assert_array_equal(column, [[7, 8], [1, 2]])
    ids = jnp.array([[[3, 0], [-1, 1]], [[-1, -1], [2, 2]]])
    want = [[[8, 10], [3, 4]], [[0, 0], [10, 12]]]
    np.testing.assert_array_equal(lookup(state, ids), want)
    assert lookup(state, ids[..., :1]).shape == (2, 2, 2)


def test_sparse_ids_of_a_higher_rank():
    indices = np.array([[0, 0, 1], [0, 1, 0], [1, 1, 0], [1, 1, 1]])
    ids = Sparse(indices, np.array([3, 0, 1, 2]), (2, 2, 2))
    want = [[[7, 8], [1, 2]], [[0, 0], [8, 10]]]
    np.testing.assert_array_equal(lookup(state_of("sum"), ids), want)


def test_output_shape():
    ids, _ = model.as_ragged(Rows(IDS))
    same = lookup(state_of("sum"), ids)
    shaped = lookup(state_of("sum", output_shape=(2, 2)), ids)
    np.testing.assert_array_equal(shaped, same.reshape(2, 2, 2))
    sequence = lookup(state_of("sum", output_shape=(4, 3)), ids)
    expected = lookup(state_of("sum", max_sequence_length=3), ids)
    np.testing.assert_array_equal(sequence, expected)
    with pytest.raises(ValueError, match=r"output_shape=\(3,\) of feature 'f' holds 3"):
        lookup(state_of(output_shape=(3,)), ids)


def test_empty_batches():
    state = state_of("mean")
    for ids in (
        np.zeros((0,), int),
        np.zeros((0, 3), int),
        np.zeros((3, 0), int),
        Ragged(np.zeros(0, int), np.zeros(3, int)),
        Sparse(np.zeros((0, 2), int), np.zeros(0, int), (2, 3)),
    ):
        activations = lookup(state, ids)
        assert activations.shape[1:] == (2,) and not np.any(activations)
        new = apply_gradients(state, ids, jnp.ones_like(activations))
        np.testing.assert_array_equal(new.tables["t"], state.tables["t"])


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
def test_weights_of_padding_do_not_count(combiner):
    state = state_of(combiner)
    ids, weights = np.array([[2, -1], [9, 1]]), np.array([[0.5, 3], [4, 2]], np.float32)
    there = np.where((ids >= 0) & (ids < 4), weights, 0)
    np.testing.assert_array_equal(
        lookup(state, ids, weights), lookup(state, ids, there)
    )


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
def test_rows_of_a_zero_gain_are_touched(combiner):
    state = state_of(combiner)
    state = from_logical(state, {"t": {"momenta": np.ones((4, 2))}})
    old = state.tables["t"]
    ids, weights = model.as_ragged(Rows([[0, 2], [3]], [[0, 0], [0]]))
    assert not np.any(lookup(state, ids, weights))
    new = apply_gradients(state, ids, jnp.ones((2, 2)), weights).tables["t"]
    assert moved_rows(new, old) == [0, 2, 3]
    np.testing.assert_allclose(new.momenta[jnp.array([0, 2, 3])], 0.9, rtol=1e-6)


@pytest.mark.parametrize(
    ("ids", "weights", "options", "text"),
    [
        (np.array([1, 2]), np.ones(2), {}, "'f' are given, but its ids are dense"),
        (np.array([[1], [2]]), np.ones((2, 1)), {}, "its ids are dense"),
        (np.array([[1, 2]]), np.ones((2, 1)), {}, r"shape \(2, 1\).*ids, \(1, 2\)"),
        (np.array([[1, 2]]), Ragged.from_rows([[1.0, 2.0]]), {}, "are Ragged, but its"),
        (Ragged.from_rows([[1]]), np.ones(1), {}, "are an array, but its ids are Rag"),
        (
            Ragged.from_rows([[1], [2]]),
            Ragged.from_rows([[1.0, 2.0]]),
            {},
            "have row_splits of shape",
        ),
        (
            Sparse(np.array([[0, 0]]), np.array([1]), (1, 2)),
            Sparse(np.array([[0, 0]]), np.array([1.0]), (2, 2)),
            {},
            r"dense_shape=\(2, 2\)",
        ),
        (
            np.array([[1, 2]]),
            np.ones((1, 2)),
            {"max_sequence_length": 2},
            "'f' are given, but it is a sequence feature",
        ),
        (np.array([1, 2]), None, {"max_sequence_length": 2}, r"must be \[B, L\]"),
        (np.array(1), None, {}, "ids of feature 'f' are a scalar"),
        (
            Ragged(np.ones((2, 2), int), np.array([0, 2])),
            None,
            {},
            "a ragged array of rank 2",
        ),
        (Sparse(np.zeros((2, 1), int), np.zeros(2, int), (3,)), None, {}, "R >= 2"),
    ],
)
def test_refused(ids, weights, options, text):
    with pytest.raises(ValueError, match=text):
        lookup(state_of(**options), ids, weights)


def test_refused_kinds():
    with pytest.raises(TypeError, match=r"ids of feature 'f' have dtype=float32"):
        lookup(state_of(), jnp.ones(3))
    with pytest.raises(TypeError, match="they must be real numbers"):
        lookup(state_of(), np.array([[1, 2]]), np.array([[True, False]]))
    batched = BCOO.fromdense(jnp.ones((2, 2), int), n_batch=1)
    with pytest.raises(ValueError, match=r"n_batch=1 .*update_layout\(n_batch"):
        lookup(state_of(), batched)


def test_ragged_from_rows():
    ragged = Ragged.from_rows([[5], [], [6, 7]], size=4)
    np.testing.assert_array_equal(ragged.values, [5, 6, 7, 0])
    np.testing.assert_array_equal(ragged.row_splits, [0, 1, 1, 3])
    assert np.asarray(Ragged.from_rows([[], []]).values).dtype.kind == "i"
    assert np.asarray(Ragged.from_rows([[0.5], []]).values).dtype.kind == "f"
    with pytest.raises(ValueError, match="size=2 must be at least 3"):
        Ragged.from_rows([[5, 6, 7]], size=2)


RAGGED = Ragged(np.array([3, 0, 1, 2, 0]), np.array([0, 1, 1, 4]))
WRONG_SPLITS = {
    "lengths": [1, 0, 3],
    "descending": [0, 3, 1, 4],
    "not from 0": [1, 2, 4],
    "past the end": [0, 2, 6],
}


def served(state, ids, weights=None):
    return serving_embedding_lookup(state, ids, weights)


def updated(state, ids, weights=None):
    return apply_gradients(state, ids, jnp.ones((3, 2)), weights)


def enqueued(state, ids, weights=None):
    feature = state.layout.features[0].config
    TPUEmbedding(feature, Adam()).enqueue(ids, weights)


def called(state, ids, weights=None):
    feature = state.layout.features[0].config
    TPUEmbedding(feature, Adam())(ids, weights)


def called_to_serve(state, ids, weights=None):
    feature = state.layout.features[0].config
    TPUEmbedding(feature, Adam()).serving_embedding_lookup(ids, weights)


EVERY_WAY = (lookup, served, updated, enqueued, called, called_to_serve)


@pytest.mark.parametrize("splits", WRONG_SPLITS.values(), ids=WRONG_SPLITS)
@pytest.mark.parametrize("kind", [np.array, jnp.array])
def test_wrong_splits_are_refused(splits, kind):
    ids = Ragged(kind([3, 0, 1, 2, 0]), kind(splits))
    for way in EVERY_WAY:
        with pytest.raises(ValueError, match=r"ascend from 0 to at most 5: .*cums"):
            way(state_of("sum"), ids)
    with pytest.raises(ValueError, match=r"parts\[1\] have row_splits="):
        Ragged.concatenate([RAGGED, ids])


def test_weights_must_have_the_splits_of_their_ids():
    weights = Ragged(np.ones(5, np.float32), np.array([0, 2, 2, 4]))
    for way in EVERY_WAY:
        text = r"row_splits=\[0, 2, 2, 4\]; they must be those of the ids, \[0, 1, 1, 4"
        with pytest.raises(ValueError, match=text):
            way(state_of("sum"), RAGGED, weights)


def test_splits_inside_jit_are_the_callers_duty():
    ids = jax.tree.map(jnp.asarray, RAGGED)
    got = jax.jit(lookup)(state_of("sum"), ids)
    np.testing.assert_array_equal(got, [[7, 8], [0, 0], [9, 12]])


@pytest.mark.parametrize("where", ["numpy", "jax", "mixed", "jit"])
def test_ragged_batches_are_joined_by_rows(where):
    parts = [
        Ragged.from_rows([[3], [], [0, 1, 2]], size=6),
        Ragged.from_rows([[]], size=2),
        Ragged.from_rows([[1, 1], [2]]),
    ]
    splits: Any = [0, 1, 1, 4]  # of the first part, as a list
    join = Ragged.concatenate
    if where in ("jax", "jit"):
        parts = jax.tree.map(jnp.asarray, parts)
    if where == "mixed":
        parts[1] = jax.tree.map(jnp.asarray, parts[1])
        parts[0] = Ragged(parts[0].values + 2**32 * (parts[0].values == 3), splits)
    joined = jax.jit(join)(parts) if where == "jit" else join(parts)
    want = Ragged.from_rows([[3], [], [0, 1, 2], [], [1, 1], [2]], size=11)
    assert isinstance(joined.values, np.ndarray if where == "numpy" else jax.Array)
    np.testing.assert_array_equal(joined.row_splits, want.row_splits)
    assert np.shape(joined.values) == np.shape(want.values)
    values = np.asarray(want.values).copy()
    if where == "mixed":
        values[0] = -1  # 2**32 + 3 is no id, and does not become 3
    np.testing.assert_array_equal(joined.values, values)


def test_what_can_not_be_joined():
    with pytest.raises(ValueError, match=r"concatenate\(\) got no parts"):
        Ragged.concatenate([])
    with pytest.raises(TypeError, match=r"parts\[1\] is ndarray; it must be a Ragged"):
        Ragged.concatenate([RAGGED, cast(Any, np.ones(3))])
