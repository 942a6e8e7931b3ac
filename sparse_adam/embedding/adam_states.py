"""The states of tables that Adam trains, one for each set of its slots."""

from typing import NamedTuple, TypeAlias

import jax

from sparse_adam.ops.sparse_adam import AdamState
from sparse_adam.rules import AdamRule


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


def adam_kind(rule: AdamRule) -> type[AnyAdamState]:
    """Returns what the state of a table is that is updated by this rule."""
    names = ("table", *(slot.name for slot in rule.slots))
    kinds = (AdamState, AdamRowState, AMSGradState, AMSGradRowState)
    return next(kind for kind in kinds if kind._fields == names)
