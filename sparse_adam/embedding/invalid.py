"""Refusing ids that are of no row: a check that whoever wants it pays for."""

import math
from typing import Any, Literal, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from sparse_adam.embedding.inputs import Ragged, Sparse, as_array, is_bcoo
from sparse_adam.embedding.state import EmbeddingState
from sparse_adam.embedding.tables import EmbeddingLayout, Feature
from sparse_adam.ops.integers import integers
from sparse_adam.ops.spread import everywhere

OnInvalidIds: TypeAlias = Literal["ignore", "error"]


def check_ids(state: EmbeddingState | EmbeddingLayout, features: Any) -> None:
    """Refuses a batch with an id that is neither a row of its table nor -1.

    Ids on the host, NumPy's for instance, are looked at right here. Traced ones are by
    `jax.experimental.checkify`: wrap the jitted function in `checkify.checkify`, and
    call `throw()` of the error that it returns. Ids that no sample owns are not looked
    at.

    Args:
        state: whose tables they are of, or its layout.
        features: ids, as in `lookup`.

    Raises:
        TypeError: ids are not integers.
        ValueError: an id is invalid; or another structure than the configuration's.

    Examples:
        >>> import jax, numpy as np
        >>> from sparse_adam.embedding import Adam, FeatureConfig, TableConfig, init
        >>> config = {"user": FeatureConfig(TableConfig(4, 2, name="users"))}
        >>> state = init(config, Adam(), jax.random.key(0))
        >>> check_ids(state, {"user": np.array([[3, -1], [7, 2]])})
        Traceback (most recent call last):
        ...
        ValueError: feature 'user' has the id 7 at [1, 0]; it must be in [0, 4), the \
rows of table 'users', or -1 for none

        The same of traced ids:

        >>> from jax.experimental import checkify
        >>> checked = jax.jit(checkify.checkify(lambda ids: check_ids(state, ids)))
        >>> error, _ = checked({"user": np.array([3, 4], np.int32)})
        >>> print(error.get())  # doctest: +ELLIPSIS
        feature 'user' has the id 4 at [1]; it must be in [0, 4), ...
    """
    layout = state if isinstance(state, EmbeddingLayout) else state.layout
    leaves = layout.leaves("features", features)
    for feature, ids in zip(layout.features, leaves, strict=True):
        _check(feature, layout.tables[feature.table].name, ids)


def check_if_asked(
    layout: EmbeddingLayout, features: Any, on_invalid_ids: OnInvalidIds
) -> None:
    """Does what the argument `on_invalid_ids` says.

    Raises:
        ValueError: an id is invalid, or the argument is.
    """
    if check_argument(on_invalid_ids) == "error":
        check_ids(layout, features)


def check_argument(on_invalid_ids: OnInvalidIds) -> OnInvalidIds:
    """Returns the argument, which must be "ignore" or "error".

    Raises:
        ValueError: it is something else.
    """
    if on_invalid_ids == "count":
        raise ValueError(
            "on_invalid_ids='count' would need a result to count in: pass 'ignore', "
            "and return batch_stats(state, features) from the step, whose `ignored` "
            "are the counts by table; a TPUEmbedding's state is embedding.state"
        )
    if on_invalid_ids not in ("ignore", "error"):
        raise ValueError(f"{on_invalid_ids=} must be 'ignore' or 'error'")
    return on_invalid_ids


def _check(feature: Feature, table: str, ids: Any) -> None:
    """Checks the ids of one feature: now, or by `checkify` where they are traced."""
    num_rows = feature.config.table.vocabulary_size
    values, owned = _values(f"ids of feature {feature.name!r}", ids)
    bad = owned & _outside(values, num_rows)
    rule = f"it must be in [0, {num_rows}), the rows of table {table!r}, or -1 for none"
    start = f"feature {feature.name!r} has the id"
    if isinstance(bad, np.ndarray):
        if bad.any():
            first = np.unravel_index(np.argmax(bad), bad.shape)
            place = ", ".join(map(str, first))
            others = int(bad.sum()) - 1
            more = f" ({others} more are not)" if others else ""
            raise ValueError(f"{start} {values[first]} at [{place}]; {rule}{more}")
        return
    # Imported here: few programs need it.
    from jax.experimental import checkify

    if math.prod(bad.shape) == 0:
        return
    first = jnp.unravel_index(jnp.argmax(bad.reshape(-1)), bad.shape)
    numbers: dict[str, Any] = {f"place_{axis}": x for axis, x in enumerate(first)}
    place = ", ".join(f"{{{name}}}" for name in numbers)
    checkify.check(
        ~jnp.any(bad),
        f"{_literal(start)} {{id}} at [{place}]; {_literal(rule)}",
        id=values[first],
        **numbers,
    )


def _values(name: str, ids: Any) -> tuple[Any, Any]:
    """Returns ids as they came, and which of them a sample owns: of JAX or of NumPy."""
    if isinstance(ids, Ragged):
        values, splits = _alike(name, ids.values, ids.row_splits)
        xp = _module(values)
        return values, xp.arange(values.shape[0]) < splits[-1]
    if isinstance(ids, Sparse) or is_bcoo(ids):
        given, shape = (
            (ids.values, ids.dense_shape)
            if isinstance(ids, Sparse)
            else (ids.data, ids.shape)
        )
        values, indices = _alike(name, given, ids.indices)
        sizes = _module(values).asarray(shape, indices.dtype)
        inside = (indices >= 0) & (indices < sizes[None])
        return values, inside.all(1)
    (values,) = _alike(name, ids)
    return values, _module(values).ones(values.shape, bool)


def _alike(name: str, *arrays: Any) -> list[Any]:
    """Returns arrays of NumPy if their values are known here, and of JAX if not."""
    found = [as_array(name, x) for x in arrays]
    for x in found:
        integers(name, x)
    if all(map(_is_known, found)):
        return list(map(np.asarray, found))
    return [everywhere(jnp.asarray(x)) for x in found]


def _is_known(x: Any) -> bool:
    if isinstance(x, jax.core.Tracer):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def _module(x: Any) -> Any:
    return np if isinstance(x, np.ndarray) else jnp


def _outside(values: Any, num_rows: int) -> Any:
    """Returns which ids are neither a row nor -1, asked in their own dtype."""
    largest = min(num_rows - 1, int(np.iinfo(values.dtype).max))
    outside = values > largest
    if values.dtype.kind == "i":
        outside |= values < -1
    return outside


def _literal(text: str) -> str:
    """Returns text in which no brace is a place to fill in."""
    return text.replace("{", "{{").replace("}", "}}")
