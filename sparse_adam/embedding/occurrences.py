"""The one form that ids are brought into, whatever form they came in."""

import math
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_adam.embedding.inputs import (
    Ragged,
    Sparse,
    as_array,
    check_splits,
    is_bcoo,
)
from sparse_adam.embedding.tables import Feature
from sparse_adam.ops.combine import sum_over_samples
from sparse_adam.ops.integers import integers
from sparse_adam.ops.plan import indices_or


class Occurrences(NamedTuple):
    """The ids of one feature, one behind the other, and the samples that own them.

    Each of S samples has `places` of them, in order; or, where `samples` is given, it
    tells whose each one is. An id that no sample owns is -1.
    """

    ids: jax.Array  # int32 [N]; -1 is none
    samples: jax.Array | None  # int32 [N] in [0, S); S for none
    weights: jax.Array | None  # float32 [N]; None is 1 for each
    num_samples: int  # S
    places: int  # N / S, if samples is None
    ascending: bool  # samples are
    shape: tuple[int, ...]  # of the activations, without D: S elements
    is_sequence: bool  # each sample is one place of a sequence

    def owners(self) -> jax.Array:
        """Returns int32 `[N]`: the sample of each id."""
        if self.samples is not None:
            return self.samples
        size = self.num_samples * self.places
        return lax.iota(jnp.int32, size) // max(self.places, 1)

    def raised(self, offset: int) -> "Occurrences":
        """Returns the same with ids that are rows from `offset` on."""
        if not offset:
            return self
        return self._replace(ids=jnp.where(self.ids >= 0, self.ids + offset, -1))

    def sum(self, x: jax.Array) -> jax.Array:
        """Returns `[S, ...]`: the sums of `x`, `[N, ...]`, over each sample."""
        return sum_over_samples(
            x, self.samples, self.num_samples, ascending=self.ascending
        )


class _Bags(NamedTuple):
    """Ids as they came: samples of any shape, and each id's column in its sample."""

    ids: jax.Array  # as in `Occurrences`, like all with these names
    samples: jax.Array | None
    columns: jax.Array | None  # int32 [N], if samples is given
    weights: jax.Array | None
    places: int
    ascending: bool
    shape: tuple[int, ...]


def occurrences(feature: Feature, ids: Any, weights: Any = None) -> Occurrences:
    """Brings the ids of one feature, in any of the forms, into the one form.

    Args:
        feature: whose they are; an id outside its table becomes -1.
        ids: dense, padded, ragged or sparse.
        weights: of the same form; or None.

    Raises:
        TypeError: ids that are not integers, weights that are not numbers.
        ValueError: shapes that do not fit, weights where there can be none, or of
            another form than the ids.
    """
    ids = _of_arrays(f"ids of feature {feature.name!r}", ids)
    weights = _of_arrays(f"weights of feature {feature.name!r}", weights)
    num_rows = feature.config.table.vocabulary_size
    given = weights is not None
    if given and _form(weights) != _form(ids):
        raise ValueError(
            f"weights of feature {feature.name!r} are {_form(weights)}, but its ids "
            f"are {_form(ids)}: pass both in one form"
        )
    if isinstance(ids, Ragged):
        bags = _from_ragged(feature, num_rows, ids, weights)
    elif isinstance(ids, Sparse):
        bags = _from_sparse(feature, num_rows, ids, weights)
    else:
        bags = _from_array(feature, num_rows, ids, weights)
    num_samples = math.prod(bags.shape)
    length, shape = _activations_shape(feature, bags.shape)
    if length is None:
        if given and not isinstance(ids, Ragged | Sparse) and bags.places == 1:
            raise ValueError(
                f"weights of feature {feature.name!r} are given, but its ids are dense "
                "with one id a sample, and so have the weight 1: pass None, or both as "
                "Ragged or Sparse"
            )
        return Occurrences(
            bags.ids,
            bags.samples,
            bags.weights,
            num_samples,
            bags.places,
            bags.ascending,
            shape,
            is_sequence=False,
        )
    if given:
        raise ValueError(
            f"weights of feature {feature.name!r} are given, but it is a sequence "
            "feature, whose rows are not combined: pass None"
        )
    if not isinstance(ids, Ragged | Sparse) and np.ndim(ids) == 1:
        raise ValueError(
            f"ids of the sequence feature {feature.name!r} have the shape "
            f"{np.shape(ids)}; they must be [B, L], padded with -1, or Ragged or Sparse"
        )
    return _cut(bags, length, num_samples, shape)


