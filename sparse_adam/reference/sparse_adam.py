r"""What the update is: row by row, in NumPy, in float64.

Slow and obvious on purpose. Every implementation is tested against this file, and this
file against the formulae by the reader's eye and the golden numbers of TensorFlow.

The constants have the values that the float32 programs work with: the betas, epsilon,
the learning rate, the decay factor, the bounds and the gains are rounded to float32,
and `1 - beta` and `epsilon**2` are formed in float32. From there on all is float64,
and each array is rounded to its own dtype once, at the end.
"""

from typing import Any

import numpy as np
import numpy.typing as npt


def sparse_adam_update(
    table: npt.ArrayLike,
    momenta: npt.ArrayLike,
    velocities: npt.ArrayLike,
    ids: npt.ArrayLike,
    grads: npt.ArrayLike,
    *,
    learning_rate: float | npt.ArrayLike = 1e-3,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    lazy_adam: bool = True,
    sum_inside_sqrt: bool = True,
    use_gradient_accumulation: bool = True,
    clip_weight_min: float | None = None,
    clip_weight_max: float | None = None,
    weight_decay_factor: float | None = None,
    multiply_weight_decay_factor_by_learning_rate: bool | None = None,
    clipvalue: float | tuple[float | None, float | None] | None = None,
    sample_ids: npt.ArrayLike | None = None,
    gains: npt.ArrayLike | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r"""Returns the new `(table, momenta, velocities)`; the arguments are the op's.

    Occurrence :math:`i` looks up row :math:`r = \mathtt{ids}[i]` and has the gradient

    .. math::

        g_i = \mathtt{gains}[i]\; \mathtt{grads}[\mathtt{sample\_ids}[i]]

    (without `sample_ids` that of `grads[i]`; without `gains` times 1). One whose id is
    outside `[0, V)` is ignored. One whose sample id is outside `[0, B)` has the
    gradient 0: its row is still looked up.

    A step on a row, with the gradient :math:`G`, is

    .. math::

        G &\leftarrow \min(\max(G, \mathtt{low}), \mathtt{high}) \\
        w &\leftarrow w - \lambda w \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) G \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) G^2 \\
        w &\leftarrow w - \eta\, m / \sqrt{v + \epsilon^2}
            \quad\text{or}\quad w - \eta\, m / (\sqrt{v} + \epsilon) \\
        w &\leftarrow \min(\max(w, \mathtt{clip\_weight\_min}),
                           \mathtt{clip\_weight\_max})

    and which steps are made is

    * by default one on each row that was looked up, with the sum of its gradients,
      also where that sum is 0;
    * with `lazy_adam=False` one on every row of the table. A row that was not looked
      up has :math:`G = 0`, which is then clipped as any other: bounds that exclude 0
      move it;
    * with `use_gradient_accumulation=False` one for each occurrence, in the order of
      `ids`, with that occurrence's gradient.

    Rows without a step come back bit for bit.

    Example:
        >>> import numpy as np
        >>> table, zeros = np.ones((3, 1), np.float32), np.zeros((3, 1), np.float32)
        >>> w, m, v = sparse_adam_update(
        ...     table, zeros, zeros, np.array([2, -1, 2]), np.array([[1.], [9.], [3.]]),
        ...     learning_rate=0.1)
        >>> print(w.ravel(), m.ravel())
        [1.        1.        0.6837701] [0.        0.        0.4000001]
    """
    eta, beta_1, beta_2, epsilon = (
        _float32(x) for x in (learning_rate, beta_1, beta_2, epsilon)
    )
    one_minus_beta_1 = np.float64(np.float32(1) - np.float32(beta_1))
    one_minus_beta_2 = np.float64(np.float32(1) - np.float32(beta_2))
    epsilon_squared = np.float64(np.float32(epsilon) * np.float32(epsilon))
    decay = _float32(weight_decay_factor or 0)
    if multiply_weight_decay_factor_by_learning_rate:
        decay = decay * eta
    if isinstance(clipvalue, tuple):
        low, high = clipvalue
    else:
        low, high = None if clipvalue is None else -clipvalue, clipvalue

    def step(
        w: np.ndarray, m: np.ndarray, v: np.ndarray, gradient: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        gradient = _clip(gradient, low, high)
        w = w - decay * w
        m = beta_1 * m + one_minus_beta_1 * gradient
        v = beta_2 * v + one_minus_beta_2 * gradient**2
        if sum_inside_sqrt:
            w = w - eta * m / np.sqrt(v + epsilon_squared)
        else:
            w = w - eta * m / (np.sqrt(v) + epsilon)
        return _clip(w, clip_weight_min, clip_weight_max), m, v

    new_table, new_momenta, new_velocities = (
        np.array(x) for x in (table, momenta, velocities)
    )
    num_rows, dim = new_table.shape
    gradients: dict[int, list[np.ndarray]] = {row: [] for row in range(num_rows)}
    for row, gradient in _occurrences(ids, grads, dim, sample_ids, gains):
        if 0 <= row < num_rows:
            gradients[row].append(gradient)

    for row, own in gradients.items():
        if use_gradient_accumulation and (own or not lazy_adam):
            own = [sum(own, start=np.zeros(dim))]
        if own:
            w = new_table[row].astype(np.float64)
            m = new_momenta[row].astype(np.float64)
            v = new_velocities[row].astype(np.float64)
            for gradient in own:
                w, m, v = step(w, m, v, gradient)
            new_table[row] = w.astype(new_table.dtype)
            new_momenta[row] = m.astype(new_momenta.dtype)
            new_velocities[row] = v.astype(new_velocities.dtype)
    return new_table, new_momenta, new_velocities


def _occurrences(
    ids: npt.ArrayLike,
    grads: npt.ArrayLike,
    dim: int,
    sample_ids: npt.ArrayLike | None,
    gains: npt.ArrayLike | None,
) -> list[tuple[int, np.ndarray]]:
    """The row of each occurrence and its gradient, in the order of `ids`."""
    rows = [int(i) for i in np.asarray(ids).ravel()]
    grads = np.asarray(grads).reshape(-1, dim)
    sources = range(len(rows))
    if sample_ids is not None:
        sources = [int(i) for i in np.asarray(sample_ids).ravel()]
    factors = [_float32(1)] * len(rows)
    if gains is not None:
        factors = [_float32(gain) for gain in np.asarray(gains).ravel()]
    occurrences = []
    for row, source, factor in zip(rows, sources, factors, strict=True):
        gradient = np.zeros(dim)
        if 0 <= source < len(grads):
            gradient = factor * grads[source].astype(np.float64)
        occurrences.append((row, gradient))
    return occurrences


def _clip(x: np.ndarray, low: float | None, high: float | None) -> np.ndarray:
    """Clips elementwise; a side that is None is open, and a NaN stays a NaN."""
    if low is not None:
        x = np.maximum(x, _float32(low))
    if high is not None:
        x = np.minimum(x, _float32(high))
    return x


def _float32(x: Any) -> np.float64:
    """The float64 that holds the float32 nearest to `x`."""
    return np.float64(np.asarray(x).astype(np.float32))
