"""What one update is asked to do: one static record, and the arrays it is done with.

`ops` makes an `UpdateSpec` of a user's arguments, once, and validates it there. Every
implementation answers `unsupported(spec)` about it before anything is traced, and is
then called as `update(state, batch, scalars, spec, ...)`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import numpy as np

from sparse_adam._types import Gains, Grads, Indices, Seeds, StepVector, Tile
from sparse_adam.kernels.layout import Dtypes, Layout
from sparse_adam.rules import (
    Limits,
    StepNumbers,
    UpdateRule,
    Values,
    catches_up,
    step_tile,
)

# The weights and the slots of plain storage; of packed storage its one array of lines.
State: TypeAlias = tuple[jax.Array, ...]


class SortedBatch(NamedTuple):
    """The occurrences: number i adds `gains[i] * grads[sources[i]]` to row `ids[i]`."""

    grads: Grads
    ids: Indices  # sorted, unless the implementation sorts; V for none
    sources: Indices  # -1 adds zero
    gains: Gains | None  # None: 1


class StepScalars(NamedTuple):
    """The traced numbers of an update."""

    # Learning rate, decay of the weights, scale of gradients; where rows catch up, the
    # number of the step too.
    numbers: StepVector
    seeds: Seeds | None  # one for each array, to round stochastically; or none


@dataclasses.dataclass(frozen=True, slots=True)
class UpdateSpec:
    """One update without its values: the one record of its options.

    Attributes:
        rule: what a step of a row computes.
        limits: the bounds of gradients and weights that wrap it.
        layout: where the rows stand: V, D and the dtypes.
        num_ids: N, occurrences, padding included.
        num_grads: B, rows of the gradient array; N unless sample ids are given.
        grads_dtype: of that array.
        weighted: whether sample ids or gains are given.
        lazy: whether only rows in the batch are stepped.
        accumulate: whether gradients of equal ids are summed before one step.
        decays: whether weights decay.
        scales: whether gradients are scaled.
        stochastic: whether bfloat16 arrays are rounded stochastically.
    """

    rule: UpdateRule
    limits: Limits
    layout: Layout
    num_ids: int
    num_grads: int
    grads_dtype: np.dtype
    weighted: bool = False
    lazy: bool = True
    accumulate: bool = True
    decays: bool = False
    scales: bool = False
    stochastic: bool = False

    @property
    def num_rows(self) -> int:
        """Returns V."""
        return self.layout.num_rows

    @property
    def dim(self) -> int:
        """Returns D."""
        return self.layout.dim

    @property
    def dtypes(self) -> Dtypes:
        """Returns the dtypes of the weights and of each slot."""
        return self.layout.dtypes

    @property
    def catches_up(self) -> bool:
        """Returns whether rows make up for steps that they have missed."""
        return catches_up(self.rule)

    @property
    def array_names(self) -> tuple[str, ...]:
        """Returns what messages call the weights and the slots."""
        return ("table", *(slot.name for slot in self.rule.slots))

    def replace(self, **changes: object) -> "UpdateSpec":
        """Returns a copy with some attributes changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def numbers(self, read: Callable[[int], jax.Array]) -> StepNumbers:
        """Returns the numbers that count; `read(i)` is `StepScalars.numbers[i]`."""
        return StepNumbers(
            read(0),
            read(1) if self.decays else None,
            read(2) if self.scales else None,
            read(3) if self.catches_up else None,
        )

    def counted(self, numbers: StepVector) -> jax.Array:
        """Returns `StepScalars.numbers` without those at its end that do not count.

        The TensorCore's loops take a bundle or two less with a vector of one number.
        """
        all_count = self.decays or self.scales or self.catches_up
        return numbers if all_count else numbers[:1]

    def step(self, values: Values, gradient: Tile, numbers: StepNumbers) -> Values:
        """Returns the new values of a tile of rows, one array for each of the state."""
        return step_tile(self.rule, self.limits, values, gradient, numbers)


def part_per_row(
    per_row: tuple[bool, ...], arrays: Sequence[jax.Array]
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Parts arrays into those that have a number for each weight, and those per row."""
    if not any(per_row):
        return tuple(arrays), ()
    pairs = list(zip(per_row, arrays, strict=True))
    return tuple(x for p, x in pairs if not p), tuple(x for p, x in pairs if p)


def join_per_row(
    per_row: tuple[bool, ...],
    elements: Sequence[jax.Array],
    by_row: Sequence[jax.Array],
) -> tuple[jax.Array, ...]:
    """Puts what `part_per_row` has parted back in order."""
    if not any(per_row):
        return tuple(elements)
    others, rows = iter(elements), iter(by_row)
    return tuple(next(rows) if p else next(others) for p in per_row)
