"""The numbers of a case: a state as after some steps, and batches of ids and gradients.

Gradients are odd multiples of 1/16 and gains of 1/2, so that float32 holds every sum of
them exactly, in any order: a gradient that is lost or added twice cannot hide among
roundings.
"""

import zlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sparse_adam.check.case import Case

# Out of the table, and out of what a careless product of them would hold.
STRAYS = (-1, -(2**31), 2**31 - 1)
GAINS = np.array([-1.5, -0.5, 0.5, 1.5], np.float32)


class Batch(NamedTuple):
    """What one step is called with; `weights` are `sample_ids` and `gains` by name."""

    ids: np.ndarray  # int32 [N]
    grads: np.ndarray  # [B, D]
    weights: dict[str, np.ndarray]


def state(case: Case) -> tuple[np.ndarray, ...]:
    """Returns the table `[V, D]` and its slots, `[V, D]`, or float32 `[V]` per row."""
    rng = _random(case, 0)
    shape = (case.num_rows, case.dim)
    table, slot_dtype, _ = (jnp.dtype(name) for name in case.dtypes)
    arrays = [rng.standard_normal(shape).astype(table)]
    for slot in case.rule.slots:
        dtype = np.dtype(np.float32) if slot.per == "row" else slot_dtype
        size = shape[:1] if slot.per == "row" else shape
        if slot.name in ("velocities", "accumulators"):
            drawn = rng.uniform(0.25, 4, size)
        elif slot.name == "steps":
            drawn = rng.integers(0, 50, size)
        else:
            drawn = rng.standard_normal(size)
        arrays.append(np.asarray(drawn).astype(dtype))
    return tuple(arrays)


def batch(case: Case, step: int) -> Batch:
    """Returns the batch of a step, the same one at every call."""
    rng = _random(case, 1 + step)
    num_grads, weights = case.num_ids, {}
    if case.weighted:
        num_grads = case.num_ids // 2 + 1
        weights = {  # some are out of range
            "sample_ids": rng.integers(-1, num_grads + 1, case.num_ids, np.int32),
            "gains": rng.choice(GAINS, case.num_ids),
        }
    grads = (2 * rng.integers(-32, 32, (num_grads, case.dim)) + 1) / 16
    if case.ids == "nan":
        grads[0] = np.nan
    grads = grads.astype(jnp.dtype(case.dtypes[2]))
    return Batch(_ids(rng, case), grads, weights)


def _ids(rng: np.random.Generator, case: Case) -> np.ndarray:
    rows, count = case.num_rows, case.num_ids
    # Small numbers often, so that rows repeat; scattered over the table.
    drawn = np.floor(rows ** rng.random(count)).astype(np.int64) - 1
    drawn = rng.permutation(rows)[np.clip(drawn, 0, rows - 1)]
    match case.ids:
        case "hot":  # all but one in eight
            drawn = np.where(rng.random(count) < 1 / 8, drawn, drawn[0])
        case "distinct":  # -1 where there are more ids than rows
            drawn = np.resize(rng.permutation(rows), count)
            drawn[rows:] = -1
        case "padded":
            drawn[rng.random(count) < 0.5] = -1
        case "wild":
            stray = rng.random(count) < 0.5
            drawn[stray] = rng.choice([*STRAYS, rows], int(stray.sum()))
        case "sorted":
            drawn.sort()
    return drawn.astype(np.int32)


def _random(case: Case, stream: int) -> np.random.Generator:
    return np.random.default_rng((stream, zlib.crc32(case.ids.encode()), case.seed))


def mean_case(case: Case) -> tuple[tuple[np.ndarray, ...], Batch]:
    """Returns a state of equal rows and a batch that moves all of them alike.

    The results before rounding are then one number for each array, between two
    neighbours in bfloat16.
    """
    dtype: Any = jnp.dtype(case.dtypes[0])
    shape = (case.num_rows, case.dim)
    arrays = [np.full(shape, 1, dtype)]
    arrays += [np.full(shape, 0.5, dtype) for _ in case.rule.slots]
    grads = np.full((case.num_ids, case.dim), 0.75, np.float32)
    ids = np.arange(case.num_ids, dtype=np.int32) % case.num_rows
    return tuple(arrays), Batch(ids, grads.astype(dtype), {})
