"""Six tables of one width beside a small network: what a stack is for.

Two features have three ids a sample, of which the mean is taken; four have one id.
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

PLACES = (3, 3, 1, 1, 1, 1)  # ids of a sample, by table
WIDTHS = (64, 1)  # of the network: small, since a large one takes long to compile


def six_tables(cap: int, dim: int, batch: int) -> Model:
    """Returns the model: six tables of `cap` rows, ten ids a sample in all."""
    names = [f"table_{at}" for at in range(len(PLACES))]
    return Model(
        tables={name: Table(cap, dim) for name in names},
        features={
            name: Feature(name, (batch,), places)
            for name, places in zip(names, PLACES, strict=True)
        },
        weights=layers("top", (len(names) * dim, *WIDTHS)),
        inputs={"labels": (batch,)},
        loss=_loss,
        combiner="mean",
    )


def _loss(nn: Functions, weights: Arrays, activations: Arrays, inputs: Arrays) -> Any:
    """Returns the mean cross entropy of clicked or not."""
    x = nn.concatenate([*activations.values()], 1)
    logits = run_layers(nn, weights, "top", x)[:, 0]
    return (nn.softplus(logits) - inputs["labels"] * logits).mean()
