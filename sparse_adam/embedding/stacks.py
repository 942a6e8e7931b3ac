"""Stacks: tables that share one array, so that a step reads and updates them at once.

Tables of one width, one set of dtypes and equal optimizers stand one behind the other:

    row      0        V_0   o_1         o_1 + V_1   o_2
             | table 0 |pad | table 1       |  pad  | table 2 ...

Row r of table k is row `offsets[k] + r` of its stack. Offsets are multiples of what
packed storage keeps in one tile, so that each table has lines of its own there. Nobody
looks up the rows between two tables.

Where row r is on device r mod n, tables begin on different devices. Ids are often
sorted by frequency, and one device would have the popular rows of all tables whose
sizes are round numbers.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax.core

from sparse_adam.embedding.config import TableConfig
from sparse_adam.embedding.frozen import Frozen
from sparse_adam.embedding.optimizer import PARAMETERS, Optimizer
from sparse_adam.kernels.layout import SUBLANES, PackedLayout
from sparse_adam.ops.spread import Spread

MAX_STACK_ROWS = 2**30  # an update counts rows and ids together below 2**31


@dataclasses.dataclass(frozen=True)
class Table:
    """A table whose name and optimizer are settled."""

    name: str
    config: TableConfig
    optimizer: Optimizer

    @property
    def trainable(self) -> bool:
        """Returns whether updates move it."""
        return not isinstance(self.optimizer, Frozen)

    @functools.cached_property
    def array_names(self) -> tuple[str, ...]:
        """What TensorFlow calls the arrays of its state, in their order."""
        return (PARAMETERS, *self.optimizer.slot_names)

    @property
    def num_rows(self) -> int:
        """Returns V of the table, as the user has configured it."""
        return self.config.vocabulary_size

    @functools.cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Returns the shapes of these arrays."""
        return _shapes(self.optimizer, self.num_rows, self.config.dim)


@dataclasses.dataclass(frozen=True)
class Stack:
    """Tables that share one array, or one table that stands alone.

    Attributes:
        tables: in the order of their rows.
        offsets: the row of the array where each of them begins.
        spread: the devices that share the rows; None is one device, or what the
            sharding of the arrays tells.
    """

    tables: tuple[Table, ...]
    offsets: tuple[int, ...]
    spread: Spread | None = None

    @property
    def num_rows(self) -> int:
        """Returns V of the array: all rows up to the last one of the last table.

        Rows between two tables, which no id names, are among them.
        """
        return self.offsets[-1] + self.tables[-1].num_rows

    @property
    def dim(self) -> int:
        """Returns D, the width of a row, which is equal for all tables."""
        return self.tables[0].config.dim

    @property
    def optimizer(self) -> Optimizer:
        """Returns the optimizer, which is equal for all tables."""
        return self.tables[0].optimizer

    @property
    def trainable(self) -> bool:
        """Returns whether updates move its tables: all of them, or none."""
        return self.tables[0].trainable

    @property
    def array_names(self) -> tuple[str, ...]:
        """What TensorFlow calls the arrays of a table's state, in their order."""
        return self.tables[0].array_names

    @property
    def stored_rows(self) -> int:
        """Returns the rows of the array with those that fill up devices' parts."""
        if self.spread is None:
            return self.num_rows
        return self.spread.count * self.spread.part_rows(self.num_rows, self.dim)

    @property
    def rows_here(self) -> int:
        """Returns the rows of the array as it is seen here: of a device's part or all.

        A part is seen in a `jax.shard_map` over the axes that the rows are spread over.
        """
        if self.spread is not None and self.spread.is_inside:
            return self.stored_rows // self.spread.count
        return self.stored_rows

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Returns the shapes of the arrays of the stack as they are seen here."""
        return _shapes(self.optimizer, self.rows_here, self.dim)

    @property
    def whole_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Returns the shapes of the arrays of the stack as if on one device."""
        return _shapes(self.optimizer, self.num_rows, self.dim)

    @property
    def title(self) -> str:
        """Returns what errors call the stack: its one table, or all by name."""
        if len(self.tables) == 1:
            return f"table {self.tables[0].name!r}"
        return f"the stack of tables {[table.name for table in self.tables]}"


def _shapes(
    optimizer: Optimizer, num_rows: int, dim: int
) -> tuple[tuple[int, ...], ...]:
    slots = optimizer.rule.slots
    of_slots = ((num_rows,) if s.per == "row" else (num_rows, dim) for s in slots)
    return ((num_rows, dim), *of_slots)


def make_stacks(
    tables: Sequence[Table], stack: bool, spread: Spread | None = None
) -> tuple[Stack, ...]:
    """Puts tables that can share an array into one stack, in their order.

    Args:
        tables: of a layout.
        stack: False leaves every table alone.
        spread: the devices that share the rows of all of them.

    A stack that would have more than `MAX_STACK_ROWS` rows is cut. A table whose
    optimizer updates every row stays alone: with a rate of its own it could not share
    an update, and its update streams the whole array in any case.
    """
    groups: list[list[Table]] = []
    for table in tables:
        for group in groups:
            if stack and _can_share(group, table, spread):
                group.append(table)
                break
        else:
            groups.append([table])
    return tuple(
        Stack(tuple(group), _offsets(group, spread), spread) for group in groups
    )


def _can_share(group: Sequence[Table], table: Table, spread: Spread | None) -> bool:
    first, config = group[0], table.config
    kind = (config.dim, config.dtype, config.slot_dtype)
    return (
        kind == (first.config.dim, first.config.dtype, first.config.slot_dtype)
        and _are_equal(first.optimizer, table.optimizer)
        and table.optimizer.lazy
        and _offsets([*group, table], spread)[-1] + table.num_rows <= MAX_STACK_ROWS
    )


def _are_equal(one: Optimizer, other: Optimizer) -> bool:
    """Tells equal optimizers; a rate that is being traced is equal to itself alone."""
    rates: list[Any] = [one.learning_rate, other.learning_rate]
    if any(isinstance(rate, jax.core.Tracer) for rate in rates):
        return one is other
    return one == other


def _offsets(tables: Sequence[Table], spread: Spread | None) -> tuple[int, ...]:
    tile = SUBLANES * PackedLayout(1, tables[0].config.dim).rows_per_group
    count = 1 if spread is None else spread.count
    starts = count // math.gcd(count, tile)  # devices on which a tile can begin
    offsets = [0]
    for place, table in enumerate(tables[:-1], start=1):
        tiles = -(-(offsets[-1] + table.num_rows) // tile)
        tiles += (place * starts // len(tables) - tiles) % starts
        offsets.append(tile * tiles)
    return tuple(offsets)
