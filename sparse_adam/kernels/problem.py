"""What one update is asked to do: static facts, and the arrays it is done with.

`ops` makes a `Problem` from validated arguments; every implementation answers
`unsupported(problem)` about it before anything is traced, and then is called as
`update(state, batch, step, problem)`.
"""

import dataclasses
from typing import NamedTuple, TypeAlias

import jax
import numpy as np

from sparse_adam._types import Gains, Grads, Indices, Rate, Seeds
from sparse_adam.kernels.layout import PackedLayout

# Of plain storage `[V, D]` table, momenta, velocities; of packed storage its one array.
State: TypeAlias = tuple[jax.Array, ...]


class Batch(NamedTuple):
    """The occurrences: number i adds `gains[i] * grads[sources[i]]` to row `ids[i]`."""

    grads: Grads
    ids: Indices  # sorted, unless the implementation sorts; V for none
    sources: Indices  # -1 adds zero
    gains: Gains | None  # None: 1


class Step(NamedTuple):
    """The traced numbers of an update."""

    learning_rate: Rate
    seeds: Seeds | None  # of w, m, v, for stochastic rounding; None: to the nearest


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
    """One call of the update, without its values."""

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
    stochastic: bool = False  # rounding of bfloat16 arrays
    packed: bool = False

    @property
    def dtypes(self) -> tuple[np.dtype, np.dtype, np.dtype]:
        """Of w, m, v."""
        return self.table_dtype, self.momenta_dtype, self.velocities_dtype

    @property
    def layout(self) -> PackedLayout:
        """Of packed storage."""
        return PackedLayout(self.num_rows, self.dim, *self.dtypes)
