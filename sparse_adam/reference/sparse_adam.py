"""Updates a table with Adam: the call of the op, in NumPy and float64."""

import numpy as np
import numpy.typing as npt

from sparse_adam.reference.steps import adam
from sparse_adam.reference.update import Number, sparse_update


def sparse_adam_update(
    table: npt.ArrayLike,
    momenta: npt.ArrayLike,
    velocities: npt.ArrayLike,
    ids: npt.ArrayLike,
    grads: npt.ArrayLike,
    *,
    learning_rate: Number | npt.ArrayLike = 1e-3,
    beta_1: Number = 0.9,
    beta_2: Number = 0.999,
    epsilon: Number = 1e-7,
    lazy_adam: bool = True,
    sum_inside_sqrt: bool = True,
    use_gradient_accumulation: bool = True,
    clip_weight_min: Number | None = None,
    clip_weight_max: Number | None = None,
    weight_decay_factor: Number | npt.ArrayLike | None = None,
    multiply_weight_decay_factor_by_learning_rate: bool | None = None,
    clipvalue: Number | tuple[Number | None, Number | None] | None = None,
    gradient_scale: Number | npt.ArrayLike | None = None,
    sample_ids: npt.ArrayLike | None = None,
    gains: npt.ArrayLike | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the new `(table, momenta, velocities)`; the arguments are the op's.

    `sparse_update` says which rows make a step and what surrounds it, `adam` what the
    step is.

    Examples:
        >>> import numpy as np
        >>> table, zeros = np.ones((3, 1), np.float32), np.zeros((3, 1), np.float32)
        >>> w, m, v = sparse_adam_update(
        ...     table, zeros, zeros, np.array([2, -1, 2]), np.array([[1.], [9.], [3.]]),
        ...     learning_rate=0.1)
        >>> print(w.ravel(), m.ravel())
        [1.        1.        0.6837701] [0.        0.        0.4000001]
    """
    new_table, new_momenta, new_velocities = sparse_update(
        (table, momenta, velocities),
        ids,
        grads,
        adam(beta_1, beta_2, epsilon, sum_inside_sqrt),
        learning_rate=learning_rate,
        lazy=lazy_adam,
        use_gradient_accumulation=use_gradient_accumulation,
        clip_weight_min=clip_weight_min,
        clip_weight_max=clip_weight_max,
        weight_decay_factor=weight_decay_factor,
        multiply_weight_decay_factor_by_learning_rate=(
            multiply_weight_decay_factor_by_learning_rate
        ),
        clipvalue=clipvalue,
        gradient_scale=gradient_scale,
        sample_ids=sample_ids,
        gains=gains,
    )
    return new_table, new_momenta, new_velocities
