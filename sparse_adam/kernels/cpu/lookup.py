"""Looking up rows on a CPU, and combining those of a sample, in one pass in C++.

Why: XLA's gather writes every row that a batch names, and its sum reads them all again.
This kernel adds a sample's rows where they arrive and writes one row a sample, while
the rows of the ids ahead are being fetched.

Order: the rows of a sample are added in float32 in the order of its ids. So the same
call gives the same bits, on any number of threads and with any instruction set.

Safety: every id and every sample is checked in C++. One that is outside is ignored,
whatever its gain.

Neither function can be differentiated: an embedding's gradient belongs to its
activations, and the update takes it from there.
"""

import ctypes
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sparse_adam.kernels.cpu.update import ENCODINGS, LIBRARY
from sparse_adam.kernels.layout import PackedLayout
from sparse_adam.kernels.tiles import LANES

_LOOKUP = "sparse_adam_cpu_lookup"
_COMBINE = "sparse_adam_cpu_combine"


@functools.cache
def unsupported() -> str | None:
    """Loads the library and registers its lookup, or says why that cannot be done."""
    if not LIBRARY.exists():
        return (
            "its C++ library was not built when this package was installed: that needs "
            "a C++17 compiler"
        )
    try:
        library = ctypes.CDLL(str(LIBRARY))
        for name in (_LOOKUP, _COMBINE):
            capsule = jax.ffi.pycapsule(getattr(library, name))
            jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    except Exception as error:  # of the linker, or of another version of XLA
        return f"its C++ library does not load: {error}"
    return None


def bytes_moved(num_ids: int, num_samples: int, dim: int) -> int:
    """Returns the least bytes of a float32 lookup: rows in, combined rows out, ids."""
    return 4 * (num_ids * dim + num_samples * dim + num_ids)


def lookup_rows(
    stored: jax.Array,
    ids: jax.Array,
    *,
    layout: PackedLayout | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Returns the rows of a table, `[N, D]`: its weights bit for bit.

    Args:
        stored: the table, `[V, D]` in float32 or bfloat16; or its packed lines.
        ids: int32 `[N]`; one outside `[0, V)` gives zeros.
        layout: of the packed lines; None: the table is plain.
        dtype: of the result: the table's, which is the default, or float32.

    Raises:
        TypeError: `ids` are not int32, or `dtype` is neither of the two.
        ValueError: an array has a shape that does not fit.
    """
    places, dim, out_dtype = _told(stored, layout, dtype)
    _check("ids", ids, jnp.int32, (ids.size,))
    result = jax.ShapeDtypeStruct((ids.size, dim), out_dtype)
    return _call(_LOOKUP, result)(stored, ids, **places)


def combine_rows(
    stored: jax.Array,
    ids: jax.Array,
    *,
    num_samples: int,
    samples: jax.Array | None = None,
    gains: jax.Array | None = None,
    scales: jax.Array | None = None,
    layout: PackedLayout | None = None,
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
        layout: of the packed lines; None: the table is plain.
        dtype: of the result: the table's, which is the default, or float32.

    Raises:
        TypeError: an array has another dtype, or `dtype` is neither of the two.
        ValueError: an array has a shape that does not fit.
    """
    places, dim, out_dtype = _told(stored, layout, dtype)
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
    operands = (stored, ids, samples, gains, scales)
    result = jax.ShapeDtypeStruct((num_samples, dim), out_dtype)
    return _call(_COMBINE, result)(*operands, **places)


def _check(name: str, x: jax.Array, dtype: DTypeLike, shape: tuple[int, ...]) -> None:
    if x.dtype != dtype:
        raise TypeError(f"{name}.dtype={x.dtype} must be {jnp.dtype(dtype).name}")
    if x.shape != shape:
        raise ValueError(f"{name}.shape={x.shape} must be {shape}")


def _call(target: str, result: jax.ShapeDtypeStruct) -> Any:
    objection = unsupported()
    if objection is not None:
        raise ValueError(f"the lookup in C++ is not available: {objection}")
    return jax.ffi.ffi_call(target, result, vmap_method="sequential")


def _told(
    stored: jax.Array, layout: PackedLayout | None, dtype: DTypeLike | None
) -> tuple[dict[str, np.int32], int, np.dtype]:
    """Returns where the weights stand, as C++ is told; D; the dtype of the result."""
    if layout is None:
        places, dim, table_dtype = _plain(stored)
    else:
        places, dim, table_dtype = _packed(stored, layout)
    result = table_dtype if dtype is None else jnp.dtype(dtype)
    if result not in (table_dtype, np.dtype(np.float32)):
        raise TypeError(
            f"dtype={result.name} must be float32 or {table_dtype.name}, the table's"
        )
    return {name: np.int32(place) for name, place in places.items()}, dim, result


def _plain(table: jax.Array) -> tuple[dict[str, int], int, np.dtype]:
    if table.ndim != 2:
        raise ValueError(f"stored.shape={table.shape} must be [V, D], or pass layout=")
    if table.dtype not in (jnp.float32, jnp.bfloat16):
        raise TypeError(f"stored.dtype={table.dtype} must be float32 or bfloat16")
    num_rows, dim = table.shape
    places = {
        "num_rows": num_rows,
        "first": 0,
        "encoding": ENCODINGS.index(table.dtype.name),
        "rows_per_group": num_rows,
        "stride": dim,
        "group_stride": 0,
    }
    return places, dim, np.dtype(table.dtype)


def _packed(
    lines: jax.Array, layout: PackedLayout
) -> tuple[dict[str, int], int, np.dtype]:
    _check("stored", lines, jnp.int32, (lines.shape[0], LANES))
    plane = next(p for p, arrays in enumerate(layout.planes) if 0 in arrays)
    arrays, dtype = layout.planes[plane], np.dtype(layout.dtypes[0])
    encoding = "float32"
    if dtype != np.float32:
        halves = ("low_half", "high_half") if len(arrays) == 2 else ("widened",)
        encoding = halves[arrays.index(0)]
    places = {
        "num_rows": layout.num_rows,
        "first": layout.line(plane, 0) * LANES,
        "encoding": ENCODINGS.index(encoding),
        "rows_per_group": layout.rows_per_group,
        "stride": layout.stride,
        "group_stride": layout.lines_per_group * LANES,
    }
    return places, layout.dim, dtype