def _from_array(feature: Feature, num_rows: int, ids: Any, weights: Any) -> _Bags:
    shape = _integers(feature, "ids", ids)
    if not shape:
        raise ValueError(
            f"ids of feature {feature.name!r} are a scalar; they must be [B], or "
            "[..., L] padded with -1"
        )
    *samples, places = shape if len(shape) > 1 else (*shape, 1)
    return _Bags(
        ids=indices_or(ids, num_rows, fill=-1),
        samples=None,
        columns=None,
        weights=None if weights is None else _numbers(feature, weights, shape),
        places=places,
        ascending=True,
        shape=tuple(samples),
    )


def _from_ragged(
    feature: Feature, num_rows: int, ids: Ragged, weights: Ragged | None
) -> _Bags:
    shape = _integers(feature, "ids.values", ids.values)
    splits_shape = _integers(feature, "ids.row_splits", ids.row_splits)
    if len(shape) != 1 or len(splits_shape) != 1 or splits_shape[0] < 1:
        raise ValueError(
            f"ids of feature {feature.name!r} have values of shape {shape} and "
            f"row_splits of shape {splits_shape}; they must be (N,) and (B + 1,), a "
            "ragged array of rank 2"
        )
    if weights is not None and np.shape(weights.row_splits) != splits_shape:
        raise ValueError(
            f"weights of feature {feature.name!r} have row_splits of shape "
            f"{np.shape(weights.row_splits)}; they must be those of its ids, of shape "
            f"{splits_shape}"
        )
    check_splits(f"ids of feature {feature.name!r}", ids, weights)
    num_samples = splits_shape[0] - 1
    splits = indices_or(ids.row_splits, 2**31 - 1, fill=2**31 - 1)
    samples, columns = _rows_of_places(splits, shape[0])
    inside = (samples >= 0) & (samples < num_samples)
    return _Bags(
        ids=jnp.where(inside, indices_or(ids.values, num_rows, fill=-1), -1),
        samples=jnp.where(inside, samples, num_samples),
        columns=columns,
        weights=None if weights is None else _numbers(feature, weights.values, shape),
        places=0,
        ascending=True,
        shape=(num_samples,),
    )


