"""Updates of the rows of a table, on a CPU, as a custom call in C++: every mode.

Why: XLA's CPU scatter makes the portable path some thirty times slower than the memory
is. This kernel sorts the ids itself, on only the bits that V needs, then touches what
the batch touched: each gradient row is read once, straight through the sort, and each
updated row of the state is read once and written once, in place. Nothing is
materialised in between (`bytes_moved`).

Storage: the library knows neither plain arrays nor lines, only where the rows of the
weights and of each slot begin, how far they are apart and how their numbers are encoded
(`plain_places`, `packed_places`). Plain arrays are one group of V rows. So one code
serves both storages, bit for bit alike. A slot of one number for each row is an array
`[V]` of float32, and only plain storage has them.

Data flow (`update.cc`): the sorted occurrences are cut into blocks of 128, which
the threads of XLA's own pool share. A block sums its runs of equal ids in the
first-level cache and steps their rows at once, while the rows of the next occurrences
are being fetched. A run that several blocks share is summed in parts, and stepped by
the block where it begins: a hot row does not hold up one thread. Without accumulation
the block where a run begins makes all its steps, one after the other.

Order: the blocks depend on N, never on the threads. Within a block a run is added up in
the order of the batch, then block by block. Same call, same bits, on any number of
threads and, as no operation is contracted or reordered, with any instruction set.

Numerics: float32 between one read and one rounding per row and call, to the nearest or
with the noise of `rounding`; IEEE root and division. A lane sees no other, so a NaN
stays where it is; but a rule with one number for each row may spread it over the row.

The formula of each rule stands here a third time, in a file of `rules/` that has the
step of one lane: JAX traces `step` of the Python rule, which cannot be called from
C++, and the NumPy loop is no program at all. `rule.h` says how a rule is written;
nothing else has to be changed for one.

Needs: what `unsupported` says, which is that the library was built and has a loop for
the rule. It checks every id and source itself and skips the wild ones; the ids need not
be sorted, and are not sorted again when they are. It knows no Python, and is loaded
when the package is imported.
"""

from sparse_adam.kernels.cpu import library as library
from sparse_adam.kernels.cpu import lookup as lookup
from sparse_adam.kernels.cpu.library import warn_of_fallback as warn_of_fallback
from sparse_adam.kernels.cpu.places import ENCODINGS as ENCODINGS
from sparse_adam.kernels.cpu.places import MOST_ARRAYS as MOST_ARRAYS
from sparse_adam.kernels.cpu.places import packed_places as packed_places
from sparse_adam.kernels.cpu.places import plain_places as plain_places
from sparse_adam.kernels.cpu.update import attributes as attributes
from sparse_adam.kernels.cpu.update import bytes_moved as bytes_moved
from sparse_adam.kernels.cpu.update import call as call
from sparse_adam.kernels.cpu.update import cpu_update as cpu_update
from sparse_adam.kernels.cpu.update import rule_attributes as rule_attributes
from sparse_adam.kernels.cpu.update import unsupported as unsupported
from sparse_adam.kernels.cpu.update import unsupported_rule as unsupported_rule

# When the package is imported, since a program that was compiled by another process may
# be run without any update being traced. Failures are told when an update is.
library.load()
