"""Lazy, accumulated Adam on the rows of plain tables, on all SparseCores of a TPU.

Why: SparseCore is the part of the chip that is made for rows at random places: 32 or
64 vector subcores, each of which fetches a whole list of rows by one instruction, an
indirect stream. This kernel is one pass: each gradient row is read once, straight
through the sort's permutation, and each updated row of the three tables is read once
and written once, in place. Nothing is materialised in between (`bytes_moved`).

Data flow: sorted occurrences come in chunks of C. Each subcore takes its chunks through
four stages, one step apart: the chunk's ids and gradient indices arrive; the subcore
lists the ids whose runs end in the chunk, and their rows and all C gradient rows begin
to arrive; runs are summed, rows updated, and they begin to leave; they have left.
Three slots of rows and four of words: while a chunk is computed the next one arrives
and the last one leaves, with 8 gathers and 6 scatters in flight.

Balance: a subcore's share is a range of *occurrences*, as long as everybody's, however
often an id occurs. It applies the runs of equal ids that begin and end in its range. Of
a run that began in an earlier range, its head, and one that goes on in the next, its
tail, it writes only its part of the sum: at most two rows of D. A second, tiny call of
the same kernel, by one subcore, takes those 2 * workers partial sums as gradients and
applies each such run once. So one id in all N places keeps every subcore equally busy.

Order: a row is fetched and written by the one chunk in which its run ends, or else by
the second call alone, so no two streams of a call ever touch the same table row and
subcores need no order among themselves. A chunk's slots are used again only after its
stores are waited for. An unfinished sum passes from chunk to chunk in `open_sum`.

Numerics: float32. A run is summed in the order of the batch, in parts where it spans
subcores; the select that starts a new run keeps a NaN in the row it belongs to. The
order of additions depends only on the sorted positions and on the number of subcores:
same call, same bits. v6e and 7x take the reciprocal root from one instruction.

Rows of more than 128 lanes: a table lies in memory in tiles of 8 rows by 128 lanes. The
kernel sees *lines* of 128 lanes and handles a row block by block; the view is free, a
bitcast, where V is a multiple of 8. (An indirect stream of whole such rows compiles
too, to one stream a row, which silently fetches and writes rows that are to be
ignored.)

Needs: what `unsupported` says, and a TPU whose generation is known while tracing. Ids
must be proven to lie in [0, V) or be the sentinel V, and grouped: checks are off.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc

from sparse_adam._types import Gains, Grads, Indices, Rate, Table
from sparse_adam.kernels import sparsecore_math
from sparse_adam.kernels.config import LANES
from sparse_adam.kernels.problem import Problem
from sparse_adam.kernels.sparsecore_config import (
    MAX_BYTES,
    MAX_DIM,
    TILE,
    WINDOW,
    Config,
    absent,
    wrong_chip,
)
from sparse_adam.kernels.sparsecore_kernel import kernel
from sparse_adam.kernels.sparsecore_memory import Operands, Scratch
from sparse_adam.kernels.sparsecore_shim import Interpreted, Native
from sparse_adam.kernels.sparsecore_work import Work, share_out, split_runs

_State = tuple[Table, Table, Table]
_NAME = "sparse_adam_sparsecore"
_NAME_OF_SECOND_CALL = "sparse_adam_split_runs"


def unsupported(problem: Problem) -> str | None:
    """Says why this kernel cannot do `problem`, or None when it can."""
    if not problem.lazy:
        return "lazy_adam=False updates every row; this kernel visits looked-up rows"
    if not problem.accumulate:
        return "use_gradient_accumulation=False needs a step for each occurrence"
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
    return wrong_chip()


def bytes_moved(num_ids: int, num_unique: int, dim: int) -> int:
    """HBM bytes of one update: gradients once, three rows in and out, indices.

    Indices are two words an occurrence, read and written when they are filled up to
    whole chunks, counted, and then read once for each 128 lanes of a row.
    """
    words = 5 + 2 * (dim // LANES)
    return 4 * (num_ids * dim + 6 * num_unique * dim + words * num_ids)


def sparsecore_update(
    table: Table,
    momenta: Table,
    velocities: Table,
    grads: Grads,
    ids: Indices,
    sources: Indices,
    gains: Gains | None,
    learning_rate: Rate,
    problem: Problem,
    config: Config | None = None,
) -> _State:
    """Updates the rows `ids` (sorted; V for none) of the three tables in place.

    Occurrence i adds `gains[i] * grads[sources[i]]`; a source of -1 adds zero. Where no
    TPU is in scope while this is traced, the kernel is interpreted.
    """
    state = (table, momenta, velocities)
    operands = (state, grads, ids, sources, gains, learning_rate)
    interpreted = functools.partial(
        _update,
        problem=problem,
        config=config or Config.interpreted(problem.num_ids),
        call=_interpret,
    )
    if absent():
        return interpreted(*operands)
    native = functools.partial(
        _update,
        problem=problem,
        config=config or Config.choose(problem.num_ids, problem.dim),
        call=_compile,
    )
    return lax.platform_dependent(*operands, tpu=native, default=interpreted)


def _update(
    state: _State,
    grads: Grads,
    ids: Indices,
    sources: Indices,
    gains: Gains | None,
    learning_rate: Rate,
    *,
    problem: Problem,
    config: Config,
    call: Callable,
) -> _State:
    num_rows, chunk, workers = problem.num_rows, config.chunk, config.workers
    call = functools.partial(
        call,
        rate=jnp.full((WINDOW,), learning_rate),
        num_sums=pl.cdiv(2 * workers, TILE) * TILE * problem.dim,
        config=config,
        body=functools.partial(
            kernel, num_rows=num_rows, hyper=problem.hyper, config=config
        ),
        scratch=Scratch.types(config, problem.dim),
        cost=pl.CostEstimate(
            flops=24 * problem.num_ids * problem.dim,
            transcendentals=problem.num_ids * problem.dim,
            bytes_accessed=bytes_moved(problem.num_ids, problem.num_ids, problem.dim),
        ),
    )
    grads = grads.astype(jnp.float32)
    if problem.dim > LANES:
        grads = jnp.pad(grads, ((0, -problem.num_grads % TILE), (0, 0)))

    work = share_out(ids, sources, gains, num_rows, chunk, workers)
    lines = tuple(_to_lines(x) for x in state)
    lines, sums = call(work, name=_NAME, grads=_to_lines(grads), state=lines)

    # The runs that were split: those that exist to the front, still in ascending order.
    split_ids = split_runs(work, num_rows, chunk, workers)
    places = lax.iota(jnp.int32, split_ids.size)
    split_ids, places = lax.sort((split_ids, places), num_keys=2, is_stable=False)
    work = share_out(split_ids, places, None, num_rows, chunk, workers=1)
    sums = sums.reshape(-1, LANES)
    lines, _ = call(work, name=_NAME_OF_SECOND_CALL, grads=sums, state=lines)
    w, m, v = (_from_lines(x, problem.dim) for x in lines)
    return w, m, v


def _to_lines(rows: jax.Array) -> jax.Array:
    """Rows as a TPU stores them: of each 8, the first 128 lanes, then the next."""
    num_rows, dim = rows.shape
    if dim == LANES:
        return rows
    tiles = rows.reshape(num_rows // TILE, TILE, dim // LANES, LANES)
    return tiles.transpose(0, 2, 1, 3).reshape(-1, LANES)


def _from_lines(lines: jax.Array, dim: int) -> jax.Array:
    if dim == LANES:
        return lines
    tiles = lines.reshape(-1, dim // LANES, TILE, LANES)
    return tiles.transpose(0, 2, 1, 3).reshape(-1, dim)


def _compile(
    work: Work,
    *,
    name: str,
    rate: jax.Array,
    grads: jax.Array,
    state: tuple[jax.Array, ...],
    num_sums: int,
    config: Config,
    body: Callable,
    scratch: Scratch,
    cost: pl.CostEstimate,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Calls the kernel on all vector subcores; returns the new state and the sums."""
    sparsecore_math.ensure_roots()
    types, structure = jax.tree.flatten(scratch)

    def subcore(*refs: Any) -> None:
        operands, scratch = refs[: -len(types)], refs[-len(types) :]
        body(
            Native(config.cores),
            Operands(*operands),
            jax.tree.unflatten(structure, scratch),
        )

    call: Callable[..., Any] = pl.kernel(
        subcore,
        name=name,
        mesh=plsc.VectorSubcoreMesh(
            core_axis_name="core",
            subcore_axis_name="subcore",
            num_cores=config.cores,
            num_subcores=config.subcores,
        ),
        scratch_types=types,
        cost_estimate=cost,
        # The vectors are of the size of a register, and the ids proven in range.
        compiler_params=pltpu.CompilerParams(
            needs_layout_passes=False,
            disable_bounds_checks=True,
            use_tc_tiling_on_sc=True,
        ),
    )
    # Not `jax.new_ref`: references that are open outside of the call do not pass
    # through `custom_vmap`.
    return pl.run_state(lambda refs: call(work, rate, grads, *refs))(
        (state, _no_sums(state, num_sums))
    )


