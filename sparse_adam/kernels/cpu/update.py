"""The update on a CPU: what the C++ library is told, and the call."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_adam import rules
from sparse_adam._types import Gains, Grads, Indices, Seeds
from sparse_adam.kernels.cpu import library
from sparse_adam.kernels.cpu.places import places_of
from sparse_adam.kernels.spec import SortedBatch, State, StepScalars, UpdateSpec
from sparse_adam.rules import Limits, UpdateRule, WithEMA


def unsupported(spec: UpdateSpec) -> str | None:
    """Says why this kernel cannot do an update, or returns None when it can."""
    return unsupported_rule(spec.rule)


def unsupported_rule(rule: UpdateRule) -> str | None:
    """Says why this kernel cannot step by a rule, or returns None when it can."""
    loaded = library.load()
    if isinstance(loaded, str):
        return loaded
    if isinstance(rule, WithEMA):  # the library makes its average itself
        rule = rule.rule
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
        numbers: float32 `[3]`: learning rate, decay of the weights, gradient scale; or
            `[4]`, with the number of the step, if rows catch up.
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
    run = jax.ffi.ffi_call(library.UPDATE, state, input_output_aliases=aliases)
    return tuple(run(*operands, *state, **attributes))


def attributes(spec: UpdateSpec) -> dict[str, Any]:
    """Returns all that the library is told when the call is compiled."""
    return {
        **places_of(spec.layout),
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
    share = np.float32(0)  # no average
    if isinstance(rule, WithEMA):
        share, rule = rule.share, rule.rule
    fields = dataclasses.fields(rule)  # pyright: ignore[reportArgumentType]
    constants = [_constant(getattr(rule, field.name)) for field in fields]
    return {
        "rule": type(rule).__name__,
        "constants": np.array(constants, np.float32),
        "ema_share": share,
        **bounds,
    }


def _constant(value: bool | float | str | None) -> float:
    """Returns a field of a rule as a number."""
    if isinstance(value, str):
        return 1.0
    return 0.0 if value is None else float(value)
