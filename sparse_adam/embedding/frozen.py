"""The optimizer of a table that does not learn: no slots, and no update."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax

from sparse_adam.embedding.optimizer import Optimizer
from sparse_adam.rules import SGDRule


class FrozenState(NamedTuple):
    """The state of a table of `trainable=False`: its weights, and no slots."""

    table: jax.Array  # [V, D]


@dataclasses.dataclass(frozen=True)
class Frozen(Optimizer[FrozenState]):
    """What a table of `trainable=False` has in place of an optimizer.

    It makes the state of a table, which is the table alone. Nobody calls its update:
    stacks of such tables are left out of updates, of rates and of norms.
    """

    learning_rate = 0.0
    use_gradient_accumulation = True
    clip_weight_min = None
    clip_weight_max = None
    weight_decay_factor = None
    multiply_weight_decay_factor_by_learning_rate = None
    clipvalue = None

    def make_rule(self) -> SGDRule:
        """Returns the rule of SGD, since it has no slots. It is never applied."""
        return SGDRule()

    def state_of(self, arrays: Sequence[jax.Array]) -> FrozenState:
        """Returns the array under its name."""
        return FrozenState(*arrays)
