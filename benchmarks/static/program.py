"""What a program to analyse is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.static.attribution import KernelTotals, RowRule
from benchmarks.static.bundles import BundledKernel
from benchmarks.static.chips import AnalyzedChip

# A jittable function, its arguments, and which of them it updates in place.
Built = tuple[Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Program:
    """A function to compile, and how to read its kernels.

    `kernels` is a regular expression: the kernels that make up the cost of a row.
    `phases` names loops and says how many rows one iteration covers; a loop that no
    rule claims gets its rows from trip counts, or from its DMAs: one for a row of each
    of the `tables` (0: no such guess). `repeats` are phases that only batches with
    repeated ids need. `shared` says that the TensorCores of a device share the ids of
    its kernels; of others, trip counts tell what each core has to do.

    Two kinds of traffic are told here, since no dump tells them: `streamed_rows`, the
    rows that streams of the SparseCores move for each updated row, and `passes` over
    arrays of the table's size, by pipelines or by DMAs of at least `block_bytes`, which
    are then not counted one by one.
    """

    name: str
    build: Callable[[int, int, int], Built]
    kernels: str = r"^(?!TLP$|<)"
    phases: Mapping[str, RowRule] = field(default_factory=dict)
    tables: int = 3
    streamed_rows: float = 0
    passes: int = 0
    block_bytes: int = 0  # 0: no such DMAs
    repeats: tuple[str, ...] = ()
    shared: bool = False
    compiler_options: Mapping[str, str] = field(default_factory=dict)

    def share(
        self,
        kernel: BundledKernel,
        chip: AnalyzedChip,
        ids: int,
        dim: int,
        table_rows: int,
    ) -> KernelTotals:
        """Returns what one core does of a batch.

        The subcores of a chip share the ids, and its TensorCores may share the ids and
        the blocks of a table.
        """
        cores = chip.cores if self.shared else 1
        sharers = chip.subcores if kernel.engine == "subcore" else cores
        return KernelTotals(ids / sharers, dim, table_rows // cores)


def update_arguments(
    rows: int, dim: int, ids: int, dtype: Any = jnp.float32
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Table, momenta, velocities of this dtype, ids and float32 gradients."""
    table = jax.ShapeDtypeStruct((rows, dim), dtype)
    return (
        table,
        table,
        table,
        jax.ShapeDtypeStruct((ids,), jnp.int32),
        jax.ShapeDtypeStruct((ids, dim), jnp.float32),
    )
