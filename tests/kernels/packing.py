"""Packing and unpacking, as programs to compile."""

import jax
import jax.numpy as jnp

from sparse_adam import PackedTable


def pack(rows, dim, ids):
    table = jax.ShapeDtypeStruct((rows, dim), jnp.float32)
    return lambda *state: PackedTable.pack(*state).lines, (table,) * 3, ()


def unpack(rows, dim, ids):
    table = jax.ShapeDtypeStruct((rows, dim), jnp.float32)
    packed = jax.eval_shape(PackedTable.pack, table, table, table)

    def arrays(lines):
        return PackedTable(lines, packed.layout).unpack()

    return arrays, (packed.lines,), ()
