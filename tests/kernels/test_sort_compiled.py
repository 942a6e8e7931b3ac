"""Sorts in the programs that libtpu makes of plans and updates."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparse_adam import PackedTable, UpdatePlan, packed_adam_update, plan_update
from tests import programs
from tests.kernels.topology import four_chips


@pytest.mark.parametrize("planned", [False, True])
def test_an_update_gathers_no_scalars(monkeypatch, planned):
    """Sources and gains ride through the sort; two more sorts bring them to a plan."""
    rows, size, samples = 1_000_000, 8192, 512
    table = jax.ShapeDtypeStruct((rows, 128), jnp.float32)
    packed = jax.eval_shape(PackedTable.pack, table, table, table)
    mesh = four_chips(monkeypatch, "v6e:2x2", AxisType.Explicit)
    mesh = jax.sharding.Mesh(mesh.devices[:1], mesh.axis_names, mesh.axis_types)

    def update(lines, ids, grads, sample_ids, gains, plan):
        return packed_adam_update(
            PackedTable(lines, packed.layout),
            ids,
            grads,
            sample_ids=sample_ids,
            gains=gains,
            plan=UpdatePlan(plan[0], plan[1], rows) if planned else None,
            implementation="sparsecore",
        ).lines

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(mesh, PartitionSpec())
        )

    ids = array((size,), jnp.int32)
    with jax.set_mesh(mesh):
        program = (
            jax.jit(update, donate_argnums=0)
            .lower(
                array(packed.lines.shape, jnp.int32),
                ids,
                array((samples, 128), jnp.float32),
                *(ids, array((size,), jnp.float32), (ids, ids)),
            )
            .compile()
        )
    text = programs.text(program)
    gathered = re.findall(r"= (\S+?)\{\S* gather\(", text)
    assert set(gathered) == {"s32[33]"}  # where the share of each worker begins
    sorts = re.findall(r"= [^\n]*? sort\(", text)
    of_all = [x for x in sorts if f"[{size}]" in x]
    kernels = re.findall(r"%sparse_adam_sort\S* = ", text)
    assert (len(kernels), len(of_all)) == ((1, 1) if planned else (1, 0))


def test_a_plan_of_two_words_compiles_for_7x(monkeypatch):
    mesh = four_chips(monkeypatch, "tpu7x:2x2x1", AxisType.Explicit)
    mesh = jax.sharding.Mesh(mesh.devices[:1], mesh.axis_names, mesh.axis_types)
    ids = jax.ShapeDtypeStruct(
        (65_536,), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec())
    )
    with jax.set_mesh(mesh), programs.compilations() as seconds:
        plan = jax.jit(plan_update, static_argnums=1).lower(ids, 1_000_000)
        text = programs.text(plan.compile())
    assert "sparse_adam_sort" in text and " sort(" not in text
    assert len(seconds) == 1
