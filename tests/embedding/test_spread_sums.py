"""Norms and counts of a batch that is spread over devices, held to those of one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from sparse_adam.embedding import EmbeddingState, batch_stats, gradient_norm
from tests import programs
from tests.embedding.test_on_mesh import features, mesh, start

ROWS = PartitionSpec(("x", "y"))


def summed(state: EmbeddingState, batch: Any) -> Any:
    """The norm of gradients that are exact in every order, and the counts."""
    gradients = {}
    for name in batch:
        config = state.layout.features[list(batch).index(name)].config
        rows = len(batch[name].row_splits) - 1 if name == "ragged" else 0
        shape = (rows or batch[name].shape[0], config.table.dim)
        if config.max_sequence_length:
            shape = (shape[0], config.max_sequence_length, shape[1])
        gradients[name] = jnp.full(shape, 0.5)
    norm = gradient_norm(state, batch, gradients)
    return norm, batch_stats(state, batch)


def check(one: Any, other: Any) -> None:
    """Counts are equal, and norms but for the order of a sum."""
    np.testing.assert_allclose(one[0], other[0], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, one[1], other[1])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_norm_and_counts_are_those_of_one_device(kind):
    names = ("dense", "padded", "ragged")
    one, many = (
        start("plain", None, None, names),
        start("plain", mesh(kind, kind), None, names),
    )
    one_device, spread = jax.jit(summed), jax.jit(summed)
    batch: Any = {}
    for seed, drawn in enumerate(("zipf", "padded")):
        batch = {name: features(drawn, seed)[name] for name in names}
        check(spread(many, batch), one_device(one, batch))
    text = programs.text(programs.as_for_users(spread.lower(many, batch)))
    assert "all-to-all" in text
    # The row splits of ragged ids, and ids where 24 samples do not divide.
    assert "f32" not in "".join(x for x in text.splitlines() if " all-gather(" in x)


def test_within_a_shard_map_each_device_passes_its_own_samples():
    names = ("padded", "sequence")
    one, many = start("plain", None, None, names), start("plain", mesh(), None, names)
    batch = {name: features("zipf", 1)[name] for name in names}
    mapped = jax.shard_map(
        summed, mesh=mesh(), in_specs=(ROWS, ROWS), out_specs=PartitionSpec()
    )
    check(jax.jit(mapped)(many, batch), jax.jit(summed)(one, batch))
