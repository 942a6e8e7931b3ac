"""Batches of data loaders, and batches of every size in few shapes."""

from types import SimpleNamespace
from typing import Any, NamedTuple

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
    apply_gradients,
    init,
    lookup,
    pad_to_buckets,
    to_inputs,
)
from tests.embedding.golden import normal

V = 40
ITEM = TableConfig(V, 4, normal, combiner="mean", name="item")
IDS = np.array([3, 0, 39])  # int64


def listed(array: Any) -> Any:
    return np.asarray(array).tolist()


class WithArray:
    """A tensor of another package that makes a NumPy array."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.array


class WithDLPack:
    """One that hands on its memory."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


class Unknown(WithDLPack):
    """One whose numbers NumPy does not know, as torch's bfloat16; JAX does."""

    dtype = "torch.bfloat16"

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise TypeError("Got unsupported ScalarType BFloat16")


class SparseTuple(NamedTuple):
    """As `tf.compat.v1.SparseTensorValue`: to JAX a pytree."""

    indices: Any
    values: Any
    dense_shape: Any


@pytest.mark.parametrize(
    "given", [IDS, IDS.astype(np.uint32), WithArray(IDS), WithDLPack(IDS)]
)
def test_ids_of_every_package_become_int32(given):
    (found,) = to_inputs([given])
    assert isinstance(found, np.ndarray)
    assert (found.dtype, found.tolist()) == (np.int32, [3, 0, 39])


