"""The named cases that the benchmarks time, and the ids of their batches."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

DISTRIBUTIONS = (
    *("uniform", "equal", "distinct", "zipf", "padded", "wild", "sorted"),
    "repeated",
)
# The dtypes of the table, the momenta, the velocities and the gradients.
Dtypes = tuple[str, str, str, str]
FLOAT32: Dtypes = ("float32", "float32", "float32", "float32")
BFLOAT16: Dtypes = ("bfloat16", "bfloat16", "bfloat16", "bfloat16")
MIXED: Dtypes = ("float32", "bfloat16", "float32", "bfloat16")


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """Describes a call of the update: its sizes, ids, dtypes and options."""

    name: str
    num_rows: int  # V
    dim: int  # D
    num_ids: int  # N
    distribution: str = "uniform"
    dtypes: Dtypes = FLOAT32
    weighted: bool = False  # gradients come by sample_ids and gains
    repeats: int = 4  # of each id, where the distribution is "repeated"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"{self.distribution=} must be one of {DISTRIBUTIONS}")


# The tests run each of these cases at a small size; the first two are in how_fast.md.
BENCHMARKS = (
    Case("zipf", 1_000_000, 128, 65_536, "zipf"),
    Case("uniform", 1_000_000, 128, 65_536),
    Case("padded", 1_000_000, 128, 65_536, "padded"),
    Case("sorted", 1_000_000, 128, 65_536, "sorted"),
    Case("equal", 1_000_000, 128, 65_536, "equal"),
    Case("small_batch", 1_000_000, 128, 1024),
    Case("small_batch_zipf", 1_000_000, 128, 1024, "zipf"),
    Case("dim_64", 1_000_000, 64, 65_536),
    Case("dim_64_zipf", 1_000_000, 64, 65_536, "zipf"),
    Case("dim_16", 1_000_000, 16, 65_536),
    Case("dim_16_zipf", 1_000_000, 16, 65_536, "zipf"),
    Case("bfloat16", 1_000_000, 128, 65_536, "zipf", dtypes=BFLOAT16),
    Case(
        "all_options",
        *(1_000_000, 128, 65_536, "zipf"),
        options={
            "sum_inside_sqrt": False,
            "clipvalue": 1.5,
            "weight_decay_factor": 0.01,
            "clip_weight_max": 2.0,
        },
    ),
    Case(
        "each_occurrence",
        *(1_000_000, 128, 65_536, "zipf"),
        options={"use_gradient_accumulation": False},
    ),
    Case("all_rows", 250_000, 128, 65_536, "zipf", options={"lazy_adam": False}),
    # The two cases of `--quick`.
    Case("quick", 100_000, 128, 8192, "zipf"),
    Case("quick_uniform", 100_000, 128, 8192),
)


def dtype(name: str) -> np.dtype:
    """Returns the NumPy dtype of this name; NumPy itself does not know bfloat16."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def ids(
    rng: np.random.Generator,
    distribution: str,
    num_rows: int,
    num_ids: int,
    repeats: int = 4,
) -> np.ndarray:
    """Draws the ids of a batch, `[N]`, as int32.

    The "wild" distribution gives int64, since some of its ids need it.
    """
    drawn = rng.integers(0, num_rows, num_ids)
    match distribution:
        case "equal":
            drawn[:] = drawn[:1]
        case "distinct":  # those that find no row are out of range
            drawn = rng.permutation(max(num_rows, num_ids))[:num_ids]
        case "zipf":
            rank = np.arange(1, num_rows + 1)
            share = np.cumsum(rank**-1.05)
            rank = np.searchsorted(share / share[-1], rng.random(num_ids))
            # Hot rows are scattered, and are the same ones in every batch.
            scattered = np.random.default_rng(num_rows).permutation(num_rows)
            drawn = scattered[np.minimum(rank, num_rows - 1)]
        case "repeated":
            distinct = rng.permutation(num_rows)[: max(1, num_ids // repeats)]
            drawn = rng.permutation(np.resize(distinct, num_ids))
        case "padded":
            drawn[rng.random(num_ids) < 0.5] = -1
        case "wild":
            # Narrowed to 32 bits, all but the first four would be rows of the table.
            strays = (-1, num_rows, -(2**31), 2**31 - 1, 2**32, -(2**32), 2**40)
            stray = rng.random(num_ids) < 0.5
            drawn[stray] = rng.choice(np.array(strays, np.int64), int(stray.sum()))
            return drawn
        case "sorted":
            drawn.sort()
    return drawn.astype(np.int32)
