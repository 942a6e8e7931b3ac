"""What a rule does, found out by tracing its step once: is it sound, what does it use?"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_adam.rules.rule import Slot, UpdateRule

# Names of the operations of a jaxpr that leave every element in its place.
_ELEMENTWISE = frozenset(
    "abs add and ceil clamp convert_element_type copy cos div eq erf exp exp2 floor ge "
    "gt integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter not "
    "or pow rem round rsqrt select_n shift_left shift_right_arithmetic "
    "shift_right_logical sign sin sqrt square sub tan tanh xor bitcast_convert_type "
    "stop_gradient".split()
)
_REDUCTIONS = frozenset("reduce_sum reduce_max reduce_min reduce_and reduce_or".split())
_CALLS = frozenset(
    "jit pjit closed_call custom_jvp_call custom_vjp_call remat checkpoint".split()
)
# Those of them that a vector subcore of a SparseCore has.
_SUBCORE = frozenset(
    "abs add and clamp convert_element_type copy div eq exp ge gt le lt max min mul ne "
    "neg not or rem rsqrt select_n shift_left shift_right_arithmetic "
    "shift_right_logical sign sqrt sub xor bitcast_convert_type broadcast_in_dim "
    "stop_gradient".split()
)
_ROWS, _DIM = 3, 5  # of the tile that a step is traced with; alike in nothing


@dataclasses.dataclass(frozen=True, slots=True)
class RuleFacts:
    """What the kernels ask of a rule.

    Attributes:
        per_row: whether it has a slot of one number for each row.
        whole_rows: whether its step reads a whole row at once, by a reduction.
        beyond_subcores: the operations that a vector subcore has not, sorted.
        transcendentals: roots, exponentials and the like for each element.
        flops: all its operations for each element.
    """

    per_row: bool
    whole_rows: bool
    beyond_subcores: tuple[str, ...]
    transcendentals: int
    flops: int


@functools.lru_cache(maxsize=256)
def check_rule(rule: UpdateRule) -> RuleFacts:
    """Traces a rule's step once and refuses what no kernel could run.

    Raises:
        TypeError: the object is no rule, or is not hashable.
        ValueError: its step returns another number of values, changes a shape or a
            dtype, or moves data between rows.

    Example:
        >>> from sparse_adam.rules import AdamRule
        >>> check_rule(AdamRule()).beyond_subcores
        ()
    """
    if isinstance(rule, type) or not isinstance(rule, UpdateRule):
        raise TypeError(
            f"{rule=} must be an update rule, such as AdamRule(): an object with "
            "`slots` and `step(values, gradient, rate)`"
        )
    _check_slots(rule)
    wide = jax.ShapeDtypeStruct((_ROWS, _DIM), np.float32)
    narrow = jax.ShapeDtypeStruct((_ROWS, 1), np.float32)
    values = (wide, *(narrow if slot.per == "row" else wide for slot in rule.slots))
    rate = jax.ShapeDtypeStruct((), np.float32)
    # In 32 bits, as everywhere in the kernels.
    with jax.enable_x64(False):
        jaxpr, out = jax.make_jaxpr(rule.step, return_shape=True)(values, wide, rate)
    _check_values(rule, values, out)
    names = [eqn.primitive.name for eqn in _equations(jaxpr.jaxpr)]
    _check_operations(rule, jaxpr.jaxpr)
    slow = ("sqrt", "rsqrt", "exp", "exp2", "log", "log1p", "pow", "tanh", "logistic")
    reduces = any(name in _REDUCTIONS for name in names)
    return RuleFacts(
        per_row=any(slot.per == "row" for slot in rule.slots),
        whole_rows=reduces,
        beyond_subcores=tuple(sorted(set(names) - _SUBCORE - _CALLS)),
        transcendentals=sum(name in slow for name in names),
        flops=len(names),
    )


def _check_slots(rule: UpdateRule) -> None:
    slots = rule.slots
    if not isinstance(slots, tuple) or not all(isinstance(s, Slot) for s in slots):
        raise TypeError(f"{rule!r}.slots={slots!r} must be a tuple of Slots")
    names = [slot.name for slot in slots]
    if len(set(names)) < len(names):
        raise ValueError(f"{rule!r}.slots have the names {names}: they must differ")


def _check_values(rule: UpdateRule, values: Any, out: Any) -> None:
    names = ("weights", *(slot.name for slot in rule.slots))
    if not isinstance(out, tuple) or len(out) != len(values):
        got = f"{len(out)} values" if isinstance(out, tuple) else repr(type(out))
        raise ValueError(
            f"{rule!r}.step must return a tuple of {len(values)} values, {names}; it "
            f"returned {got}"
        )
    for name, before, after in zip(names, values, out, strict=True):
        if (after.shape, after.dtype) != (before.shape, before.dtype):
            raise ValueError(
                f"{rule!r}.step turned {name} of {before.dtype}{list(before.shape)} "
                f"into {after.dtype}{list(after.shape)}: it must keep shapes and "
                "float32 (use np.float32 for constants that are arrays)"
            )


def _check_operations(rule: UpdateRule, jaxpr: Any) -> None:
    """Refuses an operation that could bring numbers of one row into another."""
    for eqn in _equations(jaxpr):
        name = eqn.primitive.name
        if name in _CALLS or name in _ELEMENTWISE:
            continue
        if name in _REDUCTIONS:
            operand = eqn.invars[0].aval
            if tuple(eqn.params["axes"]) == (operand.ndim - 1,):
                continue
            raise ValueError(
                f"{rule!r}.step reduces over axes {eqn.params['axes']} of a tile of "
                f"shape {operand.shape}: a rule may only reduce over the last axis, "
                "within a row"
            )
        if name == "broadcast_in_dim" and _keeps_rows(eqn):
            continue
        if name in ("reshape", "squeeze", "expand_dims") and _keeps_rows(eqn):
            continue
        raise ValueError(
            f"{rule!r}.step uses `{name}`, which may bring numbers of one row into "
            "another, or is not known to every kernel: use arithmetic, comparisons, "
            "jnp.where, roots, exp, log, powers, and reductions over the last axis"
        )


def _keeps_rows(eqn: Any) -> bool:
    """Tells whether a change of shape leaves the first axis what it is."""
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if not before or all(size == 1 for size in before):
        return True
    if eqn.primitive.name == "broadcast_in_dim":
        place = eqn.params["broadcast_dimensions"]
        return before[0] in (1, _ROWS) and place[0] == 0 and len(after) == 2
    return before[0] == _ROWS and after[:1] == (_ROWS,)


def _equations(jaxpr: Any) -> Iterator[Any]:
    """Yields the equations of a jaxpr, those of functions it calls included."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
        if name in _CALLS and inner is not None:
            yield from _equations(getattr(inner, "jaxpr", inner))
        else:
            yield eqn


def initial_slots(rule: UpdateRule, shape: tuple[int, int], dtype: Any) -> tuple:
    """Returns new slots for a table of this shape: `[V, D]` each, or `[V]` per row.

    Args:
        rule: whose slots to make.
        shape: `(V, D)` of the table.
        dtype: of slots that are per element; those per row are float32.

    Example:
        >>> from sparse_adam.rules import RowWiseAdagradRule
        >>> [slot.shape for slot in initial_slots(RowWiseAdagradRule(), (8, 4), "f4")]
        [(8,)]
    """
    return tuple(
        jnp.full(shape[:1], slot.initial, np.float32)
        if slot.per == "row"
        else jnp.full(shape, slot.initial, dtype)
        for slot in rule.slots
    )