def test_what_has_32_bits_stays():
    kept = (np.ones(2, np.int8), np.ones(2, np.float32), jnp.ones(2), np.ones(2, bool))
    for given, found in zip(kept, to_inputs(kept), strict=True):
        assert found is given
    assert to_inputs({"w": np.ones(2)})["w"].dtype == np.float32
    assert to_inputs({"w": None}) == {"w": None}
    assert to_inputs(Unknown(np.ones(2, np.float32))).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ({"a": np.array([[1, 2], [2**31, 3]])}, r"\['a'\] has 2147483648 at \[1, 0\]"),
        ({"a": np.array([-(2**31) - 1])}, r"has -2147483649 at \[0\], which int32"),
        ({"a": np.array([2**64 - 1], np.uint64)}, r"has 18446744073709551615 at \[0\]"),
        (Ragged(np.array([2**40]), np.array([0, 1])), r"the batch has 1099511627776"),
        (
            SimpleNamespace(row_splits=IDS, values=IDS, ragged_rank=2),
            "the batch has ragged_rank=2; it must be 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused(ids, text):
    with pytest.raises(ValueError, match=text):
        to_inputs(ids)


def test_ragged_and_sparse_tensors_of_other_packages():
    values: Any = WithArray(np.array([7, 1, 2]))
    splits: Any = WithArray(np.array([0, 1, 3]))
    of_tensorflow = SimpleNamespace(values=values, row_splits=splits, ragged_rank=1)
    of_torch = SimpleNamespace(values=lambda: values, offsets=lambda: splits)
    for given in (of_tensorflow, of_torch, Ragged(values, splits)):
        found = to_inputs({"a": given})["a"]
        assert isinstance(found, Ragged)
        assert (listed(found.values), listed(found.row_splits)) == (
            [7, 1, 2],
            [0, 1, 3],
        )
        assert all(x.dtype == np.int32 for x in jax.tree.leaves(found))
    indices = WithArray(np.array([[0, 1], [1, 0], [1, 2]]))
    shape = WithArray(np.array([2, 3]))
    for kind in (SimpleNamespace, SparseTuple):
        found = to_inputs(kind(indices=indices, values=values, dense_shape=shape))
        assert isinstance(found, Sparse)
        assert (found.dense_shape, listed(found.values)) == ((2, 3), [7, 1, 2])


CONFIG = {
    "ragged": FeatureConfig(ITEM),
    "sparse": FeatureConfig(ITEM),
    "padded": FeatureConfig(ITEM),
    "dense": FeatureConfig(ITEM),
    "sequence": FeatureConfig(ITEM, max_sequence_length=3),
}


def batch_of(rng: Any, size: int = 16) -> tuple[Any, Any]:
    """Returns ids and weights of as many samples, in every form, of drawn lengths."""
    lengths = rng.integers(0, 9, size)
    lengths[0] = 9  # else the padded form varies too
    rows = [rng.integers(0, V, n).tolist() for n in lengths]
    weights = [rng.random(n).tolist() for n in lengths]
    places = [[b, k] for b, row in enumerate(rows) for k in range(len(row))]
    places.append([0, 10])  # of no sample: outside of the shape
    shape, flat = (size, 10), [*(i for row in rows for i in row), 5]
    padded = np.full((size, 9), -1)
    for b, row in enumerate(rows):
        padded[b, : len(row)] = row
    ids = {
        "ragged": Ragged.from_rows(rows),
        "sparse": Sparse(np.array(places), np.array(flat), shape),
        "padded": padded,
        "dense": rng.integers(0, V, size),
        "sequence": Ragged.from_rows(rows),
    }
    return ids, dict.fromkeys(ids) | {"ragged": Ragged.from_rows(weights)}


def test_buckets_change_no_bit_and_compile_few_programs():
    """Thirty batches of 19 sizes take the programs of six."""
    names = ("ragged", "sparse", "padded")
    config = {name: CONFIG[name] for name in names}
    state = init(config, Adam(0.1), jax.random.key(0), storage="plain")
    shapes, programs = set(), []

    @jax.jit
    def step(state, ids, weights):
        programs.append(1)
        activations = lookup(state, ids, weights)
        return activations, apply_gradients(state, ids, activations, weights)

    rng = np.random.default_rng(0)
    for number in range(30):
        ids, weights = ({name: x[name] for name in names} for x in batch_of(rng))
        shapes.add(ids["ragged"].values.shape)
        activations, new = step(state, pad_to_buckets(ids), pad_to_buckets(weights))
        if number % 15 == 0:
            expected = jax.jit(lookup)(state, ids, weights)
            jax.tree.map(np.testing.assert_array_equal, activations, expected)
            own = jax.jit(apply_gradients)(state, ids, expected, weights)
            jax.tree.map(np.testing.assert_array_equal, new.stacks, own.stacks)
    assert (len(shapes), len(programs)) == (19, 6)


def test_sizes_of_buckets():
    sizes = [pad_to_buckets(Ragged.from_rows([[1] * n])).values.size for n in range(66)]
    assert sorted(set(sizes[:41])) == [*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40]
    assert all(n <= size <= max(1.25 * n, 1) for n, size in enumerate(sizes))
    given = Ragged.from_rows([[1, 2], [3]])
    assert pad_to_buckets(given, buckets=[2, 5]).values.tolist() == [1, 2, 3, 0, 0]
    spare = Ragged.from_rows([[1, 2], [3]], size=9)  # which are not counted
    assert pad_to_buckets(spare, buckets=[2, 5]).values.size == 5
    with pytest.raises(ValueError, match=r"takes 3 places, more than the last of bu"):
        pad_to_buckets({"a": given}, buckets=[2])
    for buckets in ([], [4, 4], [4, 2]):
        with pytest.raises(ValueError, match="must be sizes in ascending order"):
            pad_to_buckets(given, buckets=buckets)


def test_samples_are_filled_up_with_such_as_have_no_ids():
    state = init(CONFIG, Adam(0.1), jax.random.key(0))
    ids, weights = batch_of(np.random.default_rng(1), 5)
    full, own = (pad_to_buckets(x, num_samples=8) for x in (ids, weights))
    look_up = jax.jit(lookup)
    found, expected = look_up(state, full, own), look_up(state, ids, weights)
    for name, activations in found.items():
        assert activations.shape[0] == 8
        np.testing.assert_array_equal(activations[:5], expected[name])
        assert not activations[5:].any()
    with pytest.raises(ValueError, match="has 5 samples, more than num_samples=4"):
        pad_to_buckets(ids, num_samples=4)


def test_one_id_a_sample_and_bcoo():
    assert pad_to_buckets(np.ones((3, 1), int)).shape == (3, 1)
    assert pad_to_buckets(np.ones((2, 3, 9), int)).shape == (2, 3, 10)
    ids = BCOO((jnp.array([7] * 9), jnp.zeros((9, 2), int)), shape=(2, 9))
    found = pad_to_buckets(ids)
    assert (found.values.shape, found.dense_shape) == ((10,), (2, 10))