def _rows_of_places(splits: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Returns which row each of N places is of, and which one of that row it is.

    Args:
        splits: int32 `[S + 1]`.
        size: N.
    """
    place = lax.iota(jnp.int32, size)
    if jax.export.is_symbolic_dim(size):  # JAX has no running sums along it
        # Before a place, when sorted, stand as many places as its own number, and the
        # splits up to it.
        end = splits.shape[0]
        keys = jnp.concatenate([splits, place])
        order = lax.iota(jnp.int32, keys.shape[0])
        _, _, came_from = lax.sort((keys, order >= end, order), num_keys=2)
        went_to = jnp.zeros_like(order).at[came_from].set(order)
        rows = went_to[end:] - place - 1
        return rows, place - splits[rows]
    # Where rows begin is counted at S + 1 places; sums of that replace N searches.
    begins = jnp.zeros((size,), jnp.int32).at[splits].add(1, mode="drop")
    rows = lax.cumsum(begins) - 1
    return rows, place - lax.cummax(jnp.where(begins > 0, place, 0))


def _from_sparse(
    feature: Feature, num_rows: int, ids: Sparse, weights: Sparse | None
) -> _Bags:
    shape = _integers(feature, "ids.values", ids.values)
    indices_shape = _integers(feature, "ids.indices", ids.indices)
    dense_shape = ids.dense_shape
    rank = len(dense_shape)
    if rank < 2 or len(shape) != 1 or indices_shape != (*shape, rank):
        raise ValueError(
            f"ids of feature {feature.name!r} have values of shape {shape}, indices of "
            f"shape {indices_shape} and {dense_shape=}; they must be (N,), (N, R) and "
            "R sizes, R >= 2"
        )
    if weights is not None and weights.dense_shape != dense_shape:
        raise ValueError(
            f"weights of feature {feature.name!r} have the dense_shape="
            f"{weights.dense_shape}; it must be that of its ids, {dense_shape}"
        )
    indices = (
        ids.indices if isinstance(ids.indices, jax.Array) else np.array(ids.indices)
    )
    *place, columns = (
        indices_or(indices[:, i], size, fill=-1) for i, size in enumerate(dense_shape)
    )
    samples, inside = jnp.zeros_like(columns), columns >= 0
    for index, size in zip(place, dense_shape, strict=False):
        samples = samples * size + index
        inside &= index >= 0
    num_samples = math.prod(dense_shape[:-1])
    return _Bags(
        ids=jnp.where(inside, indices_or(ids.values, num_rows, fill=-1), -1),
        samples=jnp.where(inside, samples, num_samples),
        columns=columns,
        weights=None if weights is None else _numbers(feature, weights.values, shape),
        places=0,
        ascending=False,
        shape=dense_shape[:-1],
    )


def _activations_shape(
    feature: Feature, samples: tuple[int, ...]
) -> tuple[int | None, tuple[int, ...]]:
    """Returns the length of sequences, or None to combine; and the shape without D."""
    config, num_samples = feature.config, math.prod(samples)
    if config.output_shape is None:
        if config.max_sequence_length:
            return config.max_sequence_length, (*samples, config.max_sequence_length)
        return None, samples
    shape = tuple(config.output_shape)
    if num_samples < 1 or math.prod(shape) % num_samples:
        raise ValueError(
            f"output_shape={shape} of feature {feature.name!r} holds "
            f"{math.prod(shape)} rows, but its ids are {num_samples} samples: it must "
            "hold as many, or a multiple, for sequences"
        )
    length = math.prod(shape) // num_samples
    return None if length == 1 else length, shape


def _cut(
    bags: _Bags, length: int, num_samples: int, shape: tuple[int, ...]
) -> Occurrences:
    """Makes each of the first `length` columns of a sample a sample of its own."""
    ids, samples, places = bags.ids, None, 1
    if bags.samples is None:
        ids = ids.reshape(num_samples, bags.places)[:, :length]
        missing = length - ids.shape[1]
        ids = jnp.pad(ids, ((0, 0), (0, missing)), constant_values=-1).reshape(-1)
    else:
        assert bags.columns is not None
        keep = (ids >= 0) & (bags.columns < length)
        samples = bags.samples * length + bags.columns
        samples = jnp.where(keep, samples, num_samples * length)
        ids, places = jnp.where(keep, ids, -1), 0
    return Occurrences(
        ids,
        samples,
        None,
        num_samples * length,
        places,
        ascending=False,
        shape=shape,
        is_sequence=True,
    )


def _of_arrays(name: str, values: Any) -> Any:
    """Returns ids or weights with all in arrays, and a `BCOO` taken apart."""
    if values is None:
        return None
    if isinstance(values, Ragged):
        return Ragged(
            as_array(f"{name}: values", values.values),
            as_array(f"{name}: row_splits", values.row_splits),
        )
    if isinstance(values, Sparse):
        return Sparse(
            as_array(f"{name}: indices", values.indices),
            as_array(f"{name}: values", values.values),
            values.dense_shape,
        )
    if not is_bcoo(values):
        return as_array(name, values)
    n_batch, n_dense = values.n_batch, values.n_dense
    if n_batch or n_dense:
        raise ValueError(
            f"a BCOO with {n_batch=} and {n_dense=} must have neither: pass "
            "bcoo.update_layout(n_batch=0, n_dense=0)"
        )
    return Sparse(values.indices, values.data, values.shape)


def _form(values: Any) -> str:
    return {Ragged: "Ragged", Sparse: "Sparse"}.get(type(values), "an array")


def _integers(feature: Feature, name: str, values: Any) -> tuple[int, ...]:
    return integers(f"{name} of feature {feature.name!r}", values)


def _numbers(feature: Feature, weights: Any, shape: tuple[int, ...]) -> jax.Array:
    """Checks weights against the shape of their ids, and flattens them to float32."""
    dtype = jnp.result_type(weights)
    if not jnp.issubdtype(dtype, jnp.floating) and not jnp.issubdtype(
        dtype, jnp.integer
    ):
        raise TypeError(
            f"weights of feature {feature.name!r} have {dtype=}; they must be real "
            "numbers"
        )
    if np.shape(weights) != shape:
        raise ValueError(
            f"weights of feature {feature.name!r} have the shape {np.shape(weights)}; "
            f"they must have that of its ids, {shape}"
        )
    return jnp.asarray(weights, jnp.float32).reshape(-1)
