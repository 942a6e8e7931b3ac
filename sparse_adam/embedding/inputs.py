"""The forms that ids come in.

dense    `[B]` or `[..., 1]`: one id a sample, always of weight 1
padded   `[..., L]`, L > 1: up to L ids a sample; one outside the table is no id
ragged   `Ragged(values, row_splits)`
sparse   `Sparse(indices, values, dense_shape)`, or a `BCOO` array of ids

Shapes are static in all of them, values are not: ragged ids may be followed by places
that no row owns, sparse ones by places whose index is outside `dense_shape`.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from sparse_adam.ops.integers import to_array
from sparse_adam.ops.plan import indices_or


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "row_splits"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Ragged:
    """Rows of different lengths, one behind the other: ids, or their weights.

    Attributes:
        values: `[N]`; row i is `values[row_splits[i]:row_splits[i + 1]]`. Values behind
            `row_splits[-1]` belong to no row, and fill up to a static N.
        row_splits: `[B + 1]`, ascending from 0 to at most N. Lookups and updates check
            that, and that weights have the splits of their ids, where they see values.
            Inside `jax.jit` they see none: there it is the caller's duty.

    `jax.tree.map` knows nothing of rows: to join batches, call `concatenate`.

    Examples:
        >>> Ragged.from_rows([[7], [], [1, 2]])
        Ragged(values=array([7, 1, 2]), row_splits=array([0, 1, 1, 3]))
    """

    values: ArrayLike
    row_splits: ArrayLike

    @classmethod
    def from_rows(
        cls, rows: Sequence[Sequence[int | float]], size: int | None = None
    ) -> "Ragged":
        """Returns `rows` as NumPy arrays, filled with zeros to `size` values.

        Raises:
            ValueError: there are more values than `size`.
        """
        splits = np.cumsum([0, *map(len, rows)])
        values = np.concatenate([np.zeros(0, int), *map(np.asarray, rows)])
        if all(isinstance(value, int | np.integer) for row in rows for value in row):
            values = values.astype(int)
        size = len(values) if size is None else size
        if len(values) > size:
            raise ValueError(f"{size=} must be at least {len(values)}, all the values")
        return cls(np.pad(values, (0, size - len(values))), splits)

    @classmethod
    def concatenate(cls, parts: Sequence["Ragged"]) -> "Ragged":
        """Returns the rows of all parts, those of the first one first.

        There are as many values as in all parts; what belonged to no row stands at the
        end. NumPy arrays stay NumPy arrays; with an array of JAX among them, traced or
        not, the result is of JAX.

        Raises:
            TypeError: a part is not a `Ragged`.
            ValueError: there are no parts, or splits that are no splits.

        Examples:
            >>> Ragged.concatenate([Ragged.from_rows([[7], [1, 2]], size=4),
            ...                     Ragged.from_rows([[5]])])
            Ragged(values=array([7, 1, 2, 5, 0]), row_splits=array([0, 1, 3, 4]))
        """
        if not parts:
            raise ValueError("concatenate() got no parts: pass at least one Ragged")
        for number, part in enumerate(parts):
            if not isinstance(part, Ragged):
                raise TypeError(
                    f"parts[{number}] is {type(part).__name__}; it must be a Ragged"
                )
            check_splits(f"parts[{number}]", part)
        on_host = not any(isinstance(x, jax.Array) for x in jax.tree.leaves(parts))
        xp: Any = np if on_host else jnp
        values = [_kept(xp, part.values) for part in parts]
        splits = [_kept(xp, part.row_splits) for part in parts]
        # Splits can not skip the spare values within, so these go behind all rows.
        spare = [
            xp.arange(own.shape[0]) >= ends[-1]
            for own, ends in zip(values, splits, strict=True)
        ]
        order = xp.argsort(xp.concatenate(spare), stable=True)
        rows_end = splits[0][:1]
        ends = [rows_end]
        for own in splits:
            ends.append(own[1:] + rows_end)
            rows_end = own[-1:] + rows_end
        return cls(xp.concatenate(values)[order], xp.concatenate(ends))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("indices", "values"),
    meta_fields=("dense_shape",),
)
@dataclasses.dataclass(frozen=True)
class Sparse:
    """Coordinates and values: ids, or their weights.

    Attributes:
        indices: `[N, R]`, R >= 2: where each value stands. The last index is the place
            in the sample, the others tell the sample. An index outside `dense_shape`
            makes the value padding.
        values: `[N]`.
        dense_shape: R ints, static.

    Examples:
        >>> import numpy as np
        >>> sparse = Sparse(np.array([[0, 0], [2, 0], [2, 1]]), np.array([7, 1, 2]),
        ...                 dense_shape=(3, 2))
        >>> sparse.dense_shape
        (3, 2)
    """

    indices: ArrayLike
    values: ArrayLike
    dense_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "dense_shape", tuple(self.dense_shape))


def check_splits(name: str, ragged: Ragged, weights: Any = None) -> None:
    """Checks row splits where their values are known: not while tracing.

    Args:
        name: of the ids, for messages.
        ragged: the ids.
        weights: those of the ids, which must have the same splits; or None.

    Raises:
        ValueError: they do not ascend from 0 to at most the number of values, or the
            weights have other ones.
    """
    splits = _on_host(ragged.row_splits)
    if splits is None or splits.ndim != 1 or splits.size < 1:
        return
    size = math.prod(np.shape(ragged.values))
    if splits[0] != 0 or splits[-1] > size or np.any(splits[1:] < splits[:-1]):
        raise ValueError(
            f"{name} have row_splits={_shown(splits)} of {size} values; they must "
            f"ascend from 0 to at most {size}: row i is values[row_splits[i]:"
            "row_splits[i + 1]]. Of the rows' lengths pass np.cumsum([0, *lengths])"
        )
    if not isinstance(weights, Ragged) or weights.row_splits is ragged.row_splits:
        return
    own = _on_host(weights.row_splits)
    if own is not None and not np.array_equal(own, splits):
        raise ValueError(
            f"the weights of {name} have row_splits={_shown(own)}; they must be those "
            f"of the ids, {_shown(splits)}"
        )


def _on_host(array: Any) -> np.ndarray | None:
    """Returns the values of an array; None where they are not to be had."""
    if isinstance(array, jax.core.Tracer):
        return None
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return None
    return np.asarray(array)


def _shown(array: np.ndarray) -> str:
    return np.array2string(array, threshold=8, edgeitems=3, separator=", ")


def _kept(xp: Any, array: Any) -> Any:
    """Returns an array of `xp`; 64-bit integers that 32 bits can not hold become -1."""
    if xp is jnp and not isinstance(array, jax.Array):
        array = np.asarray(array)
        if array.dtype.kind in "iu":
            return indices_or(array, 2**31, fill=-1)
    return xp.asarray(array)


def as_array(name: str, values: Any) -> jax.Array | np.ndarray:
    """Returns an array of JAX or NumPy: `values`, or what other libraries have in it.

    Raises:
        TypeError: it is no array, and can not be one.
        ValueError: it has rows of different lengths.
    """
    if not isinstance(values, jax.Array | np.ndarray):
        by_dlpack = hasattr(values, "__dlpack__") and not hasattr(values, "__array__")
        try:
            values = np.from_dlpack(values) if by_dlpack else np.asarray(values)
        except ValueError as error:
            raise ValueError(
                f"{name} are a {type(values).__name__} that makes no array, as rows of "
                "different lengths do: pass Ragged.from_rows(rows), or fill the rows "
                f"up with -1 ({error})"
            ) from error
        except (TypeError, RuntimeError):  # as of torch's bfloat16, or on a GPU
            values = to_array(name, values)
    if values.dtype == object:
        raise TypeError(
            f"{name} have dtype=object; they must be an array of numbers, a Ragged, a "
            "Sparse or a BCOO. Of rows of different lengths pass "
            "Ragged.from_rows(rows), of another library's tensors to_inputs(features)"
        )
    return values


def is_bcoo(values: Any) -> bool:
    """Tells a `BCOO`, which there is none of before its module was imported.

    Not imported here, where it would take a sixth of the time of all imports.
    """
    module = sys.modules.get("jax.experimental.sparse")
    return module is not None and isinstance(values, module.BCOO)
