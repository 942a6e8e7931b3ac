"""What the embedding API asks of an optimizer: the seam for others beside `Adam`.

An optimizer is a list of slots, a way to make them, and one function that updates the
rows of a table from `(ids, gradients, sample ids, gains)`. Nothing else in this folder
knows which optimizer it drives.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
from jax.typing import ArrayLike


@runtime_checkable
class Optimizer(Protocol):
    """A row-wise optimizer of embedding tables; hashable, and equal by value.

    Its state is a NamedTuple of arrays of one shape `[V, D]`: first the table, then
    the slots in the order of `slot_names`. Or it is a `PackedTable` of them.
    """

    slot_names: ClassVar[tuple[str, ...]]

    @property
    def learning_rate(self) -> float | jax.Array | Callable[[], Any]:
        """A number, or a callable that is asked at each update."""
        ...

    def init(self, table: ArrayLike, storage: str | None = None) -> Any:
        """Returns the state of `table` with new slots, stored as asked for."""
        ...

    def update(
        self,
        state: Any,
        ids: ArrayLike,
        grads: ArrayLike,
        *,
        learning_rate: ArrayLike | None = None,
        sample_ids: ArrayLike | None = None,
        gains: ArrayLike | None = None,
        implementation: str | None = None,
    ) -> Any:
        """Returns the state after one update of the rows in `ids`."""
        ...


def rates_now(optimizers: Sequence[Optimizer]) -> list[Any]:
    """Returns each one's rate. A callable that several share is called once.

    TensorFlow sends one rate for each different callable, too, so tables that share a
    schedule can not drift apart.
    """
    called: list[tuple[Callable[[], Any], Any]] = []

    def rate_of(optimizer: Optimizer) -> Any:
        rate = optimizer.learning_rate
        if not callable(rate):
            return rate
        for known, value in called:
            if known == rate:
                return value
        called.append((rate, rate()))
        return called[-1][1]

    return [rate_of(optimizer) for optimizer in optimizers]
