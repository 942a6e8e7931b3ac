"""From a data loader to a step: arrays of NumPy, ids of 32 bits, few shapes.

All of this runs on the host, before a batch reaches compiled code.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sparse_adam.embedding.host import is_input
from sparse_adam.embedding.inputs import Ragged, Sparse, as_array, is_bcoo


def to_inputs(features: Any) -> Any:
    """Returns what a data loader made of ids or weights, as `lookup` takes it.

    * Arrays of NumPy, tensors of torch and TensorFlow and whatever else has
      `__array__` or `__dlpack__` become arrays of NumPy; JAX's own stay.
    * 64-bit and unsigned ids become int32, and are refused where they do not fit.
      `jax.jit` would let them wrap around, into the table perhaps.
    * float64 weights become float32.
    * A `tf.RaggedTensor`, torch's jagged nested tensor and TorchRec's `JaggedTensor`
      become a `Ragged`, a `tf.SparseTensor` a `Sparse`.

    Args:
        features: any pytree of these.

    Raises:
        TypeError: a leaf is no array, and can not be one.
        ValueError: an id, a split or an index does not fit into int32.

    Examples:
        >>> import numpy as np
        >>> to_inputs({"user": np.array([3, 2**31 - 1])})  # int64
        {'user': array([         3, 2147483647], dtype=int32)}
        >>> to_inputs({"user": np.array([3, 2**32])})
        Traceback (most recent call last):
        ...
        ValueError: ['user'] has 4294967296 at [1], which int32 can not hold: number \
