"""word2vec: skip-gram with negative samples, and no dense part.

T. Mikolov et al., "Distributed representations of words and phrases and their
compositionality" (2013).
"""

from typing import Any

from benchmarks.steps.model import Arrays, Feature, Functions, Model, Table

NEGATIVES = 8  # of each pair


def word2vec(cap: int, dim: int, batch: int) -> Model:
    """Returns the model: two tables of `cap` words, `batch` pairs."""
    tables = {"centre": Table(cap, dim), "context": Table(cap, dim)}
    features = {
        "centre": Feature("centre", (batch,)),
        "context": Feature("context", (batch,)),
        "negative": Feature("context", (batch, NEGATIVES)),
    }
    return Model(tables, features, {}, {}, _loss)


def _loss(nn: Functions, weights: Arrays, activations: Arrays, inputs: Arrays) -> Any:
    """Returns the mean loss of a pair: small where its words agree, negatives not."""
    del weights, inputs
    centre, negative = activations["centre"], activations["negative"]
    attract = nn.softplus(-(centre * activations["context"]).sum(1))
    repel = nn.softplus((centre[:, None] * negative).sum(2)).sum(1)
    return (attract + repel).mean()
