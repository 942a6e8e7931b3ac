r"""Updates the rows of a table one after the other, in NumPy and float64.

This file is slow and obvious on purpose. It holds what is the same for every optimizer:
which rows make a step, with which gradient, and what is done before and after the step.
The steps themselves are in `steps.py`. Every implementation is tested against these two
files; the files are tested against numbers worked by hand, against TensorFlow's golden
numbers, and against the optimizers of torch and FBGEMM.

The constants have the values that the float32 programs work with: the learning rate,
the decay factor, the gradient scale, the bounds, the gains and the numbers of an
optimizer are rounded to float32. From there on all is float64, and each array is
rounded to its own dtype once, at the end.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

# Said in full, since type checkers at run time take no int for a float.
Number: TypeAlias = int | float
# The weights and slots of one row, in float64: `[D]` each, `[]` for a slot per row.
RowValues: TypeAlias = tuple[Any, ...]
# Takes the values of one row, its gradient `[D]` and the learning rate.
RowStep: TypeAlias = Callable[[RowValues, np.ndarray, np.float64], RowValues]


@dataclasses.dataclass(frozen=True)
class WithEMA:
    r"""A step and, in one more slot, the moving average of the weights after it.

    .. math:: e \leftarrow d\, e + (1 - d)\, w

    `sparse_update` takes the weights that were clipped.
    """

    step: RowStep
    decay: Number

    def averaged(self, ema: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Returns the new average; `1 - d` is formed in float32."""
        share = np.float64(np.float32(1) - np.float32(self.decay))
        return (1 - share) * ema + share * weights

    def __call__(
        self, values: RowValues, gradient: np.ndarray, rate: np.float64
    ) -> RowValues:
        """Makes the step, and the average of what it gives."""
        *own, ema = values
        own = self.step(tuple(own), gradient, rate)
        return (*own, self.averaged(ema, own[0]))


