"""What an update rule is: its slots, and one step of a tile of rows.

A rule says what happens to the weights of a row and to its slots when the row gets a
gradient, and nothing else: how rows are found, moved, packed, rounded and shared out is
the business of the kernels, which work for every rule.
"""

import dataclasses
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import jax

from sparse_adam._types import Rate, Tile
from sparse_adam.rules import numbers

# Float32: weights first, then one for each slot; `[..., 1]` of one that is per row.
Values: TypeAlias = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """One array that a rule keeps beside the weights.

    Args:
        name: of the array, as checkpoints and `retrieve` call it.
        initial: the value that every element begins with; "weights" makes the slot
            begin as a copy of the table.
        per: "element" keeps one number for each weight, an array `[V, D]`; "row" keeps
            one number for each row, an array `[V]`.

    Raises:
        TypeError: the initial value is no number.
        ValueError: `per` is neither of the two, the name is empty, the initial value is
            not finite, or a slot per row is to begin as the weights.

    Examples:
        >>> Slot("accumulators", initial=0.1)
        Slot(name='accumulators', initial=0.1, per='element')
    """

    name: str
    initial: float | Literal["weights"] = 0.0
    per: Literal["element", "row"] = "element"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name={self.name!r} of a slot must be a non-empty string")
        if self.per not in ("element", "row"):
            raise ValueError(f"per={self.per!r} must be 'element' or 'row'")
        if self.initial == "weights":
            if self.per == "row":
                raise ValueError(
                    f"initial='weights' of slot {self.name!r} needs per='element': a "
                    "row has many weights"
                )
        else:
            numbers.set_all(self, initial=numbers.finite("initial", self.initial))


@runtime_checkable
class UpdateRule(Protocol):
    """An optimizer of rows: a frozen, hashable object with slots and a step.

    `step` is traced into every kernel, so it may use what all of them can compute:

    * everywhere: arithmetic, comparisons, `jnp.where`, `jnp.minimum`, `jnp.maximum`,
      `jnp.clip`, `jnp.sqrt`, `lax.rsqrt`, `jnp.exp`, `jnp.abs` and `jnp.sign`. A
      vector subcore of a SparseCore has roots, exponentials and quotients of tiles
      only, and not of the rate alone;
    * not on SparseCore: `jnp.log`, `jnp.tanh`, `jnp.square` and `x**2` (write `x * x`),
      other powers, rounding, and functions with derivatives of their own, such as
      `jax.nn.relu`;
    * where a kernel sees whole rows: sums, maxima and minima over the last axis, and
      the width of a row, `gradient.shape[-1]`.

    It may not move data between rows, depend on the number of rows or axes of a tile,
    leave float32 but for int32, uint32 and bool, or use an array from elsewhere: its
    constants are Python numbers or `np.float32`. `check_rule` tells.

    Examples:
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
