"""jax-tpu-embedding's Adam on the SparseCores, for `static --program`.

It is not installed with the benchmarks: it needs Python 3.12 and a newer JAX. One table
and one feature of one id a sample, on one device; the input is what its preprocessing
on the host makes of a batch. Its stages stand one after the other in the program: those
are the loops of depth one. The last six fetch and write back weights and slots.
"""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.static.chips import CHIPS
from benchmarks.static.program import Built, Program

_LIMIT = 5000  # ids of a partition; v6e has no room for more than about 7,200
_SUBCORES = 16  # of a SparseCore


def build(rows: int, dim: int, ids: int) -> Built:
    """The pass that sorts, sums and updates, as `tpu_sparse_dense_matmul_grad` does."""
    from jax_tpu_embedding.sparsecore.lib.nn import (  # pyright: ignore
        embedding,
        embedding_spec,
    )

    mesh = jax.sharding.get_mesh()
    kind = mesh.devices.flat[0].device_kind
    chip = next(chip for chip in CHIPS.values() if kind in chip.kinds)
    if not chip.subcores:
        raise ValueError(f"{chip.name} has no SparseCore that it could use")
    cores = chip.subcores // _SUBCORES
    table = embedding_spec.TableSpec(
        name="table",
        vocabulary_size=rows,
        embedding_dim=dim,
        initializer=lambda key, shape: jnp.zeros(shape),
        optimizer=embedding_spec.AdamOptimizerSpec(),
        combiner="sum",
        max_ids_per_partition=_LIMIT,
        max_unique_ids_per_partition=_LIMIT,
    )
    features = [
        embedding_spec.FeatureSpec(
            name="feature",
            table_spec=table,
            input_shape=(ids, 1),
            output_shape=(ids, dim),
        )
    ]
    embedding.prepare_feature_specs_for_training(
        features, global_device_count=1, num_sc_per_device=cores
    )
    inputs = embedding.eval_preprocess_sparse_dense_matmul_input_shape(
        features,
        local_device_count=1,
        global_device_count=1,
        num_sc_per_device=cores,
    )
    leaves, tree = jax.tree.flatten(inputs)

    def update(
        weights: jax.Array,
        momenta: jax.Array,
        velocities: jax.Array,
        grads: jax.Array,
        *batch: jax.Array,
    ) -> list[Any]:
        slots = embedding_spec.AdamSlotVariables(momentum=momenta, velocity=velocities)
        tables = {"table": embedding.EmbeddingVariables(table=weights, slot=slots)}
        updated = embedding.tpu_sparse_dense_matmul_grad(
            [grads],
            jax.tree.unflatten(tree, batch),
            tables,
            features,
            global_device_count=1,
            num_sc_per_device=cores,
            step=jnp.int32(1),
        )
        return jax.tree.leaves(updated)

    whole = jax.sharding.PartitionSpec()
    sharded = jax.shard_map(
        update, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False
    )
    stacked = table.stacked_table_spec
    shape = (stacked.stack_vocab_size, stacked.stack_embedding_dim)
    array = jax.ShapeDtypeStruct(shape, jnp.float32)
    grads = jax.ShapeDtypeStruct((ids, dim), jnp.float32)
    batch = (jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    return sharded, (array, array, array, grads, *batch), (0, 1, 2)


# No rule tells the rows of its loops, and none is guessed. Rows that its stages move:
# the sum over a sample 1, the exchange between devices 2, the order by id 2, the sum by
# id 2; then the three gathers 6, m and v 3 each, the weights 4, the three scatters 6.
PROGRAM = Program(
    "jax_tpu_embedding",
    build,
    kernels="^sparse-core-call",
    tables=0,
    streamed_rows=29,
)
