"""The named cases of the tests, and the arguments of an update for each."""

import zlib
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from benchmarks.cases import (
    BENCHMARKS,
    BFLOAT16,
    DISTRIBUTIONS,
    FLOAT32,
    MIXED,
    Case,
    dtype,
    ids,
)

__all__ = [
    "BENCHMARKS",
    "BFLOAT16",
    "CASES",
    "DISTRIBUTIONS",
    "FLOAT32",
    "MIXED",
    "Arrays",
    "Case",
    "State",
    "arrays",
    "ids",
]


GAINS = np.array([-1.5, -0.5, 0.5, 1.5], np.float32)
State: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]


class Arrays(NamedTuple):
    """NumPy arguments of a case; `weights` are `sample_ids` and `gains` by name."""

    state: State
    ids: np.ndarray
    grads: np.ndarray
    weights: dict[str, Any]


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
    table, momenta, velocities = (
        x.astype(dtype(name))
        for x, name in zip((table, momenta, velocities), case.dtypes, strict=False)
    )
    num_grads, weights = case.num_ids, {}
    if case.weighted:
        num_grads = case.num_ids // 2 + 1
        weights = {
            # One in eight or so is out of range.
            "sample_ids": rng.integers(-1, num_grads + 1, case.num_ids),
            "gains": rng.choice(GAINS, case.num_ids),
        }
    grads = (2 * rng.integers(-32, 32, (num_grads, case.dim)) + 1) / 16
    return Arrays(
        (table, momenta, velocities),
        ids(rng, case.distribution, case.num_rows, case.num_ids, case.repeats),
        grads.astype(dtype(case.dtypes[3])),
        weights,
    )
