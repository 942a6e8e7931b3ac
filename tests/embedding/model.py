"""TensorFlow's semantics once more, in NumPy and plain loops, for the tests only.

Nothing here is shared with the package or its reference: a feature is a list of rows
of ids, a table three float64 arrays, an update a loop over rows.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO

from sparse_adam.embedding import Ragged, Sparse
from tests.cases import State

# A row of a feature: pairs of an id and its weight.
Pairs: TypeAlias = list[tuple[int, float]]


@dataclasses.dataclass
class Rows:
    """The ids of a feature, one list a sample, and their weights."""

    ids: list[list[int]]
    weights: list[list[float]] | None = None

    def with_weights(self) -> list[Pairs]:
        weights = self.weights or [[1.0] * len(row) for row in self.ids]
        return [
            list(zip(*pair, strict=True))
            for pair in zip(self.ids, weights, strict=True)
        ]


def factor(weights: Sequence[float], combiner: str) -> float:
    if combiner == "sum":
        return 1.0
    total = sum(weights) if combiner == "mean" else np.sqrt(sum(w * w for w in weights))
    return 1.0 / total if total else 0.0


def lookup(table: Any, rows: Rows, combiner: str, length: int = 0) -> np.ndarray:
    """Activations `[B, D]`, or `[B, length, D]` of a sequence."""
    table = np.asarray(table, np.float64)
    if length:
        out = np.zeros((len(rows.ids), length, table.shape[1]))
        for b, ids in enumerate(rows.ids):
            for k, i in enumerate(ids[:length]):
                out[b, k] = table[i] if 0 <= i < len(table) else 0
        return out
    out = np.zeros((len(rows.ids), table.shape[1]))
    for b, pairs in enumerate(rows.with_weights()):
        pairs = [(i, w) for i, w in pairs if 0 <= i < len(table)]
        scale = factor([w for _, w in pairs], combiner)
        for i, w in pairs:
            out[b] += scale * w * table[i]
    return out


def row_gradients(
    num_rows: int, dim: int, features: Iterable[tuple[Rows, Any, str, int]]
) -> dict[int, np.ndarray]:
    """{row: gradient} of the rows that `(rows, gradient, combiner, length)` touch."""
    touched: dict[int, np.ndarray] = {}

    def add(i: int, gradient: Any) -> None:
        if 0 <= i < num_rows:
            touched[i] = touched.get(i, np.zeros(dim)) + gradient

    for rows, gradient, combiner, length in features:
        for b, pairs in enumerate(rows.with_weights()):
            if length:
                for k, (i, _) in enumerate(pairs[:length]):
                    add(i, 0 if gradient is None else gradient[b, k])
                continue
            pairs = [(i, w) for i, w in pairs if 0 <= i < num_rows]
            scale = factor([w for _, w in pairs], combiner)
            for i, w in pairs:
                add(i, 0 if gradient is None else scale * w * gradient[b])
    return touched


def adam(
    state: Any,
    touched: dict[int, np.ndarray],
    rate: float,
    lazy: bool = True,
    inside: bool = True,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
) -> State:
    """One update of `(table, momenta, velocities)`, in float64."""
    w, m, v = (np.array(x, np.float64) for x in state)
    epsilon = 1e-7
    one_minus_1, one_minus_2 = (
        float(np.float32(1) - np.float32(b)) for b in (beta_1, beta_2)
    )
    for i in range(len(w)) if not lazy else touched:
        g = touched.get(i, np.zeros(w.shape[1]))
        m[i] = float(np.float32(beta_1)) * m[i] + one_minus_1 * g
        v[i] = float(np.float32(beta_2)) * v[i] + one_minus_2 * g * g
        root = np.sqrt(v[i] + epsilon**2) if inside else np.sqrt(v[i]) + epsilon
        w[i] = w[i] - rate * m[i] / root
    return w, m, v


def as_padded(rows: Rows) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids `[B, L]` filled up with -1, and weights with 7, which must not count."""
    length = max(2, *map(len, rows.ids))
    ids = np.full((len(rows.ids), length), -1)
    weights = np.full(ids.shape, 7.0, np.float32)
    for b, pairs in enumerate(rows.with_weights()):
        for k, (i, w) in enumerate(pairs):
            ids[b, k], weights[b, k] = i, w
    return ids, None if rows.weights is None else weights


def as_ragged(rows: Rows, spare: int = 3) -> tuple[Ragged, Ragged | None]:
    """`spare` values behind the last row belong to nobody."""
    size = sum(map(len, rows.ids)) + spare
    ids = Ragged.from_rows(rows.ids, size)
    if rows.weights is None:
        return ids, None
    weights = Ragged.from_rows(rows.weights, size)
    return ids, Ragged(np.asarray(weights.values, np.float32), weights.row_splits)


def as_sparse(rows: Rows) -> tuple[Sparse, Sparse | None]:
    """In a shuffled order, and with one value outside of the shape."""
    places = [(b, k) for b, row in enumerate(rows.ids) for k in range(len(row))]
    places = [places[i] for i in np.random.default_rng(0).permutation(len(places))]
    shape = (len(rows.ids), max(1, *map(len, rows.ids)))
    indices = np.array([*places, shape], np.int64).reshape(-1, 2)
    ids = np.array([*(rows.ids[b][k] for b, k in places), 0])
    out = Sparse(indices, ids, shape)
    if rows.weights is None:
        return out, None
    weights = np.array([*(rows.weights[b][k] for b, k in places), 9], np.float32)
    return out, Sparse(indices, weights, shape)


def as_bcoo(rows: Rows) -> tuple[BCOO, BCOO | None]:
    ids, weights = as_sparse(rows)

    def convert(x: Sparse) -> BCOO:
        indices = jnp.asarray(np.asarray(x.indices, np.int32))
        values = np.asarray(x.values)
        values = values.astype(np.int32 if values.dtype.kind == "i" else np.float32)
        return BCOO((jnp.asarray(values), indices), shape=x.dense_shape)

    return convert(ids), None if weights is None else convert(weights)


FORMS = {
    "padded": as_padded,
    "ragged": as_ragged,
    "sparse": as_sparse,
    "bcoo": as_bcoo,
}
