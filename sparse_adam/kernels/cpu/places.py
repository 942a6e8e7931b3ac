"""Where the rows of a table stand, as the C++ library is told."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparse_adam.kernels.layout import Layout, PackedLayout
from sparse_adam.kernels.tiles import LANES

# As in `loops.h` and `storage.h`.
MOST_ARRAYS = 8
ENCODINGS = ("float32", "bfloat16", "widened", "low_half", "high_half")


def places_of(layout: Layout) -> dict[str, Any]:
    """Returns where the rows of the weights and of each slot begin."""
    if isinstance(layout, PackedLayout):
        return packed_places(layout)
    return plain_places(layout.num_rows, layout.dim, layout.dtypes, layout.per_row)


def weights_places(layout: Layout) -> dict[str, Any]:
    """Returns where the rows of the weights alone begin: array 0 of all places."""
    places = places_of(layout)
    group = ("num_rows", "rows_per_group", "stride", "group_stride")
    return {
        **{name: places[name] for name in group},
        "first": places["first"][0],
        "encoding": places["encodings"][0],
    }


def plain_places(
    num_rows: int,
    dim: int,
    dtypes: Sequence[np.dtype],
    per_row: Sequence[bool] | None = None,
) -> dict[str, Any]:
    """Returns where the rows of plain arrays begin: they are one group of V rows."""
    numbers = [ENCODINGS.index(dtype.name) for dtype in dtypes]
    per_row = [False] * len(dtypes) if per_row is None else per_row
    return _places(num_rows, (num_rows, dim, 0), [0] * len(dtypes), numbers, per_row)


def packed_places(layout: Any) -> dict[str, Any]:
    """Returns where the rows begin of each array in lines, and their encodings."""
    count = len(layout.dtypes)
    first, numbers = [0] * count, [0] * count
    for plane, arrays in enumerate(layout.planes):
        pair = ("low_half", "high_half") if len(arrays) == 2 else ("widened",)
        for array, encoding in zip(arrays, pair, strict=True):
            first[array] = layout.line(plane, 0) * LANES
            if layout.dtypes[array] == jnp.bfloat16:
                numbers[array] = ENCODINGS.index(encoding)
    group = layout.rows_per_group, layout.stride, layout.lines_per_group * LANES
    return _places(layout.num_rows, group, first, numbers, [False] * count)


def _places(
    num_rows: int,
    group: tuple[int, int, int],
    first: Sequence[int],
    encodings: Sequence[int],
    per_row: Sequence[bool],
) -> dict[str, Any]:
    """Returns where rows stand, as attributes.

    Row r stands `r // rows_per_group * group_stride + r % rows_per_group * stride`
    items behind the first one, and at item r in an array of one number for each row.
    """
    rows_per_group, stride, group_stride = group
    return {
        "num_rows": np.int32(num_rows),
        "rows_per_group": np.int32(rows_per_group),
        "stride": np.int32(stride),
        "group_stride": np.int32(group_stride),
        "first": np.array(first, np.int32),
        "encodings": np.array(encodings, np.int32),
        "per_row": np.array(per_row, np.int32),
    }
