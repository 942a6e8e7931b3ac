"""What an update rule is: its slots, and one step of a tile of rows.

A rule says what happens to the weights of a row and to its slots when the row gets a
gradient, and nothing else: how rows are found, moved, packed, rounded and shared out is
the business of the kernels, which work for every rule.
"""

import dataclasses
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from sparse_adam._types import Rate, Tile
from sparse_adam.rules import numbers

Values: TypeAlias = tuple[Tile, ...]  # weights first, then one for each slot


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """One array that a rule keeps beside the weights.

    Args:
        name: of the array, as checkpoints and `retrieve` call it.
        initial: the value that every element begins with.
        per: "element" keeps one number for each weight, an array `[V, D]`; "row" keeps
            one number for each row, an array `[V]`.

    Raises:
        TypeError: the initial value is no number.
        ValueError: `per` is neither of the two, the name is empty, or the initial value
            is not finite.

    Example:
        >>> Slot("accumulators", initial=0.1)
        Slot(name='accumulators', initial=0.1, per='element')
    """

    name: str
    initial: float = 0.0
    per: Literal["element", "row"] = "element"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name={self.name!r} of a slot must be a non-empty string")
        if self.per not in ("element", "row"):
            raise ValueError(f"per={self.per!r} must be 'element' or 'row'")
        numbers.set_all(self, initial=numbers.finite("initial", self.initial))


@runtime_checkable
class UpdateRule(Protocol):
    """An optimizer of rows: a frozen, hashable object with slots and a step.

    `step` is traced into every kernel, so it may use what all of them can compute:
    arithmetic, comparisons, `jnp.where`, `jnp.minimum`, `jnp.maximum`, `jnp.sqrt`,
    `lax.rsqrt`, `jnp.abs` and `jnp.sign` anywhere; `jnp.exp`, `jnp.log` and powers not
    on SparseCore; and a reduction over the last axis, for slots that are per row, where
    a kernel sees whole rows. It may not move data between rows. `check_rule` tells.

    Example:
        >>> import dataclasses
        >>> @dataclasses.dataclass(frozen=True)
        ... class SignDescent:
        ...     slots = ()
        ...     def step(self, values, gradient, rate):
        ...         (w,) = values
        ...         return (w - rate * jnp.sign(gradient),)
        >>> import jax.numpy as jnp
        >>> isinstance(SignDescent(), UpdateRule)
        True
    """

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The slots, in the order in which `step` takes and returns them."""
        ...

    def step(self, values: Values, gradient: Tile, rate: Rate) -> Values:
        """Returns the new values of a tile of rows.

        Args:
            values: float32; first the weights `[..., D]`, then the slots: `[..., D]`,
                or `[..., 1]` of a slot that is per row.
            gradient: float32 `[..., D]`: of each row the sum of its gradients, scaled
                and clipped.
            rate: float32 `[]`: the learning rate.

        Returns:
            As many float32 arrays of the same shapes.
        """
        ...
