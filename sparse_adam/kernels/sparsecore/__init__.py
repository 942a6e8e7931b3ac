"""Lazy Adam on the rows of plain and packed tables, on all SparseCores of a TPU.

Why: SparseCore is the part of the chip that is made for rows at random places: 32 or
64 vector subcores, each of which fetches a whole list of rows by one instruction, an
indirect stream. This kernel is one pass: each gradient row is read once, straight
through the sort's permutation, and each updated row is read once and written once, in
place. Nothing is materialised in between (`bytes_moved`).

Records: the kernel sees the state as *records*, one row's words in one plane, by the
same code for both storages (`records`). Of plain arrays that is a row of each of the
three, of packed ones what a row has of a line. Of plain arrays one list of indices
serves all; the planes of a packed one have a list each, so that no views of an array
overlap. A stream moves a row's record by itself, however narrow: neighbours that share
a line never meet. A row of more than 128 lanes is
handled in blocks of 128. All views of the state are free, bitcasts, on a TPU. (An
indirect stream of whole wide rows compiles too, to one stream a row, which silently
fetches and writes rows that are to be ignored.)

Data flow: sorted occurrences come in chunks of C. Each subcore takes its chunks through
four stages, one step apart (`pipeline`): the chunk's ids and gradient indices arrive;
the subcore lists the rows, and they and all C gradient rows begin to arrive; they are
computed and begin to leave; they have left. Three slots of rows and four of words:
while a chunk is computed the next one arrives and the last one leaves, for three
planes with 8 gathers and 6 scatters in flight.

Accumulated gradients (`accumulate`): runs of equal ids are summed, then each row is
updated once. A subcore's share is a range of *occurrences*, as long as everybody's,
however often an id occurs. It applies the runs that begin and end in its range. Of a
run that began in an earlier range, its head, and one that goes on in the next, its
tail, it writes only its part of the sum: at most two rows. A second, tiny call of the
same kernel, by one subcore, takes those 2 * workers partial sums as gradients and
applies each such run once. So one id in all N places keeps every subcore equally busy.

A step for each occurrence (`occurrences`): no part of a run can be done before the one
before it, so a run belongs to the subcore in whose share it begins, which goes on to
its end. One id in all N places keeps one subcore busy.

Order: a row is fetched and written by one subcore of one call alone, once, so no two
streams of a call ever touch the same record and subcores need no order among
themselves. A chunk's slots are used again only after its stores are waited for. What a
run has come to passes from chunk to chunk in `SubcoreScratch.opened`, in float32.

Numerics: float32, rounded once, where a row is stored. A run is summed in the order of
the batch, in parts where it spans subcores; the select that starts a new run keeps a
NaN in the row it belongs to. The order of additions depends only on the sorted
positions and on the number of subcores: same call, same bits. v6e and 7x take the
reciprocal root from one instruction; two bfloat16 are rounded to the nearest by one.

Needs: what `unsupported` says, and a TPU whose generation is known while tracing. Ids
must be proven to lie in [0, V) or be the sentinel V, and grouped: nothing checks them.
What no public kernel is known to have run on a chip can be done without
(`Config.SAFE_FORMS`).
"""

from sparse_adam.kernels.sparsecore import lookup
from sparse_adam.kernels.sparsecore.config import Config, absent
from sparse_adam.kernels.sparsecore.update import (
    bytes_moved,
    sparsecore_update,
    unsupported,
)

__all__ = [
    "Config",
    "absent",
    "bytes_moved",
    "lookup",
    "sparsecore_update",
    "unsupported",
]