the rows of a table from 0, or hash ids to its rows on the host
    """
    return jax.tree_util.tree_map_with_path(_to_input, features, is_leaf=_is_leaf)


def pad_to_buckets(
    features: Any,
    *,
    buckets: Sequence[int] | None = None,
    num_samples: int | None = None,
) -> Any:
    """Fills up what varies from batch to batch, so that few shapes are compiled.

    The number of values of a `Ragged` or a `Sparse`, the places a sample of a padded
    array, and those of a `Sparse`, grow to the next bucket. What is filled in belongs
    to no sample: activations and updates are the same to the bit. Call it with ids and,
    apart, with their weights.

    Args:
        features: any pytree of what `to_inputs` takes.
        buckets: sizes in ascending order. None: 1 to 8, 10, 12, 14, 16, 20, 24, 28, 32
            and so on, four steps to each power of two, which grow by a quarter at most.
        num_samples: also fill up to so many samples, which have no ids. Their
            activations are zeros, and it is for the loss to leave them out.

    Returns:
        The same with arrays of NumPy.

    Raises:
        TypeError: see `to_inputs`.
        ValueError: see `to_inputs`; or a batch is larger than the last bucket, or has
            more samples than `num_samples`.

    Examples:
        >>> from sparse_adam.embedding import Ragged
        >>> pad_to_buckets(Ragged.from_rows([[1, 2, 3], [4]]), buckets=[8, 16])
        Ragged(values=array([1, 2, 3, 4, 0, 0, 0, 0], dtype=int32), \
row_splits=array([0, 3, 4], dtype=int32))
    """
    if buckets is not None and (
        not len(buckets) or any(a >= b for a, b in itertools.pairwise(buckets))
    ):
        raise ValueError(f"{buckets=} must be sizes in ascending order, or None")

    def pad(path: Any, given: Any) -> Any:
        name = jax.tree_util.keystr(path) or "the batch"
        value = _to_input(path, given)
        if isinstance(value, Ragged):
            return _pad_ragged(name, value, buckets, num_samples)
        if is_bcoo(value):
            value = Sparse(value.indices, value.data, value.shape)
        if isinstance(value, Sparse):
            return _pad_sparse(name, value, buckets, num_samples)
        return _pad_array(name, np.asarray(value), buckets, num_samples)

    return jax.tree_util.tree_map_with_path(pad, features, is_leaf=_is_leaf)


def _is_leaf(value: Any) -> bool:
    """Tells one feature, which a sparse tensor is too where it is a tuple of arrays."""
    return is_input(value) or hasattr(value, "dense_shape")


def _to_input(path: Any, value: Any) -> Any:
    name = jax.tree_util.keystr(path) or "the batch"
    if is_bcoo(value):
        return value
    if hasattr(value, "row_splits"):
        if getattr(value, "ragged_rank", 1) != 1:
            raise ValueError(
                f"{name} has ragged_rank={value.ragged_rank}; it must be 1, rows of "
                "ids: merge the outer dimensions, or pass a sparse tensor"
            )
        return Ragged(_array(name, value.values), _array(name, value.row_splits))
    if hasattr(value, "dense_shape"):
        shape = np.asarray(value.dense_shape).tolist()
        return Sparse(_array(name, value.indices), _array(name, value.values), shape)
    if callable(getattr(value, "offsets", None)):  # torch's and TorchRec's
        return Ragged(_array(name, value.values()), _array(name, value.offsets()))
    return _array(name, value)


def _array(name: str, value: Any) -> jax.Array | np.ndarray:
    """Returns an array of JAX or NumPy whose numbers have 32 bits at most."""
    array = as_array(name, value)
    if isinstance(array, jax.Array):
        return array
    if array.dtype == np.float64:
        return array.astype(np.float32)
    if array.dtype.kind not in "iu" or np.can_cast(array.dtype, np.int32):
        return array
    limits = np.iinfo(np.int32)
    wrong = array > limits.max
    if array.dtype.kind == "i":
        wrong |= array < limits.min
    if wrong.any():
        first = np.unravel_index(np.argmax(wrong), wrong.shape)
        place = ", ".join(map(str, first))
        raise ValueError(
            f"{name} has {array[first]} at [{place}], which int32 can not hold: number "
            "the rows of a table from 0, or hash ids to its rows on the host"
        )
    return array.astype(np.int32)


def _bucket(name: str, size: int, buckets: Sequence[int] | None) -> int:
    """Returns the least bucket that is not smaller than a size."""
    if buckets is None:
        step = 1 << max((size - 1).bit_length() - 3, 0)
        return max(step * -(-size // step), 1)
    for bucket in buckets:
        if bucket >= size:
            return bucket
    raise ValueError(
        f"{name} takes {size} places, more than the last of {buckets=}: add a larger "
        "bucket, or cut the batch"
    )


def _missing(name: str, samples: int, num_samples: int | None) -> int:
    """Returns how many samples are to be added."""
    if num_samples is None:
        return 0
    if samples > num_samples:
        raise ValueError(f"{name} has {samples} samples, more than {num_samples=}")
    return num_samples - samples


def _pad_ragged(
    name: str, ragged: Ragged, buckets: Sequence[int] | None, num_samples: int | None
) -> Ragged:
    values, splits = np.asarray(ragged.values), np.asarray(ragged.row_splits)
    values = values[: splits[-1]]
    missing = _missing(name, len(splits) - 1, num_samples)
    size = _bucket(name, len(values), buckets)
    return Ragged(
        np.pad(values, (0, size - len(values))),
        np.pad(splits, (0, missing), mode="edge"),
    )


def _pad_sparse(
    name: str, sparse: Sparse, buckets: Sequence[int] | None, num_samples: int | None
) -> Sparse:
    indices, values = np.asarray(sparse.indices), np.asarray(sparse.values)
    *samples, places = sparse.dense_shape
    samples[0] += _missing(name, samples[0], num_samples)
    # An index outside of the old shape is none, and must not fall into the larger one.
    inside = (indices >= 0) & (indices < np.array(sparse.dense_shape))
    indices = np.where(np.all(inside, axis=1)[:, None], indices, -1).astype(np.int32)
    missing = _bucket(name, len(values), buckets) - len(values)
    return Sparse(
        np.pad(indices, ((0, missing), (0, 0)), constant_values=-1),
        np.pad(values, (0, missing)),
        (*samples, _bucket(name, places, buckets)),
    )


def _pad_array(
    name: str, array: np.ndarray, buckets: Sequence[int] | None, num_samples: int | None
) -> np.ndarray:
    """Fills up with -1, which is no id, or with weights of 0."""
    widths = [(0, 0)] * array.ndim
    if array.ndim:
        widths[0] = (0, _missing(name, array.shape[0], num_samples))
    if array.ndim > 1 and array.shape[-1] > 1:  # else one id a sample, and stays so
        places = array.shape[-1]
        widths[-1] = (0, _bucket(name, places, buckets) - places)
    fill = -1 if array.dtype.kind == "i" else 0
    return np.pad(array, widths, constant_values=fill)