def _interpret(
    work: Work,
    *,
    name: str,
    rate: jax.Array,
    grads: jax.Array,
    state: tuple[jax.Array, ...],
    num_sums: int,
    config: Config,
    body: Callable,
    scratch: Scratch,
    cost: pl.CostEstimate,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """The same by an ordinary Pallas call, in which each subcore is a grid step."""

    def subcore(work: Work, rate: Any, grads: Any, state_in: tuple, *refs: Any) -> None:
        del state_in  # the same memory as the state that goes out
        state, sums, scratch = refs
        body(Interpreted(), Operands(work, rate, grads, state, sums), scratch)

    operands = (work, rate, grads, state)
    count = len(jax.tree.leaves(operands))
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    state, sums = pl.pallas_call(
        subcore,
        name=name,
        grid=(config.workers,),
        in_specs=jax.tree.map(lambda _: hbm, operands),
        out_specs=((hbm,) * 3, hbm),
        # Not plain shapes: inside `shard_map` an output varies as the state does.
        out_shape=jax.eval_shape(lambda *x: (x, _no_sums(x, num_sums)), *state),
        input_output_aliases={count - 3 + i: i for i in range(3)},
        cost_estimate=cost,
        scratch_shapes=(scratch,),
        interpret=True,
    )(*operands)
    return state, sums


def _no_sums(state: tuple[jax.Array, ...], size: int) -> jax.Array:
    return jnp.zeros_like(state[0], shape=(size,))
