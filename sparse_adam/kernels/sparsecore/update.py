"""The update by SparseCores: what it cannot do, what it moves, and the two calls."""

import jax
import jax.numpy as jnp
from jax import lax

from sparse_adam.kernels.costs import cost_estimate, unsupported_rows
from sparse_adam.kernels.layout import PackedLayout
from sparse_adam.kernels.sparsecore.call import Inputs, SubcoreKernel
from sparse_adam.kernels.sparsecore.config import (
    MAX_BYTES,
    MAX_DIM,
    WINDOW,
    Config,
    least_width,
    wrong_chip,
)
from sparse_adam.kernels.sparsecore.records import records_of
from sparse_adam.kernels.sparsecore.work import share_out, split_runs
from sparse_adam.kernels.spec import SortedBatch, State, StepScalars, UpdateSpec
from sparse_adam.kernels.tiles import LANES, SUBLANES
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
    return _unsupported_layout(spec) or wrong_chip()


def _unsupported_layout(spec: UpdateSpec) -> str | None:
    layout, dim = spec.layout, spec.dim
    if layout.num_bytes // len(layout.shapes) > MAX_BYTES:
        return f"V={spec.num_rows} rows of D={dim} are more than 16 GiB an array"
    if isinstance(layout, PackedLayout):
        stride, least = layout.stride, least_width()
        if LANES % stride:
            return (
                f"packed rows of D={dim} stand {stride} words apart, which does not "
                f"divide the {LANES} of a line, so no stream can fetch one alone"
            )
        if stride < least:
            return (
                f"packed rows of D={dim} stand {stride} words apart, fewer than the "
                f"{least} that streams and vectors take"
            )
        return None
    if dim > MAX_DIM:
        return f"D={dim} is above {MAX_DIM}: pack the table, or use another kernel"
    if dim > LANES and spec.num_rows % SUBLANES:
        return (
            f"V={spec.num_rows} is not a multiple of {SUBLANES}, so rows of D={dim} > "
            f"{LANES} cannot be seen as lines of {LANES} lanes"
        )
    return unsupported_rows(spec)


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
    if config is None:
        config = Config.interpreted(spec.num_ids) if interpret else Config.choose(spec)
    num_rows, num_ids, workers = spec.num_rows, spec.num_ids, config.workers
    layout_records = records_of(spec.layout)

    def run(
        inputs: Inputs, records: State, count: int, name: str
    ) -> tuple[State, jax.Array]:
        cost = cost_estimate(spec, count, bytes_moved(count, count, spec))
        kernel = SubcoreKernel(layout_records, spec, config, cost)
        call = kernel.interpreted if interpret else kernel.compiled
        return call(inputs, records, name=name)

    grads, sources = layout_records.lay_out(batch.grads, batch.sources)
    work = share_out(
        *(batch.ids, sources, batch.gains, num_rows, config, workers),
        whole_runs=not spec.accumulate,
    )
    numbers = _operand(scalars.numbers, batch)
    seeds = () if scalars.seeds is None else (_operand(scalars.seeds, batch),)
    records = layout_records.records(state)
    inputs = Inputs(work, numbers, seeds, grads)
    records, sums = run(inputs, records, num_ids, _NAME)
    if spec.accumulate:
        # The runs that were split: those that exist to the front, still ascending.
        split_ids = split_runs(work, num_rows, workers)
        places = lax.iota(jnp.int32, split_ids.size)
        split_ids, places = lax.sort((split_ids, places), num_keys=2, is_stable=False)
        work = share_out(split_ids, places, None, num_rows, config, workers=1)
        inputs = Inputs(work, numbers, seeds, sums.reshape(-1, layout_records.width))
        records, _ = run(inputs, records, split_ids.size, _NAME_OF_SECOND_CALL)
    return layout_records.arrays(records)


def _operand(numbers: jax.Array, batch: SortedBatch) -> jax.Array:
    """Returns a few numbers as an operand `[WINDOW]` of the kernel.

    In a loop, libtpu's compiler dies of an operand that is constant, such as a learning
    rate that is. No id is negative, which it does not know: to it, nothing is constant.
    """
    padded = jnp.pad(numbers, (0, WINDOW - numbers.size))
    return jnp.where(batch.ids[0] < 0, 0, padded)