def sparse_update(
    state: Sequence[npt.ArrayLike],
    ids: npt.ArrayLike,
    grads: npt.ArrayLike,
    step: RowStep,
    *,
    learning_rate: Number | npt.ArrayLike,
    lazy: bool = True,
    use_gradient_accumulation: bool = True,
    clip_weight_min: Number | None = None,
    clip_weight_max: Number | None = None,
    weight_decay_factor: Number | npt.ArrayLike | None = None,
    multiply_weight_decay_factor_by_learning_rate: bool | None = None,
    clipvalue: Number | tuple[Number | None, Number | None] | None = None,
    gradient_scale: Number | npt.ArrayLike | None = None,
    sample_ids: npt.ArrayLike | None = None,
    gains: npt.ArrayLike | None = None,
) -> tuple[np.ndarray, ...]:
    r"""Returns the new table and slots.

    Occurrence :math:`i` looks up row :math:`r = \mathtt{ids}[i]` and has the gradient

    .. math::

        g_i = \mathtt{gains}[i]\; \mathtt{grads}[\mathtt{sample\_ids}[i]]

    (without `sample_ids` that of `grads[i]`; without `gains` times 1). One whose id is
    outside `[0, V)` is ignored. One whose sample id is outside `[0, B)` has the
    gradient 0: its row is still looked up.

    A row that makes a step with the gradient :math:`G` does this:

    .. math::

        G &\leftarrow \mathtt{gradient\_scale}\; G \\
        G &\leftarrow \min(\max(G, \mathtt{low}), \mathtt{high}) \\
        w &\leftarrow w - \lambda w \\
        w, \mathtt{slots} &\leftarrow \mathtt{step}((w, \mathtt{slots}), G, \eta) \\
        w &\leftarrow \min(\max(w, \mathtt{clip\_weight\_min}),
                           \mathtt{clip\_weight\_max})

    and the steps that are made are

    * by default one for each row that was looked up, with the sum of its gradients,
      also where that sum is 0;
    * with `lazy=False` one for every row of the table. A row that was not looked up has
      :math:`G = 0`, which is then clipped as any other: bounds that exclude 0 move it;
    * with `use_gradient_accumulation=False` one for each occurrence, in the order of
      `ids`, with the gradient of that occurrence.

    Rows without a step come back bit for bit.

    Args:
        state: the table `[V, D]`, then the slots: `[V, D]` each, or `[V]` for a slot
            that has one number for each row.
        ids: the row of each occurrence; any shape.
        grads: the gradients, `ids.shape + (D,)`, or `[B, D]` with `sample_ids`.
        step: one step of one row, such as `adam()` of `steps.py`.
        learning_rate: :math:`\eta`.
        lazy: False makes a step for every row of the table.
        use_gradient_accumulation: False makes a step for each occurrence.
        clip_weight_min: the lower bound of new weights.
        clip_weight_max: the upper bound of new weights.
        weight_decay_factor: :math:`\lambda`.
        multiply_weight_decay_factor_by_learning_rate: True makes :math:`\lambda` the
            product of factor and rate.
        clipvalue: `x` bounds gradients by `(-x, x)`; a pair is `(low, high)`.
        gradient_scale: factor of each summed gradient.
        sample_ids: the row of `grads` that each occurrence takes.
        gains: the factor of each occurrence's gradient.

    Examples:
        >>> import numpy as np
        >>> from sparse_adam.reference import sgd
        >>> table = np.ones((3, 1), np.float32)
        >>> (new,) = sparse_update(
        ...     (table,), np.array([2, -1, 2]), np.array([[1.0], [9.0], [3.0]]), sgd(),
        ...     learning_rate=0.125)
        >>> print(new.ravel())
        [1.  1.  0.5]
    """
    rate = float32(learning_rate)
    decay = None if weight_decay_factor is None else float32(weight_decay_factor)
    if decay is not None and multiply_weight_decay_factor_by_learning_rate:
        decay = decay * rate
    scale = None if gradient_scale is None else float32(gradient_scale)
    if isinstance(clipvalue, tuple):
        low, high = clipvalue
    else:
        low, high = None if clipvalue is None else -clipvalue, clipvalue

    def limited_step(values: RowValues, gradient: np.ndarray) -> RowValues:
        if scale is not None:
            gradient = scale * gradient
        gradient = _clip(gradient, low, high)
        weights, *slots = values
        if decay is not None:
            weights = weights - decay * weights
        weights, *slots = step((weights, *slots), gradient, rate)
        clipped = _clip(weights, clip_weight_min, clip_weight_max)
        if isinstance(step, WithEMA):
            slots[-1] = step.averaged(values[-1], clipped)
        return (clipped, *slots)

    new_state = tuple(np.array(x) for x in state)
    num_rows, dim = new_state[0].shape
    gradients: dict[int, list[np.ndarray]] = {row: [] for row in range(num_rows)}
    for row, gradient in _occurrences(ids, grads, dim, sample_ids, gains):
        if 0 <= row < num_rows:
            gradients[row].append(gradient)

    for row, own in gradients.items():
        if use_gradient_accumulation and (own or not lazy):
            own = [sum(own, start=np.zeros(dim))]
        if own:
            values = tuple(x[row].astype(np.float64) for x in new_state)
            for gradient in own:
                values = limited_step(values, gradient)
            for array, value in zip(new_state, values, strict=True):
                array[row] = value.astype(array.dtype)
    return new_state


def _occurrences(
    ids: npt.ArrayLike,
    grads: npt.ArrayLike,
    dim: int,
    sample_ids: npt.ArrayLike | None,
    gains: npt.ArrayLike | None,
) -> list[tuple[int, np.ndarray]]:
    """Returns the row of each occurrence and its gradient, in the order of `ids`."""
    rows = [int(i) for i in np.asarray(ids).ravel()]
    grads = np.asarray(grads).reshape(-1, dim)
    sources = range(len(rows))
    if sample_ids is not None:
        sources = [int(i) for i in np.asarray(sample_ids).ravel()]
    factors = [float32(1)] * len(rows)
    if gains is not None:
        factors = [float32(gain) for gain in np.asarray(gains).ravel()]
    occurrences = []
    for row, source, factor in zip(rows, sources, factors, strict=True):
        gradient = np.zeros(dim)
        if 0 <= source < len(grads):
            gradient = factor * grads[source].astype(np.float64)
        occurrences.append((row, gradient))
    return occurrences


def _clip(x: np.ndarray, low: Number | None, high: Number | None) -> np.ndarray:
    """Clips elementwise; a side that is None is open, and a NaN stays a NaN."""
    if low is not None:
        x = np.maximum(x, float32(low))
    if high is not None:
        x = np.minimum(x, float32(high))
    return x


def float32(x: Any) -> np.float64:
    """Returns the float64 that holds the float32 nearest to `x`."""
    return np.float64(np.asarray(x).astype(np.float32))
