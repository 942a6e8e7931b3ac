"""Twenty-six tables in one stack, as libtpu compiles a step of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sparse_adam.embedding import (
    Adam,
    FeatureConfig,
    TableConfig,
    apply_gradients,
    init,
    lookup,
)
from tests import programs
from tests.kernels.topology import four_chips

TABLES, D, SAMPLES = 26, 128, 8


def test_a_step_has_the_kernels_and_the_sorts_of_one_table(monkeypatch):
    chips = four_chips(monkeypatch, "v6e:2x2", AxisType.Auto)
    mesh = Mesh(np.array(chips.devices.flat[:1]), ("device",))
    whole = NamedSharding(mesh, PartitionSpec())
    tables = [TableConfig(100 + 37 * i, D, name=f"t{i}") for i in range(TABLES)]
    config = [FeatureConfig(table) for table in tables]
    ids = [jnp.zeros(SAMPLES, jnp.int32)] * TABLES

    def step(state, ids):
        gradients = jax.tree.map(jnp.cos, lookup(state, ids))
        return apply_gradients(state, ids, gradients, implementation="sparsecore")

    make = functools.partial(init, config, Adam(0.1), storage="packed")
    state = jax.eval_shape(lambda: make(jax.random.key(0)))
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), (state, ids)
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
    text = programs.text(compiled)
    # One lookup; the update, and that of rows whose ids several subcores share.
    assert text.count('custom_call_target="tpu_custom_call"') == 1 + 2
    assert text.count(" sort(") == 2
    (lines,) = jax.tree.leaves(state)
    assert programs.memory(compiled).alias_size_in_bytes == 4 * lines.size
