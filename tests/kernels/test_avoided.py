"""Kernels of lookups and sorts, which a program can leave out."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparse_adam import avoid_kernels, lookup, plan_update
from sparse_adam.check import shrink
from sparse_adam.check.case import Case
from sparse_adam.check.run import Outcome
from sparse_adam.kernels.avoided import KERNELS, avoided
from tests.kernels.topology import four_chips


def calls(mesh):
    """How many kernels there are in a lookup and in a plan, as lowered for a TPU."""

    def array(shape, dtype):
        sharding = NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    ids = array((16_384,), jnp.int32)
    with jax.set_mesh(mesh):
        found = jax.jit(lookup).lower(array((1_000_000, 128), jnp.float32), ids)
        plan = jax.jit(plan_update, static_argnums=1).lower(ids, 1_000_000)
    return [text.as_text().count("@tpu_custom_call") for text in (found, plan)]


def test_what_is_avoided_is_in_no_program(monkeypatch):
    mesh = four_chips(monkeypatch, "v6e:2x2", AxisType.Explicit)
    mesh = jax.sharding.Mesh(mesh.devices[:1], mesh.axis_names, mesh.axis_types)
    assert calls(mesh) == [1, 1]
    try:
        for kernels, left in (
            (["lookup"], [0, 1]),
            (["sort"], [1, 0]),
            (KERNELS, [0, 0]),
            ([], [1, 1]),
        ):
            avoid_kernels(*kernels)
            assert calls(mesh) == left
    finally:
        avoid_kernels()


def test_another_name_is_refused():
    with pytest.raises(ValueError, match=r"kernels=\['sweep'\] must be some of"):
        avoid_kernels("sort", "sweep")
    assert not avoided("sort")


@pytest.mark.parametrize(
    ("kind", "kernel"), [("lookup", KERNELS[0]), ("update", KERNELS[1])]
)
def test_the_check_tells_which_one_to_avoid(monkeypatch, kind, kernel):
    def run(case):
        return Outcome(case, "ok" if avoided(kernel) else "wrong")

    monkeypatch.setattr(shrink, "run", run)
    ways = shrink.ways_around(Case(None, kind=kind))
    assert ways == [f"sparse_adam.avoid_kernels({kernel!r})"]
    assert not avoided(kernel)
