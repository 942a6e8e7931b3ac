"""The few operations of a vector subcore that jax's interpreters do not know.

A kernel body gets one of two objects: `Native` says what the compiler gets,
`Interpreted` does the same by operations that the interpreters know. Nothing else in
the body depends on where it runs. What `Native` says only the compiler has seen.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc

from sparse_adam._types import Index, Ref
from sparse_adam.kernels.rounding import round_to_bfloat16
from sparse_adam.kernels.sparsecore.config import Config

NONE = -1  # as the index of a line
Refs: TypeAlias = Sequence[Ref]
Copies: TypeAlias = list[Any]  # each can be started and waited for


@dataclasses.dataclass(frozen=True, slots=True)
class Native:
    """A vector subcore of a mesh with axes `core` and `subcore`."""

    config: Config

    def worker(self) -> jax.Array:
        """The number of this subcore, of all on the device."""
        core, subcore = lax.axis_index("core"), lax.axis_index("subcore")
        return subcore * self.config.cores + core

    def parallel_loop(self, upper: Index, body: Callable, carry: Any = None) -> Any:
        """Calls `body(i)` or `carry = body(i, carry)`; iterations may overlap."""
        if self.config.plain_loops:
            return _in_turn(upper, body, carry)
        return plsc.parallel_loop(0, upper, carry=carry)(body)

    def store_where(
        self, ref: Any, places: jax.Array, values: jax.Array, mask: jax.Array
    ) -> None:
        """Stores the values where `mask` is True: `ref[places[i]] = values[i]`."""
        plsc.store_scatter(ref, [places], values, mask=mask)

    def count(self, mask: jax.Array) -> jax.Array:
        """How many are True, in every lane."""
        return plsc.all_reduce_population_count(mask)

    def put(self, source: Ref, target: Ref) -> None:
        """Copies from the subcore's own memory to HBM, and waits."""
        if hasattr(plsc, "SparseCorePushStreamWarning"):
            # jax 0.12 waits for such a copy without a semaphore, and warns of one.
            pltpu.async_copy(source, target, sem=None).wait()
        else:
            pltpu.sync_copy(source, target)

    def pack(self, low: jax.Array, high: jax.Array) -> jax.Array:
        """Both rounded to bfloat16, to the nearest, in the halves of int32 words."""
        halves = plsc.pack(low, high, format=plsc.PackFormat.INTERLEAVED)
        return plsc.bitcast(halves, jnp.int32)

    def seen_as(self, ref: Any, dtype: Any) -> Any:
        """The same words of 32 bits under another dtype."""
        return ref if ref.dtype == dtype else ref.bitcast(dtype)

    def gather(self, tables: Refs, lists: Refs, tiles: Refs, done: Refs) -> Copies:
        """Indirect streams of some lines of each table, but not of line `NONE`.

        Of each table those in its list, or all of those in one list.
        """
        if self.config.row_copies:
            return [LineCopies(tables, lists, tiles, done, True, self.config.lanes)]
        return [
            pltpu.make_async_copy(table.at[_but_none(list_)], tile, one)
            for table, list_, tile, one in _each(tables, lists, tiles, done)
        ]

    def scatter(
        self,
        tiles: Refs,
        tables: Refs,
        lists: Refs,
        done: Refs,
        *,
        passing_over: bool = True,
    ) -> Copies:
        """The way back. No other line may occur twice, unless with the same words.

        If not `passing_over`, the lists hold no `NONE`.
        """
        if self.config.row_copies:
            return [LineCopies(tables, lists, tiles, done, False, self.config.lanes)]
        return [
            pltpu.make_async_copy(
                tile, table.at[_but_none(list_) if passing_over else list_], one
            )
            for table, list_, tile, one in _each(tables, lists, tiles, done)
        ]


