"""Makes the steps that rows have missed, one after the other, in NumPy and float64."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sparse_adam.reference.update import Number, float32


def caught_up(
    state: Sequence[npt.ArrayLike],
    rows: npt.ArrayLike,
    step: int,
    *,
    beta_1: Number = 0.9,
    beta_2: Number = 0.999,
    decay: Number = 0.0,
) -> tuple[np.ndarray, ...]:
    r"""Returns Adam's table and slots as they are before a step, in float64.

    Each of the rows makes the steps from the one after its last to `step - 1`. A step
    without a gradient does this:

    .. math::

        w &\leftarrow w - \lambda w \\
        m &\leftarrow \beta_1 m \\
        v &\leftarrow \beta_2 v \\
        t &\leftarrow t + 1

    and leaves the largest v of AMSGrad as it is. It does not move the weights along m,
    as a dense step would: that motion has no closed form.

    Args:
        state: the table, the slots m and v, of AMSGrad the largest v, `[V, D]` each;
            then t of each row, `[V]`, the number of its last step.
        rows: that are about to make a step; one outside `[0, V)` is ignored.
        step: the number of that step, from 1.
        beta_1: decay of the first moment.
        beta_2: decay of the second moment.
        decay: :math:`\lambda`, times the learning rate if so.
    """
    new: list[Any] = [np.array(x, np.float64) for x in state]
    w, m, v, steps = *new[:3], new[-1]
    beta_1, beta_2, decay = float32(beta_1), float32(beta_2), float32(decay)
    for row in np.unique(np.asarray(rows)):
        while 0 <= row < len(w) and steps[row] < step - 1:
            w[row] = w[row] - decay * w[row]
            m[row] = beta_1 * m[row]
            v[row] = beta_2 * v[row]
            steps[row] += 1
    return tuple(new)
