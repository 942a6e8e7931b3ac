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
from sparse_adam.kernels.problem import Batch, Problem, State, Step
from sparse_adam.kernels.tiles import LANES
from sparse_adam.rules import AdamRule, Limits, UpdateRule

# As in `loops.h` and `storage.h`.
MOST_ARRAYS = 8
ENCODINGS = ("float32", "bfloat16", "widened", "low_half", "high_half")


def unsupported(problem: Problem) -> str | None:
    """Says why this kernel cannot do `problem`, or None when it can."""
    return unsupported_rule(_rule_of(problem))


def unsupported_rule(rule: UpdateRule) -> str | None:
    """Says why this kernel cannot step by a rule, or None when it can."""
    loaded = library.load()
    if isinstance(loaded, str):
        return loaded
    name = type(rule).__name__
    # A user's class may have the name of one of ours.
    if name not in loaded or getattr(rules, name, None) is not type(rule):
        return f"its C++ library has no loop for {name}"
    return None


def bytes_moved(num_ids: int, num_unique: int, dim: int) -> int:
    """Least bytes of a float32 update: gradients once, three rows in and out, ids."""
    return 4 * (num_ids * dim + 6 * num_unique * dim + num_ids)


def cpu_update(state: State, batch: Batch, step: Step, problem: Problem) -> State:
    """Updates the rows `batch.ids` (V for none), in any order, in place."""
    hyper, rate = problem.hyper, step.learning_rate
    decay = jnp.float32(hyper.weight_decay_factor)
    if hyper.multiply_weight_decay_factor_by_learning_rate:
        decay = decay * rate
    numbers = jnp.stack([rate, decay, jnp.float32(1)])
    return call(state, *batch, numbers, step.seeds, attributes(problem))


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


def attributes(problem: Problem) -> dict[str, Any]:
    """Returns all that the library is told when the call is compiled."""
    hyper = problem.hyper
    limits = Limits(
        hyper.clip_gradient_min,
        hyper.clip_gradient_max,
        hyper.clip_weight_min,
        hyper.clip_weight_max,
    )
    if problem.packed:
        places = packed_places(problem.layout)
    else:
        places = plain_places(problem.num_rows, problem.dim, problem.dtypes)
    return {
        **places,
        **rule_attributes(_rule_of(problem), limits),
        "lazy": problem.lazy,
        "accumulate": problem.accumulate,
        "decays": hyper.weight_decay_factor != 0,
        "scales": False,
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


def _rule_of(problem: Problem) -> AdamRule:
    """Returns the rule that `problem` asks for."""
    hyper = problem.hyper
    return AdamRule(
        hyper.beta_1, hyper.beta_2, hyper.epsilon, hyper.sum_inside_sqrt, None
    )
