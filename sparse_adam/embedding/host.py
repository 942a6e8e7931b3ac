"""What is asked of ids on the host, before they reach compiled code."""

from typing import Any

import jax
import numpy as np

from sparse_adam.embedding.inputs import Ragged, Sparse, is_bcoo


def is_input(value: Any) -> bool:
    """Tells whether a pytree of arrays is the ids or weights of one feature."""
    return isinstance(value, Ragged | Sparse) or is_bcoo(value)


def num_samples(ids: Any) -> int:
    """Returns how many samples a feature's ids, in any form, are of."""
    if isinstance(ids, Ragged):
        return np.shape(ids.row_splits)[0] - 1
    shape = ids.dense_shape if isinstance(ids, Sparse) else np.shape(ids)
    return int(np.prod(shape[:-1])) if len(shape) > 1 else int(np.prod(shape))


def ready_for_jit(ids: Any) -> Any:
    """Makes 64-bit NumPy integers 32-bit, where `jit` would let them wrap around.

    What does not fit becomes -1: no id, no place.
    """
    if isinstance(ids, Ragged | Sparse):
        return jax.tree.map(ready_for_jit, ids)
    if isinstance(ids, jax.Array) or is_bcoo(ids):
        return ids
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu" or ids.dtype.itemsize < 4:
        return ids
    fits = (ids >= 0) & (ids < 2**31)
    return np.where(fits, ids, -1).astype(np.int32)
