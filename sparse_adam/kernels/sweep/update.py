"""The update of a whole table: what it cannot do, what it moves, and the call."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_adam.kernels.layout import MAX_DIM
from sparse_adam.kernels.lines import nearest_pair
from sparse_adam.kernels.problem import Batch, Problem, State, Step
from sparse_adam.kernels.sweep.config import (
    BATCH,
    GRADIENT_SLOTS,
    INDEX_SLOTS,
    STATE_SLOTS,
    TILES,
    Config,
)
from sparse_adam.kernels.sweep.kernel import Indices, Scalars, Scratch, Sweep, kernel
from sparse_adam.kernels.sweep.storage import lay_out, storage_of
from sparse_adam.kernels.tiles import LANES, SUBLANES

_NONE = 2**31 - 1  # a group that no table has
# One in an iteration, since XLA's CPU compiler contracts a product and a sum in some of
# several: their last bits would depend on the sizes of blocks.
_TILES_INTERPRETED = 1


def unsupported(problem: Problem) -> str | None:
    """Says why this kernel cannot do `problem`, or None when it can."""
    if not problem.accumulate:
        return (
            "use_gradient_accumulation=False needs a step for each occurrence; this "
            "kernel makes one step on each row"
        )
    if not problem.packed and problem.dim % LANES:
        return (
            f"D={problem.dim} is not a multiple of {LANES}: a TPU does not store such "
            "a table row by row; pack it"
        )
    if problem.dim > MAX_DIM:
        return f"D={problem.dim} is above {MAX_DIM}: a block of rows must fit in VMEM"
    return None


def bytes_moved(problem: Problem) -> int:
    """HBM bytes of one update: the table in and out, each gradient row and index."""
    layout = problem.layout
    row = sum(dtype.itemsize for dtype in problem.dtypes) * problem.dim
    table = layout.num_bytes if problem.packed else problem.num_rows * row
    indices = 2 + (layout.rows_per_group > 1) + problem.weighted
    gradient = layout.blocks * LANES
    return 2 * table + 4 * problem.num_ids * (gradient + indices)


def sweep_update(
    state: State,
    batch: Batch,
    step: Step,
    problem: Problem,
    config: Config | None = None,
) -> State:
    """Updates the rows `batch.ids` (sorted; V for none), or all rows, in place."""
    if config is not None:
        config.check(problem)
    stored = storage_of(problem, nearest_pair)
    sweep = Sweep(problem, stored, config or Config.choose(problem), TILES)
    active, indices = _split(batch, sweep)
    seeds = () if step.seeds is None else (step.seeds,)
    call = functools.partial(_call, sweep=sweep)
    padded = functools.partial(_padded_call, sweep=sweep)
    # Unrolling buys an interpreter nothing and doubles the time to compile.
    rolled = config or dataclasses.replace(sweep.config, unroll=1)
    interpreted = functools.partial(
        _padded_call,
        sweep=Sweep(problem, storage_of(problem), rolled, _TILES_INTERPRETED),
        interpret=True,
    )
    return lax.platform_dependent(
        Scalars(active, step.learning_rate[None], seeds),
        indices,
        lay_out(batch.grads, stored),
        state,
        # A TPU stores tables in tiles of 8 rows, but not those with fewer rows.
        tpu=padded if state[0].shape[0] < SUBLANES else call,
        default=interpreted,
    )


def _padded_call(
    scalars: Scalars,
    indices: Indices,
    grads: jax.Array,
    state: State,
    *,
    sweep: Sweep,
    interpret: bool = False,
) -> State:
    """Fills the last tile of rows where the storage of the arrays does not."""
    rows = state[0].shape[0]
    filling = ((0, -rows % SUBLANES), (0, 0))
    filled = tuple(jnp.pad(x, filling) for x in state)
    updated = _call(scalars, indices, grads, filled, sweep=sweep, interpret=interpret)
    return tuple(x[:rows] for x in updated)


def _split(batch: Batch, sweep: Sweep) -> tuple[jax.Array, Indices]:
    """Cuts occurrences into chunks, one at least; counts those with a valid id."""
    size, line = sweep.config.occurrences_per_chunk, sweep.config.index_line
    num_chunks = max(1, pl.cdiv(batch.ids.size, size))
    per_group = sweep.stored.rows_per_group

    def fill(x: jax.Array, filling: int) -> jax.Array:
        return jnp.pad(x, (0, num_chunks * size - x.size), constant_values=filling)

    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(num_chunks, 1, size)
        return jnp.pad(x, ((0, 0), (0, 0), (0, line - size)))

    ids = fill(batch.ids, _NONE)
    valid = ids < sweep.problem.num_rows
    groups = jnp.where(valid, lax.div(ids, per_group), _NONE).reshape(-1, BATCH)
    # An occurrence of no row says, by a complement, where the batches after it go on.
    following = lax.cummin(groups.min(axis=1), reverse=True)
    after = jnp.append(following[1:], _NONE)[:, None]
    groups = jnp.where(groups < _NONE, groups, ~after)
    lanes = ()
    if per_group > 1:
        place = jnp.where(valid, lax.rem(ids, per_group), 0)
        lanes = (cut(place * sweep.stored.stride),)
    active = (following[:: size // BATCH] < _NONE).sum(dtype=jnp.int32)
    return active[None], Indices(
        groups=cut(groups.reshape(-1)),
        sources=cut(fill(batch.sources, 0)),
        lanes=lanes,
        gains=() if batch.gains is None else (cut(fill(batch.gains, 0)),),
    )


def _call(
    scalars: Scalars,
    indices: Indices,
    grads: jax.Array,
    state: State,
    *,
    sweep: Sweep,
    interpret: bool = False,
) -> State:
    config, stored = sweep.config, sweep.stored
    groups, size = config.groups_per_block, config.occurrences_per_chunk
    operands = (scalars, indices, grads, state)
    smem, hbm = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pl.ANY)
    specs = (
        jax.tree.map(lambda _: smem, scalars),
        *jax.tree.map(lambda _: hbm, (indices, grads, state)),
    )
    first_array = len(jax.tree.leaves(operands)) - len(state)
    elements = stored.num_groups * stored.width
    (updated,) = pl.pallas_call(
        functools.partial(kernel, sweep=sweep),
        name="sparse_adam_sweep",
        grid=(sweep.num_blocks + 1,),
        in_specs=specs,
        out_specs=(specs[3],),
        out_shape=(jax.eval_shape(lambda *x: x, *state),),
        input_output_aliases={first_array + i: i for i in range(len(state))},
        scratch_shapes=(
            Scratch(
                state=stored.buffers(STATE_SLOTS, groups),
                sums=pltpu.VMEM((groups + SUBLANES, stored.width), jnp.float32),
                grads=pltpu.VMEM((GRADIENT_SLOTS, size, stored.width), jnp.float32),
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
        cost_estimate=pl.CostEstimate(
            flops=24 * elements,
            transcendentals=elements,
            bytes_accessed=bytes_moved(sweep.problem),
        ),
        # The ids are proven in range before the call; the checks would cost ten
        # instruction bundles a DMA.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            disable_bounds_checks=True,
            disable_semaphore_checks=True,
            vmem_limit_bytes=config.vmem_limit(sweep.problem),
        ),
        interpret=interpret,
    )(*operands)
    return updated
