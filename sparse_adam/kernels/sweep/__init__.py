"""Adam on a whole table, plain or packed, streamed once through a TPU TensorCore.

Why: a row kernel is limited by how fast DMAs are issued. Where a batch touches much of
a table, or `lazy_adam=False` all of it, moving the table in large blocks is faster:
every byte is read once and written once, in place, at the speed of the memory. Each
gradient row is read once, straight through the sort's permutation, and added where it
falls; nothing is materialised in between (`bytes_moved`).

Data flow: grid step k starts the DMAs of table block k, then finishes block k - 1: adds
the gradients of its rows to a block of sums in VMEM, waits for the block, updates it
and starts its way back. Three slots, so that one block arrives while another is updated
and a third one leaves. Occurrences are sorted by id, so those of a block stand
together. They are added in batches of 16, out of a chunk of C gradient rows that were
fetched, by one DMA each, while the chunk before it was added.

Order: a block is written only by its own grid step, and its slot is fetched into only
when it has left. A row's gradients are added one after the other, in the order of the
batch, whatever the block sizes: same call, same bits.

Cores: v4 and v5p run this on two TensorCores. Each has blocks that stand together, its
own scratch, and reads the occurrences of its blocks; a batch that holds some of both is
read by both, and each adds what is its own.

Numerics: float32 between one read and one rounding. A sum starts from -0, which adds
nothing, and is never left there: so -0 marks what the batch did not touch, and where a
lazy update finds it, the old words stay. No other number could do: a sum may be 0, and
a row whose gradients sum to 0 is updated. A gradient is added to its own row, in packed
storage to its own lanes, so a NaN stays in them.

Needs: what `unsupported` says. Ids must be grouped, equal ones side by side, ascending
but for those that are V, which may stand anywhere.
"""

from sparse_adam.kernels.sweep.config import Config
from sparse_adam.kernels.sweep.cost import crossover
from sparse_adam.kernels.sweep.update import bytes_moved, sweep_update, unsupported

__all__ = ["Config", "bytes_moved", "crossover", "sweep_update", "unsupported"]
