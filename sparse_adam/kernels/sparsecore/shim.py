"""The few operations of a vector subcore that jax's interpreters do not know.

A kernel body gets one of two objects: `Native` says what the compiler gets,
`Interpreted` does the same by operations that the interpreters know. Nothing else in
the body depends on where it runs. What `Native` says only the compiler has seen.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc

from sparse_adam._types import Index, Ref
from sparse_adam.kernels.rounding import round_to_bfloat16

NONE = -1  # as the index of a line
Refs: TypeAlias = Sequence[Ref]
Copies: TypeAlias = list[Any]  # each can be started and waited for


@dataclasses.dataclass(frozen=True, slots=True)
class Native:
    """A vector subcore of a mesh with axes `core` and `subcore`."""

    cores: int

    def worker(self) -> jax.Array:
        """The number of this subcore, of all on the device."""
        return lax.axis_index("subcore") * self.cores + lax.axis_index("core")

    def parallel_loop(self, upper: Index, body: Callable, carry: Any = None) -> Any:
        """Calls `body(i)` or `carry = body(i, carry)`; iterations may overlap."""
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

    def gather(self, tables: Refs, indices: Ref, tiles: Refs, done: Ref) -> Copies:
        """Indirect streams of these lines of each table, but not of line `NONE`."""
        some = plsc.Indices(indices, ignored_value=NONE)
        return [
            pltpu.make_async_copy(table.at[some], tile, done)
            for table, tile in zip(tables, tiles, strict=True)
        ]

    def scatter(self, tiles: Refs, tables: Refs, indices: Ref, done: Ref) -> Copies:
        """The way back. No other line may occur twice."""
        some = plsc.Indices(indices, ignored_value=NONE)
        return [
            pltpu.make_async_copy(tile, table.at[some], done)
            for table, tile in zip(tables, tiles, strict=True)
        ]


@dataclasses.dataclass(frozen=True, slots=True)
class Interpreted:
    """The same on a CPU: a worker is a grid step, a stream is a loop of row copies."""

    def worker(self) -> jax.Array:
        """The number of this grid step."""
        return pl.program_id(0)

    def parallel_loop(self, upper: Index, body: Callable, carry: Any = None) -> Any:
        """The iterations one after the other."""
        if carry is None:
            return lax.fori_loop(0, upper, lambda i, _: body(i), None)
        return lax.fori_loop(0, upper, body, carry)

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

    def gather(self, tables: Refs, indices: Ref, tiles: Refs, done: Ref) -> Copies:
        """Copies of single lines."""
        return [_LineCopies(tables, indices, tiles, done, to_tiles=True)]

    def scatter(self, tiles: Refs, tables: Refs, indices: Ref, done: Ref) -> Copies:
        """The way back."""
        return [_LineCopies(tables, indices, tiles, done, to_tiles=False)]


@dataclasses.dataclass(frozen=True, slots=True)
class _LineCopies:
    tables: Refs
    indices: Ref
    tiles: Refs
    done: Ref
    to_tiles: bool

    def start(self) -> None:
        self._each(lambda copy: copy.start())

    def wait(self) -> None:
        self._each(lambda copy: copy.wait())

    def _each(self, do: Callable[[Any], None]) -> None:
        def one(i: jax.Array, _: None) -> None:
            index = self.indices[pl.ds(i, 1)][0]

            @pl.when(index != NONE)
            def copy():
                for table, tile in zip(self.tables, self.tiles, strict=True):
                    line, here = table.at[pl.ds(index, 1)], tile.at[pl.ds(i, 1)]
                    ends = (line, here) if self.to_tiles else (here, line)
                    do(pltpu.make_async_copy(*ends, self.done))

        lax.fori_loop(0, self.indices.shape[0], one, None)
