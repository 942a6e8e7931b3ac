"""What is asked of ids on the host, before they reach compiled code."""

from typing import Any

import jax
import numpy as np

from sparse_adam.embedding.inputs import Ragged, Sparse, check_splits, is_bcoo


def is_input(value: Any) -> bool:
    """Tells whether a pytree of arrays is the ids or weights of one feature."""
    return isinstance(value, Ragged | Sparse) or is_bcoo(value)


def num_samples(ids: Any) -> int:
    """Returns how many samples a feature's ids, in any form, are of."""
    if isinstance(ids, Ragged):
        return np.shape(ids.row_splits)[0] - 1
    shape = ids.dense_shape if isinstance(ids, Sparse) else np.shape(ids)
    return int(np.prod(shape[:-1])) if len(shape) > 1 else int(np.prod(shape))


def ready_for_jit(name: str, ids: Any, weights: Any = None) -> Any:
    """Checks what compiled code can not see of ids, and makes them 32-bit.

    `jit` would let 64-bit NumPy integers wrap around. What does not fit becomes -1: no
    id, no place.

    Args:
        name: of the ids, for messages.
        ids: in any form.
        weights: those of the ids, or None.

    Raises:
        ValueError: row splits that are none, or weights with other ones.
    """
    if isinstance(ids, Ragged):
        check_splits(name, ids, weights)
    if isinstance(ids, Ragged | Sparse):
        return jax.tree.map(_in_32_bits, ids)
    return _in_32_bits(ids)


def _in_32_bits(ids: Any) -> Any:
    if isinstance(ids, jax.Array) or is_bcoo(ids):
        return ids
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu" or ids.dtype.itemsize < 4:
        return ids
    fits = (ids >= 0) & (ids < 2**31)
    return np.where(fits, ids, -1).astype(np.int32)
