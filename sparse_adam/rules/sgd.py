"""Stochastic gradient descent."""

import dataclasses

from sparse_adam._types import Rate, Tile
from sparse_adam.rules.rule import Slot, Values


@dataclasses.dataclass(frozen=True, slots=True)
class SGDRule:
    r"""Stochastic gradient descent: :math:`w \leftarrow w - \eta G`.

    Source: `tf.tpu.experimental.embedding.SGD`.
    """

    @property
    def slots(self) -> tuple[Slot, ...]:
        """No slots."""
        return ()

    def step(self, values: Values, gradient: Tile, rate: Rate) -> Values:
        """Returns new weights."""
        (w,) = values
        return (w - rate * gradient,)
