"""Packing and unpacking, as programs to compile."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from benchmarks.static.program import Built
from sparse_adam import PackedTable
from sparse_adam.kernels.vmem import round_pair


def pack(rows: int, dim: int, ids: int) -> Built:
    table = jax.ShapeDtypeStruct((rows, dim), jnp.float32)
    return lambda *state: PackedTable.pack(*state).lines, (table,) * 3, ()


def unpack(rows: int, dim: int, ids: int) -> Built:
    table = jax.ShapeDtypeStruct((rows, dim), jnp.float32)
    packed = jax.eval_shape(PackedTable.pack, table, table, table)

    def arrays(lines: jax.Array) -> tuple[jax.Array, ...]:
        return PackedTable(lines, packed.layout).unpack()

    return arrays, (packed.lines,), ()


def pair_by_kernel(rows: int, dim: int, ids: int) -> Built:
    """Two float32 in the halves of a word, as the TensorCore's kernels round them."""

    def kernel(low: jax.Ref, high: jax.Ref, words: jax.Ref) -> None:
        words[...] = round_pair(low[...], high[...])

    array = jax.ShapeDtypeStruct((rows, dim), jnp.float32)
    words = jax.ShapeDtypeStruct((rows, dim), jnp.int32)
    return pl.pallas_call(kernel, out_shape=words, name="pair"), (array, array), ()


def pair_by_xla(rows: int, dim: int, ids: int) -> Built:
    """The same by XLA's conversion."""

    def half(x: jax.Array) -> jax.Array:
        bits = lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
        return bits.astype(jnp.uint32)

    array = jax.ShapeDtypeStruct((rows, dim), jnp.float32)
    return lambda low, high: half(low) | half(high) << 16, (array, array), ()
