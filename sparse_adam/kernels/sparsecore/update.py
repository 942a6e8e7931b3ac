"""The update by SparseCores: what it cannot do, what it moves, and the two calls."""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from sparse_adam.kernels.problem import Batch, Problem, State, Step
from sparse_adam.kernels.sparsecore.call import Inputs, Kernel
from sparse_adam.kernels.sparsecore.config import (
    MAX_BYTES,
    MAX_DIM,
    WINDOW,
    Config,
    absent,
    least_width,
    wrong_chip,
)
from sparse_adam.kernels.sparsecore.records import TILE, Storage
from sparse_adam.kernels.sparsecore.work import share_out, split_runs
from sparse_adam.kernels.tiles import LANES

_NAME = "sparse_adam_sparsecore"
_NAME_OF_SECOND_CALL = "sparse_adam_split_runs"


def unsupported(problem: Problem) -> str | None:
    """Says why this kernel cannot do `problem`, or None when it can."""
    if not problem.lazy:
        return "lazy_adam=False updates every row; this kernel visits looked-up rows"
    return (_packed if problem.packed else _plain)(problem) or wrong_chip()


def _plain(problem: Problem) -> str | None:
    dim, num_rows = problem.dim, problem.num_rows
    if dim % LANES or dim > MAX_DIM:
        return f"D={dim} is not a multiple of {LANES} up to {MAX_DIM}"
    if dim > LANES and num_rows % TILE:
        return (
            f"V={num_rows} is not a multiple of {TILE}, so the rows of a table with "
            f"D={dim} > {LANES} cannot be seen as lines of {LANES} lanes"
        )
    if 4 * num_rows * dim > MAX_BYTES:
        return f"V={num_rows} rows of D={dim} are more than SparseCore's 16 GiB a table"
    for name in ("table", "momenta", "velocities"):
        dtype = getattr(problem, f"{name}_dtype")
        if dtype != np.float32:
            return f"{name} is {dtype}; indirect streams move words of 32 bits"
    return None


def _packed(problem: Problem) -> str | None:
    layout, least = problem.layout, least_width()
    if LANES % layout.stride:
        return (
            f"packed rows of D={problem.dim} stand {layout.stride} words apart, which "
            f"does not divide the {LANES} of a line, so no stream can fetch one alone"
        )
    if layout.stride < least:
        return (
            f"packed rows of D={problem.dim} stand {layout.stride} words apart, fewer "
            f"than the {least} that streams and vectors take"
        )
    if layout.num_bytes > MAX_BYTES:
        return f"{layout.num_bytes} bytes are more than SparseCore's 16 GiB an array"
    return None


def bytes_moved(num_ids: int, num_unique: int, problem: Problem) -> int:
    """HBM bytes of one update: gradients once, each plane in and out, indices.

    Indices are two words an occurrence, read and written when they are filled up to
    whole chunks, counted, and then read once for each record of a row.
    """
    storage = Storage.of(problem)
    row = storage.blocks * storage.width
    words = 5 + 2 * storage.blocks
    return 4 * (num_ids * (row + words) + 2 * storage.planes * num_unique * row)


def sparsecore_update(
    state: State,
    batch: Batch,
    step: Step,
    problem: Problem,
    config: Config | None = None,
) -> State:
    """Updates the rows `batch.ids` (sorted; V for none) in place.

    Where no TPU is in scope while this is traced, the kernel is interpreted.
    """
    operands, storage = (state, batch, step), Storage.of(problem)
    update = functools.partial(_update, problem=problem, storage=storage)
    interpreted = functools.partial(
        update, config=config or Config.interpreted(problem.num_ids), interpret=True
    )
    if absent():
        return interpreted(*operands)
    if config is not None:
        config.check(problem)
    native = functools.partial(
        update, config=config or Config.choose(problem), interpret=False
    )
    return lax.platform_dependent(*operands, tpu=native, default=interpreted)


def _update(
    state: State,
    batch: Batch,
    step: Step,
    *,
    problem: Problem,
    storage: Storage,
    config: Config,
    interpret: bool,
) -> State:
    num_rows, num_ids, workers = problem.num_rows, problem.num_ids, config.workers
    kernel = Kernel(
        storage,
        problem.hyper,
        problem.accumulate,
        config,
        cost=pl.CostEstimate(
            flops=24 * num_ids * problem.dim,
            transcendentals=num_ids * problem.dim,
            bytes_accessed=bytes_moved(num_ids, num_ids, problem),
        ),
        interpret=interpret,
    )
    grads, sources = storage.lay_out(batch.grads, batch.sources)
    work = share_out(
        *(batch.ids, sources, batch.gains, num_rows, config, workers),
        whole_runs=not problem.accumulate,
    )
    rate = jnp.full((WINDOW,), step.learning_rate)
    seeds = () if step.seeds is None else (jnp.pad(step.seeds, (0, WINDOW - 3)),)
    records = storage.records(state)
    records, sums = kernel(Inputs(work, rate, seeds, grads), records, name=_NAME)
    if problem.accumulate:
        # The runs that were split: those that exist to the front, still ascending.
        split_ids = split_runs(work, num_rows, workers)
        places = lax.iota(jnp.int32, split_ids.size)
        split_ids, places = lax.sort((split_ids, places), num_keys=2, is_stable=False)
        work = share_out(split_ids, places, None, num_rows, config, workers=1)
        inputs = Inputs(work, rate, seeds, sums.reshape(-1, storage.width))
        records, _ = kernel(inputs, records, name=_NAME_OF_SECOND_CALL)
    return storage.arrays(records)
