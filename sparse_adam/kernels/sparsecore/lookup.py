"""Looking up rows on SparseCores, and combining those of a sample, in one pass.

Why: XLA's gather writes every row that a batch names, and its sum reads them all again.
Here a row is fetched into the memory of a vector subcore, added to the others of its
sample there, and one row a sample is written (`bytes_moved`).

Data flow: the occurrences of a batch, in the order of their samples, come in chunks of
C, as those of an update do (`pipeline`): words arrive; rows are listed and fetched;
sums are made in place of the rows; and leave (`combining`). A worker's share is a range
of occurrences, as long as everybody's but for the sample at its end, which belongs to
the worker in whose range it begins. So one sample with all ids keeps one subcore busy.

Order: the rows of a sample are added in float32 in the order of its ids. So the same
call gives the same bits. Each row of the result is written once, by one subcore.

Safety: a row of -1 is not fetched, and adds nothing, whatever its gain. That all others
lie in the table must be proven: no bounds are checked.

Neither function can be differentiated; `ops` has rules of its own.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from sparse_adam._types import Gains, Indices
from sparse_adam.kernels.avoided import avoided
from sparse_adam.kernels.layout import Layout
from sparse_adam.kernels.sparsecore.call import SubcoreProgram
from sparse_adam.kernels.sparsecore.combining import (
    Combine,
    LookupOperands,
    LookupScratch,
)
from sparse_adam.kernels.sparsecore.config import Config, absent, unsupported_layout
from sparse_adam.kernels.sparsecore.records import records_of
from sparse_adam.kernels.sparsecore.shim import Interpreted, Native
from sparse_adam.kernels.sparsecore.work import share_out
from sparse_adam.kernels.tiles import LANES

_NAME = "sparse_adam_combine"


def unsupported(layout: Layout) -> str | None:
    """Says why rows cannot be looked up on SparseCores, or returns None."""
    return unsupported_layout(layout, ("table", *("slot" for _ in layout.dtypes[1:])))


def is_compiled(layout: Layout) -> bool:
    """Tells whether the TPU in scope looks up rows of this layout on SparseCores."""
    if avoided("lookup"):
        return False
    return unsupported(layout) is None and absent() is None


def bytes_moved(num_ids: int, num_samples: int, layout: Layout) -> int:
    """Returns the HBM bytes: rows in, combined rows out, words.

    The words are those of rows and samples, written when they are filled up to whole
    chunks, and read once for each record of a row.
    """
    records = records_of(layout)
    row = records.blocks * records.width
    return 4 * (num_ids * (row + 2 + 2 * records.blocks) + num_samples * row)


def lookup_rows(
    stored: jax.Array,
    ids: Indices,
    layout: Layout,
    config: Config | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Returns rows, `[N, D]` in the table's dtype, bit for bit; zeros for an id of -1.

    Args:
        stored: the table: plain `[V, D]`, or packed lines.
        ids: int32 `[N]`, in [0, V) or -1.
        layout: of the table.
        config: how the work is cut; None: as fits.
        interpret: whether to run in Pallas' interpreter.
    """
    rows = combine_rows(
        *(stored, ids, layout, config), num_samples=ids.size, interpret=interpret
    )
    return rows.astype(layout.dtypes[0])


def combine_rows(
    stored: jax.Array,
    ids: Indices,
    layout: Layout,
    config: Config | None = None,
    *,
    num_samples: int,
    owners: Indices | None = None,
    gains: Gains | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Returns the combined row of each sample: float32 `[S, D]`.

    Row s is `sum(gains[i] * table[ids[i]])` over the ids of sample s, added in float32
    in the order of the ids; zeros where it has none.

    Args:
        stored: the table: plain `[V, D]`, or packed lines.
        ids: int32 `[N]`, in [0, V) or -1 for none.
        layout: of the table.
        config: how the work is cut; None: as fits.
        num_samples: S.
        owners: int32 `[N]`, the sample of each id, ascending, those outside of `[0, S)`
            at the end. None: each sample has as many ids, one behind the other.
        gains: float32 `[N]`; None: 1.
        interpret: whether to run in Pallas' interpreter.
    """
    if ids.size == 0 or num_samples == 0:
        return jnp.zeros((num_samples, layout.dim), jnp.float32)
    if config is None:
        if interpret:
            config = Config.interpreted(ids.size)
        else:
            config = Config.for_lookup(ids.size, layout)
    records = records_of(layout)
    room = records.room(num_samples)
    shape = room * records.blocks, records.width
    if owners is None:
        places = ids.size // num_samples
        owners = lax.div(lax.iota(jnp.int32, ids.size), jnp.int32(places))
        sums = lax.empty(shape, records.looked_up)  # each is written
    else:
        places = None
        sums = jnp.zeros(shape, records.looked_up)
    owned = (owners >= 0) & (owners < num_samples)
    samples = jnp.where(owned, records.numbers(owners, num_samples), room)
    work = share_out(
        *(samples, ids, gains, room, config, config.workers),
        whole_runs=True,
        run_length=places,
    )
    copies = places == 1 and gains is None and layout.dtypes[0] == np.float32
    program = _program(layout, config, ids.size, num_samples, room, copies)
    (table,) = records.records((stored,))
    if interpret and table.dtype != sums.dtype:  # see `Interpreted.seen_as`
        table = lax.bitcast_convert_type(table, sums.dtype)
    (sums,) = program.run(*((work, (table,)), (sums,)), name=_NAME, interpret=interpret)
    return records.take_back(sums, num_samples)


def _program(
    layout: Layout,
    config: Config,
    num_ids: int,
    num_samples: int,
    room: int,
    copies: bool,
) -> SubcoreProgram:
    records = records_of(layout)

    def body(on: Native | Interpreted, operands: tuple, scratch: Any) -> None:
        refs = LookupOperands(*operands)
        Combine(on, refs, scratch, records, config, room, copies).run()

    return SubcoreProgram(
        body,
        LookupScratch.types(config, records),
        config,
        records.width == LANES,
        pl.CostEstimate(
            flops=0 if copies else 2 * num_ids * layout.dim,
            transcendentals=0,
            bytes_accessed=bytes_moved(num_ids, num_samples, layout),
        ),
    )
