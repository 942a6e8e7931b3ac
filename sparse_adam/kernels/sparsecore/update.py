"""The update by SparseCores: what it cannot do, what it moves, and the two calls."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from sparse_adam.kernels.costs import cost_estimate
from sparse_adam.kernels.sparsecore.accumulate import Accumulate
from sparse_adam.kernels.sparsecore.call import SubcoreProgram
from sparse_adam.kernels.sparsecore.config import (
    WINDOW,
    Config,
    unsupported_layout,
    wrong_chip,
)
from sparse_adam.kernels.sparsecore.memory import Operands, SubcoreScratch
from sparse_adam.kernels.sparsecore.occurrences import EachOccurrence
from sparse_adam.kernels.sparsecore.records import RowRecords, records_of
from sparse_adam.kernels.sparsecore.shim import Interpreted, Native
from sparse_adam.kernels.sparsecore.work import share_out, split_runs
from sparse_adam.kernels.spec import SortedBatch, State, StepScalars, UpdateSpec
from sparse_adam.kernels.tiles import SUBLANES
from sparse_adam.rules import check_rule

_NAME = "sparse_adam_sparsecore"
_NAME_OF_SECOND_CALL = "sparse_adam_split_runs"


def unsupported(spec: UpdateSpec) -> str | None:
    """Says why this kernel cannot do an update, or returns None when it can."""
    if not spec.lazy:
        return "lazy=False steps every row; this kernel visits looked-up rows"
    facts = check_rule(spec.rule)
    if facts.per_row or facts.whole_rows:
        return "its rule has numbers of whole rows; this kernel sees vectors of a few"
    if facts.beyond_subcores:
        return (
            f"its rule uses {', '.join(facts.beyond_subcores)}, which a vector subcore "
            "does not have"
        )
    return unsupported_layout(spec.layout, spec.array_names) or wrong_chip()


def bytes_moved(num_ids: int, num_unique: int, spec: UpdateSpec) -> int:
    """Returns the HBM bytes: gradients once, each plane in and out, indices.

    Indices are two words an occurrence, read and written when they are filled up to
    whole chunks, counted, and then read once for each record of a row.
    """
    records = records_of(spec.layout)
    row = records.blocks * records.width
    words = 5 + 2 * records.blocks
    return 4 * (num_ids * (row + words) + 2 * records.planes * num_unique * row)


def sparsecore_update(
    state: State,
    batch: SortedBatch,
    scalars: StepScalars,
    spec: UpdateSpec,
    config: Config | None = None,
    *,
    interpret: bool = False,
) -> State:
    """Updates the rows `batch.ids` (sorted; V for none) in place."""
    if config is None and interpret:
        config = Config.interpreted(spec.num_ids)
    config = (config or Config()).completed(spec)
    num_rows, workers = spec.num_rows, config.workers
    layout_records = records_of(spec.layout)
    program = _program(spec, config, spec.num_ids)
    grads, sources = layout_records.lay_out(batch.grads, batch.sources)
    work = share_out(
        *(batch.ids, sources, batch.gains, num_rows, config, workers),
        whole_runs=not spec.accumulate,
    )
    numbers = _operand(scalars.numbers, batch)
    seeds = () if scalars.seeds is None else (_operand(scalars.seeds, batch),)
    records = layout_records.records(state)
    state_and_sums = records, _no_sums(records, layout_records, config)
    records, sums = program.run(
        *((work, numbers, seeds, grads), state_and_sums),
        name=_NAME,
        interpret=interpret,
    )
    if spec.accumulate:
        # The runs that were split: those that exist to the front, still ascending.
        split_ids = split_runs(work, num_rows, workers)
        places = lax.iota(jnp.int32, split_ids.size)
        split_ids, places = lax.sort((split_ids, places), num_keys=2, is_stable=False)
        work = share_out(split_ids, places, None, num_rows, config, workers=1)
        grads = sums.reshape(-1, layout_records.width)
        program = _program(spec, config, split_ids.size)
        state_and_sums = records, _no_sums(records, layout_records, config)
        records, _ = program.run(
            *((work, numbers, seeds, grads), state_and_sums),
            name=_NAME_OF_SECOND_CALL,
            interpret=interpret,
        )
    return layout_records.arrays(records)


def _program(spec: UpdateSpec, config: Config, num_ids: int) -> SubcoreProgram:
    """Returns the program that makes a step for each row, or each occurrence."""
    records = records_of(spec.layout)
    kind = Accumulate if spec.accumulate else EachOccurrence

    def body(on: Native | Interpreted, operands: tuple, scratch: Any) -> None:
        kind(on, Operands(*operands), scratch, records, config, spec).run()

    return SubcoreProgram(
        body,
        SubcoreScratch.types(config, records, spec.accumulate),
        config,
        records.keeps_tiles,
        cost_estimate(spec, num_ids, bytes_moved(num_ids, num_ids, spec)),
    )


def _no_sums(state: State, records: RowRecords, config: Config) -> jax.Array:
    rows = pl.cdiv(2 * config.workers, SUBLANES) * SUBLANES
    size = rows * records.blocks * records.width
    return jnp.zeros_like(state[0], jnp.float32, shape=(size,))


def _operand(numbers: jax.Array, batch: SortedBatch) -> jax.Array:
    """Returns a few numbers as an operand `[WINDOW]` of the kernel.

    In a loop, libtpu's compiler dies of an operand that is constant, such as a learning
    rate that is. No id is negative, which it does not know: to it, nothing is constant.
    """
    padded = jnp.pad(numbers, (0, WINDOW - numbers.size))
    return jnp.where(batch.ids[0] < 0, 0, padded)
