"""DLRM-v2, the recommender of MLPerf: 26 tables, and a cross network over their rows.

Sizes of the tables, ids of a sample, and the layers are those that MLPerf's reference
trains with: github.com/mlcommons/training, recommendation_v2/torchrec_dlrm/README.MD
("Running the MLPerf DLRM v2 benchmark": `num_embeddings_per_feature`,
`multi_hot_sizes`, `dense_arch_layer_sizes`, `over_arch_layer_sizes`, `dcn_num_layers`,
`dcn_low_rank_dim`). Tables are cut at `cap` rows, so that they fit. MLPerf trains with
Adagrad; here it is Adam.
"""

from dataclasses import dataclass
from functools import partial
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

ROWS = (
    *(40_000_000, 39_060, 17_295, 7424, 20_265, 3, 7122, 1543, 63, 40_000_000),
    *(3_067_956, 405_282, 10, 2209, 11_938, 155, 4, 976, 14, 40_000_000),
    *(40_000_000, 40_000_000, 590_152, 12_973, 108, 36),
)
# fmt: off
MULTI_HOT = (
    3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1,
)
# fmt: on
ONE_HOT = (1,) * len(ROWS)
NUMBERS = 13  # of a sample, besides its ids


@dataclass(frozen=True)
class Dense:
    """The widths of the dense part."""

    bottom: tuple[int, ...]  # of the numbers; a last layer of width D follows
    rank: int  # of the matrices of the cross network
    crosses: int  # its layers
    top: tuple[int, ...]  # the last one is 1


DENSE = {
    "mlperf": Dense((512, 256), 512, 3, (1024, 1024, 512, 256, 1)),
    # So small that a CPU spends its time on the tables.
    "light": Dense((64,), 16, 1, (64, 1)),
}


def dlrm(
    cap: int, dim: int, batch: int, *, places: tuple[int, ...], dense: str
) -> Model:
    """Returns the model.

    Args:
        cap: the most rows of a table.
        dim: D of all tables.
        batch: samples of a batch.
        places: ids of a sample, by table: `ONE_HOT` or `MULTI_HOT`. Fewer of them are
            for the first tables alone.
        dense: a name of `DENSE`.
    """
    sizes = DENSE[dense]
    names = [f"table_{at:02}" for at in range(len(places))]
    width = (1 + len(names)) * dim
    weights = layers("bottom", (NUMBERS, *sizes.bottom, dim))
    for at in range(sizes.crosses):
        weights |= layers(f"cross{at}", (width, sizes.rank, width))
    weights |= layers("top", (width, *sizes.top))
    return Model(
        tables={
            name: Table(min(rows, cap), dim)
            for name, rows in zip(names, ROWS, strict=False)
        },
        features={
            name: Feature(name, (batch,), count)
            for name, count in zip(names, places, strict=True)
        },
        weights=weights,
        inputs={"numbers": (batch, NUMBERS), "labels": (batch,)},
        loss=partial(_loss, sizes.crosses),
    )


def _loss(
    crosses: int, nn: Functions, weights: Arrays, activations: Arrays, inputs: Arrays
) -> Any:
    """Returns the mean cross entropy of clicked or not."""
    bottom = nn.relu(run_layers(nn, weights, "bottom", inputs["numbers"]))
    first = nn.concatenate([bottom, *activations.values()], 1)
    x = first
    for at in range(crosses):
        low = x @ weights[f"cross{at}_0"] + weights[f"cross{at}_0_bias"][None]
        full = low @ weights[f"cross{at}_1"] + weights[f"cross{at}_1_bias"][None]
        x = first * full + x
    logits = run_layers(nn, weights, "top", x)[:, 0]
    return (nn.softplus(logits) - inputs["labels"] * logits).mean()
