"""The states of tables that Adam trains, one for each set of its slots."""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax

from sparse_adam.ops.sparse_adam import AdamState


class AdamRowState(NamedTuple):
    """A table, its two Adam slots, and the steps that each row has made."""

    table: jax.Array  # [V, D]
    momenta: jax.Array  # [V, D], first moment m
    velocities: jax.Array  # [V, D], second moment v
    steps: jax.Array  # [V]


class AMSGradState(NamedTuple):
    """A table, its two Adam slots, and the largest second moment of each weight."""

    table: jax.Array  # [V, D]
    momenta: jax.Array  # [V, D], first moment m
    velocities: jax.Array  # [V, D], second moment v
    maxima: jax.Array  # [V, D], largest v


class AMSGradRowState(NamedTuple):
    """The arrays of AMSGrad, and the steps that each row has made."""

    table: jax.Array  # [V, D]
    momenta: jax.Array  # [V, D], first moment m
    velocities: jax.Array  # [V, D], second moment v
    maxima: jax.Array  # [V, D], largest v
    steps: jax.Array  # [V]


AnyAdamState: TypeAlias = AdamState | AdamRowState | AMSGradState | AMSGradRowState


def adam_state(slot_names: Sequence[str], arrays: Sequence[jax.Array]) -> AnyAdamState:
    """Returns a table and its slots, which have these names, under them."""
    names = ("table", *slot_names)
    kinds = (AdamState, AdamRowState, AMSGradState, AMSGradRowState)
    return next(kind for kind in kinds if kind._fields == names)(*arrays)
