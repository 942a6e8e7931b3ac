"""Lazy Adam on rows, plain or packed, on one TPU TensorCore.

Why: XLA's compiled scatter streams the whole table through the core. This kernel
touches what the batch touched: each gradient row is read once, straight through the
sort's permutation, and each updated group of rows is read once and written once, in
place. Nothing is materialised in between (`bytes_moved`).

What is moved at once is a *group*: a row of three plain arrays, by three DMAs, or the
lines of a packed group, by one. Neighbours that share lines are one group, so that an
update of one never undoes that of another.

Data flow: sorted occurrences come in chunks of C. Grid step k starts the DMAs of
chunk k (C gradient rows, and each group whose run of occurrences *ends* in the chunk),
then finishes chunk k-1: wait, sum the runs, update, start the write-backs. Three buffer
slots, so that while a chunk is computed the next one arrives and the previous one
leaves. Row DMAs are limited by issue, about 3.2 to 4.1 instruction bundles each, hence
the flat, unrolled loops without bounds checks.

Without accumulation a group is fetched by the chunk in which its run begins, is stepped
once for each occurrence, in the order of the batch, and stays in VMEM until its run
ends (`steps`).

Order: a group is fetched once and written once, later, in a call, and no two DMAs of a
call touch the same group but those two. So chunks need no order among themselves but
this: a slot's write-backs are waited for before its next fetch, and an unfinished run
passes from chunk to chunk in VMEM.

Cores: v4 and v5p run this on two TensorCores. The batch is parted where a run begins,
so that no two cores touch the same group; each has its own chunks, scratch and
semaphores.

Numerics: float32 between one read and one rounding per row and call. The gradients of a
chunk come in an order of its own (`Chunks`): those that end a run first, where their
groups are listed, then the others, each of which is added to the end of its run. So
distinct ids cost no sum, and a NaN stays in the row it belongs to. Of a line that rows
share, only the lanes of rows in the batch change. The order of additions depends on the
sorted positions only: same call, same bits.

Needs: what `unsupported` says. Ids must be proven to lie in [0, V) or be the sentinel
V, sorted: a wild id would be a wild DMA, and the checks are off.
"""

from sparse_adam.kernels.tensorcore.config import Config
from sparse_adam.kernels.tensorcore.update import (
    bytes_moved,
    tensorcore_update,
    unsupported,
)

__all__ = ["Config", "bytes_moved", "tensorcore_update", "unsupported"]
