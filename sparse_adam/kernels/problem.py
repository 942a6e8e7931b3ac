"""What one update is asked to do, in static facts: shapes, dtypes, options.

`ops` makes a `Problem` from validated arguments; every implementation answers
`unsupported(problem)` about it before anything is traced.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class Hyperparams:
    """The static numbers of the update. The learning rate is traced, so not here.

    A clip bound of None leaves that side open; a decay factor of 0 is no decay.
    """

    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-7
    sum_inside_sqrt: bool = True
    clip_weight_min: float | None = None
    clip_weight_max: float | None = None
    weight_decay_factor: float = 0.0
    multiply_weight_decay_factor_by_learning_rate: bool = False
    clip_gradient_min: float | None = None
    clip_gradient_max: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """One call of `sparse_adam_update`, without its values."""

    num_rows: int  # V
    dim: int  # D
    num_ids: int  # N, occurrences, padding included
    num_grads: int  # B, rows of the gradient array; N unless sample_ids are given
    table_dtype: np.dtype
    momenta_dtype: np.dtype
    velocities_dtype: np.dtype
    grads_dtype: np.dtype
    weighted: bool  # sample_ids or gains given
    lazy: bool
    accumulate: bool
    hyper: Hyperparams
