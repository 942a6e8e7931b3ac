"""The update of a whole table: what it cannot do, what it moves, and the call."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_adam._types import Grads
from sparse_adam.kernels import chips
from sparse_adam.kernels.costs import cost_estimate
from sparse_adam.kernels.layout import MAX_DIM, Layout
from sparse_adam.kernels.spec import SortedBatch, State, StepScalars, UpdateSpec
from sparse_adam.kernels.sweep.config import (
    BATCH,
    GRADIENT_SLOTS,
    INDEX_SLOTS,
    STATE_SLOTS,
    TILES,
    Config,
)
from sparse_adam.kernels.sweep.kernel import (
    Indices,
    Sweep,
    SweepScalars,
    SweepScratch,
    kernel,
)
from sparse_adam.kernels.tiles import LANES, SUBLANES
from sparse_adam.kernels.vmem import groups_of, pad_to_lines
from sparse_adam.rules import check_rule

_NONE = 2**31 - 1  # a group that no table has
# One in an iteration, since XLA's CPU compiler contracts a product and a sum in some of
# several: their last bits would depend on the sizes of blocks.
_TILES_INTERPRETED = 1


def unsupported(spec: UpdateSpec) -> str | None:
    """Says why this kernel cannot do an update, or returns None when it can."""
    facts = check_rule(spec.rule)
    if facts.whole_rows or facts.per_row:
        return (
            "its rule has numbers of whole rows; this kernel sees 128 lanes at a time"
        )
    if not spec.accumulate:
        return (
            "use_gradient_accumulation=False needs a step for each occurrence; this "
            "kernel makes one step on each row"
        )
    if spec.layout.storage == "plain" and spec.dim % LANES:
        return (
            f"D={spec.dim} is not a multiple of {LANES}: a TPU does not store such "
            "a table row by row; pack it"
        )
    if spec.dim > MAX_DIM:
        return f"D={spec.dim} is above {MAX_DIM}: a block of rows must fit in VMEM"
    return None


def bytes_moved(spec: UpdateSpec) -> int:
    """Returns the HBM bytes: the table in and out, each gradient row and index."""
    layout = spec.layout
    indices = 2 + (layout.rows_per_group > 1) + spec.weighted
    gradient = layout.blocks * LANES
    return 2 * layout.num_bytes + 4 * spec.num_ids * (gradient + indices)


def sweep_update(
    state: State,
    batch: SortedBatch,
    scalars: StepScalars,
    spec: UpdateSpec,
    config: Config | None = None,
    *,
    interpret: bool = False,
) -> State:
    """Updates the rows `batch.ids` (sorted; V for none), or all rows, in place."""
    chosen = config or Config.choose(spec)
    if interpret and config is None:
        # Unrolling buys an interpreter nothing and doubles the time to compile.
        chosen = dataclasses.replace(chosen, unroll=1)
    groups = groups_of(spec.layout, whole_rows=False, compiled=not interpret)
    tiles = _TILES_INTERPRETED if interpret else TILES
    cores = chosen.cores or chips.in_scope().cores
    sweep = Sweep(spec, groups, chosen, tiles, cores)
    firsts, ends, indices = _split(batch, sweep)
    seeds = () if scalars.seeds is None else (scalars.seeds,)
    grads = _repeat_in_lines(batch.grads, spec.layout)
    # A TPU stores tables in tiles of 8 rows, but not those with fewer rows.
    rows = state[0].shape[0]
    missing = -rows % SUBLANES if interpret or rows < SUBLANES else 0
    state = tuple(jnp.pad(x, ((0, missing), (0, 0))) for x in state)
    state = _call(
        SweepScalars(firsts, ends, spec.counted(scalars.numbers), seeds),
        indices,
        grads,
        state,
        sweep,
        interpret,
    )
    return tuple(x[:rows] for x in state) if missing else state


def _repeat_in_lines(grads: Grads, layout: Layout) -> jax.Array:
    """Returns gradients as rows of float32 lines, at least one.

    Each stands in every place of a line where its row may stand.
    """
    missing = int(grads.shape[0] == 0)
    if layout.rows_per_group > 1:
        unused = layout.stride - grads.shape[1]
        grads = jnp.pad(grads.astype(jnp.float32), ((0, 0), (0, unused)))
        grads = jnp.tile(grads, (1, layout.rows_per_group))
    return jnp.pad(pad_to_lines(grads, layout), ((0, missing), (0, 0)))


def _split(batch: SortedBatch, sweep: Sweep) -> tuple[jax.Array, jax.Array, Indices]:
    """Cuts occurrences into chunks, one at least, and says which each core reads.

    Returns the batch that each core begins with, and the chunk that it ends before.
    """
    size, line = sweep.config.occurrences_per_chunk, sweep.config.index_line
    num_chunks = max(1, pl.cdiv(batch.ids.size, size))
    layout = sweep.spec.layout
    per_group = layout.rows_per_group

    def fill(x: jax.Array, filling: int) -> jax.Array:
        return jnp.pad(x, (0, num_chunks * size - x.size), constant_values=filling)

    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(num_chunks, 1, size)
        return jnp.pad(x, ((0, 0), (0, 0), (0, line - size)))

    ids = fill(batch.ids, _NONE)
    valid = ids < layout.num_rows
    groups = jnp.where(valid, lax.div(ids, per_group), _NONE).reshape(-1, BATCH)
    # A core reads from the first occurrence of its blocks to the last one.
    core = lax.broadcasted_iota(jnp.int32, (sweep.cores, 1), 0)
    owners = groups.reshape(1, -1)
    of_core = (lax.div(owners, sweep.groups_each) == core) & (owners < _NONE)
    first = jnp.argmax(of_core, axis=1).astype(jnp.int32)
    place = lax.iota(jnp.int32, groups.size)
    end = jnp.max(jnp.where(of_core, place[None] + 1, 0), axis=1)
    # An occurrence of no row says, by a complement, where the batches after it go on.
    following = lax.cummin(groups.min(axis=1), reverse=True)
    after = jnp.append(following[1:], _NONE)[:, None]
    groups = jnp.where(groups < _NONE, groups, ~after)
    lanes = ()
    if per_group > 1:
        place = jnp.where(valid, lax.rem(ids, per_group), 0)
        lanes = (cut(place * layout.stride),)
    return (
        lax.div(first, BATCH),
        pl.cdiv(end, size),
        Indices(
            groups=cut(groups.reshape(-1)),
            sources=cut(fill(batch.sources, 0)),
            lanes=lanes,
            gains=() if batch.gains is None else (cut(fill(batch.gains, 0)),),
        ),
    )


def _call(
    scalars: SweepScalars,
    indices: Indices,
    grads: jax.Array,
    state: State,
    sweep: Sweep,
    interpret: bool,
) -> State:
    config, layout = sweep.config, sweep.spec.layout
    width = layout.blocks * LANES
    groups, size = config.groups_per_block, config.occurrences_per_chunk
    operands = (scalars, indices, grads, state)
    smem, hbm = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pl.ANY)
    specs = (
        jax.tree.map(lambda _: smem, scalars),
        *jax.tree.map(lambda _: hbm, (indices, grads, state)),
    )
    first_array = len(jax.tree.leaves(operands)) - len(state)
    (updated,) = pl.pallas_call(
        functools.partial(kernel, sweep=sweep),
        name="sparse_adam_sweep",
        grid=(sweep.cores, sweep.blocks_each + 1),
        in_specs=specs,
        out_specs=(specs[3],),
        out_shape=(jax.eval_shape(lambda *x: x, *state),),
        input_output_aliases={first_array + i: i for i in range(len(state))},
        scratch_shapes=(
            SweepScratch(
                state=sweep.groups.buffers(STATE_SLOTS, groups),
                sums=pltpu.VMEM((groups + SUBLANES, width), jnp.float32),
                grads=pltpu.VMEM((GRADIENT_SLOTS, size, width), jnp.float32),
                indices=jax.tree.map(
                    lambda x: pltpu.SMEM((INDEX_SLOTS * x.shape[2],), x.dtype), indices
                ),
                place=pltpu.SMEM((2,), jnp.int32),
                state_arrived=pltpu.SemaphoreType.DMA((STATE_SLOTS,)),
                state_left=pltpu.SemaphoreType.DMA((STATE_SLOTS,)),
                grads_arrived=pltpu.SemaphoreType.DMA((GRADIENT_SLOTS,)),
                indices_arrived=pltpu.SemaphoreType.DMA((INDEX_SLOTS,)),
            ),
        ),
        cost_estimate=cost_estimate(
            sweep.spec, layout.num_rows, bytes_moved(sweep.spec)
        ),
        # The ids are proven in range before the call; the checks would cost more than
        # ten instruction bundles a DMA.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            disable_bounds_checks=not config.checks,
            disable_semaphore_checks=not config.checks,
            vmem_limit_bytes=config.vmem_limit(sweep.spec),
        ),
        interpret=interpret,
    )(*operands)
    return updated
