"""The update on a CPU: what the C++ library is told, and the call."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_adam import rules
from sparse_adam._types import Gains, Grads, Indices, Seeds
from sparse_adam.kernels.cpu import library
from sparse_adam.kernels.layout import PackedLayout
from sparse_adam.kernels.spec import SortedBatch, State, StepScalars, UpdateSpec
from sparse_adam.kernels.tiles import LANES
from sparse_adam.rules import Limits, UpdateRule

# As in `loops.h` and `storage.h`.
MOST_ARRAYS = 8
ENCODINGS = ("float32", "bfloat16", "widened", "low_half", "high_half")


def unsupported(spec: UpdateSpec) -> str | None:
    """Says why this kernel cannot do an update, or returns None when it can."""
    return unsupported_rule(spec.rule)


def unsupported_rule(rule: UpdateRule) -> str | None:
    """Says why this kernel cannot step by a rule, or returns None when it can."""
    loaded = library.load()
    if isinstance(loaded, str):
        return loaded
    name = type(rule).__name__
    # A user's class may have the name of one of ours.
    if name not in loaded or getattr(rules, name, None) is not type(rule):
        return f"its C++ library has no loop for {name}"
    return None


def bytes_moved(num_ids: int, num_unique: int, dim: int) -> int:
    """Returns the least bytes of a float32 update by Adam.

    That is gradients once, three rows in and out, and ids.
    """
    return 4 * (num_ids * dim + 6 * num_unique * dim + num_ids)


def cpu_update(
    state: State, batch: SortedBatch, scalars: StepScalars, spec: UpdateSpec
) -> State:
    """Updates the rows `batch.ids` (V for none), in any order, in place."""
    return call(state, *batch, *scalars, attributes(spec))


def call(
    state: State,
    grads: Grads,
    ids: Indices,
    sources: Indices,
    gains: Gains | None,
    numbers: jax.Array,
    seeds: Seeds | None,
    attributes: dict[str, Any],
) -> State:
    """Calls the library, which updates the state in place.

    Args:
        state: the weights and each slot, or one array of lines.
        grads: `[B, D]`.
        ids: `[N]`, in any order; one outside `[0, V)` is ignored.
        sources: `[N]`: occurrence i adds `gains[i] * grads[sources[i]]` to `ids[i]`.
        gains: `[N]`, or None for 1.
        numbers: float32 `[3]`: learning rate, decay of the weights, gradient scale.
        seeds: one for each array, to round stochastically; or None.
        attributes: what the library is told when the call is compiled.
    """
    if grads.dtype not in (jnp.float32, jnp.bfloat16):
        grads = grads.astype(jnp.float32)
    if gains is None:
        gains = jnp.zeros((0,), jnp.float32)
    if seeds is None:
        seeds = jnp.zeros((0,), jnp.int32)
    operands = (grads, ids, sources, gains, numbers, seeds)
    aliases = {len(operands) + i: i for i in range(len(state))}
    run = jax.ffi.ffi_call(library.TARGET, state, input_output_aliases=aliases)
    return tuple(run(*operands, *state, **attributes))


def attributes(spec: UpdateSpec) -> dict[str, Any]:
    """Returns all that the library is told when the call is compiled."""
    layout = spec.layout
    if isinstance(layout, PackedLayout):
        places = packed_places(layout)
    else:
        places = plain_places(
            layout.num_rows, layout.dim, layout.dtypes, layout.per_row
        )
    return {
        **places,
        **rule_attributes(spec.rule, spec.limits),
        "lazy": spec.lazy,
        "accumulate": spec.accumulate,
        "decays": spec.decays,
        "scales": spec.scales,
    }


def rule_attributes(rule: UpdateRule, limits: Limits) -> dict[str, Any]:
    """Returns what the library is told of a rule and the bounds that wrap it."""
    bounds = dataclasses.asdict(limits)
    for name, value in bounds.items():
        infinity = -np.inf if name.endswith("min") else np.inf
        bounds[name] = np.float32(infinity if value is None else value)
    fields = dataclasses.fields(rule)  # pyright: ignore[reportArgumentType]
    constants = [_constant(getattr(rule, field.name)) for field in fields]
    return {
        "rule": type(rule).__name__,
        "constants": np.array(constants, np.float32),
        **bounds,
    }


def _constant(value: bool | float | str | None) -> float:
    """Returns a field of a rule as a number."""
    if isinstance(value, str):
        return 1.0
    return 0.0 if value is None else float(value)


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
