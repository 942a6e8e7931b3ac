"""Looking up rows on a CPU, and combining those of a sample, in one pass in C++.

Why: XLA's gather writes every row that a batch names, and its sum reads them all again.
This kernel adds a sample's rows where they arrive and writes one row a sample, while
the rows of the ids ahead are being fetched.

Order: the rows of a sample are added in float32 in the order of its ids. So the same
call gives the same bits, on any number of threads and with any instruction set.

Safety: every id and every sample is checked in C++. One that is outside is ignored,
whatever its gain.

Neither function can be differentiated. The ops that call them, `ops/lookup.py` and
`ops/combine.py`, have rules of their own, which gather by XLA.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sparse_adam.kernels.cpu import library
from sparse_adam.kernels.cpu.places import weights_places
from sparse_adam.kernels.layout import Layout, PlainLayout

_DTYPES = (np.dtype(np.float32), np.dtype(jnp.bfloat16))  # of plain tables


def unsupported(layout: Layout) -> str | None:
    """Says why rows cannot be looked up in C++, or returns None when they can."""
    if layout.dtypes[0] not in _DTYPES:
        return f"weights of {layout.dtypes[0].name} are neither float32 nor bfloat16"
    return library.missing()


def bytes_moved(num_ids: int, num_samples: int, dim: int) -> int:
    """Returns the least bytes of a float32 lookup: rows in, combined rows out, ids."""
    return 4 * (num_ids * dim + num_samples * dim + num_ids)


def lookup_rows(
    stored: jax.Array,
    ids: jax.Array,
    *,
    layout: Layout | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Returns the rows of a table, `[N, D]`: its weights bit for bit.

    Args:
        stored: the table, `[V, D]` in float32 or bfloat16; or its packed lines.
        ids: int32 `[N]`; one outside `[0, V)` gives zeros.
        layout: of the table; None: it is plain.
        dtype: of the result: the table's, which is the default, or float32.

    Raises:
        TypeError: `ids` are not int32, or `dtype` is neither of the two.
        ValueError: an array has a shape that does not fit, or there is no library.
    """
    layout = _checked(stored, layout)
    _check("ids", ids, jnp.int32, (ids.size,))
    result = _result(ids.size, layout, dtype)
    return _call(library.LOOKUP, result, layout)(stored, ids)


def combine_rows(
    stored: jax.Array,
    ids: jax.Array,
    *,
    num_samples: int,
    samples: jax.Array | None = None,
    gains: jax.Array | None = None,
    scales: jax.Array | None = None,
    layout: Layout | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Returns the combined row of each sample, `[S, D]`.

    Row s is `scales[s] * sum(gains[i] * table[ids[i]])` over the ids of sample s, added
    in float32 in the order of the ids and rounded once. An id outside `[0, V)` is left
    out, whatever its gain; a sample without any other is zeros, whatever its scale.

    Args:
        stored: the table, `[V, D]` in float32 or bfloat16; or its packed lines.
        ids: int32 `[N]`.
        num_samples: S.
        samples: int32 `[N]`, the sample of each id; an id of one outside `[0, S)` is
            left out. They may have any order, and are fastest where they ascend and
            those outside stand at the end as S. None: N is a multiple of S, and
            each sample has as many ids, one behind the other.
        gains: float32 `[N]`, the factor of each id's row; None: 1.
        scales: float32 `[S]`, the factor of each sample's sum; None: 1.
        layout: of the table; None: it is plain.
        dtype: of the result: the table's, which is the default, or float32.

    Raises:
        TypeError: an array has another dtype, or `dtype` is neither of the two.
        ValueError: an array has a shape that does not fit, or there is no library.
    """
    layout = _checked(stored, layout)
    num_ids = ids.size
    _check("ids", ids, jnp.int32, (num_ids,))
    if samples is None:
        if num_ids % num_samples if num_samples else num_ids:
            raise ValueError(
                f"ids.size={num_ids} must be a multiple of {num_samples=}: pass "
                "samples=, the sample of each id, where samples differ in length"
            )
        samples = jnp.zeros((0,), jnp.int32)
    else:
        _check("samples", samples, jnp.int32, (num_ids,))
    if gains is None:
        gains = jnp.zeros((0,), jnp.float32)
    else:
        _check("gains", gains, jnp.float32, (num_ids,))
    if scales is None:
        scales = jnp.zeros((0,), jnp.float32)
    else:
        _check("scales", scales, jnp.float32, (num_samples,))
    result = _result(num_samples, layout, dtype)
    return _call(library.COMBINE, result, layout)(stored, ids, samples, gains, scales)


def _check(name: str, x: jax.Array, dtype: DTypeLike, shape: tuple[int, ...]) -> None:
    if x.dtype != dtype:
        raise TypeError(f"{name}.dtype={x.dtype} must be {jnp.dtype(dtype).name}")
    if x.shape != shape:
        raise ValueError(f"{name}.shape={x.shape} must be {shape}")


def _checked(stored: jax.Array, layout: Layout | None) -> Layout:
    """Returns the layout of a table, which is that of a plain one if there is none."""
    if layout is not None:
        first = layout.shapes[0]
        _check("stored", stored, first.dtype, first.shape)
        return layout
    if stored.ndim != 2:
        raise ValueError(f"stored.shape={stored.shape} must be [V, D], or pass layout=")
    if stored.dtype not in _DTYPES:
        raise TypeError(f"stored.dtype={stored.dtype} must be float32 or bfloat16")
    return PlainLayout.of_weights(stored)


def _result(
    num_rows: int, layout: Layout, dtype: DTypeLike | None
) -> jax.ShapeDtypeStruct:
    own = layout.dtypes[0]
    wanted = own if dtype is None else jnp.dtype(dtype)
    if wanted not in (own, np.dtype(np.float32)):
        raise TypeError(
            f"dtype={wanted.name} must be float32 or {own.name}, the table's"
        )
    return jax.ShapeDtypeStruct((num_rows, layout.dim), wanted)


def _call(target: str, result: jax.ShapeDtypeStruct, layout: Layout) -> Any:
    objection = unsupported(layout)
    if objection is not None:
        raise ValueError(f"the lookup in C++ is not available: {objection}")
    call = jax.ffi.ffi_call(target, result, vmap_method="sequential")
    return functools.partial(call, **weights_places(layout))
