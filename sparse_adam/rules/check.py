"""What a rule does, found out by tracing its step: is it sound, what does it use?"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from sparse_adam.rules.operations import (
    CALLS,
    REDUCTIONS,
    ROWS,
    TRANSCENDENTALS,
    beyond_subcore,
    captured,
    equations,
    fingerprint,
    objection,
)
from sparse_adam.rules.rule import Slot, UpdateRule, Values

_TILE = (ROWS, 5)  # that a step is traced with first
_MANY = 1024  # rows or lanes, by which it is traced again


@dataclasses.dataclass(frozen=True, slots=True)
class RuleFacts:
    """What the kernels ask of a rule.

    Attributes:
        per_row: whether it has a slot of one number for each row.
        whole_rows: whether its step reads a whole row at once, by a reduction, or the
            width of a row.
        beyond_subcores: the operations that a vector subcore has not, sorted.
        transcendentals: roots, exponentials and the like for each element.
        flops: all its operations for each element.
    """

    per_row: bool
    whole_rows: bool
    beyond_subcores: tuple[str, ...]
    transcendentals: int
    flops: int


def check_rule(rule: UpdateRule) -> RuleFacts:
    """Traces a rule's step and refuses what no kernel could run.

    The result is kept: a rule that is equal to one seen before is not traced again.

    Raises:
        TypeError: the object is no rule, is not frozen, or is not hashable.
        ValueError: its step returns another number of values, changes a shape or a
            dtype, moves data between rows, depends on the number of rows in a tile, or
            uses an operation or an array that kernels have not.

    Examples:
        >>> from sparse_adam.rules import AdamRule
        >>> check_rule(AdamRule()).beyond_subcores
        ()
    """
    if isinstance(rule, type):
        raise TypeError(f"{rule=} is a class: pass an object of it, {rule.__name__}()")
    if not isinstance(rule, UpdateRule):
        raise TypeError(
            f"{rule=} must be an update rule, such as AdamRule(): an object with "
            "`slots` and `step(values, gradient, rate)`"
        )
    way_out = "make it a dataclass with @dataclasses.dataclass(frozen=True)"
    if isinstance(rule, tuple):
        raise TypeError(
            f"{rule=} is a named tuple, and is equal to those of other classes with "
            f"the same fields: {way_out}"
        )
    if dataclasses.is_dataclass(rule) and not _is_frozen(rule):
        raise TypeError(f"{rule=} is not frozen: {way_out}")
    try:
        hash(rule)
    except TypeError as error:
        raise TypeError(
            f"{rule=} is not hashable ({error}): {way_out}, whose fields are numbers, "
            "strings or tuples of them"
        ) from None
    return _facts(rule)


@functools.lru_cache(maxsize=256, typed=True)
def _facts(rule: UpdateRule) -> RuleFacts:
    """Checks a rule that is hashable."""
    _check_slots(rule)
    jaxpr = _trace(rule, _TILE)
    inner = list(equations(jaxpr))
    for eqn in inner:
        reason = objection(eqn)
        if reason is not None:
            raise ValueError(f"{rule!r}.step is no step of rows: it {reason}")
    _check_constants(rule, jaxpr)
    traced = fingerprint(jaxpr)
    if fingerprint(_trace(rule, (_MANY, _TILE[1]))) != traced:
        raise ValueError(
            f"{rule!r}.step depends on the number of rows in a tile, which differs "
            "from kernel to kernel: use axis -1 of shapes only"
        )
    wider = fingerprint(_trace(rule, (ROWS, _MANY)))
    names = [eqn.primitive.name for eqn in inner]
    whole_rows = wider != traced or any(name in REDUCTIONS for name in names)
    if not whole_rows:
        _check_any_rank(rule)
    return RuleFacts(
        per_row=any(slot.per == "row" for slot in rule.slots),
        whole_rows=whole_rows,
        beyond_subcores=tuple(sorted(set(filter(None, map(beyond_subcore, inner))))),
        transcendentals=sum(name in TRANSCENDENTALS for name in names),
        flops=sum(name not in CALLS for name in names),
    )


def _trace(rule: UpdateRule, shape: tuple[int, ...]) -> Any:
    """Returns the jaxpr of a step of a tile of this shape, its values checked."""
    wide = jax.ShapeDtypeStruct(shape, np.float32)
    narrow = jax.ShapeDtypeStruct((*shape[:-1], 1), np.float32)
    values = (wide, *(narrow if slot.per == "row" else wide for slot in rule.slots))
    rate = jax.ShapeDtypeStruct((), np.float32)

    def step(values: Values, gradient: jax.Array, rate: jax.Array) -> Any:
        out = rule.step(values, gradient, rate)
        _check_values(rule, values, out)
        return out

    # In 32 bits, as everywhere in the kernels.
    with jax.enable_x64(False):
        try:
            closed = jax.make_jaxpr(step)(values, wide, rate)
        except Exception as error:
            error.add_note(
                f"raised by {rule!r}.step for a tile of float32{list(shape)}"
            )
            raise
    return closed.jaxpr


def _check_constants(rule: UpdateRule, jaxpr: Any) -> None:
    """Refuses arrays that a step has from elsewhere than its arguments."""
    arrays = captured(jaxpr)
    if arrays:
        raise ValueError(
            f"{rule!r}.step uses arrays that it was not given, {arrays}: a kernel "
            "cannot capture them; use Python numbers or np.float32 for constants"
        )


def _check_any_rank(rule: UpdateRule) -> None:
    """Refuses an elementwise step that takes tiles of two axes only."""
    for shape in (_TILE[1:], (2, *_TILE)):
        try:
            _trace(rule, shape)
        except Exception as error:
            raise ValueError(
                f"{rule!r}.step takes tiles of two axes only, and failed for one of "
                f"shape {shape}: some kernels have tiles `[D]` or `[a, b, D]`; use "
                "operations that work elementwise, and jnp.zeros_like(x) for zeros"
            ) from error


def _is_frozen(rule: Any) -> bool:
    return rule.__dataclass_params__.frozen


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
        if not isinstance(after, jax.Array | np.ndarray | np.generic):
            raise ValueError(
                f"{rule!r}.step turned {name}, an array, into {after!r}: it must "
                "return an array of the same shape"
            )
        if (after.shape, after.dtype) != (before.shape, before.dtype):
            raise ValueError(
                f"{rule!r}.step turned {name} of {before.dtype}{list(before.shape)} "
                f"into {after.dtype}{list(after.shape)}: it must keep shapes and "
                "float32 (use np.float32 for constants that are arrays)"
            )


def initial_slots(
    rule: UpdateRule,
    shape: tuple[int, int],
    dtype: Any,
    table: ArrayLike | None = None,
) -> tuple[jax.Array, ...]:
    """Returns new slots for a table of this shape: `[V, D]` each, or `[V]` per row.

    Args:
        rule: whose slots to make.
        shape: `(V, D)` of the table.
        dtype: of slots that are per element; those per row are float32.
        table: the weights `[V, D]`, for a rule with a slot that begins as them.

    Raises:
        ValueError: the rule has such a slot, and there is no table.

    Examples:
        >>> from sparse_adam.rules import RowWiseAdagradRule
        >>> [slot.shape for slot in initial_slots(RowWiseAdagradRule(), (8, 4), "f4")]
        [(8,)]
    """

    def made(slot: Slot) -> jax.Array:
        if slot.initial == "weights":
            if table is None:
                raise ValueError(
                    f"{rule!r} has a slot {slot.name!r} that begins as the weights: "
                    "call initial_slots(rule, table.shape, dtype, table)"
                )
            return jnp.array(table, dtype, copy=True)
        if slot.per == "row":
            return jnp.full(shape[:1], slot.initial, np.float32)
        return jnp.full(shape, slot.initial, dtype)

    return tuple(map(made, rule.slots))
