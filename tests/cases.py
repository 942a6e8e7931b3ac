"""Named cases of an update, and arrays for them: for the tests and the benchmarks."""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

DISTRIBUTIONS = (
    *("uniform", "equal", "distinct", "zipf", "padded", "wild", "sorted"),
    "repeated",
)
FLOAT32 = ("float32",) * 4
BFLOAT16 = ("bfloat16",) * 4
MIXED = ("float32", "bfloat16", "float32", "bfloat16")


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """A call of the op: sizes, the distribution of the ids, dtypes and options."""

    name: str
    num_rows: int  # V
    dim: int  # D
    num_ids: int  # N
    distribution: str = "uniform"
    dtypes: tuple[str, str, str, str] = FLOAT32  # table, momenta, velocities, grads
    weighted: bool = False  # gradients come by sample_ids and gains
    repeats: int = 4  # of each id, where the distribution is "repeated"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"{self.distribution=} must be one of {DISTRIBUTIONS}")


class Arrays(NamedTuple):
    """NumPy arguments of a case; `weights` are `sample_ids` and `gains` by name."""

    state: tuple[np.ndarray, np.ndarray, np.ndarray]
    ids: np.ndarray
    grads: np.ndarray
    weights: dict[str, np.ndarray]


CASES = (
    Case("default", 40, 128, 24),
    Case("one_row", 1, 128, 24),
    Case("one_id", 40, 128, 1),
    Case("equal", 40, 128, 24, "equal"),
    Case("distinct", 40, 128, 24, "distinct"),
    Case("zipf", 40, 128, 24, "zipf"),
    Case("padded", 40, 128, 24, "padded"),
    Case("wild", 40, 128, 24, "wild"),
    Case("sorted", 40, 128, 24, "sorted"),
    Case("weighted", 40, 128, 24, "zipf", weighted=True),
    Case("narrow", 40, 3, 24),
    Case("wide", 40, 256, 7),
    Case("bfloat16", 40, 16, 24, dtypes=BFLOAT16),
    Case("mixed", 40, 16, 24, dtypes=MIXED),
    Case("outside", 40, 128, 24, options={"sum_inside_sqrt": False}),
    Case("clip", 40, 128, 24, "zipf", options={"clipvalue": 1.5}),
    Case("clip_above", 40, 16, 24, "zipf", options={"clipvalue": (None, 0.5)}),
    Case("clip_below", 40, 16, 24, "zipf", options={"clipvalue": (-0.5, None)}),
    Case(
        "clip_weights",
        *(40, 128, 24),
        options={"clip_weight_min": -0.75, "clip_weight_max": 0.5},
    ),
    Case("decay", 40, 128, 24, options={"weight_decay_factor": 0.1}),
    Case(
        "decay_by_rate",
        *(40, 16, 24),
        options={
            "weight_decay_factor": 0.5,
            "multiply_weight_decay_factor_by_learning_rate": True,
        },
    ),
    Case("not_lazy", 40, 16, 24, options={"lazy_adam": False}),
    Case(
        "not_lazy_clip_without_zero",
        *(40, 16, 24),
        options={"lazy_adam": False, "clipvalue": (0.25, None)},
    ),
    Case(
        "not_lazy_all_options",
        *(40, 16, 24, "padded"),
        weighted=True,
        options={
            "lazy_adam": False,
            "sum_inside_sqrt": False,
            "clipvalue": 2.0,
            "weight_decay_factor": 0.01,
            "clip_weight_max": 1.0,
        },
    ),
    Case(
        "each_occurrence",
        *(40, 16, 64, "zipf"),
        options={"use_gradient_accumulation": False, "beta_2": 0.9},
    ),
    Case(
        "each_occurrence_all_options",
        *(40, 16, 24, "wild"),
        dtypes=MIXED,
        weighted=True,
        options={
            "use_gradient_accumulation": False,
            "sum_inside_sqrt": False,
            "weight_decay_factor": 0.125,
            "clip_weight_min": -2.0,
        },
    ),
    Case("no_memory", 40, 128, 24, "zipf", options={"beta_1": 0.0, "beta_2": 0.0}),
)

# What the benchmarks time; the tests try each of them in the small. The first two are
# the ones that the README speaks of.
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
    # The two of `--quick`.
    Case("quick", 100_000, 128, 8192, "zipf"),
    Case("quick_uniform", 100_000, 128, 8192),
)


def arrays(case: Case, seed: int = 0) -> Arrays:
    """Returns the arguments of `case`, the same ones at every call with this seed.

    Gradients are odd multiples of 1/16 and gains of 1/2, small enough for every sum of
    up to 10,000 of them to be exact in float32: what is compared is the update, and a
    gradient lost or added twice cannot hide in a tolerance.
    """
    rng = np.random.default_rng((seed, zlib.crc32(case.distribution.encode())))
    shape = (case.num_rows, case.dim)
    table = rng.standard_normal(shape)
    momenta = rng.standard_normal(shape)
    velocities = rng.uniform(0.25, 1, shape)
    if case.options.get("use_gradient_accumulation", True):
        velocities *= rng.random(shape) > 1 / 8
    state = tuple(
        x.astype(_dtype(name))
        for x, name in zip((table, momenta, velocities), case.dtypes, strict=False)
    )
    num_grads, weights = case.num_ids, {}
    if case.weighted:
        num_grads = case.num_ids // 2 + 1
        weights = {
            # One in eight or so is out of range.
            "sample_ids": rng.integers(-1, num_grads + 1, case.num_ids),
            "gains": rng.choice(np.float32([-1.5, -0.5, 0.5, 1.5]), case.num_ids),
        }
    grads = (2 * rng.integers(-32, 32, (num_grads, case.dim)) + 1) / 16
    return Arrays(
        state,
        ids(rng, case.distribution, case.num_rows, case.num_ids, case.repeats),
        grads.astype(_dtype(case.dtypes[3])),
        weights,
    )


def ids(
    rng: np.random.Generator,
    distribution: str,
    num_rows: int,
    num_ids: int,
    repeats: int = 4,
) -> np.ndarray:
    """Draws `[N]` ids: int32, or int64 when some of them are wild."""
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
            strays = [-1, num_rows, -(2**31), 2**31 - 1, 2**32, -(2**32), 2**40]
            stray = rng.random(num_ids) < 0.5
            drawn[stray] = rng.choice(np.int64(strays), int(stray.sum()))
            return drawn
        case "sorted":
            drawn.sort()
    return drawn.astype(np.int32)


def _dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
