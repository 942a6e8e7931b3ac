"""What a model is: tables, features, and a loss of what was looked up."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod, sqrt
from typing import Any, NamedTuple

import numpy as np

from sparse_adam._types import Combiner

SMALL = 0.01  # standard deviation of the first rows of a table
BLOCK = 4099  # rows that are drawn; a larger table repeats them


class Functions(NamedTuple):
    """What a loss may call besides the operators and methods of its arrays.

    They are those of `jax.nn` and `jax.numpy`, or of torch.
    """

    relu: Callable[[Any], Any]
    softplus: Callable[[Any], Any]
    logsumexp: Callable[[Any, int], Any]  # of an array, along an axis
    concatenate: Callable[[list[Any], int], Any]  # of arrays, along an axis


Arrays = Mapping[str, Any]
# The loss, a scalar, of the dense weights, the activations and the other inputs.
Loss = Callable[[Functions, Arrays, Arrays, Arrays], Any]


class Table(NamedTuple):
    """A table `[rows, dim]`."""

    rows: int
    dim: int


class Feature(NamedTuple):
    """Samples that are looked up in a table: the rows of each are combined."""

    table: str
    samples: tuple[int, ...]  # the shape of the activations before D
    places: int = 1  # ids of a sample

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the ids, `[..., places]`."""
        return (*self.samples, self.places)


@dataclass(frozen=True)
class Model:
    """A model with an Adam of its own for the tables and for the dense weights."""

    tables: Mapping[str, Table]
    features: Mapping[str, Feature]
    weights: Mapping[str, tuple[int, ...]]  # shapes of the dense part
    inputs: Mapping[str, tuple[int, ...]]  # shapes of float32 inputs besides the ids
    loss: Loss
    combiner: Combiner = "sum"  # of the rows of a sample; or "mean"

    @property
    def num_rows(self) -> int:
        """Returns V of all tables together."""
        return sum(table.rows for table in self.tables.values())

    @property
    def num_ids(self) -> int:
        """Returns the ids of a batch, of all features together."""
        return sum(prod(feature.shape) for feature in self.features.values())

    def first_table(self, name: str) -> np.ndarray:
        """Returns the first weights of a table, the same ones at every call."""
        rows, dim = self.tables[name]
        rng = np.random.default_rng(list(self.tables).index(name))
        block = SMALL * rng.standard_normal((min(BLOCK, rows), dim), np.float32)
        return np.resize(block, (rows, dim))

    def first_weights(self) -> dict[str, np.ndarray]:
        """Returns the first dense weights: zeros for vectors, He's for matrices."""
        rng = np.random.default_rng(0)
        return {
            name: np.zeros(shape, np.float32)
            if len(shape) == 1
            else rng.standard_normal(shape, np.float32) * np.float32(sqrt(2 / shape[0]))
            for name, shape in self.weights.items()
        }


class Batch(NamedTuple):
    """The inputs of a step."""

    ids: dict[str, Any]  # int32, `Feature.shape` each
    inputs: dict[str, Any]  # float32; "labels" are 0 or 1


def draw_batch(model: Model, seed: int) -> Batch:
    """Draws a batch, the same one at every call: ids are log-uniform."""
    rng = np.random.default_rng(seed)
    ids = {
        name: log_uniform(model.tables[feature.table].rows, feature.shape, rng)
        for name, feature in model.features.items()
    }
    inputs = {
        name: rng.integers(0, 2, shape).astype(np.float32)
        if name == "labels"
        else rng.standard_normal(shape, np.float32)
        for name, shape in model.inputs.items()
    }
    return Batch(ids, inputs)


def log_uniform(
    rows: int, shape: tuple[int, ...], rng: np.random.Generator
) -> np.ndarray:
    """Draws ids whose logarithm is uniform: row k with about 1 / (k + 1) of a share."""
    drawn = np.exp(rng.random(shape) * np.log(rows + 1)).astype(np.int32)
    return np.clip(drawn - 1, 0, rows - 1)


def layers(name: str, widths: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a network of these widths, the first that of its input."""
    shapes: dict[str, tuple[int, ...]] = {}
    for at, (width, following) in enumerate(pairwise(widths)):
        shapes[f"{name}_{at}"] = (width, following)
        shapes[f"{name}_{at}_bias"] = (following,)
    return shapes


def run_layers(nn: Functions, weights: Arrays, name: str, x: Any) -> Any:
    """Runs a network of `layers`; its last layer is linear."""
    count = sum(key.startswith(f"{name}_") for key in weights) // 2
    for at in range(count):
        x = x @ weights[f"{name}_{at}"] + weights[f"{name}_{at}_bias"][None]
        if at < count - 1:
            x = nn.relu(x)
    return x