@dataclasses.dataclass(frozen=True, slots=True)
class Interpreted:
    """The same on a CPU: a worker is a grid step, a stream is a loop of row copies."""

    def worker(self) -> jax.Array:
        """The number of this grid step."""
        return pl.program_id(0)

    def parallel_loop(self, upper: Index, body: Callable, carry: Any = None) -> Any:
        """The iterations one after the other."""
        return _in_turn(upper, body, carry)

    def store_where(
        self, ref: Any, places: jax.Array, values: jax.Array, mask: jax.Array
    ) -> None:
        """Stores the values where `mask` is True, one after the other."""

        def one(i: jax.Array, _: None) -> None:
            @pl.when(mask[i])
            def store():
                ref[pl.ds(places[i], 1)] = values[i][None]

        lax.fori_loop(0, values.size, one, None)

    def count(self, mask: jax.Array) -> jax.Array:
        """How many are True, in every lane."""
        return jnp.broadcast_to(jnp.sum(mask, dtype=jnp.int32), mask.shape)

    def put(self, source: Ref, target: Ref) -> None:
        """Copies from the subcore's own memory to HBM, and waits."""
        pltpu.sync_copy(source, target)

    def pack(self, low: jax.Array, high: jax.Array) -> jax.Array:
        """Both rounded to bfloat16, to the nearest, in the halves of int32 words."""
        low, high = round_to_bfloat16(low), round_to_bfloat16(high)
        return lax.shift_right_logical(low, 16) | high

    def seen_as(self, ref: Any, dtype: Any) -> Any:
        """The same: interpreters know no bitcast of a ref, but of whole arrays."""
        del dtype
        return ref

    def gather(self, tables: Refs, lists: Refs, tiles: Refs, done: Refs) -> Copies:
        """Copies of single lines."""
        return [LineCopies(tables, lists, tiles, done, True)]

    def scatter(
        self,
        tiles: Refs,
        tables: Refs,
        lists: Refs,
        done: Refs,
        *,
        passing_over: bool = True,
    ) -> Copies:
        """The way back."""
        return [LineCopies(tables, lists, tiles, done, False, 1, passing_over)]


@dataclasses.dataclass(frozen=True, slots=True)
class LineCopies:
    """A copy for each line that a list names, but none of line `NONE`.

    Lists of several tables name no line at the same places.

    Attributes:
        tables: in HBM.
        lists: one for each table, or one for all.
        tiles: where the lines stand in the subcore's own memory, one behind the other.
        done: a semaphore for each table.
        to_tiles: whether they arrive.
        window: length of the vectors by which a list is read. They may reach beyond it.
        passing_over: `NONE`; else the lists must not hold it.
    """

    tables: Refs
    lists: Refs
    tiles: Refs
    done: Refs
    to_tiles: bool
    window: int = 1
    passing_over: bool = True

    def start(self) -> None:
        """Starts them."""
        self._each(lambda copy: copy.start())

    def wait(self) -> None:
        """Waits for each."""
        self._each(lambda copy: copy.wait())

    def _each(self, do: Callable[[Any], None]) -> None:
        def one(i: jax.Array, _: None) -> None:
            lines = [list_[pl.ds(i, self.window)][0] for list_ in self.lists]

            @pl.when(lines[0] != NONE if self.passing_over else True)
            def copies():
                moved = _each(self.tables, lines, self.tiles, self.done)
                for table, line, tile, done in moved:
                    there, here = table.at[pl.ds(line, 1)], tile.at[pl.ds(i, 1)]
                    ends = (there, here) if self.to_tiles else (here, there)
                    do(pltpu.make_async_copy(*ends, done))

        lax.fori_loop(0, self.lists[0].shape[0], one, None)


@dataclasses.dataclass(frozen=True, slots=True)
class CopiesIf:
    """Copies that are made on a condition."""

    condition: jax.Array
    copies: Copies

    def start(self) -> None:
        """Starts them, if they are to be made."""
        self._each(lambda copy: copy.start())

    def wait(self) -> None:
        """Waits for them, if they were to be made."""
        self._each(lambda copy: copy.wait())

    def _each(self, do: Callable[[Any], None]) -> None:
        @pl.when(self.condition)
        def _():
            for copy in self.copies:
                do(copy)


def _in_turn(upper: Index, body: Callable, carry: Any) -> Any:
    if carry is None:
        return lax.fori_loop(0, upper, lambda i, _: body(i), None)
    return lax.fori_loop(0, upper, body, carry)


def _but_none(list_: Ref) -> plsc.Indices:
    return plsc.Indices(list_, ignored_value=NONE)


def _each(
    tables: Refs, lists: Sequence[Any], tiles: Refs, done: Refs
) -> Iterator[tuple[Ref, Any, Ref, Ref]]:
    """Puts together what belongs to each table; one list may be that of all."""
    lists = [*lists] * (len(tables) if len(lists) == 1 else 1)
    return zip(tables, lists, tiles, done, strict=True)
