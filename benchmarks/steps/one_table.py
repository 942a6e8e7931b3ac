"""One table and one id a sample: the update of the README, in a step around it."""

from typing import Any

from benchmarks.steps.model import Arrays, Feature, Functions, Model, Table


def one_table(cap: int, dim: int, batch: int) -> Model:
    """Returns the model: a table of `cap` rows, and `batch` ids."""
    return Model(
        {"table": Table(cap, dim)}, {"ids": Feature("table", (batch,))}, {}, {}, _loss
    )


def _loss(nn: Functions, weights: Arrays, activations: Arrays, inputs: Arrays) -> Any:
    """Returns something of which each row has a gradient, at next to no cost."""
    del nn, weights, inputs
    return (activations["ids"] ** 2).sum(1).mean()
