"""The update row by row: what it cannot do, what it moves, and the call."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparse_adam._types import Tile
from sparse_adam.kernels.chips import VMEM_BUDGET
from sparse_adam.kernels.layout import PackedLayout
from sparse_adam.kernels.lines import nearest_pair
from sparse_adam.kernels.problem import Batch, Problem, State, Step
from sparse_adam.kernels.tensorcore.chunks import Chunks, split_into_chunks
from sparse_adam.kernels.tensorcore.config import Config
from sparse_adam.kernels.tensorcore.kernel import (
    Arriving,
    Finishing,
    Scalars,
    Scratch,
    kernel,
)
from sparse_adam.kernels.tensorcore.storage import Storage, in_lines, storage_of
from sparse_adam.kernels.tiles import LANES, SUBLANES


def unsupported(problem: Problem) -> str | None:
    """Says why this kernel cannot do `problem`, or None when it can."""
    if not problem.lazy:
        return "lazy_adam=False updates every row; this kernel visits looked-up rows"
    if not problem.packed:
        if problem.dim % LANES:
            return (
                f"D={problem.dim} is not a multiple of {LANES}: a TPU does not store "
                "such a table row by row"
            )
        for name in ("table", "momenta", "velocities"):
            dtype = getattr(problem, f"{name}_dtype")
            if dtype != np.float32:
                return (
                    f"{name} is {dtype}; rows move one by one, and only float32 rows "
                    "are words of their own (two bfloat16 rows share each 32-bit word)"
                )
    if Config(SUBLANES).vmem_bytes(problem) > VMEM_BUDGET:
        return f"D={problem.dim} is too large: {SUBLANES} rows must fit in VMEM"
    return None


def bytes_moved(
    num_ids: int, num_groups: int, dim: int, layout: PackedLayout | None = None
) -> int:
    """HBM bytes of one update: gradients once, groups in and out, five indices.

    A group is a row of three plain arrays, or the lines of a packed one.
    """
    gradient, group = dim, 3 * dim
    if layout is not None:
        gradient = layout.blocks * LANES
        group = layout.lines_per_group * LANES
    return 4 * (num_ids * gradient + 2 * num_groups * group + 5 * num_ids)


def tensorcore_update(
    state: State,
    batch: Batch,
    step: Step,
    problem: Problem,
    config: Config | None = None,
) -> State:
    """Updates the rows `batch.ids` (sorted; V for none) in place."""
    if config is not None:
        config.check(problem)
    chosen = config or Config.choose(problem)
    # Unrolling buys an interpreter nothing and triples the time to compile.
    plain = config or dataclasses.replace(chosen, dma_unroll=1)
    stored = storage_of(problem)
    size = chosen.rows_per_chunk
    chunks = split_into_chunks(batch, problem, stored.rows_per_group, size)
    call = functools.partial(_call, problem=problem)
    return lax.platform_dependent(
        chunks,
        step,
        in_lines(batch.grads, stored),
        state,
        tpu=functools.partial(
            call, stored=storage_of(problem, nearest_pair), config=chosen
        ),
        default=functools.partial(call, stored=stored, config=plain, interpret=True),
    )


def _call(
    chunks: Chunks,
    step: Step,
    grads: Tile,
    state: State,
    *,
    problem: Problem,
    stored: Storage,
    config: Config,
    interpret: bool = False,
) -> State:
    num_chunks, _, size = chunks.groups.shape
    tables, most = len(state), num_chunks * size
    if not interpret:
        # XLA would keep a few in VMEM, where the DMA of a row becomes loads and stores.
        grads = pltpu.with_memory_space_constraint(grads, pltpu.HBM)
    operands = (*_operands(chunks, step, problem), grads, state)
    specs = _specs(operands, num_chunks, size, problem)
    first_table = len(jax.tree.leaves(operands)) - tables
    (updated,) = pl.pallas_call(
        functools.partial(kernel, problem=problem, stored=stored, config=config),
        name="sparse_adam_tensorcore",
        grid=(num_chunks + 1,),
        in_specs=specs,
        out_specs=specs[-1:],
        out_shape=(jax.eval_shape(lambda *x: x, *state),),
        input_output_aliases={first_table + i: i for i in range(tables)},
        scratch_shapes=(Scratch.shapes(problem, size),),
        cost_estimate=pl.CostEstimate(
            flops=24 * most * problem.dim,
            transcendentals=most * problem.dim,
            bytes_accessed=bytes_moved(
                *(most, most, problem.dim),
                layout=problem.layout if problem.packed else None,
            ),
        ),
        # The ids are proven in range before the call; the checks would cost ten
        # instruction bundles a DMA.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            disable_bounds_checks=True,
            disable_semaphore_checks=True,
        ),
        interpret=interpret,
    )(*operands)
    return updated


def _operands(
    chunks: Chunks, step: Step, problem: Problem
) -> tuple[Scalars, Arriving, Finishing]:
    """What the kernel reads of a batch, beside its gradients."""
    seeds = () if step.seeds is None else (step.seeds,)
    return (
        Scalars(
            chunks.active,
            chunks.counts,
            chunks.continues,
            step.learning_rate[None],
            seeds,
        ),
        Arriving(chunks.groups, chunks.sources),
        Finishing(
            chunks.groups,
            chunks.marks,
            (chunks.owners,) if problem.accumulate else (),
            chunks.places,
            (chunks.groups,) if seeds and problem.accumulate else (),
            chunks.weights,
        ),
    )


def _specs(
    operands: tuple[Any, ...], num_chunks: int, size: int, problem: Problem
) -> tuple[Any, ...]:
    """Where the operands are: scalars whole, the indices of a chunk at a time, of which
    grid step k starts chunk k and finishes chunk k - 1; all else stays in HBM.
    """

    def block(lag: int, memory_space: Any) -> pl.BlockSpec:
        def index(k: jax.Array) -> tuple[jax.Array, int, int]:
            return jnp.clip(k - lag, 0, num_chunks - 1), 0, 0

        return pl.BlockSpec((None, None, size), index, memory_space=memory_space)

    def each(spec: pl.BlockSpec, operand: Any) -> Any:
        return jax.tree.map(lambda _: spec, operand)

    scalars, arriving, finishing, grads, state = operands
    line, column = block(1, pltpu.SMEM), block(1, pltpu.VMEM)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    return (
        each(pl.BlockSpec(memory_space=pltpu.SMEM), scalars),
        each(block(0, pltpu.SMEM), arriving),
        each(column, finishing)._replace(
            groups=line,
            marks=line,
            places=each(column if problem.accumulate else line, finishing.places),
        ),
        each(hbm, grads),
        each(hbm, state),
    )
