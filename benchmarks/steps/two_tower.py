"""A two-tower recommender: a user with a history on one side, an item on the other.

The history and the item share a table, so one update sums the gradients of both. The
other items of the batch are the negatives, as in X. Yi et al., "Sampling-bias-corrected
neural modeling for large corpus item recommendations" (2019).
"""

from typing import Any

from benchmarks.steps.model import (
    Arrays,
    Feature,
    Functions,
    Model,
    Table,
    layers,
    run_layers,
)

HISTORY = 20  # items of a sample
HIDDEN = 64
CATEGORIES = 1000


def two_tower(cap: int, dim: int, batch: int) -> Model:
    """Returns the model: `cap` users, half as many items, categories of width D / 4."""
    tables = {
        "user": Table(cap, dim),
        "item": Table(max(1, cap // 2), dim),
        "category": Table(min(CATEGORIES, cap), max(1, dim // 4)),
    }
    features = {
        "user": Feature("user", (batch,)),
        "history": Feature("item", (batch,), HISTORY),
        "item": Feature("item", (batch,)),
        "category": Feature("category", (batch,)),
    }
    weights = layers("user", (2 * dim, HIDDEN, dim))
    weights |= layers("item", (dim + tables["category"].dim, HIDDEN, dim))
    return Model(tables, features, weights, {}, _loss)


def _loss(nn: Functions, weights: Arrays, activations: Arrays, inputs: Arrays) -> Any:
    """Returns the mean over users of -log of the share of their own item."""
    del inputs
    user = nn.concatenate([activations["user"], activations["history"]], 1)
    item = nn.concatenate([activations["item"], activations["category"]], 1)
    users = run_layers(nn, weights, "user", user)
    items = run_layers(nn, weights, "item", item)
    own = (users * items).sum(1)
    return (nn.logsumexp(users @ items.T, 1) - own).mean()
